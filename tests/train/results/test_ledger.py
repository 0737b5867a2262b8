"""The ledger keeps every row, whoever else writes, and whatever becomes of the file."""

import json
import random
import subprocess
import sys
import zlib

import pytest

from tests.helpers.ledger_entries import add, entry
from train.config import ROOT
from train.results.ledger import COLUMNS, Ledger

WRITER = """
import sys
sys.path.insert(0, "tests")
from tests.helpers.ledger_entries import entry
from train.results.ledger import Ledger
ledger = Ledger(sys.argv[1])
for i in range(1000):
    with ledger.locked():
        ledger.append(entry(f"{sys.argv[2]}-{i}", 1.0, status="keep", verdict="baseline", note=""))
"""


def test_eight_writers_lose_no_row(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "night")]
    writers = [subprocess.Popen([*command, str(i)], cwd=ROOT) for i in range(8)]
    assert [writer.wait(timeout=600) for writer in writers] == [0] * 8
    ledger = Ledger(tmp_path / "night")
    names = {f"{writer}-{i}" for writer in range(8) for i in range(1000)}
    assert len(ledger.runs()) == 8000
    assert {run["run"] for run in ledger.runs()} == names
    header, *rows = (tmp_path / "night" / "results.tsv").read_text().splitlines()
    assert header.split("\t") == list(COLUMNS)
    assert len(rows) == 8000
    assert {row.split("\t")[COLUMNS.index("run")] for row in rows} == names
    assert all(row.count("\t") == len(COLUMNS) - 1 for row in rows)


def test_rows_as_the_published_system_has_them(tmp_path):
    ledger = Ledger(tmp_path)
    add(ledger, entry("a", 0.9979, description="the\tbase\nline"), entry("b", description="√ wide"))
    lines = (tmp_path / "results.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0].split("\t")[:5] == ["commit", "val_bpb", "memory_gb", "status", "description"]
    assert lines[1].split("\t")[:6] == ["1234567", "0.997900", "44.0", "keep", "the base line", "baseline"]
    assert lines[2].split("\t")[:7] == ["1234567", "0.000000", "0.0", "crash", "√ wide", "failed", "loss is nan"]
    assert [run["val_bpb"] for run in ledger.runs()] == [0.9979, None]
    assert ledger.runs()[0]["description"] == "the base line"


def test_a_killed_writer_costs_its_own_line_alone(tmp_path):
    ledger = Ledger(tmp_path)
    add(ledger, entry("a", 1.0), entry("b", 0.9))
    for name in ("results.tsv", "results.jsonl"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-20])
    add(ledger, entry("c", 0.8))
    assert [run["run"] for run in ledger.runs()] == ["a", "c"]
    assert ledger.entries()[1] == 1
    rows = (tmp_path / "results.tsv").read_text().splitlines()
    assert len(rows) == 4
    assert rows[-1].split("\t")[COLUMNS.index("run")] == "c"


def damaged(content: bytes, rng: random.Random):
    for _ in range(200):
        yield content[: rng.randrange(len(content))], None
    for _ in range(200):
        at = rng.randrange(len(content))
        yield content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :], at
    for newline in [i for i, byte in enumerate(content) if byte == 10][:-1]:
        yield content[:newline] + b" " + content[newline + 1 :], newline


def test_damage_costs_the_damaged_line_alone(tmp_path):
    ledger = Ledger(tmp_path)
    add(ledger, *(entry(f"r{i}", 1 - i / 100) for i in range(8)))
    path = tmp_path / "results.jsonl"
    content = path.read_bytes()
    starts = [0, *(i + 1 for i, byte in enumerate(content) if byte == 10)]
    for broken, at in damaged(content, random.Random(3)):
        path.write_bytes(broken)
        names = [entry["run"] for entry in ledger.entries()[0]]
        if at is None:
            whole = sum(start <= len(broken) for start in starts[1:])
            assert names[:whole] == [f"r{i}" for i in range(whole)]
            assert len(names) <= whole + 1  # the newline alone may be missing
        else:
            hit = sum(start <= at for start in starts) - 1
            assert [name for name in names if name != f"r{hit}"] == [f"r{i}" for i in range(8) if i != hit]
            if content[at : at + 1] != b"\n":
                assert f"r{hit}" not in names


@pytest.mark.parametrize(
    "line",
    [b"null", b"[1]", b'{"kind": "run"}', b"[" * 5000, b"\xff\xfe", b'{"kind": ["run"]}', b'{"kind": "x", "run": "x"}'],
)  # fmt: skip
def test_lines_of_another_making_are_left_out(tmp_path, line):
    ledger = Ledger(tmp_path)
    add(ledger, entry("a", 1.0))
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(line + b"\n")
    add(ledger, entry("b", 0.9))
    assert [run["run"] for run in ledger.runs()] == ["a", "b"]
    assert ledger.entries()[1] == 1


@pytest.mark.parametrize("bpb", [float("nan"), "0.9", 10**400, True, [0.9], None])
def test_a_number_that_is_none_is_damage(tmp_path, bpb):
    ledger = Ledger(tmp_path)
    row = add(ledger, entry("a", 1.0))[0] | {"run": "b", "val_bpb": bpb}
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write(json.dumps(row | {"crc32": zlib.crc32(json.dumps(row).encode())}) + "\n")
    assert [run["run"] for run in ledger.runs()] == ["a"]


def test_a_resumed_run_counts_as_what_it_ended_as(tmp_path):
    ledger = Ledger(tmp_path)
    interrupted = entry("a", outcome="interrupted", error="Terminated, after 9 steps")
    rows = add(ledger, interrupted, entry("a", 1.0), entry("b", outcome="interrupted", error="KeyboardInterrupt"))
    assert rows[0]["status"] == "crash"
    assert [(run["run"], run["outcome"]) for run in ledger.runs()] == [("a", "finished"), ("b", "interrupted")]
    assert len((tmp_path / "results.tsv").read_text().splitlines()) == 4


def test_a_run_killed_between_its_row_and_its_summary_counts_once(tmp_path):
    """Resumed, it comes to its end again, and is judged as it was: it is no repeat of itself."""
    ledger = Ledger(tmp_path)
    resumed = {"config": {"resume": "runs/b"}}
    *_, first, again = add(ledger, entry("a", 1.0), entry("b", 0.9), entry("b", 0.9, **resumed))
    for key in ("status", "verdict", "note"):
        assert again[key] == first[key]
    assert [(run["run"], run["val_bpb"]) for run in ledger.runs()] == [("a", 1.0), ("b", 0.9)]
    add(ledger, entry("c", 0.8), entry("c", 0.85))  # two runs in folders of one name, the first of which was deleted
    assert [run["val_bpb"] for run in ledger.runs()] == [1.0, 0.9, 0.8, 0.85]
