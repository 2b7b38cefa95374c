"""Fine-tune with sentence-transformers, as its trainer does it, on batches in a given order.

    PYTHON benchmarks/judged_peer.py task.json

The peer of ``benchmarks/judged.py``, in an environment with sentence-transformers, datasets and
accelerate. It saves the model, and writes CPU minutes and versions to ``spent.json`` beside the
task. float32, AdamW, gradients clipped at 1; the task has the batches, and of each step the share
of the learning rate, so that both are those of tercet.
"""

import json
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
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
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import BatchSampler, SequentialSampler


class GivenBatches(BatchSampler):
    """Yields the rows of a data set in their order, in batches of the given sizes."""

    def __init__(self, dataset: Any, sizes: list[int]) -> None:
        super().__init__(SequentialSampler(dataset), max(sizes), drop_last=False)
        self.sizes = sizes

    def __iter__(self) -> Iterator[list[int]]:
        rows = iter(self.sampler)
        return (list(islice(rows, size)) for size in self.sizes)

    def __len__(self) -> int:
        return len(self.sizes)


class OnCourse(SentenceTransformerTrainer):
    """The trainer with a given share of the learning rate for each step."""

    course: list[float]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """Make the schedule; it is asked once more after the last step."""
        shares = [*self.course, 0.0]
        made = LambdaLR(cast("Any", optimizer or self.optimizer), lambda step: shares[step])
        self.lr_scheduler = made
        return made


def main(task: dict[str, Any], folder: Path) -> None:
    """Train and save."""
    torch.set_num_threads(1)
    model = SentenceTransformer(task["model"], device="cpu", model_kwargs={"dtype": torch.float32})
    model.max_seq_length = task["max_tokens"]
    rows = [row for batch in task["batches"] for row in batch]
    columns = ["query", "positive", *(f"negative_{n}" for n in range(len(rows[0]) - 2))]
    data = {name: [row[at] for row in rows] for at, name in enumerate(columns)}
    sizes = [len(batch) for batch in task["batches"]]

    def in_order(dataset: Any, **_: Any) -> BatchSampler:
        return GivenBatches(dataset, sizes)

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=len(sizes),
        per_device_train_batch_size=max(sizes),
        learning_rate=task["learning_rate"],
        seed=task["seed"],
        weight_decay=task["weight_decay"],
        batch_sampler=cast("Any", in_order),
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    loss = MultipleNegativesRankingLoss(model, scale=1 / task["temperature"])
    trainer = OnCourse(model, arguments, Dataset.from_dict(data), loss=loss)
    trainer.course = task["course"]
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
