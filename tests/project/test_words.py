"""Whatever people call a run goes through every output, and what is printed for them to type runs as it stands."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train.__main__
import train.report
from prepare.words import command_line, install_line, interpreter, printable, quoted
from tests.helpers.ledger_entries import add, entry
from tests.helpers.tiny_run import run_main, start
from train import sample
from train.config import ROOT
from train.curves import draw_curves
from train.resilience.durable import replace_file
from train.results.ledger import Ledger
from train.results.plot import new_figure

# As Python has arguments and names of files: with a byte that is not UTF-8, a formula that is none, what turns a
# terminal red, quotes of every kind, markup, and a script that has no letters in the pictures' font.
WILD = "w \udcff$\\frac{$ \x1b[31m'\"\\ `b` <i>|[a](b) _c_ %d \u4e2d"


@pytest.mark.parametrize(("text", "shown"), [
    ("wider MLP, √2 ± 1", "wider MLP, √2 ± 1"),
    ("a\udcffb", r"a\xffb"),
    ("\x1b[31m\x07\x9b\x7f", r"\x1b[31m\x07\x9b\x7f"),
    ("two\nlines\tof\r\ntext\u2028", "two lines of  text "),
    ("\u202eabc\ud800", r"\u202eabc\ud800"),
    (Path("runs/a"), "runs/a"),
])  # fmt: skip
def test_what_is_shown(text, shown):
    assert printable(text) == shown


@given(st.text(st.characters(exclude_categories=[])))
def test_what_is_shown_goes_anywhere_and_is_shown_as_it_is(text):
    shown = printable(text)
    shown.encode("utf-8")
    assert len(shown.splitlines()) <= 1
    assert not re.search("[\x00-\x1f\x7f-\x9f]", shown)
    assert printable(shown) == shown


@pytest.mark.parametrize("word", ["runs/a", "a run", "it's", "", WILD, "\udcff8", "\u00a0\x1b1"])
def test_a_quoted_word_is_that_word_to_a_shell(word):
    line = quoted(word)
    assert printable(line) == line
    done = subprocess.run(["bash", "-c", f"printf %s {line}"], capture_output=True, check=True)
    assert done.stdout == os.fsencode(word)


def test_the_interpreter_is_the_one_that_runs(tmp_path, monkeypatch):
    (tmp_path / "a venv" / "bin").mkdir(parents=True)
    python = tmp_path / "a venv" / "bin" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    assert interpreter() == shlex.quote(str(python))
    monkeypatch.chdir(tmp_path)
    assert command_line("train", "--resume", Path("runs/a b")) == "'a venv/bin/python' -m train --resume 'runs/a b'"
    monkeypatch.chdir(python.parent)
    assert interpreter() == "./python"  # a shell looks for a bare name elsewhere


@pytest.mark.parametrize(("pip", "uv", "said"), [
    (True, True, "PY -m pip install -e ."),
    (False, True, "uv pip install --python PY -e ."),
    (False, False, "PY -m ensurepip && PY -m pip install -e ."),
])  # fmt: skip
def test_how_packages_come_into_this_python(monkeypatch, pip, uv, said):
    monkeypatch.setattr("prepare.words.PathFinder", SimpleNamespace(find_spec=lambda name: pip or None))
    monkeypatch.setattr("prepare.words.which", lambda name: "/bin/uv" if uv else None)
    assert install_line("-e", ".") == said.replace("PY", interpreter())


def test_asking_for_pip_does_not_keep_setuptools_from_being_imported():
    """Which PyTorch's compiler imports."""
    asked = "from prepare.words import install_line; install_line('x'); import setuptools"
    subprocess.run([sys.executable, "-c", asked], cwd=ROOT, check=True)


