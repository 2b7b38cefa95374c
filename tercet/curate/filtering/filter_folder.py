"""The folder that the filter writes: which command made it, and what that reported."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from tercet.curate.filtering.judge import Judge
from tercet.curate.filtering.passing import Filtering
from tercet.errors import RecipeError
from tercet.files.atomic import replacing_file
from tercet.models.zoo import zoo

SETTINGS: Final = "filter.json"
REPORT: Final = "report.json"
DRAWING: Final = "report.png"
_OURS: Final = ("pairs", "verdicts", "manifest", REPORT, SETTINGS, DRAWING)


def settings_of(paths: Sequence[Path], judge: Judge, filtering: Filtering) -> dict[str, Any]:
    """All that what is written hangs on; files by name, size and time, so that it is quick."""
    told = {
        "sources": {str(path): _stamps(path) for path in paths},
        "judge": {**asdict(judge), "files": _model_stamps(judge.model)},
        "filtering": asdict(filtering),
    }
    return json.loads(json.dumps(told))  # as it will be read: tuples have become lists


def finished(out: Path, settings: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The reports of the same command, when it has finished; it is noted that it begins, if not.

    Raises:
        RecipeError: when something else is there, or what another command makes.
        StorageError: when the disk refuses.
    """
    if out.is_file():
        raise RecipeError(f"{out}: is a file, and a folder is to be written; choose another --out")
    names = [path.name for path in out.glob("*")]
    strange = sorted(name for name in names if name not in _OURS and not name.startswith("."))
    before, ranked = _read(out / SETTINGS), (out / "manifest").exists()
    if before is None and (strange or ranked or (out / "pairs").exists()):
        name = (*strange, "pairs")[0]
        raise RecipeError(
            f"{out}: holds {name}, which is not the filter's; choose another --out, or move it away"
        )
    if before is not None and ranked and before != settings:
        raise RecipeError(
            f"{out}: was made from other {_differences(before, settings)}; choose another --out "
            "(what was embedded is used again), or delete the folder"
        )
    report = _read(out / REPORT) if before == settings else None
    if report is None:
        if not ranked:  # verdicts of other rules, by which nothing was ranked
            shutil.rmtree(out / "verdicts", ignore_errors=True)
        _write(out / SETTINGS, settings)
    return None if report is None else report["sources"]


def write_report(out: Path, reports: Sequence[Mapping[str, Any]]) -> None:
    """Write the reports for machines; from then on the folder is finished.

    Raises:
        StorageError: when the disk refuses.
    """
    _write(out / REPORT, {"sources": list(reports)})


def refuse_sources(out: Path, paths: Sequence[Path]) -> None:
    """Refuse to write into what is read.

    Raises:
        RecipeError: when the folder is a source, holds one, or is inside one.
    """
    target = out.resolve()
    for path in (path.resolve() for path in paths):
        if target == path or path in target.parents or target in path.parents:
            raise RecipeError(f"{out}: is or holds {path}, which is read; choose another --out")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, in the words of the command."""
    found = ["files"] if before.get("sources") != now["sources"] else []
    for part in ("judge", "filtering"):
        old = before.get(part, {})
        found += [
            f"{name} ({old.get(name)})" for name in now[part] if old.get(name) != now[part][name]
        ]
    return ", ".join(found).replace("_", " ") or "settings"


def _stamps(path: Path) -> list[Any]:
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    found = [(str(file), file.stat()) for file in files if file.exists()]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in found]


def _model_stamps(model: str) -> list[Any]:
    """Of a folder; the names of the zoo and of the hub stand for themselves."""
    is_name = zoo.find(model) is not None or not Path(model).exists()
    return [] if is_name else _stamps(Path(model))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with replacing_file(path) as fresh:
        fresh.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
