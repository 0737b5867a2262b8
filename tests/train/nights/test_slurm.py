"""The script of docs/nights.md for Slurm, as bash runs it, with programs in the places of Slurm's and of ours."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.project.test_docs import blocks
from train.config import ROOT, parse_given

# What `python -m train` leaves and ends with: the first time it is interrupted, and then it goes on to its end.
PYTHON = """#!/bin/bash
echo "$@" >> "$SEEN"
if [ "$3" = --run-dir ]; then mkdir -p "$4"; touch "$4/config.json"; exit 143; fi
"""
PASSED_ON = """#!/bin/bash
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $@" >> "$SEEN"
"""


@pytest.fixture
def task(tmp_path):
    """Runs the script as one task of the array; what it asked for, a line each."""
    (script,) = [lines for language, lines in blocks(ROOT / "docs" / "nights.md") if language == "text"]
    text = "\n".join(script).replace("/shared/night", str(tmp_path / "night"))
    for name, program in (("python", PYTHON), ("srun", PASSED_ON), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(program)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SEEN": str(tmp_path / "seen"),
        "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "43",
    }  # fmt: skip

    def run() -> list[str]:
        (tmp_path / "seen").unlink(missing_ok=True)
        done = subprocess.run(["bash", "-u"], input=text, env=environment, text=True, capture_output=True)
        assert done.stderr == ""
        return (tmp_path / "seen").read_text().splitlines()

    return run


def test_a_task_begins_is_put_back_and_goes_on(task, tmp_path):
    run = str(tmp_path / "night" / "7-43")
    begun, put_back = task()
    given = parse_given(begun.split()[2:])
    assert given == {"run_dir": run, "group": "7", "seed": 43}
    assert put_back == "scontrol requeue 7_43"
    (resumed,) = task()
    assert parse_given(resumed.split()[2:]) == {"resume": run}
    assert Path(run, "config.json").exists()
