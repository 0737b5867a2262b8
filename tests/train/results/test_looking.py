"""Pictures, the night's table, the doctor."""

import json
import resource
import struct
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from prepare import InputError
from prepare.words import command_line
from tests.helpers.ledger_entries import a_night, add, entry
from train import doctor, memory
from train.config import ROOT, TrainConfig, resolve
from train.curves import draw_curves
from train.curves import main as curves_main
from train.memory import check_fits, count
from train.report import main as report_main
from train.results.ledger import Ledger
from train.results.night import gather, limits


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", content[16:24])


def test_a_report_over_200_runs_takes_under_5_seconds(tmp_path):
    a_night(tmp_path, 200)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "train.report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of its own, whatever else the machine does meanwhile.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
    assert done.stdout.startswith("# 200 experiments: ")
    assert png_size(tmp_path / "report.png") == (1200, 650)
    table = [line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| ")]
    assert len(table) == 201
    assert all(line.replace("\\|", "").count("|") == 11 for line in table)


def of_seeds(name: str, *values: float, first: int = 42, **more) -> list[dict]:
    return [entry(f"{name}-{s}", value, group=name, seed=s, **more) for s, value in enumerate(values, first)]


def test_the_report_tells_luck_from_gain(tmp_path, capsys):
    ledger = Ledger(tmp_path)
    add(ledger, *of_seeds("base", 1.000, 1.004, 0.996))
    add(ledger, *of_seeds("lucky", 0.992, 1.004), entry("broken", description="no luck"))
    add(ledger, *of_seeds("gain", 0.985, 0.984, description="wider", flags=["--depth=9"]))
    add(ledger, *of_seeds("gain", 0.986, first=45))
    other = entry("other", 0.5)
    other["comparable"]["budget"] = "60 s after 10 steps"
    add(ledger, other)
    with ledger.locked():
        ledger.append({"kind": "holdout", "run": "lucky"})
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write("{torn\n")
    assert report_main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "5 experiments: 3 keep, 1 discard, 1 crash" in out
    assert "8 runs: first 1.000000 ± 0.004000 (3), now 0.985000 ± 0.001000 (3) (gain: wider)" in out
    assert "against the first: -0.01" in out
    assert "tokens a second are not known; runs of both by --steps would tell faster from better per token" in out
    assert "a new run goes on to a second seed where, with seed 45, it is below 0.98" in out
    assert "1 run, other, is not compared with the others: budget: 60 s after 10 steps" in out
    assert "looks at the holdout split: 1" in out
    assert "damaged lines of the ledger, left out: 1" in out
    report = (tmp_path / "report.md").read_text()
    assert "| 0.985000 ± 0.001000 (3) | 0.986000 (1) | 44.0 | keep | better (against base" in report
    assert "| --depth=9 | wider |" in report
    assert "| crash | failed (loss is nan) | - | no luck |" in report


def test_the_report_tells_faster_from_better_per_token(tmp_path, capsys):
    ledger = Ledger(tmp_path)
    for name, gain, tokens, sha in (("base", 0.0, 1000.0, "a"), ("fast", -0.02, 1200.0, "b")):
        more = {"summary": {"tokens_per_second": tokens}, "commit_sha": sha}
        add(ledger, *of_seeds(name, 1.000 + gain, 1.004 + gain, 0.996 + gain, **more))
        for seed, value in ((42, 1.1), (43, 1.104), (44, 1.096)):
            steps = entry(f"{name}-steps-{seed}", value, group=f"{name}-steps", seed=seed, budget="900 steps", **more)
            steps["comparable"]["budget"] = "900 steps"
            add(ledger, steps)
    assert report_main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "+20.0% tokens a second; at equal steps +0.000000, from " in out
    assert "per token no difference is seen" in out


@pytest.mark.parametrize("entries", [[entry("a", 1.0)], [entry("a")], [entry("a", 1.0), entry("b", 1.0)]])
def test_a_report_of_little(tmp_path, entries):
    add(Ledger(tmp_path), *entries)
    assert report_main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert png_size(tmp_path / "out" / "report.png") == (1200, 650)


def test_a_report_of_single_runs_and_of_none(tmp_path, capsys):
    add(Ledger(tmp_path), entry("a", 1.0), entry("b", 0.9))
    assert report_main([str(tmp_path / "b"), "--out", str(tmp_path)]) == 0
    assert "1 experiment: 0 keep, 1 discard" in capsys.readouterr().out
    assert report_main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere has no run in a ledger" in capsys.readouterr().err


def test_a_clock_that_was_set_back_moves_no_run(tmp_path):
    for folder, times in (("a", ["12:00", "10:00", "10:10"]), ("b", ["09:00", "12:30"])):
        add(Ledger(tmp_path / folder), *(entry(f"{folder}{i}", 1.0, time=time) for i, time in enumerate(times)))

    def order(*paths: str) -> list[str]:
        return [run["run"] for run in gather([tmp_path / path for path in paths])[0]]

    assert order("a") == order("a/a2", "a", "a/a0") == ["a0", "a1", "a2"]
    assert order("a/a2", "a/a1") == ["a1", "a2"]
    assert order("a", "b") == ["b0", "a0", "a1", "a2", "b1"]


def test_outliers_do_not_squeeze_the_picture():
    numbers = [1.000, 0.999, 0.998, 1.001, 1.002, 0.997, 1.0005, 3.5, 80.0]
    low, high = limits([{"val_bpb": number, "status": "discard"} for number in numbers])
    assert 0.99 < low < 0.997
    assert 1.002 < high < 1.02
    # But a keep and what fresh seeds gave are in it, whatever they are.
    for kept in ({"status": "keep"}, {"status": "discard", "confirms": "x"}):
        _, high = limits([{"val_bpb": 1.3, **kept}, *({"val_bpb": n, "status": "discard"} for n in numbers)])
        assert 1.3 < high < 1.4


def metrics(folder: Path, **changed) -> Path:
    folder.mkdir()
    lines = []
    for step in range(40):
        row = {"step": step, "loss": 7 - step / 10, "smooth_loss": 7 - step / 12, "lr_multiplier": 1.0, "seconds": 0.1,
               "timed_seconds": max(0, step - 9) / 10, "tokens_per_second": 20_000.0, "mfu": None}  # fmt: skip
        lines.append(json.dumps(row | changed))
    lines[7] = lines[7][:20]
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("changed", [{}, {"mfu": 41.5}, {"loss": float("nan"), "smooth_loss": float("inf")}])
def test_curves_of_a_damaged_log(tmp_path, changed):
    assert png_size(draw_curves(metrics(tmp_path / "run", **changed))) == (1000, 640)
    assert not list((tmp_path / "run").glob("*.part"))


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(("mfu", "panels"), [
    (None, ["nats per token", "share of the full one", "tokens per second"]),
    (41.5, ["nats per token", "share of the full one", "tokens per second", "percent of an H100's bf16 peak"]),
])  # fmt: skip
@pytest.mark.parametrize(("summary", "title"), [
    ('{"val_bpb": 1.1280014}', "run: val_bpb 1.128001"), ("{", "run"), ('{"val_bpb": null}', "run"),
    ('{"val_bpb": NaN}', "run"), ("[]", "run"),
])  # fmt: skip
def test_curves_have_a_panel_for_what_there_is_and_the_number(tmp_path, monkeypatch, mfu, panels, summary, title):
    drawn = []
    monkeypatch.setattr("train.curves.save", lambda figure, path: drawn.append(figure))
    folder = metrics(tmp_path / "run", mfu=mfu)
    (folder / "summary.json").write_text(summary)
    draw_curves(folder)
    (figure,) = drawn
    assert [panel.get_ylabel() for panel in figure.axes] == panels
    assert all(panel.lines and panel.axison and panel.get_title("left") for panel in figure.axes)
    assert {panel.get_xlabel() for panel in figure.axes} == {"seconds of steps (grey: untimed)"}
    assert figure.get_suptitle() == title


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize(("mfu", "panels"), [(None, "lrvp"), (41.5, "lrvpm")])
def test_curves_have_a_panel_for_evaluations_on_the_way(tmp_path, monkeypatch, mfu, panels):
    """Each after its steps, on the axis of the others; what follows a damaged step stands at the one before."""
    drawn = []
    monkeypatch.setattr("train.curves.save", lambda figure, path: drawn.append(figure))
    folder = metrics(tmp_path / "run", mfu=mfu)
    rows = [{"step": step, "timed_seconds": 0.0, "val_bpb": 3 - step / 40} for step in (0, 8, 20, 40, 400)]
    (folder / "evals.jsonl").write_text("\n".join([*map(json.dumps, rows), '{"step": 9']))
    draw_curves(folder)
    (figure,) = drawn
    assert len(figure.axes) == len(panels)
    panel, = (panel for panel in figure.axes if panel.get_title("left") == "val_bpb on a small part")
    (line,) = panel.lines
    # Of the 40 steps of 0.1 s the one that is damaged, 7, is none; and after 400 steps there are no others.
    assert line.get_xdata() == pytest.approx([0.0, 0.7, 1.9, 3.9])
    assert line.get_ydata() == pytest.approx([3.0, 2.8, 2.5, 2.0])
    assert panel.get_xlim() == pytest.approx((0, 3.9))


@pytest.mark.usefixtures("pictures")
@pytest.mark.parametrize("step", [None, 1.5])
def test_of_steps_without_a_number_no_evaluation_has_a_place(tmp_path, monkeypatch, step):
    drawn = []
    monkeypatch.setattr("train.curves.save", lambda figure, path: drawn.append(figure))
    folder = metrics(tmp_path / "run", step=step)
    (folder / "evals.jsonl").write_text('{"step": 8, "timed_seconds": 0.0, "val_bpb": 3.0}')
    draw_curves(folder)
    (figure,) = drawn
    assert len(figure.axes) == 3


@pytest.mark.usefixtures("pictures")
def test_the_grey_ends_where_the_timed_steps_begin(tmp_path, monkeypatch):
    spans = []
    monkeypatch.setattr("matplotlib.axes.Axes.axvspan", lambda self, start, end, **_: spans.append((start, end)))
    draw_curves(metrics(tmp_path / "run", mfu=41.5))
    assert spans == [(0, pytest.approx(0.9))] * 4  # steps 0 to 9 are untimed, and step 7 is damaged


def test_curves_of_nothing(tmp_path, capsys):
    assert draw_curves(tmp_path) is None
    assert curves_main([str(tmp_path)]) == 2
    assert "no readable metrics.jsonl" in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_is_a_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train.curves._draw", lambda *_: 1 / 0)
    assert draw_curves(metrics(tmp_path / "run")) is None
    assert capsys.readouterr().err == "note: no curves.png: ZeroDivisionError: division by zero\n"


def test_no_picture_library_before_the_first_step():
    late = {"matplotlib", "tensorboard", "wandb", "trackio"}
    code = f"import sys, train.trainer; sys.exit(bool({late} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_doctor_finds_a_healthy_cpu(corpus, capsys):
    assert doctor.main(["--data", str(corpus)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all is well"
    assert {"python", "packages", "code", "gpu", "memory", "disk", "kernel", "data", "batch"} <= {
        line.split()[1] for line in lines[:-1]
    }
    assert "ok    kernel    rms_norm runs in Triton's interpreter, and is right" in lines


def wrong(found: doctor.Finding) -> bool:
    return found.state == doctor.WRONG and bool(found.remedy)


def test_the_doctor_and_the_trainer_agree_on_what_fits(monkeypatch):
    """To the byte."""
    config = resolve(TrainConfig(ops="cpu"), "cpu")
    shape = config.model_config(1024)
    needed = count(config, shape, config.device_batch_size).on("cpu")
    for available, state in ((needed, doctor.OK), (needed - 1, doctor.WRONG)):
        for module in (doctor, memory):
            monkeypatch.setattr(module, "available_bytes", lambda device, available=available: available)
        found = doctor.batch("cpu", 1024)
        assert found.state == state
        assert f"up to {config.device_batch_size - (state == doctor.WRONG)} rows" in found.found
        if state == doctor.OK:
            check_fits(config, shape)
        else:
            with pytest.raises(InputError, match=r"use --device-batch-size 2$"):
                check_fits(config, shape)
            assert found.remedy == "train with --device-batch-size 2"


@pytest.mark.parametrize(("allowed", "said"), [(2**29, True), (2**62, False), (None, False)])
def test_the_doctor_names_a_memory_limit(monkeypatch, allowed, said):
    monkeypatch.setattr(doctor, "control_group_bytes", lambda: allowed)
    assert (", 0.5 GiB within this process's limit," in doctor.memory("cpu").found) == said
    assert ("limit" in doctor.memory("cpu").found) == said


def test_a_requirement_that_is_not_pinned_is_looked_for_all_the_same(tmp_path, monkeypatch):
    named = '"numpy", "no-such-package>=1", "torch==1.0"'
    (tmp_path / "pyproject.toml").write_text(f"[project]\ndependencies = [{named}]\n")
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    missing, installed = doctor.packages()
    assert wrong(missing)
    assert missing.found == "no-such-package is missing"
    assert f"torch {version('torch')} (tested with 1.0)" in installed.found
    assert "numpy" not in installed.found


def test_the_doctor_says_what_is_wrong_and_what_to_do(tmp_path, monkeypatch, capsys):
    found, _ = doctor.dataset(str(tmp_path), "cpu")
    assert wrong(found)
    assert command_line("prepare") in found.remedy
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "_driver", lambda: "535.1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert doctor.gpu().state == doctor.NOTE  # hidden on purpose, it may be
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert wrong(doctor.gpu())
    monkeypatch.setattr(doctor, "available_bytes", lambda device: 40 * 2**20)
    assert wrong(doctor.batch("cpu", 1024))
    monkeypatch.setattr(doctor, "available_bytes", lambda device: 100)
    assert wrong(doctor.batch("cpu", 1024))
    monkeypatch.setattr(doctor, "NEEDED_DISK", 2**80)
    assert wrong(doctor.disk())
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 0))
    assert wrong(doctor.python())
    monkeypatch.setattr(doctor, "KERNEL_TRIAL", "raise RuntimeError('no gcc')")
    assert "no gcc" in doctor.kernel("cpu").found
    assert wrong(doctor.kernel("cuda"))
    monkeypatch.setattr(doctor, "examine", lambda data: [doctor.kernel("cuda")])
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 thing is wrong"
