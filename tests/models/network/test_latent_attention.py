import json
import pickle
from copy import deepcopy
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from tercet.errors import ModelError, RecipeError, StorageError
from tercet.models.choices import LayerSettings
from tercet.models.network.fingerprints import WeightCache
from tercet.models.network.latent_attention import build_layer, load_layer, save_layer
from tests.toy import pack, random_texts, small_disk

LATENT = LayerSettings(latents=20, heads=3, head_size=24)  # folded
KINDS = [LATENT, LayerSettings(latents=7, heads=3), LayerSettings(kind="self_attention", heads=3)]


def states_of(*lengths, hidden=24):
    texts = pack(*random_texts(*lengths))
    return torch.randn(len(texts.ids), hidden), texts


@torch.no_grad()
def inferred(layer, states, texts):
    return layer.eval()(states, texts)


@pytest.fixture
def saved(tmp_path):
    """A folder with a layer in it, and its weights to change."""
    save_layer(tmp_path, build_layer(LATENT, 24))
    return tmp_path


def change_weights(folder, change):
    path = folder / "1_Layer" / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "latents"}, "no such layer kind: 'latents'; choose latent, self_attention"),
        ({"init": "zero"}, "no such layer init: 'zero'; choose normal, identity"),
        ({"latents": 0}, "a layer's latents must be a whole number of at least 1; got 0"),
        ({"heads": 2.0}, "a layer's heads must be a whole number of at least 1; got 2.0"),
        ({"head_size": -1}, "a layer's head_size must be .*; got -1"),
        ({"heads": None}, "a layer's heads must be .*; got None"),
    ],
)
def test_a_layer_of_no_sense_is_refused(fields, message):
    layer = object.__new__(LayerSettings)  # the tests' type checks would be quicker
    for name, value in {**asdict(LATENT), **fields}.items():
        object.__setattr__(layer, name, value)
    with pytest.raises(RecipeError, match=message):
        layer.__post_init__()


def test_heads_that_do_not_divide_the_width_need_a_size():
    with pytest.raises(RecipeError, match="5 heads does not share 24 columns evenly"):
        build_layer(LayerSettings(heads=5), 24)
    assert build_layer(LayerSettings(heads=5, head_size=4), 24).to_q.out_features == 20


def test_latents_begin_as_normal_numbers_and_only_a_latent_layer_has_them():
    latents = build_layer(LayerSettings(latents=500, heads=3), 24).latents
    assert abs(latents.mean()) < 0.05 and abs(latents.std() - 1) < 0.05
    names = [name for name, _ in build_layer(KINDS[2], 24).named_parameters()]
    assert "latents" not in names and "to_kv.weight" in names


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_layer_comes_back_to_the_bit(tmp_path, layer, dtype):
    module = build_layer(layer, 24).to(dtype)
    save_layer(tmp_path, module)
    again = load_layer(tmp_path, 24, dtype)
    assert again is not None and again.layer == layer and not again.training
    states, texts = states_of(5, 2)
    assert torch.equal(inferred(again, states, texts), inferred(module, states, texts))
    assert all(weight.requires_grad for weight in again.parameters())
    wide = load_layer(tmp_path, 24, torch.float32)
    assert wide is not None and {weight.dtype for weight in wide.parameters()} == {torch.float32}


def test_a_model_without_a_layer_has_none(tmp_path):
    assert load_layer(tmp_path, 24, torch.float32) is None


def test_a_layer_behind_another_backbone_is_refused(saved):
    with pytest.raises(ModelError, match="for a backbone 24 wide, and this one is 32 wide"):
        load_layer(saved, 32, torch.float32)


