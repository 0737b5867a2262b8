"""What the page shows, as data: what is read of a ledger, of the runs' folders, and of what trains right now."""

import json
import os
import shutil
from datetime import UTC, datetime

import pytest

from tests.helpers.ledger_entries import add, entry
from tests.helpers.night_page import DIFF, NOW, a_small_night, evals_of, facts_of, of_seeds, rows_of, write_run
from train.page.folders import MOST_BYTES, POINTS, Folders, curve_of, number
from train.page.running import KILLED
from train.report import main as report_main
from train.resilience.durable import lock
from train.results.judge import interval_in
from train.results.ledger import Ledger
from train.results.night import labels


def by_description(found: dict) -> dict[str, dict]:
    return {one["description"]: one for one in found["experiments"]}


def test_what_a_night_says(tmp_path):
    ledger = a_small_night(tmp_path / "runs")
    with ledger.locked():
        ledger.append({"kind": "holdout", "run": "lucky"})
    found = facts_of(tmp_path / "runs")
    assert [(one["description"], one["result"], one["incumbent"]) for one in found["experiments"]] == [
        ("baseline", "kept", None), ("all rates higher", "no gain", 1), ("wider", "kept", 1),
        ("half the width", "worse", 3), ("no luck", "crashed", 3),
    ]  # fmt: skip
    totals = found["totals"]
    counts = {"experiments": 5, "runs": 9, "kept": 2, "worse": 1, "no_gain": 1, "crashed": 1, "undecided": 0}
    assert {key: totals[key] for key in counts} == counts
    assert (totals["holdout_looks"], totals["damaged_lines"], totals["tokens"]) == (1, 0, 5_000_000)
    assert totals["hours"] == pytest.approx(9 * 320 / 3600, rel=1e-5)
    assert totals["hours_of_training"] == pytest.approx(600 / 3600, rel=1e-5)
    (one_set,) = found["sets"]
    assert [(level["number"], level["mean"]) for level in one_set["levels"]] == [(1, 1.0), (3, 0.9705)]
    assert (one_set["first"], one_set["now"]) == (1.0, 0.9705)
    json.dumps(found, allow_nan=False)


def test_what_the_verdict_says_in_words(tmp_path):
    a_small_night(tmp_path)
    found = by_description(facts_of(tmp_path))
    row = next(run for run in Ledger(tmp_path).runs() if run["run"] == "worse")
    worse = found["half the width"]
    for part in ("mean", "low", "high"):
        assert f"{worse['difference'][part]:+.6f}" in row["note"]
        assert f"{worse['difference'][part]:+.6f}" in worse["in_words"]
    assert worse["in_words"].startswith("It is worse: +0.2")
    assert " on 1 seed, " in worse["in_words"]
    assert found["wider"]["in_words"].startswith("It is better: -0.0")
    assert found["all rates higher"]["in_words"].startswith("No gain was found: ")
    assert found["baseline"]["in_words"] == "What comes after it is compared with it; 3 seeds."
    assert found["no luck"]["in_words"] == "It has no number: loss is nan."


def test_one_that_is_not_decided(tmp_path):
    add(Ledger(tmp_path), *of_seeds("base", 1.000, 1.004, 0.996), entry("near", 0.990, seed=42))
    near = facts_of(tmp_path)["experiments"][1]
    assert near["result"] == "undecided"
    assert near["in_words"].startswith("Nobody knows yet (undecided: next seed 4")


def test_the_interval_of_a_note_is_the_last_it_has():
    """The name before it may be anything."""
    lie = "a: -9.0, with 95 % from -9.1 to -8.9; p 0.000"
    note = f"against {lie}: +0.5, with 95 % from -0.25 to +1.25; p 0.700, a gain below 0.030; on seed 42 +0.500000"
    assert interval_in(note) == {"mean": 0.5, "low": -0.25, "high": 1.25, "p": 0.7}
    assert interval_in("the first of its kind") is None


