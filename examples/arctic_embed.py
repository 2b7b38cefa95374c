"""Train a model in two languages whose vectors can be cut: large batches, then hard negatives.

    python examples/arctic_embed.py

A batch of the pretraining has one language, so that the language never gives an answer away. The
pretrained model mines the negatives of the fine-tuning itself. The texts are Debian packages.
"""

from pathlib import Path

import pyarrow.parquet as pq

from tercet import (
    Embedder,
    Example,
    RetrievalSet,
    Run,
    arctic_embed,
    measure,
    open_source,
    train,
    write_examples,
)

FOLDER = Path(__file__).parent / "data"


def pairs(lang: str, split: str, count: int) -> list[Example]:
    """Return the first pairs of a language and split; the files are in random order."""
    table = pq.read_table(FOLDER / f"packages.{lang}.parquet", filters=[("split", "=", split)])
    rows = table.slice(0, count).to_pylist()
    return [Example(row["short"], (row["long"],), lang=lang) for row in rows]


def main(
    out: Path = Path("runs/examples/arctic_embed"),
    model: str = "me5-small",
    rows: int = 800,
    steps: int = 24,
    tests: int = 200,
    widths: tuple[int, ...] = (384, 128),
) -> None:
    """Train both stages, and print nDCG@10 for each language and width before and after."""
    for lang in ("en", "ko"):
        write_examples(out / f"data/{lang}.jsonl", pairs(lang, "train", rows))
    sources = [open_source(out / f"data/{lang}.jsonl") for lang in ("en", "ko")]

    recipe = arctic_embed(
        model=model,
        steps=steps,
        pretraining_batch_size=48,
        finetuning_batch_size=16,
        finetuning_negatives=3,
        dims=[widths[-1]],
        pretraining_document_tokens=128,
        finetuning_max_tokens=128,
    )
    data = {"pairs": sources, "mined": sources}
    trained = train(recipe, data, out / "run", run=Run(show_progress=False), say=print)

    base = Embedder.load(model)
    for lang in ("en", "ko"):
        test = RetrievalSet.from_examples(pairs(lang, "test", tests), lang)
        for width in widths:
            before, after = (measure(each, test, dims=width).result for each in (base, trained))
            print(
                f"nDCG@10, {lang}, {width} coordinates: before {before.interval('ndcg@10')}", end=""
            )
            print(f", after {after.interval('ndcg@10')}", end="")
            print(f", difference {after.minus(before, 'ndcg@10').signed()}")


if __name__ == "__main__":
    main()
