"""Each recipe on a tiny model and a few texts, as a training on a device is tested."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as t

from tercet.data.files.sources import open_source, write_examples
from tercet.data.files.texts import open_texts
from tercet.recipes.arctic_embed import arctic_embed
from tercet.recipes.bge_m3 import bge_m3
from tercet.recipes.distil import distil
from tercet.recipes.finetune import finetune
from tercet.recipes.llm2vec import llm2vec
from tercet.recipes.nv_embed import nv_embed
from tercet.training.log import read
from tercet.training.recipe import Recipe
from tercet.types import Example
from tests import toy

BUILD: Mapping[str, Callable[[Path, int], Recipe]] = {
    "finetune an encoder": lambda f, n: finetune(str(f / "bert"), steps=n, batch_size=8),
    "finetune a decoder": lambda f, n: finetune(
        str(f / "llama"), steps=n, batch_size=8, attention="bidirectional"
    ),
    "LoRA": lambda f, n: finetune(str(f / "llama"), steps=n, batch_size=8, lora_rank=4),
    "dims": lambda f, n: finetune(str(f / "bert"), steps=n, batch_size=8, dims=[8, 32]),
    "bge_m3": lambda f, n: bge_m3(
        str(f / "xlm-roberta"),
        steps=3 * n,
        multi_dim=16,
        retromae_batch_size=4,
        contrastive_batch_size=6,
        unified_batch_size=6,
    ),
    "llm2vec": lambda f, n: llm2vec(
        str(f / "llama"),
        stages="mntp,simcse,supervised",
        steps=3 * n,
        mntp_batch_size=4,
        mntp_block_tokens=32,
        simcse_batch_size=6,
        supervised_batch_size=4,
        lora_rank=4,
    ),
    "SimCSE of an encoder": lambda f, n: llm2vec(
        str(f / "bert"), stages="simcse", steps=n, simcse_batch_size=6, simcse_attention_dropout=0.0
    ),
    "nv_embed": lambda f, n: nv_embed(
        str(f / "llama"),
        steps=2 * n,
        batch_size=6,
        latents=8,
        heads=4,
        max_tokens=64,
        lora_rank=4,
    ),
    "distil": lambda f, n: distil(
        str(f / "bert"), str(f / "wide"), keep_layers=2, steps=n, batch_size=8
    ),
    "arctic_embed": lambda f, n: arctic_embed(
        str(f / "wide"),
        pretraining_steps=n,
        finetuning_steps=n,
        pretraining_batch_size=8,
        finetuning_batch_size=4,
        finetuning_negatives=2,
    ),
}


@dataclass(frozen=True)
class Workplace:
    """A folder of tiny models and of data for every stage of every recipe."""

    folder: Path

    def recipe(self, name: str, steps: int) -> Recipe:
        """A recipe with this number of steps in each stage."""
        return BUILD[name](self.folder, steps)

    def data(self, recipe: Recipe) -> dict[str, Any]:
        pairs = [open_source(self.folder / "pairs.jsonl")]
        texts = [open_texts(self.folder / "texts.txt")]
        is_text = recipe.name in ("llm2vec", "distil")
        return {
            stage.data: texts if is_text and stage.data in ("texts", "sentences") else pairs
            for stage in recipe.stages
        }


def workplace(folder: Path) -> Workplace:
    """Make the models and the data.

    Attention has no dropout of the model's: a GPU leaves it out. That of SimCSE is asked for, so a
    GPU keeps it, with other random numbers.
    """
    for kind in ("bert", "xlm-roberta"):
        toy.save_model(folder / kind, kind)
        path = folder / kind / "config.json"
        settings = json.loads(path.read_text()) | {"attention_probs_dropout_prob": 0.0}
        path.write_text(json.dumps(settings))
    torch.manual_seed(3)
    t.LlamaForCausalLM(toy.DECODERS["llama"]).save_pretrained(folder / "llama")  # pyright: ignore
    toy.byte_bpe().save_pretrained(folder / "llama")
    config: dict[str, Any] = toy.ENCODERS["bert"].to_dict() | {
        "hidden_size": 288,
        "num_hidden_layers": 2,
    }
    config |= {"attention_probs_dropout_prob": 0.0}
    toy.random_model(t.BertConfig(**config)).save_pretrained(folder / "wide")
    toy.wordpiece().save_pretrained(folder / "wide")
    texts = toy.SENTENCES
    rows = [
        Example(
            f"{' '.join(text.split()[-2:])} {i}",
            (f"{text} number {i}",),
            (texts[(i + 1) % 12], texts[(i + 2) % 12]),
        )
        for i in range(4)
        for text in texts
    ]
    write_examples(folder / "pairs.jsonl", rows)
    (folder / "texts.txt").write_text("".join(f"{text} {i}\n" for i in range(4) for text in texts))
    return Workplace(folder)


def losses(run: Path) -> list[float]:
    """The losses of all stages of a run, in order."""
    logs = sorted(run.glob("**/log.jsonl"))
    return [row["loss"] for log in logs for row in read(log) if "loss" in row]