def test_json_is_the_same_facts_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("train.page.library.find_spec", lambda name: None)  # it needs no plotting library
    a_small_night(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("train.report.time", lambda: NOW)
    assert report_main(["--json", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(facts_of(tmp_path)))
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_of_two_ledgers_that_have_one_name(tmp_path):
    for folder, bpb in (("gpu0", 1.0), ("gpu1", 0.9)):
        add(Ledger(tmp_path / folder), entry("first", bpb, description=folder), entry(f"only-{folder}", bpb + 0.1))
        write_run(tmp_path / folder / "first", sample=f"of {folder}")
    found = facts_of(tmp_path / "gpu0", tmp_path / "gpu1")
    assert {one["name"]: one["mean"] for one in found["experiments"]} == {
        "gpu0/first": 1.0, "only-gpu0": 1.1, "gpu1/first": 0.9, "only-gpu1": 1.0,
    }  # fmt: skip
    assert {one["ledger"]: one["sample"] for one in found["experiments"] if one.get("sample")} == {
        "gpu0": "of gpu0", "gpu1": "of gpu1",
    }  # fmt: skip
    # Each ledger has an incumbent of its own, as its verdicts had.
    assert [(level["ledger"], level["mean"]) for level in found["sets"][0]["levels"]] == [("gpu0", 1.0), ("gpu1", 0.9)]
    assert report_main(["--no-page", str(tmp_path / "gpu0"), str(tmp_path / "gpu1")]) == 0
    assert "| gpu1/first |" in (tmp_path / "gpu0" / "report.md").read_text()


def test_what_to_call_ledgers(tmp_path):
    paths = [tmp_path / "a" / "runs", tmp_path / "b" / "runs"]
    assert labels(paths) == ["a/runs", "b/runs"]
    assert labels(paths[:1]) == ["runs"]
    assert labels([]) == []


def test_what_the_folders_hold(tmp_path):
    a_small_night(tmp_path)
    wider = by_description(facts_of(tmp_path))["wider"]
    assert wider["diff"] == DIFF
    assert wider["sample"] == "def f():\n    return 1\n"
    assert wider["missing"] == []
    assert wider["curves"].keys() == {"gain-42", "gain-43"}
    assert wider["curves"]["gain-42"]["step"] == [*range(10)]
    assert wider["curves"]["gain-42"]["seconds"][:4] == [0, 0, 0.5, 1.0]


def test_what_was_evaluated_on_the_way(tmp_path):
    a_small_night(tmp_path)
    (tmp_path / "gain-43" / "evals.jsonl").write_text(evals_of(4, 8) + "{")
    found = by_description(facts_of(tmp_path))
    assert found["wider"]["evals"] == {"gain-43": {
        "step": [4, 8], "seconds": [1.0, 3.0], "val_bpb": [1.75, 1.625], "sample": ["after 4 <b>", "after 8 <b>"],
    }}  # fmt: skip
    assert found["baseline"]["evals"] == {}
    assert found["wider"]["missing"] == found["baseline"]["missing"] == []
    json.dumps(found, allow_nan=False)


def test_a_long_row_of_evaluations_is_thinned_and_ends_where_it_ends(tmp_path):
    write_run(tmp_path / "a")
    (tmp_path / "a" / "evals.jsonl").write_text(evals_of(*range(1, 1002)))
    found = Folders().evals(tmp_path / "a")
    assert POINTS / 2 < len(found["step"]) <= POINTS
    assert found["step"][-1] == 1001
    assert {len(values) for values in found.values()} == {len(found["step"])}
    assert Folders().evals(tmp_path) is None


def damage(folder, how: str) -> None:
    files = {"metrics": "metrics.jsonl", "diff": "changes.diff", "sample": "sample.txt"}
    what, _, way = how.partition(" ")
    if what == "folder":
        shutil.rmtree(folder)
        return
    path = folder / files[what]
    path.unlink()
    if way == "is a folder":
        path.mkdir()
    elif way == "is no text":
        path.write_bytes(bytes(range(256)) * 3)
    elif way == "has numbers that are none":
        rows = [{**row, "smooth_loss": float("nan"), "step": 10**400} for row in rows_of(5)]
        path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": ' + "[" * 5000)


@pytest.mark.parametrize(("how", "said"), [
    ("folder gone", "The folder of worse is gone: what it held is not shown."),
    ("metrics gone", "metrics.jsonl of worse is missing or damaged."),
    ("metrics is a folder", "metrics.jsonl of worse is missing or damaged."),
    ("metrics is no text", "metrics.jsonl of worse is missing or damaged."),
    ("metrics has numbers that are none", "metrics.jsonl of worse is missing or damaged."),
    ("diff gone", "changes.diff of worse is missing or damaged."),
    ("diff is a folder", "changes.diff of worse is missing or damaged."),
    ("sample gone", "sample.txt of worse is missing or damaged."),
])  # fmt: skip
def test_a_folder_that_is_damaged_is_said_to_be(tmp_path, how, said):
    a_small_night(tmp_path)
    damage(tmp_path / "worse", how)
    found = facts_of(tmp_path)
    assert by_description(found)["half the width"]["missing"] == [said]
    assert all(not one["missing"] for one in found["experiments"] if one["name"] != "worse")
    json.dumps(found, allow_nan=False)


def test_bytes_that_are_no_text_are_shown_all_the_same(tmp_path):
    a_small_night(tmp_path)
    damage(tmp_path / "worse", "diff is no text")
    diff = by_description(facts_of(tmp_path))["half the width"]["diff"]
    assert "\\x1b" in diff
    assert not set(diff) & {"\x00", "\x1b", "\x07"}


def test_another_seed_has_what_one_lacks(tmp_path):
    """And nothing is missing, then."""
    a_small_night(tmp_path)
    (tmp_path / "gain-42" / "sample.txt").unlink()
    wider = by_description(facts_of(tmp_path))["wider"]
    assert (wider["sample"], wider["missing"]) == ("def f():\n    return 1\n", [])


def test_a_name_in_the_ledger_leads_nowhere_else(tmp_path):
    write_run(tmp_path / "secret", sample="secret")
    add(Ledger(tmp_path / "runs"), entry("../secret", 1.0), entry(str(tmp_path / "secret"), 1.0), entry("..", 1.0))
    assert "secret" not in {one.get("sample") for one in facts_of(tmp_path / "runs")["experiments"]}


def test_a_long_diff_is_cut_and_says_so(tmp_path):
    a_small_night(tmp_path)
    (tmp_path / "worse" / "changes.diff").write_text("+ a line\n" * 20_000)
    diff = by_description(facts_of(tmp_path))["half the width"]["diff"]
    assert len(diff) < MOST_BYTES + 100
    assert diff.endswith("[cut after 60,000 bytes: the rest is in changes.diff]")


def test_a_long_curve_is_thinned_and_ends_where_it_ends():
    curve = curve_of(rows_of(10_001))
    assert {len(values) for values in curve.values()} == {len(curve["step"])}
    assert POINTS / 2 < len(curve["step"]) <= POINTS
    assert curve["step"][-1] == 10_000
    assert curve_of([]) is None


@pytest.mark.parametrize(("value", "kept"), [
    (3, 3), (0.123456789, 0.123457), (True, None), ("3", None), (None, None), (float("nan"), None),
    (float("inf"), None), (10**400, None), (-0.0, 0.0),
])  # fmt: skip
def test_a_number_is_one_that_json_has_a_word_for(value, kept):
    assert number(value) == kept
    assert isinstance(number(3), int)


def test_a_row_whose_values_are_of_other_kinds_is_shown(tmp_path):
    """Ledgers of before may lack what is there now."""
    add(Ledger(tmp_path), entry("odd", 1.0, seconds={"total": 1.0, "odd": "long"}, summary="none", flags=None))
    odd = facts_of(tmp_path)["experiments"][0]
    assert (odd["seconds"], odd["runs"][0]["seconds"], odd["tokens"], odd["flags"]) == (1.0, {"total": 1.0}, 0, [])


# What trains right now.


def begin_run(folder, at: float, done: int = 0, **config) -> None:
    folder.mkdir(parents=True)
    given = {"description": "goes on", "seed": 42, "steps": None, "time_budget": 300.0, "group": None, **config}
    (folder / "config.json").write_text(json.dumps({"config": given}))
    if done:
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows_of(100)[:done])) + "\n")
    for path in folder.iterdir():
        os.utime(path, (at, at))


