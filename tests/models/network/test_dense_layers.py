"""Dense layers after the pooling: by the formula, in folders, and what is refused there."""

import json
import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import nn

from tercet.errors import ModelError, RecipeError
from tercet.files.outputs import MARK
from tercet.kinds import KINDS
from tercet.models.choices import DenseSettings
from tercet.models.embedder import Embedder
from tercet.models.formats.manifest import manifest
from tercet.models.formats.sentence_transformers import ACTIVATIONS
from tercet.models.formats.tercet_folder import known_width
from tercet.models.merge import load_adapters
from tercet.models.network.dense_layers import DenseLayer, DenseLayers
from tercet.models.network.heads import Heads, save_heads
from tercet.models.quantize import quantized
from tercet.models.retokenize import with_tokenizer
from tercet.segments import Packed
from tests.models.formats.test_parity import Dense, Folder
from tests.toy import SENTENCES, wordpiece

TEXTS = list(SENTENCES)
WIDE, TANH = DenseSettings(width=96), DenseSettings(width=40, activation="tanh", bias=True)
RESIDUAL = DenseSettings(width=40, activation="gelu", bias=True, residual=True)


@pytest.fixture
def embedder(encoder_folder: Path) -> Embedder:
    """One whose dense layers lead from 64 to 96, 40 and 40 numbers."""
    made = Embedder.load(encoder_folder, dense_layers=(WIDE, TANH, RESIDUAL))
    for weight in made.dense_layers.parameters():
        nn.init.normal_(weight, std=0.2)
    return made


@pytest.fixture
def saved(embedder: Embedder, tmp_path: Path) -> Path:
    embedder.save(tmp_path / "saved")
    return tmp_path / "saved"


def configured(folder: Path, number: int, **changes: object) -> None:
    """Change the configuration of a dense module in a folder of sentence-transformers."""
    path = folder / f"{number}_Dense" / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "left out"}))


# ---- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ACTIVATIONS)
def test_a_layer_is_its_activation_of_a_product_and_a_bias(named: str):
    module = named.rpartition(".")[2]
    layer = DenseLayer(DenseSettings(width=5, activation=ACTIVATIONS[named], bias=True), 7)
    nn.init.normal_(layer.linear.bias)
    x = torch.randn(3, 7)
    expected = getattr(nn, module)()(x @ layer.linear.weight.T + layer.linear.bias)
    torch.testing.assert_close(layer(x), expected)
    assert f"{type(getattr(nn, module)()).__module__}.{module}" == named


def test_a_residual_adds_the_input_or_a_projection_of_it():
    x = torch.randn(3, 7)
    same = DenseLayer(DenseSettings(width=7, activation="tanh", residual=True), 7)
    torch.testing.assert_close(same(x), x + torch.tanh(x @ same.linear.weight.T))
    other = DenseLayer(DenseSettings(width=4, activation="tanh", residual=True), 7)
    assert same.residual is None and other.residual is not None
    expected = x @ other.residual.weight.T + torch.tanh(x @ other.linear.weight.T)
    torch.testing.assert_close(other(x), expected)


def test_a_vector_is_what_the_layers_make_of_the_pooled_one(embedder: Embedder):
    plain = embedder.encode(TEXTS, output="tokens")
    x = torch.from_numpy(np.stack([states.mean(0) for states in plain]))
    for layer in embedder.dense_layers:
        assert isinstance(layer, DenseLayer)
        inner = x
        x = x @ layer.linear.weight.T
        x = x if layer.linear.bias is None else x + layer.linear.bias
        x = {"identity": x, "tanh": x.tanh(), "gelu": nn.functional.gelu(x)}[
            layer.settings.activation
        ]
        x = x + inner if layer.settings.residual else x
    expected = nn.functional.normalize(x, dim=1).detach().numpy()
    np.testing.assert_allclose(embedder.encode(TEXTS), expected, atol=1e-6)
    assert embedder.dim == 40
    vectors = embedder.encode_vectors(TEXTS).dense
    assert vectors is not None
    np.testing.assert_allclose(vectors.numpy(), expected, atol=1e-6)


def test_fewer_coordinates_are_those_of_the_last_layer(embedder: Embedder):
    whole = embedder.encode(TEXTS)[:, :8]
    expected = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    np.testing.assert_allclose(embedder.encode(TEXTS, dims=8), expected, atol=1e-6)
    with pytest.raises(RecipeError, match="dims must be between 1 and the model's 40; got 64"):
        embedder.encode(TEXTS, dims=64)
    assert embedder.encode(TEXTS, output="tokens", dims=64)[0].shape[1] == 64


