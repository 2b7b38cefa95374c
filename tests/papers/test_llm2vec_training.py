"""LLM2Vec (arXiv 2404.05961), tests 5 to 9: masked next-token prediction, SimCSE, two processes.

Run as a script, this file is one of the two processes of test 9.
"""

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from torch import Tensor

from tercet import distributed
from tercet.data.batches.collate import Collator
from tercet.data.batches.masking import Masking
from tercet.data.batches.sampler import BatchRows
from tercet.data.files.texts import open_texts
from tercet.losses.tokens import Head, next_token_loss
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks
from tercet.objectives.mntp import MNTP, NO_LABEL
from tercet.objectives.simcse import SimCSE
from tests.processes import run_together
from tests.toy import DECODERS, SENTENCES, byte_bpe, pack

CODE = ("def __init__(self):", "snake_case", "a _ b")


def code_bpe() -> t.PreTrainedTokenizerFast:
    """Byte-level BPE that has seen code, so that "_" is part of longer tokens."""
    return byte_bpe().train_new_from_iterator([*CODE * 9, *SENTENCES], 300)


def save_base(folder: Path) -> Path:
    """A tiny Llama with its head, a tokenizer, and a file of texts."""
    torch.manual_seed(3)
    model = t.LlamaForCausalLM(DECODERS["llama"])  # pyright: ignore[reportArgumentType]
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    code_bpe().save_pretrained(folder)
    (folder / "texts.txt").write_text("\n".join([*SENTENCES, *CODE]) + "\n")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


def at_work(base: Path, objective: Any) -> tuple[Embedder, Any]:
    embedder = Embedder.load(base, attention="bidirectional")
    collate = Collator(tokenize=embedder.tokenize, prompt_of=lambda role, task: "")
    return embedder, objective.start(embedder, [open_texts(base / "texts.txt")], collate)


def mntp(base: Path, **numbers: Any) -> tuple[Embedder, Any]:
    return at_work(base, MNTP(**{"head": str(base), "block_tokens": 24, **numbers}))


def rows(*chosen: int) -> BatchRows:
    return BatchRows(np.zeros(len(chosen), np.int16), np.array(chosen))


def gradients(embedder: Embedder) -> list[Tensor]:
    return [p.grad.clone() for p in embedder.parameters() if p.grad is not None]


# ---- 5 to 7: masked next-token prediction ----------------------------------------------------


def test_the_loss_is_the_cross_entropy_of_each_token_from_the_state_before_it(base):
    """Test 5 of LLM2Vec."""
    embedder, work = mntp(base)
    batch = work.batch(rows(0, 2, 1), [0])
    found = work.backward(batch, Chunks(30))["loss"]
    ours = gradients(embedder)
    embedder.zero_grad()

    head = t.AutoModelForCausalLM.from_pretrained(base).lm_head.weight.detach()
    picked, bounds = [], batch.texts.offsets.tolist()
    for start, stop in pairwise(bounds):
        states = embedder.backbone(pack(batch.texts.ids[start:stop]))
        logits = (states @ head.T).log_softmax(1)  # of all places
        for i in range(1, stop - start):
            if batch.labels[start + i] != NO_LABEL:
                picked.append(-logits[i - 1, batch.labels[start + i]])
    expected = torch.stack(picked).mean()
    assert len(picked) == (batch.labels != NO_LABEL).sum() > 5
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=0)
    expected.backward()
    torch.testing.assert_close(ours, gradients(embedder), rtol=1e-4, atol=1e-6)


def test_the_first_token_of_a_text_has_no_label_since_nothing_predicts_it(base):
    """Test 5 of LLM2Vec."""
    _, work = mntp(base, masking=Masking(probability=0.9, kind="all"))
    batch = work.batch(rows(*range(len(work.drawn[0]))), [0])
    labelled = batch.labels != NO_LABEL
    assert len(batch.texts) > len(SENTENCES)
    assert not labelled[batch.texts.offsets[:-1]].any()
    assert labelled.float().mean() > 0.7


def test_gathered_places_have_the_loss_and_gradient_of_all_places():
    """Test 5 of LLM2Vec."""
    states = torch.randn(40, 16, requires_grad=True)
    head = Head(torch.randn(90, 16), torch.randn(90))
    labels = torch.where(torch.rand(40) < 0.3, torch.randint(90, (40,)), -100)
    labels[0] = -100
    whole = F.cross_entropy(head.logits(states)[:-1], labels[1:], ignore_index=-100)
    (expected,) = torch.autograd.grad(whole, states)
    places = (labels >= 0).nonzero().squeeze(1)
    loss, _ = next_token_loss(states[places - 1], labels[places], head, total=len(places), block=7)
    (found,) = torch.autograd.grad(loss, states)
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("probability", [0.3, 0.6])
def test_of_a_million_tokens_the_share_is_chosen_and_80_10_10_of_it(probability):
    """Test 6 of LLM2Vec."""
    rng = np.random.default_rng(5)
    ids = rng.integers(10, 3_000, 1_000_000)
    allowed = ids % 7 > 0
    masking = Masking(probability=probability)
    gaps, chosen = masking(ids, allowed, rng, mask=4, vocabulary=3_000)
    assert chosen[allowed].mean() == pytest.approx(probability, abs=0.002)
    assert not chosen[~allowed].any() and (gaps == ids)[~chosen].all()
    masked, kept = (gaps == 4)[chosen].mean(), (gaps == ids)[chosen].mean()
    assert (masked, kept) == (pytest.approx(0.8, abs=0.004), pytest.approx(0.1, abs=0.004))


