"""The run's folder: config.json, metrics.jsonl, tokenizer.json, model.safetensors, summary.json."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from model import GPT, GPTConfig
from model.gpt import parameter_shapes
from prepare import InputError, Tokenizer
from prepare.files import read_sealed, sealed

from .config import TrainConfig
from .tensors import load_tensors, save_tensors

_MEND = "train it again"


def write_json(path: Path, value: dict) -> None:
    """Writes beside, then renames: a reader sees the old file or the new one, whole. Sealed, for `read_sealed`."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(sealed(value), indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def source_commit() -> str | None:
    """The commit the code was run from, with a + where files differ from it; None outside a repository."""
    try:
        here = Path(__file__).parent
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")


class RunFolder:
    """A new folder for a run. Raises InputError where one is in the way."""

    def __init__(self, path: str | None, name: str):
        default = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
        self.path = Path(path) if path else default
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise InputError(f"the run folder {self.path} is not empty: choose another --run-dir")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot make the run folder {self.path}: {error.strerror}") from None
        self._metrics = None

    def write_config(self, config: dict, model: dict, data: dict, tokenizer_file: Path) -> None:
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        write_json(
            self.path / "config.json",
            {"config": config, "model": model, "data": data, "versions": versions, "commit": source_commit()},
        )
        shutil.copyfile(tokenizer_file, self.path / "tokenizer.json")

    def write_metrics(self, row: dict) -> None:
        """Appends one step. Flushed a line at a time: what was printed is on disk."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a", buffering=1, encoding="utf-8")
        self._metrics.write(json.dumps(row) + "\n")

    def write_model(self, weights: dict[str, torch.Tensor]) -> None:
        part = self.path / "model.safetensors.part"
        save_tensors(part, weights)
        os.replace(part, self.path / "model.safetensors")

    def write_summary(self, summary: dict) -> None:
        write_json(self.path / "summary.json", summary)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()


def load_run(folder: str | Path, device: str = "cpu") -> tuple[GPT, Tokenizer, dict]:
    """Model (fp32 on a CPU; bf16, scalars excepted, on a GPU), tokenizer and config.json of a finished run.

    Raises InputError where the folder is no finished run.
    """
    folder = Path(folder)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a finished run: it has no {name}")
    saved, shape = read_config(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    if tokenizer.fingerprint != saved["data"]["tokenizer_sha256"] or tokenizer.vocab_size != shape.vocab_size:
        raise InputError(f"{folder / 'tokenizer.json'} is not the tokenizer of this run; {_MEND}")
    weights = load_tensors(folder / "model.safetensors", _MEND)
    model = build_model(shape, weights, device, folder)
    if device == "cuda":
        model.to_forward_dtype(torch.bfloat16)
    return model.eval(), tokenizer, saved


def read_config(folder: Path) -> tuple[dict, GPTConfig]:
    """config.json of a run, and the shape of its model. Raises InputError."""
    path = folder / "config.json"
    saved = read_sealed(path, _MEND)
    try:
        shape = GPTConfig(**saved["model"])
        TrainConfig(**saved["config"])
        saved["data"]["tokenizer_sha256"], saved["data"]["folder"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the configuration of a run ({error}); {_MEND}") from None
    return saved, shape


def build_model(shape: GPTConfig, weights: dict[str, torch.Tensor], device: str, folder: Path) -> GPT:
    """A model with these weights, in fp32. Raises InputError where they have other shapes, before anything is
    allocated."""
    wanted = parameter_shapes(shape)
    if {name: tuple(w.shape) for name, w in weights.items()} != wanted:
        raise InputError(f"the weights in {folder} are not those of the model in its config.json; {_MEND}")
    model = GPT(shape, device=device)
    model.load_state_dict(weights)
    return model
