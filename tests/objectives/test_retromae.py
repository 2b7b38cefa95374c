"""RetroMAE against the formula. Run as a script, this file is one of two processes."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tercet import distributed
from tercet.data.batches.collate import Collator
from tercet.data.files.sources import open_source, write_examples
from tercet.data.files.texts import open_texts
from tercet.errors import RecipeError
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks
from tercet.models.network.pooling import POOLINGS
from tercet.objectives import retromae_decoder as decoding
from tercet.objectives.retromae import NO_LABEL, RetroMAE, RetroMAEBatch
from tercet.types import Example
from tests.objectives.retromaes import ALL, KINDS, at_work, gradients, quiet_model, rows
from tests.processes import run_together
from tests.toy import SENTENCES


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {kind: quiet_model(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(SENTENCES) + "\n")
    return open_texts(path)


def inputs_of(embedder, work, x, places):
    """The embedding layer of BERT and its kin, written out; else the decoder's own norm."""
    model = embedder.backbone.model
    if work.decoder.rotary:
        return work.decoder.norm_in(x)
    layer = model.embeddings
    position = layer.position_embeddings.weight[places + embedder.backbone.position_offset]
    return layer.LayerNorm(x + layer.token_type_embeddings.weight[0] + position)


def turned(x, place: int):
    """The pairs (i, i + half) of a head's coordinates as complex numbers, turned."""
    half = len(x) // 2
    speeds = 10_000.0 ** (-torch.arange(half).double() / half)
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half).double(), place * speeds)
    return torch.cat([z.real, z.imag])


def decoder_row(work, queries, keys, row: int, seen):
    """The state of one row: softmax over what it sees, head by head."""
    decoder = work.decoder
    turn = turned if decoder.rotary else lambda x, place: x
    query = decoder.to_q(queries[row])
    key, value = decoder.to_kv(keys).chunk(2, dim=1)
    size = len(query) // decoder.heads
    heads = []
    for head in range(decoder.heads):
        part = slice(head * size, head * size + size)
        visible = [j for j in range(len(keys)) if seen[row - 1, j]]
        q = turn(query[part], row)
        scores = torch.stack([q @ turn(key[j, part], j) / size**0.5 for j in visible])
        heads.append(scores.softmax(0) @ value[visible][:, part])
    state = decoder.norm_attention(queries[row] + decoder.to_out(torch.cat(heads)))
    return decoder.norm_ff(state + decoder.ff_out(F.gelu(decoder.ff_in(state))))


def plain_losses(embedder, work, batch: RetroMAEBatch):
    """Both losses, text by text and row by row, with logits of all known tokens."""
    table = embedder.backbone.model.get_input_embeddings().weight
    known = torch.arange(len(table)) if work._known is None else work._known
    lookup = {int(token): place for place, token in enumerate(known)}

    def loss_of(state, token):
        head = work.head
        logits = table[known] @ head.norm(F.gelu(head.dense(state))) + head.bias
        return -logits.log_softmax(0)[lookup[int(token)]]

    encoder, decoder = [], []
    for number, (start, stop) in enumerate(pairwise(batch.texts.offsets.tolist())):
        text = batch.texts.take([number])
        states = embedder.backbone(text)
        (vector,) = POOLINGS[embedder.settings.pooling](states, text)
        for state, label in zip(states, batch.labels[start:stop], strict=True):
            if label != NO_LABEL:
                encoder.append(loss_of(state, label))
        original, length = batch.originals[start:stop], stop - start
        places = torch.arange(length)
        keys = inputs_of(embedder, work, table[original], places)
        keys = torch.cat([vector[None], keys[1:]])
        queries = inputs_of(embedder, work, vector.expand(length, -1), places)
        seed = int(batch.seeds[number])
        seen = work.decoder.seen(seed, 0, length - 2, length, torch.device("cpu"))
        for row in range(1, length - 1):
            state = decoder_row(work, queries, keys, row, seen)
            decoder.append(loss_of(state, original[row]))
    return torch.stack(encoder).mean(), torch.stack(decoder).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("max_tokens", "vocabulary"), [(1_000, "seen"), (20, "seen"), (1_000, "all")]
)
def test_losses_and_gradients_are_those_of_the_formula(
    folders, source, kind, max_tokens, vocabulary
):
    embedder, work = at_work(folders[kind], source, vocabulary=vocabulary)
    batch = work.batch(rows(0, 2), [0])
    assert (batch.labels != NO_LABEL).sum() > 3 and len(batch.texts) > 1
    losses = work.backward(batch, Chunks(max_tokens))
    found = gradients(embedder)
    encoder, decoder = plain_losses(embedder, work, batch)
    for name, expected in (("encoder_loss", encoder), ("decoder_loss", decoder)):
        torch.testing.assert_close(losses[name].double(), expected.detach(), rtol=1e-5, atol=0)
    (encoder + decoder).backward()
    expected = gradients(embedder)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_vector_is_the_embedders_own(folders, source, pooling):
    embedder, work = at_work(folders["bert"], source)
    embedder.settings = replace(embedder.settings, pooling=pooling)
    batch = work.batch(rows(1), [0])
    losses = work.backward(batch, ALL)
    expected = plain_losses(embedder, work, batch)[1].item()
    assert losses["decoder_loss"].item() == pytest.approx(expected, rel=1e-5)