def test_special_tokens_are_never_chosen_and_all_others_may_be(base, tmp_path):
    """Test 6 of LLM2Vec."""
    (tmp_path / "texts.txt").write_text("".join(f"<s>{text}</s>\n" for text in SENTENCES))
    embedder = Embedder.load(base, attention="bidirectional")
    masking = Masking(probability=0.9, kind="all")
    collate = Collator(tokenize=embedder.tokenize, prompt_of=lambda role, task: "")
    source = open_texts(tmp_path / "texts.txt")
    work = MNTP(head=str(base), masking=masking).start(embedder, [source], collate)
    batch = work.batch(rows(*range(len(work.drawn[0]))), [0])
    special = torch.isin(batch.texts.ids, torch.tensor([1, 2]))
    assert special.sum() == 2 * len(SENTENCES)
    assert (batch.labels[special] == NO_LABEL).all()
    chosen = batch.labels != NO_LABEL
    assert chosen.sum() > 50
    assert set(batch.texts.ids[chosen].tolist()) == {code_bpe().get_vocab()["_"]}


def test_the_tokenizer_saved_after_mntp_reads_code_as_before(base, tmp_path):
    """Test 7 of LLM2Vec."""
    embedder, work = mntp(base)
    work.backward(work.batch(rows(0), [0]), Chunks(1_000))
    work.finish()
    embedder.save(tmp_path / "model")
    before, after = (t.AutoTokenizer.from_pretrained(p) for p in (base, tmp_path / "model"))
    spoiled = code_bpe()
    spoiled.add_special_tokens({"mask_token": "_"})  # what must not be done
    for text in CODE:
        assert after(text)["input_ids"] == before(text)["input_ids"]
        assert after.decode(after(text)["input_ids"], skip_special_tokens=True) == text
        assert spoiled.decode(spoiled(text)["input_ids"], skip_special_tokens=True) != text
    assert spoiled(CODE[0])["input_ids"] != before(CODE[0])["input_ids"]


# ---- 8: SimCSE -------------------------------------------------------------------------------


@torch.no_grad()
def test_two_views_differ_in_training_and_vectors_know_no_neighbours(base):
    """Test 8 of LLM2Vec."""
    embedder, work = at_work(base, SimCSE())
    texts = work.batch(rows(0, 3, 9, 6), [0]).texts
    first, second = embedder.train()(texts).chunk(2)
    assert (F.cosine_similarity(first, second) < 0.999).all()
    first, second = embedder.eval()(texts).chunk(2)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
    alone = torch.cat([embedder(texts.take([i])) for i in range(4)])
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-5)
    assert len(set(texts.lengths)) > 2  # neighbours of other lengths, where padding would be


# ---- 9: two processes ------------------------------------------------------------------------

SHARED = {"simcse": (0, 3, 9, 6, 11), "mntp": (0, 2, 1), "mntp, one idle": (3,)}


def shared_step(base: Path, case: str) -> tuple[float, list[Tensor]]:
    """Loss and gradient of a batch of which each process takes its share; dropout is off."""
    embedder, work = at_work(base, SimCSE()) if case == "simcse" else mntp(base)
    embedder.double().eval()
    share = rows(*SHARED[case]).share(distributed.rank(), distributed.world())
    loss = work.backward(work.batch(share, [0]), Chunks(25))["loss"]
    distributed.sum_gradients(embedder.parameters())
    return float(loss), gradients(embedder)


def one_of_two(base: Path) -> None:
    torch.set_num_threads(1)
    distributed.start()
    found = {case: shared_step(base, case) for case in SHARED}
    torch.save(found, base / f"{distributed.rank()}.pt")
    distributed.stop()


def test_two_processes_have_the_gradient_of_one_in_its_size_too(base):
    """Test 9 of LLM2Vec."""
    run_together(__file__, str(base))
    both = [torch.load(base / f"{rank}.pt") for rank in range(2)]
    for case, batch in SHARED.items():
        assert len(batch) % 2  # one process has a text more
        loss, expected = shared_step(base, case)
        assert sum(facts[case][0] for facts in both) == pytest.approx(loss, rel=1e-6)
        flat = torch.cat([x.flatten() for x in expected])
        assert flat.norm() > 1e-3
        for facts in both:
            found = torch.cat([x.flatten() for x in facts[case][1]])
            assert (found - flat).norm() / flat.norm() < 1e-12


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
