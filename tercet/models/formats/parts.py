"""The parts of a model that its folder holds: settings, and layers beside the backbone."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from tercet.errors import ModelError
from tercet.kinds import KINDS
from tercet.models.formats.sentence_transformers import dense_folders, lowers_case, read_modules
from tercet.models.network.backbone import Backbone
from tercet.models.network.dense_layers import DenseLayers, load_dense_layers
from tercet.models.network.heads import Heads, heads_in, load_heads
from tercet.models.network.latent_attention import AttentionLayer, build_layer, load_layer
from tercet.models.network.loading import read_object
from tercet.models.settings import FILE, Settings, read_settings
from tercet.models.tokens import load_tokenizer
from tercet.models.zoo import zoo
from tercet.models.zoo.loaders import STATED_POOLING

_M3_TOKENS: Final = 8_192  # BGE-M3's limit; a model with fewer positions takes as many as it has

log = logging.getLogger("tercet")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParts:
    """Everything that an embedder is made of and that its folder holds."""

    backbone: Backbone
    tokenizer: Any  # of transformers
    settings: Settings
    layer: AttentionLayer | None = None
    heads: Heads | None = None
    dense_layers: DenseLayers | None = None
    about: Mapping[str, Any] = field(default_factory=dict)  # how it was made: stages, data, seed


def settings_of(source: str | Path, folder: Path) -> Settings:
    """Return a model's settings: from ``tercet.json``, or as :func:`foreign_settings`."""
    saved = read_settings(folder) if folder.is_dir() else None
    return foreign_settings(source, folder) if saved is None else saved["settings"]


def tokenizer_of(place: str | Path) -> Any:
    """Load the tokenizer of a folder or hub id, which reads texts as its model was trained.

    Raises:
        ModelError: if it is missing or damaged.
    """
    folder = Path(place)
    return load_tokenizer(place, lower_case=not (folder / FILE).exists() and lowers_case(folder))


def foreign_settings(source: str | Path, folder: Path) -> Settings:
    """Return the settings of a model without ``tercet.json``.

    They come from the sentence-transformers files, else from the zoo, else they are the defaults,
    with the pooling that a GGUF file states. A folder with a layer for sparse or multi vectors is a
    BGE-M3 of FlagEmbedding, whose dense vectors are those of the sentence-transformers files, if it
    has such.
    """
    found = read_modules(folder) if folder.is_dir() else None
    kinds = KINDS if folder.is_dir() and heads_in(folder) else Settings.kinds
    if found is not None:
        return replace(found, kinds=kinds)
    if kinds != Settings.kinds:
        longest = _M3_TOKENS
        return Settings(pooling="first", kinds=kinds, query_tokens=longest, document_tokens=longest)
    model = zoo.find(str(source))
    if model is None:
        if Path(source).suffix.lower() != ".gguf":
            return Settings()
        config = read_object(folder / "config.json")
        return Settings(pooling=config.get(STATED_POOLING, Settings.pooling))
    return Settings(
        pooling=model.pooling,
        prompts=dict(model.prompts),
        query_tokens=model.max_tokens,
        document_tokens=model.max_tokens,
    )


def with_layer(
    folder: Path, settings: Settings, changes: Mapping[str, Any], hidden: int, dtype: torch.dtype
) -> tuple[Settings, AttentionLayer | None]:
    """Return the folder's trained layer, unless ``changes`` ask for another one or for none.

    The returned settings name the layer that is used. A trained layer of the wanted sizes is kept,
    whatever ``init`` the changes ask for.

    Raises:
        ModelError: if the settings name a layer that is not in the folder.
    """
    trained = load_layer(folder, hidden, dtype) if folder.is_dir() else None
    if "layer" not in changes:
        if trained is None and settings.layer is not None:
            raise ModelError(
                f"{folder}: the model has a trained layer, and its folder (1_Layer) is not here; "
                "copy or download the model again, whole"
            )
        return replace(settings, layer=None if trained is None else trained.layer), trained
    return replaced_layer(folder, settings, trained, hidden)


def replaced_layer(
    folder: Path, settings: Settings, trained: AttentionLayer | None, hidden: int
) -> tuple[Settings, AttentionLayer | None]:
    """Return the layer that the settings ask for: the trained one if sizes agree, or a new one."""
    wanted = settings.layer
    if trained is not None and wanted is not None and wanted.same_sizes(trained.layer, hidden):
        return replace(settings, layer=trained.layer), trained
    if trained is not None:
        other = "left out" if wanted is None else f"replaced by a new one, {wanted}"
        log.warning("%s: its trained layer, %s, is %s", folder, trained.layer, other)
    return settings, None if wanted is None else build_layer(wanted, hidden)


def with_heads(
    folder: Path, known: Settings, settings: Settings, hidden: int
) -> tuple[Settings, Heads | None]:
    """Return the folder's trained heads, and new ones for kinds that it does not have.

    ``known`` are the folder's settings, ``settings`` the wanted ones; these are returned with the
    width of the heads that are used.

    Raises:
        ModelError: if the folder's settings name a head that is not there.
    """
    wanted = settings.kinds
    if not {"sparse", "multi"} & set(wanted):
        return replace(settings, multi_dim=None), None
    trained = load_heads(folder, [kind for kind in known.kinds if kind in wanted], hidden)
    heads = Heads(hidden, wanted, settings.multi_dim or trained.width)
    for kind in heads.drawn:
        old = getattr(trained, kind)
        if old is not None and old.weight.shape == getattr(heads, kind).weight.shape:
            setattr(heads, kind, old)
            heads.drawn = tuple(other for other in heads.drawn if other != kind)
    if trained.width not in (None, heads.width):
        log.warning(
            "%s: its trained layer for multi vectors, %d wide, is replaced by a new one, %d wide",
            folder,
            trained.width,
            heads.width,
        )
    if heads.drawn:
        log.info("%s: new heads, to be trained: %s", folder, ", ".join(heads.drawn))
    return replace(settings, multi_dim=heads.width), heads


def with_dense_layers(
    folder: Path, known: Settings, settings: Settings, hidden: int
) -> DenseLayers:
    """Return the dense layers of the settings: those of the folder up to the first other one.

    ``known`` are the folder's settings, ``settings`` the wanted ones; the others are new.

    Raises:
        ModelError: if one of the folder's layers is missing or damaged.
    """
    wanted, held = settings.dense_layers, known.dense_layers
    same = 0
    while same < min(len(wanted), len(held)) and wanted[same] == held[same]:
        same += 1
    places = dense_folders(folder, known)[:same] if same else ()
    layers = load_dense_layers(places, wanted[:same], hidden)
    for layer in wanted[same:]:
        layers.add(layer)
    if same < len(held):
        log.warning("%s: %d of its dense layers are left out", folder, len(held) - same)
    if layers.drawn:
        log.info("%s: %d new dense layers, to be trained", folder, len(layers.drawn))
    return layers
