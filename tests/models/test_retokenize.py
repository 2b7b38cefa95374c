from pathlib import Path

import pytest
import torch

from tercet.errors import ModelError
from tercet.models.embedder import Embedder
from tercet.models.retokenize import with_tokenizer
from tests import toy


@pytest.fixture
def embedder(encoder_folder: Path) -> Embedder:
    return Embedder.load(encoder_folder)


def rows_of(embedder: Embedder) -> torch.Tensor:
    return embedder.backbone.model.get_input_embeddings().weight.detach()


def test_a_token_is_the_mean_of_the_pieces_that_the_old_tokenizer_makes_of_it(
    embedder: Embedder,
):
    old, before = embedder.tokenizer, rows_of(embedder).clone()
    made = with_tokenizer(embedder, toy.byte_bpe())
    stock = made.tokenizer.stock
    assert len(rows_of(made)) == len(stock)
    for number in range(3, len(stock)):  # after the special ones
        pieces = old.bare([stock.decode([number])])[0].ids
        expected = before[pieces].mean(0) if pieces else before.mean(0)
        assert torch.allclose(rows_of(made)[number], expected, atol=1e-6), stock.decode([number])


def test_special_tokens_keep_the_rows_of_what_they_are_for(embedder: Embedder):
    before, old = rows_of(embedder).clone(), embedder.tokenizer.stock
    made = with_tokenizer(embedder, toy.byte_bpe())
    new = made.tokenizer.stock
    assert rows_of(made)[new.pad_token_id].equal(before[old.pad_token_id])
    assert rows_of(made)[new.bos_token_id].equal(before[old.cls_token_id])
    assert rows_of(made)[new.eos_token_id].equal(before[old.sep_token_id])


def test_its_own_tokenizer_changes_no_vector(embedder: Embedder, encoder_folder: Path):
    before = embedder.encode(list(toy.SENTENCES))
    same = Embedder.load(encoder_folder).tokenizer.stock
    after = with_tokenizer(embedder, same).encode(list(toy.SENTENCES))
    assert after == pytest.approx(before, abs=1e-6)


def test_such_a_model_is_saved_and_reads_the_same(embedder: Embedder, tmp_path: Path):
    made = with_tokenizer(embedder, toy.byte_bpe())
    made.save(tmp_path / "model")
    again = Embedder.load(tmp_path / "model")
    texts = list(toy.SENTENCES)
    assert again.encode(texts) == pytest.approx(made.encode(texts), abs=1e-6)


def test_rows_drawn_anew_spread_as_the_old_ones(embedder: Embedder):
    before = rows_of(embedder).clone()
    made = with_tokenizer(embedder, toy.byte_bpe(), rows="new")
    assert float(rows_of(made).std()) == pytest.approx(float(before.std()), rel=0.1)


def test_a_model_that_counts_positions_from_the_padding_id_refuses_another_one(tmp_path: Path):
    toy.save_model(tmp_path / "xlm", "xlm-roberta")  # its padding id is 1
    with pytest.raises(ModelError, match="must be 1; got 0"):
        with_tokenizer(Embedder.load(tmp_path / "xlm"), toy.byte_bpe())
