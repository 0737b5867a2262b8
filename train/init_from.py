"""`--init-from RUN`: a new run that begins with the weights of a finished one.

Only the weights are taken over, as fp32 masters. The optimizer's moments begin at zero, the schedule and the budget
anew, and so does the order of the data. The model is RUN's: each option of the help's group `model` is as RUN had it
where no flag spells another, and so is the data's folder. What a flag spells must be no other model to the weights:
`MAY_DIFFER` has what may change.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import GPTConfig
from model.gpt import parameter_shapes
from prepare import Dataset, InputError
from prepare.files import SEAL, library_path
from prepare.words import command_line, printable

from .config import TrainConfig
from .optimizer import Optimizer
from .ranks import Ranks
from .ranks.parts import Kept
from .resilience.tensors import load_tensors
from .results.ledger import name_of
from .results.record import Record
from .results.run_folder import read_config

MEND = "name another run"
# Of a model's shape, what no weight depends on: longer rows, say, may be learned from where the run has ended.
MAY_DIFFER = ("seq_len", "window_pattern", "short_window", "rope_base", "key_offset", "init_scale", "lambda_r_init",
              "lambda_0_init")  # fmt: skip


def model_options() -> list[str]:
    """The fields of TrainConfig in the help's group `model`."""
    found, group = [], ""
    for f in dataclasses.fields(TrainConfig):
        group = f.metadata.get("begins", group)
        if group == "model":
            found.append(f.name)
    return found


@dataclass(frozen=True)
class Weights:
    """Those of a finished run, not yet read."""

    folder: Path
    saved: dict  # its config.json
    shape: GPTConfig
    name: dict[str, str]  # `run`, and `sha256` over the weights as `digest` of resilience/tensors.py takes it

    @classmethod
    def of(cls, run: str) -> "Weights":
        """Raises InputError where `run` is the folder of no finished run."""
        folder = Path(run)
        path = folder / "model.safetensors"
        if (folder / "config.json").is_file() and not path.is_file():
            go_on = command_line("train", "--resume", folder)
            raise InputError(f"--init-from {run} is not finished: it has no {path.name}; {go_on} goes on with it")
        if not path.is_file():
            raise InputError(f"--init-from {run} is no run: it has no {path.name}; {MEND}")
        saved, shape = read_config(folder)
        try:
            with library_path(path) as name, safe_open(name, "pt") as file:
                sha256 = (file.metadata() or {})[SEAL]
        except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise InputError(f"{path} cannot be read ({reason}); {MEND}") from None
        return cls(folder, saved, shape, {"run": name_of(folder), "sha256": sha256})

    def options(self, config: TrainConfig) -> dict[str, Any]:
        """What `config` leaves open of the model and of the data. An option at its default counts as left open."""
        theirs = TrainConfig.from_json(self.saved["config"])
        defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}
        found = {
            key: getattr(theirs, key) for key in model_options() if getattr(config, key) == defaults[key]
        }  # fmt: skip
        return found | ({"data": str(self.saved["data"]["folder"])} if config.data is None else {})

    def check(self, shape: GPTConfig, data: Dataset) -> None:
        """Raises InputError where the weights are for other tokens, or for another shape."""
        if data.tokenizer.fingerprint != self.saved["data"]["tokenizer_sha256"]:
            again = "prepare it with --tokenizer and the folder that RUN was trained on"
            raise InputError(f"--init-from {self.folder}: the data in {data.folder} has another tokenizer; {again},"
                             " or leave --data out")  # fmt: skip
        ours, theirs = dataclasses.asdict(shape), dataclasses.asdict(self.shape)
        different = [
            f"{key} was {theirs[key]!r} and is {ours[key]!r}" for key in ours
            if ours[key] != theirs[key] and key not in MAY_DIFFER
        ]  # fmt: skip
        if different:
            raise InputError(f"--init-from {self.folder}: its weights do not fit this model: {', '.join(different)};"
                             " leave these options out")  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        """fp32, on the CPU. Raises InputError where they are damaged, or not of model/gpt.py as it is."""
        tensors = load_tensors(self.folder / "model.safetensors", MEND)
        if {name: tuple(w.shape) for name, w in tensors.items()} != parameter_shapes(self.shape):
            raise InputError(f"--init-from {self.folder}: its weights are not those of model/gpt.py as it is:"
                             f" go back to its commit, or {MEND}")  # fmt: skip
        return tensors


def of_run(config: TrainConfig, record: Record, ranks: Ranks) -> tuple[Weights | None, TrainConfig]:
    """The weights that a new run begins with, on rank 0, and its configuration with what it takes over. Raises
    InputError."""
    weights = ranks.first_does(lambda: Weights.of(config.init_from))
    record.init_from = ranks.of_first(weights and weights.name)
    taken = ranks.first_does(lambda: weights.options(config))
    return weights, dataclasses.replace(config, **ranks.of_first(taken))


def begin_with(optimizer: Optimizer, tensors: dict[str, Tensor] | None) -> None:
    """Makes these the masters, and the parameters what they are rounded to. Rank 0 gives the tensors, for all."""
    ranks = optimizer.ranks
    for name, master in optimizer.masters.items():
        Kept(optimizer.stored[name].cut, master).restore(ranks, tensors[name] if ranks.first else None)
    optimizer.round_masters()


def said(init_from: dict[str, str]) -> str:
    """For the header of a run."""
    return (
        f"the weights {init_from['sha256'][:8]} of {printable(init_from['run'])}; moments, schedule and budget begin"
        " anew; its number is compared with no run but those from the same weights"
    )
