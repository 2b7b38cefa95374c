import numpy as np
import pytest

from tercet.data.batches.masking import Masking, add_mask_token, mask_id
from tercet.errors import ModelError, RecipeError
from tests.toy import byte_bpe, wordpiece

TOKENS, MASK, VOCABULARY = 1_000_000, 7, 5_000


def masked(masking: Masking):
    rng = np.random.default_rng(0)
    ids = rng.integers(100, VOCABULARY, TOKENS)
    allowed = rng.random(TOKENS) < 0.9
    return ids, allowed, *masking(ids, allowed, rng, mask=MASK, vocabulary=VOCABULARY)


@pytest.mark.parametrize("probability", [0.2, 0.8])
def test_of_the_chosen_tokens_80_percent_are_masked_10_random_and_10_kept(probability):
    ids, allowed, gaps, chosen = masked(Masking(probability=probability))
    assert not chosen[~allowed].any()
    assert chosen[allowed].mean() == pytest.approx(probability, abs=0.002)
    assert (gaps == ids)[~chosen].all()
    assert (gaps == MASK)[chosen].mean() == pytest.approx(0.8, abs=0.004)
    assert (gaps == ids)[chosen].mean() == pytest.approx(0.1, abs=0.004)
    drawn = gaps[chosen & (gaps != MASK) & (gaps != ids)]
    assert len(drawn) / chosen.sum() == pytest.approx(0.1, abs=0.004)
    assert drawn.min() < 20 and drawn.max() > VOCABULARY - 20


def test_all_masks_every_chosen_token():
    ids, _, gaps, chosen = masked(Masking(probability=0.5, kind="all"))
    assert (gaps[chosen] == MASK).all() and (gaps[~chosen] == ids[~chosen]).all()


@pytest.mark.parametrize("probability", [0.0, 1.0, -0.1, float("nan")])
def test_a_probability_that_masks_nothing_or_everything_is_refused(probability):
    with pytest.raises(RecipeError, match="must be between 0 and 1, got"):
        Masking(probability=probability)


def test_the_blank_is_the_bare_piece_of_the_vocabulary():
    tokenizer = byte_bpe()
    assert tokenizer.convert_ids_to_tokens(mask_id(tokenizer, "blank")) == "_"
    assert tokenizer.mask_token is None
    assert mask_id(tokenizer, "eos") == tokenizer.eos_token_id


def test_a_mask_token_of_the_tokenizer_comes_first():
    tokenizer = wordpiece()
    for token in ("blank", "eos", "new"):
        assert mask_id(tokenizer, token) == tokenizer.convert_tokens_to_ids("[MASK]")
    assert not add_mask_token(tokenizer)


def test_a_new_mask_token_is_added_once():
    tokenizer = byte_bpe()
    size = len(tokenizer)
    with pytest.raises(ModelError, match="neither a mask token nor a mask token"):
        mask_id(tokenizer, "new")
    assert add_mask_token(tokenizer) and not add_mask_token(tokenizer)
    assert mask_id(tokenizer, "new") == size


def test_a_tokenizer_without_the_token_is_refused_with_the_alternatives():
    tokenizer = byte_bpe()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"nor an end-of-text token; .* blank, new"):
        mask_id(tokenizer, "eos")
