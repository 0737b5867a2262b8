"""`python -m train.export RUN --to FOLDER`: a finished run as files that need nothing of ours.

model.safetensors    fp32 weights                        modeling.py       the model in plain PyTorch, self-contained
config.json          shapes, and what modeling.py reads  tokenizer.json    for `tokenizers.Tokenizer.from_file`

With `--format hf` also what Hugging Face's transformers loads: train/huggingface.py.
"""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import torch

from model import GPT
from prepare import InputError, Tokenizer
from prepare.arguments import Parser, command
from prepare.errors import one_line
from prepare.tokenizer import byte_of_char
from prepare.words import is_utf8, printable

from .huggingface import hf_config, hf_tokenizer_json, write_hf_files
from .plain import config_of
from .resilience.durable import replace_file
from .resilience.tensors import save_tensors
from .results.ledger import Ledger
from .results.run_folder import load_run, write_json

MODELING = Path(__file__).with_name("modeling.py")
TOLERANCE = 1e-4  # logits lie within ±15; equal formulas in another order of summation differ by 1e-6 and 1e-5


def main(args: list[str] | None = None) -> int:
    parser = Parser("train.export", __doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--to", metavar="FOLDER", type=Path, required=True, help="a new or empty folder")
    parser.add_argument("--format", choices=("plain", "hf"), default="plain",
                        help="hf: transformers loads the folder too (default: plain)")  # fmt: skip
    options = parser.parse_args(args)
    try:
        difference = export(options.run, options.to, options.format == "hf")
    except (InputError, OSError) as error:
        print(f"error: {one_line(error, 'make room, or name another RUN or --to')}", file=sys.stderr)
        return 2
    print(f"exported: {printable(options.to)}, its logits differ from the run's by at most {difference:.1g}")
    return 0


def export(run: str | Path, to: Path, hf: bool = False) -> float:
    """Writes the folder, with `hf` for transformers too. Returns how far the logits of what was written lie from the
    run's.

    Raises InputError where `to` is in use, or where modeling.py does not compute what model/gpt.py does; OSError. `to`
    is then as empty as it was.
    """
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise InputError(f"{to} is {'not empty' if to.is_dir() else 'a file'}: choose another folder for --to")
    if not is_utf8(to.absolute()):
        raise InputError(f"{to} is no UTF-8, and safetensors reads no other paths: choose another folder for --to")
    model, tokenizer, saved = load_run(run)
    to.mkdir(parents=True, exist_ok=True)
    try:
        if not hf:
            return write_and_compare(model, tokenizer, to)
        write_hf_files(to, tokenizer, model.config.seq_len, row_of(run, saved))
        return write_and_compare(model, tokenizer, to, hf=True)
    except BaseException:
        for path in to.iterdir():  # what is not whole is not left in the way of the next try
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def row_of(run: str | Path, saved: dict) -> dict | None:
    """Of the run with this config.json, in the ledger; None where that has none, or one of another run of its name."""
    row = Ledger.beside(run).row_of(run)
    same = row and row.get("model") == saved["model"] and row.get("seed") == saved["config"].get("seed")
    return row if same else None


def write_and_compare(model: GPT, tokenizer: Tokenizer, to: Path, hf: bool = False) -> float:
    """Writes what a plain folder has; what is returned and raised is `export`'s."""
    config, vocabulary = exported_config(model, tokenizer), tokenizer_json(tokenizer)
    if hf:
        config, vocabulary = hf_config(config, tokenizer), hf_tokenizer_json(vocabulary, tokenizer)
    save_tensors(to / "model.safetensors", dict(model.named_parameters()), {"format": "pt"})
    write_json(to / "config.json", config)
    replace_file(to / "tokenizer.json", json.dumps(vocabulary, ensure_ascii=False).encode())
    shutil.copyfile(MODELING, to / "modeling.py")
    try:
        difference = compare_logits(model, to)
    except (RuntimeError, KeyError) as error:  # parameters or shapes that modeling.py does not know
        reason = " ".join(str(error).split())
        raise InputError(f"train/modeling.py cannot load this model: bring it up to model/gpt.py ({reason})") from None
    if not difference <= TOLERANCE:
        raise InputError(
            f"train/modeling.py gives other logits than model/gpt.py (by {difference:.2g}): bring it up to date"
        )
    return difference


def exported_config(model: GPT, tokenizer: Tokenizer) -> dict:
    return {
        "model_type": "timebox",
        **config_of(model.config),
        "bos": tokenizer.bos,
        "special_tokens": {name: tokenizer.bos + i for i, name in enumerate(tokenizer.special_tokens)},
    }


def compare_logits(model: GPT, folder: Path) -> float:
    """The largest difference between the logits of `model` and of the exported files, on random tokens."""
    spec = importlib.util.spec_from_file_location("exported_modeling", folder / "modeling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    exported = module.GPT.load(folder)
    length = min(model.config.seq_len, 256)
    tokens = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = exported(tokens)
        positions = sorted({0, length // 2, length - 1})
        return max(float((model(tokens[:, : t + 1]) - logits[:, t]).abs().max()) for t in positions)


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """The `tokenizers` library's description of our tokenizer: the same ids for every text of up to 100,000 characters.

    Our encoder joins whichever two neighbours make the token of the lowest rank; that library joins only pairs it is
    told. So every way to make a token of two others is listed, in the order of the tokens. The special tokens are
    plain entries of the vocabulary that no merge leads to: text that spells one stays text.
    """
    letters = {byte: char for char, byte in byte_of_char().items()}
    spelled = ["".join(letters[byte] for byte in token) for token in tokenizer.tokens]
    known = set(spelled)
    merges = []
    for token in spelled[256:]:
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += [[left, right] for left, right in halves if left in known and right in known]
    vocabulary = {token: i for i, token in enumerate([*spelled, *tokenizer.special_tokens])}
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": vocabulary, "merges": merges,
        },
    }  # fmt: skip


if __name__ == "__main__":
    command(main)
