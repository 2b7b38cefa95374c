"""Models with 8-bit weights: near the model before, saved and loaded, and refused where unfit."""

import copy
import json
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tercet.errors import ModelError, RecipeError
from tercet.kinds import KINDS
from tercet.models.embedder import Embedder
from tercet.models.network.cpu import int8, linear
from tercet.models.network.cpu.int8_files import FILE
from tercet.models.quantize import _MOST_ROWS, _ReadRows, quantized
from tercet.models.retokenize import with_tokenizer
from tests.toy import SENTENCES, save_model

TEXTS = [f"{a} {b}" for a in SENTENCES for b in SENTENCES[:4]]
needs_vnni = pytest.mark.skipif(not int8.runs_here(), reason="a CPU with VNNI instructions")


@pytest.fixture(scope="module")
def both(encoder_folder):
    """A model of three kinds of vectors, and the same with 8-bit weights."""
    torch.manual_seed(0)
    before = Embedder.load(encoder_folder, kinds=KINDS, multi_dim=8)
    before.heads.drawn = ()
    return before, quantized(before, TEXTS)


def test_every_kind_of_vector_is_near_the_one_before(both):
    before, made = both
    old, new = (each.encode_vectors(SENTENCES) for each in (before, made.embedder))
    assert (old.dense * new.dense).sum(1).min() > 0.99
    assert (old.multi.vectors * new.multi.vectors).sum(1).min() > 0.98
    assert torch.equal(old.sparse.ids, new.sparse.ids)
    torch.testing.assert_close(old.sparse.weights, new.sparse.weights, atol=0.05, rtol=0.1)
    assert not torch.equal(old.dense, new.dense)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("bert", None), ("xlm-roberta", None), ("modernbert", None), ("llama", "bidirectional")],
)
def test_networks_of_every_form_stay_near(tmp_path, kind, attention):
    before = Embedder.load(save_model(tmp_path / "model", kind), attention=attention)
    made = quantized(before, TEXTS)
    assert made.left == () and made.by_range + made.by_token > 3
    assert made.mean > 0.99 and made.smallest > 0.98
    made.embedder.save(tmp_path / "made")
    loaded = Embedder.load(tmp_path / "made")
    assert np.array_equal(loaded.encode(SENTENCES), made.embedder.encode(SENTENCES))
    assert loaded.backbone.attention == before.backbone.attention


def test_the_figures_are_those_of_texts_that_were_held_out(both):
    before, made = both
    held_out = TEXTS[::5]
    cosines = (before.encode(held_out) * made.embedder.encode(held_out)).sum(1)
    np.testing.assert_allclose(made.cosines, cosines, atol=1e-6)
    assert made.mean == pytest.approx(cosines.mean()) and made.smallest <= made.mean


def test_the_model_before_stays_as_it_was(encoder_folder):
    before = Embedder.load(encoder_folder)
    vectors, fingerprint = before.encode(SENTENCES), before.fingerprint()
    quantized(before, TEXTS)
    assert np.array_equal(before.encode(SENTENCES), vectors)
    assert before.fingerprint() == fingerprint and not before.backbone.has_int8


@needs_vnni
def test_a_text_does_not_depend_on_its_neighbours_or_on_their_number(both):
    _, made = both
    alone = np.concatenate([made.embedder.encode([text]) for text in TEXTS])
    together = made.embedder.encode(TEXTS)
    # floating point sums of other sizes round differently, and may move an input to the next level
    assert np.abs(alone - together).max() < 0.02
    assert (alone * together).sum(1).min() > 0.9999


