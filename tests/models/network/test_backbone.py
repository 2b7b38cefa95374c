from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from transformers import AttentionInterface

from tercet.errors import ModelError
from tercet.models.embedder import Embedder
from tercet.models.network.attention import NAME
from tercet.models.network.backbone import Backbone, probe
from tests.toy import DECODERS, ENCODERS, byte_bpe, pack, random_model, random_texts, save_model

CASES: list[tuple[str, Any]] = [
    (name, way) for name in DECODERS for way in ("causal", "bidirectional")
]
CASES += [(name, "bidirectional") for name in ENCODERS]
LENGTHS = (7, 31, 13, 1, 31, 5)


def one_at_a_time(backbone, texts):
    """The states of each text alone, by transformers' own attention."""
    backbone.model.set_attn_implementation("eager")
    states = [backbone.model(input_ids=text[None]).last_hidden_state[0] for text in texts]
    backbone.model.set_attn_implementation(NAME)
    return torch.cat(states)


@pytest.mark.parametrize(("name", "way"), CASES)
@torch.no_grad()
def test_packed_states_equal_those_of_one_text_at_a_time(name, way):
    backbone = Backbone(random_model({**DECODERS, **ENCODERS}[name]), attention=way)
    texts = random_texts(*LENGTHS)  # longer than the windows of 4 and 8
    expected = one_at_a_time(backbone, texts)
    torch.testing.assert_close(backbone(pack(*texts)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "way"), CASES)
