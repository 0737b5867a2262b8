"""Nothing that is read can run code."""

import ast
import os
from pathlib import Path

import pytest

from prepare import InputError, dataset, prepare
from prepare.dataset import Dataset
from prepare.files import read_sealed, sha256_of
from tests.helpers.damage import CHECKPOINT_FILES, DATA_FILES, RUN_FILES, read_checkpoint, read_data, read_run
from tests.helpers.payloads import FORMS, Payload
from tests.helpers.prepare_corpus import write_corpus
from train import evaluate, sample
from train.config import ROOT
from train.results.run_folder import RunFolder


def plant(form, payload: Payload, path: Path):
    """Puts the payload where `path` is, with the mtime of what was there. Returns what undoes it."""
    content, stat = path.read_bytes(), path.stat()
    form(payload, path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def undo():
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return undo


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", DATA_FILES)
def test_in_prepared_data(small_data, payload, monkeypatch, name, verify, form):
    """With `verify` off nothing is hashed: the readers themselves refuse it."""
    undo = plant(form, payload, small_data / name)
    if not verify:
        monkeypatch.setattr(dataset, "_check_hash", lambda *_: None)
    try:
        with pytest.raises(InputError, match=name):
            read_data(small_data)
    finally:
        undo()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_in_what_was_verified(small_data, payload, monkeypatch, form):
    monkeypatch.setattr(dataset, "ALWAYS_HASHED", 0)
    form(payload, small_data / "verified.json")
    Dataset.open(small_data)
    (small_data / "verified.json").unlink()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("name", RUN_FILES)
def test_in_a_run(small_run, payload, capsys, name, form):
    undo = plant(form, payload, small_run / name)
    try:
        with pytest.raises(InputError, match=name):
            read_run(small_run)
        for program in (sample, evaluate):
            assert program.main([str(small_run), "--device", "cpu"]) == 2
            err = capsys.readouterr().err
            assert err.startswith("error: ")
            assert err.count("\n") == 1
    finally:
        undo()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_in_a_checkpoint(small_run, payload, name, form):
    """Also where it has the hash that SHA256SUMS says: what anyone can write who can write the file."""
    (checkpoint,) = (small_run / "checkpoints").iterdir()
    sums = (checkpoint / "SHA256SUMS").read_text()
    undo = plant(form, payload, checkpoint / name)
    for line in sums.splitlines():
        if line.endswith(name):
            (checkpoint / "SHA256SUMS").write_text(sums.replace(line[:64], sha256_of(checkpoint / name)))
    try:
        with pytest.raises(InputError):
            read_checkpoint(small_run)
    finally:
        undo()
        if name != "SHA256SUMS":
            (checkpoint / "SHA256SUMS").write_text(sums)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_in_a_log(small_run, payload, form):
    undo = plant(form, payload, small_run / "metrics.jsonl")
    run = RunFolder.__new__(RunFolder)
    run.path = small_run
    run.cut_metrics(10)
    assert (small_run / "metrics.jsonl").read_bytes() == b""
    undo()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_in_a_summary(small_run, payload, form):
    undo = plant(form, payload, small_run / "summary.json")
    with pytest.raises(InputError, match="summary"):
        read_sealed(small_run / "summary.json", "train it again")
    undo()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.txt", "a.md", "a.txt.gz", "a.jsonl.zst"])
def test_in_a_source(tmp_path, payload, name, form):
    source = write_corpus(tmp_path / "text", 5)
    form(payload, source / name)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        prepare(str(source), tmp_path / "out", vocab_size=260)


UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml"}
UNSAFE_CALLS = {
    "eval", "exec", "__import__", "torch.load", "torch.save", "torch.jit.load", "torch.package", "np.load",
    "numpy.load", "os.system", "os.popen", "torch.compiler.load_cache_artifacts",
}  # fmt: skip
UNSAFE_ARGUMENTS = {"allow_pickle", "shell"}


def unsafe(source: str) -> list[str]:
    """What in a module's text could run what it reads: "line: name" each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n for n in whole if n.split(".")[0] in UNSAFE_MODULES or n in UNSAFE_CALLS]
        elif isinstance(node, ast.Call):
            names = [ast.unparse(node.func)] if ast.unparse(node.func) in UNSAFE_CALLS else []
            for keyword in node.keywords:
                if keyword.arg in UNSAFE_ARGUMENTS and ast.unparse(keyword.value) != "False":
                    names.append(f"{keyword.arg}={ast.unparse(keyword.value)}")
        found += [f"{node.lineno}: {name}" for name in names]
    return found


@pytest.mark.parametrize("package", ["kernels", "model", "prepare", "train", "bench"])
def test_no_module_of_ours_can_run_what_it_reads(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not unsafe(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "import numpy, pickle as p", "from pickle import loads", "from torch import load",
        "torch.load(p)", "x = eval(text)", "exec(text)", "np.load(p)", "np.lib.format.read_array(f, allow_pickle=True)",
        "subprocess.run(c, shell=True)", "import yaml", "import marshal", "os.system(c)", "import shelve",
    ],
)  # fmt: skip
def test_what_could_is_found(line):
    assert unsafe(line)
