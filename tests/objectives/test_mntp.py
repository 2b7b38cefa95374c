from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as t

from tercet.data.batches.collate import Collator
from tercet.data.batches.masking import Masking
from tercet.data.batches.sampler import BatchRows
from tercet.data.files.texts import open_texts
from tercet.errors import ModelError, RecipeError
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks
from tercet.objectives.mntp import MNTP, NO_LABEL, MNTPWork
from tercet.objectives.token_heads import load_head
from tests.toy import DECODERS, SENTENCES, byte_bpe


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny Llama with a head of its own, and the tokenizer of ``toy.byte_bpe``."""
    path = tmp_path_factory.mktemp("causal-lm")
    torch.manual_seed(3)
    model = t.LlamaForCausalLM(DECODERS["llama"])  # pyright: ignore[reportArgumentType]
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(path)
    byte_bpe().save_pretrained(path)
    return path


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(SENTENCES) + "\n")
    return open_texts(path)


def collator(embedder):
    return Collator(tokenize=embedder.tokenize, prompt_of=lambda role, task: "")


def at_work(folder, source, **numbers) -> tuple[Embedder, MNTPWork]:
    embedder = Embedder.load(folder, attention="bidirectional")
    objective = MNTP(**{"head": str(folder), "block_tokens": 32, **numbers})
    return embedder, objective.start(embedder, [source], collator(embedder))


def rows(work: MNTPWork, *chosen: int) -> BatchRows:
    return BatchRows(np.zeros(len(chosen), np.int16), np.array(chosen))


def gradients(embedder):
    return {n: p.grad.clone() for n, p in embedder.named_parameters() if p.grad is not None}


def plain_loss(embedder, folder, batch):
    """transformers' own loss, text by text, with logits of all tokens: it shifts by itself."""
    model = t.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model.config.is_causal = False
    for module in model.modules():
        if isinstance(getattr(module, "is_causal", None), bool):
            module.is_causal = False  # pyright: ignore
    bounds = batch.texts.offsets.tolist()
    total = 0
    for start, stop in pairwise(bounds):
        ids, labels = batch.texts.ids[None, start:stop], batch.labels[start:stop]
        labels = labels.masked_fill(labels == NO_LABEL, -100)
        logits = model(input_ids=ids).logits[0]
        total += F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
    return total / (batch.labels != NO_LABEL).sum(), model


@pytest.mark.parametrize("max_tokens", [1_000, 20])
def test_loss_and_gradient_are_those_of_all_logits_shifted_by_one(folder, source, max_tokens):
    embedder, work = at_work(folder, source)
    batch = work.batch(rows(work, 0, 2, 3), [0])
    assert (batch.labels != NO_LABEL).sum() > 5
    losses = work.backward(batch, Chunks(max_tokens))
    expected, model = plain_loss(embedder, folder, batch)
    torch.testing.assert_close(losses["loss"], expected.detach(), rtol=1e-5, atol=1e-6)
    expected.backward()
    theirs = dict(model.model.named_parameters())
    for name, gradient in gradients(embedder).items():
        own = theirs[name.removeprefix("backbone.model.")].grad
        torch.testing.assert_close(gradient, own, rtol=1e-4, atol=1e-6)


def test_the_first_token_of_a_text_is_never_predicted_and_gaps_stay_inside(folder, source):
    _, work = at_work(folder, source, masking=Masking(probability=0.9, kind="all"))
    batch = work.batch(rows(work, *range(len(work.drawn[0]))), [0])
    first = batch.labels[batch.texts.offsets[:-1]]
    assert (first == NO_LABEL).all()
    chosen = batch.labels != NO_LABEL
    assert chosen.float().mean() > 0.7
    mask = byte_bpe().get_vocab()["_"]
    assert (batch.texts.ids[chosen] == mask).all() and (batch.labels[chosen] != mask).all()


def test_special_tokens_are_never_predicted(folder, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(f"</s>{text}</s>" for text in SENTENCES) + "\n")
    _, work = at_work(folder, open_texts(path), masking=Masking(probability=0.9, kind="all"))
    batch = work.batch(rows(work, *range(len(work.drawn[0]))), [0])
    ends = batch.texts.ids.eq(byte_bpe().get_vocab()["</s>"])
    assert ends.sum() == 2 * len(SENTENCES)
    assert (batch.labels[ends] == NO_LABEL).all()


def test_masks_hang_on_the_seed_and_the_block_and_not_on_its_company(folder, source):
    _, work = at_work(folder, source)
    together = work.batch(rows(work, 1, 3), [7, 4])
    alone = work.batch(rows(work, 3), [7, 4])
    size = len(alone.labels)
    assert torch.equal(together.texts.ids[-size:], alone.texts.ids)
    assert torch.equal(together.labels[-size:], alone.labels)
    assert not torch.equal(work.batch(rows(work, 3), [7, 5]).labels, alone.labels)


