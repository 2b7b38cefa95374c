import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tercet.errors import MissingExtraError, RecipeError
from tercet.evaluate.measures.retrieval import evaluate_retrieval
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.evaluate.suites.mteb import as_mteb, named_tasks, run_tasks
from tercet.models.embedder import Embedder
from tests.toy import SENTENCES

PROMPTS = {"query": "query: ", "document": ""}
QUERIES = {f"q{i}": " ".join(text.split()[-2:]) for i, text in enumerate(SENTENCES)}
DOCUMENTS = {f"d{i}": {"title": text[:9], "text": text} for i, text in enumerate(SENTENCES)}
GRADES = {f"q{i}": {f"d{i}": 2, f"d{(i + 3) % 12}": 1} for i in range(len(SENTENCES))}


def task_of(load):
    """A task of mteb whose data are loaded by this function."""
    mteb = pytest.importorskip("mteb")

    class Local(mteb.abstasks.AbsTaskRetrieval):
        metadata = mteb.TaskMetadata(
            name="TercetLocal",
            description="sentences",
            dataset={"path": "tercet/local", "revision": "1"},
            type="Retrieval",
            category="t2t",
            modalities=["text"],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            prompt={"query": "mteb's own instruction"},
        )

        def load_data(self, *_args, **_kwargs):
            load(self)
            self.data_loaded = True

    return Local()


