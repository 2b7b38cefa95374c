"""The commands diagnose and probe."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tercet.cli.options import (
    DATA,
    READING,
    AttentionOption,
    BatchTokensOption,
    CompareWithOption,
    DeviceOption,
    DtypeOption,
    Figures,
    JsonOption,
    ModelOption,
    SeedOption,
    known_models,
    load,
    local_inputs,
    out_option,
    require_package,
)
from tercet.files.console import columns
from tercet.files.outputs import check_files, check_output

if TYPE_CHECKING:
    from tercet.evaluate.insight.latents import LatentUse


def diagnose(
    texts: Annotated[
        Path | None,
        typer.Argument(
            help="File of texts (.txt has one a line). Default: texts of the package.",
            callback=local_inputs,
        ),
    ] = None,
    *,
    model: ModelOption,
    compare_with: CompareWithOption = None,
    out: Annotated[Path, out_option("Folder for numbers, figures and report.html.")],
    triples: Annotated[
        Path | None,
        typer.Option(
            help="Lines with prefix, query, positive and negative. Default: some of the package.",
            rich_help_panel=DATA,
        ),
    ] = None,
    json: JsonOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch_tokens: BatchTokensOption = None,
) -> None:
    """Show what reading in both directions does to a decoder, and if it must be trained for it.

    Measures how much the beginning of a text depends on what follows it, and how the states of both
    directions differ layer by layer. --compare-with adds models of later stages. For a model with
    latent attention it also shows how much of its dictionary each head uses.

    Example:
        tercet diagnose --model smollm2 --compare-with runs/mine/1-mntp/model --out runs/diagnosis
    """
    from tercet.evaluate.insight.diagnose import DIAGNOSIS, Material, diagnose, prefix_table
    from tercet.evaluate.insight.latents import LABELS, latent_use
    from tercet.evaluate.report.figures import drawing, heat_maps, write_png

    require_package("matplotlib", "the report", "plot")
    shown, given = Figures(json), [model, *(compare_with or ()), texts, triples]
    check_files(given, json=shown.file)
    check_output(out, given, DIAGNOSIS)
    names = known_models(model, compare_with)
    material = Material.read(triples, texts)
    how = {"device": device, "batch_tokens": batch_tokens}
    uses: dict[str, LatentUse] = {}

    def loaded() -> Iterator[tuple[str, Any]]:
        for name in names:
            embedder = load(name, dtype, **how)
            if embedder.settings.layer is not None and embedder.settings.layer.kind == "latent":
                uses[name] = latent_use(embedder, material.texts)
            yield name, embedder

    found = diagnose(loaded(), out, material=material, seed=seed)
    prefixes = prefix_table(found, seed=seed)
    readings = columns("model and reading", *next(iter(prefixes.values())))
    for name, row in prefixes.items():
        readings.add_row(name, *map(str, row.values()))
    shown.print(readings)
    means = {name: each.layer_means()[1:] for name, each in found.items() if each.maps}
    _show_layers(means, shown)
    if uses:
        _show_latents(uses, shown)
        with drawing():
            maps = {name: use.heat_map() for name, use in uses.items()}
            write_png(out / "latents.png", heat_maps(maps, LABELS))
    shown.print(f"{out / 'report.html'}", soft_wrap=True)
    shown.write(
        {
            "readings": prefixes,
            "layers": {name: each.tolist() for name, each in means.items()},
            "latents": {name: use.rows() for name, use in uses.items()},
        }
    )


def _show_latents(uses: "dict[str, LatentUse]", shown: Figures) -> None:
    for name, use in uses.items():
        table = columns(f"latents of {name}", *next(iter(use.rows().values())))
        for head, row in use.rows().items():
            table.add_row(head, *(f"{number:.3f}" for number in row.values()))
        shown.print(table)


def _show_layers(means: dict[str, Any], shown: Figures) -> None:
    """Print the cosines of causal and bidirectional states; an encoder has no row."""
    table = columns("both ways and causal", "mean cosine", "lowest", "in layer", "last layer")
    for name, layers in means.items():
        place = f"{layers.argmin() + 1} of {len(layers)}"
        table.add_row(
            name, f"{layers.mean():.3f}", f"{layers.min():.3f}", place, f"{layers[-1]:.3f}"
        )
    if means:
        shown.print(table)


def probe(
    test: Annotated[Path, typer.Argument(help="Labelled words: CoNLL columns or .jsonl.")],
    train_data: Annotated[
        Path,
        typer.Option(help="Labelled words of other sentences to learn from.", rich_help_panel=DATA),
    ],
    model: ModelOption,
    compare_with: CompareWithOption = None,
    column: Annotated[
        int | None,
        typer.Option(
            help="Column of the label, counted from 1. Default: the last.", rich_help_panel=DATA
        ),
    ] = None,
    predictor: Annotated[
        bool,
        typer.Option(
            "--predictor",
            help="Take a word's vector one token earlier, where MNTP predicts it.",
            rich_help_panel=READING,
        ),
    ] = False,
    attention: AttentionOption = None,
    json: JsonOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    batch_tokens: BatchTokensOption = None,
) -> None:
    """Learn labels of words from their vectors alone, to see what a model knows of single words.

    Example:
        tercet probe test.conll --train-data train.conll --model smollm2
    """
    from tercet.data.files.conll import read_labelled
    from tercet.evaluate.measures.latent_words import ProbedModel, compare_words

    require_package("sklearn", "a probe", "probe")
    shown = Figures(json)
    check_files([test, train_data, model], json=shown.file)
    names = known_models(model, compare_with)
    sentences = [read_labelled(path, column) for path in (train_data, test)]
    how = {"device": device, "batch_tokens": batch_tokens, "attention": attention}
    stages = [ProbedModel(name, partial(load, name, dtype, **how), predictor) for name in names]
    header, *rows = compare_words(stages, *sentences, seed=seed).rows()
    table = columns(*header)
    for row in rows:
        table.add_row(*row)
    shown.print(table)
    shown.write([dict(zip(header, row, strict=True)) for row in rows])
