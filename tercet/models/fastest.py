"""The type of numbers in which a model encodes fastest here, with nearly the same vectors."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor

from tercet.errors import StorageError
from tercet.files.artifacts import KeptResults, fingerprint
from tercet.models.devices import NumberType, layer_numbers, number_type
from tercet.models.embedder import Embedder
from tercet.models.formats.tercet_folder import known_kinds
from tercet.models.network.cpu.linear import MAX_BYTES
from tercet.models.network.cpu.precision import bfloat16_instructions, has_bfloat16
from tercet.models.zoo.zoo import cache_folder, resolve

MOST_LOSS: Final = 1e-4  # the mean of 1 - cosine
_WORTH: Final = (
    3_000_000  # numbers in the layers; with fewer, products are a small part of the time
)
_VERSION: Final = 1
_TEXTS: Final = (
    "bread",
    "ok",
    "mount drive",
    "How do I mount a drive at startup?",
    "Wie lange dauert die Fahrt von Bremen nach Genua?",
    "La bibliothèque ferme à dix-huit heures le samedi.",
    "明日の朝は雪が降るでしょう。",
    "Ключ лежит под третьим камнем слева от двери.",
    "def area(r): return 3.14159 * r ** 2  # of a circle",
    "+49 30 1234567, 10115 Berlin; order 2024-118, 3 pcs.",
    "The harbour froze in the second week of January, and the ferries stopped. " * 3,
    "A list of tools: hammer, saw, plane, chisel, file, vice, drill, square and rule. " * 6,
)


def fastest_type(
    source: str, device: torch.device, say: Callable[[str], None] = lambda line: None
) -> NumberType:
    """Return the type of weights that encodes fastest without turning vectors noticeably.

    On a CPU that has instructions for bfloat16, a model of dense vectors takes bfloat16 if vectors
    of some built-in texts lose at most ``MOST_LOSS`` of their cosine to float32 on average. It is
    measured once for a model folder and a machine, and kept in ``$TERCET_CACHE``.

    Args:
        source: what :meth:`Embedder.load` takes; a hub id that is not packaged, and an adapter,
            take float32.
        device: what the model will run on.
        say: receives a line when something was measured.

    Raises:
        ModelError: if the model cannot be loaded.
    """
    place = Path(resolve(source))
    if device.type != "cpu":
        return number_type(device)
    if not place.is_dir() or (place / "adapter_config.json").exists() or not has_bfloat16():
        return "float32"
    files = [(file, file.stat()) for file in sorted(place.rglob("*")) if file.is_file()]
    if sum(about.st_size for file, about in files if file.suffix == ".safetensors") > MAX_BYTES:
        return "float32"
    about = [(str(file.relative_to(place)), s.st_size, s.st_mtime_ns) for file, s in files]
    kept = KeptResults(cache_folder() / "precision", _VERSION)
    key = fingerprint(str(place.resolve()), about, bfloat16_instructions(), torch.__version__)
    found = kept.find(key)
    measured = found[0]["cosines"] if found is not None else _cosines_of_bfloat16(source)
    cosines = None if measured is None else np.array(measured)
    is_near = cosines is not None and 1 - cosines.mean() <= MOST_LOSS
    if found is None:
        with suppress(StorageError):  # measured again the next time
            kept.keep({"cosines": measured}, {}, key)
        if cosines is not None and is_near:
            say(
                f"tercet: note: {source} encodes in bfloat16, which is faster here; cosines to "
                f"float32 are {cosines.mean():.5f} on average and at least {cosines.min():.5f} "
                "(--dtype float32 takes float32)"
            )
    return "bfloat16" if is_near else "float32"


def _cosines_of_bfloat16(source: str) -> list[float] | None:
    """Return cosines of the built-in texts, each read alone; None if bfloat16 would not pay."""
    if known_kinds(source) != ("dense",):
        return None
    exact = Embedder.load(source)
    size = sum(weight.numel() * weight.element_size() for weight in exact.parameters())
    if layer_numbers(exact.backbone.model) < _WORTH or size > MAX_BYTES:
        return None
    vectors, rounded = _vectors(exact), _vectors(Embedder.load(source, dtype=torch.bfloat16))
    return F.cosine_similarity(vectors, rounded, dim=1).tolist()


def _vectors(embedder: Embedder) -> Float64[Tensor, "texts dim"]:
    tokens = embedder.tokenize(_TEXTS, "document")
    found = [
        embedder.encode_packed(tokens.pack([text]), ("dense",))[0] for text in range(len(tokens))
    ]
    return torch.cat([vectors.dense for vectors in found if vectors.dense is not None]).double()
