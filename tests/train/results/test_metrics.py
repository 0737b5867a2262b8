"""The log line, character for character, and the smoothed loss."""

import io
import json
import math

import pytest
import torch

import train.results.metrics
from model import GPTConfig
from train.budget import Budget
from train.resilience.state import DebiasedAverage
from train.results.metrics import jsonable, log_line, utilisation
from train.results.progress import Reporter, print_summary
from train.results.run_folder import RunFolder
from train.schedule import StepValues

SAMPLE = (
    "step 00142 (47.3%) | loss: 2.481903 | lrm: 1.00 | dt: 627ms | tok/sec: 835,421 | mfu: 42.1% | epoch: 1"
    " | remaining: 158s"
)


def test_log_line_is_the_sample():
    line = log_line(
        step=142, progress=0.47312, loss=2.4819034, lr_multiplier=1.0, dt=0.62661, tokens_per_second=835421.4,
        mfu=42.08, epoch=1, remaining=158.1,
    )  # fmt: skip
    assert line == SAMPLE


def test_log_line_without_a_peak():
    line = log_line(
        step=3, progress=1, loss=10, lr_multiplier=0.005, dt=12.3456, tokens_per_second=331.9, mfu=None, epoch=12,
        remaining=0,
    )  # fmt: skip
    assert line == (
        "step 00003 (100.0%) | loss: 10.000000 | lrm: 0.01 | dt: 12346ms | tok/sec: 332 | mfu: n/a | epoch: 12"
        " | remaining: 0s"
    )


def test_smoothed_loss_is_debiased():
    losses, average, beta = [4.0, 3.0, 5.0, 1.0], DebiasedAverage(), 0.9
    for step in range(len(losses)):
        raw = sum((1 - beta) * beta ** (step - i) * losses[i] for i in range(step + 1))
        assert average.update(losses[step]) == pytest.approx(raw / (1 - beta ** (step + 1)))
    assert DebiasedAverage().update(7.5) == pytest.approx(7.5)


def test_utilisation(monkeypatch):
    config, gpu = GPTConfig(), torch.device("cuda")
    name = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(train.results.metrics.torch.cuda, "get_device_name", lambda device: name)
    used = utilisation(config, gpu, 1.65e6)
    assert used.mfu == used.mfu_device == pytest.approx(39.8, abs=0.1)  # the published pace and its MFU
    assert used.mfu_causal == pytest.approx(used.mfu * 217.092 / 239.078, rel=1e-4)
    name = "NVIDIA A100-SXM4-80GB"
    assert utilisation(config, gpu, 1e5).mfu_device == pytest.approx(100 * 1e5 * 239.0784e6 / 312e12)
    name = "Unheard Of 9000"
    assert utilisation(config, gpu, 1e5).mfu_device is None
    assert utilisation(config, gpu, 1e5).mfu is not None
    assert utilisation(config, torch.device("cpu"), 1e5).mfu is None


@pytest.mark.parametrize("mfu", [None, 42.08])
@pytest.mark.parametrize("pace", [331.9, 1_835_421.4])
def test_what_matters_is_on_a_line_of_any_width(mfu, pace):
    given = {"step": 14231, "progress": 0.47312, "loss": 2.4819034, "lr_multiplier": 1.0, "dt": 0.62661, "epoch": 1,
             "tokens_per_second": pace, "mfu": mfu, "remaining": 158.1}  # fmt: skip
    whole, share = log_line(**given), "n/a" if mfu is None else "42.1%"
    assert log_line(**given, columns=len(whole)) == whole
    for columns in range(len(whole)):
        line = log_line(**given, columns=columns)
        assert len(line) <= columns
        if columns >= 79:
            for part in ("step 14231", "loss: 2.481903", f"tok/sec: {pace:,.0f}", f"mfu: {share}", "remaining: 158s"):
                assert part in line
        elif columns >= 59:
            assert line.startswith("step 14231")
            assert "2.4819" in line
            assert share in line
            assert line.endswith("158s")
            assert "331" in line or "332" in line if pace < 1e4 else "1,835,421" in line or "1835k" in line


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_are_whole_where_redirected_and_redrawn_on_a_terminal(tmp_path, monkeypatch, terminal):
    monkeypatch.setenv("COLUMNS", "60")
    out = Terminal() if terminal else io.StringIO()
    folder = RunFolder(tmp_path / "run")
    report = Reporter(folder, GPTConfig(), torch.device("cpu"), tokens_per_step=1000, out=out)
    budget = Budget(10.0)
    for step in range(2):
        budget.add(0.5)
        report.step(budget, StepValues(step, 1.0, 0.85, 0.2), 0.5, loss=3.0, smooth=3.1, epoch=1)
    report.end()
    folder.close()
    text = out.getvalue()
    if terminal:
        assert text.count("\r") == 2
        assert text.endswith("\x1b[K\n")
        lines = text.replace("\x1b[K", "").rstrip("\n").split("\r")[1:]
        assert lines == [f"step {i} loss 3.1000 tok/s 2000 mfu n/a left 10s" for i in range(2)]
    else:
        lines = text.splitlines()
        assert len(lines) == 2
        assert lines[0].startswith("step 00000 (0.0%) | loss: 3.100000 | ")
        assert text.isprintable() is False  # newlines alone:
        assert text.replace("\n", "").isprintable()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[1]["loss"] == 3.0
    assert rows[1]["tokens"] == 2000
    assert rows[1]["tokens_per_second"] == 2000


def test_summary_block():
    """Numbers as scripts know them; text, as older summaries have it, as it is."""
    out = io.StringIO()
    found = {
        "val_bpb": 1.2345674, "training_seconds": 60.04, "peak_vram_mb": 0.0, "mfu_percent": None,
        "mfu_causal_percent": 43.214, "total_tokens_M": 2.568, "num_steps": 1253, "unigram_bpb": 3.5,
        "tokens_per_second": 42396.7, "overshoot_seconds": 0.0431, "checkpoint_seconds": 0.0, "resumes": 0,
        "val_cropped_percent": 0.04, "audit": "ok", "seconds_to_first_step": "7.4",
    }  # fmt: skip
    print_summary(found, out)
    assert out.getvalue() == """---
val_bpb:               1.234567
training_seconds:      60.0
peak_vram_mb:          0.0
mfu_percent:           n/a
mfu_causal_percent:    43.21
total_tokens_M:        2.6
num_steps:             1253
unigram_bpb:           3.500000
tokens_per_second:     42397
overshoot_seconds:     0.043
checkpoint_seconds:    0.000
resumes:               0
val_cropped_percent:   0.0
audit:                 ok
seconds_to_first_step: 7.4
"""


def test_a_summary_that_is_no_number_is_still_json():
    assert jsonable({"val_bpb": math.nan, "a": math.inf, "b": 1.5, "c": 2, "d": "text", "e": None}) == {
        "val_bpb": None, "a": None, "b": 1.5, "c": 2, "d": "text", "e": None,
    }  # fmt: skip
