"""The type of numbers in which a model encodes fastest on this machine, with the same vectors."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
import torch

from tercet.errors import StorageError
from tercet.files.artifacts import KeptResults, fingerprint
from tercet.models.devices import NumberType, layer_numbers, number_type
from tercet.models.embedder import Embedder
from tercet.models.network.cpu.linear import MAX_BYTES
from tercet.models.network.cpu.precision import has_bfloat16
from tercet.models.zoo.zoo import cache_folder, resolve

MOST_LOSS: Final = 1e-4  # 1 - cosine of any text
_WORTH: Final = (
    3_000_000  # numbers in the layers; with fewer, products are a small part of the time
)
_VERSION: Final = 1
_TEXTS: Final = (
    "bread",
    "How do I mount a drive at startup?",
    "Wie lange dauert die Fahrt von Bremen nach Genua?",
    "La bibliothèque ferme à dix-huit heures le samedi.",
    "明日の朝は雪が降るでしょう。",
    "Ключ лежит под третьим камнем слева от двери.",
    "def area(r): return 3.14159 * r ** 2  # of a circle",
    "+49 30 1234567, 10115 Berlin; order 2024-118, 3 pcs.",
    "The harbour froze in the second week of January, and the ferries stopped. " * 3,
    "A list of tools: hammer, saw, plane, chisel, file, vice, drill, square and rule. " * 6,
    "When the water has boiled, add the rice, stir once, cover the pot, and wait. " * 8,
)


def fastest_type(
    source: str, device: torch.device, say: Callable[[str], None] = lambda line: None
) -> NumberType:
    """Return the type of weights that encodes fastest without changing vectors noticeably.

    On a CPU that has instructions for bfloat16, a model of dense vectors takes
    bfloat16 if no vector of some built-in texts loses more than ``MOST_LOSS`` of its cosine. It is
    measured once for a model folder and a machine, and kept in ``$TERCET_CACHE``.

    Args:
        source: what :meth:`Embedder.load` takes; a hub id that is not packaged takes float32.
        device: what the model will run on.
        say: receives a line when something was measured.

    Raises:
        ModelError: if the model cannot be loaded.
    """
    place = Path(resolve(source))
    if device.type != "cpu":
        return number_type(device)
    if not place.is_dir() or not has_bfloat16():
        return "float32"
    files = [(file.name, file.stat()) for file in sorted(place.iterdir()) if file.is_file()]
    about = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    machine = torch.backends.cpu.get_cpu_capability(), torch.__version__
    kept = KeptResults(cache_folder() / "precision", _VERSION)
    key = fingerprint(str(place.resolve()), about, machine)
    found = kept.find(key)
    if found is None:
        loss = _loss_of_bfloat16(source)
        with suppress(StorageError):  # measured again the next time
            kept.keep({"loss": loss}, {}, key)
        if loss is not None and loss <= MOST_LOSS:
            say(
                f"tercet: note: {source} encodes in bfloat16, which is faster here; cosines to "
                f"float32 are at least {1 - loss:.5f} (--dtype float32 takes float32)"
            )
    else:
        loss = found[0]["loss"]
    return "bfloat16" if loss is not None and loss <= MOST_LOSS else "float32"


def _loss_of_bfloat16(source: str) -> float | None:
    """Return the largest 1 - cosine of the built-in texts; None if bfloat16 would not pay."""
    exact = Embedder.load(source)
    model = exact.backbone.model
    size = sum(weight.numel() * weight.element_size() for weight in exact.parameters())
    if exact.kinds != ("dense",) or layer_numbers(model) < _WORTH or size > MAX_BYTES:
        return None
    vectors = exact.encode(_TEXTS).astype(np.float64)
    rounded = Embedder.load(source, dtype=torch.bfloat16).encode(_TEXTS).astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(rounded, axis=1)
    return float(1 - ((vectors * rounded).sum(1) / lengths).min())
