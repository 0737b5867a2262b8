"""What is kept of a GPU, and when it is not believed."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from kernels.choice import Choice
from train.config import ROOT
from train.tune import table
from train.tune.table import Entry, Kept, Machine, alone, digest, in_force, path_of

MACHINE = Machine("NVIDIA H100 80GB HBM3", "580.65", "2.13.0+cu130", "3.7.1")
HALVES = Choice("halves", [], lambda n, dtype: {"BLOCK": n // 2}, lambda n, dtype: [{"BLOCK": n}])
SHAPE = (8, torch.bfloat16)


def entry(**more) -> Entry:
    fields = {"kernel": "halves", "shape": "8 bfloat16", "source": HALVES.digest(*SHAPE), "default": {"BLOCK": 4},
              "best": {"BLOCK": 8}, "default_us": 2.0, "best_us": 1.0, "noise": 0.01}  # fmt: skip
    return Entry(**{**fields, **more})


@pytest.fixture
def kept(tmp_path):
    kept = Kept(tmp_path / "tuning" / "gpu.json", MACHINE)
    kept.add(entry(struck_out={"8 w4": "wrong: off by 1"}))
    kept.options["abc"] = {"graphs": True}
    kept.write()
    return kept


def test_what_was_written_is_read(kept):
    again = Kept.read(kept.path, MACHINE)
    assert (again.entries, again.options, again.note) == (kept.entries, kept.options, "")
    assert "halves" in kept.path.read_text()  # for a person too


def test_a_file_that_is_not_there_is_an_empty_one(tmp_path):
    assert Kept.read(tmp_path / "none.json", MACHINE).note == ""


@pytest.mark.parametrize("field", ["gpu", "driver", "torch", "triton"])
def test_a_file_of_another_machine_is_not_used(kept, field):
    other = replace(MACHINE, **{field: "another"})
    again = Kept.read(kept.path, other)
    assert again.entries == {}
    assert f"{field} {getattr(MACHINE, field)}, now another" in again.note
    assert again.note.endswith("what it says is not used")


def damaged(text: str) -> list[str]:
    content = json.loads(text)
    return [
        "", "{", "[]", "null", text[: len(text) // 2], text.replace('"BLOCK": 8', '"BLOCK": 16'),
        json.dumps({**content, "format": 2}), json.dumps({k: v for k, v in content.items() if k != "entries"}),
        json.dumps({**content, "entries": [{"kernel": "halves"}]}), json.dumps({**content, "entries": 3}),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(10))
def test_a_damaged_file_is_not_used(kept, number):
    kept.path.write_text(damaged(kept.path.read_text())[number])
    again = Kept.read(kept.path, MACHINE)
    assert (again.entries, again.options) == ({}, {})
    assert str(kept.path) in again.note
    assert "\n" not in again.note


def test_bytes_that_are_no_text_are_no_table(kept):
    kept.path.write_bytes(b"\xff\xfe\x00")
    assert Kept.read(kept.path, MACHINE).note


def test_an_entry_is_of_its_kernels_source(kept):
    assert kept.find(HALVES, SHAPE) == kept.entries["halves", "8 bfloat16"]
    assert kept.find(HALVES, (6, torch.bfloat16)) is None
    edited = Choice("halves", [], lambda n, dtype: {"BLOCK": n // 4}, lambda n, dtype: [{"BLOCK": n}])
    assert kept.find(edited, SHAPE) is None


def test_only_what_is_better_than_the_default_is_in_force(kept):
    assert in_force(kept, [(HALVES, SHAPE), (HALVES, (6, torch.bfloat16))]) == {"halves": {"8 bfloat16": {"BLOCK": 8}}}
    kept.add(entry(best={"BLOCK": 4}))
    assert in_force(kept, [(HALVES, SHAPE)]) == {}


def test_a_digest_names_what_is_in_force():
    one, other = ({"halves": {"8 bfloat16": {"BLOCK": n}}} for n in (8, 16))
    assert digest({}) == "default"
    assert digest(one) == digest(dict(one)) != digest(other)
    assert len(digest(one)) == 12


def test_a_name_of_a_gpu_is_a_name_of_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("TIMEBOX_HOME", str(tmp_path))
    assert path_of("NVIDIA H100 80GB HBM3/../x") == tmp_path / "tuning" / "NVIDIA-H100-80GB-HBM3-x.json"


def test_one_tunes_while_others_wait(tmp_path):
    path = tmp_path / "tuning" / "gpu.json"
    program = f"from pathlib import Path; from train.tune.table import alone\nwith alone(Path({str(path)!r})): print(1)"
    with alone(path):
        other = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "another process tunes for this GPU: waiting for it\n"
        assert other.poll() is None
    assert other.communicate(timeout=600)[0] == "1\n"
    assert other.returncode == 0


def test_the_drivers_version(monkeypatch, tmp_path):
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:09:20 UTC 2025\n")
    monkeypatch.setattr(table, "Path", lambda name: version)
    assert table._driver() == "580.65.06"
    os.remove(version)
    assert table._driver() == "unknown"
