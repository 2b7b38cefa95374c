"""Compare how models use the words that follow, and whether they need training for it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np
from jaxtyping import Float64

from tercet.data.files.documents import read_documents
from tercet.evaluate.insight.lookahead import (
    DirectionMap,
    PrefixResult,
    PrefixTriple,
    direction_map,
    prefix_sensitivity,
    read_triples,
)
from tercet.evaluate.report.figures import (
    HeatMap,
    ScoreSample,
    as_svg,
    drawing,
    heat_maps,
    histograms,
    write_png,
)
from tercet.evaluate.report.intervals import Interval, interval
from tercet.evaluate.report.page import (
    Page,
    Section,
    facts,
    figure,
    interval_table,
    paragraph,
    write_page,
)
from tercet.files.artifacts import write_json
from tercet.files.outputs import FolderKind, check_output, json_object, mark
from tercet.models.embedder import Embedder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ReadingMode: TypeAlias = Literal["causal", "echo", "bidirectional"]  # echo: causal, each text twice

FILE: Final = "diagnosis.json"
DIAGNOSIS: Final = FolderKind(
    "a diagnosis", shared=True, is_older=lambda folder: "versions" in json_object(folder / FILE)
)
_TEXTS: Final = 5  # of a user's file that are mapped
_DIGITS: Final = 6  # of a cosine in the JSON

PARAGRAPHS: Final = (
    "A lighthouse is a tower with a strong lamp at its top, built where a coast is dangerous to "
    "ships. The first ones burned wood or coal in the open, and in rain they were hard to see. In "
    "the nineteenth century, rings of ground glass began to gather the light of a small flame "
    "into a beam that reached the horizon.",
    "Bread rises because yeast eats the sugar in the dough and gives off gas. The gas would escape "
    "if kneading had not joined the proteins of the flour into a net that holds it. In the oven "
    "the bubbles grow once more, the net sets, and the crust turns brown.",
    "The river begins as meltwater under a glacier and falls two thousand metres before it reaches "
    "the plain. There it slows down, drops the sand that it has carried, and splits into arms that "
    "move from year to year, so that no map of them stays right for long.",
)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The results of one model."""

    prefixes: Mapping[ReadingMode, PrefixResult]  # of an encoder: only "bidirectional"
    maps: tuple[DirectionMap, ...]  # one a text; empty for an encoder

    def layer_means(self) -> Float64[np.ndarray, "layers"]:
        """Return the mean of each layer over the tokens of all texts."""
        return np.concatenate([each.cosines for each in self.maps], axis=1).mean(axis=1)


@dataclass(frozen=True, slots=True)
class Material:
    """The texts that models read, and their origin."""

    triples: Sequence[PrefixTriple]
    texts: Sequence[str]
    origin: Mapping[str, str]

    @staticmethod
    def read(triples: Path | None = None, text: Path | None = None) -> "Material":
        """Read a user's files, or by default those of the package; at most five texts.

        Raises:
            DataError: at the first record that is not a triple or not a text, naming the line.
        """
        own = "tercet's own"
        texts = (
            PARAGRAPHS if text is None else [d.text for d in islice(read_documents(text), _TEXTS)]
        )
        origin = {"triples": str(triples or own), "texts": str(text or own)}
        return Material(read_triples(triples), texts, origin)


def diagnose(
    models: Iterable[tuple[str, Embedder]],
    out: Path,
    *,
    material: Material | None = None,
    seed: int = 0,
) -> dict[str, Diagnosis]:
    """Analyse each model, and write the results to the folder ``out``.

    The first decoder is also measured with causal attention, as a control: its cosines are 1,
    unless each text is repeated (echo). Later models are measured with bidirectional attention
    only. ``models`` may load each model when it is needed, so that only one is in memory.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        RecipeError: if ``out`` holds the report of another run, or the texts do not fit a model.
        StorageError: if the disk refuses.
    """
    with drawing():  # raises before the work
        check_output(out, kind=DIAGNOSIS)
    material = material or Material.read()
    found: dict[str, Diagnosis] = {}
    for name, embedder in models:
        control = not any(each.maps for each in found.values())
        found[name] = _diagnosis(embedder, material, control=control)
        del embedder  # before the next is loaded
    write_diagnosis(out, found, material, seed=seed)
    return found


def _diagnosis(embedder: Embedder, material: Material, *, control: bool) -> Diagnosis:
    decoder = embedder.backbone.is_decoder
    sensitivity = partial(prefix_sensitivity, embedder, material.triples)
    prefixes: dict[ReadingMode, PrefixResult] = {}
    if decoder and control:
        prefixes["causal"] = sensitivity(attention="causal")
        prefixes["echo"] = sensitivity(attention="causal", echo=True)
    prefixes["bidirectional"] = sensitivity(attention="bidirectional")
    maps = tuple(direction_map(embedder, text) for text in material.texts if decoder)
    return Diagnosis(prefixes, maps)


