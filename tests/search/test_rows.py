"""Rows for search engines, each as its own documentation has them."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from tercet.models.formats.bge_m3_files import lexical_weights
from tercet.search.qdrant.points import uuid_of
from tercet.search.rows import HELD, EngineRow, binarised, json_line, lines_of, parts_of
from tercet.vectors import Terms, TokenRows, Vectors
from tests.evaluate.kinds import drawn

ROW = EngineRow("a/1", "play music", "Music", {"year": 2001})


def vectors() -> Vectors:
    """Two texts; the second one has no term and no token."""
    return Vectors(
        torch.tensor([[0.6, -0.8], [1.0, 0.0]]),
        Terms(torch.tensor([12, 3, 40]), torch.tensor([0.25, 0.5, 1e-9]), torch.tensor([0, 3, 3])),
        TokenRows(torch.tensor([[0.6, -0.8], [-1.0, 0.0]]), torch.tensor([0, 2, 2])),
    )


def written(form) -> list[list]:
    parts = parts_of(form, vectors().only(HELD[form]))
    return [[json.loads(line) for line in lines_of(form, ROW, each)] for each in parts]


@pytest.mark.parametrize("form", ["elasticsearch", "opensearch"])
def test_bulk_rows_are_an_action_and_a_document_with_rank_features_above_zero(form):
    full, bare = written(form)
    about = {"year": 2001, "title": "Music", "text": "play music"}
    multi = {"multi": [[0.6, -0.8], [-1.0, 0.0]]} if form == "elasticsearch" else {}
    assert full[0] == {"index": {"_id": "a/1"}} and full[0] == bare[0]
    # The weight of token 40 is rounded to zero, which a rank feature cannot be.
    assert full[1] == about | {"dense": [0.6, -0.8], "sparse": {"3": 0.5, "12": 0.25}} | multi
    assert bare[1] == about | {"dense": [1.0, 0.0]}


def test_milvus_rows_have_every_field():
    (full,), (bare,) = written("milvus")
    about = {"id": "a/1", "title": "Music", "text": "play music", "year": 2001}
    assert full == about | {"dense": [0.6, -0.8], "sparse": {"3": 0.5, "12": 0.25}}
    assert bare == about | {"dense": [1.0, 0.0], "sparse": {}}
    (line,) = lines_of("milvus", EngineRow("b", "text"), {})
    assert json.loads(line) == {"id": "b", "title": "", "text": "text"}


def test_qdrant_points_have_named_vectors_and_the_id_of_our_own_indexes():
    (full,), (bare,) = written("qdrant")
    payload = {"id": "a/1", "year": 2001, "title": "Music", "text": "play music"}
    assert full == {
        "id": str(uuid_of("a/1")),
        "vector": {
            "dense": [0.6, -0.8],
            "sparse": {"indices": [3, 12], "values": [0.5, 0.25]},
            "multi": [[0.6, -0.8], [-1.0, 0.0]],
        },
        "payload": payload,
    }
    assert bare["vector"] == {"dense": [1.0, 0.0]}


def test_qdrants_own_client_takes_the_points():
    models = pytest.importorskip("qdrant_client").models
    for (row,) in written("qdrant"):
        point = models.PointStruct(**row)
        assert isinstance(point.vector, dict)
        assert set(point.vector) == set(row["vector"])


def test_vespa_puts_have_token_vectors_as_bits_in_hex():
    (full,), (bare,) = written("vespa")
    # 0.6 is above 0 and -0.8 is not: 10 000000; -1.0 and 0.0 are not: 00 000000
    assert full == {
        "put": "id:tercet:document::a/1",
        "fields": {
            "year": 2001,
            "title": "Music",
            "text": "play music",
            "dense": [0.6, -0.8],
            "sparse": {"3": 0.5, "12": 0.25},
            "multi": {"0": "80", "1": "00"},
        },
    }
    assert bare["fields"] == {
        "year": 2001, "title": "Music", "text": "play music", "dense": [1.0, 0.0]
    }  # fmt: skip


def test_a_thousand_floats_are_128_bytes_whose_bits_are_their_signs():
    values = torch.randn(3, 1024).numpy()
    packed = binarised(values)
    assert (packed.shape, packed.dtype) == ((3, 128), np.int8)
    bits = np.unpackbits(packed.view(np.uint8), axis=1)
    np.testing.assert_array_equal(bits, values > 0)
    assert binarised(values[:, :12]).shape == (3, 2)


@pytest.mark.parametrize("form", ["elasticsearch", "milvus", "vespa"])
def test_terms_are_the_lexical_weights_of_each_text(form):
    texts = drawn(5, seed=3, without_terms=(1,))
    assert texts.sparse is not None and texts.multi is not None
    parts = parts_of(form, texts.only(HELD[form]))
    for found, expected in zip(parts, lexical_weights(texts.sparse), strict=True):
        assert found.get("sparse", {}) == pytest.approx(expected, abs=1e-7)
    if form == "elasticsearch":
        for found, (low, high) in zip(parts, pairwise(texts.multi.offsets.tolist()), strict=True):
            np.testing.assert_allclose(found["multi"], texts.multi.vectors[low:high], atol=1e-7)


def test_numbers_that_json_cannot_say_are_no_line():
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_line({"dense": [float("nan")]})
