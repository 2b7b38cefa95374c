"""Turn a small language model into a text encoder: first by texts alone, then by pairs.

    python examples/llm2vec.py

Masked prediction (mntp) teaches the model to read in both directions, SimCSE makes vectors of
different texts differ, and pairs teach what answers what. The texts are Debian packages.
"""

from pathlib import Path

import pyarrow.parquet as pq

from tercet import (
    Embedder,
    Example,
    RetrievalSet,
    Run,
    llm2vec,
    measure,
    open_source,
    open_texts,
    train,
    write_examples,
)

PACKAGES = Path(__file__).parent / "data/packages.en.parquet"


def pairs(split: str, count: int) -> list[Example]:
    """Return the first pairs of a split; the file is in random order."""
    rows = pq.read_table(PACKAGES, filters=[("split", "=", split)]).slice(0, count).to_pylist()
    return [Example(row["short"], (row["long"],)) for row in rows]


def main(
    out: Path = Path("runs/examples/llm2vec"),
    model: str = "smollm2",
    rows: int = 1_000,
    steps: tuple[int, int, int] = (10, 10, 30),
    tests: int = 150,
) -> None:
    """Train the three stages, and print nDCG@10 on the test split before and after."""
    known = pairs("train", rows)
    write_examples(out / "data/pairs.jsonl", known)
    lines = [" ".join(text.split()) for pair in known for text in pair.positives]
    (out / "data/texts.txt").write_text("\n".join(lines), encoding="utf-8")
    test = RetrievalSet.from_examples(pairs("test", tests), "test")
    before = measure(Embedder.load(model, pooling="mean"), test).result

    recipe = llm2vec(
        model=model,
        stages="mntp,simcse,supervised",
        mntp_steps=steps[0],
        simcse_steps=steps[1],
        supervised_steps=steps[2],
        mntp_batch_size=4,
        mntp_block_tokens=128,
        simcse_batch_size=16,
        supervised_batch_size=16,
        max_tokens=128,
    )
    texts = [open_texts(out / "data/texts.txt")]
    data = {"texts": texts, "sentences": texts, "pairs": [open_source(out / "data/pairs.jsonl")]}
    trained = train(recipe, data, out / "run", run=Run(show_progress=False), say=print)

    after = measure(trained, test).result
    print(f"nDCG@10 before  {before.interval('ndcg@10')}")
    print(f"nDCG@10 after   {after.interval('ndcg@10')}")
    print(f"difference      {after.minus(before, 'ndcg@10').signed()}")


if __name__ == "__main__":
    main()
