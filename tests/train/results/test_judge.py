"""Verdicts seed by seed, the status that follows them, and runs that are not compared, with the reason."""

import pytest

from tests.helpers.ledger_entries import add, entry
from train.compare import compare, find
from train.compare import main as compare_main
from train.results.judge import REFRESH, experiments, incumbent_of, judge, next_seed, other_code, refresh_due
from train.results.ledger import Ledger


def with_evaluation(run: str, bpb: float, **changed) -> dict:
    made = entry(run, bpb)
    made["comparable"]["evaluation"] |= changed
    return made


def with_comparable(run: str, bpb: float, **changed) -> dict:
    made = entry(run, bpb)
    made["comparable"] |= changed
    return made


def seeds(name: str, *values: float, first: int = 42, **more) -> list[dict]:
    return [
        entry(f"{name}-{seed}", value, group=name, seed=seed, **more) for seed, value in enumerate(values, first)
    ]


def words(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["status"], row["verdict"]) for row in rows]


@pytest.fixture
def ledger(tmp_path):
    """With a baseline of three seeds: σ is 0.004."""
    ledger = Ledger(tmp_path)
    assert words(add(ledger, *seeds("base", 1.000, 1.004, 0.996))) == [("keep", "baseline")] * 3
    return ledger


def test_status_follows_the_verdict_and_not_the_number(ledger):
    assert words(add(ledger, *seeds("luck", 0.993, 1.006))) == [
        ("discard", "undecided: next seed 44"), ("discard", "not better"),
    ]  # fmt: skip
    assert words(add(ledger, *seeds("gain", 0.985, 0.984))) == [
        ("discard", "undecided: next seed 44"), ("keep", "better"),
    ]  # fmt: skip
    assert experiments(ledger.runs())["gain"].status == "keep"
    assert words(add(ledger, *seeds("loss", 1.05))) == [("discard", "not better")]
    note = ledger.runs()[-1]["note"]
    assert note.startswith("against gain: +0.06")
    assert "with 95 % from +0.0" in note
    assert "; p 0.9" in note
    assert note.endswith("a gain below 0.030, given up above 0.300; on seed 42 +0.065000")


def test_a_true_gain_is_not_held_against_the_luckiest_number(ledger):
    """One seed of the incumbent was lucky by 3 σ: what is better by as much on every seed is better."""
    add(ledger, *seeds("lucky", 0.985, 0.984, 0.972))
    assert words(add(ledger, *seeds("better", 0.968, 0.967)))[-1] == ("keep", "better")


def test_pairs_of_one_seed_show_what_means_do_not():
    """Four better seeds out of four, each by 0.04, where seeds differ by ten times as much."""
    rows: list[dict] = []
    for name, gain in (("a", 0.0), ("b", 0.001), ("c", -0.001), ("gain", -0.04)):
        for seed, own in zip((42, 43, 44, 45), (1.0, 1.4, 0.8, 1.2), strict=True):
            wobble = 0.002 * ((seed + len(name)) % 2)
            one = entry(f"{name}-{seed}", own + gain + wobble, group=name, seed=seed)
            judged = judge(one, rows)
            rows.append(one | {"status": judged.status, "verdict": judged.verdict, "rule": judged.rule})
    verdicts = {row["run"]: row["verdict"] for row in rows}
    assert "better" in {verdicts[f"gain-{seed}"] for seed in (42, 43, 44, 45)}
    assert "better" not in {verdicts[f"b-{seed}"] for seed in (42, 43, 44, 45)}


def test_what_is_needed_is_said_where_nothing_is_known(tmp_path):
    ledger = Ledger(tmp_path)
    rows = add(ledger, entry("a", 1.0), entry("b", 0.9))
    assert words(rows) == [("keep", "baseline"), ("discard", "undecided: next seed 43")]
    assert "nothing is known of the noise yet: a second seed of any experiment shows it" in rows[1]["note"]
    assert words(add(ledger, *seeds("a", 1.001, first=43))) == [("keep", "incumbent")]
    assert ("keep", "better") in words(add(ledger, *seeds("c", 0.9, 0.9001, first=43)))


def test_the_incumbents_fresh_seeds_come_first(ledger):
    add(ledger, *seeds("gain", 0.985, 0.984), *seeds("gain", 0.986, first=45))
    assert words(ledger.runs())[-1] == ("keep", "incumbent")
    incumbent = incumbent_of(ledger.runs())
    assert incumbent.name == "gain"
    theirs = incumbent.numbers
    assert next_seed({}, theirs) == 45
    assert next_seed({45: 1.0}, theirs) == 43
    assert next_seed({45: 1.0, 43: 1.0, 42: 1.0}, theirs) == 46
    assert words(add(ledger, *seeds("x", 0.98, first=45)))[-1] == ("discard", "undecided: next seed 43")


