"""Status by the number alone, verdicts that know the noise, and runs that are not compared, with the reason."""

import math

from tests.helpers.ledger_entries import add, entry
from train.compare import compare, find
from train.compare import main as compare_main
from train.results.judge import experiments, judge, other_code
from train.results.ledger import Ledger
from train.results.statistics import student_p


def with_evaluation(run: str, bpb: float, **changed) -> dict:
    made = entry(run, bpb)
    made["comparable"]["evaluation"] |= changed
    return made


def with_comparable(run: str, bpb: float, **changed) -> dict:
    made = entry(run, bpb)
    made["comparable"] |= changed
    return made


def words(rows: list[dict]) -> list[tuple[str, str]]:
    return [(row["status"], row["verdict"]) for row in rows]


def test_status_is_by_the_number_alone(tmp_path):
    rows = add(
        Ledger(tmp_path), entry("a", 1.0), entry("b", 1.1), entry("c", 0.9999), entry("d"), entry("e", 0.99995),
        entry("f", 0.9999), entry("g", outcome="interrupted", error="KeyboardInterrupt, after 7 steps"),
    )  # fmt: skip
    assert words(rows) == [
        ("keep", "baseline"), ("discard", "unknown"), ("keep", "unknown"), ("crash", "failed"),
        ("discard", "unknown"), ("discard", "unknown"), ("crash", "interrupted"),
    ]  # fmt: skip
    assert rows[1]["note"].startswith("against a")
    assert rows[4]["note"].startswith("against c")
    assert rows[6]["note"] == "KeyboardInterrupt, after 7 steps"


def test_verdicts_of_groups_know_the_noise(tmp_path):
    ledger = Ledger(tmp_path)
    base = [entry(f"base-{i}", bpb, group="base") for i, bpb in enumerate([1.000, 1.004, 0.996])]
    assert words(add(ledger, *base)) == [("keep", "baseline")] * 3  # repeats are not judged by one another
    noise = add(ledger, *(entry(f"n-{i}", bpb, group="n") for i, bpb in enumerate([0.995, 1.003, 0.998])))
    assert words(noise) == [("keep", "unknown"), ("discard", "within noise"), ("discard", "within noise")]
    gain = add(ledger, *(entry(f"g-{i}", bpb, group="g") for i, bpb in enumerate([0.950, 0.953, 0.948])))
    assert words(gain)[-1] == ("keep", "better")
    loss = add(ledger, *(entry(f"l-{i}", bpb, group="l") for i, bpb in enumerate([1.050, 1.053, 1.048])))
    assert words(loss)[-1] == ("discard", "worse")


def test_fresh_seeds_alone_speak_for_a_lucky_best(tmp_path):
    ledger = Ledger(tmp_path)
    add(ledger, *(entry(f"base-{i}", bpb, group="base") for i, bpb in enumerate([1.000, 1.004, 0.996])))
    lucky = add(ledger, entry("lucky", 0.900))
    assert words(lucky) == [("keep", "unknown")]
    fresh = [entry(f"lucky-{i}", bpb, group="lucky", confirms="lucky") for i, bpb in enumerate([1.001, 0.999, 1.003])]
    assert words(add(ledger, *fresh))[-1] == ("discard", "within noise")
    found = experiments(ledger.runs())["lucky"]
    assert [run["run"] for run in found.runs] == ["lucky"]
    assert found.evidence == [1.001, 0.999, 1.003]
    # And what comes later is held against the fresh seeds too, not against the luck.
    later = add(ledger, *(entry(f"x-{i}", bpb, group="x") for i, bpb in enumerate([0.950, 0.952, 0.948])))
    assert words(later)[-1] == ("discard", "better")


def test_other_budgets_machines_and_data_are_not_compared_and_it_says_why(tmp_path):
    ledger = Ledger(tmp_path)
    add(ledger, entry("a", 1.0))
    rows = add(
        ledger, with_comparable("b", 0.5, budget="600 s after 10 steps"), with_comparable("c", 0.5, machine="another"),
        with_evaluation("d", 0.5, split_sha256="d" * 64), with_evaluation("e", 1.5, rows=41),
    )  # fmt: skip
    assert words(rows) == [("keep", "not compared")] * 4
    assert "budget: 600 s after 10 steps, there 300 s after 10 steps" in rows[0]["note"]
    assert "machine: another" in rows[1]["note"]
    assert "evaluation split_sha256: dddddddd, there aaaaaaaa" in rows[2]["note"]
    assert words(add(ledger, entry("f", 0.99))) == [("keep", "unknown")]  # still against a


