"""`python -m train.replay RUN`: the step that a run failed on, once more, and what its tensors hold."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import kernels
from prepare import InputError
from prepare.arguments import Parser, command
from prepare.errors import one_line

from .config import TrainConfig
from .device import keep_to_the_cores_allowed, on_device, pick_device
from .memory import is_out_of_memory
from .optimizer import Optimizer
from .resilience.failure import find, layers, read_failure
from .results.run_folder import build_model, read_config
from .step import TrainStep
from .tune import saved_tiles


def tensors_of(result: object) -> Iterator[Tensor]:
    """Those that an op returned, also as `kernels.Factors` or `kernels.GradScaled`."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from tensors_of(part)


def activations(step: TrainStep, tokens: Tensor) -> list[str]:
    """What each op of the forward of `tokens` [B, T + 1] returns, in its order, with the layer it belongs to: a line a
    tensor, taken at once, because a later op may write over it."""
    seen: list[str] = []
    tokens, layer, run_layer = tokens.to(step.device), None, step.model._layer

    def call(name: str, op: Callable, args: tuple, kwargs: dict) -> object:
        result = op(*args, **kwargs)
        label = name if layer is None else f"{name}[{layer}]"
        seen.extend(line(label, tensor) for tensor in tensors_of(result))
        return result

    def in_layer(i: int, *args) -> object:
        nonlocal layer
        layer = i
        result = run_layer(i, *args)
        layer = None
        return result

    step.model._layer = in_layer
    try:
        with torch.no_grad(), step.precision(), kernels.watched(call):
            step.model(tokens[:, :-1], tokens[:, 1:])
    finally:
        del step.model._layer
    return seen


def line(name: str, tensor: Tensor) -> str:
    """How many elements of a tensor are not finite, and between what the others lie."""
    finite = tensor[torch.isfinite(tensor)].float()
    ends = [f"{end.item():.4g}" for end in finite.aminmax()] if finite.numel() else ["n/a"] * 2
    bad = tensor.numel() - finite.numel()
    return f"  {name:<38} {f'{bad:,} of {tensor.numel():,}':>21} {ends[0]:>11} {ends[1]:>11}"


def table(title: str, lines: list[str]) -> str:
    return "\n".join([f"{title:<40} {'not finite':>21} {'min':>11} {'max':>11}", *lines])


def replay(run: Path, wanted_device: str | None) -> bool:
    """Prints what the step does now. Returns whether it fails again. Raises InputError."""
    keep_to_the_cores_allowed()
    failure = read_failure(run)
    saved, shape = read_config(run)
    config = TrainConfig.from_json(saved["config"])
    device = pick_device(wanted_device or config.device)
    kernels.choose(saved_tiles(saved).table)
    config = on_device(config, shape, device)
    model = build_model(shape, failure.parameters, device, run)
    optimizer = Optimizer(model, config, config.forward_dtype)
    step = TrainStep(model, optimizer, config.autocast)
    torch.set_rng_state(failure.generators["rng.cpu"])
    if device == "cuda" and "rng.cuda" in failure.generators:
        torch.cuda.set_rng_state(failure.generators["rng.cuda"])
    finding = find(step, failure.batches)
    now = f"step {failure.step:05d}: {finding.text if finding else 'the loss and all gradients are good'}"
    print(f"FAIL: {now}" if finding else now)
    if now != failure.line:
        print(f"in the run it was: {failure.line}")
    parts = [line(*part) for name, master in optimizer.masters.items() for part in layers(name, master)]
    print(table("parameters", parts))
    batch = failure.batches[finding.micro_batch if finding else -1]
    print(table(f"activations of batch {batch.index}, in order", activations(step, batch.tokens)))
    gradients = [line(*part) for name, p in optimizer.parameters.items() for part in layers(name, p.main_grad)]
    print(table(f"gradients after batch {batch.index}", gradients))
    return finding is not None


def main(args: list[str] | None = None) -> int:
    """Exit codes: 1 where the step fails again; 0 where it does not; 2 bad input."""
    parser = Parser("train.replay", __doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a run that ended with FAIL")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(default: as the run)")
    options = parser.parse_args(args)
    try:
        return int(replay(Path(options.run), options.device))
    except (InputError, OSError) as error:
        print(f"error: {one_line(error, 'name another RUN')}", file=sys.stderr)
        return 2
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print("error: the step does not fit into the memory of this machine", file=sys.stderr)
        return 2


if __name__ == "__main__":
    command(main)
