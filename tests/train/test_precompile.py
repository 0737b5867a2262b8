"""Kernels are compiled ahead by a process beside the set-up, into the cache that a run reads; it outlives no run."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train.trainer
from tests.helpers.tiny_run import run_main
from train.config import ROOT, TrainConfig, resolve
from train.precompile import NO_KERNELS, Precompiler
from train.resilience.signals import Interrupted

pytest.importorskip("triton")


# Which kernels a step compiles: of the default, of what no kernel depends on, of another head.
NOTED = """
import json, sys
from dataclasses import replace
from train.config import TrainConfig, resolve
from train.precompile import compiling_only, noting_kernels, walk_step

config = resolve(TrainConfig(depth=4), "cuda")
same = replace(config, **json.loads(sys.argv[1]))
wider = replace(config, window_pattern="L", device_batch_size=64)
found = []
for each, vocab_size in ((config, 8192), (same, 8192), (wider, 32768)):
    with compiling_only(90), noting_kernels() as compilers:
        walk_step(each, vocab_size)
    found.append([(c.args[0].__name__, str(c.args[1])) for c in compilers])
json.dump(found, sys.stdout)
"""

# A value that is not the default's, for each option that no kernel is said to depend on.
OTHERS = {
    "name": "other", "run_dir": "other", "seed": 43, "time_budget": 1.0, "steps": 7, "untimed_steps": 0,
    "total_batch_size": 2**20, "packing": "published", "eval_tokens": 0, "lm_head_lr": 0.1, "embedding_lr": 0.1,
    "scalar_lr": 0.1, "matrix_lr": 0.041, "weight_decay": 0.0, "warmup_ratio": 0.1, "warmdown_ratio": 0.2,
    "final_lr_frac": 0.1, "graphs": False, "recipe": "tuned", "lm_head_decay": 0.1, "wte_decay": 0.1,
    "value_embedding_decay": 0.1, "bigram_decay": 0.1, "momentum_ramp": 7,
    "rope_base": 5.0, "init_scale": 0.5, "lambda_r_init": 1.1,
    "lambda_0_init": 0.2, "sums": "native", "init_from": "other",
}  # fmt: skip

# Two kernels of which one does not compile, by `main`.
MAIN = """
import json, sys
import torch, triton
import triton.language as tl
from dataclasses import asdict
from train import precompile
from train.config import TrainConfig

@triton.jit
def _wrong_kernel(x_ptr, WRONG: tl.constexpr):
    tl.static_assert(not WRONG, "this is wrong")
    tl.store(x_ptr, 1.0)

@triton.jit
def _right_kernel(x_ptr):
    tl.store(x_ptr, 2.0)

def walk_step(config, vocab_size):
    x = torch.empty(1, device="meta")
    _wrong_kernel[(1,)](x, WRONG=bool(vocab_size))
    for _ in range(2):
        _right_kernel[(1,)](x)