def test_the_incumbent_is_run_again_after_some_time(ledger):
    for i in range(REFRESH - 1):
        add(ledger, *seeds(f"idea-{i}", 1.05))
    assert not refresh_due(ledger.runs(), incumbent_of(ledger.runs()))
    add(ledger, *seeds("one more", 1.05))
    assert refresh_due(ledger.runs(), incumbent_of(ledger.runs()))
    assert words(add(ledger, *seeds("base", 1.002, first=45))) == [("keep", "incumbent")]
    assert not refresh_due(ledger.runs(), incumbent_of(ledger.runs()))


def test_at_most_as_many_seeds_as_were_asked_for(ledger):
    one = seeds("a", 0.997, config={"max_seeds": 1})
    assert words(add(ledger, *one)) == [("discard", "not better")]


def test_crashes(ledger):
    rows = add(ledger, entry("d"), entry("g", outcome="interrupted", error="KeyboardInterrupt, after 7 steps"))
    assert words(rows) == [("crash", "failed"), ("crash", "interrupted")]
    assert rows[1]["note"] == "KeyboardInterrupt, after 7 steps"


def test_another_budget_machine_or_data_begins_anew_and_it_says_why(tmp_path):
    ledger = Ledger(tmp_path)
    add(ledger, entry("a", 1.0))
    rows = add(
        ledger, with_comparable("b", 0.5, budget="600 s after 10 steps"), with_comparable("c", 0.5, machine="another"),
        with_evaluation("d", 0.5, split_sha256="d" * 64), with_evaluation("e", 1.5, rows=41),
    )  # fmt: skip
    assert words(rows) == [("keep", "baseline")] * 4
    assert "the first of its kind: budget: 600 s after 10 steps, there 300 s after 10 steps" in rows[0]["note"]
    assert "machine: another" in rows[1]["note"]
    assert "evaluation split_sha256: dddddddd, there aaaaaaaa" in rows[2]["note"]
    assert add(ledger, entry("f", 0.99))[0]["note"].startswith("against a")


def test_who_edits_the_metric_gets_no_keep(ledger):
    cheats = add(ledger, *(with_evaluation(f"cheat-{i}", 0.1, code_sha256="e" * 64) for i in range(2)))
    assert words(cheats) == [("discard", "not compared")] * 2
    assert "the code that evaluates" in cheats[0]["note"]
    assert add(ledger, entry("b", 0.99))[0]["note"].startswith("against base")


def test_a_number_the_audit_rejects_stands_for_nothing(ledger):
    rows = add(ledger, entry("b", 0.1, audit="losses: scaled"), entry("c", 0.999))
    assert words(rows) == [("discard", "not compared"), ("discard", "not better")]
    assert rows[0]["note"] == "audit: losses: scaled"
    assert rows[1]["note"].startswith("against base")


def test_a_number_that_is_doubted_is_compared_with_no_other(ledger):
    rows = add(ledger, entry("b", 0.1, doubts=["resumed with other code: 1 > 2"]), entry("c", 0.999))
    assert words(rows) == [("discard", "not compared"), ("discard", "not better")]
    assert rows[0]["note"] == "resumed with other code: 1 > 2"
    both = add(ledger, entry("d", 0.1, audit="losses: scaled", doubts=["it was stopped"]))
    assert both[0]["note"] == "audit: losses: scaled; it was stopped"


def test_a_group_is_of_one_code(tmp_path):
    ledger = Ledger(tmp_path)
    same = [entry(f"g-{i}", 1.0, group="g", commit="1111111+", diff_sha256="a" * 64) for i in range(3)]
    rows = add(ledger, *same)
    assert [other_code(row, rows) for row in same] == [[], [], []]
    for other in ({"commit": "2222222"}, {"commit": "1111111"}, {"diff_sha256": "b" * 64}):
        (reason,) = other_code(same[0] | other, rows)
        assert reason.startswith("its group began with other code: 1111111+ (changes aaaaaaaa), here ")
        assert other_code(same[0] | other | {"group": "h"}, rows) == []
        failed = [row | {"outcome": "failed"} for row in rows]
        assert other_code(same[0] | other, failed) == []  # what has no number is mixed with none


def test_judging_leaves_the_rows_alone():
    rows = [entry("a", 1.0) | {"status": "keep"}]
    before = [dict(row) for row in rows]
    judge(entry("b", 0.9), rows)
    assert rows == before


