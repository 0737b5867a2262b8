"""Corpora that the Hugging Face hub serves: where each lies there, and which of its files are taken.

A revision is a commit, so what it names never changes. One request to the hub's listing says which files there are, how
large each is, and its SHA-256. The listing is kept beside the files: where all have arrived, no network is needed.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from .download import Remote, ask, check_shards, fetch_all
from .errors import InputError
from .files import read_sealed, sealed
from .home import downloads_folder
from .shards import write_json

HUB_URL = "https://huggingface.co"
LISTING = "listing.json"


@dataclass(frozen=True)
class Corpus:
    """A folder of Parquet files in a dataset of the hub. Without `validation` a hash of the text picks that split."""

    repo: str
    revision: str
    folder: str
    training: str  # regular expressions of names
    validation: str | None
    shards: int  # training files that are fetched by default
    most: int  # and at most
    text_column: str
    license: str
    cite: str


CORPORA = {
    "fineweb-edu": Corpus(
        "HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", "sample/10BT",
        r"\d{3}_\d{5}\.parquet", None, shards=1, most=14, text_column="text",
        license="ODC-By 1.0, and Common Crawl's terms of use", cite="Penedo et al. 2024, arXiv:2406.17557",
    ),
    "tinystories": Corpus(
        "roneneldan/TinyStories", "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64", "data",
        r"train-.*\.parquet", r"validation-.*\.parquet", shards=4, most=4, text_column="text",
        license="CDLA-Sharing 1.0", cite="Eldan and Li 2023, arXiv:2305.07759",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """Files of a corpus, and where each is or will be."""

    corpus: Corpus
    place: Path
    base_url: str  # of the files
    validation: list[Remote]
    training: list[Remote]
    listing: list[Remote]

    @property
    def files(self) -> list[Remote]:
        return [*self.validation, *self.training]


def choose(name: str, shards: int | None, base_url: str | None) -> Chosen:
    """Reads the listing that was kept, or else asks for it; writes nothing. Raises InputError."""
    corpus, hub = CORPORA[name], (base_url or HUB_URL).rstrip("/")
    shards = corpus.shards if shards is None else shards
    check_shards(shards, corpus.most)
    place = downloads_folder(name) / corpus.revision
    listing = _kept(place) or _asked(hub, corpus)
    training, validation = (
        sorted(file for file in listing if pattern and re.fullmatch(pattern, file.name))
        for pattern in (corpus.training, corpus.validation)
    )
    if len(training) < shards or (corpus.validation and not validation):
        raise InputError(
            f"{hub} lists {len(training)} training and {len(validation)} validation files in {corpus.folder} of"
            f" {corpus.repo}, and {shards} and {int(bool(corpus.validation))} are needed: check --base-url"
        )
    url = f"{hub}/datasets/{corpus.repo}/resolve/{corpus.revision}/{corpus.folder}"
    return Chosen(corpus, place, url, validation, training[:shards], listing)


def fetch(chosen: Chosen) -> tuple[list[Path], list[Path]]:
    """Downloads what is not there yet; returns validation and training files. Raises InputError."""
    chosen.place.mkdir(parents=True, exist_ok=True)
    if _kept(chosen.place) != chosen.listing:
        write_json(chosen.place / LISTING, sealed({"files": [list(file) for file in chosen.listing]}))
    known = {file.name: file for file in chosen.files}
    paths = fetch_all(chosen.base_url, [*known], chosen.place, known)
    return paths[: len(chosen.validation)], paths[len(chosen.validation) :]


def _kept(place: Path) -> list[Remote]:
    """Empty where there is none, or it is broken: then the hub is asked."""
    try:
        return [Remote(*file) for file in read_sealed(place / LISTING, "")["files"]]
    except InputError:
        return []


def _asked(hub: str, corpus: Corpus) -> list[Remote]:
    """The hub's listing of a folder, page after page. Source: huggingface.co/docs/hub/api, "tree"."""
    url, found = f"{hub}/api/datasets/{corpus.repo}/tree/{corpus.revision}/{corpus.folder}", []
    while url:
        answer = ask(url)
        try:
            for entry in answer.json():
                if entry["type"] == "file":
                    stored = entry.get("lfs") or {}
                    size, sha256 = int(stored.get("size", entry["size"])), stored.get("oid")
                    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
                        raise ValueError(f"{sha256!r} is no SHA-256")
                    found.append(Remote(entry["path"].rpartition("/")[2], size, sha256))
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise InputError(f"{url} is no listing of the Hugging Face hub ({e!r}): check --base-url") from e
        url = answer.links.get("next", {}).get("url")
    return found