def write_diagnosis(
    folder: Path, found: Mapping[str, Diagnosis], material: Material, *, seed: int = 0
) -> None:
    """Write ``diagnosis.json``, ``report.html`` and PNG figures; equal numbers give equal bytes.

    Raises:
        MissingExtraError: if matplotlib is not installed.
        RecipeError: if the folder holds the report of another run.
        StorageError: if the disk refuses.
    """
    check_output(folder, kind=DIAGNOSIS)
    record = _record(found, material, seed)
    mark(folder, DIAGNOSIS)
    write_json(folder / FILE, record, indent=1)
    with drawing():
        section = diagnosis_section(found, seed=seed)
        write_png(folder / "prefix_sensitivity.png", _prefix_figure(found))
        if maps := _mapped(found):
            write_png(folder / "direction_map.png", heat_maps(maps))
    settings = {
        "triples": f"{material.origin['triples']}: {len(material.triples)}",
        "texts": f"{material.origin['texts']}: {len(material.texts)}",
        "seed": str(seed),
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    }
    title = f"Diagnosis of {', '.join(found)}"
    page = Page(title, (), [section, Section("Settings", [facts(settings)])])
    write_page(folder / "report.html", page)


def diagnosis_section(found: Mapping[str, Diagnosis], *, seed: int = 0) -> Section:
    """Return the part of a report that compares models, such as the stages of one.

    Call it inside ``tercet.evaluate.report.figures.drawing``.
    """
    prefixes = (
        "Cosine of a prefix with itself when the continuation has the same meaning in other "
        "words (blue) and another meaning (orange). A causal model does not see what follows: "
        "all its cosines are 1, unless each text is repeated (echo). The further the blue "
        "histogram is to the right of the orange one, the more the model uses what follows."
    )
    directions = (
        "Cosine of a token's states with causal and with bidirectional attention and the "
        "same weights, by layer, for the tokens of the first text; at the right the mean "
        "of each layer over the tokens of all texts. Bright everywhere: bidirectional "
        "attention may work without training. Dark: the model has to learn it."
    )
    drawings = [figure(as_svg(_prefix_figure(found), prefixes), prefixes)]
    if maps := _mapped(found):
        drawings.append(figure(as_svg(heat_maps(maps), directions), directions))
    return Section(
        "The effect of the words that follow",
        [
            *(paragraph(_map_summary(name, each)) for name, each in found.items() if each.maps),
            interval_table("model", prefix_table(found, seed=seed), over="triples"),
            *drawings,
        ],
    )


def prefix_table(
    found: Mapping[str, Diagnosis], *, seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """Return a row for each model and reading mode, such as ``smollm2 causal``."""
    return {name: result.intervals(seed) for name, result in _readings(found).items()}


def _readings(found: Mapping[str, Diagnosis]) -> dict[str, PrefixResult]:
    return {
        f"{name} {reading}": result
        for name, each in found.items()
        for reading, result in each.prefixes.items()
    }


def _map_summary(name: str, found: Diagnosis) -> str:
    means = found.layer_means()[1:]
    return (
        f"{name}: its causal and bidirectional states have a mean cosine of {means.mean():.3f} "
        f"over layers 1 to {len(means)}; the lowest is {means.min():.3f}, in layer "
        f"{means.argmin() + 1}, and the last is {means[-1]:.3f}."
    )


def _prefix_figure(found: Mapping[str, Diagnosis]) -> "Figure":
    samples = {
        name: ScoreSample(result.positive.tolist(), result.negative.tolist())
        for name, result in _readings(found).items()
    }
    names = ("same meaning", "other meaning")
    return histograms(samples, names=names, score="cosine", counted="triples", bins=24)


def _mapped(found: Mapping[str, Diagnosis]) -> dict[str, HeatMap]:
    return {
        name: HeatMap(each.maps[0].tokens, each.maps[0].cosines, each.layer_means())
        for name, each in found.items()
        if each.maps
    }


def _record(found: Mapping[str, Diagnosis], material: Material, seed: int) -> dict[str, Any]:
    """Return all numbers, and what is needed to reproduce them."""
    return {
        "models": {
            name: {
                "prefix_sensitivity": {
                    reading: _prefix_record(result, seed)
                    for reading, result in each.prefixes.items()
                },
                "direction_map": _map_record(each) if each.maps else None,
            }
            for name, each in found.items()
        },
        "triples": {"from": material.origin["triples"], "count": len(material.triples)},
        "texts": {"from": material.origin["texts"], "texts": list(material.texts)},
        "seed": seed,
        "versions": {name: version(name) for name in ("tercet", "torch", "transformers", "numpy")},
    }


def _prefix_record(result: PrefixResult, seed: int) -> dict[str, Any]:
    gap = interval(result.gap, seed=seed)
    return {
        "triples": len(result.gap),
        "skipped": result.skipped,
        "mean_positive": float(result.positive.mean()),
        "mean_negative": float(result.negative.mean()),
        "gap": {"mean": gap.mean, "low": gap.low, "high": gap.high, "resamples": gap.resamples},
        "accuracy": result.accuracy,
        "positive": result.positive.round(_DIGITS).tolist(),
        "negative": result.negative.round(_DIGITS).tolist(),
    }


def _map_record(found: Diagnosis) -> dict[str, Any]:
    return {
        "layer_means": found.layer_means().round(_DIGITS).tolist(),
        "maps": [
            {"tokens": list(each.tokens), "cosines": each.cosines.round(_DIGITS).tolist()}
            for each in found.maps
        ],
    }
