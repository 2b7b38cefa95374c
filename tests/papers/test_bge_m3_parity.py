"""BGE-M3 (arXiv 2402.03216): vectors, scores, losses and gradients of FlagEmbedding 1.4.2.

What it made of a tiny XLM-R is in ``tests/fixtures/flagembedding``; the script beside it
says how. Tests carry the ids of the traps that they are about: B1, B2, B15, B16.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tercet.data.batches.relation import Relation, relation_of
from tercet.errors import ModelError
from tercet.kinds import KINDS, Kind
from tercet.losses.unified import Mixture, unified_loss
from tercet.models.embedder import Embedder
from tercet.models.formats.bge_m3_files import lexical_weights
from tercet.rank.scoring import late_interaction, lexical_scores, scores_of
from tercet.segments import Packed
from tercet.types import InBatch
from tercet.vectors import TokenRows, Vectors
from tests.oracles import terms_of
from tests.rank.formulas import with_padded_rows
from tests.toy import pack

FIXTURE = Path(__file__).parents[1] / "fixtures/flagembedding"
MODEL = FIXTURE / "model"
RECORD = json.loads((FIXTURE / "recorded.json").read_text(encoding="utf-8"))
TEXTS: list[str] = RECORD["texts"]
TEMPERATURE = 0.02
THEIRS: dict[Kind, str] = {"dense": "dense", "sparse": "sparse", "multi": "colbert"}


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    with np.load(FIXTURE / "arrays.npz") as stored:
        return dict(stored)


def loaded(**how: Any) -> Embedder:
    limit = RECORD["max_tokens"]
    return Embedder.load(MODEL, query_tokens=limit, document_tokens=limit, **how)


@pytest.fixture(scope="module")
def vectors() -> Vectors:
    return loaded().encode_vectors(TEXTS)


def same_weights(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, abs=1e-5)


# ---- vectors -----------------------------------------------------------------------------------


def test_dense_vectors_are_the_references(vectors, arrays):
    assert vectors.dense is not None
    np.testing.assert_allclose(vectors.dense.numpy(), arrays["dense"], atol=1e-5)


def test_lexical_weights_are_the_references_and_can_be_written_as_json(vectors):
    assert vectors.sparse is not None
    ours = lexical_weights(vectors.sparse)
    same_weights(ours, RECORD["lexical_weights"])
    assert ours[TEXTS.index("")] == {}
    assert json.loads(json.dumps(ours)) == ours
    again = terms_of(ours)
    assert torch.equal(again.ids, vectors.sparse.ids)
    assert torch.equal(again.weights, vectors.sparse.weights)
    assert torch.equal(again.offsets, vectors.sparse.offsets)


def test_multi_vectors_are_the_references_and_an_empty_text_has_its_end_token(vectors, arrays):
    assert vectors.multi is not None
    assert vectors.multi.offsets.diff().tolist() == arrays["multi_lengths"].tolist()
    np.testing.assert_allclose(vectors.multi.vectors.numpy(), arrays["multi"], atol=1e-5)
    assert arrays["multi_lengths"][TEXTS.index("")] == 1


def test_a_query_stands_behind_its_instruction_as_in_the_reference(arrays):
    found = loaded(prompts={"query": RECORD["instruction"]}).encode_vectors(TEXTS, "query")
    assert found.dense is not None and found.sparse is not None and found.multi is not None
    np.testing.assert_allclose(found.dense.numpy(), arrays["query_dense"], atol=1e-5)
    np.testing.assert_allclose(found.multi.vectors.numpy(), arrays["query_multi"], atol=1e-5)
    same_weights(lexical_weights(found.sparse), RECORD["query_lexical_weights"])


def test_without_an_instruction_nothing_stands_before_a_text_b16(vectors):
    embedder = loaded()
    for role in ("query", "document"):
        plain = embedder.tokenizer(TEXTS, RECORD["max_tokens"])
        told = embedder.tokenize(TEXTS, role)
        assert [a.tolist() for a in told.ids] == [b.tolist() for b in plain.ids]
    queries = embedder.encode_vectors(TEXTS, "query")
    for ours, same in zip(queries.tensors(), vectors.tensors(), strict=True):
        assert torch.equal(ours, same)


# ---- scores --------------------------------------------------------------------------------------


def sides(vectors: Vectors) -> tuple[Vectors, Vectors]:
    first, second = zip(*RECORD["pairs"], strict=True)
    return vectors.take(list(first)), vectors.take(list(second))


def test_the_score_of_each_kind_is_the_references_for_a_pair_alone(vectors):
    queries, documents = sides(vectors)
    for kind in KINDS:
        ours = scores_of(kind, queries, documents).diagonal()
        theirs = [scores[THEIRS[kind]][0] for scores in RECORD["scores_alone"]]
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5)


def test_sums_are_the_references_once_divided_by_their_weights(vectors):
    queries, documents = sides(vectors)
    dense, sparse, multi = (scores_of(kind, queries, documents).diagonal() for kind in KINDS)
    for_dense, for_sparse, for_multi = RECORD["weights"]
    both = dense * for_dense + sparse * for_sparse
    sums = {
        "sparse+dense": both / (for_dense + for_sparse),
        "colbert+sparse+dense": (both + multi * for_multi) / sum(RECORD["weights"]),
    }
    for name, ours in sums.items():
        theirs = [scores[name][0] for scores in RECORD["scores_alone"]]
        np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-5)


def test_rows_of_zeros_repeat_the_padding_of_the_references_batches_b2(vectors):
    """In a batch the reference lets rows of padding compete, and a pair's score changes."""
    queries, documents = sides(vectors)
    assert queries.multi is not None and documents.multi is not None
    exact = late_interaction(queries.multi, documents.multi).diagonal()
    padded = late_interaction(queries.multi, with_padded_rows(documents.multi)).diagonal()
    together = np.array(RECORD["scores"]["colbert"])
    alone = np.array([scores["colbert"][0] for scores in RECORD["scores_alone"]])
    np.testing.assert_allclose(padded.numpy(), together, atol=1e-5)
    np.testing.assert_allclose(exact.numpy(), alone, atol=1e-5)
    assert np.abs(together - alone).max() > 1e-3


