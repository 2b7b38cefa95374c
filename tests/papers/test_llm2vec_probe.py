"""LLM2Vec (arXiv 2404.05961), tests 1, 3 and 4: which decoders can be opened up, and packed.

The others are in test_llm2vec.py and test_llm2vec_training.py.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from torch import Tensor

from tercet.errors import ModelError
from tercet.models.choices import Attention
from tercet.models.network.attention import NAME
from tercet.models.network.backbone import Backbone, probe
from tests.toy import pack, random_model, random_texts

VOCABULARY = 120
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
WIDE: dict[str, Any] = {**GROUPED, "head_dim": 16}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOW: dict[str, Any] = {"sliding_window": 4}

OPENED: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": WIDE,
    "mistral": {**GROUPED, **WINDOW},
    "gemma": WIDE,
    "gemma2": {**WIDE, **WINDOW},
    "gemma3_text": {**WIDE, **WINDOW},
    "phi3": GROUPED,
    "olmo2": GROUPED,
    "smollm3": GROUPED,
    "cohere2": {**GROUPED, **WINDOW},
    "gpt_neox": {},
    "gpt2": {},
    "mixtral": {**GROUPED, **EXPERTS},
    "qwen3_moe": {**WIDE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "gpt_oss": {**WIDE, **WINDOW, **EXPERTS},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "starcoder2": GROUPED,
    "granite": GROUPED,
    "exaone4": {**GROUPED, **WINDOW},
    "glm4": WIDE,
    "ernie4_5": WIDE,
    "phi": {},
    "nemotron": GROUPED,
    "stablelm": GROUPED,
    "ministral": WIDE,
}
NO_ATTENTION = "cannot be packed or made bidirectional; use a model with a standard"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "llama4_text": (
        {**WIDE, "num_local_experts": 2, "intermediate_size_mlp": 96, "attention_chunk_size": 64},
        "attends in chunks",
    ),
    "bloom": ({"n_layer": 2, "n_head": 4}, NO_ATTENTION),
    "falcon": ({}, NO_ATTENTION),
    "gptj": ({"rotary_dim": 8}, NO_ATTENTION),
    "mamba": ({"state_size": 8}, NO_ATTENTION),
    "lfm2": (
        {**GROUPED, "layer_types": ["conv", "full_attention"]},
        "Lfm2Model: a text's states depend on its neighbours",
    ),
}
BOTH: tuple[Attention, ...] = ("causal", "bidirectional")


def config_of(kind: str, **more: Any) -> Any:
    return t.AutoConfig.for_model(kind, **{**SMALL, **more})


def open_up(model: Any, *, modules: bool = True) -> Any:
    """A stock model with the switches of both directions set by hand, by no code of ours."""
    model.config.is_causal = model.config.use_cache = False
    for module in model.modules():
        if modules and isinstance(getattr(module, "is_causal", None), bool):
            module.is_causal = False
    return model


def moved_by_the_last_token(states_of) -> Tensor:
    """How far each state of a text of 12 tokens moves with its last token."""
    ids = torch.arange(20, 32)
    other = ids.clone()
    other[-1] = 50
    with torch.no_grad():
        return (states_of(ids) - states_of(other)).abs().amax(1)


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("kind", OPENED)
def test_the_probe_passes_and_a_token_sees_the_next_one_only_both_ways(kind, attention):
    """Test 1 of LLM2Vec."""
    backbone = Backbone(random_model(config_of(kind, **OPENED[kind])), attention=attention)
    probe(backbone)
    moved = moved_by_the_last_token(lambda ids: backbone(pack(ids)))
    assert moved[-1] > 1e-3
    assert bool(moved[-2] > 1e-3) == (attention == "bidirectional")


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_cannot_be_opened_up_is_refused_with_the_reason(kind, attention):
    """Test 1 of LLM2Vec."""
    more, reason = REFUSED[kind]
    with pytest.raises(ModelError, match=reason):
        probe(Backbone(random_model(config_of(kind, **more)), attention=attention))


@pytest.mark.parametrize(("kind", "sees"), [("nemotron", False), ("llama", True)])
@pytest.mark.parametrize("modules", [False, True])
def test_the_switch_in_the_config_alone_leaves_nemotron_causal(kind, sees, modules):
    """Test 1 of LLM2Vec: which is why ``Backbone`` sets both, and looks at numbers."""
    model = random_model(config_of(kind, **GROUPED))
    model.set_attn_implementation("sdpa")
    open_up(model, modules=modules)
    moved = moved_by_the_last_token(lambda ids: model(ids[None]).last_hidden_state[0])
    assert bool(moved[:-1].max() > 1e-3) == (sees or modules)


def test_the_probe_refuses_a_model_whose_switches_were_turned_back():
    """Test 1 of LLM2Vec."""
    backbone = Backbone(random_model(config_of("qwen2", **GROUPED)), attention="bidirectional")
    backbone.config.is_causal = True
    for module in backbone.modules():
        if getattr(module, "is_causal", None) is False:
            module.is_causal = True  # pyright: ignore[reportArgumentType]
    with pytest.raises(ModelError, match="no token sees the one after it"):
        probe(backbone)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@torch.no_grad()
def test_packed_equals_separate_and_positions_alone_do_not(kind):
    """Test 3 of LLM2Vec."""
    config = config_of(kind, **OPENED[kind])
    texts = random_texts(7, 12, 3, vocabulary=VOCABULARY)
    row, positions = torch.cat(texts)[None], torch.cat([torch.arange(len(x)) for x in texts])[None]
    stock = random_model(config)
    stock.set_attn_implementation("sdpa")
    open_up(stock)
    alone = torch.cat([stock(text[None]).last_hidden_state[0] for text in texts])

    packed = Backbone(random_model(config), attention="bidirectional", window="keep")(pack(*texts))
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)
    by_positions = stock(row, position_ids=positions).last_hidden_state[0]
    assert (by_positions - alone).abs().max() > 0.1


def padded(model: Any, texts: list[Tensor], *, left: bool, pad: int, positions: bool) -> Tensor:
    """The states of the real tokens of a padded batch, end to end."""
    longest = max(map(len, texts))
    gaps = [longest - len(text) for text in texts]
    sides = [(gap, 0) if left else (0, gap) for gap in gaps]
    ids = torch.stack([F.pad(x, side, value=pad) for x, side in zip(texts, sides, strict=True)])
    mask = torch.stack(
        [F.pad(torch.ones_like(x), side) for x, side in zip(texts, sides, strict=True)]
    )
    given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if positions else {}
    states = model(input_ids=ids, attention_mask=mask, **given).last_hidden_state
    return states[mask.bool()]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_either_side_of_padding_and_any_pad_token_give_what_packing_gives(kind):
    """Test 4 of LLM2Vec."""
    config = config_of(kind, **OPENED[kind])
    texts = random_texts(9, 4, 11, vocabulary=VOCABULARY)
    stock = open_up(random_model(config))
    packed = Backbone(random_model(config), attention="bidirectional")(pack(*texts))
    for left in (False, True):
        for pad in (0, 77):
            states = padded(stock, texts, left=left, pad=pad, positions=True)
            torch.testing.assert_close(states, packed, rtol=0, atol=1e-5)
    # Why there is no left padding here: learned positions would be those of other tokens.
    bare = padded(stock, texts, left=True, pad=0, positions=False)
    assert bool((bare - packed).abs().max() > 0.1) == (kind == "gpt2")


@pytest.mark.parametrize(
    ("kind", "more", "reach"),
    [
        ("mistral", {**GROUPED, "sliding_window": 4}, 4),
        ("gemma3_text", {**WIDE, "sliding_window": 4}, 4),
        # Its own switch makes the window W // 2 + 1, and that is exclusive.
        ("gemma3_text", {**WIDE, "sliding_window": 8, "use_bidirectional_attention": True}, 4),
    ],
)
@pytest.mark.parametrize("layers", [1, 2])
@torch.no_grad()
def test_a_kept_window_reaches_as_far_as_layers_times_its_width(kind, more, reach, layers):
    """Test 4 of LLM2Vec."""
    more = {**more, "num_hidden_layers": layers, "layer_types": ["sliding_attention"] * layers}
    if kind == "mistral":
        del more["layer_types"]
    backbone = Backbone(
        random_model(config_of(kind, **more)), attention="bidirectional", window="keep"
    )
    (text,) = random_texts(23, vocabulary=VOCABULARY)
    other = text.clone()
    other[11] = (other[11] + 1) % VOCABULARY
    stock = random_model(config_of(kind, **more))
    if not more.get("use_bidirectional_attention"):
        open_up(stock)
    assert backbone.config._attn_implementation == NAME != stock.config._attn_implementation
    for states_of in (lambda x: backbone(pack(x)), lambda x: stock(x[None]).last_hidden_state[0]):
        moved = (states_of(text) - states_of(other)).abs().amax(1) > 1e-6
        seen = moved.nonzero().squeeze(1).tolist()
        assert seen == list(range(11 - layers * reach, 11 + layers * reach + 1))