def test_a_new_linear_layer_into_a_wider_space_keeps_all_cosines(encoder_folder: Path):
    embedder = Embedder.load(encoder_folder)
    before = embedder.encode(TEXTS)
    embedder.add_dense_layer(96)
    after = embedder.encode(TEXTS)
    assert after.shape == (len(TEXTS), 96)
    np.testing.assert_allclose(after @ after.T, before @ before.T, atol=1e-6)


def test_a_product_under_autocast_is_in_float32(embedder: Embedder):
    x = torch.randn(3, 64)
    exact = embedder.dense_layers(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedder.dense_layers(x), exact)


def test_weights_of_16_bits_give_float32_vectors_near_the_exact_ones(embedder: Embedder):
    exact = embedder.encode(TEXTS)
    near = embedder.to(torch.bfloat16).encode(TEXTS)
    assert near.dtype == np.float32
    assert 0.99 < (near * exact).sum(1).min() < 1


def test_layers_stay_whole_in_copies_that_only_read(embedder: Embedder):
    before = embedder.encode(TEXTS)
    with torch.no_grad():
        first = embedder.dense_layers[0]
        assert isinstance(first, DenseLayer)
        first.linear.weight.mul_(-1)
    assert np.abs(embedder.encode(TEXTS) - before).max() > 0.1


def test_a_loss_reaches_the_layers_and_the_network(embedder: Embedder):
    tokens = embedder.train().tokenize(TEXTS, "document")
    packed: Packed = tokens.pack(range(len(TEXTS)))
    embedder(packed).square().sum().backward()
    assert all(weight.grad is not None for weight in embedder.dense_layers.parameters())
    table = embedder.backbone.model.get_input_embeddings()
    assert table.weight.grad.abs().sum() > 0


# ---- folders -----------------------------------------------------------------------------------


def test_a_saved_model_has_the_same_bits_and_fingerprint(embedder: Embedder, saved: Path):
    found = Embedder.load(saved)
    assert np.array_equal(found.encode(TEXTS), embedder.encode(TEXTS))
    assert found.fingerprint() == embedder.fingerprint()
    assert found.settings.dense_layers == (WIDE, TANH, RESIDUAL)


def test_an_index_sees_another_model_if_a_layer_changes(embedder: Embedder):
    before = embedder.fingerprint()
    with torch.no_grad():
        next(embedder.dense_layers.parameters())[0, 0] += 1
    assert embedder.fingerprint() != before


def test_a_model_without_modules_json_keeps_its_layers(embedder: Embedder, tmp_path: Path):
    """Sentence-transformers cannot express a suffix."""
    folder = tmp_path / "suffix"
    with_suffix = Embedder.load(_saved(embedder, tmp_path / "plain"), suffixes={"query": "?"})
    with_suffix.save(folder)
    assert not (folder / "modules.json").exists()
    found = Embedder.load(folder)
    assert np.array_equal(found.encode(TEXTS), embedder.encode(TEXTS))


def _saved(embedder: Embedder, folder: Path) -> Path:
    embedder.save(folder)
    return folder


def test_layers_of_a_folder_are_kept_up_to_the_first_other_one(saved: Path, caplog):
    trained = Embedder.load(saved).dense_layers
    with caplog.at_level(logging.INFO):
        other = Embedder.load(saved, dense_layers=(WIDE, DenseSettings(width=20))).dense_layers
    assert other.drawn == (1,)
    assert torch.equal(_weight(other[0]), _weight(trained[0]))
    assert "2 of its dense layers are left out" in caplog.text
    assert "1 new dense layers, to be trained" in caplog.text
    assert Embedder.load(saved, dense_layers=()).dim == 64


def _weight(layer: nn.Module) -> torch.Tensor:
    assert isinstance(layer, DenseLayer)
    return layer.linear.weight


def test_an_adapter_s_folder_carries_the_layers(saved: Path, tmp_path: Path):
    embedder = Embedder.load(saved)
    embedder.backbone.add_lora(rank=2, alpha=4, dropout=0.0)
    with torch.no_grad():
        for weight in embedder.dense_layers.parameters():
            weight.add_(0.1)
    embedder.save_adapter(tmp_path / "adapter", str(saved))
    expected = embedder.encode(TEXTS)
    found = load_adapters([tmp_path / "adapter"])
    np.testing.assert_allclose(found.encode(TEXTS), expected, atol=1e-6)
    loaded = Embedder.load(tmp_path / "adapter")
    np.testing.assert_allclose(loaded.encode(TEXTS), expected, atol=1e-6)