def test_what_runs_now(tmp_path):
    a_small_night(tmp_path)
    begin_run(tmp_path / "timed", NOW - 2, done=20)
    (run,) = facts_of(tmp_path)["running"]
    assert (run["run"], run["phase"], run["step"], run["progress"]) == ("timed", "training", 19, 0.2)
    assert (run["remaining_seconds"], run["last_sign_seconds_ago"], run["incumbent"]) == (291.0, 2.0, 3)
    assert run["curve"]["step"][-1] == 19


def test_the_last_evaluation_of_what_runs_now(tmp_path):
    begin_run(tmp_path / "a", NOW, done=9)
    assert facts_of(tmp_path)["running"][0]["last_eval"] is None
    (tmp_path / "a" / "evals.jsonl").write_text(evals_of(4, 8))
    last = facts_of(tmp_path)["running"][0]["last_eval"]
    assert (last["step"], last["val_bpb"], last["sample"]) == (8, 1.625, "after 8 <b>")


def test_what_is_left_of_a_run_by_steps(tmp_path):
    begin_run(tmp_path / "a", NOW, done=90, steps=100)
    (run,) = facts_of(tmp_path)["running"]
    assert run["remaining_seconds"] == 10 * 0.5
    assert run["incumbent"] is None


def test_what_does_not_run(tmp_path):
    a_small_night(tmp_path)  # all of it is finished, or has a row
    begin_run(tmp_path / "killed", NOW - 3600, done=20)
    begin_run(tmp_path / "finished", NOW, done=20)
    (tmp_path / "finished" / "summary.json").write_text("{}")
    then = datetime.fromtimestamp(NOW - 60, UTC).isoformat()
    add(Ledger(tmp_path), entry("stopped", outcome="interrupted", error="SIGINT", time=then))
    begin_run(tmp_path / "stopped", NOW - 60, done=20)
    add(Ledger(tmp_path), entry("failed", time=then))
    begin_run(tmp_path / "failed", NOW - 1, done=20)
    (tmp_path / "no-run").mkdir()
    assert facts_of(tmp_path)["running"] == facts_of(tmp_path / "worse")["running"] == []


