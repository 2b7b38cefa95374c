import json
import logging
from dataclasses import replace

import pytest
import torch
import transformers as t

from tercet.errors import ModelError, RecipeError
from tercet.models.embedder import Embedder
from tercet.models.network.backbone import Backbone
from tercet.models.network.positions import extend_positions
from tests.toy import DECODERS, ENCODERS, SENTENCES, pack, random_model, random_texts, save_model

OFFSETS = {"bert": 0, "xlm-roberta": 2}  # slots that no token uses


def backbone_of(kind: str) -> Backbone:
    return Backbone(random_model({**ENCODERS, **DECODERS}[kind])).eval()


def table_of(backbone: Backbone) -> torch.Tensor:
    return backbone.model.embeddings.position_embeddings.weight.detach()


@pytest.mark.parametrize("kind", OFFSETS)
def test_new_places_are_the_old_ones_from_the_first_again(kind):
    backbone, unused = backbone_of(kind), OFFSETS[kind]
    old = table_of(backbone).clone()
    before = backbone.max_tokens
    extend_positions(backbone, 300, fill="cyclic")
    table = table_of(backbone)
    assert len(table) == 300 + unused and before == 128 - unused
    assert torch.equal(table[: len(old)], old)
    for place in (before, before + 7, 2 * before + 3):
        assert torch.equal(table[unused + place], old[unused + place % before])


@pytest.mark.parametrize("kind", OFFSETS)
def test_stretched_places_keep_both_ends_and_run_between_neighbours(kind):
    backbone, unused = backbone_of(kind), OFFSETS[kind]
    old = table_of(backbone).clone()
    before, count = backbone.max_tokens, 300
    extend_positions(backbone, count, fill="interpolated")
    table = table_of(backbone)
    assert torch.equal(table[:unused], old[:unused])
    for place in range(count):
        exact = place * (before - 1) / (count - 1)
        low = min(int(exact), before - 2)
        share = exact - low
        expected = (1 - share) * old[unused + low] + share * old[unused + low + 1]
        torch.testing.assert_close(table[unused + place], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", OFFSETS)
def test_short_texts_have_the_states_they_had(kind):
    backbone = backbone_of(kind)
    texts = pack(*random_texts(20, 7, 126))
    before = backbone(texts)
    extend_positions(backbone, 300)
    assert torch.equal(backbone(texts), before)


@pytest.mark.parametrize("kind", OFFSETS)
def test_the_limit_is_stated_and_kept(kind):
    backbone = backbone_of(kind)
    extend_positions(backbone, 300)
    assert backbone.max_tokens == 300
    assert backbone.config.max_position_embeddings == 300 + OFFSETS[kind]
    (text,) = random_texts(300)
    assert backbone(pack(text)).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        backbone(pack(torch.cat([text, text[:1]])))


@pytest.mark.parametrize("kind", OFFSETS)
@pytest.mark.parametrize("fill", ["cyclic", "interpolated"])
def test_a_saved_folder_is_read_by_transformers_and_by_us(kind, fill, tmp_path, caplog):
    embedder = Embedder.load(save_model(tmp_path / "base", kind))
    extend_positions(embedder.backbone, 200, fill=fill)
    embedder.settings = replace(embedder.settings, document_tokens=200)
    embedder.save(tmp_path / "long")
    long, longer = " ".join(SENTENCES * 3)[:700], " ".join(SENTENCES * 9)
    lengths = embedder.tokenizer([long, longer], 5_000).lengths
    assert 128 < lengths[0] < 200 < lengths[1]
    loaded = Embedder.load(tmp_path / "long")
    assert loaded.backbone.max_tokens == 200
    with caplog.at_level(logging.WARNING, logger="tercet"):
        vectors = loaded.encode([long, longer])
    assert "1 of 2 document texts were cut to 200 tokens" in caplog.text
    assert (vectors == embedder.encode([long, longer])).all()

    model = t.AutoModel.from_pretrained(tmp_path / "long").eval()
    ids = torch.from_numpy(loaded.tokenizer([long], 200).ids[0]).long()
    with torch.no_grad():
        theirs = model(input_ids=ids[None]).last_hidden_state[0]
        ours = loaded.backbone(pack(ids))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (
        json.loads((tmp_path / "long" / "config.json").read_text())["max_position_embeddings"]
        == 200 + OFFSETS[kind]
    )


def test_a_longer_table_is_trained():
    backbone = backbone_of("bert").train()
    extend_positions(backbone, 300)
    backbone(pack(*random_texts(250))).square().sum().backward()
    gradient = backbone.model.embeddings.position_embeddings.weight.grad
    assert gradient[:250].any(1).all() and not gradient[250:].any()


def test_a_frozen_table_stays_frozen():
    backbone = backbone_of("bert")
    backbone.model.requires_grad_(False)
    extend_positions(backbone, 300)
    assert not any(weight.requires_grad for weight in backbone.parameters())


def test_a_table_without_positions_to_spare_or_none_at_all_is_refused():
    with pytest.raises(RecipeError, match="must be above the present 128; got"):
        extend_positions(backbone_of("bert"), 128)
    for kind in ("modernbert", "llama"):
        with pytest.raises(ModelError, match="no table of positions to extend"):
            extend_positions(backbone_of(kind), 500)
