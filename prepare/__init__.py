"""Text → tokenizer → token shards → packed batches → bits per byte.

The public names are imported when first used, so that `python -m prepare --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .arguments import begin

if TYPE_CHECKING:
    from .build import prepare
    from .dataset import Dataset
    from .errors import InputError
    from .home import default_folder
    from .loader import Batch, Loader
    from .scoring import evaluate_bpb
    from .tokenizer import Tokenizer

_HOME_OF = {
    "Batch": "loader",
    "Dataset": "dataset",
    "InputError": "errors",
    "Loader": "loader",
    "Tokenizer": "tokenizer",
    "default_folder": "home",
    "evaluate_bpb": "scoring",
    "prepare": "build",
}

begin()

__all__ = ["Batch", "Dataset", "InputError", "Loader", "Tokenizer", "default_folder", "evaluate_bpb", "prepare"]


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
