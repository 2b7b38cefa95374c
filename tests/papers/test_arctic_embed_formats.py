"""Arctic-Embed 2.0 (arXiv 2412.04506), traps A8 and A9: batches of tokens, split and stored."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.curate.convert import arctic_batches as arctic
from tercet.curate.convert.arctic_batches import TokenBatch, read_batch, write_batch


def batch_of(pairs, *, queries, documents, first=0) -> TokenBatch:
    """A batch with these (query, document, relevance), and tokens that name their text."""
    tokens = pa.large_list(pa.uint32())

    def texts(name, column, ids):
        lists = pa.array([[row, row + 70_000] for row in range(len(ids))], tokens)
        return pa.table({name: pa.array(ids, pa.uint64()), column: lists})

    columns = [list(column) for column in zip(*pairs, strict=True)]
    return TokenBatch(
        texts(arctic.QUERY_ID, arctic.QUERY_TOKENS, [first + i for i in range(queries)]),
        texts(arctic.DOCUMENT_ID, arctic.DOCUMENT_TOKENS, list(range(documents))),
        pa.Table.from_arrays(
            [pa.array(c, f.type) for c, f in zip(columns, arctic.RELATIONS, strict=True)],
            schema=arctic.RELATIONS,
        ),
    )


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a8_a_split_keeps_every_positive(parts):
    # The ids of queries and documents are independent: cut by position, most pairs would go.
    order = np.random.default_rng(0).permutation(1024).tolist()
    pairs = [(query, order[query], 1) for query in range(1024)]
    pairs += [(query, order[query - 1], 1) for query in range(0, 1024, 5)]
    pairs += [(query, order[query - 7], -1) for query in range(0, 1024, 3)]
    whole = batch_of(pairs, queries=1024, documents=1030)
    found = whole.split(parts)
    assert len(found) == parts and sum(batch.positives for batch in found) == whole.positives
    seen = []
    for batch in found:
        queries = set(batch.queries[0].to_pylist())
        documents = batch.documents[0].to_pylist()
        assert len(queries) == 1024 // parts and len(set(documents)) == len(documents)
        rows = list(zip(*(column.to_pylist() for column in batch.relations), strict=True))
        assert {row[0] for row in rows} <= queries and {row[1] for row in rows} <= set(documents)
        assert batch.documents[1].to_pylist() == [[i, i + 70_000] for i in documents]
        seen += rows
    assert sorted(seen) == sorted(pairs)
    alone = [i for batch in found for i in batch.documents[0].to_pylist() if i >= 1024]
    assert sorted(alone) == list(range(1024, 1030))  # documents of no pair are dealt out


@pytest.mark.parametrize("width", [pa.uint16(), pa.uint32(), pa.int64()])
def test_a9_token_ids_above_16_bits_survive_the_way_through_a_batch(tmp_path, width):
    batch = batch_of([(2**40, 1, 1), (2**40 + 1, 0, -1)], queries=2, documents=2, first=2**40)
    write_batch(tmp_path / "b", batch)
    back = read_batch(tmp_path / "b")
    assert back.queries.equals(batch.queries) and back.relations.equals(batch.relations)
    assert back.documents[1].to_pylist() == [[0, 70_000], [1, 70_001]]
    stored = pq.read_schema(tmp_path / "b" / "documents.parquet")
    assert stored.field(arctic.DOCUMENT_TOKENS).type == pa.large_list(pa.uint32())
    small = [[1, 65_535 if width == pa.uint16() else 250_000], [7]]
    table = {arctic.DOCUMENT_ID: [0, 1], arctic.DOCUMENT_TOKENS: pa.array(small, pa.list_(width))}
    pq.write_table(pa.table(table), tmp_path / "b" / "documents.parquet")
    assert read_batch(tmp_path / "b").documents[1].to_pylist() == small
