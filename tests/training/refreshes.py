"""Examples and a recipe whose negatives are mined again in training."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tercet.curate.mining import document_pools as mining_documents
from tercet.curate.mining import relevant as mining_relevant
from tercet.curate.mining.miner import Mining
from tercet.curate.mining.rules import MiningRule
from tercet.data.files.sources import Source, open_source, write_examples
from tercet.recipes.finetune import finetune
from tercet.training.recipe import Recipe, Refresh, Run
from tercet.types import Example
from tests.toy import SENTENCES

QUIET = Run(device="cpu", show_progress=False, save_steps=4)
NEAREST = Mining(rule=MiningRule(kind="naive"), negatives=3, depth=12)
DRAWN = MiningRule(kind="naive", shift=1, sample_from=8)
PART = 10  # rows that are mined together


def small_parts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mining_documents, "SHARD", PART)
    patch.setattr(mining_relevant, "SHARD", PART)


def rows() -> list[Example]:
    """Two rows ask the same, so that the answer of one is never a negative of the other."""
    found = [
        Example(" ".join(text.split()[-2:]) + f" {word}", (f"{text} {word}",), (f"a {word}",))
        for word in ("mail", "music")  # which the tokenizer knows: no two texts score the same
        for text in SENTENCES
    ]
    found[5] = replace(found[5], query=found[0].query.upper())
    found[7] = replace(found[7], positives=(found[7].positives[0], SENTENCES[3]))
    found[8] = replace(found[8], negatives=(SENTENCES[7].upper() + "  mail",))
    return found


def prepare(folder: Path) -> Source:
    write_examples(folder / "pairs.jsonl", rows())
    return open_source(folder / "pairs.jsonl")


def recipe_for(folder: Path, **changes: Any) -> Recipe:
    """Six steps of 12 examples in three epochs; mined after two and four."""
    plain = finetune(model=str(folder), batch_size=12, learning_rate=1e-3, steps=6, negatives=2)
    refresh = Refresh(every=2, mining=replace(NEAREST, depth=16, rule=DRAWN))
    return replace(plain, stages=(replace(plain.stages[0], refresh=refresh, **changes),))
