"""A run that begins with the weights of a finished one: what it takes over, and what its number is compared with."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import train.trainer
from prepare import Dataset, prepare
from tests.helpers.prepare_corpus import write_corpus
from tests.helpers.ranks import run_ranks
from tests.helpers.small_step import make_step
from tests.helpers.stopped_run import main, signal_after
from tests.helpers.tiny_run import assert_same, losses, run_main
from train.config import TrainConfig
from train.init_from import MAY_DIFFER, begin_with, model_options
from train.loop import train as train_loop
from train.resilience.tensors import digest
from train.results.judge import BASELINE, differences
from train.results.ledger import Ledger

# No option of a model among them: those are the source's.
ON = ["--device", "cpu", "--no-autocast", "--device-batch-size", "4", "--total-batch-size", "256", "--steps", "6",
      "--untimed-steps", "2", "--keep-checkpoints"]  # fmt: skip


@pytest.fixture(scope="module")
def source(corpus, tmp_path_factory):
    """A finished run, of a model that no recipe has."""
    folder = tmp_path_factory.mktemp("source") / "source"
    assert run_main(corpus, folder, "--steps", "12", "--no-smear", "--rope-base", "500", "--num-kv-heads", "2") == 0
    return folder


def go(source, folder, *args) -> int:
    return main(*ON, "--init-from", str(source), "--run-dir", str(folder), *args)


@pytest.fixture(scope="module")
def further(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("further") / "further"
    assert go(source, folder) == 0
    return folder


def test_it_begins_with_these_weights(source, tmp_path, monkeypatch, capfd):
    """As its first step reads them, with no moment, at the first step of a new schedule and of the data."""
    seen = {}

    def looked(config, step, state, *rest):
        seen["masters"] = {name: p.clone() for name, p in step.optimizer.whole_masters().items()}
        seen["moments"] = [t for name, t in step.optimizer.state().items() if not name.startswith("master.")]
        assert all(not moment.any() for moment in seen["moments"])
        assert state.step == 0
        return train_loop(config, step, state, *rest)

    monkeypatch.setattr(train.trainer, "train", looked)
    assert go(source, tmp_path / "run") == 0
    theirs = load_file(source / "model.safetensors")
    assert seen["masters"].keys() == theirs.keys()
    assert seen["moments"]
    for name, weight in theirs.items():
        assert torch.equal(seen["masters"][name], weight), name
    assert losses(tmp_path / "run")[0] < losses(source)[0] - 1
    out = capfd.readouterr().out
    sha256 = digest(theirs)
    assert f"\ninit:   the weights {sha256[:8]} of source; moments, schedule and budget begin anew; its number" in out
    assert f"\ninit_from:             source ({sha256[:8]})\n" in out


def test_bf16_parameters_are_these_masters_rounded():
    step, other = make_step(forward_dtype=torch.bfloat16), make_step()
    weights = {name: p.detach() + 0.125 for name, p in other.model.named_parameters()}
    begin_with(step.optimizer, weights)
    for name, p in step.model.named_parameters():
        assert torch.equal(step.optimizer.masters[name], weights[name]), name
        assert torch.equal(p, weights[name].to(p.dtype)), name


def test_what_it_takes_over(source, further, corpus):
    """The model and the data, and nothing of the optimizer or of the run."""
    ours, theirs = (json.loads((run / "config.json").read_text()) for run in (further, source))
    assert ours["model"] == theirs["model"]
    assert ours["model"]["smear"] is False
    assert ours["model"]["kv_heads" if "kv_heads" in ours["model"] else "num_kv_heads"] == 2
    assert ours["data"] == theirs["data"]
    assert ours["config"]["steps"] == 6
    assert ours["config"]["init_from"] == str(source)
    weights = {"run": "source", "sha256": digest(load_file(source / "model.safetensors"))}
    assert ours["init_from"] == weights
    assert "init_from" not in theirs
    (row,) = Ledger.beside(further).runs()
    assert row["init_from"] == weights
    assert row["comparable"]["init_from"] == weights["sha256"]
    assert {"--depth=2", "--no-smear"} & {*row["flags"]} == set()
    (before,) = Ledger.beside(source).runs()
    assert before["init_from"] is None
    assert "init_from" not in before["comparable"]


def test_the_options_of_a_model_are_those_of_its_group_in_the_help():
    names = model_options()
    assert names[0] == "recipe"
    assert names[-1] == "lambda_0_init"
    assert {"depth", "d_model", "num_kv_heads", "seq_len", *MAY_DIFFER} <= {*names}
    assert not {"data", "packing", "total_batch_size", "matrix_lr", "seed"} & {*names}


def test_what_no_weight_depends_on_may_change(source, tmp_path):
    assert go(source, tmp_path / "run", "--seq-len", "64", "--rope-base", "900", "--seed", "7") == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["model"]["seq_len"], saved["model"]["rope_base"], saved["config"]["seed"]) == (64, 900.0, 7)
    assert saved["model"]["smear"] is False


@pytest.mark.parametrize(("given", "different"), [
    (["--depth", "3"], "depth was 2 and is 3"),
    (["--d-model", "96", "--smear"], "d_model was 64 and is 96, smear was False and is True"),
    (["--head-dim", "32"], "head_dim was 16 and is 32"),
    (["--bigram-rows", "1"], "bigram_rows was 2 and is 1"),
])  # fmt: skip
def test_weights_of_another_shape_are_refused(source, tmp_path, capsys, given, different):
    assert go(source, tmp_path / "run", *given) == 2
    line = f"error: --init-from {source}: its weights do not fit this model: {different}; leave these options out\n"
    assert capsys.readouterr().err == line
    assert [*tmp_path.iterdir()] == []


def test_another_tokenizer_is_refused(source, tmp_path, capsys):
    other = prepare(str(write_corpus(tmp_path / "text", 25)), tmp_path / "data", vocab_size=270)
    assert go(source, tmp_path / "run", "--data", str(other)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"error: --init-from {source}: the data in {other} has another tokenizer; prepare it with --tokenizer" in err
    assert not (tmp_path / "run").exists()


def test_other_data_of_the_same_tokenizer_are_taken(source, corpus, tmp_path):
    other = prepare(str(write_corpus(tmp_path / "text")), tmp_path / "data", tokenizer=str(corpus))
    assert go(source, tmp_path / "run", "--data", str(other)) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["data"]["train_sha256"] == Dataset.open(other).split("train").sha256


def test_what_is_no_finished_run_is_refused(source, tmp_path, capsys):
    broken = {name: shutil.copytree(source, tmp_path / name) for name in ("unfinished", "edited", "damaged", "other")}
    (broken["unfinished"] / "model.safetensors").unlink()
    config = broken["edited"] / "config.json"
    config.write_text(config.read_text().replace('"depth": 2', '"depth": 3'))
    for name, byte in (("damaged", -1), ("other", 40)):
        path = broken[name] / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[byte] ^= 1
        path.write_bytes(content)
    for name, said in {
        "nowhere": "is no run: it has no model.safetensors; name another run", "unfinished": "--resume",
        "edited": "has changed since it was written", "damaged": "has changed since it was written", "other": "; ",
    }.items():  # fmt: skip
        assert go(tmp_path / name, tmp_path / "runs" / "run") == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert said in err
        assert not (tmp_path / "runs" / "run").exists()


def test_it_goes_on_without_its_source(source, further, tmp_path, monkeypatch):
    gone = shutil.copytree(source, tmp_path / "source")
    folder = tmp_path / "runs" / "further"
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, 2)
        assert go(gone, folder) == 143
    shutil.rmtree(gone)
    assert main("--resume", str(folder)) == 0
    assert_same(folder, further)
    (row,) = Ledger.beside(folder).runs()
    (whole,) = Ledger.beside(further).runs()
    assert row["init_from"] == whole["init_from"]
    assert not differences(row, whole)


def test_a_resumed_run_keeps_its_beginning(source, tmp_path, capsys):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, 2)
        assert go(source, folder) == 143
    capsys.readouterr()
    assert main("--resume", str(folder), "--init-from", str(tmp_path)) == 2
    assert f"init_from was {str(source)!r} and is {str(tmp_path)!r}" in capsys.readouterr().err


def test_it_is_compared_with_runs_from_the_same_weights_alone(source, corpus, tmp_path, capsys):
    """A run from scratch, two from one source, one from another; of as many steps on as much text."""
    steps = ["--steps", "6", "--untimed-steps", "2"]
    scratch = ["--no-smear", "--rope-base", "500", "--num-kv-heads", "2"]
    other = tmp_path / "sources" / "other"
    assert run_main(corpus, other, *steps, *scratch, "--seed", "5") == 0
    runs = tmp_path / "runs"
    assert run_main(corpus, runs / "scratch", *steps, *scratch) == 0
    for name, begin in (("one", source), ("two", source), ("three", other)):
        assert go(begin, runs / name) == 0
    scratch, one, two, three = Ledger(runs).runs()
    sha256, its = (row["init_from"]["sha256"][:8] for row in (one, three))
    weights = f"the weights {sha256} of a finished run"
    assert differences(one, scratch) == [f"it began with {weights}, there with random weights"]
    assert differences(scratch, one) == [f"it began with random weights, there with {weights}"]
    assert (one["verdict"], one["note"]) == (BASELINE, f"the first of its kind: {differences(one, scratch)[0]}")
    assert differences(one, two) == []
    assert two["note"].startswith("against one;")
    assert differences(three, two) == [f"it began with the weights {its} of a finished run, there with {weights}"]
    assert three["verdict"] == BASELINE
    assert "comparable:            with equal fingerprint, budget and machine, and from the same weights" in (
        capsys.readouterr().out
    )


def test_confirm_compares_with_the_incumbent_of_the_same_weights(source, further, corpus):
    from train.experiment import incumbent_at

    ledger = Ledger.beside(further)
    asked = TrainConfig(steps=6, device="cpu")
    assert incumbent_at(asked, ledger) is None
    found = incumbent_at(TrainConfig(steps=6, device="cpu", init_from=str(source)), ledger)
    assert found.name == "further"


def test_on_two_ranks_it_is_the_same(source, corpus, further, tmp_path):
    ended = run_ranks(2, tmp_path / "streams", *ON, "--init-from", str(source), "--run-dir", str(tmp_path / "run"),
                      "--num-kv-heads", "2")  # fmt: skip
    assert [each.code for each in ended] == [0, 0], ended
    assert_same(tmp_path / "run", further)
    assert ended[1].out == ended[1].err == ""
