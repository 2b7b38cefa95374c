"""NV-Embed, tables 2 to 4 (arXiv 2405.17428): attention, pooling and schedules of two stages."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tercet.data.files.sources import Source
from tercet.evaluate.suites.suite import EvaluationSet, open_sets
from tercet.recipes.flags import STEPS
from tercet.recipes.nv_embed import nv_embed
from tercet.studies.cells import Cell, Study, with_numbers_of
from tercet.studies.tables import (
    WORDS,
    Column,
    Picture,
    Results,
    Table,
    columns_by_category,
    signed,
)

ATTENTIONS = ("bidirectional", "causal")
POOLINGS = {"eos": "EOS", "mean": "mean", "latent": "latent", "self_attention": "self-att."}
BOTH_WAYS = {label: f"bidirectional-{pooling}" for pooling, label in POOLINGS.items()}
CAUSAL = {label: f"causal-{pooling}" for pooling, label in POOLINGS.items()}
SCHEDULES = {
    "one stage, in-batch": "one-stage-in-batch",
    "one stage, own": "one-stage-own",
    "two stages": BOTH_WAYS["latent"],
    "reversed": "reversed",
}


@with_numbers_of(nv_embed, "attention", "pooling", "stages", "steps", "blended_in_batch")
def study(
    data: Annotated[list[Source], "Examples of retrieval; may be repeated."],
    tasks: Annotated[list[Source], "Examples of other tasks; may be repeated."],
    test: Annotated[
        list[Path],
        "Examples, scored pairs, labelled texts, or a folder of BEIR; may be repeated.",
    ],
    **numbers: Any,
) -> Study:
    """Attention x pooling after each stage, and four schedules, as the tables of NV-Embed.

    Eleven runs with the same data, seed and number of steps. For the grid alone, add
    --only 'bidirectional-*' --only 'causal-*'; for the schedules alone, --only bidirectional-latent
    --only 'one-*' --only reversed.

    Example: tercet study examples/studies/nv_embed.py --data pairs.jsonl --tasks labels.jsonl
    --test test.jsonl --out runs/nv --keep-layers 6 --retrieval-steps 60 --blended-steps 60
    """
    sets = open_sets(test)
    return Study(
        cells=list(cells(**numbers)),
        data={"retrieval": data, "blended": [*data, *tasks]},
        sets=sets,
        report=partial(report, sets),
    )


def cells(
    retrieval_steps: int | None = None, blended_steps: int | None = None, **numbers: Any
) -> Iterator[Cell]:
    """Yield the grid, and the schedules besides the two stages that are in it.

    A schedule of one stage trains on all data, as long as both stages together.
    """
    first, second = retrieval_steps or STEPS, blended_steps or STEPS
    both: dict[str, Any] = {"retrieval_steps": first, "blended_steps": second, **numbers}
    for attention in ATTENTIONS:
        for pooling in POOLINGS:
            recipe = nv_embed(attention=attention, pooling=pooling, **both)  # pyright: ignore
            yield Cell(f"{attention}-{pooling}", recipe)
    one = {**both, "stages": "blended", "blended_steps": first + second}
    yield Cell("one-stage-in-batch", nv_embed(**one, blended_in_batch="all"))
    yield Cell("one-stage-own", nv_embed(**one))
    yield Cell("reversed", nv_embed(**both, stages="blended,retrieval"))


def report(sets: list[EvaluationSet], results: Results) -> Iterator[Table | Picture]:
    """Yield the paper's tables, differences on the same texts, and two pictures."""
    first, second = (columns_by_category(sets, stage=stage) for stage in (0, 1))
    attention = {f"both ways - causal, {name}": (BOTH_WAYS[name], CAUSAL[name]) for name in CAUSAL}
    latent = {f"latent - {name}": (BOTH_WAYS["latent"], BOTH_WAYS[name]) for name in CAUSAL}
    leads = attention | latent
    for stage, columns in (("stage 1 (retrieval)", first), ("stage 2 (blended)", second)):
        if results.has(*BOTH_WAYS.values(), *CAUSAL.values()):
            yield grid(f"Attention and pooling, after {stage}", results, columns)
        yield results.table(f"Differences on the same texts, after {stage}", {}, columns, leads)
    rows = [["stage 2 - stage 1", *(column.title for column in first)]]
    for name, cell in BOTH_WAYS.items():
        if results.has(cell):
            pairs = zip(second, first, strict=True)
            rows.append([name, *(signed(results.lead(cell, cell, *pair)) for pair in pairs)])
    yield Table("What the second stage adds", rows)
    last = columns_by_category(sets)
    if results.has(*SCHEDULES.values()):
        two = SCHEDULES["two stages"]
        leads = {f"two stages - {name}": (two, SCHEDULES[name]) for name in SCHEDULES}
        yield results.table("Schedules", SCHEDULES, last, leads, corner="schedule")
        yield results.bars("schedules", SCHEDULES, last)
    if results.has(*BOTH_WAYS.values()):
        yield results.bars("poolings", BOTH_WAYS, last)


def grid(title: str, results: Results, columns: list[Column]) -> Table:
    """Return table 2 or 3 of the paper: categories by pooling, ``both ways / causal``."""
    pairs = list(zip(BOTH_WAYS.values(), CAUSAL.values(), strict=True))
    rows = [["both ways / causal", *BOTH_WAYS, WORDS]]
    average, *categories = columns
    for column in (*categories, average):
        figures = [[results.figure(cell, column) for cell in pair] for pair in pairs]
        texts = [" / ".join(f"{figure.mean:.3f}" for figure in pair) for pair in figures]
        rows.append([column.title, *texts, f"{results.figure(WORDS, column).mean:.3f}"])
        if column is average:
            halves = [" / ".join(f"±{(f.high - f.low) / 2:.3f}" for f in pair) for pair in figures]
            rows.append(["95 % of the average", *halves, ""])
    spreads = [[results.spread(cell, average) for cell in pair] for pair in pairs]
    if spreads[0][0] is not None:
        rows.append(
            ["spread over seeds", *(" / ".join(map("{:.3f}".format, s)) for s in spreads), ""]
        )
    return Table(title, rows)