def test_no_command_is_spelled_without_its_interpreter():
    """Outside the docstrings, which speak of any interpreter, and the one line that says how a command is used."""
    found = []
    for path in sorted(path for package in ("prepare", "train", "bench") for path in (ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        spoken = {
            id(node.body[0].value) for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
        }  # fmt: skip
        found += [
            f"{path.name}: {node.value}" for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in spoken
            and re.search(r"python3? -m|\bpip install|venv/bin", node.value)
        ]  # fmt: skip
    assert found == ["arguments.py: python -m ", "words.py: uv pip install --python"]


def test_a_ledger_that_holds_such_words_is_reported(tmp_path, capsys):
    """A ledger cannot be edited: it has to be read, whatever it holds."""
    add(Ledger(tmp_path), entry(WILD, 1.0, description=WILD), entry("b", 0.9, description=f"$x_1$ {WILD}"))
    (tmp_path / "report.md").write_text("")
    assert train.report.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "2 experiments" in shown
    assert "\x1b" not in shown
    *_, first, _ = (tmp_path / "report.md").read_text(encoding="utf-8").splitlines()
    name = r"w \\xff\$\\frac{\$ \\x1b\[31m'" + '"' + r"\\ \`b\` \<i>\|\[a\](b) \_c\_ %d 中"
    assert first == f"| 1 | {name} | 1234567 | 1.000000 (1) | - | 44.0 | keep | baseline | - | {name} |"
    assert "\x1b" not in (tmp_path / "results.tsv").read_text()
    assert b"\x1b" not in (tmp_path / "results.jsonl").read_bytes()
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_text_in_a_picture_is_no_formula():
    assert new_figure(1, 1).suptitle("between $x_1$ and $y$").get_parse_math() is False


@pytest.mark.usefixtures("pictures")
def test_the_picture_of_a_run_of_such_a_name(tmp_path, capsys):
    (tmp_path / WILD).mkdir()
    row = {"loss": 7, "smooth_loss": 7, "lr_multiplier": 1.0, "seconds": 0.1, "tokens_per_second": 2.0, "mfu": None}
    (tmp_path / WILD / "metrics.jsonl").write_text(json.dumps(row))
    assert draw_curves(tmp_path / WILD).read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().err == ""


def test_a_run_of_such_a_name_from_end_to_end(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.print", strict_print(print))
    run = tmp_path / WILD
    assert run_main(corpus, run, "--steps", "2", "--description", WILD, "--group", WILD) == 0
    for module, *args in (
        ("report", tmp_path), ("compare", run, run), ("curves", run), ("evaluate", run, "--audit"),
        ("sample", run, "--prompt", "café"), ("export", run, "--to", tmp_path / "\x1b[31m"),
    ):  # fmt: skip
        assert __import__(f"train.{module}", fromlist=["main"]).main([str(arg) for arg in args]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert f"run:                   {printable(run)}\n" in captured.out
    assert "café" in captured.out
    for module, args, reason in (
        ("__main__", ["--run-dir", run], "not empty"), ("export", [run, "--to", tmp_path / "\udcff"], "UTF-8"),
        ("__main__", ["--run-dir", tmp_path / "\udcff", "--track", "tensorboard"], "UTF-8"),
    ):  # fmt: skip
        assert __import__(f"train.{module}", fromlist=["main"]).main([str(arg) for arg in args]) == 2
        line = capsys.readouterr().err
        assert "\x1b" not in line
        assert reason in line


def test_an_option_of_such_a_name(capsys):
    with pytest.raises(SystemExit, match="2"):
        train.__main__.main(["--\x1b[1m\udcff"])
    assert capsys.readouterr().err == "error: unknown argument --\\x1b[1m\\xff: --help lists all\n"


def strict_print(real):
    """A terminal that takes UTF-8 and nothing else."""

    def printing(*values, **options):
        " ".join(map(str, values)).encode("utf-8")
        real(*values, **options)

    return printing


@pytest.mark.parametrize(("asked", "shown"), [("ascii", b"\\xb1"), ("ascii:replace", b"?")])
def test_an_output_that_lacks_a_letter_spells_it(tmp_path, asked, shown):
    add(Ledger(tmp_path), *(entry(f"a{i}", 1.0 + i, group="a", seed=42 + i) for i in range(2)))
    command = [sys.executable, "-m", "train.compare", "a", "a", "--ledger", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": asked}, capture_output=True)
    assert done.stderr == b""
    assert done.stdout.startswith(b"A: 1.500000 " + shown)


def test_a_byte_that_is_no_text_in_a_description_costs_nothing(small_data, tmp_path):
    """From the shell on."""
    run = tmp_path / "run"
    arguments = ["--data", str(small_data), "--run-dir", str(run), "--steps", "2", "--description", "caf\udce9 \x1b[1m"]
    process = start("--device=cpu", "--seq-len=32", "--total-batch-size=256", "--no-autocast", *arguments)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "\x1b" not in out + errors
    assert "\tcaf\\xe9 \\x1b[1m\t" in (tmp_path / "results.tsv").read_text(encoding="utf-8")
    assert json.loads((run / "config.json").read_text())["config"]["description"] == "caf\\xe9 \\x1b[1m"


@pytest.mark.parametrize("name", ["report.md", "report.png"])
def test_what_cannot_be_written_anew_stays_as_it_was(tmp_path, monkeypatch, name):
    add(Ledger(tmp_path), entry("a", 1.0))
    (tmp_path / name).write_text("before")

    def full(path, *pieces):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("train.resilience.durable.write_synced", full)
    assert train.report.main([str(tmp_path)]) == 2
    assert (tmp_path / name).read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {name, "results.jsonl", "results.lock", "results.tsv"}


def test_nothing_is_written_over_but_by_the_function_for_it():
    """`replace_file`: a file that is there is whole, the old one or the new one."""
    found = []
    for path in sorted(path for package in ("train", "bench") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.search(r"(write_text|write_bytes|savefig)$", ast.unparse(node.func)):
                found.append(f"{path.name}: {ast.unparse(node.func)}")
    # Into a temporary folder, to a device, to memory.
    assert found == [
        "launching.py: source.write_text", "durable.py: path.write_bytes", "plot.py: figure.savefig",
        "compiling.py: results.write_text", "compiling.py: told.write_text", "tuner.py: self.results.write_text",
        "tuner.py: arguments.write_text",
    ]  # fmt: skip


def test_a_link_stays_a_link_and_a_device_a_device(tmp_path):
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to("there")
    replace_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    replace_file(tmp_path / "pipe", b"a", b"b")
    assert os.read(reader, 9) == b"ab"
    os.close(reader)


def test_what_a_model_makes_up_is_no_command_to_a_terminal(small_run, monkeypatch, capsys):
    monkeypatch.setattr("prepare.Tokenizer.decode_bytes", lambda self, tokens: b"\x1b]0;title\x07\n\tindented\ta")
    assert sample.main([str(small_run), "--tokens", "1"]) == 0
    assert "\x1b" in capsys.readouterr().out  # a file gets what there is
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert sample.main([str(small_run), "--tokens", "1"]) == 0
    assert capsys.readouterr().out == "\\x1b]0;title\\x07\n        indented        a\n"