def local(task):
    task.queries = {"test": QUERIES}
    task.corpus = {"test": DOCUMENTS}
    task.relevant_docs = {"test": GRADES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same data as a folder of BEIR."""
    folder = tmp_path_factory.mktemp("beir")
    for name, records in (
        ("corpus", [{"_id": i, **it} for i, it in DOCUMENTS.items()]),
        ("queries", [{"_id": i, "text": text} for i, text in QUERIES.items()]),
        (
            "qrels",
            [
                {"qid": q, "docid": d, "score": grade}
                for q, row in GRADES.items()
                for d, grade in row.items()
            ],
        ),
    ):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def test_a_task_of_mteb_gives_the_figures_that_ours_gives_with_prompts_once(folder, encoder_folder):
    embedder = Embedder.load(encoder_folder, prompts=PROMPTS)
    (found,) = run_tasks(as_mteb(embedder, "toy"), [task_of(local)])
    data = RetrievalSet.from_folder(folder)
    sides = embedder.encode(data.queries, "query"), embedder.encode(data.documents, "document")
    ours = evaluate_retrieval(data, *sides)
    assert found.score == pytest.approx(ours.mean("ndcg@10"), abs=1e-5)  # mteb rounds
    assert dict(found.more)["recall@100"] == pytest.approx(ours.mean("recall@100"), abs=1e-5)
    assert (found.task, found.part, found.split) == ("TercetLocal", "default", "test")
    assert (found.figure, found.languages, found.revision) == ("ndcg_at_10", ("eng-Latn",), "1")
    bare = Embedder.load(encoder_folder)
    unprompted = evaluate_retrieval(
        data, bare.encode(data.queries), bare.encode(data.documents)
    ).mean("ndcg@10")
    assert abs(found.score - unprompted) > 0.001  # so that the test sees the prompts


def test_vectors_are_cut_where_that_is_asked_for(encoder_folder):
    embedder = Embedder.load(encoder_folder)
    model = as_mteb(embedder, "toy", dims=8)
    batch = [{"text": list(SENTENCES)}]
    found = model.encode(batch, task_metadata=task_of(local).metadata)
    np.testing.assert_array_equal(found, embedder.encode(SENTENCES, "query", dims=8))


def test_a_task_whose_name_the_model_knows_gets_the_prompts_of_it(encoder_folder):
    embedder = Embedder.load(encoder_folder, task_prompts={"TercetLocal": {"query": "find: "}})
    model = as_mteb(embedder, "toy")
    found = model.encode([{"text": ["maps"]}], task_metadata=task_of(local).metadata)
    np.testing.assert_array_equal(found, embedder.encode(["maps"], "query", task="TercetLocal"))
    other = Embedder.load(encoder_folder, task_prompts={"other": {"query": "find: "}})
    with pytest.raises(RecipeError, match="TercetLocal: a query gets no prompt"):
        next(run_tasks(as_mteb(other, "toy"), [task_of(local)]))


def test_tasks_are_skipped_where_the_hub_cannot_be_reached(encoder_folder, monkeypatch):
    asked = []

    def away(task):
        asked.append(task)
        raise ConnectionError("Couldn't reach 'tercet/local' on the Hub\nmore")

    model = as_mteb(Embedder.load(encoder_folder), "toy")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    found = list(run_tasks(model, [task_of(away), task_of(local)]))
    said = "the hub cannot be reached (Couldn't reach 'tercet/local' on the Hub)"
    assert [each.skipped for each in found] == [said, said] and len(asked) == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nobody waits: each is tried
    found = list(run_tasks(model, [task_of(away), task_of(local)]))
    assert [each.skipped for each in found] == [said, ""]


@pytest.mark.slow  # mteb imports all of its tasks for them
def test_presets_name_tasks_and_clef_is_told_apart():
    pytest.importorskip("mteb")
    (all_languages, some) = named_tasks(["miracl", "miracl-o"])
    assert len(all_languages.hf_subsets) == 18
    assert sorted(some.hf_subsets) == ["de", "en", "es", "fr"]
    assert len(named_tasks(["beir"])) == 15
    assert named_tasks(["SciFact"])[0].metadata.name == "SciFact"
    with pytest.raises(RecipeError, match=r"clef: mteb has no task .*convert your copy to BEIR's"):
        named_tasks(["clef"])


# --- the model that mteb sees -----------------------------------------------------------------


@pytest.fixture(scope="module")
def model(encoder_folder):
    pytest.importorskip("mteb")
    return as_mteb(Embedder.load(encoder_folder, prompts=PROMPTS), "runs/mine/model", dims=4)


@pytest.mark.parametrize(
    ("kind", "role"), [("query", "query"), ("document", "document"), (None, "query")]
)
def test_texts_of_all_batches_are_encoded_in_their_role(model, kind, role):
    from mteb.types import PromptType

    found = model.encode(
        [{"text": ["a", "b"]}, {"text": ["c"]}],
        task_metadata=SimpleNamespace(name="SciFact"),
        hf_split="test",
        hf_subset="default",
        prompt_type=None if kind is None else PromptType(kind),
        batch_size=2,
    )
    np.testing.assert_array_equal(found, model.embedder.encode(["a", "b", "c"], role, dims=4))


def test_similarity_is_the_inner_product(model):
    one, two = np.eye(3, 4), np.arange(8.0).reshape(2, 4)
    np.testing.assert_allclose(model.similarity(one, two), one @ two.T)
    np.testing.assert_allclose(model.similarity_pairwise(one[:2], two), (one[:2] * two).sum(1))


def test_mteb_takes_it_for_an_encoder_and_writes_down_what_it_is(model):
    from mteb.models import CrossEncoderProtocol, EncoderProtocol, SearchProtocol

    meta, embedder = model.mteb_model_meta, model.embedder
    assert isinstance(model, EncoderProtocol)
    assert not isinstance(model, SearchProtocol | CrossEncoderProtocol)
    assert (meta.name, meta.revision) == ("tercet/runs_mine_model", embedder.fingerprint())
    assert (meta.max_tokens, meta.embed_dim) == (embedder.settings.document_tokens, 4)
    assert meta.use_instructions


def test_without_mteb_the_error_names_what_to_install(monkeypatch, encoder_folder):
    monkeypatch.setitem(sys.modules, "mteb.models", None)
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tercet\[mteb\]'"):
        as_mteb(Embedder.load(encoder_folder), "toy")
