"""The audit lets an honest number pass, and catches each of the ways to fool oneself that are planted here."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kernels
import train.__main__
import train.trainer
from model import GPT
from prepare import Dataset, Tokenizer, prepare
from prepare.files import sealed
from prepare.shards import file_record
from tests.helpers.prepare_corpus import write_corpus
from train import evaluate
from train.config import TrainConfig, resolve
from train.results.audit import audit
from train.step import TrainStep

T = 32


@pytest.fixture(scope="module")
def model() -> GPT:
    """With every parameter random: at initialisation nothing depends on context, and a leak changes no loss."""
    config = resolve(TrainConfig(depth=2, d_model=64, head_dim=16, seq_len=T), "cpu")
    model = GPT(config.model_config(512))
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def audited(model: GPT, corpus, autocast: bool = False) -> list[str]:
    step = TrainStep(model, None, autocast)
    return audit(step.token_losses, model, Dataset.open(corpus), "reference", T, "lossless", batch_size=8)


@pytest.mark.parametrize("autocast", [False, True])
def test_an_honest_number_passes(model, corpus, autocast):
    assert audited(model, corpus, autocast) == []


def test_it_leaves_the_model_and_the_kernels_as_they_were(model, corpus):
    before = {name: p.clone() for name, p in model.named_parameters()}
    audited(model, corpus)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not kernels.common.use_kernels(model.wte)


@pytest.mark.parametrize("scale", [0.9, 0.99, 1.01])
def test_a_scaled_loss(model, corpus, monkeypatch, scale):
    honest = TrainStep.token_losses
    monkeypatch.setattr(TrainStep, "token_losses", lambda *args: scale * honest(*args))
    assert any(line.startswith("losses: they differ") for line in audited(model, corpus))


def test_a_loss_that_is_scaled_as_scored_and_not_in_fp32(model, corpus):
    """What a wrong kernel would be: the reference beside it is right."""
    honest = TrainStep(model, None).token_losses
    data = Dataset.open(corpus)
    found = audit(lambda x, y: 0.99 * honest(x, y), model, data, "reference", T, "lossless", batch_size=8)
    assert any(line.startswith("losses: their mean is") for line in found)
    assert any(line.startswith("bpb: ") for line in found)
    assert any("as scored" in line for line in found)


def test_a_model_that_peeks_one_token_ahead(model, corpus, monkeypatch):
    honest = GPT.features

    def peeking(self, tokens):
        ahead = torch.cat([tokens[:, 1:], tokens[:, -1:]], dim=1)
        return honest(self, tokens) + 0.3 * F.embedding(ahead, self.wte)

    monkeypatch.setattr(GPT, "features", peeking)
    found = audited(model, corpus)
    assert any(line.startswith("causality (in fp32)") and "inputs" in line for line in found)
    assert any(line.startswith("losses: they differ") for line in found)


def test_losses_that_read_later_targets(model, corpus, monkeypatch):
    honest = TrainStep.token_losses

    def peeking(self, inputs, targets):
        return honest(self, inputs, targets) - 0.1 * (targets.roll(-1, 1) % 2)

    monkeypatch.setattr(TrainStep, "token_losses", peeking)
    assert any(line.startswith("causality") and "targets" in line for line in audited(model, corpus))


def test_a_first_token_that_reads_the_next_target(model, corpus, monkeypatch):
    """As attention did in rows of one token: the shortest prefix alone shows it."""
    honest = TrainStep.token_losses

    def peeking(self, inputs, targets):
        losses = honest(self, inputs, targets).clone()
        losses[:, 0] -= 0.1 * (targets[:, 1] % 2)
        return losses

    monkeypatch.setattr(TrainStep, "token_losses", peeking)
    assert any(line.startswith("causality") and "targets" in line for line in audited(model, corpus))


def test_logits_that_do_not_normalise(model, corpus, monkeypatch):
    """The normaliser leaves out the likeliest token: each probability is too large."""

    def unnormalised(self, inputs, targets):
        logits = kernels.softcapped_logits(self.model.features(inputs), self.model.lm_head)
        without = logits.scatter(-1, logits.argmax(-1, keepdim=True), -torch.inf)
        return without.logsumexp(-1) - logits.gather(-1, targets[..., None])[..., 0]

    monkeypatch.setattr(TrainStep, "token_losses", unnormalised)
    assert any(line.startswith("probabilities (in fp32)") for line in audited(model, corpus))


def test_probabilities_that_depend_on_the_target(model, corpus, monkeypatch):
    """Each single loss looks like one; only the sum over all targets tells."""
    honest = TrainStep.token_losses
    monkeypatch.setattr(TrainStep, "token_losses", lambda self, x, y: honest(self, x, y) - 0.05 * (y % 3))
    assert any(line.startswith("probabilities (in fp32)") for line in audited(model, corpus))


def test_a_loss_that_is_no_number(model, corpus):
    honest = TrainStep(model, None).token_losses

    def broken(inputs, targets):
        losses = honest(inputs, targets)
        losses[0, 3] = torch.nan
        return losses

    found = audit(broken, model, Dataset.open(corpus), "reference", T, "lossless", batch_size=8)
    assert any(line.startswith("losses: their mean is nan") for line in found)


def test_a_tokenizer_that_over_counts_bytes(model, corpus, monkeypatch):
    """By decoded text, where half a character counts as U+FFFD: three bytes for one."""
    honest = Tokenizer.token_bytes.func

    def decoded(self):
        lengths = honest(self)
        for i, token in enumerate(self.tokens):
            lengths[i] = len(token.decode("utf-8", errors="replace").encode())
        return lengths

    monkeypatch.setattr(Tokenizer, "token_bytes", property(decoded))
    found = audited(model, corpus)
    assert found[0].startswith("bytes: 128 tokens count other bytes than they have; token 128 counts 3 and has 1")


def test_a_tokenizer_that_doubles_bytes_in_evaluation_alone(model, corpus):
    data = Dataset.open(corpus)
    data.token_bytes = 2 * data.token_bytes
    found = audit(TrainStep(model, None).token_losses, model, data, "reference", T, "lossless", batch_size=8)
    assert any("were scored in 2 rows" in line for line in found)
    assert any(line.startswith("bpb: ") for line in found)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A finished run, and a corpus of its own that a test may copy and spoil."""
    folder = tmp_path_factory.mktemp("audited")
    shutil.copytree(corpus, folder / "data")
    args = ["--device", "cpu", "--depth", "2", "--d-model", "64", "--head-dim", "16", "--seq-len", str(T),
            "--device-batch-size", "4", "--total-batch-size", "256", "--steps", "12"]  # fmt: skip
    assert train.__main__.main([*args, "--data", str(folder / "data"), "--run-dir", str(folder / "run")]) == 0
    return folder


