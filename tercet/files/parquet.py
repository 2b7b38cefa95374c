"""Parquet files, read one row group at a time, and measured before they are unpacked."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from tercet.errors import DataError
from tercet.files.forms import check_parquet
from tercet.files.limits import MAX_EXPANSION, MAX_RECORD_BYTES, MAX_UNPACKED, MAX_VALUES

ROWS_AT_ONCE: Final = 1024  # rows of parquet that are Python objects at the same time, at most
BYTES_AT_ONCE: Final = 1 << 26  # 64 MiB of their texts, or one row

_TEXTS: Final = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
)
_LISTS: Final = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)

functions: Any = pyarrow.compute  # made when pyarrow is imported, so that no checker knows them


def open_parquet(path: Path) -> pq.ParquetFile:
    """Return the file, to be read one row group at a time.

    By default pyarrow prefetches all row groups: the whole file would be in memory.
    """
    check_parquet(path)
    return pq.ParquetFile(path, pre_buffer=False)


def parquet_parts(
    path: Path, file: pq.ParquetFile, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a file in order, in batches whose texts fit into memory.

    A file of some kB can hold a text of many MB, or hold one text once and refer to it from every
    row. So a row group is measured before it is written out.

    Raises:
        DataError: if a row, or what a row group unpacks to, is too large.
    """
    row = 0
    for number in range(file.metadata.num_row_groups):
        group = _RowGroup(path, file.metadata.row_group(number), number, columns, row)
        row += file.metadata.row_group(number).num_rows
        at_once = group.rows_at_once()
        for batch in file.iter_batches(
            at_once, row_groups=[number], columns=list(columns), use_threads=False
        ):
            if not group.measured:
                group.measure(batch)
            yield batch


class _RowGroup:
    """The sizes of a row group: packed, unpacked, and of texts that are written out."""

    def __init__(
        self, path: Path, group: Any, number: int, columns: Sequence[str], first: int
    ) -> None:
        self._path, self._number, self._names, self._row = path, number, columns, first
        parts = [group.column(at) for at in range(group.num_columns)]
        self._columns = [it for it in parts if it.path_in_schema.partition(".")[0] in columns]
        self._packed = sum(column.total_compressed_size for column in self._columns)
        self._written, self._fits = 0, ROWS_AT_ONCE
        self.measured = False
        self._check(sum(column.total_uncompressed_size for column in self._columns))
        if any(column.num_values > MAX_VALUES for column in self._columns):
            problem = f"a row group holds more than {MAX_VALUES:,} values of a column"
            raise DataError(path, None, f"{problem}; write it again with smaller row groups")

    def rows_at_once(self) -> int:
        """Return how many rows can be in memory together; measure them, unless that is later."""
        texts = [it for it in self._columns if it.physical_type == "BYTE_ARRAY"]
        if all(it.num_values * it.total_uncompressed_size <= MAX_RECORD_BYTES for it in texts):
            self.measured = True  # whatever is in it
            return ROWS_AT_ONCE
        names = [it.path_in_schema for it in texts]
        fits = ROWS_AT_ONCE
        try:
            # Read like this, a text that occurs many times is kept once.
            with pq.ParquetFile(self._path, pre_buffer=False, read_dictionary=names) as file:
                for batch in file.iter_batches(
                    ROWS_AT_ONCE,
                    row_groups=[self._number],
                    columns=list(self._names),
                    use_threads=False,
                ):
                    fits = min(fits, self.measure(batch))
        except pa.ArrowNotImplementedError:  # pyarrow cannot read lists as dictionaries in part
            entry = max(_dictionary_bytes(self._path, it) for it in texts)
            return min(max(BYTES_AT_ONCE // max(entry, 1), 1), ROWS_AT_ONCE)
        self.measured = True
        return fits

    def measure(self, batch: pa.RecordBatch) -> int:
        """Check the next rows, and return how many of them can be in memory together."""
        sizes = sum(map(_bytes_by_row, batch.columns), np.zeros(len(batch), np.int64))
        if (sizes > MAX_RECORD_BYTES).any():
            row = self._row + int((sizes > MAX_RECORD_BYTES).argmax()) + 1
            problem = f"is longer than {MAX_RECORD_BYTES:,} bytes; split its text"
            raise DataError(self._path, row, problem)
        self._row += len(batch)
        self._written += int(sizes.sum())
        self._check(self._written)
        return max(BYTES_AT_ONCE // max(int(sizes.max(initial=0)), 1), 1)

    def _check(self, size: int) -> None:
        if size > max(MAX_UNPACKED, MAX_EXPANSION * self._packed):
            raise DataError(
                self._path,
                None,
                f"a row group of {self._packed:,} bytes unpacks to {size:,} bytes and more, over "
                f"{MAX_EXPANSION} times as many; write it again without repeated texts, or in "
                "smaller row groups",
            )


def _dictionary_bytes(path: Path, column: Any) -> int:
    """Return the size of the texts that a column refers to, at most."""
    whole = column.total_uncompressed_size
    if not column.has_dictionary_page or column.dictionary_page_offset is None:
        return 0
    with path.open("rb") as file:
        file.seek(column.dictionary_page_offset)
        header = file.read(16)  # Thrift: 0x15 type 0x15 size, both numbers of 7 bits a byte
    at, number = 1, 0
    while at < len(header) and header[at] & 0x80:
        at += 1
    for shift, byte in enumerate(header[at + 2 :]):
        number |= (byte & 0x7F) << 7 * shift
        if not byte & 0x80:
            return min(number >> 1, whole)
    return whole


def _bytes_by_row(values: Any) -> np.ndarray:
    """Return how many bytes the texts of each row have once they are written out."""
    kind = values.type
    if pa.types.is_dictionary(kind):
        of_entries = np.append(_bytes_by_row(values.dictionary), 0)  # -1, for null, finds the 0
        return of_entries[values.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    if pa.types.is_map(kind):
        values = pa.ListArray.from_arrays(
            values.offsets, pa.StructArray.from_arrays([values.keys, values.items], ["k", "v"])
        )
        kind = values.type
    if any(is_list(kind) for is_list in _LISTS):
        ends = np.append(0, np.cumsum(_bytes_by_row(values.flatten())))
        counts = functions.list_value_length(values).fill_null(0).to_numpy(zero_copy_only=False)
        bounds = np.append(0, np.cumsum(counts))
        return np.diff(ends[bounds])
    if pa.types.is_struct(kind):
        nothing = np.zeros(len(values), np.int64)
        return sum((_bytes_by_row(each) for each in values.flatten()), nothing)
    if any(is_text(kind) for is_text in _TEXTS):
        lengths = functions.binary_length(values).fill_null(0).to_numpy(zero_copy_only=False)
        return lengths.astype(np.int64)
    return np.zeros(len(values), np.int64)
