"""What is exported computes the same, in a process that has nothing of ours."""

import errno
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as TokenizersTokenizer

import train.__main__
from model import GPT
from prepare import Tokenizer
from prepare.files import SEAL
from train.export import export, tokenizer_json
from train.export import main as export_main
from train.resilience.tensors import digest
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


def adversarial_texts():
    rng = random.Random(0)
    yield from ["", "<|bos|>", "x<|reserved_1|> <|bos|>\n", "naïve été 日本語 😀", "\u200b\x00\ud7ff", "a" * 3000]
    for char in [" ", "\n", "-", "=", "e", "aa b", "0", "\t", "'", "é", "😀"]:
        yield from (char * count for count in range(1, 40))
    pieces = ["<|bos|>", "<|", "|>", " ", "  ", "\n", "\r\n", "'s", "'LL", "123", "é", "日", "😀", "\x00", "a", "=="]
    for _ in range(3000):
        yield "".join(rng.choices(pieces, k=rng.randint(1, 20)))
    for _ in range(3000):
        yield "".join(rng.choices("abcdefghi -=", k=rng.randint(1, 40)))


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
