"""Tables that need not fit into memory: parquet, written and read a group of rows at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tasks import store


def write_row_groups(
    path: Path, groups: Iterable[Mapping[str, Any]], schema: Mapping[str, str]
) -> None:
    """Write a parquet table as its rows come.

    Args:
        path: where to.
        groups: columns of the next rows, as in `store.write_table`; each becomes a row group.
        schema: as in `store.write_table`.
    """
    types = pa.schema([(name, store.arrow_type(alias)) for name, alias in schema.items()])
    with (
        store.atomic(path) as hidden,
        pq.ParquetWriter(hidden, types, compression="zstd") as writer,
    ):
        for columns in groups:
            arrays = [pa.array(columns[name], type=types.field(name).type) for name in schema]
            writer.write_table(pa.table(arrays, schema=types))


def count_rows(path: Path) -> int:
    """Of a table, without reading them."""
    return pq.read_metadata(path).num_rows


def read_range(
    paths: Iterable[Path], columns: Sequence[str], start: int, stop: int
) -> Iterator[pa.RecordBatch]:
    """The rows from `start` up to `stop` of tables end to end, as they were grouped when written.

    Of groups outside the range nothing is read.
    """
    begin = 0
    for path in paths:
        with pq.ParquetFile(path) as file:
            for group in range(file.num_row_groups):
                end = begin + file.metadata.row_group(group).num_rows
                if begin < stop and start < end:
                    table = file.read_row_group(group, list(columns))
                    first = max(start - begin, 0)
                    yield from table.slice(first, min(stop, end) - begin - first).to_batches()
                begin = end


def read_row_groups(path: Path, columns: Sequence[str], num_rows: int) -> Iterator[pa.RecordBatch]:
    """The columns named, at most `num_rows` rows at a time."""
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=num_rows, columns=list(columns))
