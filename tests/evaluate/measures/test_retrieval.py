from dataclasses import replace

import numpy as np
import pytest
import torch

from tercet.errors import RecipeError
from tercet.evaluate.measures import by_kind as module
from tercet.evaluate.measures.bm25 import by_tokens_of
from tercet.evaluate.measures.by_kind import dev_score, measure_kinds, weights_for
from tercet.evaluate.measures.retention import retention
from tercet.evaluate.measures.retrieval import evaluate_retrieval, measure, measure_bm25
from tercet.evaluate.measures.tuned_weights import dev_candidates, tune
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.kinds import KINDS, Weights
from tercet.metrics import Judgements
from tercet.models.embedder import Embedder
from tercet.rank.hybrid import kind_scores
from tercet.types import Example
from tests.evaluate.kinds import evaluate_kinds
from tests.toy import SENTENCES

PROMPTS = {"query": "a question about the moon: "}
TASKS = {"files": {"query": "count the lines of "}, "both": {"query": "a ", "document": "the "}}


@pytest.fixture(scope="module")
def data():
    examples = [Example(" ".join(text.split()[-2:]), (text,)) for text in SENTENCES]
    return RetrievalSet.from_examples(examples, "files")


def expected(embedder, data, task):
    queries = embedder.encode(data.queries, "query", task=task)
    documents = embedder.encode(data.documents, "document", task=task)
    return evaluate_retrieval(data, queries, documents), documents


@pytest.mark.parametrize("task", [None, "files", "both"])
def test_retrieval_is_measured_with_the_prompts_of_the_task_or_the_default_ones(
    encoder_folder, data, task, caplog
):
    embedder = Embedder.load(encoder_folder, prompts=PROMPTS, task_prompts=TASKS)
    result, documents = expected(embedder, data, task)
    found = measure(embedder, data, task=task)
    np.testing.assert_array_equal(found.documents, documents)
    for metric, scores in result.scores.items():
        np.testing.assert_array_equal(found.result.scores[metric], scores)
    bare, _ = expected(Embedder.load(encoder_folder), data, None)
    assert any((bare.scores[m] != result.scores[m]).any() for m in bare.scores)
    assert len(found.positives) == 12 and not caplog.messages


def test_a_query_without_the_prompt_that_was_learned_is_told_and_a_lost_task_refused(
    encoder_folder, data, caplog
):
    embedder = Embedder.load(encoder_folder, task_prompts=TASKS)
    measure(embedder, data)
    assert len(caplog.messages) == 1
    assert "a query gets no prompt" in caplog.text and "files-query 'count the" in caplog.text
    with pytest.raises(RecipeError, match="no prompt for the task 'lost'"):
        measure(embedder, data, task="lost")


@pytest.mark.parametrize(
    ("name", "task", "used"),
    [
        ("files", None, "files"),
        ("dev", None, None),
        ("dev", "both", "both"),
        ("files", "x", "files"),
    ],
)
def test_a_dev_score_takes_the_prompts_of_its_task_where_the_model_has_them(
    encoder_folder, data, name, task, used, monkeypatch
):
    embedder = Embedder.load(encoder_folder, prompts=PROMPTS, task_prompts=TASKS)
    result, _ = expected(embedder, data, used)
    named = replace(data, name=name)
    seen = []
    encode = embedder.encode
    monkeypatch.setattr(
        embedder, "encode", lambda *a, task, **k: (seen.append(task), encode(*a, task=task, **k))[1]
    )
    assert dev_score(named, task)(embedder) == result.mean("ndcg@10")
    assert seen == [used, used]


def test_bm25_needs_no_model(data):
    assert measure_bm25(data).mean("ndcg@10") > 0.9


# --- several kinds of vectors -----------------------------------------------------------------


@pytest.fixture(scope="module")
def of_all_kinds(encoder_folder):
    """A model with untrained heads that differ from token to token."""
    embedder = Embedder.load(encoder_folder, kinds=KINDS, multi_dim=16)
    assert embedder.heads.sparse is not None
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(embedder.heads.sparse.weight.shape, generator=generator)
    embedder.heads.sparse.weight.data = weight / 30
    embedder.heads.sparse.bias.data.fill_(0.3)
    return embedder


@pytest.mark.parametrize("letters", [1, 90, 10_000])
@pytest.mark.parametrize("protocol", ["exact", "paper"])
def test_a_corpus_encoded_in_blocks_is_measured_like_one_in_memory(
    of_all_kinds, data, letters, protocol, monkeypatch
):
    monkeypatch.setattr(module, "_BLOCK_LETTERS", letters)
    monkeypatch.setattr(module, "RERANKED", 5)
    queries = of_all_kinds.encode_vectors(data.queries, "query")
    documents = of_all_kinds.encode_vectors(data.documents, "document")
    weights = Weights(0.5, 0.2, 1.0)
    whole = evaluate_kinds(data, queries, documents, weights=weights, protocol=protocol)
    found = measure_kinds(of_all_kinds, data, weights=weights, protocol=protocol)
    assert (found.protocol, found.terms, found.weights) == (protocol, whole.terms, weights)
    for name, result in whole.results.items():
        np.testing.assert_array_equal(found.results[name].hits.rows, result.hits.rows)
        np.testing.assert_allclose(found.results[name].hits.scores, result.hits.scores, atol=1e-5)


