"""Kernels are compiled ahead by several processes, each its share, into the cache that a run reads."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import run_main

import train.trainer
from train import precompile
from train.config import TrainConfig, resolve

pytest.importorskip("triton")

SHARES = """
import json, sys
from triton.runtime.jit import JITFunction
from train.config import TrainConfig, resolve
from train.precompile import compiling_only, only_a_share, walk_step

JITFunction._do_compile = lambda self, *args: None  # what is asked for is counted, not compiled
config = resolve(TrainConfig(depth=1), "cuda")
shares = []
for share, of in ((0, 1), (0, 2), (1, 2)):
    with compiling_only(90), only_a_share(share, of) as compiled:
        walk_step(config, 8192)
    shares.append([*compiled.values()])
json.dump(shares, sys.stdout)
"""

def run(script: str, cache: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_the_shares_are_the_whole(tmp_path):
    whole, *shares = json.loads(run(SHARES, tmp_path))
    assert len(whole) > 25
    assert "_attention_dkv_kernel" in whole
    assert sorted(name for share in shares for name in share) == sorted(whole)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class Done:
    """A process that has ended."""

    def __init__(self, command, **options):
        self.command = command

    def wait(self):
        return self.code


@pytest.mark.parametrize("code", [0, 1])
def test_a_second_run_starts_no_process_where_the_first_did_its_work(monkeypatch, tmp_path, code):
    import triton

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(precompile, "num_cores", lambda: 3)
    monkeypatch.setattr(precompile.subprocess, "Popen", Done)
    monkeypatch.setattr(Done, "code", code, raising=False)
    config = resolve(TrainConfig(), "cuda")
    first = precompile.Precompiler(config, 8192, 90)
    assert [process.command[-2:] for process in first._processes] == [["0", "3"], ["1", "3"], ["2", "3"]]
    assert first.wait() == (code == 0)
    second, other = precompile.Precompiler(config, 8192, 90), precompile.Precompiler(config, 32768, 90)
    assert len(second._processes) == (0 if code == 0 else 3)
    repeat = replace(config, seed=43, run_dir="runs/repeat-seed43", group="repeat", description="once more")
    assert len(precompile.Precompiler(repeat, 8192, 90)._processes) == len(second._processes)
    assert len(precompile.Precompiler(replace(config, device_batch_size=64), 8192, 90)._processes) == 3
    assert len(other._processes) == 3


def test_a_head_start_that_failed_is_said_and_the_run_goes_on(corpus, tmp_path, monkeypatch, capsys):
    class Failed:
        def wait(self) -> bool:
            return False

    monkeypatch.setattr(train.trainer, "precompiler", lambda config, vocab_size: Failed())
    assert run_main(corpus, tmp_path / "run", "--steps", "1") == 0
    assert capsys.readouterr().err.startswith("note: kernels were not compiled ahead")
