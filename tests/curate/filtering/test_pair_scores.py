import numpy as np
import pytest
import torch

from tercet.curate.filtering.pair_scores import BlockSize, paired_ranks
from tercet.errors import ModelError
from tests.papers.test_arctic_embed_filter import by_sorting, pairs

KEYS = np.arange(150, dtype=np.uint64)


def test_documents_of_one_query_do_not_beat_each_other():
    queries = np.eye(3, 4, dtype=np.float32)
    documents = np.array(  # of the first query three, which are its best ones
        [[0.9, 0, 0, 0], [0.8, 0, 0, 0], [0.7, 0, 0, 0], [0.75, 0.5, 0, 0], [0.1, 0, 0.5, 0]],
        np.float32,
    )
    owners = np.array([0, 0, 0, 1, 2])
    ranks, scores = paired_ranks(queries, documents, KEYS[:5], owners=owners, block=BlockSize(8, 8))
    assert ranks.tolist() == [1, 1, 2, 1, 1]  # 0.75 of another query beats 0.7 alone
    np.testing.assert_allclose(scores, [0.9, 0.8, 0.7, 0.5, 0.5])


@pytest.mark.parametrize("block", [BlockSize(8, 16), BlockSize(512, 2048)])
def test_many_positives_give_the_ranks_of_the_slow_formula(block):
    queries, documents = pairs()
    g = np.random.default_rng(3)
    owners = np.sort(g.integers(0, 40, 150))
    keys = g.integers(0, 100, 150).astype(np.uint64)
    scores = documents.astype(np.float64) @ queries.astype(np.float64).T  # [docs, queries]
    expected = []
    for i, owner in enumerate(owners):
        others = (keys != keys[i]) & (owners != owner)
        expected.append(1 + int((scores[others, owner] > scores[i, owner]).sum()))
    assert (
        paired_ranks(queries, documents, keys, owners=owners, block=block)[0].tolist() == expected
    )


def test_halves_and_mapped_files_are_read_by_block(tmp_path):
    queries, documents = (each.astype(np.float16) for each in pairs())
    np.save(tmp_path / "q.npy", queries)
    np.save(tmp_path / "d.npy", documents)
    mapped = {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "qd"}
    ranks, _ = paired_ranks(mapped["q"], mapped["d"], KEYS, block=BlockSize(8, 64))
    assert ranks.tolist() == by_sorting(queries, documents, KEYS)


def test_several_threads_count_the_same():
    queries, documents = pairs()
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        ranks, _ = paired_ranks(queries, documents, KEYS)
    finally:
        torch.set_num_threads(before)
    assert ranks.tolist() == by_sorting(queries, documents, KEYS)


def test_counts_of_more_than_a_byte_are_right():
    count = 3000  # the last document is beaten by all others
    queries = np.ones((count, 1), np.float32)
    documents = np.arange(count, 0, -1, dtype=np.float32)[:, None]
    ranks, _ = paired_ranks(queries, documents, np.arange(count, dtype=np.uint64))
    assert ranks.tolist() == list(range(1, count + 1))


def test_negative_scores_are_not_beaten_by_the_filling_of_the_last_block():
    queries, documents = np.ones((3, 2), np.float32), -np.ones((3, 2), np.float32)
    ranks, _ = paired_ranks(queries, documents, KEYS[:3])
    assert ranks.tolist() == [1, 1, 1]


def test_a_vector_that_is_no_number_is_refused():
    queries, documents = pairs(20)
    documents[7, 0] = np.nan
    with pytest.raises(ModelError, match="NaN or infinity"):
        paired_ranks(queries, documents, KEYS[:20])