def test_a_run_says_that_it_was_audited(run, capsys):
    assert json.loads((run / "run" / "summary.json").read_text())["audit"] == "ok"
    assert evaluate.main([str(run / "run"), "--audit", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "audit: ok"


@pytest.mark.parametrize("kept_as", [float, "{:.6f}".format])  # text: in summaries of before
def test_a_number_edited_in_the_summary(run, tmp_path, capsys, kept_as):
    shutil.copytree(run / "run", tmp_path / "run")
    bpb = json.loads((run / "run" / "summary.json").read_text())["val_bpb"]
    rewrite(tmp_path / "run" / "summary.json", lambda summary: summary.update(val_bpb=kept_as(0.99 * bpb)))
    assert evaluate.main([str(tmp_path / "run"), "--audit", "--device", "cpu"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"  bpb: {0.99 * bpb:.6f} in summary.json, and {bpb:.6f} now"
    # Of other text, it says nothing.
    assert evaluate.main([str(tmp_path / "run"), "--audit", "--device", "cpu", "--eval-tokens", "500"]) == 0


def swap_validation(data, name: str = "val_00000.npy") -> None:
    """Every token becomes the same frequent one: as many tokens, and quite another text."""
    tokens = np.load(data / name)
    tokens[:] = np.bincount(tokens).argmax()
    np.save(data / name, tokens)


def rewrite(path, change) -> None:
    """Edits a sealed JSON file, by someone who knows about the seal."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(sealed(content)))


def test_a_validation_file_swapped_after_preparing(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "copy")
    data, folder = tmp_path / "copy" / "data", str(tmp_path / "copy" / "run")
    rewrite(tmp_path / "copy" / "run" / "config.json", lambda config: config["data"].update(folder=str(data)))
    swap_validation(data)
    assert evaluate.main([folder, "--audit", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("audit: FAIL")
    assert "val_00000.npy has changed since it was prepared" in out

    # And with a manifest that was brought to agree.
    def accept(manifest: dict) -> None:
        for record in manifest["splits"]["val"]["files"]:
            record.update(file_record(data / record["name"]))

    rewrite(data / "manifest.json", accept)
    assert evaluate.main([folder, "--audit", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "data: split_sha256 is" in out
    assert "bytes: the validation tokens spell" in out


def test_a_validation_file_swapped_while_it_was_scored(model, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "data")
    data = Dataset.open(tmp_path / "data")
    swap_validation(tmp_path / "data")
    found = audit(TrainStep(model, None).token_losses, model, data, "reference", T, "lossless", batch_size=8)
    assert len(found) == 1
    assert found[0].startswith("data: ")


@pytest.mark.parametrize("becomes", ["prepared anew", "removed"])
def test_data_that_is_replaced_while_a_run_goes_on(run, tmp_path, monkeypatch, capsys, becomes):
    """The run ends with the number it would have had, on what was there when it began, and says so."""
    data = shutil.copytree(run / "data", tmp_path / "data")
    honest = train.trainer.train

    def training(*args):
        honest(*args)
        if becomes == "removed":
            shutil.rmtree(data)
        else:
            prepare(str(write_corpus(tmp_path / "text", 40)), data, vocab_size=300)

    monkeypatch.setattr(train.trainer, "train", training)
    args = ["--device", "cpu", "--depth", "2", "--d-model", "64", "--head-dim", "16", "--seq-len", str(T),
            "--device-batch-size", "4", "--total-batch-size", "256", "--steps", "12"]  # fmt: skip
    assert train.__main__.main([*args, "--data", str(data), "--run-dir", str(tmp_path / "run")]) == 0
    assert f"note: {data} holds other data by now" in capsys.readouterr().err
    summaries = [json.loads((folder / "run" / "summary.json").read_text()) for folder in (run, tmp_path)]
    assert summaries[0]["audit"] == summaries[1]["audit"] == "ok"
    for key in ("val_bpb", "unigram_bpb", "fingerprint"):
        assert summaries[0][key] == summaries[1][key]
    tokenizers = [(folder / "tokenizer.json").read_bytes() for folder in (run / "data", run / "run", tmp_path / "run")]
    assert len(set(tokenizers)) == 1


def test_a_run_whose_audit_fails_says_so_and_exits_with_1(run, tmp_path, monkeypatch, capsys):
    honest = TrainStep.token_losses
    monkeypatch.setattr(TrainStep, "token_losses", lambda *args: 0.5 * honest(*args))
    args = ["--device", "cpu", "--depth", "2", "--d-model", "64", "--head-dim", "16", "--seq-len", str(T),
            "--device-batch-size", "4", "--total-batch-size", "256", "--steps", "2"]  # fmt: skip
    assert train.__main__.main([*args, "--data", str(run / "data"), "--run-dir", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAIL: audit: losses: they differ")
    row = (tmp_path / "results.tsv").read_text().splitlines()[1].split("\t")
    assert row[3:6:2] == ["discard", "not compared"]