def test_accuracy_counts_right_guesses(folder, source):
    embedder, work = at_work(folder, source)
    batch = work.batch(rows(work, 0, 1, 2), [0])
    _, model = plain_loss(embedder, folder, batch)
    bounds = batch.texts.offsets.tolist()
    right = 0
    for start, stop in pairwise(bounds):
        guessed = model(input_ids=batch.texts.ids[None, start:stop]).logits[0, :-1].argmax(1)
        right += int((guessed == batch.labels[start + 1 : stop]).sum())
    total = int((batch.labels != NO_LABEL).sum())
    assert work.backward(batch, Chunks(1_000))["accuracy"] == pytest.approx(right / total)


def test_the_head_is_frozen_unless_it_is_asked_for(folder, source):
    embedder, work = at_work(folder, source)
    names = set(dict(embedder.named_parameters()))
    work.backward(work.batch(rows(work, 0), [0]), Chunks(1_000))
    assert not any("language_head" in name for name in names)
    assert not work.head.weight.requires_grad

    embedder, work = at_work(folder, source, train_head=True)
    work.backward(work.batch(rows(work, 0), [0]), Chunks(1_000))
    (name,) = set(dict(embedder.named_parameters())) - names
    assert name == "language_head.0" and gradients(embedder)[name].any()
    work.finish()
    assert set(dict(embedder.named_parameters())) == names


def test_a_new_mask_token_gets_a_row_in_the_token_table(folder, source, tmp_path):
    embedder, work = at_work(folder, source, mask_token="new")
    table = embedder.backbone.model.get_input_embeddings().weight
    number = embedder.tokenizer.stock.mask_token_id
    assert len(table) == 301 and number == 300
    batch = work.batch(rows(work, 0, 1), [0])
    assert number in batch.texts.ids.tolist()
    work.backward(batch, Chunks(1_000))
    embedder.save(tmp_path / "model")
    assert Embedder.load(tmp_path / "model").tokenizer.stock.mask_token == "<mask>"


def test_an_encoder_is_refused(encoder_folder, source):
    embedder = Embedder.load(encoder_folder)
    with pytest.raises(RecipeError, match="is for decoders"):
        MNTP(head=str(encoder_folder)).start(embedder, [source], collator(embedder))


def test_a_model_without_its_head_is_refused(decoder_folder, source):
    _, work = at_work(decoder_folder, source)
    with pytest.raises(ModelError, match="weights of its language-model head are missing"):
        work.backward(work.batch(rows(work, 0), [0]), Chunks(1_000))


def test_a_head_of_another_width_is_refused(folder, source, tmp_path):
    config = t.LlamaConfig(**{**DECODERS["llama"].to_dict(), "hidden_size": 32})
    t.LlamaForCausalLM(config).save_pretrained(tmp_path / "narrow")
    _, work = at_work(folder, source, head=str(tmp_path / "narrow"))
    with pytest.raises(RecipeError, match="takes states of 32 numbers, but the model's have 64"):
        work.backward(work.batch(rows(work, 0), [0]), Chunks(1_000))


@pytest.mark.parametrize(
    "kind", ["llama", "gemma2", "gemma3", "cohere2", "granite", "phi", "gpt2", "opt", "gpt_neox"]
)
def test_heads_of_many_architectures_give_their_models_logits(kind, tmp_path):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 90,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    more: dict[str, dict[str, Any]] = {
        "gemma2": {"head_dim": 8, "num_key_value_heads": 2},
        "gemma3": {"head_dim": 8},
        "granite": {"logits_scaling": 4.0},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    }
    config = t.AutoConfig.for_model(
        "gemma3_text" if kind == "gemma3" else kind, **sizes, **more.get(kind, {})
    )
    model = t.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    head = load_head(tmp_path)
    ids = torch.randint(3, 90, (1, 11))
    with torch.no_grad():
        states = model.eval().base_model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(head.logits(states), model(input_ids=ids).logits[0])


def test_a_model_that_bends_its_logits_in_an_unknown_way_is_refused(folder, monkeypatch):
    forward = t.LlamaForCausalLM.forward

    def bent(self, *args, **kwargs):
        output: Any = forward(self, *args, **kwargs)
        output.logits = output.logits.sin()
        return output

    monkeypatch.setattr(t.LlamaForCausalLM, "forward", bent)
    with pytest.raises(ModelError, match="are not its head times its states"):
        load_head(folder)