def test_one_that_was_killed_is_told_from_one_whose_step_is_long(tmp_path):
    """By its lock, which the system gives back however a process ends."""
    begin_run(tmp_path / "killed", NOW - 60, done=20)
    begin_run(tmp_path / "slow", NOW - 60, done=20)
    held = lock(tmp_path / "slow")
    try:
        phases = {run["run"]: run["phase"] for run in facts_of(tmp_path)["running"]}
    finally:
        os.close(held)
    assert phases == {"killed": KILLED, "slow": "training"}


def test_one_that_was_interrupted_runs_again_when_it_writes_again(tmp_path):
    add(Ledger(tmp_path), entry("again", outcome="interrupted", error="SIGINT", time="2026-11-01T00:00:00+00:00"))
    begin_run(tmp_path / "again", NOW - 1, done=3)
    assert [run["run"] for run in facts_of(tmp_path)["running"]] == ["again"]


def test_a_configuration_that_is_damaged_costs_what_it_said(tmp_path):
    begin_run(tmp_path / "a", NOW, done=3)
    (tmp_path / "a" / "config.json").write_text("[" * 100_000)
    os.utime(tmp_path / "a" / "config.json", (NOW, NOW))
    (run,) = facts_of(tmp_path)["running"]
    assert (run["description"], run["seed"], run["remaining_seconds"], run["step"]) == ("", None, None, 2)
