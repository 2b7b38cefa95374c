import numpy as np
import pytest

from tercet.errors import RecipeError
from tercet.evaluate.embedders import dev_score, measure, measure_bm25
from tercet.evaluate.retrieval import RetrievalSet, evaluate_retrieval
from tercet.nn.embedder import Embedder
from tercet.types import Example
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
    named = RetrievalSet(name, *(getattr(data, field) for field in data.__slots__[1:]))
    seen = []
    encode = embedder.encode
    monkeypatch.setattr(
        embedder, "encode", lambda *a, task, **k: (seen.append(task), encode(*a, task=task, **k))[1]
    )
    assert dev_score(named, task)(embedder) == result.mean("ndcg@10")
    assert seen == [used, used]


def test_bm25_needs_no_model(data):
    assert measure_bm25(data).mean("ndcg@10") > 0.9
