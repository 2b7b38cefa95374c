"""What is learned of a saved model without changing it, and kept in the settings of its folder."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tercet.errors import ModelError, RecipeError
from tercet.files.atomic import replacing_file
from tercet.models.settings import FILE, Settings, read_settings
from tercet.rank.quantized import Precision, Quantizer, Ranges


def require_settings(folder: Path | str, what: str = "weights") -> None:
    """Check that something can be kept in a folder.

    Raises:
        ModelError: when the folder has no settings of ours, or they are damaged.
    """
    if not Path(folder).is_dir() or read_settings(Path(folder)) is None:
        raise ModelError(
            f"{folder}: has no {FILE}, so {what} cannot be kept there; save the model with tercet "
            "first: Embedder.load(...).save(folder)"
        )


def keep(folder: Path | str, setting: str, values: Mapping[str, Any]) -> None:
    """Add to a setting that maps names to values; nothing else of the folder is touched.

    Raises:
        StorageError: when the disk refuses.
    """
    path = Path(folder) / FILE
    record = json.loads(path.read_text(encoding="utf-8"))
    record["settings"].setdefault(setting, {}).update(values)
    with replacing_file(path) as fresh:
        text = json.dumps(record, indent=2, ensure_ascii=False)
        fresh.write_text(text + "\n", encoding="utf-8")


def save_ranges(folder: Path | str, found: Mapping[int, Ranges]) -> None:
    """Keep what codes need for these numbers of coordinates.

    No vector changes, and sentence-transformers' files do not say of it.

    Raises:
        ModelError: when the folder has no settings of ours, or they are damaged.
        StorageError: when the disk refuses.
    """
    require_settings(folder, "ranges of codes")
    keep(folder, "ranges", {str(dims): asdict(each) for dims, each in found.items()})


def quantizer_of(settings: Settings, precision: Precision, dims: int) -> Quantizer:
    """How a model's vectors of so many coordinates become codes.

    Raises:
        RecipeError: when nothing was learned for these.
    """
    if dims not in settings.ranges:
        known = ", ".join(map(str, sorted(settings.ranges))) or "none"
        raise RecipeError(
            f"the model keeps no ranges for {precision} codes of {dims} coordinates (it has some "
            f"for: {known}); learn them from documents: tercet calibrate MODEL texts.jsonl "
            f"--dims {dims} --save"
        )
    return settings.ranges[dims].quantizer(precision)
