import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tercet.data.batches.collate import Collator
from tercet.data.batches.sampler import BatchRows
from tercet.data.files.texts import open_texts
from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks, own_random_state
from tercet.objectives.simcse import SimCSE
from tests.toy import SENTENCES, pack


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join([*SENTENCES, SENTENCES[0]]) + "\n")  # one of them twice
    return open_texts(path)


def at_work(folder, source, objective=None, **settings):
    embedder = Embedder.load(folder, attention="bidirectional", **settings)
    collate = Collator(tokenize=embedder.tokenize, prompt_of=lambda role, task: "find: ")
    return embedder, (objective or SimCSE()).start(embedder, [source], collate)


def batch_of(work, *chosen):
    return work.batch(BatchRows(np.zeros(len(chosen), np.int16), np.array(chosen)), [0])


def test_both_views_are_the_text_without_a_prompt_and_no_text_is_its_own_negative(
    decoder_folder, source
):
    embedder, work = at_work(decoder_folder, source)
    batch = batch_of(work, 0, 3, 12)
    assert batch.texts.lengths[:3] == batch.texts.lengths[3:]
    (alone,) = embedder.tokenizer([SENTENCES[0]], 128).ids
    assert batch.texts.ids[: len(alone)].tolist() == alone.tolist()
    # Rows 0 and 12 are one text: neither is the other's negative.
    assert batch.relation.rows(0, 3).tolist() == [[1, -1, 0], [-1, 1, -1], [0, -1, 1]]


def test_two_views_differ_in_training_and_are_equal_without(decoder_folder, source):
    embedder, work = at_work(decoder_folder, source)
    texts = batch_of(work, 0, 3, 5).texts
    with torch.no_grad():
        first, second = embedder.train()(texts).chunk(2)
        assert (F.cosine_similarity(first, second) < 0.9999).all()
        first, second = embedder.eval()(texts).chunk(2)
        torch.testing.assert_close(first, second)
    work.finish()
    with torch.no_grad():
        first, second = embedder.train()(texts).chunk(2)
    torch.testing.assert_close(first, second)


def test_a_view_hangs_on_its_own_mask_and_not_on_its_neighbours(decoder_folder, source):
    """With the mask of a text fixed, whatever stands beside it changes nothing."""
    embedder, work = at_work(decoder_folder, source)
    texts = batch_of(work, 0, 3, 5).texts
    alone = texts.take([0])
    embedder.train()

    def view(row):
        torch.manual_seed(5)
        with torch.no_grad():
            return embedder(row)[0]

    # The longest text comes first inside, so its mask is the first to be drawn; in the model below
    # one layer makes it the only one.
    longest = int(np.argmax(texts.lengths[:3]))
    embedder.backbone.model.layers = embedder.backbone.model.layers[:1]
    others = [i for i in range(3) if i != longest and texts.lengths[i] < texts.lengths[longest]]
    torch.testing.assert_close(view(texts.take([longest])), view(texts.take([longest, *others])))
    assert not torch.allclose(view(alone), embedder.eval()(alone)[0])


def test_the_vector_without_dropout_is_that_of_the_text_alone(decoder_folder, source):
    embedder, work = at_work(decoder_folder, source)
    texts = batch_of(work, *range(13)).texts
    embedder.eval()
    with torch.no_grad():
        together = embedder(texts)
        for i, length in enumerate(texts.lengths):
            start = int(texts.offsets[i])
            alone = embedder(pack(texts.ids[start : start + length]))
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_the_loss_is_that_of_the_paper(decoder_folder, source):
    """Cross entropy of scaled cosines with the own second view as the answer."""
    embedder, work = at_work(decoder_folder, source)
    batch = batch_of(work, 0, 3, 5, 7)
    embedder.train()
    loss = work.backward(batch, Chunks(1_000, seed=4))["loss"]
    order = sorted(range(8), key=lambda i: -batch.texts.lengths[i])
    with torch.no_grad(), own_random_state(batch.texts, 4, 0):
        vectors = embedder(batch.texts.take(order))
    first, second = F.normalize(vectors[np.argsort(order).tolist()], dim=1).chunk(2)
    expected = F.cross_entropy(20 * first @ second.T, torch.arange(4))
    torch.testing.assert_close(loss, expected)


def test_long_texts_are_cut_to_its_own_length(decoder_folder, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("\n".join([" ".join(SENTENCES)] * 2 + list(SENTENCES)) + "\n")
    _, work = at_work(decoder_folder, open_texts(path), SimCSE(max_tokens=16))
    batch = batch_of(work, 0, 2)
    assert batch.texts.lengths[0] == 16 and batch.truncated >= 2


def test_a_model_whose_views_are_equal_is_refused(decoder_folder, source):
    with pytest.raises(RecipeError, match="raise attention_dropout above 0"):
        at_work(decoder_folder, source, SimCSE(attention_dropout=0.0))


def test_an_encoder_with_dropout_of_its_own_will_do(encoder_folder, source):
    embedder, work = at_work(encoder_folder, source, SimCSE(attention_dropout=0.0))
    assert embedder.backbone.attention_dropout == 0.0
    work.finish()


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ({"attention_dropout": 1.0}, "attention_dropout is 1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"max_tokens": 3}, "max_tokens is 3"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(numbers, problem):
    with pytest.raises(RecipeError, match=problem):
        SimCSE(**numbers)
