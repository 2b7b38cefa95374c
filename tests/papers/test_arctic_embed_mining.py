"""Arctic-Embed 2.0 (arXiv 2412.04506), traps A12, A13, A16 and A17: mining and equal texts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tercet.curate.mining import document_pools as mining_documents
from tercet.curate.mining import relevant as mining_relevant
from tercet.curate.mining.document_pools import Pool, TextStore
from tercet.curate.mining.miner import Mining, mine
from tercet.curate.mining.rules import ABSENT, LEFT, TOO_CLOSE, MiningRule, judge
from tercet.data.batches.relation import relation_of
from tercet.data.files.sources import iter_examples, open_source, write_examples
from tercet.errors import RecipeError
from tercet.losses import info_nce as contrastive
from tercet.models.embedder import Embedder
from tercet.rank import topk
from tercet.types import IGNORED, NEGATIVE, POSITIVE, Example

NAIVE = MiningRule(kind="naive")


@pytest.fixture
def random():
    return np.random.default_rng(0)


def small_shards(patch: pytest.MonkeyPatch, size: int) -> None:
    for module in (mining_documents, mining_relevant):
        patch.setattr(module, "SHARD", size)


def pool_of(folder: Path, vectors: np.ndarray) -> Pool:
    pool = Pool("", TextStore(folder))
    for row in range(len(vectors)):
        pool.add(f"text {row}")
    pool.texts.close()
    for start in range(0, len(vectors), mining_documents.SHARD):
        pool.shards.append(folder / f"{start}.npy")
        np.save(pool.shards[-1], vectors[start : start + mining_documents.SHARD])
    return pool


def coarse(random, rows, dim=5):
    """Small whole numbers: exact in float32, with very many equal scores."""
    return random.integers(-1, 2, (rows, dim)).astype(np.float32)


def sorted_rows(queries, docs, k):
    return np.argsort(-(queries @ docs.T), axis=1, kind="stable")[:, :k]


@pytest.fixture
def mined(encoder_folder, tmp_path, monkeypatch):
    """Mine examples with a teacher that takes the vector of each text from a table."""
    teacher = Embedder.load(encoder_folder)

    def run(examples: list[Example], table: dict[str, Any], **how: Any):
        def encode(self, texts, role="document", **_):
            found = np.zeros((len(texts), self.dim), np.float32)
            for row, text in enumerate(texts):
                found[row, : len(table[text])] = table[text]
            return found

        monkeypatch.setattr(Embedder, "encode", encode)
        write_examples(tmp_path / "pairs.jsonl", examples)
        mining = Mining(**{"rule": NAIVE, "negatives": 2, "depth": 6, **how})
        (report,) = mine(
            teacher,
            [open_source(tmp_path / "pairs.jsonl")],
            tmp_path / "out.jsonl",
            mining=mining,
            work=tmp_path / "work",
        )
        found = list(iter_examples(tmp_path / "out.jsonl")) if report.written else []
        return found, report

    return run


# ---- A12: the last slice, and a small corpus ----


@pytest.mark.parametrize(("docs", "k"), [(13, 5), (13, 13), (13, 40), (3, 8), (12, 4)])
def test_a_last_slice_or_a_corpus_smaller_than_k_changes_nothing(
    random, tmp_path, monkeypatch, docs, k
):
    """Trap A12 of Arctic-Embed."""
    small_shards(monkeypatch, 6)
    vectors, queries = coarse(random, docs), coarse(random, 9)
    expected = sorted_rows(queries, vectors, k)
    hits = pool_of(tmp_path, vectors).search(queries, k)
    np.testing.assert_array_equal(hits.rows, expected)
    np.testing.assert_array_equal(
        hits.scores, np.take_along_axis(queries @ vectors.T, expected, axis=1)
    )
    np.testing.assert_array_equal(topk.top_k(queries, vectors, k, block=6).rows, expected)


def test_a_corpus_smaller_than_the_depth_gives_each_document_once(mined):
    """Trap A12 of Arctic-Embed."""
    examples = [Example(f"q{i}", (f"d{i}",)) for i in range(3)]
    table = {**{f"q{i}": [1, 0.1 * i] for i in range(3)}, **{f"d{i}": [1, i] for i in range(3)}}
    found, report = mined(examples, table, depth=50, negatives=7)
    assert [sorted(example.negatives) for example in found] == [
        ["d1", "d2"], ["d0", "d2"], ["d0", "d1"]
    ]  # fmt: skip
    assert report.candidates == 9 and report.short == 3


# ---- A13: scores of zero and below ----


@pytest.mark.parametrize("kind", ["percent", "relative"])
@pytest.mark.parametrize("positive", [0.5, 0.0, -0.5])
def test_at_theta_one_a_negative_scores_strictly_below_its_positive(kind, positive):
    """Trap A13 of Arctic-Embed."""
    scores = np.array([[positive + 0.1, positive, positive - 1e-6, positive - 0.1]])
    verdicts = judge(
        MiningRule(kind=kind, value=1.0), scores, np.array([positive]), np.zeros((1, 4), np.int8)
    )
    assert verdicts.tolist() == [[TOO_CLOSE, TOO_CLOSE, LEFT, LEFT]]


def test_a_negative_positive_score_lowers_the_cut(mined):
    """Trap A13 of Arctic-Embed."""
    # Positives score 0.6, 0 and -0.4: cuts at 95 % are 0.57, 0 and -0.42, by hand.
    table = {"a": [1, 0, 0], "b": [0, 1, 0], "c": [0, 0, 1]}
    table |= {"da": [0.6, 0.0, -0.41], "db": [0.57, 0.0, -0.42], "dc": [0.5699, -0.1, -0.4]}
    examples = [Example(name, (f"d{name}",)) for name in "abc"]
    found, report = mined(examples, table, rule=MiningRule())
    # db is at the cut of a, and da at that of b: neither is below it. da is above that of c.
    assert [example.negatives for example in found] == [("dc",), ("dc",), ()]
    assert report.positive_score == pytest.approx((0.6 + 0 - 0.4) / 3)
    assert report.negative_score == pytest.approx((0.5699 - 0.1) / 2)
    assert report.ratio == pytest.approx(report.negative_score / report.positive_score)


def test_a_relative_cut_moves_with_the_scores():
    """Trap A13 of Arctic-Embed."""
    # s = 0.9, median of the candidates 0.86: the cut is 0.9 - 0.25 * 0.04 = 0.89, by hand.
    scores = np.array([[0.91, 0.9, 0.89, 0.86, 0.85, 0.84, 0.83]])
    rule, barred = MiningRule(kind="relative", value=0.75), np.zeros((1, 7), np.int8)
    verdicts = judge(rule, scores, np.array([0.9]), barred)
    assert verdicts.tolist() == [[TOO_CLOSE] * 3 + [LEFT] * 4]
    assert judge(rule, scores - 0.95, np.array([-0.05]), barred).tolist() == verdicts.tolist()
    barred[0, 5:] = ABSENT  # and then the median is 0.89, and the cut 0.8975
    assert judge(rule, scores, np.array([0.9]), barred).tolist() == [
        [TOO_CLOSE, TOO_CLOSE, LEFT, LEFT, LEFT, ABSENT, ABSENT]
    ]


def test_the_rule_can_compare_with_the_best_positives_among_the_candidates(mined):
    table = {"q": [1.0], "far": [1.0], "p1": [0.9], "p2": [0.7], "p3": [0.1], "n1": [0.8]}
    table |= {"n2": [0.6], "n3": [0.5], "n4": [0.4], "away": [0.05]}
    examples = [
        Example("q", ("p3", "p1", "p2"), ("n1", "n2", "n3", "n4")),
        Example("far", ("away",)),
    ]
    for most, negatives in ((1, ("n1", "n2", "n3", "n4")), (2, ("n2", "n3", "n4")), (3, ("n2", "n3", "n4"))):  # noqa: E501  # fmt: skip
        found, report = mined(
            examples, table, rule=MiningRule(value=1.0), depth=6, negatives=4, max_positives=most
        )
        assert [example.negatives for example in found] == [negatives]
        assert (report.unfound, report.unanswered, report.left_out) == (2, 1, 1)
    found, report = mined(examples, table, rule=MiningRule(value=1.0), negatives=4)
    assert [example.negatives for example in found] == [(), ()]  # below 0.1 there is "away" alone
    with pytest.raises(RecipeError, match="max_positives must be at least 1; got 0"):
        Mining(max_positives=0)


# ---- A16: equal texts ----


def test_a_text_that_answers_a_query_under_any_id_is_never_its_negative(mined):
    """Trap A16 of Arctic-Embed."""
    table = {"Ask": [1], "ask": [1], "other": [1], "An answer": [0.9], "another": [0.8]}
    table |= {"an  ANSWER": [0.9], "third": [0.5]}
    examples = [
        Example("Ask", ("An answer",)),
        Example("other", ("an  ANSWER",)),  # the same text under another id
        Example("ask", ("another",)),  # the same query under another id
        Example("other", ("third",)),
    ]
    found, report = mined(examples, table)
    assert [example.negatives for example in found] == [
        ("third",), ("another",), ("third",), ("another",)
    ]  # fmt: skip
    assert report.candidates == 4 * 3


def test_equal_texts_of_a_batch_are_ignored_whichever_example_brought_them():
    """Trap A16 of Arctic-Embed."""
    relation = relation_of(
        ["a", "b", "c"],
        [["one text"], ["two"], ["one text"]],
        [["mined"], ["one text"], ["two"]],
    )
    rows = relation.rows(0, 3)
    own, far, same = POSITIVE, NEGATIVE, IGNORED
    #        one  mined  two  one  one  two
    assert rows.tolist() == [
        [own, far, far, same, same, far],
        [far, far, own, far, far, same],
        [same, far, far, same, own, far],
    ]


# ---- A17: more scores than 32 bits count ----


def test_no_product_of_mining_is_larger_than_its_block(random, tmp_path, monkeypatch):
    """Trap A17 of Arctic-Embed."""
    small_shards(monkeypatch, 4)
    monkeypatch.setattr(mining_documents, "_TOGETHER", 3)
    sizes: list[int] = []
    stock = torch.mm

    def counted(left, right, *, out):
        sizes.append(out.numel())
        return stock(left, right, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    vectors, queries = coarse(random, 11), coarse(random, 8)
    hits = pool_of(tmp_path, vectors).search(queries, 5)
    np.testing.assert_array_equal(hits.rows, sorted_rows(queries, vectors, 5))
    assert sum(sizes) == 8 * 11 and max(sizes) <= 3 * 4


def test_blocks_of_scores_stay_below_two_to_the_31():
    """Trap A17 of Arctic-Embed."""
    assert mining_documents._TOGETHER * mining_documents.SHARD < 2**31
    assert topk._QUERY_BLOCK * 16_384 < 2**31
    # 131,072 queries against as many documents are 2 ** 34 scores, and 4 bytes each.
    for device in ("cpu", "cuda"):
        block = contrastive.block_of(131_072, device=torch.device(device))
        assert block * 131_072 * 4 <= contrastive.BLOCK_BYTES[device] < 2**31
    assert 131_072**2 > 2**31
