"""Whether Triton can launch kernels here, asked before any is compiled: that takes minutes, and launching comes after.

When it is first asked for its target, Triton builds its way to the driver, a Python module in C, and keeps it in its
cache. Up to 3.6 it builds another for each kernel.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prepare import InputError
from prepare.words import command_line, install_line


def check_launching() -> None:
    """Raises InputError, in a line with the mend, where Triton has no way to the GPU."""
    said = bytearray()
    try:
        with _errors_into(said):
            _build_all()
    except Exception as error:  # of any kind: each way to fail has its own
        what, mend = _explained(error, said.decode(errors="replace"))
        raise InputError(f"Triton cannot launch kernels here: {what}; {mend}, or train with --ops reference") from None


def _build_all() -> None:
    """What Triton builds before the first launch, and a file in its cache."""
    import triton
    from triton.backends.nvidia import driver

    triton.runtime.driver.active.get_current_target()
    folder = Path(triton.knobs.cache.dir)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
    if hasattr(driver, "make_launcher") and isinstance(triton.runtime.driver.active, driver.CudaDriver):
        from triton.runtime.build import _build

        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "launcher.c"
            source.write_text("#include <Python.h>\n", encoding="utf-8")
            _build("launcher", str(source), scratch, [], [], [], [])


@contextmanager
def _errors_into(kept: bytearray) -> Iterator[None]:
    """Inside, what this process and those that it starts write to standard error goes into `kept`: a compiler says
    there what is wrong."""
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            kept += file.read()


def _explained(error: Exception, said: str) -> tuple[str, str]:
    """What is wrong, and what mends it. `said`: by the compiler."""
    compiler, cache = os.environ.get("CC"), "name a folder of your own in TRITON_CACHE_DIR"
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        return "it is not installed", install_line("-e", ".")
    if isinstance(error, ImportError):
        return _first_line(error), f"{cache}, where programs may be executed"
    if isinstance(error, subprocess.CalledProcessError):
        if "Python.h" in said:
            return "the C compiler does not find Python.h", "install Python's headers (python3-dev)"
        lines = [line.strip() for line in said.splitlines() if "error" in line or "cannot find" in line]
        what = lines[0] if lines else f"exit code {error.returncode}"
        return f"the C compiler fails ({what})", "install gcc, or name another in CC"
    if isinstance(error, OSError) and compiler is not None and error.filename == compiler:
        return f"CC names {compiler or 'nothing'}: {error.strerror}", "name a C compiler there, or none"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}", cache
    if isinstance(error, OSError) and error.strerror:
        return error.strerror, "make room, and name a folder in TMPDIR"
    if "C compiler" in str(error):
        return "there is no C compiler", "install gcc, or name one in CC"
    if "libcuda" in str(error):
        return "libcuda.so.1 is not found", "install the driver's libraries and run ldconfig, or name their folder in"\
               " TRITON_LIBCUDA_PATH"  # fmt: skip
    return _first_line(error), f"{command_line('train.doctor')} says more"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
