"""The demo on a tiny model, and what its numbers are worth."""

import shlex

import httpx2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tercet.errors import DataError
from tercet.evaluate.measures.retrieval import measure
from tercet.evaluate.sets.retrieval_set import RetrievalSet
from tercet.files.console import results
from tercet.models.embedder import Embedder
from tercet.studies import demo
from tests.serving import command
from tests.toy import SENTENCES


@pytest.fixture
def packages(tmp_path):
    rows = [
        {
            "id": f"p{i}{split}",
            "short": f"{text} {i}",
            "long": f"{text} in {i} {split}",
            "split": split,
        }
        for split in ("train", "dev", "test")
        for i in range(6)
        for text in SENTENCES
    ]
    for number, row in enumerate(rows):
        row["id"] += str(number)
        row["section"] = ("web", "sound")[number % 2]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "packages.parquet")
    return tmp_path / "packages.parquet"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_trains_measures_searches_and_reports(
    packages, encoder_folder, tmp_path, monkeypatch, capsys, dtype
):
    monkeypatch.setattr(demo, "fastest_type", lambda model, device, say: dtype)
    monkeypatch.setattr(demo, "BASE", str(encoder_folder))
    said = []
    out = tmp_path / "run"
    demo.run_demo(out, packages, steps=3, seed=0, console=results(), say=said.append)
    screen = capsys.readouterr().out
    for expected in ("BM25", "before", "after", "after - before", "ndcg@10", "train finetune"):
        assert expected in screen
    page = (out / "report.html").read_text()
    assert "<svg" in page and "http-equiv" not in page and 'src="http' not in page
    assert (out / "model/tercet.json").exists() and (out / "index/index.json").exists()
    assert (out / "data/test.jsonl").exists()
    line = screen.rstrip().splitlines()[-1]
    assert line.endswith(f"serve --index {out}/index")
    with command(*shlex.split(line)[2:]) as running:
        asked = {"query": "a small web server", "k": 3}
        found = httpx2.post(f"{running.url}/v1/search", json=asked).raise_for_status().json()
        assert len(found["results"][0]["hits"]) == 3


def test_the_demo_says_where_its_data_should_be(tmp_path):
    with pytest.raises(DataError, match="run the demo in a checkout"):
        demo.run_demo(tmp_path, tmp_path / "no", steps=1, seed=0, console=results(), say=print)


@pytest.mark.slow
def test_our_ndcg_equals_that_of_sentence_transformers_to_4_digits(tmp_path):
    """A saved model measured by the peer's own evaluator, on real texts."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import (
        InformationRetrievalEvaluator,
    )

    rows = pq.read_table("examples/data/packages.en.parquet").to_pylist()
    chosen = [row for row in rows if row["split"] == "test"][:200]
    data = RetrievalSet.from_examples(demo._examples(chosen, "test"), "test")
    embedder = Embedder.load("minilm")
    embedder.save(tmp_path / "model")
    ours = measure(embedder, data).result
    evaluator = InformationRetrievalEvaluator(
        queries=dict(zip(data.query_ids, data.queries, strict=True)),
        corpus=dict(zip(data.document_ids, data.documents, strict=True)),
        relevant_docs={
            query: {data.document_ids[doc]}
            for query, doc in zip(data.query_ids, data.judgements.docs.tolist(), strict=True)
        },
        name="debian",
    )
    theirs = evaluator(SentenceTransformer(str(tmp_path / "model"), device="cpu"))
    assert theirs["debian_cosine_ndcg@10"] == pytest.approx(ours.mean("ndcg@10"), abs=5e-5)
    assert theirs["debian_cosine_mrr@10"] == pytest.approx(ours.mean("mrr@10"), abs=5e-5)
    assert np.isfinite(ours.scores["map@100"]).all()
