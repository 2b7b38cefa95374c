"""Fine-tune with sentence-transformers, as its trainer does it, on batches in a given order.

    PYTHON benchmarks/judged_peer.py task.json

The peer of ``benchmarks/judged.py``, in an environment with sentence-transformers, datasets and
accelerate. It saves the model, and writes CPU minutes and versions to ``spent.json`` beside the
task. float32, AdamW, gradients clipped at 1, a linear rise over a tenth of the steps and a linear
fall, as tercet does it.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.utils.data import BatchSampler, SequentialSampler


def main(task: dict[str, Any], folder: Path) -> None:
    """Train and save."""
    torch.set_num_threads(1)
    model = SentenceTransformer(task["model"], device="cpu", model_kwargs={"dtype": torch.float32})
    model.max_seq_length = task["max_tokens"]
    columns = ["query", "positive", *(f"negative_{n}" for n in range(len(task["rows"][0]) - 2))]
    rows = {name: [row[at] for row in task["rows"]] for at, name in enumerate(columns)}

    def in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
        return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=task["steps"],
        per_device_train_batch_size=task["batch_size"],
        learning_rate=task["learning_rate"],
        lr_scheduler_type="linear",
        warmup_steps=round(task["steps"] * 0.1),
        seed=task["seed"],
        weight_decay=task["weight_decay"],
        batch_sampler=cast("Any", in_order),
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    loss = MultipleNegativesRankingLoss(model, scale=1 / task["temperature"])
    trainer = SentenceTransformerTrainer(model, arguments, Dataset.from_dict(rows), loss=loss)
    begin = time.process_time()
    trainer.train()
    minutes = (time.process_time() - begin) / 60
    model.save(task["out"])
    packages = ("sentence-transformers", "transformers", "torch")
    facts = {
        "training_minutes": round(minutes, 2),
        "versions": {name: version(name) for name in packages},
    }
    (folder / "spent.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    path = Path(sys.argv[1])
    main(json.loads(path.read_text(encoding="utf-8")), path.parent)