def test_dense_alone_is_measured_as_ever(of_all_kinds, encoder_folder, data):
    found = measure_kinds(of_all_kinds, data)
    usual = measure(of_all_kinds, data).result
    for metric, scores in usual.scores.items():
        np.testing.assert_array_equal(found.results["dense"].scores[metric], scores)
    assert list(measure_kinds(of_all_kinds, data, kinds=["dense", "multi"]).results) == [
        *("dense", "multi", "dense+multi")
    ]
    with pytest.raises(RecipeError, match="makes no sparse vectors"):
        measure_kinds(Embedder.load(encoder_folder), data, kinds=["sparse"])


def test_weights_are_those_that_the_model_was_tuned_to(of_all_kinds, data, monkeypatch):
    tuned = {"files": Weights(1.0, 0.0, 0.5), "": Weights(0.5, 0.5, 0.0)}
    settings = replace(of_all_kinds.settings, weights=tuned)
    assert weights_for(settings, ("lost", "files")) == tuned["files"]
    assert weights_for(settings, ("lost",)) == tuned[""]
    assert weights_for(of_all_kinds.settings, ("files",)) == Weights()
    monkeypatch.setattr(of_all_kinds, "settings", settings)
    assert measure_kinds(of_all_kinds, data).weights == tuned["files"]


def test_candidates_of_a_dev_set_have_the_scores_of_every_kind(of_all_kinds, data):
    found = dev_candidates(of_all_kinds, data, tasks=("files",), kinds=KINDS, depth=3)
    queries = of_all_kinds.encode_vectors(data.queries, "query")
    documents = of_all_kinds.encode_vectors(data.documents, "document")
    true = kind_scores(queries, documents)
    here = found.rows >= 0
    wide = found.rows.clamp_min(0).expand(3, -1, -1)
    torch.testing.assert_close(
        found.parts[:, here], true.gather(2, wide)[:, here], atol=1e-5, rtol=0
    )


def test_the_dev_score_of_several_kinds_is_that_of_their_sum_and_names_each(of_all_kinds, data):
    figures = dev_score(data)(of_all_kinds)
    found = measure_kinds(of_all_kinds, data)
    assert isinstance(figures, dict)
    assert figures["dev_score"] == found.results["dense+sparse+multi"].mean("ndcg@10")
    for kind in KINDS:
        assert figures[f"dev_{kind}"] == found.results[kind].mean("ndcg@10")
    assert figures["dev_document_terms"] == found.terms["document"].mean
    assert figures["dev_query_empty"] == found.terms["query"].empty
    assert found.terms["document"].mean > 3


def test_b18_a_dev_score_tells_how_many_texts_have_no_term(encoder_folder, data):
    """What ``tercet.training.log`` looks at."""
    embedder = Embedder.load(encoder_folder, kinds=("dense", "sparse"))
    score = dev_score(data)
    first = score(embedder)
    assert isinstance(first, dict)
    assert first["dev_document_empty"] == 0 == first["dev_query_empty"]
    assert embedder.heads.sparse is not None
    torch.nn.init.constant_(embedder.heads.sparse.bias, -1.0)
    then = score(embedder)
    assert isinstance(then, dict)
    assert then["dev_document_empty"] == 1 == then["dev_query_empty"]


def test_tokens_of_the_model_are_words_without_what_is_put_around_them(encoder_folder):
    embedder = Embedder.load(encoder_folder, prompts={"query": "find: "}, query_tokens=5)
    split = by_tokens_of(embedder)
    tokenizer = embedder.tokenizer.stock
    text = "play music from the command line"
    ids = [str(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert split([text, ""], "document") == [ids, []]
    assert split([text], "query") == [ids[:3]], "cut where the model cuts, with both special tokens"
    unknown = tokenizer(f"{text} \u2603", add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id in unknown
    assert split([f"{text} \u2603"], "document") == [ids]


def test_bm25_by_tokens_finds_parts_of_words(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    examples = [Example(t.split()[1].strip(",") + "s", (t,)) for t in SENTENCES]
    tails = RetrievalSet.from_examples(examples)
    by_tokens = measure_bm25(tails, by_tokens_of(embedder)).mean("ndcg@10")
    assert measure_bm25(tails).mean("ndcg@10") == 0 < by_tokens


def test_every_way_to_rank_leaves_the_own_document_out(of_all_kinds):
    """Each query's own document would be first, and its neighbour, the one judged, second."""
    texts = tuple(f"{text} {more}" for text in SENTENCES[:6] for more in ("", "and more"))
    ids = tuple(f"{name}{row}" for row in range(6) for name in "ab")
    data = RetrievalSet(
        "own",
        texts[::2],
        ids[::2],
        texts,
        ids,
        Judgements.of([{2 * row + 1: 1} for row in range(6)]),
    )
    own = np.arange(6) * 2
    found = [measure(of_all_kinds, data).result, measure_bm25(data)]
    found += measure_kinds(of_all_kinds, data).results.values()
    for protocol in ("paper", "reference"):
        found += measure_kinds(of_all_kinds, data, protocol=protocol).results.values()
    found += [each.result for each in retention(of_all_kinds, data, dims=(32,))]
    assert len(found) > 20
    for each in found:
        assert not (each.hits.rows == own[:, None]).any()
    assert found[1].mean("mrr@10") == 1
    some = dev_candidates(of_all_kinds, data, tasks=(), kinds=("dense", "sparse"), depth=3)
    shared = replace(data, document_ids=tuple(f"d{row}" for row in range(12)))
    other = tune(shared, some, folds=2)
    assert tune(data, some, folds=2).scores["usual"].mean() > other.scores["usual"].mean()
