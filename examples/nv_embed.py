"""Train a language model for several tasks at once, with a layer of latent attention.

    python examples/nv_embed.py

The first stage learns to find a Debian package by the line about it, with mined hard negatives.
The second mixes this with another task: which packages are of the same section.
"""

from pathlib import Path

import pyarrow.parquet as pq

from tercet import (
    Embedder,
    Example,
    Mining,
    RetrievalSet,
    Run,
    measure,
    mine,
    nv_embed,
    open_source,
    train,
    write_examples,
)

PACKAGES = Path(__file__).parent / "data/packages.en.parquet"
FIND = "Instruct: find the package that this line is about\nQuery: "
SORT = "Instruct: find a package of the same section\nQuery: "


def packages(split: str, count: int) -> list[dict[str, str]]:
    """Return the first packages of a split; the file is in random order."""
    return pq.read_table(PACKAGES, filters=[("split", "=", split)]).slice(0, count).to_pylist()


def pairs(rows: list[dict[str, str]]) -> list[Example]:
    """Return the line about each package with its description."""
    return [Example(r["short"], (r["long"],), query_prompt=FIND, task="find") for r in rows]


def sections(rows: list[dict[str, str]]) -> list[Example]:
    """Return two lines of one section each, and one of another; others are no negatives."""
    last: dict[str, str] = {}
    found: list[Example] = []
    for row in rows:
        section, line = row["section"], row["short"]
        other = next((text for name, text in last.items() if name != section), None)
        if section in last and other:
            found.append(
                Example(
                    line,
                    (last[section],),
                    (other,),
                    query_prompt=SORT,
                    task="sort",
                    in_batch="none",
                )
            )
        last = {section: line} | {name: text for name, text in last.items() if name != section}
    return found


def main(
    out: Path = Path("runs/examples/nv_embed"),
    model: str = "smollm2",
    teacher: str = "minilm",
    rows: int = 600,
    steps: int = 30,
    tests: int = 150,
) -> None:
    """Mine negatives, train both stages, and print nDCG@10 on the test split before and after."""
    train_rows, folder = packages("train", rows), out / "data"
    write_examples(folder / "pairs.jsonl", pairs(train_rows))
    write_examples(folder / "sections.jsonl", sections(train_rows))
    found = [open_source(folder / "pairs.jsonl")]
    mine(
        Embedder.load(teacher),
        found,
        folder / "mined.jsonl",
        mining=Mining(negatives=1, prompts="teacher"),
        work=folder / "work",
    )
    test = RetrievalSet.from_examples(pairs(packages("test", tests)), "test")
    before = measure(Embedder.load(model, prompts={"query": FIND}), test).result

    recipe = nv_embed(model=model, steps=steps, batch_size=8, negatives=1, max_tokens=96)
    mined, sorted_ = open_source(folder / "mined.jsonl"), open_source(folder / "sections.jsonl")
    data = {"retrieval": [mined], "blended": [mined, sorted_]}
    trained = train(recipe, data, out / "run", run=Run(show_progress=False), say=print)

    after = measure(trained, test, task="find").result
    print(f"nDCG@10 before  {before.interval('ndcg@10')}")
    print(f"nDCG@10 after   {after.interval('ndcg@10')}")
    print(f"difference      {after.minus(before, 'ndcg@10').signed()}")


if __name__ == "__main__":
    main()
