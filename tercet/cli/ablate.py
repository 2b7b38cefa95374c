"""The verb ``ablate``: what each part of a recipe is worth, on a user's own data."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tercet.cli.sources import opened, weighted
from tercet.data.files.scan import EXAMPLE_FORMAT, RecordFormat
from tercet.data.files.sources import Source
from tercet.files.console import columns, results, say

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
    from tercet.evaluate.suites.suite import open_sets
    from tercet.studies.cells import nv_embed_cells
    from tercet.studies.tables import tables, write_findings

    sets = open_sets(test)
    retrieval, others = sources_of(data), sources_of(tasks)
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
    facts = {"ablation": "nv-embed", "numbers": numbers, "seeds": seeds}
    mixtures = {"retrieval": retrieval, "blended": [*retrieval, *others]}
    how = How(out, seeds, precision, keep_models)
    found = trained(lambda seed: nv_embed_cells(part, seed, **numbers), mixtures, sets, how)
    write_findings(out, found, {**facts, "run": how.run})
    show(tables(found), out)


@ablations.command("bge-m3")
def bge_m3(
    data: Annotated[
        list[Path], typer.Option(help="Examples, of every stage; may be repeated. FILE:2 weighs.")
    ],
    test: Annotated[
        list[Path],
        typer.Option(
            "--eval",
            help="Examples, or a folder in the layout of BEIR or FlagEmbedding; may be repeated.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for cells, tables and figures.")],
    texts: Annotated[
        list[Path] | None, typer.Option(help="Texts for the stage retromae; None: those of --data.")
    ] = None,
    pairs: Annotated[
        list[Path] | None, typer.Option(help="Examples for the stage contrastive; None: --data.")
    ] = None,
    base: Annotated[str, typer.Option(help="Zoo name, local folder or hub id.")] = "me5-small",
    part: Annotated[
        Literal["all", "distillation", "stages", "kinds", "teacher"],
        typer.Option(help="What is changed; teacher: the weight of self-distillation."),
    ] = "all",
    retromae_steps: Annotated[int, typer.Option(help="Of the stage retromae.")] = 1_000,
    contrastive_steps: Annotated[int, typer.Option(help="Of the stage contrastive.")] = 1_000,
    steps: Annotated[int, typer.Option(help="Of the stage unified.")] = 1_000,
    retromae_batch_size: Annotated[int, typer.Option(help="Blocks of texts a step.")] = 32,
    contrastive_batch_size: Annotated[int, typer.Option(help="Pairs a step.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Queries a step of the stage unified.")] = 64,
    negatives: Annotated[int, typer.Option(help="Mined negatives of a query, at most.")] = 7,
    learning_rate: Annotated[float, typer.Option(help="Of the stage unified.")] = 1e-5,
    multi_dim: Annotated[int | None, typer.Option(help="Width of a token's vector.")] = None,
    freeze_embeddings: Annotated[
        bool, typer.Option(help="Leave the token table as it is.")
    ] = False,
    query_tokens: Annotated[int | None, typer.Option(help="Longer queries are cut.")] = None,
    document_tokens: Annotated[int | None, typer.Option(help="Longer documents are cut.")] = None,
    seeds: Annotated[int, typer.Option(help="Runs of each cell, from seed 0 on.")] = 1,
    precision: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of matrix products.")
    ] = "float32",
    keep_models: Annotated[bool, typer.Option(help="Do not delete models once measured.")] = False,
) -> None:
    """Self-distillation, stages, kinds and the weight of the teacher, by every kind of vectors.

    Up to nine runs with the same data, seed and number of steps, each compared with the full one:
    all kinds with self-distillation, in the stage unified alone. A killed ablation goes on when
    the same command is given again. Writes table.md, results.json and figures.

    Example: tercet ablate bge-m3 --data mined.jsonl --eval test.jsonl --out runs/ablation
    --part distillation --steps 200 --batch-size 24
    """
    from tercet.data.files.texts import text_format
    from tercet.evaluate.suites.suite import open_kinds_set, open_sets
    from tercet.studies.cells import bge_m3_cells
    from tercet.studies.kinds_tables import kinds_tables, write_kinds_findings

    sets = open_sets(test, open_kinds_set)
    examples = sources_of(data)
    mixtures = {
        "examples": examples,
        "pairs": sources_of(pairs) if pairs else examples,
        "texts": sources_of(texts, text_format()) if texts else examples,
    }
    numbers = {
        "base": base,
        "retromae_steps": retromae_steps,
        "contrastive_steps": contrastive_steps,
        "steps": steps,
        "retromae_batch_size": retromae_batch_size,
        "contrastive_batch_size": contrastive_batch_size,
        "batch_size": batch_size,
        "negatives": negatives,
        "learning_rate": learning_rate,
        "multi_dim": multi_dim,
        "freeze_embeddings": freeze_embeddings,
        "query_tokens": query_tokens,
        "document_tokens": document_tokens,
    }
    facts = {"ablation": "bge-m3", "numbers": numbers, "seeds": seeds}
    how = How(out, seeds, precision, keep_models)
    found = trained(lambda seed: bge_m3_cells(part, seed, **numbers), mixtures, sets, how)
    write_kinds_findings(out, found, {**facts, "run": how.run})
    show(kinds_tables(found), out)


@dataclass(frozen=True, slots=True)
class How:
    """What a user asks of all cells."""

    out: Path
    seeds: int
    precision: Literal["float32", "bfloat16"]
    keep_models: bool

    @property
    def run(self) -> dict[str, Any]:
        """For the record."""
        from tercet.train.run import Run

        return asdict(Run(precision=self.precision))


def sources_of(paths: Sequence[Path], record_format: RecordFormat = EXAMPLE_FORMAT) -> list[Source]:
    """The sources of files and folders, each with the weight behind its name."""
    named = map(weighted, paths)
    return [
        each
        for path, weight in named
        for each in opened(path, weight=weight, record_format=record_format)
    ]


def trained(
    cells: Callable[[int], Iterable[Any]],
    mixtures: Mapping[str, Sequence[Source]],
    sets: Sequence[Any],
    how: How,
    *,
    ran: Callable[..., Any] | None = None,
) -> Any:
    """What all cells of every seed answer, and words; ``ran`` runs them, None: one by one."""
    from tercet.studies.run import Bench, baselines, run_cells
    from tercet.studies.tables import Found
    from tercet.train.run import Run

    run = Run(precision=how.precision)
    found = []
    for seed in range(how.seeds):
        folder = how.out if how.seeds == 1 else how.out / f"seed-{seed}"
        bench = Bench(mixtures, sets, folder, run, how.keep_models)
        found.append((ran or run_cells)(list(cells(seed)), bench, say))
    return Found(sets, found, baselines(sets))


def show(titled: Iterable[tuple[str, list[list[str]]]], out: Path) -> None:
    """Print tables, and where they were written."""
    for title, (header, *rows) in titled:
        results().print(f"\n{title}")
        table = columns(*header)
        for row in rows:
            table.add_row(*row)
        results().print(table)
    results().print(f"{out / 'table.md'}", soft_wrap=True)
