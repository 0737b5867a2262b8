"""What transformers and lm-eval load computes what the trained model computes."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from prepare import Tokenizer
from prepare.dataset import Dataset
from tests.helpers.adversarial_texts import adversarial_texts
from tests.helpers.small_shapes import SHAPES, logits_of, random_model, random_tokens
from train.config import ROOT
from train.export import main as export_main
from train.export import write_and_compare
from train.generate import generate
from train.huggingface import write_hf_files
from train.results.run_folder import load_run

WITHIN = {"rtol": 0, "atol": 2e-5}  # fp32 on a CPU, logits up to ±15: only the order of sums differs


@pytest.fixture(scope="module")
def vocabulary(corpus) -> Tokenizer:
    return Dataset.open(corpus).tokenizer


@pytest.fixture(scope="module", params=SHAPES)
def exported(request, vocabulary, tmp_path_factory):
    """The folder of a model with random weights, and that model."""
    model = random_model(replace(SHAPES[request.param], vocab_size=vocabulary.vocab_size))
    folder = tmp_path_factory.mktemp("exported")
    write_and_compare(model, vocabulary, folder, hf=True)
    write_hf_files(folder, vocabulary, model.config.seq_len, None)
    return folder, model


def load(folder):
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values()), report
    return theirs, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module")
def loaded(exported):
    return (*load(exported[0]), exported[1])


@torch.no_grad()
def test_equal_logits(loaded):
    """At once, with what is kept of the beginning, and token by token."""
    theirs, _, model = loaded
    tokens = random_tokens(model.config)
    logits = logits_of(model, tokens)
    assert logits.abs().max() > 1
    torch.testing.assert_close(theirs(tokens, use_cache=False).logits, logits, **WITHIN)
    torch.testing.assert_close(theirs(tokens, logits_to_keep=2).logits, logits[:, -2:], **WITHIN)
    out = theirs(tokens[:, :5])
    found = [out.logits]
    for t in range(5, tokens.shape[1]):
        out = theirs(tokens[:, t : t + 1], cache=out.cache)
        found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), logits, **WITHIN)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_equal_logits_in_a_padded_batch(loaded, side):
    theirs, tokenizer, model = loaded
    lengths = (24, 3, 17)
    texts = [tokens[:length] for tokens, length in zip(random_tokens(model.config), lengths, strict=True)]
    batch = tokenizer.pad({"input_ids": [text.tolist() for text in texts]}, padding_side=side, return_tensors="pt")
    assert batch["attention_mask"].sum(dim=1).tolist() == list(lengths)
    logits = theirs(**batch).logits
    for b, text in enumerate(texts):
        own = logits[b][batch["attention_mask"][b] == 1]
        torch.testing.assert_close(own, logits_of(model, text[None])[0], **WITHIN)


def test_a_mask_that_is_none_is_refused(loaded):
    theirs, _, _ = loaded
    with pytest.raises(ValueError, match="padding inside a text"):
        theirs(torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(ValueError, match=r"the shape \(1, 3\) in place of \(1, 4\)"):
        theirs(torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.tensor([[0, 1, 1]]))


def test_the_loss_is_that_of_the_next_tokens(loaded):
    theirs, _, model = loaded
    tokens = random_tokens(model.config)
    loss = theirs(tokens, labels=tokens).loss
    assert loss.item() == pytest.approx(model(tokens[:, :-1], tokens[:, 1:]).item(), abs=1e-4)
    loss.backward()
    assert theirs.model.wte.grad.abs().sum() > 0


def test_texts_of_a_batch_are_those_of_each_alone(loaded):
    """Greedy: without a cache, with one, with beams; and they are what `train.sample` writes."""
    theirs, tokenizer, model = loaded
    prompts = ["wor", "a longer prompt", ""]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    at_once = theirs.generate(**batch, **options)
    assert torch.equal(at_once, theirs.generate(**batch, **options, use_cache=False))
    beams = theirs.generate(**batch, **options, num_beams=3)
    assert torch.equal(beams, theirs.generate(**batch, **options, num_beams=3, use_cache=False))
    reserved = list(range(tokenizer.bos_token_id + 1, model.config.vocab_size))
    assert theirs.generation_config.suppress_tokens == reserved
    for prompt, written in zip(prompts, at_once, strict=True):
        start = tokenizer(prompt).input_ids
        alone = generate(model, start, 8, banned=reserved, temperature=0, top_k=0, seed=0)
        assert written[-8:].tolist() == [*alone]


def test_a_text_may_be_longer_than_a_row(loaded):
    theirs, tokenizer, model = loaded
    start = tokenizer("wor", return_tensors="pt")
    options = {"max_new_tokens": 100, "do_sample": False, "eos_token_id": None}
    written = theirs.generate(**start, **options)
    assert written.shape[1] > 100 > model.config.seq_len
    assert torch.equal(written, theirs.generate(**start, **options, use_cache=False))


def test_what_programs_ask_of_the_configuration(loaded):
    """Under the names that transformers has for them; lm-eval takes the length of a row from there."""
    theirs, tokenizer, model = loaded
    asked, shape = theirs.config, model.config
    assert asked.max_position_embeddings == tokenizer.model_max_length == shape.seq_len
    assert (asked.hidden_size, asked.num_hidden_layers, asked.vocab_size) == (64, 3, shape.vocab_size)
    assert (asked.num_attention_heads, asked.num_key_value_heads) == (shape.num_heads, shape.kv_heads)
    assert theirs.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


def test_rounded_weights(exported):
    theirs = AutoModelForCausalLM.from_pretrained(exported[0], trust_remote_code=True, dtype=torch.bfloat16)
    tokens = random_tokens(exported[1].config)
    assert theirs.model.wte.dtype == torch.bfloat16
    with torch.no_grad():
        assert theirs(tokens).logits.isfinite().all()


def test_a_folder_that_transformers_wrote_is_the_same_model(loaded, tmp_path):
    theirs, tokenizer, model = loaded
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer_again = load(tmp_path)
    tokens = random_tokens(model.config)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
    assert tokenizer_again("a <|bos|>").input_ids == tokenizer("a <|bos|>").input_ids


@pytest.fixture(scope="module")
def pair_of_tokenizers(vocabulary, tmp_path_factory):
    model = random_model(replace(SHAPES["cpu"], vocab_size=vocabulary.vocab_size))
    folder = tmp_path_factory.mktemp("tokenizer")
    write_and_compare(model, vocabulary, folder, hf=True)
    write_hf_files(folder, vocabulary, model.config.seq_len, None)
    return vocabulary, AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def check_text(ours: Tokenizer, theirs, text: str) -> None:
    ids = theirs(text).input_ids
    assert ids == [ours.bos, *ours.encode(text)]
    assert theirs.decode(ids, skip_special_tokens=True) == text
    assert theirs(text, add_special_tokens=False).input_ids == ids[1:]


def test_equal_tokens(pair_of_tokenizers):
    for text in adversarial_texts():
        check_text(*pair_of_tokenizers, text)


@given(text=st.text())
@settings(max_examples=500, deadline=None)
def test_equal_tokens_of_any_text(pair_of_tokenizers, text):
    check_text(*pair_of_tokenizers, text)


def test_the_special_tokens(pair_of_tokenizers):
    ours, theirs = pair_of_tokenizers
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos, ours.bos, ours.bos + 1)
    assert len(theirs) == ours.vocab_size
    assert theirs.padding_side == "left"
    special = list(range(ours.bos, ours.vocab_size))
    assert theirs.decode(special) == "".join(ours.special_tokens)
    assert theirs.decode([*special, *ours.encode("a")], skip_special_tokens=True) == "a"


def test_a_pipeline_of_a_run(small_run, tmp_path):
    """From the run's folder on; and the plain export's class loads the same folder."""
    assert export_main([str(small_run), "--to", str(tmp_path / "out"), "--format", "hf"]) == 0
    write = pipeline("text-generation", model=str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    (one,), (two,) = write(["wor", "ing and so on"], max_new_tokens=8, batch_size=2, do_sample=False)
    assert one["generated_text"].startswith("wor")
    assert two["generated_text"].startswith("ing and so on")
    model, tokenizer, _ = load_run(small_run)
    reserved = list(range(tokenizer.bos, tokenizer.vocab_size))
    start = [tokenizer.bos, *tokenizer.encode("wor")]
    text = generate(model, start, 8, banned=reserved[1:], temperature=0, top_k=0, seed=0)
    assert one["generated_text"] == "wor" + tokenizer.decode(t for t in text if t != tokenizer.bos)


def test_a_task_of_lm_eval(exported, monkeypatch):
    """Zero-shot, from a file: the log-likelihoods are those of the trained model, with `bos` before every text."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder, model = exported
    monkeypatch.chdir(ROOT)
    results = simple_evaluate(
        model="hf", model_args={"pretrained": str(folder), "trust_remote_code": True}, tasks=["how_it_goes_on"],
        task_manager=TaskManager(include_path=str(ROOT / "tests/extras/tasks"), include_defaults=False),
        device="cpu", batch_size=3, log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    lines = (ROOT / "tests/extras/tasks/how_it_goes_on.jsonl").read_text(encoding="utf-8").splitlines()
    right = 0
    for sample, doc in zip(results["samples"]["how_it_goes_on"], map(json.loads, lines), strict=True):
        ours = [log_likelihood(model, tokenizer, doc["text"], choice) for choice in doc["choices"]]
        theirs = [float(answer[0]) for (answer,) in sample["resps"]]
        assert theirs == pytest.approx(ours, abs=1e-3)
        right += ours.index(max(ours)) == doc["answer"]
    assert results["results"]["how_it_goes_on"]["acc,none"] == right / len(lines)


@torch.no_grad()
def log_likelihood(model, tokenizer, text: str, more: str) -> float:
    """Of `more` after `text`, by the trained model; the beginning of what is longer than a row is left out."""
    begin, whole = tokenizer(text).input_ids, tokenizer(text + more).input_ids
    tokens = torch.tensor([whole[-(model.config.seq_len + 1) :]])
    losses = model(tokens[:, :-1], tokens[:, 1:], reduction="none")
    return -losses[0, len(begin) - len(whole) :].sum().item()
