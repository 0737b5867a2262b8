"""The ledger as a table, as docs/runs.md says."""

import re

import pandas

from tests.helpers.ledger_entries import a_night
from train.config import ROOT


def test_the_lines_of_the_page(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(import pandas.*?)```", page, re.DOTALL)
    (best,) = re.findall(r"`(runs\.nsmallest.*?)` are", page)
    (steps,) = re.findall(r"`(pandas\.read_json.*?)`", page)
    ledger = a_night(tmp_path / "runs", 12)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    table = names["runs"]
    entries = ledger.runs()
    assert isinstance(table, pandas.DataFrame)
    assert [*table["run"]] == [entry["run"] for entry in entries]
    assert table["val_bpb"].dropna().to_list() == [e["val_bpb"] for e in entries if e["val_bpb"] is not None]
    assert {"seconds.total", "comparable.budget", "verdict"} <= {*table.columns}
    lowest = min((e for e in entries if e["val_bpb"] is not None), key=lambda e: e["val_bpb"])
    assert eval(best, names)["run"].iloc[0] == lowest["run"]
    (tmp_path / "runs" / "RUN").mkdir()
    (tmp_path / "runs" / "RUN" / "metrics.jsonl").write_text('{"step": 0, "loss": 2.5}\n{"step": 1, "loss": 2.0}\n')
    assert eval(steps, names)["loss"].to_list() == [2.5, 2.0]
