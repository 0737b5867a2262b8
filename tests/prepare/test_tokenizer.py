import hashlib
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from prepare import InputError, Tokenizer
from prepare import tokenizer as module
from tests.helpers.prepare_corpus import sentence

ODD_TEXT = (
    "Hello's world!!!\n\n  foo  123456 «é»  \r\n\r\n   x\t\ty'LL __init__(self): \u3000 ##\n# naïve 漢字 🙂🙃 \u200d"
    "\x00 \u0085 \x1c a\u0301 ǅ Ⅷ ½ ٣٤٥ we'Ve 'S \ufeff <|bos|><|reserved_1|>\n"
)


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(1)
    return [sentence(rng, 200) for _ in range(50)] + [ODD_TEXT] * 2


@pytest.fixture(scope="module")
def tokenizer(texts):
    return Tokenizer.train(texts, 320)


def test_ids_are_bytes_then_merges_then_special_tokens(tokenizer):
    assert tokenizer.vocab_size == 320
    assert tokenizer.bos == 316
    assert tokenizer.special_tokens[0] == "<|bos|>"
    assert [tokenizer.decode_bytes([b]) for b in range(256)] == [bytes([b]) for b in range(256)]
    assert len(tokenizer.merges) == 60
    assert all(len(merge) > 1 for merge in tokenizer.merges)
    assert tokenizer.decode([tokenizer.bos]) == "<|bos|>"


@settings(deadline=None)
@given(st.text())
def test_every_text_round_trips_and_its_bytes_are_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_bytes_of_a_token_are_raw_bytes(tokenizer):
    assert tokenizer.token_bytes.dtype == np.int32
    assert (tokenizer.token_bytes[:256] == 1).all()  # 0xE9 decodes to U+FFFD, three bytes: it is one
    assert (tokenizer.token_bytes[-4:] == 0).all()


def test_text_that_spells_a_special_token_stays_text(tokenizer):
    text = "a <|bos|> b <|reserved_3|>"
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.bos
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text])[0].max() < tokenizer.bos


def test_encode_batch_is_encode(tokenizer, texts):
    batch = tokenizer.encode_batch([*texts, "", "x"])
    assert all(ids.dtype == np.uint16 for ids in batch)
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in [*texts, "", "x"]]


def test_training_and_encoding_split_text_alike(texts):
    """tiktoken does not show its pieces, but a piece that is a token of the vocabulary is encoded as that token."""
    splitter = pre_tokenizers.Split(Regex(module.PATTERN), behavior="isolated")
    for text in texts:
        pieces = [piece for piece, _ in splitter.pre_tokenize_str(text)]
        multibyte = sorted({piece.encode() for piece in pieces if len(piece.encode()) > 1})
        assert len(Tokenizer(multibyte).encode(text)) == len(pieces)


def test_merges_are_learned_within_the_pieces_that_are_encoded():
    """Learned to the last merge, every piece is one token; merges of any other pieces would miss some."""
    with pytest.raises(InputError) as caught:
        Tokenizer.train([ODD_TEXT] * 3, 10_000)
    supported = int(str(caught.value).split("--vocab-size ")[1].split(",")[0])
    tokenizer = Tokenizer.train([ODD_TEXT] * 3, supported)
    single = {tokenizer.decode([i]) for i in tokenizer.encode(ODD_TEXT)}
    assert {"Hello", "'s", "!!!\n\n", "12", "34", "56", "'Ve"} <= single

    pieces = pre_tokenizers.Split(Regex(module.PATTERN), behavior="isolated").pre_tokenize_str(ODD_TEXT)
    assert len(tokenizer.encode(ODD_TEXT)) == len(pieces)


@pytest.mark.parametrize("unit", [" ", "\t ", "a", "é", "^", "\n", " \n", "line of text\n"])
def test_long_runs_do_not_overflow_the_regex_engine(tokenizer, unit):
    text = unit * (1_000_001 // len(unit)) + "x"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None)
@given(st.text(alphabet="ab \n\r\t!'é1\x1c\u0085", max_size=200))
def test_encoding_in_parts_changes_no_token_where_there_are_line_ends(tokenizer, text):
    parts = list(module._parts(text, 20))
    assert "".join(parts) == text
    assert all(len(part) <= 20 for part in parts)
    ends_with_newline = all(part.endswith("\n") for part in parts[:-1])
    if ends_with_newline and all(not part[0].isspace() for part in parts[1:] if part):
        assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_parts_are_cut_at_line_ends():
    assert list(module._parts("aaa\nbbb\n  ccc", 6)) == ["aaa\n", "bbb\n  ", "ccc"]


def test_save_and_load(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.encode(ODD_TEXT) == tokenizer.encode(ODD_TEXT)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.bos, loaded.vocab_size, loaded.pattern) == (tokenizer.bos, tokenizer.vocab_size, tokenizer.pattern)


def test_fingerprint_is_the_hash_of_the_file_and_tells_tokenizers_apart(tokenizer, texts, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert tokenizer.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    assert Tokenizer.train(texts, 320).fingerprint == tokenizer.fingerprint
    assert Tokenizer.train(texts, 319).fingerprint != tokenizer.fingerprint


def test_training_stops_reading_at_its_limit():
    read = []

    def endless():
        while True:
            read.append(1)
            yield "some text of 24 letters "

    Tokenizer.train(endless(), 264, max_bytes=2_400)
    assert len(read) == 100


@pytest.mark.parametrize("vocab_size", [0, 259, 65_537])
def test_vocabulary_out_of_range(vocab_size):
    with pytest.raises(InputError, match=r"--vocab-size takes 260 .* to 65,536"):
        Tokenizer.train(["text"], vocab_size)


def test_a_vocabulary_of_bytes_alone():
    tokenizer = Tokenizer.train(["any"], 260)
    assert tokenizer.encode("été") == list("été".encode())


def test_vocabulary_larger_than_the_text_supports(texts):
    with pytest.raises(InputError, match=r"it supports [\d,]+") as caught:
        Tokenizer.train(texts, 60_000)
    supported = int(str(caught.value).split("--vocab-size ")[1].split(",")[0])
    assert Tokenizer.train(texts, supported).vocab_size == supported
    with pytest.raises(InputError):
        Tokenizer.train(texts, supported + 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("pattern"),
        lambda content: content.update(version=99),
        lambda content: content["merges"].append("not base64!"),
        lambda content: content["merges"].append(content["merges"][0]),
        lambda content: content["merges"].append(7),
        lambda content: content.update(pattern="("),
    ],
)
def test_a_broken_tokenizer_file(tokenizer, tmp_path, change):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"tokenizer\.json .*-m prepare` again"):
        Tokenizer.load(path)


@pytest.mark.parametrize("content", ["", "[]", "null", "\x00"])
def test_a_tokenizer_file_that_is_none(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(InputError, match="-m prepare` again"):
        Tokenizer.load(path)
    path.unlink()
    with pytest.raises(InputError, match="is missing"):
        Tokenizer.load(path)