# ---- B12 -----------------------------------------------------------------------------------


def test_the_vector_is_seen_by_every_row_and_no_row_sees_its_own_token(folders, source):
    """Trap B12 of BGE-M3, as a mask."""
    _, work = at_work(folders["bert"], source)
    for seed, length in enumerate((3, 4, 9, 200)):
        seen = work.decoder.seen(seed, 0, length - 2, length, torch.device("cpu"))
        assert seen[:, 0].all()
        assert not seen[torch.arange(length - 2), torch.arange(1, length - 1)].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_changes_the_rows_of_others_and_never_its_own(folders, source, kind):
    """Trap B12 of BGE-M3, by what moves when an embedding does."""
    embedder, work = at_work(folders[kind], source)
    text = work.batch(rows(0), [0]).texts.take([0])
    length, width = len(text.ids), embedder.dim
    vector, tokens = torch.randn(1, width).double(), torch.randn(length, width).double()
    for place in range(length):
        moved = tokens.clone()
        moved[place] = torch.randn(width)
        before, after = (
            work.decoder(vector, x, text, [9], embedder.backbone) for x in (tokens, moved)
        )
        changed = (before != after).any(1)  # rows 1 to length - 2
        seen = work.decoder.seen(9, 0, length - 2, length, torch.device("cpu"))
        expected = seen[:, place] if place else torch.zeros(length - 2, dtype=torch.bool)
        assert torch.equal(changed, expected)  # the first token is not there: the vector is
    same, other = (work.decoder(x, tokens, text, [9], embedder.backbone) for x in (vector, -vector))
    assert (other != same).any(1).all()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_the_decoder_masks_its_share_at_8192_tokens(folders, source, share):
    """Trap B12 of BGE-M3: no cap on how many tokens are masked."""
    _, work = at_work(folders["bert"], source, decoder_mask=share)
    seen = work.decoder.seen(5, 4_096, 256, 8_192, torch.device("cpu"))
    own = torch.zeros_like(seen)
    own[torch.arange(256), 4_097 + torch.arange(256)] = True
    own[:, 0] = True
    hidden = (~seen[~own]).double()
    # 2 million draws: a deviation of 0.0004.
    assert hidden.mean().item() == pytest.approx(share, abs=0.002)
    assert (seen[0] != seen[1]).double().mean() > 0.2  # another sample for each row
    later = work.decoder.seen(5, 4_352, 256, 8_192, torch.device("cpu"))
    assert (seen != later).double().mean() > 0.2  # and for each block of them


