"""Tensors in safetensors files, with a SHA-256 that is compared on reading: a changed bit is never a weight."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prepare import InputError
from prepare.files import SEAL


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256, in hex, over name, dtype, shape and bytes of each. On the CPU, contiguous."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """From any device."""
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(here, path, metadata={SEAL: digest(here)})


def load_tensors(path: Path, mend: str) -> dict[str, torch.Tensor]:
    """To the CPU. `mend` ends the line of the InputError where the file is not as it was written."""
    try:
        with safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get(SEAL)
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{path} cannot be read ({reason}); {mend}") from None
    if digest(tensors) != expected:
        raise InputError(f"{path} has changed since it was written (its {SEAL} disagrees); {mend}")
    return tensors
