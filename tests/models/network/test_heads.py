"""Sparse and multi vectors from the states of tokens (BGE-M3)."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tercet.errors import ModelError, RecipeError
from tercet.kinds import KINDS, Weights
from tercet.models.embedder import Embedder
from tercet.models.network.heads import Heads, SpecialIds, load_heads, save_heads
from tercet.segments import Packed
from tercet.vectors import Vectors
from tests import toy

START, END, PAD, UNKNOWN = 0, 2, 1, 3
SPECIAL = SpecialIds((START, PAD, END, UNKNOWN), (START,))
WIDTH = 6


def heads(kinds=KINDS, multi_dim: int | None = 4) -> Heads:
    torch.manual_seed(0)
    made = Heads(WIDTH, kinds, multi_dim).double()
    if made.sparse is not None:
        torch.nn.init.normal_(made.sparse.weight)
    return made


def texts(*ids: list[int]) -> Packed:
    return toy.pack(*(torch.tensor(each) for each in ids))


def states(packed: Packed) -> torch.Tensor:
    return torch.randn(
        len(packed.ids), WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()


def test_special_tokens_are_no_terms_and_the_largest_weight_of_a_token_counts():
    """Trap B3 of BGE-M3."""
    packed = texts([START, 7, 8, 7, UNKNOWN, END], [START, 9, END], [START, END])
    hidden, layers = states(packed), heads()
    found = layers.terms(hidden, packed, SPECIAL)
    assert layers.sparse is not None
    every = F.relu(hidden @ layers.sparse.weight[0] + layers.sparse.bias).detach()
    assert found.ids.tolist() == [7, 8, 7, 9]
    assert found.offsets.tolist() == [0, 3, 4, 4]
    torch.testing.assert_close(found.weights, every[[1, 2, 3, 7]])
    merged = found.merged()
    known = {7: float(every[[1, 3]].max()), 8: float(every[2])}
    assert dict(zip(merged.ids.tolist(), merged.weights.tolist(), strict=True)) == pytest.approx(
        {name: weight for name, weight in [*known.items(), (9, float(every[7]))] if weight > 0}
    )
    assert (merged.weights > 0).all()


def test_only_the_winning_place_gets_a_gradient():
    """Trap B3 of BGE-M3."""
    packed = texts([START, 7, 8, 7, END])
    hidden, layers = states(packed), heads()
    assert layers.sparse is not None
    torch.nn.init.constant_(layers.sparse.bias, 5.0)  # no weight is cut to zero
    merged = layers.terms(hidden, packed, SPECIAL).merged()
    merged.weights[merged.ids == 7].sum().backward()
    scores = hidden.detach() @ layers.sparse.weight[0].detach()
    winner = 1 if scores[1] > scores[3] else 3
    assert hidden.grad is not None
    assert hidden.grad.abs().sum(1).nonzero().squeeze(1).tolist() == [winner]


def test_an_empty_text_has_no_terms_and_one_row():
    packed = texts([START, END], [START])
    hidden, layers = states(packed), heads()
    assert len(layers.terms(hidden, packed, SPECIAL).merged().ids) == 0
    rows = layers.rows(hidden, packed, SPECIAL)
    assert rows.offsets.tolist() == [0, 1, 2]  # the end; and what there is, where there is no other


def test_rows_are_of_unit_length_without_the_start_and_with_the_end():
    packed = texts([START, 7, START, END], [9, 8])  # a start token inside is a token like others
    hidden, layers = states(packed), heads()
    rows = layers.rows(hidden, packed, SPECIAL)
    assert layers.multi is not None
    expected = F.normalize(hidden @ layers.multi.weight.T + layers.multi.bias, dim=1)
    torch.testing.assert_close(rows.vectors, expected[[1, 2, 3, 4, 5]])
    assert rows.offsets.tolist() == [0, 3, 5]


def test_inserted_start_tokens_have_neither_terms_nor_rows():
    packed = texts([START, 7, START, 8, END])
    hidden, layers = states(packed), heads()
    special = SpecialIds(SPECIAL.never_terms, SPECIAL.starts, inserted=START)
    assert layers.terms(hidden, packed, special).ids.tolist() == [7, 8]
    assert layers.rows(hidden, packed, special).offsets.tolist() == [0, 3]


def test_an_instruction_that_is_not_pooled_is_in_neither():
    packed = texts([START, 5, 7, END])
    packed = Packed(packed.ids, packed.offsets, torch.tensor([False, False, True, True]))
    hidden, layers = states(packed), heads()
    assert layers.terms(hidden, packed, SPECIAL).ids.tolist() == [7]
    assert layers.rows(hidden, packed, SPECIAL).offsets.tolist() == [0, 2]


def test_new_heads_start_as_overlap_of_words_and_as_a_rotation():
    made = Heads(WIDTH, KINDS)
    assert made.sparse is not None and made.multi is not None and made.width == WIDTH
    assert not made.sparse.weight.any() and float(made.sparse.bias.detach()) > 0
    square = made.multi.weight @ made.multi.weight.T
    torch.testing.assert_close(square, torch.eye(WIDTH), rtol=0, atol=1e-5)


def test_files_come_back_and_are_those_of_flagembedding(tmp_path: Path):
    made = heads().float()
    save_heads(tmp_path, made, KINDS)
    plain = torch.load(tmp_path / "colbert_linear.pt", weights_only=True)
    assert {name: tuple(value.shape) for name, value in plain.items()} == {
        "weight": (4, WIDTH),
        "bias": (4,),
    }
    back = load_heads(tmp_path, KINDS, WIDTH)
    for name, value in made.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value)
    assert back.drawn == ()


@pytest.mark.parametrize("name", ["sparse_linear.pt", "colbert_linear.pt"])
def test_a_missing_or_damaged_head_is_an_error(tmp_path: Path, name: str):
    """Trap B15 of BGE-M3."""
    save_heads(tmp_path, heads().float(), KINDS)
    (tmp_path / name).write_bytes(b"not a layer")
    with pytest.raises(ModelError, match=f"{name}.*cannot be read"):
        load_heads(tmp_path, KINDS, WIDTH)
    (tmp_path / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_heads(tmp_path, KINDS, WIDTH)


def test_a_head_of_another_model_is_refused(tmp_path: Path):
    save_heads(tmp_path, heads().float(), KINDS)
    with pytest.raises(ModelError, match="states of width 7"):
        load_heads(tmp_path, KINDS, 7)


# ---- in an embedder --------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["xlm-roberta", "llama"])
def folder(request, tmp_path_factory) -> Path:
    return saved(request.param, tmp_path_factory.mktemp("base"))


def saved(kind: str, folder: Path) -> Path:
    base = toy.save_model(folder / "model", kind)
    embedder = Embedder.load(base, kinds=KINDS, multi_dim=8)
    assert embedder.heads.sparse is not None
    torch.nn.init.normal_(embedder.heads.sparse.weight)
    torch.nn.init.constant_(embedder.heads.sparse.bias, 1.0)
    out = base.parent / "saved"
    embedder.save(out)
    return out


def same(one: Vectors, other: Vectors) -> None:
    assert one.kinds == other.kinds
    for ours, theirs in zip(one.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
    assert one.sparse is not None and other.sparse is not None
    assert one.sparse.ids.tolist() == other.sparse.ids.tolist()


def test_all_kinds_come_from_one_reading_and_do_not_hang_on_neighbours(folder: Path):
    """B2, B11 and B19: a text alone and among longer ones, in any order."""
    embedder = Embedder.load(folder)
    every = [*toy.SENTENCES, "", "chess"]
    together = embedder.encode_vectors(every)
    assert together.kinds == KINDS and len(together) == len(every)
    for place in (0, 3, len(every) - 2, len(every) - 1):
        same(together.take([place]), embedder.encode_vectors([every[place]]))
    backwards = embedder.encode_vectors(every[::-1])
    same(together, backwards.take(list(range(len(every)))[::-1]))
    dense = torch.from_numpy(embedder.encode(every))
    assert together.dense is not None
    torch.testing.assert_close(together.dense, dense, rtol=0, atol=2e-6)


def test_no_texts_give_empty_vectors(folder: Path):
    """Trap B14 of BGE-M3."""
    embedder = Embedder.load(folder)
    found = embedder.encode_vectors([])
    assert found.kinds == KINDS and len(found) == 0
    assert found.dense is not None and found.dense.shape == (0, embedder.dim)
    assert found.multi is not None and found.multi.vectors.shape == (0, 8)


def test_a_saved_model_makes_the_same_vectors_of_all_kinds(folder: Path, tmp_path: Path):
    embedder = Embedder.load(folder)
    embedder.save(tmp_path / "again")
    again = Embedder.load(tmp_path / "again")
    assert again.kinds == KINDS and again.settings.multi_dim == 8
    assert again.fingerprint() == embedder.fingerprint()
    same(again.encode_vectors(toy.SENTENCES), embedder.encode_vectors(toy.SENTENCES))


def test_a_saved_model_without_one_of_its_heads_is_refused(folder: Path, tmp_path: Path):
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "sparse_linear.pt").unlink()
    with pytest.raises(ModelError, match=r"sparse_linear\.pt is missing"):
        Embedder.load(broken)
    assert Embedder.load(broken, kinds=("dense", "multi")).kinds == ("dense", "multi")


def test_fewer_kinds_may_be_asked_for_but_none_that_is_not_made(folder: Path):
    embedder = Embedder.load(folder, kinds=("dense", "sparse"))
    assert embedder.encode_vectors(["chess"]).kinds == ("dense", "sparse")
    assert embedder.encode_vectors(["chess"], kinds=["sparse"]).kinds == ("sparse",)
    with pytest.raises(RecipeError, match="makes no multi vectors; it makes dense, sparse"):
        embedder.encode_vectors(["chess"], kinds=["multi"])


def test_a_trained_head_of_another_width_is_replaced_with_a_warning(folder: Path, caplog):
    Embedder.load(folder, multi_dim=8)
    assert not caplog.records
    embedder = Embedder.load(folder, multi_dim=4)
    assert embedder.heads.width == 4 and embedder.heads.drawn == ("multi",)
    (told,) = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert told.endswith("layer for multi vectors, 8 wide, is replaced by a new one, 4 wide")


def test_heads_that_make_no_vectors_leave_the_fingerprint_alone(folder: Path, tmp_path: Path):
    """As after a stage that trains the dense vector alone, with heads for the next one."""
    embedder = Embedder.load(folder)
    every = embedder.fingerprint()
    prints = {every}
    for kinds in (("dense",), ("dense", "sparse"), ("dense", "multi")):
        embedder.settings = replace(embedder.settings, kinds=kinds, multi_dim=8)
        out = tmp_path / "-".join(kinds)
        embedder.save(out)
        assert Embedder.load(out).fingerprint() == embedder.fingerprint()
        prints.add(embedder.fingerprint())
    assert len(prints) == 4


def test_tuned_weights_are_kept_and_change_no_fingerprint(folder: Path, tmp_path: Path):
    embedder = Embedder.load(folder)
    before = embedder.fingerprint()
    tuned = {"packages": Weights(0.5, 0.1, 0.4)}
    embedder.settings = replace(embedder.settings, weights=tuned)
    embedder.save(tmp_path / "tuned")
    again = Embedder.load(tmp_path / "tuned")
    assert again.settings.weights == tuned
    assert again.fingerprint() == before


def test_start_tokens_inside_of_texts_make_the_dense_vector(tmp_path: Path):
    """Trap B11 of BGE-M3.

    MCLS in an embedder: in training and at inference, with neither terms nor rows of its own.

    Of an encoder: the start token of a decoder has read nothing.
    """
    folder = saved("xlm-roberta", tmp_path)
    embedder = Embedder.load(folder, pooling="first", cls_every=4)
    plain = Embedder.load(folder, pooling="first")
    long, short = " ".join(toy.SENTENCES[:2]), "chess"
    ours, theirs = embedder.encode_vectors([long, short]), plain.encode_vectors([long, short])
    assert ours.dense is not None and theirs.dense is not None
    torch.testing.assert_close(ours.dense[1], theirs.dense[1], rtol=0, atol=2e-6)  # one start only
    assert not torch.allclose(ours.dense[0], theirs.dense[0], atol=1e-3)
    assert ours.sparse is not None and theirs.sparse is not None
    assert ours.sparse.ids.tolist() == theirs.sparse.ids.tolist()
    assert ours.multi is not None and theirs.multi is not None
    assert ours.multi.offsets.tolist() == theirs.multi.offsets.tolist()
    packed = embedder.tokenize([long], "document").pack()
    states = embedder.states(packed)
    starts = states[packed.ids == packed.ids[0]]
    assert len(starts) == -(-(len(packed.ids) - 2) // 5)
    torch.testing.assert_close(embedder(packed)[0], starts.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(F.normalize(starts.mean(0), dim=0), ours.dense[0], rtol=0, atol=1e-5)
    with pytest.raises(RecipeError, match="cls_every averages start tokens"):
        Embedder.load(folder, pooling="mean", cls_every=4)


def test_the_padding_side_of_the_tokenizer_changes_nothing(folder: Path, tmp_path: Path):
    """Trap B19 of BGE-M3."""
    made = []
    for side in ("left", "right"):
        copy = Path(shutil.copytree(folder, tmp_path / side))
        path = copy / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": side}))
        made.append(Embedder.load(copy).encode_vectors(toy.SENTENCES))
    for ours, theirs in zip(made[0].tensors(), made[1].tensors(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_error_while_encoding_is_raised_at_once(folder: Path, monkeypatch):
    """Trap B14 of BGE-M3."""
    embedder, calls = Embedder.load(folder), []

    def broken(texts: Packed) -> torch.Tensor:
        calls.append(texts)
        raise RuntimeError("boom")

    monkeypatch.setattr(
        "tercet.models.network.reader.Network.states", lambda _, texts: broken(texts)
    )
    with pytest.raises(RuntimeError, match="boom"):
        embedder.encode_vectors(["a", "b"])
    assert len(calls) == 1


def test_texts_that_are_too_long_are_cut_with_a_warning(folder: Path, caplog):
    """Trap B10 of BGE-M3."""
    embedder = Embedder.load(folder, document_tokens=8)
    caplog.set_level(logging.WARNING, "tercet")
    long = " ".join(toy.SENTENCES)
    found = embedder.encode_vectors([long, "chess"])
    assert "1 of 2 document texts were cut to 8 tokens" in caplog.text
    assert found.multi is not None and int(found.multi.offsets[1]) <= 8
    Embedder.load(folder, document_tokens=100_000)
    assert "document_tokens is 100000, and the model has room for" in caplog.text