def test_missing_unknown_and_misshapen_tensors_are_named(saved):
    def change(weights):
        del weights["latents"], weights["to_q.weight"]
        weights["to_qkv.weight"] = torch.zeros(2)
        weights["ff_out.bias"] = torch.zeros(25)

    change_weights(saved, change)
    with pytest.raises(ModelError) as error:
        load_layer(saved, 24, torch.float32)
    assert "2 missing: latents, to_q.weight; 1 unknown: to_qkv.weight" in str(error.value)
    assert "1 of another size: ff_out.bias (25, expected 24)" in str(error.value)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"hidden": 24, "depth": 2}', '{"hidden": 24, "heads": 0}']
)
def test_a_config_of_something_else_is_refused(saved, text):
    path = saved / "1_Layer" / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match="a layer that tercet can build"):
        load_layer(saved, 24, torch.float32)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_incomplete_folder_is_refused(saved, name):
    (saved / "1_Layer" / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_layer(saved, 24, torch.float32)


def test_weights_that_are_cut_off_are_refused(saved):
    path = saved / "1_Layer" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="cannot be read"):
        load_layer(saved, 24, torch.float32)


def test_a_full_disk_leaves_the_old_layer(saved):
    before = (saved / "1_Layer" / "model.safetensors").read_bytes()
    with small_disk(5_000), pytest.raises(StorageError):
        save_layer(saved, build_layer(LATENT, 24))
    assert (saved / "1_Layer" / "model.safetensors").read_bytes() == before


def test_the_config_says_what_the_layer_is(saved):
    config = json.loads((saved / "1_Layer" / "config.json").read_text(encoding="utf-8"))
    fields = {"kind": "latent", "latents": 20, "heads": 3, "head_size": 24, "init": "normal"}
    assert config == {**fields, "hidden": 24}


@pytest.mark.parametrize("layer", KINDS[:2])
def test_what_is_kept_for_inference_is_not_copied_nor_saved(layer):
    module = build_layer(layer, 24)
    states, texts = states_of(5, 2)
    names = set(module.state_dict())
    expected = inferred(module, states, texts)
    assert module._kept._held is not None and set(module.state_dict()) == names
    for copy in (deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copy._kept._held is None
        assert torch.equal(inferred(copy, states, texts), expected)


def test_a_batch_of_several_blocks_equals_its_blocks():
    module = build_layer(LATENT, 24)
    states, texts = states_of(500, 700)
    expected = module(states, texts)  # with a graph: in one piece
    torch.testing.assert_close(inferred(module, states, texts), expected, atol=1e-5, rtol=0)


def test_states_in_16_bits_are_read_by_a_layer_in_32():
    module = build_layer(LATENT, 24)
    states, texts = states_of(5, 2)
    half = states.bfloat16()
    for run in (module, lambda *inputs: inferred(module, *inputs)):
        assert torch.equal(run(half, texts), run(half.float(), texts))


def test_weights_of_latents_are_exact_in_16_bits_too():
    module = build_layer(LATENT, 24).bfloat16()
    weights = module.latent_weights(states_of(5, 2)[0])
    assert weights.shape == (3, 7, 20) and weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 7), atol=1e-6, rtol=0)


def test_what_was_kept_in_inference_mode_serves_without_it():
    module = build_layer(LATENT, 24).eval()
    states, texts = states_of(5, 2)
    with torch.inference_mode():
        first = module(states, texts)
    held = module._kept._held
    assert torch.equal(inferred(module, states, texts), first)
    assert module._kept._held is held
    module(states, texts).sum().backward()  # and a gradient is no worse for it
    assert module.latents.grad is not None


def test_something_is_made_once_until_a_weight_changes():
    weights = [torch.randn(512, 4), torch.zeros(300)]
    made, kept = [], WeightCache()

    def made_anew(*given):
        before = len(made)
        kept.get(given or weights, lambda: made.append(1))
        return len(made) > before

    assert made_anew() and not made_anew()
    weights[0][0, 1] += 1  # outside the sample, but counted as a version
    assert made_anew()
    weights[0].data[:, 1] += 1  # as fused optimizers: the version stays
    assert made_anew()
    weights[0] = weights[0].clone()  # another place
    assert made_anew()
    weights[1].zero_()
    assert made_anew() and not made_anew()
    assert made_anew(weights[0], weights[1].view(torch.int32))  # the same zeros as another dtype
    assert made_anew() and not made_anew()
    kept.drop()
    assert made_anew()
