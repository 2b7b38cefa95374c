"""The verb ``ablate``: what each part of a recipe is worth, on a user's own data."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from tercet.console import columns, results, say

ablations = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@ablations.callback()
def _about_ablations() -> None:
    """Train a recipe again and again with one part changed, and compare.

    Example: tercet ablate nv-embed --data pairs.jsonl --tasks labels.jsonl --eval test.jsonl
    --out runs/ablation
    """


@ablations.command("nv-embed")
def nv_embed(
    data: Annotated[list[Path], typer.Option(help="Examples of retrieval; may be repeated.")],
    tasks: Annotated[list[Path], typer.Option(help="Examples of other tasks; may be repeated.")],
    test: Annotated[
        list[Path],
        typer.Option(
            "--eval",
            help="Examples, scored pairs, labelled texts, or a folder of BEIR; may be repeated.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for cells, tables and figures.")],
    base: Annotated[str, typer.Option(help="Zoo name, local folder or hub id.")] = "smollm2",
    keep_layers: Annotated[
        int | None, typer.Option(help="Keep the first layers only, to be quick; None: all.")
    ] = None,
    part: Annotated[
        Literal["all", "grid", "schedules"],
        typer.Option(help="grid: attention and pooling; schedules: of the stages."),
    ] = "all",
    steps: Annotated[int, typer.Option(help="Of the stage retrieval.")] = 1_000,
    blended_steps: Annotated[int, typer.Option(help="Of the stage blended.")] = 1_000,
    batch_size: Annotated[int, typer.Option(help="Queries a step.")] = 128,
    negatives: Annotated[int, typer.Option(help="Mined negatives of a query, at most.")] = 7,
    learning_rate: Annotated[float, typer.Option(help="Of the stage retrieval.")] = 2e-5,
    blended_learning_rate: Annotated[float, typer.Option(help="Of the stage blended.")] = 1.5e-5,
    latents: Annotated[int, typer.Option(help="Of latent attention.")] = 512,
    init: Annotated[
        Literal["normal", "identity"], typer.Option(help="Of the layer before pooling.")
    ] = "identity",
    max_tokens: Annotated[int, typer.Option(help="Longer texts are cut.")] = 512,
    seeds: Annotated[int, typer.Option(help="Runs of each cell, from seed 0 on.")] = 1,
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of matrix products.")
    ] = "float32",
    keep_models: Annotated[bool, typer.Option(help="Do not delete models once measured.")] = False,
) -> None:
    """Attention x pooling after each stage, and four schedules, as the tables of NV-Embed.

    Eleven runs with the same data, seed and number of steps. A killed ablation goes on when the
    same command is given again. Writes table.md, results.json and figures.

    Example: tercet ablate nv-embed --data pairs.jsonl --tasks labels.jsonl --eval test.jsonl
    --out runs/ablation --keep-layers 6 --steps 60 --blended-steps 60 --batch-size 32
    """
    from tercet.ablation.cells import nv_embed_cells
    from tercet.ablation.run import Bench, baselines, run_cells
    from tercet.ablation.tables import Found, tables, write_findings
    from tercet.cli.training import weighted
    from tercet.data.sources import open_source
    from tercet.evaluate.suite import open_sets
    from tercet.train.run import Run

    sets = open_sets(test)
    given = [[weighted(path) for path in paths] for paths in (data, tasks)]
    retrieval, others = [[open_source(p, weight=w) for p, w in paths] for paths in given]
    run = Run(precision=precision)
    numbers = {
        "base": base,
        "keep_layers": keep_layers,
        "steps": steps,
        "blended_steps": blended_steps,
        "batch_size": batch_size,
        "negatives": negatives,
        "learning_rate": learning_rate,
        "blended_learning_rate": blended_learning_rate,
        "latents": latents,
        "init": init,
        "max_tokens": max_tokens,
    }
    found = []
    for seed in range(seeds):
        folder = out if seeds == 1 else out / f"seed-{seed}"
        mixtures = {"retrieval": retrieval, "blended": [*retrieval, *others]}
        bench = Bench(mixtures, sets, folder, run, keep_models)
        found.append(run_cells(list(nv_embed_cells(part, seed, **numbers)), bench, say))
    every = Found(sets, found, baselines(sets))
    facts = {"ablation": "nv-embed", "numbers": numbers, "seeds": seeds, "run": asdict(run)}
    write_findings(out, every, facts)
    for title, (header, *rows) in tables(every):
        results().print(f"\n{title}")
        table = columns(*header)
        for row in rows:
            table.add_row(*row)
        results().print(table)
    results().print(f"{out / 'table.md'}", soft_wrap=True)
