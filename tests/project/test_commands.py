"""What every command does the same way: closed streams, Ctrl-C before it has begun, paths of no use."""

import ast
import errno
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import venv

import pytest

from prepare.errors import one_line, readable_size
from tests.helpers.ledger_entries import a_night
from tests.helpers.tiny_run import TINY, rows
from train import doctor
from train.config import ROOT

# In place of a module that every command imports: says how things are, and takes its time.
SLOW = """
import os, sys, time
with open(os.environ["SEEN"], "w") as file:
    file.write(f"{sys.stdout is None} {file.fileno() > 2} {os.get_inheritable(1)}")
time.sleep(600)
"""


MOVED = {"bench.compare": "bench.regressions", "bench.tune": "train.tune"}  # old names, which say the new one


def commands() -> list[str]:
    """The modules that are made to be run."""
    found = []
    for path in sorted(path for package in ("prepare", "train", "bench") for path in (ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body):
            found.append(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__"))
    return found


def test_which_modules_are_commands():
    """What people type, wherever its file goes."""
    assert sorted(commands()) == [
        "bench.ceilings", "bench.collectives", "bench.compare", "bench.gpu_tests", "bench.nights", "bench.offline",
        "bench.profile", "bench.regressions", "bench.roofline", "bench.runs", "bench.tune", "prepare", "train",
        "train.compare", "train.curves", "train.doctor", "train.evaluate", "train.export", "train.precompile",
        "train.replay", "train.report", "train.sample", "train.tune",
    ]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_an_old_name_says_the_new_one(old, new):
    done = subprocess.run([sys.executable, "-m", old, "a b"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.endswith(f" -m {new} 'a b'\n")


def start(line: str, **more: str) -> subprocess.Popen:
    """A line of a shell, `$PY` being this Python."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PY": sys.executable} | more
    return subprocess.Popen(["sh", "-c", line], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in commands() if name not in MOVED])
def test_interrupted_while_it_imports(name, tmp_path):
    """No traceback; and what was closed is open by then, for the processes that it starts too."""
    for module in ("json", "torch"):
        (tmp_path / f"{module}.py").write_text(SLOW)
    (tmp_path / "text").mkdir()
    arguments = f"--source {tmp_path / 'text'} --out {tmp_path / 'out'}" if name == "prepare" else ""
    seen = tmp_path / "seen"
    process = start(f"exec $PY -m {name} {arguments} >&-", PYTHONPATH=str(tmp_path), SEEN=str(seen))
    deadline = time.monotonic() + 600
    while not (seen.exists() and seen.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == (130 if name in ("prepare", "train") else -signal.SIGINT)  # a shell says 130 of both
    assert errors == ("\ninterrupted\n" if name == "train" else "")
    assert seen.read_text() == "False True True"


def test_interrupted_once_it_has_begun():
    program = """if True:
        import os, signal, sys, time
        sys.argv = ["-m"]
        from prepare.arguments import command
        command(lambda: os.kill(os.getpid(), signal.SIGINT) or time.sleep(600))"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


LONG = "a" * 300  # longer than any file's name may be: what the system says of it is no word of ours


@pytest.mark.parametrize(("name", "arguments", "option"), [
    ("prepare.__main__", ["--source", LONG], "--source"),
    ("prepare.__main__", ["--out", LONG], "--out"),
    ("train.__main__", ["--data", LONG], "--data"),
    ("train.__main__", ["--run-dir", LONG, "--data", "DATA"], "--run-dir"),
    ("train.__main__", ["--run-dir", "FILE/run", "--data", "DATA"], "--run-dir"),
    ("train.replay", [LONG], "RUN"),
    ("train.sample", [LONG], "RUN"),
    ("train.evaluate", [LONG], "RUN"),
    ("train.export", [LONG, "--to", "new"], "RUN"),
    ("train.export", ["RUN", "--to", "FILE/below"], "--to"),
    ("train.report", [LONG], "RUNS"),
    ("train.report", ["LEDGER", "--out", "FILE"], "--out"),
    ("train.compare", ["A", "B", "--ledger", LONG], "--ledger"),
    ("bench.regressions", [LONG], "name another file"),
    ("bench.roofline", ["--config", LONG], "--config"),
    ("bench.roofline", ["--measured", LONG], "name another file"),
    ("bench.profile", ["--trace", LONG], "name another file"),
    ("bench.profile", ["--save", "FILE/below"], "--save"),
])  # fmt: skip
def test_a_bad_path_is_one_line_that_names_the_option(
    name, arguments, option, small_data, small_run, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "file"
    file.touch()
    a_night(tmp_path / "ledger", 2)
    for word, path in (("FILE", file), ("DATA", small_data), ("RUN", small_run), ("LEDGER", tmp_path / "ledger")):
        arguments = [str(path) + a.removeprefix(word) if a.split("/")[0] == word else a for a in arguments]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIMEBOX_HOME", str(tmp_path / "home"))
    assert importlib.import_module(name).main(arguments) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert "Errno" not in line
    assert option in line


def test_an_error_that_is_about_no_path_is_mended_by_none():
    assert one_line(BrokenPipeError(errno.EPIPE, "Broken pipe"), "MEND") == "Broken pipe"
    assert one_line(OSError("libx.so: cannot open\nshared object"), "MEND") == "libx.so: cannot open shared object"
    assert one_line(OSError(errno.ENOSPC, "No space"), "MEND") == "No space; MEND"
    assert one_line(OSError(errno.EACCES, "Permission denied", "a"), "MEND") == "a: Permission denied; MEND"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full, a disk that is always full, is Linux's")
@pytest.mark.parametrize("arguments", [
    ["train", *TINY, "--data", "DATA", "--run-dir", "OUT/run"],
    ["train.doctor", "--data", "DATA"],
    ["train.evaluate", "RUN"],
    ["train.compare", "r000", "r001", "--ledger", "LEDGER"],
    ["prepare", "--source", "TEXT", "--out", "OUT/data", "--vocab-size", "280"],
])  # fmt: skip
def test_output_that_cannot_be_written_is_what_the_error_names(arguments, small_data, small_run, tmp_path):
    a_night(tmp_path / "ledger", 2)
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(f"This is text number {i}, and not the last one. " * 10)
    folders = {"DATA": small_data, "RUN": small_run, "LEDGER": tmp_path / "ledger", "TEXT": tmp_path / "text"}
    arguments = [str(folders.get(a, a)).replace("OUT", str(tmp_path)) for a in arguments]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=ROOT, env=buffered, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: standard output: No space left on device; send it elsewhere"


def test_what_the_doctor_says_of_a_bad_path():
    found, _ = doctor.dataset(LONG, "cpu")
    assert (found.state, found.remedy) == (doctor.WRONG, "name another folder with --data")


@pytest.mark.parametrize("name", ["train.__main__", "train.sample", "train.evaluate"])
def test_a_gpu_without_bf16_is_refused(name, small_data, small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (7, 5))
    monkeypatch.setattr("train.results.record.machine", lambda *_: {})
    arguments = ["--data", str(small_data), "--run-dir", str(tmp_path / "run")] if "main" in name else [str(small_run)]
    assert importlib.import_module(name).main(arguments) == 2
    line = capsys.readouterr().err
    assert line == "error: this GPU has compute capability 7.5, bf16 needs 8.0: take another, or --device cpu\n"
    assert not (tmp_path / "run").exists()


def test_a_run_whose_streams_are_closed(small_data, tmp_path):
    """It goes on to its end, and what it would have printed is in no file."""
    run = tmp_path / "run"
    arguments = " ".join([*TINY, "--data", str(small_data), "--run-dir", str(run), "--steps", "3"])
    process = start(f"exec $PY -m train {arguments} <&- >&- 2>&-")
    process.communicate(timeout=600)
    assert process.returncode == 0
    assert len(rows(run)) == 3
    assert (run / "summary.json").exists()
    assert len((tmp_path / "results.tsv").read_text().splitlines()) == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"step 0000" in path.read_bytes()]


def test_a_report_whose_output_is_closed(tmp_path):
    a_night(tmp_path, 3)
    process = start(f"exec $PY -m train.report {tmp_path} >&-")
    assert process.communicate(timeout=600)[1] == ""
    assert process.returncode == 0
    assert (tmp_path / "report.md").read_text().startswith("# 3 experiments: ")


def test_make_says_that_a_venv_keeps_its_python(tmp_path):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    make = ["make", "-n", "-f", str(ROOT / "Makefile"), "clean"]
    for asked, count in (([], 0), (["PYTHON=python3.12"], 1)):
        done = subprocess.run([*make, *asked], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.count("note: .venv is there and keeps its Python") == count


def test_make_dev_says_how_python_becomes_that_of_the_venv(tmp_path):
    """The line that it prints, obeyed, makes `python` the one it has installed everything for."""
    venv.create(tmp_path / ".venv", with_pip=False)
    (tmp_path / "pyproject.toml").touch()
    for stamp in (".runtime", ".dev"):
        (tmp_path / ".venv" / stamp).touch()
    made = subprocess.run(["make", "-f", str(ROOT / "Makefile"), "dev"], cwd=tmp_path, capture_output=True, text=True)
    _, _, activate = made.stdout.strip().rpartition(": ")
    asked = f"{activate} && command -v python"
    done = subprocess.run(["bash", "-c", asked], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/.venv/bin/python\n"


# In place of a virtual environment's Python: has a pip once it is given one, and says what it was asked for.
PRETENDED_PYTHON = """#!/bin/sh
echo "python $*" >> asked
case "$*" in
    -c*) exit $VERSION_IS_WRONG ;;
    "-m pip --version") test -e pip ;;
    "-m ensurepip") test -e ensurepip && touch pip ;;
esac
"""


@pytest.mark.parametrize(("there", "asked"), [
    ("pip", ["python -m pip install -e ."]),
    ("ensurepip", ["python -m ensurepip", "python -m pip install -e ."]),
    ("uv", ["python -m ensurepip", "uv pip install --python .venv/bin/python -e ."]),
    ("nothing", ["python -m ensurepip"]),
    ("another version", []),
])  # fmt: skip
def test_make_installs_into_whatever_venv_there_is(tmp_path, there, asked):
    """As `uv venv` leaves it, without a pip, too; and it is that environment's Python whose version counts."""
    for folder, name, content in (
        (".venv/bin", "python", PRETENDED_PYTHON), ("bin", "python3", "#!/bin/sh\nexit 1"),
        ("bin", "uv", '#!/bin/sh\necho "uv $*" >> asked'),
    ):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        if name != "uv" or there == "uv":
            (tmp_path / folder / name).write_text(content)
            (tmp_path / folder / name).chmod(0o755)
    (tmp_path / "bin" / "touch").symlink_to(shutil.which("touch"))
    (tmp_path / there).touch()
    (tmp_path / "pyproject.toml").touch()
    environment = {"PATH": str(tmp_path / "bin"), "VERSION_IS_WRONG": str(int(there == "another version"))}
    make = [shutil.which("make"), "-f", str(ROOT / "Makefile"), ".venv/.runtime"]
    done = subprocess.run(make, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (there in ("pip", "ensurepip", "uv"))
    assert (tmp_path / ".venv" / ".runtime").exists() == (done.returncode == 0)
    lines = (tmp_path / "asked").read_text().replace(" --quiet", "").replace(" --disable-pip-version-check", "")
    lines = [line for line in lines.splitlines() if line != "python -m pip --version"]
    assert lines[0].startswith("python -c import sys")
    assert lines[1:] == asked
    if there == "nothing":
        assert ".venv has no pip, and its Python brings none: " in done.stdout
    if there == "another version":
        assert "timebox needs Python 3.11 or 3.12: " in done.stdout


def test_a_damaged_tokenizer_of_a_run_is_mended_from_its_data(small_run, tmp_path, capsys):
    copy = shutil.copytree(small_run, tmp_path / "run")
    (copy / "tokenizer.json").write_text("{")
    assert importlib.import_module("train.sample").main([str(copy)]) == 2
    assert capsys.readouterr().err.endswith("; copy that of its data folder there, or train it again\n")


@pytest.mark.parametrize(("size", "said"), [(2e9, "2.00 GB"), (2.5e6, "2.50 MB")])
def test_what_a_small_disk_lacks_is_not_nothing(size, said):
    assert readable_size(size) == said
