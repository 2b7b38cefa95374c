"""NV-Embed (arXiv 2405.17428), tests 1 to 5: the trained layer between backbone and pooling."""

import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from tercet.models.choices import LayerSettings
from tercet.models.network.latent_attention import Folded, build_layer, folding_pays
from tercet.models.network.pooling import mean
from tests.toy import pack, random_texts

HIDDEN, LATENTS, HEADS = 24, 7, 3
LENGTHS = (5, 1, 9, 5)
SIZES = [HIDDEN, None]  # as wide as the model, as the reference; hidden / heads


def some_layer(hidden=HIDDEN, latents=LATENTS, **fields):
    """A layer none of whose parts is without effect."""
    layer = build_layer(LayerSettings(latents=latents, heads=HEADS, **fields), hidden).eval()
    with torch.no_grad():
        for norm in (layer.norm_query, layer.norm_context, layer.norm_ff):
            norm.weight.copy_(1 + torch.randn(hidden) / 3)
            norm.bias.copy_(torch.randn(hidden) / 3)
        for linear in (layer.to_q, layer.to_kv, layer.to_out):
            linear.weight.mul_(2)
    return layer


def some_states(*lengths, hidden=HIDDEN):
    texts = pack(*random_texts(*lengths))
    return torch.randn(len(texts.ids), hidden) * 2, texts


@torch.no_grad()
def inferred(layer, states, texts):
    return layer.eval()(states, texts)


def normed(x, norm):
    centred = x - x.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


