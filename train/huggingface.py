"""What a folder of `train.export --format hf` has beside the plain one: what Hugging Face's transformers reads.

config.json             also says which class loads it        modeling_hf.py   that class, around modeling.py
tokenizer.json          also puts `bos` before a text         README.md        a model card, of the ledger's row
tokenizer_config.json   what AutoTokenizer makes of it        generation_config.json
"""

import shutil
from pathlib import Path

from prepare import Tokenizer

from .resilience.durable import replace_file, write_json
from .results.markdown import markdown

WRAPPER = Path(__file__).with_name("modeling_hf.py")


def hf_config(config: dict, tokenizer: Tokenizer) -> dict:
    """config.json: `config`, the plain one's, and what transformers asks for."""
    bos, _, pad = special_ids(tokenizer)
    module = WRAPPER.stem
    return config | {
        "architectures": ["TimeboxForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{module}.TimeboxConfig",
            "AutoModelForCausalLM": f"{module}.TimeboxForCausalLM",
        },
        "dtype": "float32",
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": bos,
        "pad_token_id": pad,
    }


def special_ids(tokenizer: Tokenizer) -> tuple[int, list[int], int]:
    """`bos`, which also ends a text, since in training the next one began with it; the reserved tokens, which no text
    has; and the one of them that pads a batch."""
    reserved = list(range(tokenizer.bos + 1, tokenizer.vocab_size))
    return tokenizer.bos, reserved, reserved[0] if reserved else tokenizer.bos


def hf_tokenizer_json(plain: dict, tokenizer: Tokenizer) -> dict:
    """tokenizer.json: `plain`, and `bos` before every text."""
    name = tokenizer.special_tokens[0]
    bos = {"SpecialToken": {"id": name, "type_id": 0}}
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    return plain | {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {name: {"id": name, "ids": [tokenizer.bos], "tokens": [name]}},
        }
    }


def write_hf_files(to: Path, tokenizer: Tokenizer, seq_len: int, entry: dict | None) -> None:
    """The files that are not in a plain folder. `entry`: the run's, in the ledger, for the card."""
    bos, reserved, pad = special_ids(tokenizer)
    names = tokenizer.special_tokens
    shutil.copyfile(WRAPPER, to / WRAPPER.name)
    write_json(
        to / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": names[0],
            "eos_token": names[0],
            "pad_token": names[pad - bos],
            "additional_special_tokens": list(names[1:]),
            "split_special_tokens": True,  # text that spells a special token is text
            "padding_side": "left",
            "model_max_length": seq_len,
            "clean_up_tokenization_spaces": False,
        },
    )
    write_json(
        to / "generation_config.json",
        {
            "bos_token_id": bos,
            "eos_token_id": bos,
            "pad_token_id": pad,
            **({"suppress_tokens": reserved} if reserved else {}),
        },
    )
    replace_file(to / "README.md", card(entry, seq_len).encode())


def card(entry: dict | None, seq_len: int) -> str:
    """The model card: how the model is used, and what its row in the ledger says of it."""
    title = markdown(entry["run"]) if entry else "A model trained by timebox"
    return CARD.format(title=title, seq_len=seq_len, facts=facts(entry) if entry else NO_ROW)


def facts(entry: dict) -> str:
    """A table. Paths of the machine that trained it stay there."""
    config, summary = entry.get("config") or {}, entry.get("summary") or {}
    flags = [flag for flag in entry.get("flags") or [] if not flag.startswith(("--data=", "--run-dir=", "--device="))]
    versions = [f"{name} {version}" for name, version in (entry.get("versions") or {}).items() if version]
    said = {
        "description": entry["description"],
        "validation bits per byte": f"{entry['val_bpb']:.6f}" if entry["val_bpb"] is not None else "none",
        "validation text": f"{summary['val_bytes']:,} bytes" if summary.get("val_bytes") else "",
        "audit": entry.get("audit") or "",
        "verdict": f"{entry['status']}, {entry['verdict']}" + (f" ({entry['note']})" if entry["note"] else ""),
        "parameters": f"{summary['num_params_M']:.2f}M" if summary.get("num_params_M") else "",
        "trained on": f"{summary['total_tokens_M']:.1f}M tokens" if summary.get("total_tokens_M") else "",
        "source of the text": Path((entry.get("data") or {}).get("source", "")).name,
        "recipe": config.get("recipe") or "",
        "flags": " ".join(flags),
        "budget": entry["budget"],
        "seed": str(entry.get("seed", "")),
        "machine": entry["comparable"].get("machine") or "",
        "commit of timebox": entry["commit"],
        "versions": ", ".join(versions),
        "time": entry["time"],
    }
    rows = [f"| {name} | {markdown(value)} |" for name, value in said.items() if value]
    return "\n".join(["| | |", "|---|---|", *rows])


NO_ROW = "The ledger beside the run has no row of it: how well it does was not recorded."

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- timebox
---

# {title}

A language model that timebox trained inside a fixed budget. It goes on from a text; it was not taught to follow
instructions, or to be safe or right.

```python
from transformers import pipeline

write = pipeline("text-generation", model="FOLDER", trust_remote_code=True)
print(write("def ", max_new_tokens=50, do_sample=True, top_k=50)[0]["generated_text"])
```

`trust_remote_code=True` runs `modeling_hf.py` and `modeling.py` of this folder. The model learned from rows of
{seq_len:,} tokens. A text in them begins with the token `bos`, which the tokenizer puts there. A text may be longer
than a row: then no layer looks further back than {seq_len:,} tokens, and the model does what it was not trained for.

## How it was trained

{facts}

Bits per byte compare only with those of the same validation text.
"""
