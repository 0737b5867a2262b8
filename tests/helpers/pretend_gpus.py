"""GPUs that are nothing but a list: a program `nvidia-smi` that names them, found before any other."""

import os
from pathlib import Path

import pytest

from train import leases


def uuid_of(number: int) -> str:
    return f"GPU-{number:08x}-0000-4000-8000-000000000000"


def pretend_gpus(folder: Path, count: int, patch: pytest.MonkeyPatch) -> list[str]:
    """From here on, this process and those that it starts find so many, and leases below `folder`. Their UUIDs."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    program = folder / "bin" / "nvidia-smi"
    rows = "".join(f"{i}, {uuid_of(i)}, Pretended, of one kind\n" for i in range(count))
    program.write_text(f"#!/bin/sh\ncat <<'.'\n{rows}.\n" if count else "#!/bin/sh\necho No devices were found\n")
    program.chmod(0o755)
    patch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    patch.setenv("TIMEBOX_HOME", str(folder / "home"))
    # A process keeps its GPU until it ends; this one goes on to other tests.
    patch.setenv("CUDA_VISIBLE_DEVICES", "")
    patch.delenv("CUDA_VISIBLE_DEVICES")
    patch.setattr(leases, "held", [])
    return [uuid_of(i) for i in range(count)]
