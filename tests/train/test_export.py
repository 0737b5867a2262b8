"""What is exported computes the same, in a process that has nothing of ours."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as TokenizersTokenizer

import train.__main__
from model import GPT
from prepare import Tokenizer
from prepare.files import SEAL
from tests.helpers.adversarial_texts import adversarial_texts
from tests.helpers.imports import imported
from train import huggingface
from train.export import MODELING, export, tokenizer_json
from train.export import main as export_main
from train.resilience.tensors import digest
from train.results.ledger import Ledger
from train.results.run_folder import load_run

ELSEWHERE = """
import sys
from importlib.util import find_spec
assert not any(find_spec(name) for name in ("kernels", "model", "prepare", "train")), sys.path
import torch
from modeling import GPT
from safetensors.torch import load_file, save_file
model = GPT.load(".")
with torch.no_grad():
    save_file({"logits": model(load_file(sys.argv[1])["tokens"])}, sys.argv[2])
"""


@pytest.fixture(scope="module", params=[
    [], ["--num-kv-heads", "2", "--window-pattern", "SL", "--depth", "3"],
    ["--num-kv-heads", "2", "--window-pattern", "LS", "--depth", "3", "--key-offset"],
    ["--smear", "--bigram-rows", "3", "--depth", "3"],
    ["--rope-base", "50", "--short-window", "8", "--window-pattern", "S"],
])  # fmt: skip
def finished(request, corpus, tmp_path_factory):
    """A run whose every parameter is then made random: after a few steps some are still near 0."""
    folder = tmp_path_factory.mktemp("exported") / "run"
    args = ["--device", "cpu", "--depth", "2", "--d-model", "64", "--head-dim", "16", "--seq-len", "32",
            "--device-batch-size", "4", "--total-batch-size", "128", "--steps", "2", *request.param]  # fmt: skip
    assert train.__main__.main([*args, "--data", str(corpus), "--run-dir", str(folder)]) == 0
    generator = torch.Generator().manual_seed(0)
    weights = load_file(folder / "model.safetensors")
    for weight in weights.values():
        weight += 0.1 * torch.randn(weight.shape, generator=generator)
    save_file(weights, folder / "model.safetensors", {SEAL: digest(weights)})
    return folder


def test_equal_logits_from_a_process_without_us(finished, tmp_path):
    """fp32 on a CPU: to 2e-5 of logits that reach ±15. Only the order of sums differs."""
    assert export_main([str(finished), "--to", str(tmp_path / "out")]) == 0
    tokens = torch.randint(512, (3, 32), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "tokens.safetensors"), str(tmp_path / "l.safetensors")]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, cwd=tmp_path / "out", check=True, env=environment)
    theirs = load_file(tmp_path / "l.safetensors")["logits"]
    model, _, _ = load_run(finished)
    with torch.no_grad():
        ours = torch.stack([model(tokens[:, : t + 1]) for t in range(32)], dim=1)
    assert ours.abs().max() > 1
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-5)


def test_the_tokenizers_library_gives_the_same_ids(finished, tmp_path):
    export(finished, tmp_path / "out")
    ours = Tokenizer.load(finished / "tokenizer.json")
    theirs = TokenizersTokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    for text in adversarial_texts():
        ids = theirs.encode(text).ids
        assert ids == ours.encode(text), repr(text)
        assert max(ids, default=0) < ours.bos  # text that spells a special token stays text
        assert theirs.decode(ids, skip_special_tokens=False) == text
    assert theirs.get_vocab_size() == ours.vocab_size
    assert [theirs.token_to_id(name) for name in ours.special_tokens] == list(range(ours.bos, ours.vocab_size))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["bos"] == ours.bos
    assert config["special_tokens"]["<|bos|>"] == ours.bos


def test_a_token_that_no_merge_reaches():
    """Joining b and c first leaves a, bc, d; the encoder takes the whole piece all the same, since it is a token."""
    ours = Tokenizer([b"bc", b"ab", b"cd", b"abcd"])
    theirs = TokenizersTokenizer.from_str(json.dumps(tokenizer_json(ours)))
    assert ours.encode("abcd") == [259]
    for text in ("abcd", " abcd", "abcd abcd", "abcdabcd"):
        assert theirs.encode(text).ids == ours.encode(text)


def test_a_model_that_modeling_py_does_not_know_is_refused(finished, tmp_path, monkeypatch, capsys):
    honest = GPT.features
    monkeypatch.setattr(GPT, "features", lambda self, tokens: 1.01 * honest(self, tokens))
    assert export_main([str(finished), "--to", str(tmp_path / "out")]) == 2
    assert "other logits than model/gpt.py" in capsys.readouterr().err
    monkeypatch.undo()
    assert export_main([str(finished), "--to", str(tmp_path / "out")]) == 0  # the same again, brought up to date


def test_a_full_disk_is_said_in_one_line(finished, tmp_path, monkeypatch, capsys):
    def full(source, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    with monkeypatch.context() as patch:
        patch.setattr("train.export.shutil.copyfile", full)  # the last file
        assert export_main([str(finished), "--to", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "make room" in error
    assert error.count("\n") == 1
    assert export_main([str(finished), "--to", str(tmp_path / "out")]) == 0  # the same again, with room


def test_a_folder_in_use_is_left_alone(finished, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert export_main([str(finished), "--to", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_what_hugging_face_finds_in_the_folder(finished, tmp_path):
    """Its classes where config.json says, `bos` before a text, and all of the plain folder. tests/extras loads it."""
    assert export_main([str(finished), "--to", str(tmp_path / "out"), "--format", "hf"]) == 0
    assert export_main([str(finished), "--to", str(tmp_path / "plain")]) == 0
    config, plain = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "plain"))
    assert config.items() >= {key: value for key, value in plain.items() if key != SEAL}.items()
    assert (tmp_path / "out" / "modeling.py").read_bytes() == (tmp_path / "plain" / "modeling.py").read_bytes()
    for place in config["auto_map"].values():
        module, name = place.split(".")
        assert f"class {name}(" in (tmp_path / "out" / f"{module}.py").read_text()
    ours = Tokenizer.load(finished / "tokenizer.json")
    theirs = TokenizersTokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert theirs.encode("naïve").ids == [ours.bos, *ours.encode("naïve")]
    assert theirs.encode("naïve", add_special_tokens=False).ids == ours.encode("naïve")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert [generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [ours.bos, ours.bos, ours.bos + 1]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_the_classes_rest_on_torch_and_transformers_alone():
    """Where they are loaded there is nothing else: modeling.py takes safetensors, which comes with transformers, to
    load a folder by itself."""
    assert imported(huggingface.WRAPPER) - {"train"} == {"torch", "transformers"}
    assert imported(MODELING) - set(sys.stdlib_module_names) == {"torch", "safetensors"}


def test_the_model_card_is_of_the_ledgers_row(small_run, tmp_path, capsys):
    runs = tmp_path / "home of somebody" / "runs"
    shutil.copytree(small_run, runs / "run")
    (entry,) = Ledger.beside(small_run).runs()
    entry |= {"val_bpb": 1.2345678, "description": "a | `first` *try* {x}", "commit": "abc1234", "note": ""}
    entry["data"]["source"] = str(runs / "my_folder")
    entry["flags"] = ["--steps=2", f"--data={runs}", "--depth=1"]
    Ledger(runs).append({**entry, "val_bpb": 9.0})
    Ledger(runs).append({**entry, "config": entry["config"] | {"resume": str(runs / "run")}})
    assert export_main([str(runs / "run"), "--to", str(tmp_path / "out"), "--format", "hf"]) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "\n| validation bits per byte | 1.234568 |\n" in card
    assert "\n| description | a \\| \\`first\\` \\*try\\* {x} |\n" in card
    assert "\n| flags | --steps=2 --depth=1 |\n" in card
    assert "\n| source of the text | my\\_folder |\n" in card or "\n| source of the text | my_folder |\n" in card
    assert "\n| commit of timebox | abc1234 |\n" in card
    assert "somebody" not in card
    assert "{" not in card.replace("{x}", "")
    Ledger(runs).append({**entry, "seed": entry["seed"] + 1})  # another run, whose folder had this name
    assert export_main([str(runs / "run"), "--to", str(tmp_path / "another"), "--format", "hf"]) == 0
    (runs / "results.jsonl").unlink()
    assert export_main([str(runs / "run"), "--to", str(tmp_path / "none"), "--format", "hf"]) == 0
    for name in ("another", "none"):
        assert "how well it does was not recorded" in (tmp_path / name / "README.md").read_text(encoding="utf-8")


def test_a_folder_that_was_not_finished_is_emptied(finished, tmp_path, monkeypatch, capsys):
    honest = GPT.features
    monkeypatch.setattr(GPT, "features", lambda self, tokens: 1.01 * honest(self, tokens))
    assert export_main([str(finished), "--to", str(tmp_path / "out"), "--format", "hf"]) == 2
    assert "other logits than model/gpt.py" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