@torch.no_grad()
def test_neighbours_never_matter(name, way):
    backbone = Backbone(random_model({**DECODERS, **ENCODERS}[name]), attention=way)
    text, *others = random_texts(12, 30, 12, 3)
    alone = backbone(pack(text))
    between = backbone(pack(others[0], text, *others[1:]))[30:42]
    torch.testing.assert_close(between, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_the_last_token_reaches_the_first_only_both_ways(name):
    (text,) = random_texts(9)
    changed = text.clone()
    changed[-1] = (changed[-1] + 1) % 300
    ways: tuple[tuple[Any, bool], ...] = (("causal", False), ("bidirectional", True))
    for way, moves in ways:
        backbone = Backbone(random_model(DECODERS[name]), attention=way, window="full")
        difference = (backbone(pack(text)) - backbone(pack(changed)))[0].abs().max()
        assert (difference > 1e-4) == moves


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@torch.no_grad()
def test_a_kept_window_ends_where_stock_attention_ends_it(name):
    config = DECODERS[name]
    backbone = Backbone(random_model(config), attention="bidirectional", window="keep")
    texts = random_texts(40, 11)
    expected = one_at_a_time(backbone, texts)
    torch.testing.assert_close(backbone(pack(*texts)), expected, atol=1e-5, rtol=1e-5)
    opened = Backbone(random_model(config), attention="bidirectional", window="full")
    assert (opened(pack(*texts)) - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
@torch.no_grad()
def test_the_direction_survives_saving_and_a_plain_reload(name, tmp_path):
    folder = save_model(tmp_path / "base", name)
    backbone = Backbone.load(folder, attention="bidirectional")
    texts = random_texts(*LENGTHS)
    before = backbone(pack(*texts))
    backbone.model.save_pretrained(tmp_path / "saved")
    reloaded = Backbone.load(tmp_path / "saved", window=backbone.window)
    assert reloaded.attention == "bidirectional"
    assert (reloaded(pack(*texts)) - before).abs().max() == 0


@pytest.mark.parametrize("name", ["llama", "gemma3", "bert", "modernbert"])
def test_lora_trains_merges_and_reloads_in_its_direction(name, tmp_path):
    folder = save_model(tmp_path / "base", name)
    backbone = Backbone.load(folder, attention="bidirectional")
    texts = pack(*random_texts(*LENGTHS))
    base = backbone(texts).detach()
    backbone.add_lora(rank=4, alpha=8, dropout=0.0)
    weights = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    direction = torch.randn_like(base)
    for _ in range(2):  # the first step moves B only, which starts at zero
        optimizer.zero_grad()
        (backbone(texts) * direction).mean().backward()
        optimizer.step()
    trained = backbone(texts).detach()
    assert (trained - base).abs().max() > 1e-3
    backbone.merge_lora()
    assert not backbone.has_lora
    probe(backbone)
    merged = backbone(texts).detach()
    torch.testing.assert_close(merged, trained, atol=1e-5, rtol=1e-5)
    backbone.model.save_pretrained(tmp_path / "merged")
    reloaded = Backbone.load(tmp_path / "merged", window=backbone.window)
    torch.testing.assert_close(reloaded(texts), merged, atol=1e-6, rtol=1e-6)


def test_an_encoder_has_no_causal_form():
    with pytest.raises(ModelError, match="BertModel is an encoder"):
        Backbone(random_model(ENCODERS["bert"]), attention="causal")


def test_positions_of_roberta_start_behind_the_padding_id():
    backbone = Backbone(random_model(ENCODERS["xlm-roberta"]))
    assert backbone.position_offset == 2
    assert backbone.max_tokens == 126


def test_the_probe_refuses_a_model_that_is_causal_against_its_promise():
    backbone = Backbone(random_model(DECODERS["llama"]), attention="bidirectional")
    for module in backbone.modules():
        if isinstance(getattr(module, "is_causal", None), bool):
            module.is_causal = True  # pyright: ignore
    backbone.model.config.is_causal = True
    with pytest.raises(ModelError, match="must be bidirectional"):
        probe(backbone)


def test_the_probe_refuses_a_model_that_sees_ahead_against_its_promise():
    backbone = Backbone(random_model(DECODERS["llama"]), attention="bidirectional")
    backbone.attention = "causal"
    with pytest.raises(ModelError, match="must be causal"):
        probe(backbone)


def test_the_probe_refuses_positions_that_run_on_from_text_to_text():
    backbone = Backbone(random_model(ENCODERS["bert"]))
    backbone.position_offset = 3  # as if this were RoBERTa
    with pytest.raises(ModelError, match="differ from the model's own"):
        probe(backbone)


@pytest.mark.parametrize("kind", ["mpnet", "t5", "marian", "bloom"])
def test_a_model_whose_attention_cannot_be_replaced_is_refused(kind, caplog):
    import transformers as t

    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
    configs = {
        "mpnet": lambda: t.MPNetConfig(**small, intermediate_size=96),  # pyright: ignore
        "t5": lambda: t.T5Config(d_model=64, num_layers=2, num_heads=4, d_ff=96, vocab_size=300),
        "marian": lambda: t.MarianConfig(d_model=64, vocab_size=300, pad_token_id=0),
        "bloom": lambda: t.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=300),
    }
    with pytest.raises(ModelError, match=r"packed|attention"):
        probe(Backbone(random_model(configs[kind]())))


def test_a_folder_without_all_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "model", "bert")
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if "query" in name)
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing, such as"):
        Backbone.load(folder)


@pytest.mark.parametrize(
    ("lost", "problem"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "is it a complete transformers folder"),
    ],
)
def test_a_folder_without_a_file_is_refused(tmp_path, lost, problem):
    folder = save_model(tmp_path / "model", "bert")
    (folder / lost).unlink()
    with pytest.raises(ModelError, match=problem):
        Backbone.load(folder)


def test_an_unknown_name_says_what_is_known():
    with pytest.raises(ModelError, match="minilm"):
        Backbone.load("no-such-model")


@pytest.mark.parametrize("kind", ["llama", "gemma3", "phi3"])
def test_a_turned_copy_reads_the_other_way_and_shares_the_weights(kind):
    texts = pack(*random_texts(9, 5))
    causal = Backbone(random_model(DECODERS[kind]), attention="causal")
    both_ways = Backbone(random_model(DECODERS[kind]), attention="bidirectional", window="keep")
    with torch.no_grad():
        before, other = causal(texts), both_ways(texts)
        turned = causal.turned("bidirectional")
        torch.testing.assert_close(turned(texts), other)
        torch.testing.assert_close(both_ways.turned("causal")(texts), before)
        torch.testing.assert_close(causal(texts), before, rtol=0, atol=0)
        for weight in causal.parameters():
            weight.mul_(0.9)
        assert (turned(texts) - other).abs().max() > 0.01
    assert causal.config.is_causal and not turned.config.is_causal
    assert all(map(lambda a, b: a is b, causal.parameters(), turned.parameters()))


