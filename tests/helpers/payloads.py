"""Files that run code where they are unpickled."""

import os
import pickle
from pathlib import Path

import numpy as np
import torch


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def as_pickle(payload: Payload, path: Path) -> None:
    path.write_bytes(pickle.dumps(payload))


def as_object_array(payload: Payload, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([payload], dtype=object), allow_pickle=True)


def as_archive_of_arrays(payload: Payload, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, values=np.array([payload], dtype=object))


def as_torch_file(payload: Payload, path: Path) -> None:
    torch.save(payload, path)


FORMS = [as_pickle, as_object_array, as_archive_of_arrays, as_torch_file]