precompile.walk_step = walk_step
precompile.num_cores = lambda: 2
given = {"config": asdict(TrainConfig()), "vocab_size": int(sys.argv[1]), "arch": 90, "table": {}}
sys.exit(precompile.main(json.dumps(given)))
"""

# Stands for the process: calls the test, and so does one that it starts. Neither ever ends by itself.
ENDLESS = """
import os, socket, subprocess, sys, threading
from train.precompile import end_with
end_with(os.dup(0))
line = socket.create_connection(("127.0.0.1", {port}))
call = "import socket, threading; line = socket.create_connection(('127.0.0.1', {port})); threading.Event().wait()"
subprocess.Popen([sys.executable, "-c", call])
threading.Event().wait()
"""

# Stands for a run that waits for it.
WAITING = """
import sys
from train.config import TrainConfig
from train.precompile import Precompiler
Precompiler.command = (sys.executable, "-c", sys.argv[1])
Precompiler(TrainConfig(), 8192, 90, {}).wait()
"""


def environment(cache: Path) -> dict[str, str]:
    rest = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return rest | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}


def test_a_step_notes_each_kernel_once_and_options_that_no_kernel_depends_on_change_none(tmp_path):
    assert set(OTHERS) == set(NO_KERNELS)
    done = subprocess.run([sys.executable, "-c", NOTED, json.dumps(OTHERS)], env=environment(tmp_path), cwd=ROOT,
                          check=True, capture_output=True, text=True)  # fmt: skip
    default, same, other = (list(map(tuple, kernels)) for kernels in json.loads(done.stdout))
    assert len(set(default)) == len(default) > 25
    assert "_attention_dkv_kernel" in dict(default)
    assert same == default
    assert other != default
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]  # noted, and not compiled


def test_the_process_compiles_into_the_cache_what_is_not_there(tmp_path):
    script, cache = tmp_path / "script.py", tmp_path / "cache"
    script.write_text(MAIN, encoding="utf-8")  # Triton reads a kernel's source from its file

    def run(wrong: int) -> tuple[int, list[str], dict[str, int]]:
        with subprocess.Popen(
            [sys.executable, script, str(wrong)], env=environment(cache), cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        ) as process:  # fmt: skip
            said = process.stderr.read()
        return process.returncode, said.splitlines(), {p.name: p.stat().st_mtime_ns for p in cache.rglob("*.cubin")}

    code, said, first = run(wrong=1)
    assert (code, list(first)) == (1, ["_right_kernel.cubin"]), said
    assert "this is wrong" in said[-1]
    code, said, second = run(wrong=0)
    assert (code, sorted(second)) == (0, ["_right_kernel.cubin", "_wrong_kernel.cubin"])
    assert second["_right_kernel.cubin"] == first["_right_kernel.cubin"]  # not once more


@pytest.mark.parametrize("code", [0, 1])
def test_a_second_run_starts_no_process_where_the_first_did_its_work(code, start, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    config = replace(resolve(TrainConfig(), "cuda"), ops="triton")
    start(f"raise SystemExit({code})").wait()

    def starts(config: TrainConfig, vocab_size: int = 8192) -> bool:
        process = train.trainer.precompiler(config, vocab_size, {})
        if process:
            process.close()
        return process is not None

    assert starts(config) == (code == 1)
    assert starts(replace(config, **OTHERS, description="once more")) == (code == 1)
    assert starts(replace(config, device_batch_size=64))
    assert starts(config, vocab_size=32768)
    assert starts(replace(config, fused_norms=True))


@pytest.fixture
def calls():
    """A socket that those who live call, and then keep open."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(120)
        yield server


def taken(calls: socket.socket) -> list[socket.socket]:
    lines = [calls.accept()[0] for _ in range(2)]
    for line in lines:
        line.settimeout(120)
    return lines


def assert_gone(lines: list[socket.socket]) -> None:
    for line in lines:
        with line:
            assert line.recv(1) == b""  # closed by the end of who called


@pytest.fixture
def start(monkeypatch):
    started = []

    def start(program: str) -> Precompiler:
        monkeypatch.setattr(Precompiler, "command", (sys.executable, "-c", program))
        config = replace(resolve(TrainConfig(), "cuda"), ops="triton")
        started.append(Precompiler(config, 8192, 90, {}))
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_its_last_words_are_kept(start):
    assert start("import sys; sys.exit(0)").wait() == ""
    assert start("import sys; print('a\\nb  \\n', file=sys.stderr); sys.exit(3)").wait() == "b"
    assert start("import sys; sys.exit(3)").wait() == "exit code 3"
    given = start("import json, sys; sys.exit(str([*json.loads(sys.argv[1]).items()][1:]))")
    assert given.wait() == "[('vocab_size', 8192), ('arch', 90), ('table', {})]"


def test_one_that_never_ends_is_ended_with_all_that_it_started(start, calls):
    one = start(ENDLESS.format(port=calls.getsockname()[1]))
    lines = taken(calls)
    assert one.wait(seconds=0) == "not done in 0 s"
    assert_gone(lines)


def test_it_ends_with_a_run_that_is_killed(calls, tmp_path):
    program = ENDLESS.format(port=calls.getsockname()[1])
    with subprocess.Popen([sys.executable, "-c", WAITING, program], cwd=ROOT, env=environment(tmp_path)) as run:
        lines = taken(calls)
        run.kill()
        assert_gone(lines)
    assert run.returncode == -signal.SIGKILL


class Stub:
    closed = False

    def wait(self) -> str:
        return "no disk"

    def close(self) -> None:
        self.closed = True


def test_a_head_start_that_failed_is_said_and_the_run_goes_on(corpus, tmp_path, monkeypatch, capsys):
    stub = Stub()
    monkeypatch.setattr(train.trainer, "precompiler", lambda *_: stub)
    assert run_main(corpus, tmp_path / "run", "--steps", "1") == 0
    assert capsys.readouterr().err.startswith("note: kernels were not compiled ahead (no disk): ")
    assert stub.closed


def test_a_signal_while_kernels_compile_ends_the_process(corpus, tmp_path, monkeypatch):
    stub = Stub()

    def wait():
        raise Interrupted(15)

    monkeypatch.setattr(stub, "wait", wait)
    monkeypatch.setattr(train.trainer, "precompiler", lambda *_: stub)
    assert run_main(corpus, tmp_path / "run", "--steps", "1") == 143
    assert stub.closed