def test_an_adapter_without_settings_leaves_the_layers_of_its_base(saved: Path, tmp_path: Path):
    embedder = Embedder.load(saved)
    embedder.backbone.add_lora(rank=2, alpha=4, dropout=0.0)
    embedder.backbone.model.save_pretrained(tmp_path / "adapter")
    found = load_adapters([tmp_path / "adapter"], base=saved, attention="bidirectional")
    np.testing.assert_allclose(found.encode(TEXTS), embedder.encode(TEXTS), atol=1e-6)


def test_another_tokenizer_leaves_the_layers(embedder: Embedder):
    expected = embedder.encode(TEXTS)
    found = with_tokenizer(embedder, wordpiece())
    np.testing.assert_allclose(found.encode(TEXTS), expected, atol=1e-5)


def test_8_bit_weights_of_the_network_leave_the_layers_in_float32(saved: Path, tmp_path: Path):
    embedder = Embedder.load(saved)
    made = quantized(embedder, TEXTS * 2).embedder
    made.save(tmp_path / "int8")
    found = Embedder.load(tmp_path / "int8")
    assert np.array_equal(found.encode(TEXTS), made.encode(TEXTS))
    assert torch.equal(_weight(found.dense_layers[0]), _weight(embedder.dense_layers[0]))


def test_inspect_names_the_layers_whoever_wrote_the_folder(saved: Path, tmp_path: Path):
    found = manifest(str(saved))["dense layers after pooling"]
    assert found == "to 96, to 40 tanh, to 40 gelu, residual"
    path = Folder(dense=(Dense(96),)).write(tmp_path / "foreign")
    assert manifest(str(path))["dense layers after pooling"] == "to 96"


def test_ten_modules_without_a_marker_are_known_as_a_model(encoder_folder, tmp_path: Path):
    embedder = Embedder.load(encoder_folder, dense_layers=[{"width": 8}] * 9)
    embedder.save(tmp_path / "deep")
    assert (tmp_path / "deep/10_Dense").is_dir()
    (tmp_path / "deep" / MARK).unlink()
    embedder.save(tmp_path / "deep")  # which would refuse to replace anything else


def test_bfloat16_is_multiplied_in_float32():
    layer = DenseLayer(DenseSettings(width=8), 64).bfloat16()
    x = torch.randn(3, 64).bfloat16()
    found = layer(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x.float() @ _weight(layer).float().T)


def test_the_width_is_known_without_the_weights(saved: Path, encoder_folder, tmp_path: Path):
    assert known_width(saved) == 40 and known_width(encoder_folder) == 64
    stock = Folder(dense=(Dense(96),)).write(tmp_path / "st")
    for path in stock.rglob("*.safetensors"):
        path.unlink()
    assert known_width(stock) == 96
    (stock / "modules.json").unlink()
    config = stock / "config.json"
    held = json.loads(config.read_text())
    config.write_text(json.dumps({"text_config": held}))  # which part is used is not known here
    assert known_width(stock) is None


# ---- what is refused ---------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder as sentence-transformers has it, with one dense module."""
    return Folder(dense=(Dense(40, "torch.nn.modules.activation.Tanh"),)).write(tmp_path / "st")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_function": "os.system"}, "activation_function must be one of .*; got 'os.sy"),
        ({"activation_function": "torch.nn.functional.gelu"}, "must be one of .*torch.nn.Tanh"),
        ({"activation_function": "torch.nn.Bilinear"}, "must be one of"),
        ({"activation_function": None}, "must be one of .*; got None"),
        ({"activation_function": ["torch.nn.Tanh"]}, "must be one of"),
        ({"module_input_name": "token_embeddings"}, 'module_input_name must be "sentence_emb'),
        ({"module_output_name": "other"}, "module_output_name must be .*; got 'other'"),
        ({"scale": 2}, 'sets "scale", which tercet does not apply'),
        ({"out_features": "left out"}, "does not describe a dense layer .'out_features'"),
        ({"out_features": 0}, "width must be a whole number of at least 1; got 0"),
        ({"out_features": 10**15}, "linear.weight .40 x 64, expected 1000000000000000 x 64."),
        ({"bias": False}, "1 unknown: linear.bias"),
        ({"use_residual": True}, "1 missing: residual.weight"),
    ],
)
def test_a_description_that_cannot_be_followed_is_refused(foreign: Path, changes, message):
    configured(foreign, 2, **changes)
    with pytest.raises(ModelError, match=message) as error:
        Embedder.load(foreign)
    assert "\n" not in str(error.value)


