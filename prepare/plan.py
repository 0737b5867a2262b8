"""`python -m prepare --dry-run`: what would be fetched and read, and how large it is. Nothing is written."""

import shutil
from pathlib import Path

from . import hub
from .build import check_reading
from .download import CLIMBMIX_URL, DEFAULT_SHARDS, Remote, climbmix_names, sizes
from .errors import bad_path_is_input_error, readable_size
from .home import downloads_folder
from .readers import Reading
from .sources import folder_source, stdlib_source
from .words import printable


def plan(source: str, reading: Reading, shards: int | None, base_url: str | None) -> str:
    """The lines to print. Raises InputError."""
    check_reading(source, reading)
    if source in hub.CORPORA:
        chosen = hub.choose(source, shards, base_url)
        corpus = chosen.corpus
        lines = [
            f"{'source:':<9}{corpus.folder} of {corpus.repo} at {corpus.revision}",
            f"{'license:':<9}{corpus.license}; cite {corpus.cite}",
        ]
        return "\n".join([*lines, *_to_fetch(chosen.files, chosen.base_url, chosen.place)])
    if source == "climbmix":
        base_url = (base_url or CLIMBMIX_URL).rstrip("/")
        names = climbmix_names(DEFAULT_SHARDS if shards is None else shards)
        return "\n".join(_to_fetch(sizes(base_url, names), base_url, downloads_folder(source)))
    with bad_path_is_input_error():
        text = stdlib_source() if source == "stdlib" else folder_source(source, reading)
        about = f"{len(text.files):,} files, about {readable_size(text.estimated_bytes)} of text"
    return f"{'fetch:':<9}nothing: {printable(text.name)} is here, {about}"


def _to_fetch(files: list[Remote], base_url: str, place: Path) -> list[str]:
    missing = [file for file in files if not file.is_at(place / file.name)]
    lines = [f"{'from:':<9}{printable(base_url)}", f"{'to:':<9}{printable(place)}"]
    for file in missing:
        checked = f"sha256 {file.sha256[:16]}" if file.sha256 else "no checksum given"
        size = "unknown size" if file.size is None else readable_size(file.size)
        lines.append(f"{'':<9}{printable(file.name):<60} {size:>12}  {checked}")
    here, parts = len(files) - len(missing), [_part_of(place / file.name) for file in missing]
    total = readable_size(sum(file.size or 0 for file in missing) - sum(parts))
    at_least = "at least " if any(file.size is None for file in missing) else ""
    lines.append(
        f"{'fetch:':<9}{len(missing)} of {len(files)} files, {at_least}{total}"
        + (f"; {here} there already" if here else "")
        + (f"; {readable_size(sum(parts))} of the others too" if sum(parts) else "")
    )
    existing = next(parent for parent in (place, *place.parents) if parent.exists())
    lines.append(f"{'disk:':<9}{readable_size(shutil.disk_usage(existing).free)} free there")
    return lines


def _part_of(path: Path) -> int:
    """Bytes of a file that have arrived."""
    part = path.with_name(path.name + ".part")
    return part.stat().st_size if part.exists() else 0