@torch.no_grad()
def plain_loop(layer, states, context=None):
    """Section 5.1, one token and one head at a time, in float64; context None: the latents."""
    layer, states = deepcopy(layer).double(), states.double()
    context = layer.latents if context is None else context.double()
    width = layer.to_q.out_features
    size = width // layer.layer.heads
    about = [normed(z, layer.norm_context) for z in context]
    keys = [layer.to_kv.weight[:width] @ z for z in about]
    values = [layer.to_kv.weight[width:] @ z for z in about]
    rows = []
    for x in states:
        query = layer.to_q.weight @ normed(x, layer.norm_query)
        found = []
        for start in range(0, width, size):
            head = slice(start, start + size)
            weights = [math.exp(float(query[head] @ key[head]) / math.sqrt(size)) for key in keys]
            parts = [w / sum(weights) * v[head] for w, v in zip(weights, values, strict=True)]
            found.append(torch.stack(parts).sum(0))
        y = x + layer.to_out.weight @ torch.cat(found)
        wide = layer.ff_in.weight @ normed(y, layer.norm_ff) + layer.ff_in.bias
        value, gate = wide[: len(wide) // 2], wide[len(wide) // 2 :]
        gelu = gate / 2 * (1 + torch.erf(gate / math.sqrt(2)))
        rows.append(y + layer.ff_out.weight @ (value * gelu) + layer.ff_out.bias)
    return torch.stack(rows)


def repeated(layer, states, lengths):
    """As the reference computes: padded texts, and the latents projected anew for each of them."""
    heads, count = layer.layer.heads, len(lengths)
    padded = torch.nn.utils.rnn.pad_sequence(list(states.split(lengths)), batch_first=True)
    latents = layer.latents.expand(count, -1, -1).contiguous()
    keys, values = layer.to_kv(layer.norm_context(latents)).chunk(2, dim=-1)
    q, k, v = (
        x.view(count, -1, heads, x.shape[-1] // heads).transpose(1, 2)
        for x in (layer.to_q(layer.norm_query(padded)), keys, values)
    )
    found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    y = padded + layer.to_out(found)
    value, gate = layer.ff_in(layer.norm_ff(y)).chunk(2, dim=-1)
    y = y + layer.ff_out(value * F.gelu(gate))
    return torch.cat([row[:length] for row, length in zip(y, lengths, strict=True)])


def swap_halves(weight):
    with torch.no_grad():
        weight.copy_(torch.cat(weight.chunk(2)[::-1]))


# ---- 1: the formula --------------------------------------------------------------------------


@pytest.mark.parametrize("head_size", [*SIZES, 5])
@pytest.mark.parametrize("latents", [LATENTS, 40])
def test_latent_attention_equals_a_plain_loop(head_size, latents):
    """Test 1 of NV-Embed."""
    layer = some_layer(head_size=head_size, latents=latents)
    states, texts = some_states(*LENGTHS)
    expected = plain_loop(layer, states)
    for got in (layer(states, texts), inferred(layer, states, texts)):
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("head_size", SIZES)
def test_self_attention_equals_a_plain_loop_over_each_text_alone(head_size):
    """Test 1 of NV-Embed."""
    layer = some_layer(kind="self_attention", head_size=head_size)
    states, texts = some_states(*LENGTHS)
    expected = torch.cat([plain_loop(layer, x, context=x) for x in states.split(LENGTHS)])
    for got in (layer(states, texts), inferred(layer, states, texts)):
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("swapped", ["to_kv", "ff_in"])
@pytest.mark.parametrize("head_size", SIZES)
def test_swapped_keys_and_values_or_values_and_gates_are_seen(swapped, head_size):
    """Test 1 of NV-Embed."""
    layer = some_layer(head_size=head_size)
    states, texts = some_states(*LENGTHS)
    expected = plain_loop(layer, states)
    swap_halves(getattr(layer, swapped).weight)
    assert (layer(states, texts) - expected).abs().max() > 0.1
    assert (inferred(layer, states, texts) - expected).abs().max() > 0.1


# ---- 2: the short cuts -----------------------------------------------------------------------


@pytest.mark.parametrize("head_size", SIZES)
def test_once_cached_and_folded_equal_the_repeated_form(head_size):
    """Test 2 of NV-Embed."""
    layer = some_layer(head_size=head_size, latents=20)
    assert layer.folds == (head_size is not None)
    states, texts = some_states(*LENGTHS)
    expected = repeated(layer, states, LENGTHS)
    first = inferred(layer, states, texts)
    for got in (layer(states, texts), first, inferred(layer, states, texts)):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("head_size", SIZES)
def test_gradients_equal_those_of_the_repeated_form(head_size):
    """Test 2 of NV-Embed."""
    layer = some_layer(head_size=head_size).train()
    states, texts = some_states(*LENGTHS)
    states.requires_grad_()
    inputs, weighted = [states, *layer.parameters()], torch.randn(states.shape)
    got = torch.autograd.grad((layer(states, texts) * weighted).sum(), inputs)
    expected = torch.autograd.grad((repeated(layer, states, LENGTHS) * weighted).sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * float(other.abs().max()), rtol=0)
        assert other.abs().max() > 0


@pytest.mark.parametrize("seed", range(3))
def test_the_folded_form_in_bfloat16_errs_no_more_than_the_unfolded(seed):
    """Test 2 of NV-Embed."""
    torch.manual_seed(seed)
    layer = some_layer(64 * HEADS, 96, head_size=64 * HEADS).bfloat16()
    states, texts = some_states(700, hidden=64 * HEADS)
    states = states.bfloat16()
    exact = deepcopy(layer).double()(states.double(), texts)
    errors = []
    for folds in (True, False):
        layer.folds = folds
        layer.train().eval()  # drops what was kept
        errors.append((inferred(layer, states, texts) - exact).square().mean().sqrt())
    assert 0 < errors[0] <= errors[1]


@pytest.mark.parametrize("head_size", SIZES)
def test_autocast_keeps_the_residual_in_float32_and_agrees(head_size):
    """Test 2 of NV-Embed."""
    layer = some_layer(head_size=head_size)
    states, texts = some_states(*LENGTHS)
    exact = layer(states, texts)
    with torch.autocast("cpu", torch.bfloat16):
        for got in (layer(states, texts), inferred(layer, states, texts)):
            assert got.dtype == torch.float32
            assert 0 < (got - exact).abs().max() < 0.1
    # What was kept under autocast is as exact as if it had been made without.
    torch.testing.assert_close(inferred(layer, states, texts), exact, atol=1e-5, rtol=0)


# ---- 3: what is kept -------------------------------------------------------------------------


@pytest.mark.parametrize("head_size", SIZES)
@pytest.mark.parametrize("fused", [False, True])  # fused ones do not count up a weight's version
def test_a_step_of_the_optimizer_drops_what_was_kept(head_size, fused):
    """Test 3 of NV-Embed."""
    layer = some_layer(head_size=head_size, latents=20)
    states, texts = some_states(*LENGTHS)
    before = inferred(layer, states, texts)
    weights = [layer.latents, *layer.to_kv.parameters(), *layer.to_out.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=0.05, fused=fused)
    layer(states, texts).square().sum().backward()  # in eval mode: nothing else drops it
    optimizer.step()
    after = inferred(layer, states, texts)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, layer(states, texts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("head_size", SIZES)
def test_loading_weights_drops_what_was_kept(head_size):
    """Test 3 of NV-Embed."""
    layer, other = (some_layer(head_size=head_size, latents=20) for _ in range(2))
    states, texts = some_states(*LENGTHS)
    inferred(layer, states, texts)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(
        inferred(layer, states, texts), plain_loop(other, states).float(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("head_size", SIZES)
def test_training_mode_drops_what_was_kept_and_another_dtype_makes_it_anew(head_size):
    """Test 3 of NV-Embed."""
    layer = some_layer(head_size=head_size, latents=20)
    states, texts = some_states(*LENGTHS)
    inferred(layer, states, texts)
    assert layer._kept._held is not None
    layer.train()
    assert layer._kept._held is None
    exact = inferred(layer, states, texts)
    assert inferred(layer.double(), states, texts).dtype == torch.float64
    torch.testing.assert_close(inferred(layer.float(), states, texts), exact, atol=1e-5, rtol=0)


def test_training_never_folds_even_without_a_gradient():
    """Test 3 of NV-Embed."""
    layer = some_layer(head_size=HIDDEN).train()
    states, texts = some_states(*LENGTHS)
    with torch.no_grad():
        without = layer(states, texts)
    assert layer._kept._held is None
    assert torch.equal(without, layer(states, texts))  # to the bit: chunks are embedded twice


# ---- 4: sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("latents", "hidden", "size", "pays"),
    [
        (64, 256, 256, True),
        (512, 1024, 1024, True),
        (128, 1024, 128, True),
        (512, 1024, 128, False),
        (512, 4096, 4096, True),
    ],
)
def test_the_rule_chooses_the_form_with_fewer_multiplications(latents, hidden, size, pays):
    """Test 4 of NV-Embed."""
    # A token and head: two products with r x d, or X Wq, Q K^T, A V, A Wo.
    folded = 2 * latents * hidden
    unfolded = hidden * size + size * latents + latents * size + size * hidden
    assert folding_pays(latents, hidden, size) == (folded < unfolded) == pays


@pytest.mark.parametrize("head_size", SIZES)
def test_inference_takes_the_form_that_the_rule_chooses(head_size):
    """Test 4 of NV-Embed."""
    layer = some_layer(head_size=head_size, latents=20)
    inferred(layer, *some_states(*LENGTHS))
    assert layer._kept._held is not None
    pays = folding_pays(20, HIDDEN, layer.to_q.out_features // HEADS)
    assert isinstance(layer._kept._held[2], Folded) == pays == (head_size is not None)


def test_the_published_sizes_have_740_million_parameters():
    """Test 4 of NV-Embed."""
    with torch.device("meta"):
        layer = build_layer(LayerSettings(head_size=4096), 4096)
    assert round(sum(weight.numel() for weight in layer.parameters()) / 1e6, 1) == 740.4


# ---- 5: neighbours, and a start as plain pooling ---------------------------------------------


@pytest.mark.parametrize("kind", ["latent", "self_attention"])
@pytest.mark.parametrize("head_size", SIZES)
def test_a_texts_tokens_do_not_depend_on_its_neighbours(kind, head_size):
    """Test 5 of NV-Embed."""
    layer = some_layer(kind=kind, head_size=head_size)
    states, texts = some_states(5, 600, 1, 9)  # 600: more than a block
    bounds = texts.offsets.tolist()
    for run in (inferred, lambda layer, *inputs: layer(*inputs)):
        together = run(layer, states, texts)
        for text in range(len(texts)):
            part = slice(bounds[text], bounds[text + 1])
            alone = run(layer, states[part], texts.take([text]))
            torch.testing.assert_close(together[part], alone, atol=1e-5, rtol=0)


def test_tokens_of_a_padded_batch_are_those_of_the_packed_one():
    """Test 5 of NV-Embed."""
    layer = some_layer(head_size=HIDDEN)
    states, texts = some_states(*LENGTHS)
    padded = torch.nn.utils.rnn.pad_sequence(list(states.split(LENGTHS)), batch_first=True)
    rows = pack(*random_texts(*[padded.shape[1]] * len(LENGTHS)))
    got = inferred(layer, padded.flatten(0, 1), rows).view(padded.shape)
    real = torch.cat([row[:length] for row, length in zip(got, LENGTHS, strict=True)])
    torch.testing.assert_close(real, inferred(layer, states, texts), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["latent", "self_attention"])
@pytest.mark.parametrize("head_size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_is_exactly_mean_pooling(kind, head_size, dtype):
    """Test 5 of NV-Embed."""
    layer = some_layer(kind=kind, head_size=head_size, init="identity", latents=20).to(dtype)
    states, texts = some_states(*LENGTHS)
    states = states.to(dtype)
    for got in (layer(states, texts), inferred(layer, states, texts)):
        assert torch.equal(got, states)
        assert torch.equal(mean(got, texts), mean(states, texts))


@pytest.mark.parametrize("kind", ["latent", "self_attention"])
def test_a_layer_that_began_as_the_identity_learns(kind):
    """Test 5 of NV-Embed."""
    layer = some_layer(kind=kind, init="identity").train()
    states, texts = some_states(*LENGTHS)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    before = {name: weight.detach().clone() for name, weight in layer.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        (layer(states, texts) - 1).square().mean().backward()
        optimizer.step()
    still = [name for name, weight in layer.named_parameters() if torch.equal(weight, before[name])]
    assert not still