def test_row_masks_are_never_there_for_a_whole_long_text(folders, source, monkeypatch):
    embedder, work = at_work(folders["modernbert"], source, decoder_mask=0.0)
    text = work.batch(rows(0), [0]).texts.take([0])
    length = len(text.ids)
    vector, tokens = torch.randn(1, 64).double(), torch.randn(length, 64).double()
    whole = work.decoder(vector, tokens, text, [3], embedder.backbone)
    sizes, seen = [], type(work.decoder).seen

    def recorded(self, *args):
        sizes.append(seen(self, *args))
        return sizes[-1]

    monkeypatch.setattr(type(work.decoder), "seen", recorded)
    monkeypatch.setattr(decoding, "MASK_ENTRIES", 3 * length)
    tokens.requires_grad_()
    blocks = work.decoder(vector, tokens, text, [3], embedder.backbone)
    blocks.sum().backward()  # which draws them again
    assert max(mask.numel() for mask in sizes) == 3 * length
    assert len(sizes) == 2 * -(-(length - 2) // 3)
    torch.testing.assert_close(blocks, whole)


def test_masks_drawn_again_for_the_backward_pass_are_the_same(folders, source):
    embedder, work = at_work(folders["bert"], source)
    text = work.batch(rows(0), [0]).texts.take([0])
    vector = torch.randn(1, 64).double()
    tokens = torch.randn(len(text.ids), 64).double().requires_grad_()

    def f(x):
        states = work.decoder(vector, x, text, [3], embedder.backbone)
        return states[:, :3].sum()

    assert torch.autograd.gradcheck(f, (tokens,), fast_mode=True)


# ---- batches ---------------------------------------------------------------------------------


def test_masks_hang_on_the_seed_and_the_block_and_not_on_its_company(folders, source):
    _, work = at_work(folders["bert"], source)
    together, alone = work.batch(rows(1, 3), [7, 4]), work.batch(rows(3), [7, 4])
    size, texts = len(alone.labels), len(alone.texts)
    assert torch.equal(together.texts.ids[-size:], alone.texts.ids)
    assert torch.equal(together.labels[-size:], alone.labels)
    assert torch.equal(together.seeds[-texts:], alone.seeds)
    assert not torch.equal(work.batch(rows(3), [7, 5]).labels, alone.labels)
    assert len(set(together.seeds.tolist())) == len(together.texts)


def test_special_tokens_are_never_hidden_and_originals_are_the_texts(folders, source):
    _, work = at_work(folders["bert"], source, encoder_mask=0.9)
    batch = work.batch(rows(*range(len(work.drawn[0]))), [0])
    stock = work.embedder.tokenizer.stock
    wanted = stock(list(SENTENCES))["input_ids"]
    got = [batch.originals[a:b].tolist() for a, b in pairwise(batch.texts.offsets.tolist())]
    assert got == wanted
    special = torch.isin(batch.originals, torch.tensor(stock.all_special_ids))
    assert (batch.labels[special] == NO_LABEL).all()
    chosen = batch.labels != NO_LABEL
    assert chosen[~special].double().mean() > 0.7
    assert torch.equal(batch.labels[chosen], batch.originals[chosen])
    assert torch.equal(batch.texts.ids[~chosen], batch.originals[~chosen])


def test_all_texts_of_pairs_are_read_and_each_once(folders, tmp_path):
    write_examples(
        tmp_path / "pairs.jsonl",
        [
            Example(query=SENTENCES[0], positives=(SENTENCES[1],), negatives=(SENTENCES[2],)),
            Example(query=SENTENCES[3], positives=(SENTENCES[1], SENTENCES[0])),
        ],
    )
    embedder, work = at_work(folders["bert"], open_source(tmp_path / "pairs.jsonl"))
    batch = work.batch(rows(*range(len(work.drawn[0]))), [0])
    assert batch.texts.lengths == embedder.tokenizer(SENTENCES[:4], 100).lengths


def test_a_long_text_is_read_to_its_end(folders, tmp_path):
    (tmp_path / "long.txt").write_text(" ".join(SENTENCES) + "\n")
    embedder, work = at_work(folders["bert"], open_texts(tmp_path / "long.txt"))
    batch = work.batch(rows(*range(len(work.drawn[0]))), [0])
    (whole,) = embedder.tokenizer.bare([" ".join(SENTENCES)])
    assert max(batch.texts.lengths) == 32
    assert len(batch.originals) == len(whole.ids) + 2 * len(batch.texts)


def test_a_share_without_texts_has_no_loss(folders, source):
    embedder, work = at_work(folders["bert"], source)
    losses = work.backward(work.batch(rows(), [0]), ALL)
    assert losses["loss"].item() == 0 and not gradients(embedder)


# ---- training --------------------------------------------------------------------------------


def test_what_was_added_is_trained_and_dropped_again(folders, source, tmp_path):
    embedder = Embedder.load(folders["bert"])
    names = set(dict(embedder.named_parameters()))
    embedder, work = at_work(folders["bert"], source)
    added = set(dict(embedder.named_parameters())) - names
    work.backward(work.batch(rows(0), [0]), ALL)
    assert {name.split(".")[1] for name in added} == {"head", "decoder"}
    assert added <= set(gradients(embedder))
    work.finish()
    assert set(dict(embedder.named_parameters())) == names
    embedder.float().save(tmp_path / "model")
    Embedder.load(tmp_path / "model")


def test_frozen_embeddings_stay_as_they_are(folders, source):
    embedder = Embedder.load(folders["bert"])
    embedder.backbone.freeze_embeddings()
    collate = Collator(tokenize=embedder.tokenize, prompt_of=lambda role, task: "")
    work = RetroMAE(max_tokens=32).start(embedder, [source], collate)
    work.backward(work.batch(rows(0), [0]), ALL)
    assert "backbone.model.embeddings.word_embeddings.weight" not in gradients(embedder)


def test_training_makes_both_losses_smaller(folders, source):
    embedder, work = at_work(folders["bert"], source)
    optimizer = torch.optim.AdamW(embedder.parameters(), lr=3e-3)
    found = []
    for step in range(30):
        found.append(work.backward(work.batch(rows(0, 1, 2, 3), [0, step]), ALL))
        optimizer.step()
        optimizer.zero_grad()
    for name in ("encoder_loss", "decoder_loss"):
        first, last = (sum(float(x[name]) for x in part) for part in (found[:5], found[-5:]))
        assert last < 0.9 * first


@pytest.mark.parametrize(
    ("numbers", "complaint"),
    [
        ({"encoder_mask": 0.0}, "the masking probability must be between 0 and 1, got 0.0"),
        ({"decoder_mask": 1.0}, "decoder_mask is 1.0; give a share"),
        ({"max_tokens": 4}, "max_tokens is 4; give 8 or more"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(numbers, complaint):
    with pytest.raises(RecipeError, match=complaint):
        RetroMAE(**numbers)


# ---- two processes ---------------------------------------------------------------------------


def step_of(folder: Path) -> dict[str, torch.Tensor]:
    """The losses and gradients of a batch, summed over the processes."""
    embedder, work = at_work(folder / "base", open_texts(folder / "texts.txt"))
    mine = rows(0, 1, 2).share(distributed.rank(), distributed.world())
    losses = work.backward(work.batch(mine, [0, 1]), ALL)
    distributed.sum_gradients(embedder.parameters())
    together = distributed.gather_rows(torch.stack(list(losses.values()))[None]).sum(0)
    return {"losses": together, **gradients(embedder)}


def test_two_processes_are_one(tmp_path):
    quiet_model(tmp_path / "base", "bert")
    (tmp_path / "texts.txt").write_text("\n".join(SENTENCES) + "\n")
    alone = step_of(tmp_path)
    run_together(__file__, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert set(found) == set(alone)
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-9, msg=name)


def main(folder: Path) -> None:
    distributed.start()
    torch.save(step_of(folder), folder / f"{distributed.rank()}.pt")
    distributed.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
