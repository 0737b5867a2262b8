"""The texts of one file: Parquet, Arrow, JSON lines and plain text, the last two compressed too.

Files are streams: in memory is a batch of rows, a line, or a document, whatever a file's size.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from . import arrow
from .errors import InputError
from .files import library_path

FORMATS = (".parquet", ".arrow", ".jsonl", ".txt", ".md")
CUT_BY_SEPARATOR = (".txt", ".md")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
BATCH_ROWS = 1_000  # rows of Parquet and Arrow decoded at a time
CHUNK = 1 << 20  # bytes of text read at a time
MEASURED = 1 << 22  # bytes of text from which it is estimated how much a compressed file holds
BOM = b"\xef\xbb\xbf"  # what editors on Windows put before UTF-8: no part of the text

Skipped = Counter  # reason -> documents, lines, rows or files


def format_of(path: Path) -> tuple[str, str | None]:
    """One of FORMATS, or else the ending that is no format ("" where there is none); and how it is compressed."""
    *_, before, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if last in COMPRESSIONS and before in FORMATS and before not in (".parquet", ".arrow"):  # compressed inside
        return before, COMPRESSIONS[last]
    return last, None


@dataclass(frozen=True)
class Reading:
    """How files are read.

    text_column: of Parquet and Arrow, and the key of JSON lines.
    separator: between the documents of a plain text file, of which it is no part, nor are the line breaks around it;
        None: each file is one document.
    skip_bad: what cannot be read is left out and counted, by reason; else it is an InputError.
    """

    text_column: str = "text"
    separator: str | None = None
    skip_bad: bool = False

    def texts(self, path: Path, skipped: Skipped) -> Iterator[str | None]:
        """The documents of a file in their order; None is a null. Raises InputError."""
        form, compression = format_of(path)
        if form == ".parquet":
            yield from self._parquet(path, skipped)
        elif form == ".arrow":
            yield from self._arrow(path, skipped)
        elif form == ".py":
            yield from _python(path, skipped)
        else:
            read = self._jsonl if form == ".jsonl" else self._plain
            with self._broken_is_bad(path, compression, skipped), _opened(path, compression) as stream:
                yield from read(stream, path, skipped)

    def estimated_bytes(self, path: Path) -> int:
        """UTF-8 bytes of text in a file, by its size, or of Parquet by the footer. Raises InputError where that or the
        beginning of what is compressed is broken."""
        form, compression = format_of(path)
        size = path.stat().st_size
        if form == ".parquet":
            return self._parquet_bytes(path, size)
        if form == ".arrow":
            return arrow.text_bytes(path, self.text_column, size)
        with self._broken_is_bad(path, compression, Skipped()):
            return _uncompressed_bytes(path, compression, size) if compression else size
        return size

    def _bad(self, skipped: Skipped, reason: str, line: str, count: int = 1) -> None:
        if not self.skip_bad:
            raise InputError(f"{line}; or skip what is bad with --skip-bad")
        skipped[reason] += count

    @contextmanager
    def _broken_is_bad(self, path: Path, compression: str | None, skipped: Skipped) -> Iterator[None]:
        """Where a compressed file breaks off, or is none. What was read of it before that counts."""
        try:
            yield
        except (pa.ArrowException, OSError) as e:
            if compression is None or getattr(e, "errno", None) is not None:  # the path's error, not the content's
                raise
            line = f"{path} is not a whole {compression} file ({_one_line(e)}): fetch or write it again"
            self._bad(skipped, f"broken {compression} files, read up to there", line)

    def _plain(self, stream: BinaryIO, path: Path, skipped: Skipped) -> Iterator[str]:
        separator = None if self.separator is None else self.separator.encode("utf-8")
        for start, piece in _pieces(stream, separator):
            if start == 0 and piece.startswith(BOM):
                start, piece = len(BOM), piece[len(BOM) :]
            try:
                text = piece.decode("utf-8")
            except UnicodeDecodeError as e:
                line = f"{path} is not UTF-8: bad byte at offset {start + e.start}; convert it, or take it out"
                self._bad(skipped, "documents that are not UTF-8", line)
            else:
                yield text if separator is None else text.strip("\r\n")

    def _jsonl(self, stream: BinaryIO, path: Path, skipped: Skipped) -> Iterator[str | None]:
        for number, line in enumerate(stream, 1):
            line = line.removeprefix(BOM)  # not at the start alone: files are concatenated
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                self._bad(skipped, "lines that are not JSON", f"{where}: not JSON ({e}); mend or remove the line")
                continue
            if not isinstance(row, dict) or self.text_column not in row:
                keys = ", ".join(map(json.dumps, [*row][:5])) if isinstance(row, dict) else ""
                has = f"it has {keys or 'none'}: name one with --text-column" if isinstance(row, dict) else "mend it"
                line = f'{where}: no "{self.text_column}" key, and every line must be an object with one; {has}'
                self._bad(skipped, f'lines without "{self.text_column}"', line)
                continue
            text = row[self.text_column]
            if text is None or isinstance(text, str):
                yield _without_lone_surrogates(text, skipped) if text else text
            else:
                line = f'{where}: "{self.text_column}" is {type(text).__name__}, not a string; mend the line'
                self._bad(skipped, f'lines whose "{self.text_column}" is no string', line)

    def _parquet(self, path: Path, skipped: Skipped) -> Iterator[str | None]:
        file = self._open_parquet(path, skipped)
        if file is None:
            return
        with file:
            row = 0
            for group in range(file.num_row_groups):
                end = row + file.metadata.row_group(group).num_rows
                try:
                    for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=[self.text_column]):
                        yield from self._strings(batch.column(0), path, row, skipped)
                        row += len(batch)
                except (pa.ArrowException, OSError) as e:
                    line = f"{path} is broken after row {row} ({_one_line(e)}): fetch or write it again"
                    self._bad(skipped, "rows in broken Parquet row groups", line, end - row)
                row = end

    def _arrow(self, path: Path, skipped: Skipped) -> Iterator[str | None]:
        row = 0
        try:
            with arrow.opened(path) as (schema, batches):
                if line := self._wrong_with(schema):
                    self._bad(skipped, f"files without one column {self.text_column} of strings", f"{path}{line}")
                    return
                for batch in batches:
                    column = arrow.checked(batch.column(self.text_column))
                    for first in range(0, len(column), BATCH_ROWS):
                        yield from self._strings(column.slice(first, BATCH_ROWS), path, row + first, skipped)
                    row += len(column)
        except arrow.BrokenError as e:
            line = f"{path} is not a whole Arrow file, after row {row} ({_one_line(e)}): fetch or write it again"
            self._bad(skipped, "broken Arrow files, read up to there", line)

    def _strings(self, column: pa.Array, path: Path, first: int, skipped: Skipped) -> Iterator[str | None]:
        try:
            yield from column.to_pylist()
        except UnicodeDecodeError:
            for row, value in enumerate(column, first):
                try:
                    yield value.as_py()
                except UnicodeDecodeError as e:
                    line = f"{path}, row {row} (counted from 0): not UTF-8 ({_one_line(e)}); convert it"
                    self._bad(skipped, "rows that are not UTF-8", line)

    def _open_parquet(self, path: Path, skipped: Skipped) -> pq.ParquetFile | None:
        """None where it is bad and that is skipped."""
        try:
            with library_path(path) as name:
                file = pq.ParquetFile(name)
            schema = file.schema_arrow
        except (pa.ArrowException, OSError) as e:
            line = f"{path} is not a whole Parquet file ({_one_line(e)}): fetch or write it again"
            return self._bad(skipped, "files that are no Parquet", line)
        if line := self._wrong_with(schema):
            file.close()
            return self._bad(skipped, f"files without one column {self.text_column} of strings", f"{path}{line}")
        return file

    def _wrong_with(self, schema: pa.Schema) -> str:
        """With the column of text; empty: nothing."""
        name, number = self.text_column, schema.names.count(self.text_column)
        if not number:
            others = ", ".join(schema.names) or "none"
            return f" has no column {name}, only {others}: name one with --text-column, or rename it"
        if number > 1:
            return f" has {number} columns called {name}: rename all but one"
        kind = schema.field(name).type
        if not arrow.is_of_strings(kind):
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            return f": the column {name} holds {kind}, not strings; convert it, or name another with --text-column"
        return ""

    def _parquet_bytes(self, path: Path, size: int) -> int:
        """Uncompressed size of the column, from the footer."""
        file = self._open_parquet(path, Skipped())
        if file is None:
            return size
        with file:
            metadata = file.metadata
            names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
            column, groups = names.index(self.text_column), range(metadata.num_row_groups)
            return sum(metadata.row_group(i).column(column).total_uncompressed_size for i in groups)


@contextmanager
def _opened(path: Path, compression: str | None) -> Iterator[BinaryIO]:
    with path.open("rb") as raw:
        if compression is None:
            yield raw
        else:
            with io.BufferedReader(pa.CompressedInputStream(raw, compression), CHUNK) as stream:
                yield stream


def _uncompressed_bytes(path: Path, compression: str, size: int) -> int:
    """As at the beginning, so throughout. What such a file says of it is modulo 2³² (gzip), or is left out (zstd)."""
    with path.open("rb") as raw, pa.CompressedInputStream(raw, compression) as stream:
        got = 0
        while got < MEASURED and (chunk := stream.read(CHUNK)):
            got += len(chunk)
        return round(size * got / max(1, raw.tell()))


def _pieces(stream: BinaryIO, separator: bytes | None) -> Iterator[tuple[int, bytearray]]:
    """What stands between separators, and the offset where it starts. White space after the last one is no piece."""
    start, rest = 0, bytearray()
    while chunk := stream.read(CHUNK):
        seen = len(rest) - len(separator or b"") + 1  # a separator may lie across two chunks
        rest += chunk
        if separator is None:
            continue
        while (end := rest.find(separator, max(0, seen))) >= 0:
            yield start, rest[:end]
            del rest[: end + len(separator)]  # moves nothing: CPython notes where the rest begins
            start, seen = start + end + len(separator), 0
    if start == 0 or rest.strip():
        yield start, rest


def _python(path: Path, skipped: Skipped) -> Iterator[str]:
    """Skips what is no UTF-8: nobody can mend the standard library, and its tests hold such files on purpose."""
    try:
        yield path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        skipped["undecodable files"] += 1


def _without_lone_surrogates(text: str, skipped: Skipped) -> str:
    r"""JSON can spell half a surrogate pair (`\ud800`), which no Unicode encoding can hold: it becomes U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        skipped["lone surrogates replaced, in documents kept"] += 1
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
