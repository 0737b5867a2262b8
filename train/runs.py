"""The run's folder: config.json, metrics.jsonl, tokenizer.json, model.safetensors, summary.json."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model import GPT, GPTConfig
from prepare import InputError, Tokenizer

from .tensorboard import EventWriter


def write_json(path: Path, value: dict) -> None:
    """Writes beside, then renames: a reader sees the old file or the new one, whole."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
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


def default_run_dir(name: str) -> Path:
    return Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"


class RunFolder:
    """A new folder for a run. Raises InputError where one is in the way."""

    def __init__(self, path: Path):
        self.path = path
        self.watchers: list[EventWriter] = []  # write each row of metrics too
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
        for watcher in self.watchers:
            watcher.write(row)

    def write_model(self, weights: dict[str, torch.Tensor]) -> None:
        part = self.path / "model.safetensors.part"
        save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, part)
        os.replace(part, self.path / "model.safetensors")

    def write_summary(self, summary: dict) -> None:
        write_json(self.path / "summary.json", summary)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        for watcher in self.watchers:
            watcher.close()


def load_run(folder: str | Path, device: str = "cpu") -> tuple[GPT, Tokenizer, dict]:
    """Model (fp32 on a CPU; bf16, scalars excepted, on a GPU), tokenizer and config.json of a finished run.

    Raises InputError where the folder is no finished run.
    """
    folder = Path(folder)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a finished run: it has no {name}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = GPT(GPTConfig(**config["model"]), device=device)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder} does not hold together as a run ({reason}): train it again") from None
    if device == "cuda":
        model.to_forward_dtype(torch.bfloat16)
    return model.eval(), Tokenizer.load(folder / "tokenizer.json"), config
