import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tercet.errors import MissingExtraError
from tercet.evaluate.suites.mteb_encoder import About, MtebModel

ABOUT = About("runs/mine/model", "f00", 1_000, 512, 4, {"query": "query: "})


@pytest.fixture
def asked():
    """What the model was asked for."""
    return []


@pytest.fixture
def model(asked):
    pytest.importorskip("mteb")

    def encode(texts, role, task):
        asked.append((texts, role, task))
        return np.arange(4.0 * len(texts), dtype=np.float32).reshape(len(texts), 4)

    return MtebModel(encode, ABOUT)


@pytest.mark.parametrize(
    ("kind", "role"), [("query", "query"), ("document", "document"), (None, "query")]
)
def test_texts_of_all_batches_are_encoded_at_once_as_what_they_are(model, asked, kind, role):
    from mteb.types import PromptType

    batches = [{"text": ["a", "b"]}, {"text": ["c"]}]
    found = model.encode(
        batches,
        task_metadata=SimpleNamespace(name="SciFact"),
        hf_split="test",
        hf_subset="default",
        prompt_type=None if kind is None else PromptType(kind),
        batch_size=2,
    )
    assert asked == [(["a", "b", "c"], role, "SciFact")] and found.shape == (3, 4)


def test_similarity_is_the_inner_product(model):
    one, two = np.eye(3, 4), np.arange(8.0).reshape(2, 4)
    np.testing.assert_allclose(model.similarity(one, two), one @ two.T)
    np.testing.assert_allclose(model.similarity_pairwise(one[:2], two), (one[:2] * two).sum(1))


def test_mteb_takes_it_for_an_encoder_and_writes_down_what_it_is(model):
    from mteb.models import CrossEncoderProtocol, EncoderProtocol, SearchProtocol

    assert isinstance(model, EncoderProtocol)
    assert not isinstance(model, SearchProtocol | CrossEncoderProtocol)
    meta = model.mteb_model_meta
    assert (meta.name, meta.revision) == ("tercet/runs_mine_model", "f00")
    assert (meta.max_tokens, meta.embed_dim, meta.use_instructions) == (512, 4, True)


def test_without_mteb_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb.models", None)
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tercet\[mteb\]'"):
        MtebModel(lambda texts, role, task: np.zeros((len(texts), 4)), ABOUT)
