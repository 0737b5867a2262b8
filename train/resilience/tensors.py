"""Tensors in safetensors files, with a SHA-256 that is compared on reading: a changed bit is never a weight."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from prepare import InputError
from prepare.files import SEAL, library_path

from .durable import replace_file

DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8"}  # as the format spells them


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256, in hex, over name, dtype, shape and bytes of each. On the CPU, contiguous."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(_bytes(tensor))
    return sha.hexdigest()


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def header(tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """What precedes the bytes of `tensors`, which lie one behind the other: length, names, dtypes, shapes, offsets, and
    `metadata` in the file's own place for it.

    Written here, because the library's own writer reports a full disk as anything but an OSError, and cannot take a
    checkpoint's tensors from the one buffer that they lie in. https://github.com/huggingface/safetensors#format
    """
    entries, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    content = json.dumps(entries).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """From any device, with `metadata` beside the hash. On the disk, whole, when it returns. Raises OSError."""
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # As the library lays them out, each where its dtype wants it: the largest elements first.
    here = dict(sorted(here.items(), key=lambda item: -item[1].element_size()))
    replace_file(path, header(here, {SEAL: digest(here), **(metadata or {})}), *map(_bytes, here.values()))


def load_tensors(path: Path, mend: str) -> dict[str, torch.Tensor]:
    """To the CPU. `mend` ends the line of the InputError where the file is not as it was written."""
    try:
        with library_path(path) as name, safe_open(name, "pt") as file:
            expected = (file.metadata() or {}).get(SEAL)
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{path} cannot be read ({reason}); {mend}") from None
    if digest(tensors) != expected:
        raise InputError(f"{path} has changed since it was written (its {SEAL} disagrees); {mend}")
    return tensors