def paced(name: str, bpb: float, tokens: float, **load) -> dict:
    return entry(name, bpb, summary={"tokens_per_second": tokens}, load=load)


def test_another_pace_is_marked_and_explained(tmp_path):
    ledger = Ledger(tmp_path)
    add(ledger, paced("base", 1.0, 1000.0, other_cores=0.1))

    def note(*args, **load) -> str:
        return add(Ledger(tmp_path), paced(f"x{args[0]}-{len(load)}", 0.99, *args, **load))[0]["note"]

    assert "tokens a second" not in note(970.0, other_cores=0.1)
    disturbed = note(880.0, other_cores=1.3)
    assert "with 12% fewer tokens a second: other processes took 1.3 cores, there 0.1" in disturbed
    assert "with 12% fewer tokens a second: no other load was seen" in note(881.0, other_cores=0.1)
    held = note(882.0, other_cores=0.1, held_down_by=["sw_power_cap"])
    assert "the GPU's clock was held down (sw_power_cap)" in held
    assert "with 20% more tokens a second: no other load was seen" in note(1200.0, other_cores=0.1)


def test_a_ledger_of_before_is_read(tmp_path):
    """Its rows had a status by the number alone, and confirmations of their own."""
    ledger = Ledger(tmp_path)
    with ledger.locked():
        for i, bpb in enumerate([1.000, 1.004, 0.996]):
            judged = {"status": "keep", "verdict": "baseline", "note": ""}
            ledger.append(entry(f"base-{i}", bpb, group="base", seed=42 + i, **judged))
        ledger.append(entry("lucky", 0.900, seed=42, status="keep", verdict="unknown", note=""))
        for i, bpb in enumerate([1.001, 0.999, 1.003]):
            ledger.append(entry(f"lucky-{i}", bpb, group="lucky", confirms="lucky", seed=43 + i, status="discard",
                                verdict="within noise", note=""))  # fmt: skip
    found = incumbent_of(ledger.runs())
    assert found.name == "lucky"  # of the lowest keep, as it was then
    assert found.numbers == {43: 1.001, 44: 0.999, 45: 1.003}  # and its fresh seeds alone speak for it
    assert ("keep", "better") in words(add(ledger, *seeds("gain", 0.985, 0.984, first=44)))


def said(ledger: Ledger, a: str, b: str) -> list[str]:
    return compare(find(a, str(ledger.folder)), find(b, str(ledger.folder)), ledger.runs()).splitlines()


def test_compare_says_by_how_much_and_how_surely(ledger):
    add(ledger, *seeds("a", 0.985, 0.984, 0.986))
    lines = said(ledger, "a", "base")
    assert lines[0] == "A: 0.985000 ± 0.001000 (3)  a"
    assert lines[1] == "B: 1.000000 ± 0.004000 (3)  base"
    assert lines[2].startswith("A less B: -0.015000, with 95 % from -0.0")
    assert lines[2].endswith("3 seeds in common)")
    assert lines[-1] == "verdict: better"
    assert said(ledger, "base", "a")[-1] == "verdict: worse"
    add(ledger, *seeds("b", 0.999, 1.001, first=90))
    assert said(ledger, "b", "base")[-1] == "verdict: within noise"
    assert said(ledger, "b", "base")[2].endswith("0 seeds in common)")


def test_compare_without_noise_or_of_other_kinds(tmp_path):
    ledger = Ledger(tmp_path)
    add(ledger, entry("a", 1.0), entry("b", 0.9), with_comparable("d", 0.5, budget="60 s after 10 steps"))
    assert said(ledger, "a", "b")[-1].startswith("verdict: unknown: nothing is known of the noise")
    assert said(ledger, "d", "b")[2:] == [
        "verdict: not compared", "  budget: 60 s after 10 steps, there 300 s after 10 steps",
    ]  # fmt: skip


def test_compare_takes_folders_and_names_what_is_missing(tmp_path, capsys):
    ledger = Ledger(tmp_path)
    add(ledger, entry("a", 1.0), entry("b"))
    (tmp_path / "a").mkdir()
    assert compare_main([str(tmp_path / "a"), str(tmp_path / "a")]) == 0
    assert compare_main(["a", "nowhere", "--ledger", str(tmp_path)]) == 2
    assert compare_main(["a", "b", "--ledger", str(tmp_path)]) == 2
    err = capsys.readouterr().err.splitlines()
    assert "no run or group nowhere" in err[0]
    assert "b has no val_bpb that counts: loss is nan" in err[1]
