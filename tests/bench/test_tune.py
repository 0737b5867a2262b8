"""Which candidates get a time, which of them wins, and what is said of all that."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.kernel_checks import DEVICE

pytest.importorskip("triton")
import kernels
from bench import tiles, timing, tune
from bench.tiles import prepared
from bench.tune import difference
from bench.tuned import HEADER, Trial, Tuned, label, line_of, shared_lines
from tests.helpers.small_targets import DTYPE, SMALL


@pytest.fixture(autouse=True)
def _kernels():
    kernels.set_ops("triton")
    yield
    kernels.set_ops(None)


def tuned_with(name: str, *candidates: dict) -> Tuned:
    return Tuned(SMALL[name], [Trial(None), *(Trial(tile) for tile in candidates)])


@pytest.fixture
def steady(monkeypatch):
    """Calls take what is set for their BLOCK_M, or a second."""
    times = {}

    def time_call(launches, device, seconds):
        launches()
        return SimpleNamespace(median=times.get(launches.again[0].kwargs.get("BLOCK_M"), 1.0))

    monkeypatch.setattr(tune, "time_call", time_call)
    return times


def test_a_wrong_candidate_gets_no_time(steady):
    half, right = {"BLOCK_D": 32}, {"BLOCK_M": 2, "num_warps": 4}
    one = tuned_with("norm-forward", half, {"BLOCK_M": 3}, right)
    tune.tune(one, DEVICE, DTYPE, seconds=60.0)
    assert one.trials[1].fault == "wrong: off by nan of the present tile's norm"  # a half that nobody wrote
    assert one.trials[2].fault  # no power of two
    assert [trial.tile for trial in one.timed] == [None, right]
    assert [len(trial.seconds) for trial in one.trials] == [tune.VISITS, 0, 0, tune.VISITS]
    assert one.launches == SMALL["norm-forward"].calls

    part = {"ONE_BLOCK": True, "BLOCK_V": 64, "num_warps": 4}  # of 100 logits
    two = tuned_with("softmax", part)
    tune.tune(two, DEVICE, DTYPE, seconds=60.0)
    assert two.trials[1].fault.startswith("wrong: off by ")
    assert not two.trials[1].seconds
    assert two.best is two.present


def test_where_time_runs_out_the_rest_is_left_out(steady):
    one = tuned_with("softmax", *SMALL["softmax"].tiles)
    tune.tune(one, DEVICE, DTYPE, seconds=-1.0)
    assert [bool(trial.seconds) for trial in one.trials] == [True] + [False] * len(SMALL["softmax"].tiles)
    assert {trial.fault for trial in one.trials[1:]} == {"no time was left"}
    one.trials[1].fault = "spills"
    assert (one.struck, one.untried) == (1, len(one.trials) - 2)
    assert HEADER.split()[-6:] == ["timed", "struck", "out", "no", "time", "left"]
    assert line_of(one).split()[-3:] == ["1", "1", str(len(one.trials) - 2)]


def test_a_hopeless_candidate_is_visited_once(steady):
    steady |= {32: 1.5, 2: 1.0, 4: 1.2, 8: 1.4}  # 32 is the present one, and the measure of what drifts
    one = tuned_with("norm-forward", *({"BLOCK_M": rows, "num_warps": 4} for rows in (2, 4, 8)))
    tune.tune(one, DEVICE, DTYPE, seconds=60.0)
    assert [len(trial.seconds) for trial in one.trials] == [tune.VISITS, tune.VISITS, tune.VISITS, 1]
    assert one.best.tile == {"BLOCK_M": 2, "num_warps": 4}


def test_the_real_clock(monkeypatch):
    monkeypatch.setattr(timing, "ROUNDS", (3, 3))
    one = tuned_with("norm-forward", {"BLOCK_M": 16, "num_warps": 4})
    tune.tune(one, DEVICE, DTYPE, seconds=60.0)
    assert all(0 < trial.median < 60 for trial in one.trials)


def test_the_whole_way(steady, monkeypatch, capsys, tmp_path):
    """As on a GPU, in the interpreter: one kernel that gains, one whose present tile stays, one that fails."""
    steady |= {2: 0.5, 4: 0.9}
    norm = replace(SMALL["norm-forward"], tiles=[{"BLOCK_M": rows, "num_warps": 4} for rows in (2, 4, 8, 32)])
    softmax = replace(SMALL["softmax"], tiles=SMALL["softmax"].tiles[:1])
    failing = replace(SMALL["adamw"], prepare=lambda randn: 1 / 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tune, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(tune, "step_targets", lambda vocab_size: [norm, failing, softmax])
    monkeypatch.setattr(tune, "prepared", lambda target, *_: prepared(target, DEVICE, DTYPE))

    def compile_all(jobs, arch, vocab_size, folder):
        assert (arch, vocab_size) == (90, 8192)
        spills = {"registers": 255, "fault": "spills"}
        present = {"rms_norm._config(64)": {"BLOCK_M": 32, "BLOCK_D": 64, "num_warps": 4}}
        return [spills if tile == norm.tiles[1] else {"fault": None, "asked": present} for _, tile in jobs]

    given, tune_one = [], tune.tune
    monkeypatch.setattr(tune, "tune", lambda *args: given.append(args[-1]) or tune_one(*args))
    monkeypatch.setattr(tune, "compile_all", compile_all)
    assert tune.main(["--json", str(tmp_path / "out.json"), "--seconds", "60"]) == 0
    assert all(seconds <= share for seconds, share in zip(given, (20.0, 30.0, 60.0), strict=True))
    first, device, header, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{3 + len(failing.tiles) + 1} candidates for 3 kernels, ")  # 32 rows are the present tile
    assert first.endswith("; 1 struck out")
    assert device.startswith("a GPU, commit ")
    assert header.startswith("kernel")
    assert lines[0].split()[:5] == ["norm-forward", "4", "32", "w4", "4000.000"]
    assert "2 w4" in lines[0]
    assert lines[1].split() == ["adamw", "ZeroDivisionError:", "division", "by", "zero"]
    assert lines[2].split()[0] == "softmax"
    assert lines[3].split() == ["2000.000", "ms", "norm-forward:", "2", "w4", "in", "rms_norm._config(64)"]
    assert lines[4].split()[:2] == ["2000.000", "ms"]
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["device"] == "a GPU"
    assert torch.__version__.startswith(written["versions"]["torch"])
    norm_row, adamw_row, softmax_row = written["targets"]
    assert norm_row["best"] == {"BLOCK_M": 2, "num_warps": 4}
    assert norm_row["gain_ms"] == pytest.approx(2000)
    assert [trial["fault"] for trial in norm_row["trials"]] == [None, None, "spills", None]
    assert [trial["ms"] is None for trial in norm_row["trials"]] == [False, False, True, False]
    assert norm_row["trials"][0]["tile"] == {"BLOCK_M": 32, "num_warps": 4}
    assert adamw_row["best"] is None
    assert softmax_row["gain_ms"] == 0


def fake(name: str, present: list[float], **seconds: float) -> Tuned:
    """A product whose present tile took `present`; a candidate 1<w> has w warps."""
    trials = [Trial(None, seconds=present)]
    trials += [Trial({"BLOCK_M": 128, "num_warps": int(key[1:])}, seconds=[value]) for key, value in seconds.items()]
    target = replace(SMALL[name], calls=2, flops=1e12, tiles=[trial.tile for trial in trials[1:]])
    return Tuned(target, trials, {"gemm.gemm_config(2048, 512)": {"BLOCK_M": 64, "num_warps": 8}}, launches=2)


def test_a_winner_beats_the_noise():
    steady = fake("mlp-fc-forward", [1.0, 1.01, 1.02], w4=0.97)
    assert steady.gain == pytest.approx(2 * 40.0)
    assert steady.best is steady.trials[1]
    unsteady = fake("mlp-fc-forward", [1.0, 1.01, 1.05], w4=0.97)
    assert unsteady.best is unsteady.present
    assert unsteady.gain == 0
    slower = fake("mlp-fc-forward", [1.0], w4=1.1)
    assert slower.best is slower.present
    words = line_of(steady).split()
    assert words[:3] == ["mlp-fc-forward", "2", "64"]
    assert "1 TFLOP/s" in line_of(steady)
    assert "128 w4" in line_of(steady)
    assert " 80.000 " in line_of(steady)


def test_kernels_of_one_config_that_want_different_tiles():
    first = fake("mlp-fc-forward", [1.0], w4=0.5, w16=0.7)
    second = fake("mlp-proj-backward", [1.0], w4=1.5, w16=0.8)
    (line,) = shared_lines([first, second])
    assert line.startswith("gemm.gemm_config(2048, 512) serves mlp-fc-forward, mlp-proj-backward")
    assert "with 128 w16 for all: 1000.000 ms" in line  # 2 x (2.0 - 1.5) s
    assert shared_lines([first, fake("mlp-proj-backward", [1.0], w4=0.5)]) == []
    assert shared_lines([first, replace_target(second, fused_norms=True)]) == []


def replace_target(one: Tuned, **changes) -> Tuned:
    return replace(one, target=replace(one.target, **changes))


def test_differences():
    x = torch.tensor([3.0, 4.0])
    assert difference([x, x + 0.5], [x, x]) == pytest.approx(0.5 * math.sqrt(2) / 5)
    assert math.isnan(difference([x, x * float("nan")], [x, x]))
    assert math.isnan(difference([x], [x[:1]]))
    assert difference([x * 0], [x * 0]) == 0


def test_labels():
    assert label({"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "BLOCK_K": 32, "num_stages": 3}) == "128x64x32 w8 s3"
    assert label({"BLOCK": 1024, "NUM_WARPS": 4, "STEPS": 8}) == "1024 w4 STEPS=8"


@pytest.mark.parametrize(("args", "words"), [
    ([], "no CUDA device here"),
    (["--offline", "--only", "adamv"], "--only adamv: no such kernel; there are attention-prologue, "),
    (["--offline", "--vocab-size", "0"], "--vocab-size 0 must be"),
    (["--offline", "--seconds", "nan"], "--seconds nan must be above 0"),
    (["--offline", "--json", "no/such/folder/file"], "--json no/such/folder/file: No such file or directory"),
])  # fmt: skip
def test_bad_arguments_are_one_line(monkeypatch, capsys, args, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(args) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert words in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(("args", "words"), [
    (["--arch", "90"], "--arch goes with --offline"),
    ([], "this GPU is an sm_75, and the limits of 80, 86, 89, 90, 100, 103, 120 alone are known"),
])  # fmt: skip
def test_a_gpu_that_is_not_known(monkeypatch, capsys, args, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert tune.main(args) == 2
    assert words in capsys.readouterr().err


def test_offline(monkeypatch, capsys, tmp_path):
    """For sm_90: a tile, one that is no power of two, and one with more elements than there are registers."""
    target = next(target for target in tiles.step_targets(8192) if target.name == "adamw")
    planted = [{"BLOCK": 2048, "NUM_WARPS": 8}, {"BLOCK": 1000, "NUM_WARPS": 8}, {"BLOCK": 8192, "NUM_WARPS": 4},
               {"BLOCK": 1024, "NUM_WARPS": 8}]  # fmt: skip
    monkeypatch.setattr(tune, "step_targets", lambda vocab_size: [replace(target, tiles=planted)])
    monkeypatch.setattr(tiles, "num_cores", lambda: 1)  # a process takes seconds to start
    assert tune.main(["--offline", "--only", "adamw", "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "3 candidates for 1 kernels, " in printed  # the last is the present one
    (row,) = json.loads((tmp_path / "out.json").read_text())["targets"]
    present, right, odd, large = row["trials"]
    assert (present["tile"], present["fault"]) == ({"BLOCK": 1024, "NUM_WARPS": 8}, None)
    assert (right["tile"], right["fault"]) == (planted[0], None)
    assert 0 < present["compiled"]["registers"] < right["compiled"]["registers"] <= 255
    assert odd["fault"].startswith("does not compile: ")
    assert "bytes of spills, 0 allowed" in large["fault"]
    assert large["compiled"]["stack"] > 0
