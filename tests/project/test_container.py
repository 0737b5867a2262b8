"""What can be said of the image without building it."""

import re
import shlex
import subprocess
import tomllib

import pytest

from train.config import ROOT


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile: the word, and the rest of its line."""
    text = re.sub(r"(?m)^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8")).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def test_what_installing_reads_is_copied_before_it():
    """Everything else comes after: what changes often installs nothing anew."""
    lines = instructions()
    first = next(words for word, words in lines if word == "COPY")
    *copied, _ = first.split()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {"Makefile", "pyproject.toml", project["readme"]} <= {*copied}
    assert all((ROOT / name).is_file() for name in copied)
    make = next(i for i, (word, words) in enumerate(lines) if word == "RUN" and "make dev" in words)
    assert lines.index(("COPY", first)) < make < lines.index(("COPY", ". ."))


@pytest.mark.parametrize("line", [words for word, words in instructions() if word == "RUN"])
def test_a_line_is_one_that_a_shell_takes(line):
    command = re.sub(r"--mount=\S+\s*", "", line)
    checked = subprocess.run(["sh", "-n"], input=command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert shlex.split(command)


def test_what_triton_needs_is_installed():
    (packages,) = (words for word, words in instructions() if word == "RUN" and "apt-get" in words)
    assert {"gcc", "libc6-dev", "python3-dev", "python3-venv", "make", "git"} <= {*packages.split()}


def test_nothing_that_git_ignores_goes_into_the_image():
    ignored = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"}
    assert {*(ROOT / ".gitignore").read_text().split()} <= ignored
    assert not {line for line in ignored if line.startswith(".git")}  # by which the ledger names the commit


def test_the_lock_file_of_uv_is_no_part_of_the_repository():
    """It names the hosts that its packages came from."""
    assert subprocess.run(["git", "check-ignore", "-q", "uv.lock"], cwd=ROOT).returncode == 0
