"""What makes a run in this process the same, and short, on any machine."""

from pathlib import Path

import psutil
import pytest

from prepare import limits


def no_machines_memory(patch: pytest.MonkeyPatch) -> None:
    """16 GiB are free and no control group counts, whatever this machine has and a container allows."""
    memory, groups = psutil.virtual_memory(), limits.control_groups
    memory = memory._replace(total=24 * 2**30, available=16 * 2**30)
    patch.setattr(psutil, "virtual_memory", lambda: memory)
    patch.setattr(limits, "control_groups", lambda name, root: [] if root == Path("/") else groups(name, root))


def short_end(patch: pytest.MonkeyPatch, pictures: bool = False) -> None:
    """What ends a run would take most of a tiny run's time: no curves are drawn but where `pictures` are asked for, and
    the audit sums probabilities at fewer positions."""
    if not pictures:
        patch.setattr("train.curves._draw", lambda folder, steps: folder)
    patch.setattr("train.results.audit.SUM_TOKENS", 2**11)