def test_an_encoder_has_no_causal_form_to_read():
    encoder = Backbone(random_model(ENCODERS["bert"]))
    with pytest.raises(ModelError, match="is an encoder"):
        encoder.turned("causal")
    assert encoder.turned("bidirectional").attention == "bidirectional"


LONGROPE: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4} | {
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 20,
}


def test_rotary_positions_never_depend_on_a_longer_text_of_the_batch(tmp_path):
    """They would for all texts, if one were longer than the original limit."""
    config = t.Phi3Config(**{**DECODERS["phi3"].to_dict(), "rope_parameters": LONGROPE})
    config.original_max_position_embeddings = 20
    random_model(config).save_pretrained(tmp_path)
    byte_bpe().save_pretrained(tmp_path)
    embedder = Embedder.load(tmp_path)
    assert embedder.backbone.max_tokens == embedder.settings.document_tokens == 20
    short, long = "play music", "a compiler for the language of the moon " * 9
    alone, together = embedder.encode([short]), embedder.encode([short, long])
    np.testing.assert_allclose(together[:1], alone, atol=1e-6)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert Backbone(random_model(config)).max_tokens == 20
    assert Backbone(random_model(DECODERS["phi3"])).max_tokens == 128


def test_layer_states_begin_with_the_embeddings_and_end_with_the_last_states():
    backbone = Backbone(random_model(DECODERS["llama"]))
    texts = pack(*random_texts(3, 9, 5))
    with torch.no_grad():
        states = backbone.layer_states(texts)
        assert states.shape == (4, 17, 64)
        torch.testing.assert_close(states[-1], backbone(texts))
        torch.testing.assert_close(states[0], backbone.model.embed_tokens(texts.ids))


def test_attention_dropout_is_raised_in_training_alone():
    backbone = Backbone(random_model(DECODERS["llama"]), attention="bidirectional")
    texts = pack(*random_texts(9, 5))
    with torch.no_grad():
        plain = backbone.train()(texts)
        backbone.attention_dropout = 0.3
        assert not torch.equal(backbone(texts), backbone(texts))
        torch.testing.assert_close(backbone.eval()(texts), plain)


def test_a_decoder_that_does_not_turn_is_refused_when_it_is_read_both_ways(monkeypatch):
    backbone = Backbone(random_model(DECODERS["llama"]))
    with monkeypatch.context() as patch:
        patch.setattr("tercet.models.network.backbone._set_direction", lambda *_: None)
        with pytest.raises(ModelError, match="must be bidirectional"):
            backbone.turned("bidirectional")
    assert backbone.turned("bidirectional").attention == "bidirectional"


def test_attention_in_chunks_is_refused():
    config = t.AutoConfig.for_model(
        "llama4_text",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=300,
        attention_chunk_size=8,
    )
    with pytest.raises(ModelError, match="attends in chunks"):
        Backbone(t.AutoModel.from_config(config))


def test_rounding_alone_does_not_fail_the_probe_in_bfloat16(monkeypatch):
    """A deep model whose states two stock implementations give 5 % and more apart."""
    config = t.LlamaConfig(**{**DECODERS["llama"].to_dict(), "num_hidden_layers": 24})
    model = random_model(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.8)
    backbone = Backbone(model.to(torch.bfloat16), attention="bidirectional")
    probe(backbone)
    attend = AttentionInterface._global_mapping[NAME]

    def wrong(*args, scaling, **options):
        return attend(*args, scaling=0.1 * scaling, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, wrong)
    with pytest.raises(ModelError, match="packed states differ from the model's own"):
        probe(backbone)