def test_a_score_does_not_depend_on_the_documents_beside_it_b2():
    """Worked by hand: the only token of the document points away from the query."""
    query = TokenRows(torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1]))
    rows = torch.tensor([[-0.6, 0.8], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    alone = TokenRows(rows[:1], torch.tensor([0, 1]))
    beside = TokenRows(rows, torch.tensor([0, 1, 4]))
    assert late_interaction(query, alone).item() == pytest.approx(-0.6)
    assert late_interaction(query, beside)[0].tolist() == pytest.approx([-0.6, 0.0])
    padded = late_interaction(query, with_padded_rows(beside))[0]
    assert padded.tolist() == pytest.approx([0.0, 0.0])  # a row of zeros beats -0.6


# ---- training ------------------------------------------------------------------------------------


def batch(name: str) -> tuple[Packed, int, int]:
    """All texts in a row, queries first, how many those are, and documents of each."""
    texts = RECORD["batches"][name]
    ids = [torch.tensor(text) for text in (*texts["queries"], *texts["documents"])]
    queries, documents = len(texts["queries"]), len(texts["documents"])
    return pack(*ids), queries, documents // queries


def scores(embedder: Embedder, name: str, *, padded_rows: bool = False) -> dict[Kind, Tensor]:
    """Every query to every document, by each kind, over the temperature."""
    texts, queries, _ = batch(name)
    made = embedder.vectors(texts)
    assert made.dense is not None
    made = made.with_tensors([F.normalize(made.dense, dim=1), *made.tensors()[1:]])
    asked, found = made.take(slice(0, queries)), made.take(slice(queries, len(made)))
    assert asked.multi is not None and found.multi is not None
    docs = with_padded_rows(found.multi) if padded_rows else found.multi
    multi = late_interaction(asked.multi, docs)
    return {
        "dense": scores_of("dense", asked, found) / TEMPERATURE,
        "sparse": scores_of("sparse", asked, found) / TEMPERATURE,
        "multi": multi / TEMPERATURE,
    }


def by_formula(by_kind: dict[Kind, Tensor], group: int, *, distilled: bool) -> Tensor:
    """Equations 2 to 6, with the code's averages, from whole matrices."""
    dense, sparse, multi = (by_kind[kind] for kind in KINDS)
    together = dense + 0.3 * sparse + multi
    target = torch.arange(len(dense)) * group
    hard = [F.cross_entropy(each, target) for each in (dense, sparse, multi, together)]
    loss = (hard[0] + 0.1 * hard[1] + hard[2] + hard[3]) / 4
    if not distilled:
        return loss
    teacher = together.detach().softmax(1)
    soft = [-(teacher * each.log_softmax(1)).sum(1).mean() for each in (dense, sparse, multi)]
    return (loss + (soft[0] + 0.1 * soft[1] + soft[2]) / 3) / 2


def check_gradients(
    embedder: Embedder, name: str, arrays: dict[str, np.ndarray], *, rel: float = 1e-8
) -> None:
    """Both heads whole; of the backbone two numbers for each weight."""
    theirs = RECORD["training"][name]["gradients"]
    weights = dict(embedder.backbone.model.named_parameters())
    for weight, (norm, along) in theirs.items():
        gradient = weights[weight].grad
        assert gradient is not None, weight
        flat = gradient.flatten()
        # Where the sum is zero in exact arithmetic (a bias of keys), both have only rounding.
        assert float(flat.norm()) == pytest.approx(norm, rel=rel, abs=1e-10), weight
        cosines = torch.cos(torch.arange(len(flat), dtype=torch.float64))
        assert float(flat @ cosines) == pytest.approx(along, rel=rel, abs=rel * norm + 1e-9), weight
    for ours, part in (("multi", "colbert_linear"), ("sparse", "sparse_linear")):
        layer = getattr(embedder.heads, ours)
        for which in ("weight", "bias"):
            if f"{name}/{part}.{which}" in arrays:
                np.testing.assert_allclose(
                    getattr(layer, which).grad.numpy(),
                    arrays[f"{name}/{part}.{which}"],
                    rtol=rel,
                    atol=rel,
                )


@pytest.mark.parametrize(
    ("name", "padded"), [("plain", False), ("distilled", False), ("padded", True)]
)
def test_formula_over_our_scores_has_the_references_loss_and_gradients_b1(name, padded, arrays):
    """With texts of one length; and with padding, once its rows of zeros are repeated (B2)."""
    told = RECORD["training"][name]
    embedder = loaded(dtype=torch.float64)
    made = scores(embedder, told["case"]["batch"], padded_rows=padded)
    loss = by_formula(made, batch(told["case"]["batch"])[2], distilled=told["case"]["distill"])
    assert float(loss.detach()) == pytest.approx(told["loss"], rel=1e-10)
    loss.backward()
    check_gradients(embedder, name, arrays)


def relation(queries: int, group: int, in_batch: InBatch) -> Relation:
    """Of distinct texts: each query's first document is its positive, the others its negatives."""
    asked = [f"query {i}" for i in range(queries)]
    negatives = [tuple(f"negative {i} {j}" for j in range(group - 1)) for i in range(queries)]
    positives = [(f"positive {i}",) for i in range(queries)]
    return relation_of(asked, positives, negatives, in_batch=in_batch)


@pytest.mark.parametrize(
    ("name", "lesson", "kinds"),
    [
        ("plain", "kl", KINDS),
        ("distilled", "kl", KINDS),
        ("own group", "kl", ("dense",)),
        ("teacher, kl", "kl", KINDS),
        ("teacher, ranks", "listwise", KINDS),
    ],
)
def test_our_loss_is_the_references_and_so_are_its_gradients_b1(name, lesson, kinds, arrays):
    told = RECORD["training"][name]
    case = told["case"]
    embedder = loaded(dtype=torch.float64)
    texts, queries, group = batch(case["batch"])
    made = embedder.vectors(texts, kinds)
    own = relation(queries, group, "none" if case.get("own_group") else "all")
    losses = unified_loss(
        made.take(slice(0, queries)),
        made.take(slice(queries, len(texts))),
        own,
        Mixture(distilled=float(case["distill"]), distil=lesson),
        queries_of_all=queries,
        teacher=torch.tensor(case["teacher_scores"]) if "teacher_scores" in case else None,
        block=2,
    )
    # The reference computes a teacher's softmax in float32.
    digits = 1e-6 if "teacher_scores" in case else 1e-10
    assert float(losses["loss"].detach()) == pytest.approx(told["loss"], rel=digits)
    losses["loss"].backward()
    check_gradients(embedder, name, arrays, rel=digits * 100)


def test_without_padded_rows_the_loss_is_another_one_than_the_references_b2():
    told = RECORD["training"]["padded"]
    made = scores(loaded(dtype=torch.float64), "ragged")
    exact = by_formula(made, batch("ragged")[2], distilled=True)
    assert abs(float(exact.detach()) - told["loss"]) > 1e-4


# ---- folders -------------------------------------------------------------------------------------


def test_a_folder_is_the_same_after_a_round_trip_b15(tmp_path, vectors):
    embedder = loaded()
    assert embedder.kinds == KINDS
    assert (embedder.settings.pooling, embedder.settings.normalize) == ("first", True)
    assert embedder.settings.multi_dim == 24
    embedder.save(tmp_path / "saved")
    again = Embedder.load(tmp_path / "saved").encode_vectors(TEXTS)
    for ours, same in zip(again.tensors(), vectors.tensors(), strict=True):
        assert torch.equal(ours, same)
    for name in ("colbert_linear.pt", "sparse_linear.pt"):
        theirs, ours = (
            torch.load(folder / name, weights_only=True) for folder in (MODEL, tmp_path / "saved")
        )
        assert ours.keys() == theirs.keys() == {"weight", "bias"}
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_is_saved_has_the_names_that_the_reference_reads_b15(tmp_path):
    """A reader with transformers before release 5 finds the tokenizer's class, and the weights."""
    loaded().save(tmp_path / "saved")
    stored, theirs = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "saved", MODEL)
    )
    missing = {name for name in theirs if not name.startswith("pooler.")} - stored.keys()
    assert not missing
    said = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("missing", ["colbert_linear.pt", "sparse_linear.pt"])
def test_a_missing_head_is_an_error_and_never_drawn_b15(tmp_path, missing, vectors):
    folder = shutil.copytree(MODEL, tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=missing):
        Embedder.load(folder)
    limit = RECORD["max_tokens"]
    dense = Embedder.load(folder, kinds=("dense",), document_tokens=limit).encode_vectors(TEXTS)
    assert dense.kinds == ("dense",)
    assert dense.dense is not None and vectors.dense is not None
    assert torch.equal(dense.dense, vectors.dense)


def test_recorded_weights_score_as_the_references_own_function_does(vectors):
    """A plain double loop over the mappings, as in the reference."""
    mappings = RECORD["lexical_weights"]
    expected = [[sum(a[t] * b[t] for t in a if t in b) for b in mappings] for a in mappings]
    found = lexical_scores(terms_of(mappings), terms_of(mappings))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
