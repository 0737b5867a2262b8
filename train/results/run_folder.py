"""The run's folder: config.json, metrics.jsonl, tokenizer.json, checkpoints/, model.safetensors, summary.json."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from model import GPT, GPTConfig
from model.gpt import parameter_shapes
from prepare import InputError, Tokenizer
from prepare.files import read_sealed

from ..config import TrainConfig, runs_folder
from ..resilience.durable import LOCK, lock, replace_file, sync, write_json
from ..resilience.tensors import load_tensors, save_tensors
from .evals import append_eval, cut_evals
from .metrics import jsonable
from .provenance import short_commit, source_state
from .track import Tracking

_MEND = "train it again"


def source_commit() -> str | None:
    """As the ledger names it; None outside a repository."""
    return short_commit(source_state())


def default_run_dir(name: str) -> Path:
    return runs_folder() / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"


def environment() -> dict:
    """What the bits of a result depend on beside configuration and data."""
    return {
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "commit": source_commit(),
    }


def make_folder(path: Path, named_by_user: bool) -> Path:
    """A new folder, or an empty one where the user named it. A name of ours that another run has taken, which began in
    the same second, gets a number: the folder that is returned. Raises InputError."""
    mend = "choose another --run-dir" if named_by_user else "choose another --name, or a --run-dir"
    # A lock alone is what a process left that ended before it wrote anything.
    if named_by_user and path.exists() and (not path.is_dir() or any(p.name != LOCK for p in path.iterdir())):
        what = "not empty" if path.is_dir() else "a file"
        raise InputError(f"the run folder {path} is {what}: {mend}")
    wanted, number = path, 1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                path.mkdir(exist_ok=named_by_user)
                break
            except FileExistsError:
                if named_by_user:
                    raise
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")
        sync(path.parent)
        return path
    except OSError as error:
        raise InputError(f"cannot make the run folder {path}: {error.strerror}; {mend}") from None


@contextmanager
def reserved_run_dir(name: str) -> Iterator[Path]:
    """A path for a group of runs: while it lasts, an empty folder keeps every other run and group from its name."""
    path = make_folder(default_run_dir(name), named_by_user=False)
    try:
        yield path
    finally:
        with suppress(OSError):  # no longer empty, or no longer there: not ours to mind
            path.rmdir()


class RunFolder:
    """A new folder for a run (see `make_folder`), or with `reopen` one that goes on. Locked: no other process writes to
    it.

    Raises InputError where a folder is in the way.
    """

    def __init__(self, path: Path, named_by_user: bool = True):
        self.path = make_folder(path, named_by_user)
        self._open()

    @classmethod
    def reopen(cls, path: str | Path) -> "RunFolder":
        """Of an interrupted run. Raises InputError where it is finished, or in use."""
        folder = cls.__new__(cls)
        folder.path = Path(path)
        if not (folder.path / "config.json").is_file():
            raise InputError(f"{path} is not a run: it has no config.json")
        folder._check_unfinished()
        folder._open()
        try:
            folder._check_unfinished()  # by whoever held the lock until now
        except InputError:
            folder.close()
            raise
        return folder

    @classmethod
    def of_another(cls, path: str | Path) -> "RunFolder":
        """The folder of a run that rank 0 keeps, as the other ranks know it: where it is. They never write to it."""
        folder = cls.__new__(cls)
        folder.path, folder.watchers, folder._metrics, folder._lock = Path(path), [], None, None
        return folder

    def _open(self) -> None:
        self._metrics, self._torn = None, False
        self.watchers: list[Tracking] = []  # write each row of metrics too
        self._lock = lock(self.path)
        if self._lock is None:
            raise InputError(f"{self.path} is in use by another process: wait for it, or stop it")

    def _check_unfinished(self) -> None:
        if self.finished:
            raise InputError(f"{self.path} is finished: there is nothing to resume")

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        return (self.path / "summary.json").exists()

    def write_config(
        self, config: dict, model: dict, data: dict, tiles: dict, tokenizer_file: bytes, launch: str | None = None,
        init_from: dict | None = None,
    ) -> None:  # fmt: skip
        """`launch`: of torchrun, by which what it starts again finds the run. `init_from`: see `Record`."""
        began = {"init_from": init_from} if init_from else {}
        saved = {"config": config, "model": model, "data": data, "tiles": tiles, "launch": launch, **began}
        write_json(self.path / "config.json", {**saved, **environment()})
        replace_file(self.path / "tokenizer.json", tokenizer_file)

    def write_changes(self, diff: bytes) -> None:
        replace_file(self.path / "changes.diff", diff)

    def write_sample(self, text: str) -> None:
        replace_file(self.path / "sample.txt", text.encode(errors="replace"))

    def write_metrics(self, row: dict) -> None:
        """Appends one step, with one call of the system: what was printed is in the file. A full disk may tear a line;
        the next one is still its own."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("ab", buffering=0)
        line = b"\n" * self._torn + (json.dumps(row) + "\n").encode()
        self._torn = self._metrics.write(line) < len(line)
        for watcher in self.watchers:
            watcher.write(row)

    def cut_metrics(self, step: int) -> None:
        """Leaves the rows before `step`; those after it, and damaged ones, go. Each line that is left ends as one."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        replace_file(path, b"".join(line + b"\n" for line in lines if _step_of(line) in range(step)))

    def write_eval(self, row: dict) -> None:
        append_eval(self.path, row)
        for watcher in self.watchers:
            watcher.write({"step": row["step"], "eval_val_bpb": row["val_bpb"]})

    def cut_logs(self, step: int, evaluated: int) -> None:
        """Leaves of both logs what a checkpoint of `step` stands for; `evaluated`: at which the last evaluation was."""
        self.cut_metrics(step)
        cut_evals(self.path, evaluated)

    def write_model(self, weights: dict[str, torch.Tensor]) -> None:
        """fp32 tensors, from any device."""
        save_tensors(self.path / "model.safetensors", weights)

    def write_summary(self, summary: dict) -> None:
        write_json(self.path / "summary.json", jsonable(summary))

    def tell(self, summary: dict, sample: str) -> None:
        """The watchers: how the run has ended."""
        for watcher in self.watchers:
            watcher.end(jsonable(summary), sample)

    def close(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
        for watcher in self.watchers:
            watcher.close()
        if self._lock is not None:
            os.close(self._lock)
            if self.finished:  # nobody wants the lock any more: who gets it all the same sees that it is finished
                with suppress(OSError):
                    (self.path / LOCK).unlink()


def _step_of(line: bytes) -> int | None:
    """Of a line of metrics.jsonl; None where it is damaged: torn by a crash, or a bit of it has changed."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def load_run(folder: str | Path, device: str = "cpu") -> tuple[GPT, Tokenizer, dict]:
    """Model (in fp32), tokenizer and config.json of a finished run.

    Raises InputError where the folder is no finished run.
    """
    folder = Path(folder)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is not a finished run: it has no {name}")
    saved, shape = read_config(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.json", f"copy that of its data folder there, or {_MEND}")
    if tokenizer.fingerprint != saved["data"]["tokenizer_sha256"] or tokenizer.vocab_size != shape.vocab_size:
        raise InputError(f"{folder / 'tokenizer.json'} is not the tokenizer of this run; {_MEND}")
    weights = load_tensors(folder / "model.safetensors", _MEND)
    model = build_model(shape, weights, device, folder)
    return model.eval(), tokenizer, saved


def read_config(folder: Path) -> tuple[dict, GPTConfig]:
    """config.json of a run, and the shape of its model. Raises InputError."""
    path = folder / "config.json"
    saved = read_sealed(path, _MEND)
    try:
        shape = GPTConfig(**saved["model"])
        TrainConfig.from_json(saved["config"])
        saved["data"]["tokenizer_sha256"], saved["data"]["folder"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not the configuration of a run ({error}); {_MEND}") from None
    return saved, shape


def build_model(shape: GPTConfig, weights: dict[str, torch.Tensor], device: str, folder: Path) -> GPT:
    """A model with these weights, in fp32. Raises InputError where they have other shapes, before anything is
    allocated."""
    wanted = parameter_shapes(shape)
    if {name: tuple(w.shape) for name, w in weights.items()} != wanted:
        raise InputError(
            f"the weights in {folder} are not those of model/gpt.py as it is: go back to the run's commit, or {_MEND}"
        )
    model = GPT(shape, device=device)
    model.load_state_dict(weights)
    return model
