"""The tests that need a GPU, each file in a process of its own, some at a time: `python -m bench.gpu_tests [FILE ...]`.

A kernel that reads or writes where it may not breaks the GPU for the whole of its process, and one that never ends
holds it for ever: here only the rest of its own file is lost. And a process compiles one kernel after the other, so
that several use several cores. What pytest prints is shown file by file, as they end.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from prepare.arguments import Parser, command
from prepare.words import install_line

ROOT = Path(__file__).parents[1]
WORKERS = 4  # their largest tests, 36 GB and three below 20, may meet on a GPU of 80 GB
LIMIT = 130.0  # seconds a file
# The longest first, by what they have to compile; what tests times comes last, alone.
LONGEST = (
    "test_rotary_attention_kernel.py", "test_compile_ops.py", "test_attention_forms.py", "test_kernels_together.py",
    "test_adamw_kernel.py",
)  # fmt: skip
ALONE = ("test_bench_suite.py",)
PYTEST = ("-m", "gpu", "-rs", "--tb=short", "--durations=3", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60")


@dataclass
class Result:
    file: Path
    state: str  # "ok", "FAILED (exit code)", "timed out" or "cut off", where all of it was interrupted
    seconds: float
    output: str

    @property
    def last_line(self) -> str:
        return next((line for line in reversed(self.output.splitlines()) if line.strip()), "")


def files() -> list[Path]:
    """Those with a test that needs a GPU, the longest first."""
    marks = re.compile(r"mark\.gpu\n|@real_and_small\(|def test_\w+\(gpu\b")
    found = [path for path in (ROOT / "tests").rglob("test_*.py") if marks.search(path.read_text("utf-8"))]
    order = {name: i for i, name in enumerate(LONGEST)}
    return sorted(found, key=lambda path: (order.get(path.name, len(order)), path.name))


def run(file: Path, limit: float, running: set[subprocess.Popen]) -> Result:
    """`running` has its process as long as there is one."""
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", str(file), *PYTEST]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace",
    ) as process:  # fmt: skip
        running.add(process)
        try:
            output, _ = process.communicate(timeout=limit)
            state = "ok" if process.returncode == 0 else f"FAILED ({process.returncode})"
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            state = "timed out"
        finally:
            running.discard(process)
    return Result(file, state, time.monotonic() - start, output)


def run_all(paths: list[Path], limit: float, workers: int = WORKERS) -> Iterator[Result]:
    """The results as they come."""
    running: set[subprocess.Popen] = set()
    with ThreadPoolExecutor(workers) as pool:
        waiting = [pool.submit(run, path, limit, running) for path in paths if path.name not in ALONE]
        try:
            yield from (future.result() for future in as_completed(waiting))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in [*running]:  # one that a kernel holds hears no interrupt, and all would wait for it
                process.kill()
    yield from (run(path, limit, running) for path in paths if path.name in ALONE)


def main(args: list[str] | None = None) -> int:
    """Exit codes: 0 every file passed; 1 one did not; 2 bad arguments."""
    parser = Parser("bench.gpu_tests", __doc__)
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="default: all that have such tests")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds for each file (default: {LIMIT:g})")
    options = parser.parse_args(args)
    if find_spec("pytest") is None:
        parser.error(f"pytest is missing: `make test` installs it, or {install_line('-e', '.[dev]')}")
    if not options.files and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device here: `make test` runs what runs without one")
    if missing := [path for path in options.files if not os.path.isfile(path)]:
        parser.error(f"{missing[0]} does not exist: name files of tests/")
    paths, results = [path.resolve() for path in options.files] or files(), []
    try:
        for result in run_all(paths, options.limit):
            results.append(result)
            print(f"== {result.file.name}: {result.state}, {result.seconds:.0f} s\n{result.output}", flush=True)
    except KeyboardInterrupt:
        results += [Result(path, "cut off", 0.0, "") for path in paths if path not in {r.file for r in results}]
    width = max(len(result.file.name) for result in results)
    for result in results:
        print(f"{result.file.name:<{width}}  {result.state:<12} {result.seconds:>4.0f} s  {result.last_line[:80]}")
    failed = [result.file.name for result in results if result.state != "ok"]
    print(f"{len(results)} files, {len(failed)} not well{': ' * bool(failed)}{' '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    command(main)