def test_a_folder_is_smaller_says_what_it_is_and_loads_with_the_same_bits(both, tmp_path, caplog):
    before, made = both
    before.save(tmp_path / "float")
    caplog.clear()
    made.embedder.save(tmp_path / "made")
    assert "sentence-transformers cannot express 8-bit weights, so no modules.json" in caplog.text
    with pytest.raises(ModelError, match="cannot express 8-bit weights; use encode, or the model"):
        made.embedder.as_sentence_transformer()
    names = {path.name for path in (tmp_path / "made").iterdir()}
    assert FILE in names and not {"model.safetensors", "modules.json"} & names
    sizes = [
        (tmp_path / name).stat().st_size for name in ("float/model.safetensors", f"made/{FILE}")
    ]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = Embedder.load(tmp_path / "made")
    for kind in ("dense", "sparse", "multi"):
        old, new = (
            each.encode_vectors(SENTENCES, kinds=[kind]) for each in (made.embedder, loaded)
        )
        assert all(map(torch.equal, old.tensors(), new.tensors()))
    loaded.save(tmp_path / "again")
    first, second = (load_file(tmp_path / name / FILE) for name in ("made", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_is_another_model_to_an_index(both, tmp_path):
    before, made = both
    assert before.fingerprint() != made.embedder.fingerprint()
    made.embedder.save(tmp_path / "made")
    assert Embedder.load(tmp_path / "made").fingerprint() == made.embedder.fingerprint()
    grid = next(int8.int8_layers(made.embedder.backbone.model))[2]
    kept = grid.scale.clone()
    try:
        grid.scale.mul_(1.01)  # such as calibrated on other texts
        assert Embedder.load(tmp_path / "made").fingerprint() != made.embedder.fingerprint()
    finally:
        grid.scale.copy_(kept)


def test_without_the_operators_the_same_weights_run_in_floating_point(both, tmp_path, monkeypatch):
    _, made = both
    made.embedder.save(tmp_path / "made")
    monkeypatch.setattr(linear, "runs_here", lambda: False)
    plain = Embedder.load(tmp_path / "made").encode(SENTENCES)
    assert (plain * made.embedder.encode(SENTENCES)).sum(1).min() > 0.99


def test_bfloat16_around_8_bits_stays_near(both, tmp_path):
    _, made = both
    made.embedder.save(tmp_path / "made")
    short = Embedder.load(tmp_path / "made", dtype=torch.bfloat16).encode(SENTENCES)
    assert (short * made.embedder.encode(SENTENCES)).sum(1).min() > 0.999


def test_what_changes_weights_is_refused(both):
    _, made = both
    embedder = made.embedder
    with pytest.raises(ModelError, match="has 8-bit weights, so LoRA cannot be trained on it; use"):
        embedder.backbone.add_lora(2, 4, 0.0)
    with pytest.raises(ModelError, match="8-bit weights, so its tokenizer cannot be replaced"):
        with_tokenizer(embedder, embedder.tokenizer.stock)
    with pytest.raises(
        ModelError, match="8-bit weights already; quantize the one it was made from"
    ):
        quantized(embedder, TEXTS)


def test_too_few_texts_are_refused(encoder_folder):
    message = (
        "must have at least 16 texts, of which every fifth is held out; got 2; give some hundreds"
    )
    with pytest.raises(RecipeError, match=message):
        quantized(Embedder.load(encoder_folder), ["a", "", "b", "  "])


def test_a_damaged_file_is_refused(both, tmp_path):
    _, made = both
    made.embedder.save(tmp_path / "made")
    path = tmp_path / "made" / FILE
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"int8.safetensors: is damaged .*; copy the folder again"):
        Embedder.load(tmp_path / "made")


def edited(path, edit):
    """Change the tensors of a file in place."""
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


LAYER = "encoder.layer.0.attention.self.query"
SCALE, SMOOTH, RANGE = (f"{LAYER}.int8.{what}" for what in ("scale", "smooth", "range"))
DAMAGES = {
    "weights without a scale": lambda t: [
        t.pop(name) for name in list(t) if LAYER + ".int8" in name
    ],
    "KeyError|'scale'": lambda t: t.pop(SCALE),
    r"scale is not \(64,\)": lambda t: t.update({SCALE: torch.tensor(0.1)}),
    r"scale is not \(64,\) finite": lambda t: t[SCALE].__setitem__(3, torch.nan),
    "scale is not .* in float32": lambda t: t.update({SCALE: t[SCALE].bfloat16()}),
    "scale is not positive": lambda t: t[SCALE].__setitem__(3, 0.0),
    r"smooth is not \(64,\)": lambda t: t.update({SMOOTH: torch.ones(1)}),
    "smooth is not positive": lambda t: t.update({SMOOTH: -torch.ones(64)}),
    r"range is not \(2,\)": lambda t: t.update({RANGE: torch.ones(3)}),
    r"range is not \(2,\) finite": lambda t: t.update({RANGE: torch.tensor([0.0, torch.inf])}),
    "range ends below its start": lambda t: t.update({RANGE: torch.tensor([1.0, -1.0])}),
    "not integers of 8 bits": lambda t: t.update({f"{LAYER}.weight": torch.ones(64, 64)}),
    "not enough values": lambda t: t.update({f"{LAYER}.weight": torch.ones(64).to(torch.int8)}),
}


@pytest.mark.parametrize("said", DAMAGES)
def test_grids_that_cannot_be_are_damage(both, tmp_path, said):
    _, made = both
    made.embedder.save(tmp_path / "made")
    edited(tmp_path / "made" / FILE, DAMAGES[said])
    with pytest.raises(ModelError, match=rf"int8.safetensors: is damaged \(.*({said})"):
        Embedder.load(tmp_path / "made")


@needs_vnni
@pytest.mark.parametrize("change", ["loaded", "in place", "before the first call"])
def test_weights_that_changed_are_refused(both, tmp_path, change):
    before, made = both
    made.embedder.save(tmp_path / "made")
    embedder = Embedder.load(tmp_path / "made")
    if change != "before the first call":
        embedder.encode(SENTENCES)
    with torch.no_grad():
        if change == "in place":
            next(int8.int8_layers(embedder.backbone.model))[1].weight.mul_(1.3)
        else:
            embedder.backbone.model.load_state_dict(before.backbone.model.state_dict())
    message = "the weights of a model with 8-bit weights must not change.*quantize again"
    for _ in range(2):  # also a second time
        with pytest.raises(ModelError, match=message):
            embedder.encode(SENTENCES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_of_numbers_encode_as_well(both, tmp_path, dtype):
    _, made = both
    made.embedder.save(tmp_path / "made")
    expected = made.embedder.encode(SENTENCES)
    for embedder in (
        Embedder.load(tmp_path / "made", dtype=dtype),
        Embedder.load(tmp_path / "made").to(dtype),
    ):
        assert (embedder.encode(SENTENCES) * expected).sum(1).min() > 0.99


def test_only_float32_on_a_cpu_is_quantized(encoder_folder):
    short = Embedder.load(encoder_folder, dtype=torch.bfloat16)
    message = "must have float32 weights on a CPU; got bfloat16 on cpu; load it with dtype"
    with pytest.raises(ModelError, match=message):
        quantized(short, TEXTS)
    with pytest.raises(ModelError, match="got float32 on meta"):
        quantized(Embedder.load(encoder_folder).to("meta"), TEXTS)


def test_a_pooler_that_no_vector_uses_stays_in_floating_point(both):
    _, made = both
    model = made.embedder.backbone.model
    names = [name for name, _, _ in int8.int8_layers(model)]
    assert hasattr(model, "pooler") and len(names) == made.by_range + made.by_token
    assert not any("pooler" in name for name in (*names, *made.left))


def test_inputs_held_for_calibration_are_bounded():
    read = _ReadRows(torch.zeros(4), torch.zeros(4))
    numbers = torch.arange(200_000.0).repeat_interleave(4).view(-1, 4)
    for batch in numbers.split(997):
        read.add(batch)
        assert sum(map(len, read.rows)) <= _MOST_ROWS
        assert len(read.some) <= 1_024
    assert read.high[0] == 199_999 and len(read.some) > 500
    assert read.some[:, 0].diff().max() < 997  # from every part


@needs_vnni
def test_inputs_are_freed_after_the_call(decoder_folder, monkeypatch):
    made = quantized(Embedder.load(decoder_folder), TEXTS).embedder
    for _, layer, grid in int8.int8_layers(made.backbone.model):  # all read alike
        by_token = int8.Grid(grid.scale, None, None)
        int8.put_on_grid(layer, by_token, by_token.integers(layer.weight.detach()))
    rounded, seen = int8.levels, []

    def noted(grid, x):
        seen.append(weakref.ref(x))
        return rounded(grid, x)

    monkeypatch.setattr(int8, "levels", noted)
    made = copy.deepcopy(made)  # which encodes by these grids
    made.encode(SENTENCES)
    assert len(seen) == 3 * 4  # q, k and v; o; gate and up; down
    assert all(ref() is None for ref in seen)


def test_only_the_first_layers_can_be_loaded(both, tmp_path):
    _, made = both
    made.embedder.save(tmp_path / "made")
    loaded = Embedder.load(tmp_path / "made", keep_layers=1)
    assert loaded.backbone.has_int8 and loaded.encode(SENTENCES).shape[1] == loaded.dim


@pytest.mark.slow
def test_a_kill_while_the_folder_is_written_leaves_nothing(both, tmp_path):
    before, _ = both
    before.save(tmp_path / "model")
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    script = f"""
import json, os, signal
from tercet.models.embedder import Embedder
from tercet.models.formats import tercet_folder
from tercet.models.quantize import quantized
made = quantized(Embedder.load("model"), json.load(open("texts.json")))
write = tercet_folder.write_json
def killed(path, record):
    if path.name == "tercet.json":
        assert (path.parent / "{FILE}").exists()
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, record)
tercet_folder.write_json = killed
made.embedder.save("made")
"""
    root = Path(__file__).parent.parent.parent
    ended = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{script}"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "made").exists()
