"""The verb ``tune-weights``: how much each kind of vectors should count, found on a dev set."""

from pathlib import Path
from typing import Annotated, Final

import typer

from tercet.cli.options import KindsOption, Precision, kinds_of, load
from tercet.errors import RecipeError
from tercet.files.console import columns, results, say
from tercet.kinds import KINDS, Weights
from tercet.models.zoo import zoo

_BY: Final = {
    "usual": "nobody: no others rank better than the usual weights",
    "grid": "the grid",
    "logistic": "logistic regression",
}


def tune_weights(
    model: Annotated[str, typer.Argument(help="Folder of a model with several kinds of vectors.")],
    dev: Annotated[
        Path,
        typer.Argument(
            help="Examples (.jsonl, .parquet), or a folder in the layout of BEIR or FlagEmbedding."
        ),
    ],
    task: Annotated[
        str | None,
        typer.Option(help="Weights for this task, with its prompts; None: the usual weights."),
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Keep them in the model's folder.")] = False,
    metric: Annotated[str, typer.Option(help="What to make large.")] = "ndcg@10",
    kinds: KindsOption = None,
    folds: Annotated[
        int, typer.Option(min=2, help="Parts of the queries, each measured by the others' weights.")
    ] = 5,
    depth: Annotated[
        int, typer.Option(min=1, help="Candidates of each query by each kind.")
    ] = 1_000,
    split: Annotated[str, typer.Option(help="Of a folder.")] = "dev",
    precision: Precision = "float32",
    seed: Annotated[int, typer.Option(help="Of the folds and the bootstrap.")] = 0,
) -> None:
    """Find the weights by which the sum of scores ranks best, and what they gain.

    Each query is measured with weights that the other folds chose, so the gain holds for queries
    that nobody has tuned on. With --save, search and eval take the weights from then on. Vectors
    do not change. A kind that --kinds leaves out gets the weight 0, since the others' weights were
    found without it.

    Example: tercet tune-weights runs/mine/model dev.jsonl --save
    """
    from tercet.evaluate.measures.prompts import task_names
    from tercet.evaluate.measures.retrieval import dev_candidates
    from tercet.evaluate.measures.tuned_weights import require_settings, save_weights, tune
    from tercet.evaluate.sets.retrieval_set import RetrievalSet, depth_of

    depth_of(metric)  # refuses an unknown one before the work
    folder = zoo.resolve(model, say)
    if save:
        require_settings(folder)
    is_folder = dev.is_dir()
    data = RetrievalSet.from_folder(dev, split) if is_folder else RetrievalSet.from_examples(dev)
    data.require_judgements("tune-weights")
    embedder = load(model, precision)
    wanted = kinds_of(kinds) or embedder.kinds
    if len(wanted) < 2:
        raise RecipeError(
            f"{model}: there are {', '.join(wanted)} vectors only, so there is nothing to weigh; "
            "take a model with several kinds (tercet train bge-m3)"
        )
    names = (task,) if task else task_names(dev, examples=not is_folder)
    found = dev_candidates(embedder, data, tasks=names, kinds=wanted, depth=depth, progress=True)
    tuned = tune(data, found, metric=metric, folds=folds, seed=seed)
    out = results()
    out.print(f"{len(data.queries):,} queries, {len(data.documents):,} documents")
    table = columns("weights", *wanted, f"{metric}, held out", "tuned minus these")
    rows = {"tuned": tuned.weights, "usual": Weights().only(wanted)}
    rows |= {kind: Weights(1.0, 1.0, 1.0).only((kind,)) for kind in wanted}
    for name, weights in rows.items():
        gain = tuned.gain(name, seed)
        shown = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"
        numbers = [f"{weights.of(kind):g}" for kind in wanted]
        table.add_row(
            name, *numbers, str(tuned.interval(name, seed)), "" if name == "tuned" else shown
        )
    out.print(table)
    of_folds = "; ".join(",".join(f"{each.of(kind):g}" for kind in wanted) for each in tuned.folds)
    say(f"weights that the folds were measured with: {of_folds}")
    say(
        f"chosen by {_BY[tuned.method]}; on the very queries that chose them: {tuned.fitted:.3f}, "
        "which flatters them"
    )
    left_out = " and ".join(kind for kind in embedder.kinds if kind not in wanted)
    if save:
        save_weights(folder, tuned.weights, task or "")
        what = f"for the task {task!r}" if task else "as its usual ones"
        rest = f"; {left_out} has the weight 0: sums leave it out" if left_out else ""
        out.print(f"{folder}: keeps these weights {what}{rest}", soft_wrap=True)
        before = embedder.settings.weights.get(task or "")
        if before is not None:
            numbers = ",".join(f"{before.of(kind):g}" for kind in KINDS)
            say(f"the weights that stood there before: {numbers}")
    else:
        say("nothing was saved; give --save to keep them with the model")
