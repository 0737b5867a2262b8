"""The calls of the ops, watched at the door of `kernels`: what a model really calls, without a list kept by hand."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

# Public functions in the files of ops that compute nothing of a training step.
HELPERS = (
    "compiled_attention", "prepare_compiled_attention", "rotary_tables", "second_moment_shape", "softcapped_logits",
)  # fmt: skip


def op_names() -> list[str]:
    """Every op at the door: a public function that an op's file defines and `HELPERS` does not name."""
    door = sys.modules[__package__]
    shared = {f"{__package__}.common", f"{__package__}.choice", __name__}
    functions = [(name, getattr(door, name)) for name in door.__all__ if name not in HELPERS]
    return [name for name, value in functions if inspect.isfunction(value) and value.__module__ not in shared]


@contextmanager
def watched(call: Callable) -> Iterator[None]:
    """Inside, `kernels.NAME(*args, **kwargs)` returns `call(NAME, op, args, kwargs)` for every op."""
    door = sys.modules[__package__]
    ops = {name: getattr(door, name) for name in op_names()}

    def through(name: str, op: Callable) -> Callable:
        @wraps(op)
        def of_the_door(*args, **kwargs):
            return call(name, op, args, kwargs)

        return of_the_door

    try:
        for name, op in ops.items():
            setattr(door, name, through(name, op))
        yield
    finally:
        for name, op in ops.items():
            setattr(door, name, op)
