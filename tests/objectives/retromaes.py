"""RetroMAE at work on tiny models."""

import json
from pathlib import Path

import numpy as np
import torch

from tercet.data.batches.collate import Collator
from tercet.data.batches.sampler import BatchRows
from tercet.models.embedder import Embedder
from tercet.models.network.chunked import Chunks
from tercet.objectives.retromae import RetroMAE, RetroMAEWork
from tests.toy import save_model

KINDS = ["bert", "xlm-roberta", "modernbert", "llama"]
ALL = Chunks(1_000)


def quiet_model(folder: Path, kind: str) -> Path:
    """A tiny model that drops nothing out."""
    config = save_model(folder, kind) / "config.json"
    said = json.loads(config.read_text())
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    config.write_text(json.dumps(said | {name: 0.0 for name in names if name in said}))
    return folder


def at_work(folder, source, **numbers) -> tuple[Embedder, RetroMAEWork]:
    embedder = Embedder.load(folder, attention="bidirectional", pooling="first").double()
    objective = RetroMAE(**{"max_tokens": 32, **numbers})
    collate = Collator(tokenize=embedder.tokenize, prompt_of=lambda role, task: "")
    return embedder.train(), objective.start(embedder, [source], collate)


def rows(*chosen: int) -> BatchRows:
    return BatchRows(np.zeros(len(chosen), np.int16), np.array(chosen))


def gradients(embedder) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in embedder.named_parameters() if p.grad is not None}
    embedder.zero_grad(set_to_none=True)
    return found