def test_weights_that_are_missing_damaged_or_pickled_are_refused(foreign: Path):
    place = foreign / "2_Dense"
    weights = load_file(place / "model.safetensors")
    save_file({**weights, "linear.bias": weights["linear.bias"][:9]}, place / "model.safetensors")
    with pytest.raises(ModelError, match=r"linear.bias \(9, expected 40\)"):
        Embedder.load(foreign)
    (place / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=r"cannot be read: .*; copy or download it again"):
        Embedder.load(foreign)
    (place / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"neither model.safetensors nor pytorch_model.bin"):
        Embedder.load(foreign)
    torch.save({"linear.weight": Path("code")}, place / "pytorch_model.bin")
    with pytest.raises(ModelError, match="a file of weights holds other Python objects"):
        Embedder.load(foreign)
    torch.save([1, 2], place / "pytorch_model.bin")
    with pytest.raises(ModelError, match="it holds no weights by name"):
        Embedder.load(foreign)
    (place / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be read"):
        Embedder.load(foreign)


def test_a_dense_module_before_the_pooling_is_refused(foreign: Path):
    path = foreign / "modules.json"
    first, pooling, dense, last = json.loads(path.read_text())
    path.write_text(json.dumps([first, dense, pooling, last]))
    with pytest.raises(ModelError, match="has the modules Transformer, Dense, Pooling, Normalize"):
        Embedder.load(foreign)


def test_a_normalization_of_tokens_is_refused(foreign: Path):
    config = {"module_input_name": "token_embeddings"}
    (foreign / "3_Normalize").mkdir(exist_ok=True)
    (foreign / "3_Normalize" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match='module_input_name must be "sentence_embedding"'):
        Embedder.load(foreign)


def test_a_layer_of_tercet_s_folder_that_is_gone_is_not_made_up(saved: Path):
    (saved / "3_Dense" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"3_Dense: has neither model.safetensors nor"):
        Embedder.load(saved)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "a dense layer's width must be a whole number of at least 1; got 0"),
        ({"width": True}, "width must be .*; got True"),
        ({"activation": "Tanh"}, "activation must be one of identity, tanh, .*; got 'Tanh'"),
        ({"bias": "no"}, "bias must be true or false; got 'no'"),
        ({"residual": None}, "residual must be true or false; got None"),
    ],
)
def test_a_layer_of_no_sense_is_refused(fields, message):
    layer = object.__new__(DenseSettings)  # the tests' type checks would be quicker
    for name, value in {**asdict(WIDE), **fields}.items():
        object.__setattr__(layer, name, value)
    with pytest.raises(RecipeError, match=message):
        layer.__post_init__()


def test_settings_written_by_hand_are_checked(saved: Path):
    path = saved / "tercet.json"
    record = json.loads(path.read_text())
    record["settings"]["dense_layers"] = [{"size": 3}]
    path.write_text(json.dumps(record))
    with pytest.raises(ModelError, match=r"the setting dense_layers cannot be .'size': 3."):
        Embedder.load(saved)
    record["settings"]["dense_layers"] = 3
    path.write_text(json.dumps(record))
    with pytest.raises(ModelError, match="dense_layers must be a list of dense layers; got 3"):
        Embedder.load(saved)


def test_no_layers_draw_no_random_numbers():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert DenseLayers(64).width == 64
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_of_flagembedding_keeps_what_its_modules_json_says(tmp_path: Path):
    dense = (Dense(40),)
    path = Folder(prompts={"query": "find: "}, normalize=False, dense=dense).write(tmp_path / "m3")
    save_heads(path, Heads(64, KINDS), KINDS)
    embedder = Embedder.load(path)
    assert embedder.kinds == KINDS
    peer = SentenceTransformer(str(path), device="cpu")
    found = embedder.encode_vectors(TEXTS, "query").dense
    assert found is not None
    np.testing.assert_allclose(found.numpy(), peer.encode_query(TEXTS), atol=2e-5)
