"""Arrow files, as the library `datasets` keeps them: a stream of batches, or a file with a footer (Feather).

They are mapped, and a batch is looked at where it lies. Nothing in such a file is trusted before it was checked: Arrow
itself follows an offset wherever it points.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from .files import library_path

FOOTED = b"ARROW1"  # how the kind with a footer begins and ends
END = b"\xff\xff\xff\xff\0\0\0\0"  # of a stream; without, one that was cut between two batches would look whole


class BrokenError(Exception):
    """Of the file's content, not of its path."""


@contextmanager
def opened(path: Path) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Raises BrokenError, also from the batches."""
    with path.open("rb") as file:  # the path's own errors
        begins = file.read(len(FOOTED))
    with library_path(path) as name, _broken(), pa.memory_map(name) as content:
        if begins == FOOTED:
            reader = pa.ipc.open_file(content)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            reader = pa.ipc.open_stream(content)
            batches = iter(reader)
        yield reader.schema, _whole(batches, content, begins == FOOTED)


def _whole(batches: Iterator[pa.RecordBatch], content: pa.MemoryMappedFile, footed: bool) -> Iterator[pa.RecordBatch]:
    yield from batches
    if not footed:
        size = content.size()
        content.seek(max(0, size - len(END)))
        if content.read() != END:
            raise BrokenError("it breaks off")


def is_of_strings(kind: pa.DataType) -> bool:
    """Whatever their width, and however they are kept."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def checked(column: pa.Array) -> pa.Array:
    """A column of strings whose every offset is inside it. Whether it is UTF-8 shows when it is decoded."""
    strings = column.dictionary if pa.types.is_dictionary(column.type) else column
    if pa.types.is_dictionary(column.type):
        column.validate(full=True)
    if pa.types.is_string_view(strings.type):
        strings.validate(full=True)
    else:
        strings.view(pa.large_binary() if pa.types.is_large_string(strings.type) else pa.binary()).validate(full=True)
    return column


def text_bytes(path: Path, name: str, size: int) -> int:
    """Of a column, from the offsets alone; `size` where they cannot be read, which is said when the texts are."""
    try:
        with opened(path) as (schema, batches):
            if schema.names.count(name) != 1 or not is_of_strings(schema.field(name).type):
                return size
            return sum(checked(batch.column(name)).nbytes for batch in batches)
    except BrokenError:
        return size


@contextmanager
def _broken() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:  # the last: of a column's name
        raise BrokenError(str(e)) from e
