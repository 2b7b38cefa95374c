"""Mining by sparse and token vectors, by their weighted sum with dense ones, and by BM25."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from tercet.curate.mining import document_pools as mining_documents
from tercet.curate.mining import finders as kinds
from tercet.curate.mining import relevant as mining_relevant
from tercet.curate.mining.finders import COSINES, By
from tercet.curate.mining.miner import Mining, MiningReport, mine
from tercet.curate.mining.rules import MiningRule
from tercet.data.files.sources import iter_examples, open_source, write_examples
from tercet.errors import ModelError, RecipeError
from tercet.evaluate.measures.bm25 import bm25_scores, by_tokens_of, by_words
from tercet.kinds import KINDS, Weights
from tercet.models.embedder import Embedder
from tercet.types import Example, Role
from tercet.vectors import TokenRows, Vectors
from tests.evaluate.kinds import slow_scores
from tests.toy import SENTENCES

pytest.importorskip("bm25s")

DEPTH = 7
PERCENT = {"sparse": 0.9, "multi": 0.99, "hybrid": 0.97, "bm25": 0.9, "bm25 tokens": 0.9}
HYBRID = Weights(1.0, 0.4, 0.7)
MORE = ("words of the moon", "play music in files", "a terminal for music", "wholly unrelated")


@pytest.fixture(scope="module")
def teacher(encoder_folder) -> Embedder:
    """All kinds of vectors; its sparse weights differ from token to token."""
    torch.manual_seed(3)
    made = Embedder.load(encoder_folder, kinds=KINDS, multi_dim=8)
    assert made.heads.sparse is not None
    torch.nn.init.normal_(made.heads.sparse.weight, std=0.05)
    torch.nn.init.constant_(made.heads.sparse.bias, 0.5)
    return made


def rows() -> list[Example]:
    """Some queries of words of documents, one asked twice, one with two answers."""
    found = [Example(" ".join(text.split()[-2:]), (text,)) for text in SENTENCES[:9]]
    found[2] = Example(found[2].query, (SENTENCES[2], SENTENCES[9]), (SENTENCES[10],))
    found.append(Example(found[4].query.upper(), (SENTENCES[11],)))
    found.append(Example("music music files", (SENTENCES[1],)))
    return found


@pytest.fixture
def pairs(tmp_path) -> Path:
    write_examples(tmp_path / "pairs.jsonl", rows())
    return tmp_path / "pairs.jsonl"


def mined(
    teacher: Embedder | None, file: Path, by: By, **how: Any
) -> tuple[list[Example], MiningReport]:
    how = {"rule": MiningRule(value=0.9), "negatives": 3, "depth": DEPTH, **how}
    mining = Mining(by=by, **how)
    folder = file.parent
    (report,) = mine(
        teacher, [open_source(file)], folder / "out.jsonl", mining=mining, documents=MORE,
        work=folder / "work",
    )  # fmt: skip
    return list(iter_examples(folder / "out.jsonl")), report


def documents() -> list[str]:
    found = dict.fromkeys(t for e in rows() for t in (*e.positives, *e.negatives))
    return [*found, *MORE]


def halved(vectors: Vectors) -> Vectors:
    """Token vectors as they are kept on the disk."""
    assert vectors.multi is not None
    rows = TokenRows(vectors.multi.vectors.half().float(), vectors.multi.offsets)
    return Vectors(vectors.dense, vectors.sparse, rows)


def all_scores(teacher: Embedder) -> dict[str, np.ndarray]:
    """The score of every query with every document by every way, by the plain formulas."""
    queries, docs = [example.query for example in rows()], documents()
    found = slow_scores(
        halved(teacher.encode_vectors(queries, "query")), halved(teacher.encode_vectors(docs))
    )
    for name, split in (("bm25", by_words), ("bm25 tokens", by_tokens_of(teacher))):
        found[name] = np.stack(list(bm25_scores(queries, docs, split))).astype(np.float64)
    found["hybrid"] = np.stack([HYBRID.of(kind) * found[kind] for kind in KINDS]).sum(axis=0)
    return found


def lists(scores: dict[str, np.ndarray], by: str, query: int) -> list[int]:
    """The documents that are looked at, best first: of words, those that share one alone."""

    def best(way: str, among: list[int]) -> list[int]:
        ordered = sorted(among, key=lambda doc: (-round(scores[way][query, doc], 6), doc))
        if way == "sparse" or way.startswith("bm25"):
            ordered = [doc for doc in ordered if scores[way][query, doc] > 0]
        return ordered[:DEPTH]

    everything = list(range(len(documents())))
    if by != "hybrid":
        return best(by, everything)
    return best(by, sorted({*best("dense", everything), *best("sparse", everything)}))


@pytest.mark.parametrize(
    ("by", "size"),
    [("sparse", 4096), ("multi", 4096), ("hybrid", 6), ("bm25", 6), ("bm25 tokens", 4096)],
)
def test_mining_equals_loops_over_all_documents(teacher, pairs, monkeypatch, by, size):
    for module in (mining_documents, mining_relevant):
        monkeypatch.setattr(module, "SHARD", size)
    for name in ("QUERIES", "DOCS", "QUERIES_OF_TOKENS", "DOCS_OF_TOKENS"):
        monkeypatch.setattr(kinds, name, min(size - 1, 4))
    scores = all_scores(teacher)
    of = None if by == "bm25" else teacher
    how: dict[str, Any] = {"rule": MiningRule(value=PERCENT[by])}
    how |= {"weights": HYBRID} if by == "hybrid" else {}
    found, report = mined(of, pairs, "bm25" if by.startswith("bm25") else by, **how)
    texts, seen, close = documents(), 0, 0
    for query, (example, given) in enumerate(zip(found, rows(), strict=True)):
        known = {
            text
            for other in rows()
            if other.query.lower() == given.query.lower()
            for text in other.positives
        }
        own = scores[by][query]
        cut = PERCENT[by] * min(own[texts.index(text)] for text in given.positives)
        looked_at = lists(scores, by, query)
        free = [doc for doc in looked_at if texts[doc] not in known]
        below = [doc for doc in free if round(own[doc], 6) < round(cut, 9)]
        assert list(example.negatives) == [texts[doc] for doc in below[:3]]
        seen, close = seen + len(looked_at), close + len(free) - len(below)
    assert (report.candidates, report.dropped["too close"]) == (seen, close)
    assert close > 0 < report.negatives
    if by in ("sparse", "bm25"):
        assert seen < len(rows()) * DEPTH  # some queries share a word with few documents


@pytest.mark.parametrize("by", get_args(By))
def test_scores_are_written_where_they_are_cosines_and_counted_always(teacher, pairs, by):
    found, report = mined(teacher, pairs, by, rule=MiningRule(kind="naive"))
    scored = {example.positive_scores is not None for example in found}
    assert scored == {by in COSINES}
    assert report.positive_score > 0 and report.negative_score > 0
    if by == "multi":
        expected = all_scores(teacher)["multi"]
        place = documents().index(found[0].negatives[0])
        assert found[0].negative_scores is not None
        assert found[0].negative_scores[0] == pytest.approx(expected[0, place], abs=2e-6)


def test_scores_that_a_row_brought_go_with_the_negatives_that_they_were_of(teacher, pairs):
    given = Example("play music", (SENTENCES[1],), (SENTENCES[4],), (9.0,), (1.0,))
    write_examples(pairs, [given, *rows()])
    found, _ = mined(teacher, pairs, "bm25", rule=MiningRule(kind="naive"), keep=True)
    assert found[0].negatives[0] == SENTENCES[4]
    assert (found[0].positive_scores, found[0].negative_scores) == (None, None)


def test_a_document_that_one_list_lacks_gets_its_true_score_b20(teacher, pairs):
    """The documents that only the sparse list holds are ranked with their dense scores."""
    scores = all_scores(teacher)
    apart = [
        set(lists(scores, "sparse", query)) - set(lists(scores, "dense", query))
        for query in range(len(rows()))
    ]
    assert any(set(lists(scores, "hybrid", query)) & docs for query, docs in enumerate(apart))
    how = {"rule": MiningRule(kind="naive"), "negatives": DEPTH, "weights": HYBRID}
    found, _ = mined(teacher, pairs, "hybrid", **how)
    for query, example in enumerate(found):
        best = [documents()[doc] for doc in lists(scores, "hybrid", query)]
        assert list(example.negatives) == [t for t in best if t in set(example.negatives)]


def test_a_sum_without_weights_given_is_that_tuned_for_the_teacher(encoder_folder, pairs):
    tuned = {"": Weights(0.2, 1.0, 0.0)}
    model = Embedder.load(encoder_folder, kinds=("dense", "sparse"), weights=tuned)
    how = {"rule": MiningRule(kind="naive"), "negatives": DEPTH}
    found, _ = mined(model, pairs, "hybrid", **how)
    assert mined(model, pairs, "hybrid", weights=tuned[""], **how)[0] == found
    assert mined(model, pairs, "hybrid", weights=Weights(1.0, 0.01, 0.0), **how)[0] != found


# ---- going on --------------------------------------------------------------------------------


@pytest.fixture
def encoded(monkeypatch):
    """The texts that are encoded, with their kinds, and after how many calls a run is killed."""
    stock, seen, limit = Embedder.encode_vectors, [], [10**9]

    def encode(self: Embedder, texts: list[str], role: Role = "document", **how: Any):
        if limit[0] == 0:
            raise KeyboardInterrupt
        limit[0] -= 1
        seen.extend((text, tuple(how["kinds"])) for text in texts)
        return stock(self, texts, role, **how)

    monkeypatch.setattr(Embedder, "encode_vectors", encode)
    return seen, limit


def test_a_killed_run_goes_on_and_another_sum_costs_only_the_kinds_that_are_new(
    teacher, pairs, monkeypatch, encoded
):
    for module in (mining_documents, mining_relevant):
        monkeypatch.setattr(module, "SHARD", 8)
    seen, limit = encoded
    limit[0] = 2
    both = Weights(1.0, 1.0, 0.0)
    with pytest.raises(KeyboardInterrupt):
        mined(teacher, pairs, "hybrid", weights=both)
    assert len(seen) == 16
    limit[0] = 10**9
    found, _ = mined(teacher, pairs, "hybrid", weights=both)
    every = len(documents()) + len(rows())
    assert len(seen) == every and {kinds for _, kinds in seen} == {("dense", "sparse")}
    seen.clear()
    assert mined(teacher, pairs, "hybrid", weights=both)[0] == found and seen == []
    mined(teacher, pairs, "hybrid", weights=HYBRID)
    assert len(seen) == every and {kinds for _, kinds in seen} == {("multi",)}
    for path in (pairs.parent / "work").rglob("sparse_weights.npy"):
        path.write_bytes(path.read_bytes()[:-4])
    seen.clear()
    assert mined(teacher, pairs, "hybrid", weights=both)[0] == found
    assert {kinds for _, kinds in seen} == {("sparse",)}


def test_rows_with_prompts_of_their_own_are_read_after_these(teacher, pairs):
    changed = [
        Example(e.query, e.positives, query_prompt=("draw ", "read ", None)[i % 3])
        for i, e in enumerate(rows())
    ]
    write_examples(pairs, changed)
    found, _ = mined(teacher, pairs, "multi", rule=MiningRule(kind="naive"))
    for example in found:
        assert example.positive_scores is not None
        text = (example.query_prompt or "") + example.query
        sides = (
            teacher.encode_vectors([text], "query"),
            teacher.encode_vectors([example.positives[0]]),
        )
        expected = slow_scores(*sides)["multi"][0, 0]
        assert example.positive_scores[0] == pytest.approx(expected, abs=1e-3)


def test_bm25_keeps_nothing_on_the_disk(pairs):
    mined(None, pairs, "bm25")
    assert list((pairs.parent / "work").iterdir()) == []


# ---- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"weights": HYBRID}, "weights are for mining by hybrid; got by dense"),
        ({"by": "bm25", "rule": MiningRule(kind="margin")}, "the default value of the rule margin"),
        ({"by": "hybrid", "rule": MiningRule(kind="absolute")}, "scores by hybrid are not cosines"),
    ],
)
def test_what_does_not_fit_the_way_is_refused(wrong, said):
    with pytest.raises(RecipeError, match=said):
        Mining(**wrong)
    Mining(by="multi", rule=MiningRule(kind="margin"))
    Mining(by="bm25", rule=MiningRule(kind="margin", value=2.0))


def test_a_teacher_that_does_not_make_the_vectors_is_refused(encoder_folder, teacher, pairs):
    plain = Embedder.load(encoder_folder)
    for by in ("sparse", "multi", "hybrid"):
        with pytest.raises(RecipeError, match=f"mining by {by} needs .* the teacher makes dense"):
            mined(plain, pairs, by)
        with pytest.raises(RecipeError, match=f"mining by {by} needs a teacher"):
            mined(None, pairs, by)
    with pytest.raises(RecipeError, match="one of them must have a weight above 0"):
        mined(teacher, pairs, "hybrid", weights=Weights(0.0, 0.0, 1.0))


@pytest.mark.parametrize("by", ["sparse", "multi", "hybrid"])
def test_vectors_that_are_no_numbers_are_refused(encoder_folder, pairs, by):
    broken = Embedder.load(encoder_folder, kinds=KINDS, multi_dim=8)
    for head in (broken.heads.sparse, broken.heads.multi):
        assert head is not None
        head.bias.data.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"vector of text \d+, '.*', holds NaN or infinity"):
        mined(broken, pairs, by)
    assert list((pairs.parent / "work").iterdir()) == []
