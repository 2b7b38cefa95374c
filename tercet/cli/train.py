"""The verb ``train``: a recipe's parameters become flags.

Beside them stand the flags of the data that it reads, and of the machine it runs on.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_args

import typer

from tercet.cli.options import numbers_of, opened, weighted, whole_numbers
from tercet.data.batches.mixture import names_some, refuse_unknown, weighed
from tercet.data.files.scan import EXAMPLE_FORMAT
from tercet.data.files.sources import Source
from tercet.data.files.texts import text_format
from tercet.errors import RecipeError
from tercet.files.console import results, say
from tercet.files.outputs import check_output
from tercet.recipes.arctic_embed import arctic_embed
from tercet.recipes.bge_m3 import bge_m3
from tercet.recipes.finetune import finetune
from tercet.recipes.llm2vec import llm2vec
from tercet.recipes.nv_embed import nv_embed


@dataclass(frozen=True, slots=True, kw_only=True)
class Reads:
    """Data that a recipe reads: what its stages call it, and the flag that names its files."""

    mixture: str
    flag: str
    help: str
    texts: bool = False  # plain texts; false: examples
    needed: bool = True
    otherwise: str | None = None  # the flag whose files are taken where this one names none
    beside: str | None = None  # the flag whose files are read as well


PAIRS: Final = Reads(
    mixture="pairs",
    flag="data",
    help="Examples: .jsonl, .parquet or a folder of sources; may be repeated. FILE:2 weighs.",
)


TEXTS: Final = Reads(
    mixture="texts",
    flag="data",
    help="Texts: .txt (one a line), .jsonl, .parquet or a folder; may be repeated. FILE:2 weighs.",
    texts=True,
    needed=False,
)
SENTENCES: Final = Reads(
    mixture="sentences",
    flag="sentences",
    help="Texts for SimCSE; None: those of --data.",
    texts=True,
    needed=False,
    otherwise="data",
)
RETRIEVAL: Final = Reads(
    mixture="retrieval",
    flag="data",
    help="Examples of retrieval tasks, for both stages; may be repeated. FILE:2 weighs.",
)
TASKS: Final = Reads(
    mixture="blended",
    flag="tasks",
    help="Examples of other tasks (see tercet convert), for the stage blended; may be repeated.",
    needed=False,
    beside="data",
)
TEXTS_OR_DATA: Final = Reads(
    mixture="texts",
    flag="texts",
    help="Texts for the stage retromae, .txt, .jsonl or .parquet; None: all texts of --data.",
    texts=True,
    needed=False,
    otherwise="data",
)
PAIRS_OR_DATA: Final = Reads(
    mixture="pairs",
    flag="pairs",
    help="Examples for the stage contrastive; None: --data.",
    needed=False,
    otherwise="data",
)
EXAMPLES: Final = Reads(
    mixture="examples",
    flag="data",
    help="Examples, files or folders, for every stage that has no data of its own; may be "
    "repeated. FILE:2 weighs.",
    needed=False,
)
SOURCES: Final = Reads(
    mixture="pairs",
    flag="data",
    help="Examples: files, or folders of sources; may be repeated. FILE:2 weighs.",
    needed=False,
)
MINED_OR_DATA: Final = Reads(
    mixture="mined",
    flag="mined",
    help="Examples with negatives for the fine-tuning (see tercet mine); None: those of --data, "
    "mined by the pretrained model.",
    needed=False,
    otherwise="data",
)
MORE_PAIRS: Final = Reads(
    mixture="pairs", flag="pairs", help="Examples for the stage supervised.", needed=False
)

recipes = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@recipes.callback()
def _about_recipes() -> None:
    """Train an embedder by a recipe.

    Example: tercet train finetune --data pairs.jsonl --out runs/mine
    """


def training_verb(recipe: Callable[..., Any], *reads: Reads, example: str) -> Callable[..., None]:
    """Return a function that typer can turn into a command, which trains by the recipe."""

    @wraps(recipe)
    def command(out: Path, dev: Path | None, **flags: Any) -> None:
        from tercet.training.plan import RUN
        from tercet.training.recipe import Run

        flags["models_at"] = whole_numbers("models-at", flags["models_at"])
        run = Run(**{name: flags.pop(name) for name in list(flags) if name in Run.__annotations__})
        field = flags.pop("text_field", "text")
        files = {kind.flag: flags.pop(kind.flag) or [] for kind in reads}
        weights = numbers_of(flags.pop("weight"), "weight", float)
        counts = numbers_of(flags.pop("count"), "count", int)

        def data(built: Any) -> dict[str, list[Source]]:
            found = _data(built, reads, files, field)
            return _weighed(found, weights, counts)

        named = [weighted(path)[0] for paths in files.values() for path in paths]
        check_output(out, [*named, dev], RUN)
        _train(recipe(**flags), data, out, dev, run)

    shown = [_data_flag(kind) for kind in reads]
    if any(kind.texts for kind in reads):
        shown.append(_flag("text_field", str, "Where a text is in a record.", "text"))
    shown += [
        _flag(
            "weight", list[str] | None, "NAME=2 or NAME/de=0.5: uses an epoch; repeatable.", None
        ),
        _flag("count", list[str] | None, "NAME/de=10000: its examples an epoch; repeatable.", None),
        _flag("out", Path, "Run folder; the model goes into its folder model."),
        _flag(
            "dev", Path | None, "Examples to measure on, and to choose the best weights by.", None
        ),
    ]
    numbers = [
        _flag(parameter.name, kind, text, parameter.default)
        for parameter in inspect.signature(recipe).parameters.values()
        for kind, text in [get_args(parameter.annotation)]
    ]
    machine = [
        _flag("precision", Literal["float32", "bfloat16"], "Of matrix products.", "float32"),
        _flag("device", str | None, "Such as cpu or cuda; None: a GPU if there is one.", None),
        _flag("memory_gb", float | None, "For activations; None: half of what is free.", None),
        _flag("chunk_tokens", int | None, "Tokens encoded together.", None),
        _flag("save_minutes", float, "Between checkpoints.", 5.0),
        _flag("save_steps", int | None, "Between checkpoints, as well.", None),
        _flag("eval_steps", int | None, "Between evaluations; None: ten times.", None),
        _flag("shard_weights", bool, "Each process holds a part of the weights (FSDP2).", False),
        _flag("checkpoint_activations", bool, "Compute layers again, keep less of them.", False),
        _flag(
            "models_at",
            str | None,
            "Steps of the first stage, with commas, after which its model is saved as well; 0: as "
            "it begins.",
            None,
        ),
        _flag("cache_tokens", bool, "Tokenize once, and keep the tokens on disk.", False),
        _flag("tensorboard", bool, "Write TensorBoard files too.", False),
    ]
    everything = [*shown, *numbers, *machine]
    command.__signature__ = inspect.Signature(everything)  # pyright: ignore
    command.__annotations__ = {p.name: p.annotation for p in everything}
    command.__doc__ = (
        f"{inspect.getdoc(recipe)}\n\nA killed run goes on when the same command is given again."
        f"\n\nExample: {example}"
    )
    return command


def _data_flag(kind: Reads) -> inspect.Parameter:
    if kind.needed:
        return _flag(kind.flag, list[Path], kind.help)
    return _flag(kind.flag, list[Path] | None, kind.help, None)


def _flag(name: str, kind: Any, text: str, default: Any = ...) -> inspect.Parameter:
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind, typer.Option(help=text)],
    )


def _data(
    recipe: Any, reads: tuple[Reads, ...], files: Mapping[str, list[Path]], field: str
) -> dict[str, list[Source]]:
    """The sources of each mixture, opened; a file that is read twice is opened once."""
    asked = {stage.data: stage.name for stage in recipe.stages}
    known: dict[tuple[Path, bool], list[Source]] = {}
    found: dict[str, list[Source]] = {}
    used: set[str] = set()
    are_texts = {kind.flag: kind.texts for kind in reads}
    for kind in reads:
        if kind.mixture not in asked:
            continue
        flag = kind.flag if files[kind.flag] or kind.otherwise is None else kind.otherwise
        if not files[flag]:
            raise RecipeError(
                f"the stage {asked[kind.mixture]} needs --{kind.flag}, and there is none"
            )
        flags = [flag] if kind.beside is None else [kind.beside, flag]
        used.update(flags)
        found[kind.mixture] = [
            source
            for name in flags
            for path in files[name]
            for source in _opened(path, are_texts[name], field, known)
        ]
    for flag, paths in files.items():
        if paths and flag not in used:
            stages = ", ".join(stage.name for stage in recipe.stages)
            raise RecipeError(
                f"--{flag} is given, but no stage reads it (stages: {stages}); leave it out, or "
                "add the stage that does"
            )
    return found


def _opened(
    named: Path, texts: bool, field: str, known: dict[tuple[Path, bool], list[Source]]
) -> list[Source]:
    if (named, texts) not in known:
        path, weight = weighted(named)
        record_format = text_format(field) if texts else EXAMPLE_FORMAT
        known[named, texts] = opened(path, weight=weight, record_format=record_format)
    return known[named, texts]


def _weighed(
    data: dict[str, list[Source]], weights: Mapping[str, float | int], counts: Mapping[str, int]
) -> dict[str, list[Source]]:
    """Every mixture with the weights that were given by name."""
    refuse_unknown([*weights, *counts], [source for some in data.values() for source in some])
    return {
        name: weighed(
            some,
            {key: value for key, value in weights.items() if names_some(key, some)},
            {key: value for key, value in counts.items() if names_some(key, some)},
        )
        for name, some in data.items()
    }


def _train(
    recipe: Any,
    data: Callable[[Any], dict[str, list[Source]]],
    out: Path,
    dev: Path | None,
    run: Any,
) -> None:
    from tercet import distributed
    from tercet.evaluate.measures.by_kind import dev_score
    from tercet.evaluate.measures.prompts import task_names
    from tercet.evaluate.sets.retrieval_set import RetrievalSet
    from tercet.training.loop import train

    distributed.start()
    try:
        sources = data(recipe)
        score = None
        if dev is not None:
            task = task_names(dev, examples=True)[0]
            score = dev_score(RetrievalSet.from_examples(dev), task)
        tell = say if distributed.is_main() else (lambda line: None)
        train(recipe, sources, out, score=score, run=run, say=tell)
        if distributed.is_main():
            results().print(f"{out / 'model'}", soft_wrap=True)
            say(f"next: tercet index {out / 'model'} docs.jsonl --out {out / 'index'}")
    finally:
        distributed.stop()


recipes.command("finetune")(
    training_verb(
        finetune, PAIRS, example="tercet train finetune --data pairs.jsonl --out runs/mine"
    )
)
recipes.command("llm2vec")(
    training_verb(
        llm2vec,
        TEXTS,
        SENTENCES,
        MORE_PAIRS,
        example="tercet train llm2vec --base smollm2 --data texts.txt --out runs/mine",
    )
)
recipes.command("nv-embed")(
    training_verb(
        nv_embed,
        RETRIEVAL,
        TASKS,
        example="tercet train nv-embed --base smollm2 --data pairs.jsonl --tasks labels.jsonl "
        "--out runs/mine",
    )
)
recipes.command("bge-m3")(
    training_verb(
        bge_m3,
        EXAMPLES,
        TEXTS_OR_DATA,
        PAIRS_OR_DATA,
        example="tercet train bge-m3 --base me5-small --data mined.jsonl --out runs/mine",
    )
)
recipes.command("arctic-embed")(
    training_verb(
        arctic_embed,
        SOURCES,
        MINED_OR_DATA,
        example="tercet train arctic-embed --base me5-small --data pairs.jsonl --mined mined.jsonl "
        "--out runs/mine",
    )
)
