"""Text from a finished run."""

import math

import pytest
import torch

from model import GPT
from prepare import InputError
from train import generate, sample
from train.results.run_folder import load_run


def test_sample_from_a_finished_run_run(small_run, capsys):
    args = [str(small_run), "--prompt", "wor", "--tokens", "20", "--device", "cpu"]
    outputs = []
    for extra in (["--seed", "1"], ["--seed", "1"], ["--seed", "2"], ["--temperature", "0"], ["--top-k", "1"]):
        assert sample.main(args + extra) == 0
        outputs.append(capsys.readouterr().out)
    assert all(text.startswith("wor") and len(text) > 10 for text in outputs)
    assert outputs[0] == outputs[1] != outputs[2]
    assert outputs[3] == outputs[4]  # the likeliest, twice
    assert not any("<|" in text for text in outputs)


def test_a_seed_that_no_generator_takes(small_run, capsys):
    for seed in ("-1", "9" * 30):
        assert sample.main([str(small_run), "--tokens", "1", "--device", "cpu", "--seed", seed]) == 2
        assert capsys.readouterr().err.startswith("error: --seed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e300, 1.7e308, 1e38, 1.0, 1e-40, 1e-300, 5e-324])
def test_no_temperature_is_too_large_or_too_small(dtype, temperature):
    """A large one draws evenly from all that are not banned, a small one takes the likeliest."""
    logits = torch.arange(8.0).to(dtype)
    logits[7] = -math.inf
    generator = torch.Generator().manual_seed(0)
    drawn = {generate.next_token(logits, temperature, 10**30, generator) for _ in range(200)}
    assert drawn <= {*range(7)}
    if temperature > 1e30:
        assert drawn == {*range(7)}  # one of seven is left out once in 10¹² times
    if temperature < 1e-30:
        assert drawn == {6}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_bad_input(bad):
    for temperature in (0, 1.0):
        with pytest.raises(InputError, match="not finite"):
            generate.next_token(torch.tensor([0.0, bad]), temperature, 0, torch.Generator())


@pytest.mark.parametrize(
    ("option", "value"),
    [("--temperature", "nan"), ("--temperature", "inf"), ("--temperature", "-1"), ("--tokens", "-1"), ("--top-k", "-1"),
     ("--prompt", "a\udcff")],
)  # fmt: skip
def test_what_cannot_be_sampled_is_named_in_one_line(small_run, capsys, option, value):
    assert sample.main([str(small_run), "--device", "cpu", f"{option}={value}"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert option in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_special_tokens_are_never_drawn(small_run, monkeypatch):
    model, tokenizer, _ = load_run(small_run)
    special = list(range(tokenizer.bos, tokenizer.vocab_size))
    logits = torch.zeros(1, tokenizer.vocab_size)
    logits[0, special] = 100.0
    logits[0, 7] = 50.0
    monkeypatch.setattr(GPT, "forward", lambda self, tokens: logits.clone())
    options = {"temperature": 1.0, "top_k": 0, "seed": 0}
    assert generate.generate(model, [tokenizer.bos], 3, banned=special, **options) == [7, 7, 7]


def test_sample_past_the_context(small_run, capsys):
    assert sample.main([str(small_run), "--tokens", "50", "--device", "cpu"]) == 0  # rows were of 16
