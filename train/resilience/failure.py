"""A step that failed: which tensor of which micro-batch was bad, and all that it takes to see that again.

RUN/failure/   failure.json             the step, its batches, what was said of them
               parameters.safetensors   masters, as they were before the step and still are
               batches.safetensors      tokens of each micro-batch, states of the random generators

Written beside and renamed: a folder of this name is whole.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prepare import Batch, InputError
from prepare.files import read_sealed
from prepare.words import command_line, printable

from ..memory import is_out_of_memory
from ..optimizer import MAX_LOSS
from ..step import Sent, TrainStep
from .durable import rename_synced, write_json
from .tensors import load_tensors, save_tensors

FOLDER, STATE, PARAMETERS, BATCHES = "failure", "failure.json", "parameters.safetensors", "batches.safetensors"
_MEND = "the failure cannot be shown again from it"


@dataclass(frozen=True)
class Finding:
    """The first bad tensor of a step."""

    text: str  # "the gradient of w_fc[1] is not finite in batch 25 (micro-batch 2 of 8)"
    micro_batch: int  # from 0


def layers(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A stack of matrices, one for a layer, apart; any other tensor as it is."""
    return [(f"{name}[{i}]", t) for i, t in enumerate(tensor)] if tensor.dim() == 3 else [(name, tensor)]


def find(step: TrainStep, batches: Sequence[Batch]) -> Finding | None:
    """Repeats forward and backward of `batches`, eagerly, and returns what is bad first, None where nothing is.

    No parameter and no moment changes; the gradients are left as they are after the bad micro-batch, or after all.
    """
    step.release()
    gradients = {name: p.main_grad for name, p in step.optimizer.parameters.items()}
    losses, bad = [], None
    step.optimizer.zero_grad()
    for number, batch in enumerate(batches):
        step.loss.zero_()
        step.micro_step(batch.tokens, len(batches))
        losses.append(step.loss.item() * len(batches))
        if not losses[-1] <= MAX_LOSS or not torch.isfinite(step.optimizer.grads.sum()):
            bad = number
            break
    if bad is None:
        return None
    where = f"in batch {batches[bad].index} (micro-batch {bad + 1} of {len(batches)})"
    if not losses[bad] <= MAX_LOSS:
        return Finding(f"loss is {losses[bad]:.4g} {where}", bad)
    parts = [part for name, gradient in gradients.items() for part in layers(name, gradient)]
    names = [name for name, gradient in parts if not torch.isfinite(gradient).all()]
    if not names:
        name, largest = max(((n, g.abs().max().item()) for n, g in parts), key=lambda part: part[1])
        return Finding(f"the sum of all gradients overflows, up to {largest:.4g} in {name}, {where}", bad)
    others = f" (and of {len(names) - 1} more)" if len(names) > 1 else ""
    return Finding(f"the gradient of {names[0]}{others} is not finite {where}", bad)


def explain(step: TrainStep, masters: dict[str, Tensor], sent: Sent, said: str, run: Path) -> str:
    """The line of a bad step, which is kept in the folder of the run with the whole `masters`. `said`: what the loop
    knows of it. Of several ranks one alone repeats it, all their micro-batches one after the other."""
    generators = generator_states()
    try:
        finding = find(step, sent.batches)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        line = f"{said}; there is no memory to repeat it in"
    else:
        number = f"step {sent.values.step:05d}"
        line = f"{number}: {finding.text}" if finding else f"{said}; repeated at once, the step is good"
    try:
        keep(masters, sent, line, generators, run / FOLDER)
    except OSError as error:
        return f"{line}; it could not be kept ({printable(error)})"
    return f"{line}; kept for {command_line('train.replay', run)}"


def generator_states() -> dict[str, Tensor]:
    """No op of the model draws a number today; one that does will be repeated with these."""
    states = {"rng.cpu": torch.get_rng_state()}
    return states | ({"rng.cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def keep(masters: dict[str, Tensor], sent: Sent, line: str, generators: dict[str, Tensor], folder: Path) -> None:
    """Writes `folder`. Raises OSError, and leaves nothing half-written."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        save_tensors(part / PARAMETERS, masters)
        tokens = {f"tokens.{i}": batch.tokens for i, batch in enumerate(sent.batches)}
        save_tensors(part / BATCHES, tokens | generators)
        batches = [{"index": batch.index, "epoch": batch.epoch} for batch in sent.batches]
        write_json(part / STATE, {"step": sent.values.step, "line": line, "batches": batches})
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier process, which went on from a checkpoint
        rename_synced(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@dataclass(frozen=True)
class Failure:
    """What `keep` has written."""

    step: int
    line: str
    batches: list[Batch]
    parameters: dict[str, Tensor]
    generators: dict[str, Tensor]


def read_failure(run: Path) -> Failure:
    """Raises InputError where the run has none, or it is damaged."""
    folder = run / FOLDER
    if not folder.is_dir():
        raise InputError(f"{run} has no step that failed: there is nothing to show again")
    state = read_sealed(folder / STATE, _MEND)
    tensors = load_tensors(folder / BATCHES, _MEND)
    try:
        batches = [
            Batch(tokens=tensors.pop(f"tokens.{i}"), epoch=batch["epoch"], index=batch["index"], state={})
            for i, batch in enumerate(state["batches"])
        ]
        generators = {name: tensors[name] for name in ("rng.cpu", "rng.cuda") if name != "rng.cuda" or name in tensors}
        return Failure(state["step"], state["line"], batches, load_tensors(folder / PARAMETERS, _MEND), generators)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / STATE} does not fit {BATCHES} ({error}); {_MEND}") from None