def test_who_edits_the_metric_gets_no_keep(tmp_path):
    ledger = Ledger(tmp_path)
    add(ledger, entry("a", 1.0))
    cheats = add(ledger, *(with_evaluation(f"cheat-{i}", 0.1, code_sha256="e" * 64) for i in range(2)))
    assert words(cheats) == [("discard", "not compared")] * 2
    assert "the code that evaluates" in cheats[0]["note"]
    assert words(add(ledger, entry("b", 0.99))) == [("keep", "unknown")]


def test_a_number_the_audit_rejects_stands_for_nothing(tmp_path):
    ledger = Ledger(tmp_path)
    rows = add(ledger, entry("a", 1.0), entry("b", 0.1, audit="losses: scaled"), entry("c", 0.9))
    assert words(rows)[1:] == [("discard", "not compared"), ("keep", "unknown")]
    assert rows[1]["note"] == "audit: losses: scaled"
    assert rows[2]["note"].startswith("against a")


def test_a_number_that_is_doubted_is_compared_with_no_other(tmp_path):
    ledger = Ledger(tmp_path)
    rows = add(ledger, entry("a", 1.0), entry("b", 0.1, doubts=["resumed with other code: 1 > 2"]), entry("c", 0.9))
    assert words(rows)[1:] == [("discard", "not compared"), ("keep", "unknown")]
    assert rows[1]["note"] == "resumed with other code: 1 > 2"
    assert rows[2]["note"].startswith("against a")
    both = add(ledger, entry("d", 0.1, audit="losses: scaled", doubts=["it was stopped"]))
    assert both[0]["note"] == "audit: losses: scaled; it was stopped"


def test_a_group_is_of_one_code(tmp_path):
    ledger = Ledger(tmp_path)
    seeds = [entry(f"g-{i}", 1.0, group="g", commit="1111111+", diff_sha256="a" * 64) for i in range(3)]
    rows = add(ledger, *seeds)
    assert [other_code(row, rows) for row in seeds] == [[], [], []]
    for other in ({"commit": "2222222"}, {"commit": "1111111"}, {"diff_sha256": "b" * 64}):
        (reason,) = other_code(seeds[0] | other, rows)
        assert reason.startswith("its group began with other code: 1111111+ (changes aaaaaaaa), here ")
        assert other_code(seeds[0] | other | {"group": "h"}, rows) == []
        failed = [row | {"outcome": "failed"} for row in rows]
        assert other_code(seeds[0] | other, failed) == []  # what has no number is mixed with none


def test_judging_leaves_the_rows_alone():
    rows = [entry("a", 1.0) | {"status": "keep"}]
    before = [dict(row) for row in rows]
    judge(entry("b", 0.9), rows)
    assert rows == before


def test_compare_prints_means_deviations_p_and_a_verdict(tmp_path):
    ledger = Ledger(tmp_path)
    add(ledger, *(entry(f"a-{i}", bpb, group="a") for i, bpb in enumerate([4.0, 6.0, 8.0])))
    add(ledger, *(entry(f"b-{i}", bpb, group="b") for i, bpb in enumerate([1.0, 2.0, 3.0])))
    add(ledger, *(entry(f"c-{i}", bpb, group="c") for i, bpb in enumerate([10.0, 10.1, 9.9])))

    def said(a: str, b: str) -> list[str]:
        return compare(find(a, str(tmp_path)), find(b, str(tmp_path))).splitlines()

    p = student_p(4 / math.sqrt(5 / 3), 50 / 17)  # Welch's t and degrees of freedom, by hand
    assert said("a", "b") == [
        "A: 6.000000 ± 2.000000 (3)  a",
        "B: 2.000000 ± 1.000000 (3)  b",
        f"Welch's p: {p:.4g} (two-sided; a difference counts below 0.05)",
        "verdict: within noise",
    ]
    assert said("c", "b")[-1] == "verdict: worse"
    assert said("b", "c")[-1] == "verdict: better"
    assert said("a-1", "b-1")[-1].startswith("verdict: unknown: 1 and 1 numbers")
    add(ledger, with_comparable("d", 0.5, budget="60 s after 10 steps"))
    assert said("d", "b")[2:] == ["verdict: not compared", "  budget: 60 s after 10 steps, there 300 s after 10 steps"]


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
