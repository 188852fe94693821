"""Read the text column of Parquet files and of Arrow streams, which saved Hugging Face datasets consist of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataConfigError
from ..sources import PARQUET_SUFFIX, RawDocument, content_suffix
from .settings import missing_package

BATCH_ROWS = 1024


def read_table(file: Path, text_field: str) -> Iterator[RawDocument]:
    """Yield a document for each row; rows are counted from 1.

    Reasons: ``no_text_field`` where a row holds no text, so for every row where the column is missing or holds
    something else; ``damaged_file`` after what comes before the damage. Raises DataConfigError without
    pyarrow, OSError where reading fails.
    """
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataConfigError(missing_package(str(file), "pyarrow", "parquet")) from error
    number = 0
    try:
        for column in _columns(file, text_field):
            for text in column.to_pylist():
                number += 1
                origin = f"{file}:{number}"
                if text is None:
                    yield RawDocument(origin, b"", "no_text_field")
                else:
                    yield RawDocument(origin, text)
    # pyarrow reports damage as OSError, too, then without an error number
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        yield RawDocument(str(file), b"", "damaged_file")


def _columns(file: Path, text_field: str) -> Iterator[Any]:
    """Yield the text column batch by batch; nulls, as many as there are rows, where there is none of strings."""
    import pyarrow as pa

    with open(file, "rb") as stream:
        if content_suffix(file) == PARQUET_SUFFIX:
            import pyarrow.parquet as pq

            table = pq.ParquetFile(stream)
            is_text = _is_text(table.schema_arrow, text_field)
            # another column tells how many rows are there: the file's own count may be damaged
            read = [text_field] if is_text else table.schema_arrow.names[:1]
            for batch in table.iter_batches(BATCH_ROWS, columns=read):
                yield batch.column(0) if is_text else pa.nulls(batch.num_rows)
            return
        reader = pa.ipc.open_stream(stream)
        is_text = _is_text(reader.schema, text_field)
        for batch in reader:
            for start in range(0, batch.num_rows, BATCH_ROWS):
                rows = batch.slice(start, BATCH_ROWS)
                yield rows.column(text_field) if is_text else pa.nulls(rows.num_rows)


def _is_text(schema: Any, text_field: str) -> bool:
    import pyarrow as pa

    place = schema.get_field_index(text_field)
    if place < 0:
        return False
    kind = schema.field(place).type
    if pa.types.is_dictionary(kind):  # as pandas writes categories
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
