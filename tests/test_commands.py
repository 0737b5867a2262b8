"""What every command does the same way: streams that are closed."""

import os
import subprocess
import sys
from pathlib import Path

from ledger_entries import a_night
from tiny_run import TINY, rows

ROOT = Path(__file__).parent.parent

def start(line: str, **more: str) -> subprocess.Popen:
    """A line of a shell, `$PY` being this Python."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PY": sys.executable} | more
    return subprocess.Popen(["sh", "-c", line], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def test_a_run_whose_streams_are_closed(small_data, tmp_path):
    """It goes on to its end, and what it would have printed is in no file."""
    run = tmp_path / "run"
    arguments = " ".join([*TINY, "--data", str(small_data), "--run-dir", str(run), "--steps", "3"])
    process = start(f"exec $PY -m train {arguments} <&- >&- 2>&-")
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert len(rows(run)) == 3
    assert (run / "summary.json").exists()
    assert len((tmp_path / "results.tsv").read_text().splitlines()) == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"step 0000" in path.read_bytes()]


def test_a_report_whose_output_is_closed(tmp_path):
    a_night(tmp_path, 3)
    process = start(f"exec $PY -m train.report {tmp_path} >&-")
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0
    assert (tmp_path / "report.md").read_text().startswith("# 3 experiments: ")
