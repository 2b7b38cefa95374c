"""What a model is worth on a set, kept in a file, so that it need not be measured again.

A name of a file holds all that figures depend on: the model's weights and settings, the files of
the set, and how they were asked for. What was measured with anything else has another name.
"""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np

from tercet.evaluate.suites.languages import Place, SetScores
from tercet.evaluate.suites.suite import digest_of
from tercet.files.atomic import replacing_file

_VERSION: Final = 1  # of the way figures are computed; a change to it makes old files strangers
_ARRAYS: Final = ("same", "chance", "own")


class KeptScores:
    """A folder of measured sets, of one model that is read in one way."""

    def __init__(self, folder: Path, model: str) -> None:
        self._folder = folder
        self._model = model  # its fingerprint and all else that it depends on

    def find(self, place: Place) -> SetScores | None:
        """What was measured on a set before; None: nothing, or it cannot be read any more."""
        try:
            # Opened here: numpy leaves a file open that it cannot read.
            with self._path(place).open("rb") as file, np.load(file) as found:
                told = json.loads(str(found["told"]))
                scores = {name: found[f"scores {name}"] for name in told.pop("metrics")}
                arrays = {name: found[name] for name in _ARRAYS}
        except (OSError, ValueError, KeyError, BadZipFile):
            return None
        langs = tuple(told.pop("langs"))
        return SetScores(**told, langs=langs, scores=scores, **arrays)

    def keep(self, place: Place, found: SetScores) -> None:
        """Write what was measured; the file appears whole or not at all.

        Raises:
            StorageError: when the disk refuses.
        """
        plain = [each.name for each in fields(SetScores) if each.name not in (*_ARRAYS, "scores")]
        told: dict[str, Any] = {name: getattr(found, name) for name in plain}
        told["metrics"] = list(found.scores)
        arrays = {name: getattr(found, name) for name in _ARRAYS}
        arrays |= {f"scores {name}": values for name, values in found.scores.items()}
        with replacing_file(self._path(place)) as fresh, fresh.open("wb") as file:
            np.savez(file, told=np.array(json.dumps(told)), **arrays)

    def _path(self, place: Place) -> Path:
        key = (_VERSION, self._model, place.name, digest_of(place.path))
        return (
            self._folder / f"{hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()}.npz"
        )
