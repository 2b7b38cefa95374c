"""What the verb ``eval`` does with tasks of mteb."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tercet.files.atomic import replacing_file
from tercet.files.console import columns, results, say


def measure_tasks(
    names: Sequence[str],
    tasks: Sequence[str],
    read: Callable[[str], Any],
    *,
    dims: int | None,
    prompts: bool,
    figures: Path | None,
) -> None:
    """Run tasks on models, show what they say, and write it with the conditions if asked for.

    Raises:
        MissingExtraError: when mteb is not installed.
        RecipeError: for a task that mteb does not know, or for which the model learned a prompt
            that it would not get.
    """
    from tercet.evaluate.measures.conditions import conditions, versions
    from tercet.evaluate.measures.prompts import drop_prompts
    from tercet.evaluate.suites.mteb import as_mteb, named_tasks, run_tasks

    chosen = named_tasks(tasks)
    record: dict[str, Any] = {"models": {}, "results": {}, "versions": versions("mteb", "datasets")}
    shown = columns("model", "task", "part", "figure", "score", "Recall@100")
    for name in names:
        embedder = read(name)
        if not prompts:
            drop_prompts(embedder)
        record["models"][name] = conditions(embedder, dims=dims)
        rows = record["results"][name] = []
        for score in run_tasks(as_mteb(embedder, name, dims=dims), chosen):
            rows.append(asdict(score) | {"score": None if score.skipped else score.score})
            if score.skipped:
                say(f"{score.task}: skipped: {score.skipped}")
                continue
            recall = dict(score.more).get("recall@100")
            cells = (score.part, score.figure, f"{score.score:.3f}")
            shown.add_row(name, score.task, *cells, "" if recall is None else f"{recall:.3f}")
        if figures is not None:  # after each model: a later one may take hours
            with replacing_file(figures) as fresh:
                text = json.dumps(record, indent=2, ensure_ascii=False)
                fresh.write_text(text + "\n", encoding="utf-8")
    if shown.row_count:
        results().print(shown)
