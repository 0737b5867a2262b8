"""Text from a finished run."""

import math
from io import BytesIO, TextIOWrapper
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import GPT
from prepare import InputError
from tests.helpers.tiny_run import run_main
from train import generate, modeling, sample
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
     ("--prompt", "a\udcff"), ("--stop", "a\udcff"), ("--stop", ""), ("--num-samples", "0")],
)  # fmt: skip
def test_what_cannot_be_sampled_is_named_in_one_line(small_run, capsys, option, value):
    assert sample.main([str(small_run), "--device", "cpu", f"{option}={value}"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert option in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_a_prompt_beside_the_question_for_one(small_run, capsys):
    assert sample.main([str(small_run), "--interactive", "--prompt", "a"]) == 2
    assert capsys.readouterr().err == "error: --interactive asks for prompts: leave --prompt out, or --interactive\n"


def test_special_tokens_are_never_drawn(small_run, monkeypatch):
    model, tokenizer, _ = load_run(small_run)
    special = list(range(tokenizer.bos, tokenizer.vocab_size))
    logits = torch.zeros(1, tokenizer.vocab_size)
    logits[0, special] = 100.0
    logits[0, 7] = 50.0
    monkeypatch.setattr(GPT, "forward", lambda self, tokens: logits.clone())
    options = {"temperature": 1.0, "top_k": 0, "seed": 0}
    assert [*generate.generate(model, [tokenizer.bos], 3, banned=special, **options)] == [7, 7, 7]


def test_sample_past_the_context(small_run, capsys):
    assert sample.main([str(small_run), "--tokens", "50", "--device", "cpu"]) == 0  # rows were of 16


def run_sample(capsys, *args) -> str:
    assert sample.main([str(arg) for arg in args]) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def learned(corpus, tmp_path_factory):
    """A run of a few steps whose rows are long enough to write in."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    assert run_main(corpus, folder, "--seq-len", "64", "--steps", "4") == 0
    return folder


def test_a_cache_changes_no_text(learned):
    """Nor what stands beyond a full row: 64 tokens were a row."""
    model, tokenizer, _ = load_run(learned)
    start = [tokenizer.bos, *tokenizer.encode("wor")]
    for temperature in (0, 0.8):
        options = {"banned": [tokenizer.bos], "temperature": temperature, "top_k": 50, "seed": 3}
        texts = [
            [*generate.generate(model, start, 200, reader=reader(model), **options)]
            for reader in (generate.caching, generate.recomputing)
        ]
        assert texts[0] == texts[1]
        assert len(texts[0]) == 200


def test_each_token_is_computed_once_until_the_row_is_full(learned):
    model, tokenizer, _ = load_run(learned)
    read = []
    reader = generate.caching(model)

    def counting(tokens):
        read.append(list(tokens))
        return reader(tokens)

    start = [tokenizer.bos, 1, 2, 3]
    text = [*generate.generate(model, start, 62 + 33, banned=[], temperature=1, top_k=0, seed=0, reader=counting)]
    written = start + text
    assert read[0] == start
    assert read[60] == written[:64]
    assert read[61] == [tokenizer.bos, *written[65 - 32 : 65]]  # bos and the newest half of a row
    assert read[62] == [*read[61], written[65]]
    assert max(map(len, read)) == 64


@torch.no_grad()
def test_an_interrupt_inside_a_token_leaves_no_half_of_it(learned, monkeypatch):
    """To the text that was interrupted, the next prompt may add."""
    model, _, _ = load_run(learned)
    reader, honest, left = generate.caching(model), modeling.GPT.norm, [6]

    def interrupted(*args):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return honest(*args)

    reader([500, 1, 2])
    with monkeypatch.context() as patch:
        patch.setattr(modeling.GPT, "norm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reader([500, 1, 2, 3])
    torch.testing.assert_close(reader([500, 1, 2, 3, 4]), generate.caching(model)([500, 1, 2, 3, 4]))


def test_a_long_prompt_is_read_from_its_end():
    assert generate.fitting([500, *range(63)], 64) == [500, *range(63)]
    assert generate.fitting([500, *range(64)], 64) == [500, *range(32, 64)]
    assert generate.fitting([500, 1], 1) == [500]


def test_a_model_that_modeling_py_does_not_know_is_sampled_all_the_same(learned, monkeypatch, capsys):
    """Whoever changes model/gpt.py alone still sees what it writes: its own text, and a note why it comes slowly."""
    before = run_sample(capsys, learned, "--tokens", 60)
    honest = GPT.features
    monkeypatch.setattr(GPT, "features", lambda self, tokens: 0 * honest(self, tokens) + 1)
    assert sample.main([str(learned), "--tokens", "60"]) == 0
    captured = capsys.readouterr()
    assert captured.out != before
    assert captured.err == (
        "note: without a cache, slowly: train/modeling.py gives other logits than model/gpt.py: bring it up to date\n"
    )


@given(st.lists(st.one_of(st.text().map(str.encode), st.binary(max_size=4))), st.integers(1, 5))
def test_what_is_streamed_is_the_whole_text_and_no_half_a_character(parts, size):
    """Tokens are bytes: a character may be cut anywhere."""
    data = b"".join(parts)
    tokens = [data[i : i + size] for i in range(0, len(data), size)]
    tokenizer = SimpleNamespace(decode_bytes=lambda ids: b"".join(ids))
    pieces = [*generate.text_of(tokenizer, tokens)]
    assert "".join(pieces) == data.decode(errors="replace")
    for i in range(len(tokens)):
        sure = b"".join(tokens[: i + 1]).decode(errors="ignore").replace("\ufffd", "")
        assert "".join(pieces[: i + 1]).replace("\ufffd", "") == sure  # and it comes as soon as it is whole


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.integers(1, 4))
def test_text_ends_before_what_stops_it(text, stops, size):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    out = "".join(generate.until(stops, pieces))
    complete = next((n for n in range(len(text) + 1) if any(stop in text[:n] for stop in stops)), None)
    if complete is None:
        assert out == text
    else:
        end = min(-(-complete // size) * size, len(text))  # of the piece in which the first one is complete
        assert out == text[: min(at for stop in stops if (at := text[:end].find(stop)) >= 0)]


def test_text_waits_only_where_a_stop_may_have_begun():
    pieces = ["x", "a", "a", "a", "c", "aa", "b", "never"]
    assert [*generate.until(["aab"], pieces)] == ["x", "", "", "a", "aac", "", ""]
    endless = iter(lambda: "ab", None)
    assert "".join(generate.until(["ba"], endless)) == "a"


def test_stop_ends_the_text(learned, capsys):
    whole = run_sample(capsys, learned, "--tokens", 60, "--prompt", "wor").removesuffix("\n")
    written = whole.removeprefix("wor")
    stop = written[len(written) // 2 :][:3]
    for stops in (["--stop", stop], ["--stop", "never written", "--stop", stop]):
        shown = run_sample(capsys, learned, "--tokens", 60, "--prompt", "wor", *stops)
        assert shown == "wor" + written[: written.index(stop)] + "\n"


def test_several_samples_are_those_of_the_seeds_one_by_one(learned, capsys):
    three = run_sample(capsys, learned, "--tokens", 20, "--seed", 5, "--num-samples", 3)
    single = [run_sample(capsys, learned, "--tokens", 20, "--seed", seed) for seed in (5, 6, 7)]
    assert three == "".join(f"--- seed {seed}\n{text}" for seed, text in zip((5, 6, 7), single, strict=True))
    assert len(set(single)) == 3


def test_prompts_one_after_another(learned, capsys, monkeypatch):
    """A line is a prompt, and each begins a text of its own; one that is not UTF-8 costs no more than itself."""
    single = [
        run_sample(capsys, learned, "--tokens", 20, "--seed", seed, "--prompt", prompt)
        for seed, prompt in ((1, "wor"), (2, ""), (3, "é\\n"))
    ]
    lines = TextIOWrapper(BytesIO("wor\n\n\udcff\né\\n".encode(errors="surrogateescape")), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", lines)
    assert sample.main([str(learned), "--tokens", "20", "--seed", "1", "--interactive"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(single)
    assert captured.err == "error: this prompt is not UTF-8: give it as text\n"


def test_an_interrupt_ends_a_text_and_not_the_loop(learned, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(b"one\ntwo\n"), encoding="utf-8"))
    honest, begun = generate.next_token, []

    def interrupted(*args):
        begun.append(args)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(generate, "next_token", interrupted)
    out = run_sample(capsys, learned, "--tokens", 20, "--interactive")
    assert [line[:3] for line in out.split("\n") if line[:3] in ("one", "two")] == ["one", "two"]
    assert len(begun) == 3 + 20
    begun.clear()
    with pytest.raises(KeyboardInterrupt):
        sample.main([str(learned), "--tokens", "20"])


def test_each_piece_is_shown_as_soon_as_it_is_written(learned, monkeypatch):
    """Before the next token is computed."""
    events = []
    monkeypatch.setattr("prepare.Tokenizer.decode_bytes", lambda self, tokens: b"x")
    honest = generate.next_token
    monkeypatch.setattr(generate, "next_token", lambda *args: events.append("token") or honest(*args))
    monkeypatch.setattr("builtins.print", lambda *args, flush=False, **_: events.append("shown" if flush else "held"))
    assert sample.main([str(learned), "--tokens", "3"]) == 0
    assert events == ["shown", *["token", "shown"] * 3, "shown"]
