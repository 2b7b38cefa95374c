"""Arctic-Embed 2.0 (arXiv 2412.04506), trap A11: the rank of a pair in its shard, by counting."""

import numpy as np
import pytest

from tercet.curate.filtering.pair_scores import BlockSize, paired_ranks

BLOCKS = [BlockSize(8, 8), BlockSize(16, 64), BlockSize(64, 64), BlockSize(512, 2048)]


def unit(count: int, dim: int = 48, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((count, dim), np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def pairs(count: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Queries, and documents that are near enough for ranks of all sizes."""
    queries = unit(count)
    documents = queries + 3 * unit(count, seed=1)
    return queries, documents / np.linalg.norm(documents, axis=1, keepdims=True)


def by_sorting(queries: np.ndarray, documents: np.ndarray, keys: np.ndarray) -> list[int]:
    """The slow way, in float64: sort the documents of other texts, look where the own one is."""
    ranks = []
    for i, query in enumerate(queries.astype(np.float64)):
        scores = documents.astype(np.float64) @ query
        others = np.sort(scores[keys != keys[i]])[::-1]
        ranks.append(1 + int(np.searchsorted(-others, -scores[i], side="left")))
    return ranks


def test_the_rank_by_counting_is_that_of_a_full_sort():
    """Trap A11 of Arctic-Embed."""
    queries, documents = pairs()
    keys = np.arange(len(queries), dtype=np.uint64)
    ranks, scores = paired_ranks(queries, documents, keys)
    assert ranks.tolist() == by_sorting(queries, documents, keys)
    assert ranks.min() == 1 and ranks.max() > 20
    np.testing.assert_allclose(scores, (queries * documents).sum(axis=1), atol=1e-6)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_block_does_not_matter(block):
    """Trap A11 of Arctic-Embed."""
    queries, documents = pairs()
    keys = np.arange(len(queries), dtype=np.uint64)
    assert paired_ranks(queries, documents, keys, block=block)[0].tolist() == by_sorting(
        queries, documents, keys
    )


@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 64, 65, 129])
def test_numbers_without_rounding_give_the_same_bits_in_each_block(count):
    """Trap A11 of Arctic-Embed."""
    g = np.random.default_rng(count)
    queries = g.integers(-3, 4, (count, 8)).astype(np.float32)
    documents = g.integers(-3, 4, (count, 8)).astype(np.float32)  # with many equal scores
    keys = g.integers(0, max(count // 3, 1), count).astype(np.uint64)
    found = [paired_ranks(queries, documents, keys, block=block) for block in BLOCKS]
    for ranks, scores in found:
        assert ranks.tolist() == by_sorting(queries, documents, keys)
        assert scores.tolist() == (queries * documents).sum(axis=1).tolist()


def test_a_pair_does_not_beat_itself_nor_do_documents_of_its_text():
    """Trap A11 of Arctic-Embed."""
    queries, documents = pairs(40)
    documents[:20] = documents[20:]  # every document is there twice
    keys = np.tile(np.arange(20, dtype=np.uint64), 2)
    ranks, _ = paired_ranks(queries, documents, keys, block=BlockSize(8, 16))
    assert ranks.tolist() == by_sorting(queries, documents, keys)
    same = np.zeros(40, np.uint64)  # all of one text: nothing is left that could beat one
    assert paired_ranks(queries, documents, same)[0].tolist() == [1] * 40


def test_a_positive_score_of_its_own_would_beat_itself_and_ours_never_does():
    """Trap A11 of Arctic-Embed. A separate product differs in the last bits."""
    queries, documents = pairs(2000)
    inside = np.diag(queries @ documents.T)
    apart = np.array([q @ d for q, d in zip(queries, documents, strict=True)])
    assert (inside > apart).mean() > 0.1  # a share of rows in which the pair would beat itself
    copies = np.tile(documents[:1], (2000, 1))  # the vector of each is that of all others
    asked = np.tile(queries[:1], (2000, 1))
    keys = np.arange(2000, dtype=np.uint64)
    assert paired_ranks(asked, copies, keys)[0].tolist() == [1] * 2000
