"""What a model answered to evaluation sets, kept with all that it hangs on.

Answers are used again only where none of that has changed, so that a killed comparison goes on.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from tercet.errors import RecipeError
from tercet.files.atomic import replacing_file
from tercet.models.settings import FILE

ANSWERS: Final = "answers.npz"
FACTS: Final = "cell.json"
_OF_A_MODEL: Final = (".safetensors", ".bin", ".json", ".txt", ".model")  # what changes its vectors

Answers = Mapping[str, np.ndarray]
"""Of each evaluation set, by its name."""


def kept_answers(folder: Path, facts: Mapping[str, Any]) -> list[Answers] | None:
    """The answers of each stage that lie in a folder, None where there are none yet.

    Raises:
        RecipeError: when they hang on other facts.
    """
    if not (folder / FACTS).exists():
        return None
    known = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    other = [name for name, value in facts.items() if known.get(name) != value]
    if other:
        raise RecipeError(
            f"{folder}: was run with another {', '.join(other)}; give another --out, or delete "
            "that folder"
        )
    with np.load(folder / ANSWERS) as arrays:
        stages = len({name.partition("/")[0] for name in arrays.files})
        return [
            {name: arrays[f"{number}/{name}"] for name in facts["sets"]} for number in range(stages)
        ]


def keep_answers(
    folder: Path, facts: Mapping[str, Any], answers: Sequence[Answers], *, seconds: float = 0.0
) -> None:
    """Write the answers of each stage, and then what they hang on: a kill leaves none of them."""
    arrays: dict[str, Any] = {
        f"{number}/{name}": array
        for number, of_stage in enumerate(answers)
        for name, array in of_stage.items()
    }
    with replacing_file(folder / ANSWERS) as fresh, fresh.open("wb") as file:
        np.savez_compressed(file, **arrays)
    with replacing_file(folder / FACTS) as fresh:
        text = json.dumps({**facts, "seconds": round(seconds)}, indent=2)
        fresh.write_text(text + "\n", encoding="utf-8")


def fingerprint_of_model(folder: Path) -> str:
    """Changes when a model's weights, tokenizer or settings do, and not with how it was made."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*")):
        if path.name == FILE:
            record = json.loads(path.read_text(encoding="utf-8"))
            record.pop("about", None)
            digest.update(json.dumps(record, sort_keys=True).encode())
        elif path.is_file() and path.suffix in _OF_A_MODEL:
            digest.update(str(path.relative_to(folder)).encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
