"""The peer of ``m3_step``: FlagEmbedding 1.4.2, in an environment of its own, driven by lines.

It needs an older transformers, so it runs as a process of another Python, without tercet:

    python3.11 -m venv peer
    peer/bin/pip install torch==2.13.0
    peer/bin/pip install transformers==4.57.6 FlagEmbedding==1.4.2
    peer/bin/python -m benchmarks.m3_peer

One JSON object a line goes in, one comes out; whatever else is printed goes to standard error.
``texts`` is the path of a file with a JSON list of strings, ``rows`` that of one with a JSON list
of [query, [positive, negative, ...]].

    {"do": "make", "folder": F, "texts": T, "vocabulary": 8000}
        writes a random XLM-R (d 128, 4 layers) with both heads, no dropout, and a tokenizer of at
        most 8,000 pieces trained on the texts; rows of a larger vocabulary are never asked for
        -> {"parameters": n}
    {"do": "step_start", "folder": F, "rows": R, "queries": 8, "tokens": 512}
        -> {"trained": parameters, "base": bytes of memory before the first step}
    {"do": "step"}
        -> spent; "tokens", padding not counted; "slots", counted; "loss" before the update
    {"do": "versions"} -> versions of the packages by name

Spent is ``{"seconds": CPU seconds, "peak": bytes of memory at most meanwhile}``. Each step takes
the next rows, in a circle.

From the package: the collator, the model with all three heads and its loss with self-distillation,
as its fine-tuning with ``--unified_finetuning True --use_self_distill True`` runs it. Written here
after the Trainer that it uses: AdamW (the fused one, its default), gradients clipped at 1. In
favour of the peer: the Trainer's own work and the gradient checkpointing of the published script
are left out, and so is the step counter, which lets self-distillation start one step late.
"""

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from FlagEmbedding.abc.finetune.embedder import (  # pyright: ignore[reportMissingImports]
    AbsEmbedderCollator,
)
from FlagEmbedding.finetune.embedder.encoder_only.m3 import (  # pyright: ignore
    EncoderOnlyEmbedderM3Model,
    EncoderOnlyEmbedderM3Runner,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from benchmarks.sides import Answer, memory, serve, spent

HIDDEN, PIECES = 128, 8_000


def make(folder: str, texts: str, vocabulary: int) -> Answer:
    """Write a random model and a tokenizer for it."""
    torch.manual_seed(0)
    fast = Tokenizer(models.Unigram())
    pieces: Any = pre_tokenizers.Metaspace()
    fast.pre_tokenizer = pieces
    fast.train_from_iterator(
        json.loads(Path(texts).read_text(encoding="utf-8")),
        trainers.UnigramTrainer(
            vocab_size=min(vocabulary, PIECES) - 1,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    around: Any = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    fast.post_processor = around
    config = XLMRobertaConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * HIDDEN,
        max_position_embeddings=514,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    model = XLMRobertaModel(config)
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    write_heads(folder)
    return {"parameters": sum(weight.numel() for weight in model.parameters())}


def write_heads(folder: str) -> None:
    """Both, at random; the bias of the sparse one lets half of the tokens or more count."""
    torch.manual_seed(1)
    for name, rows, lift in (("colbert_linear.pt", HIDDEN, 0.0), ("sparse_linear.pt", 1, 0.2)):
        weight, bias = torch.randn(rows, HIDDEN) / HIDDEN**0.5, torch.zeros(rows) + lift
        torch.save({"weight": weight, "bias": bias}, Path(folder) / name)


def start(folder: str, rows: str, queries: int, tokens: int) -> tuple[Callable[[], Answer], Answer]:
    """A step on ``queries`` rows, each with its own documents, against all of them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = EncoderOnlyEmbedderM3Model(
        EncoderOnlyEmbedderM3Runner.get_model(folder),
        tokenizer=tokenizer,
        temperature=0.02,
        normalize_embeddings=True,
        use_self_distill=True,
        self_distill_start_step=-1,
    )
    collate = AbsEmbedderCollator(tokenizer, query_max_len=tokens, passage_max_len=tokens)
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    adam = torch.optim.AdamW(weights, lr=1e-5, weight_decay=0.0, fused=True)
    endless = cycle(json.loads(Path(rows).read_text(encoding="utf-8")))

    def once() -> Answer:
        chosen = [next(endless) for _ in range(queries)]
        batch = collate([(query, documents, None) for query, documents in chosen])
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        adam.step()
        model.zero_grad()
        masks = [batch[side]["attention_mask"] for side in ("queries", "passages")]
        return {
            "loss": loss.item(),
            "tokens": sum(int(mask.sum()) for mask in masks),
            "slots": sum(mask.numel() for mask in masks),
        }

    trained = sum(weight.numel() for weight in weights)
    return lambda: spent(once), {"trained": trained, "base": memory("VmRSS")}


def main() -> None:
    """Read commands, answer them, until the input ends."""
    torch.set_num_threads(1)
    step: list[Callable[[], Answer]] = []

    def answer(do: str, **numbers: Any) -> Answer:
        if do == "make":
            return make(**numbers)
        if do == "versions":
            packages = ("torch", "transformers", "FlagEmbedding", "tokenizers", "numpy")
            return {package: version(package) for package in packages}
        if do == "step_start":
            once, told = start(**numbers)
            step[:] = [once]
            return told
        return step[0]()

    serve(answer)


if __name__ == "__main__":
    main()
