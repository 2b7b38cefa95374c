"""Merging adapters into their base, in order, as one embedder."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from tercet.errors import ModelError
from tercet.models.choices import Attention
from tercet.models.embedder import Embedder
from tercet.models.formats.llm2vec import Llm2Vec, adapter_folder, read_llm2vec
from tercet.models.formats.lora_adapters import merge_adapter
from tercet.models.formats.parts import (
    settings_of,
    tokenizer_of,
    with_dense_layers,
    with_heads,
    with_layer,
)
from tercet.models.formats.sentence_transformers import read_modules
from tercet.models.network.backbone import Backbone, probe
from tercet.models.settings import FILE, Settings, read_settings
from tercet.models.zoo import zoo

Compat: TypeAlias = Literal["llm2vec"]


def load_adapters(
    adapters: Sequence[str | Path],
    *,
    base: str | Path | None = None,
    compat: Compat | None = None,
    attention: Attention | None = None,
    dtype: torch.dtype = torch.float32,
) -> Embedder:
    """Merge adapters into the weights of a base, one after the other and in float32.

    ``base`` None takes the one that the first adapter names. Direction and settings are those that
    tercet or sentence-transformers saved with the last adapter, else the base's. Adapters of other
    tools do not record a direction: give ``attention``; or ``compat="llm2vec"`` for those trained
    by llm2vec, which are bidirectional and bring their pooling, template and lengths.

    Raises:
        ModelError: if an adapter is incomplete, does not fit, or records no direction.
    """
    folders = [adapter_folder(adapter) for adapter in adapters]
    if not folders:
        raise ModelError("adapters must name at least one folder; got none")
    published = read_llm2vec(folders)
    if compat == "llm2vec":
        settings, window = _settings_of(published), None
        attention, tokenizer = attention or "bidirectional", published.tokenizer
    else:
        saved = [read_settings(f) if (f / FILE).exists() else None for f in folders]
        attention = attention or _direction(folders, saved)
        first, last = saved[0] or {}, saved[-1] or {}
        window = last.get("window")
        base = base or first.get("adapter_of")
        settings = last.get("settings") or read_modules(folders[-1])
        tokenizer = next((f for f in folders[::-1] if (f / "tokenizer_config.json").exists()), None)
    place = str(base or published.base)
    if not place:
        raise ModelError(f"{folders[0]}: does not name its base; give the base")
    holder = folders[-1]  # of the other trained layers
    if settings is None:
        holder = Path(zoo.resolve(place))
        settings = settings_of(place, holder)
    backbone = Backbone.load(place, attention=attention, window=window)
    for folder in folders:
        merge_adapter(backbone, folder)
    backbone.to(dtype).eval()
    probe(backbone)
    settings, layer = with_layer(holder, settings, {}, backbone.hidden, dtype)
    settings, heads = with_heads(holder, settings, settings, backbone.hidden)
    dense_layers = with_dense_layers(holder, settings, settings, backbone.hidden)
    loaded = tokenizer_of(tokenizer or zoo.resolve(place))
    embedder = Embedder(backbone, loaded, settings, layer, heads, dense_layers)
    embedder.about = lineage(place, adapters)
    return embedder


def lineage(base: str, adapters: Sequence[str | Path]) -> dict[str, Any]:
    """Return what a merged model is made of: names, and hashes of adapters' weights, in order."""
    return {"base": base, "merged": [{"adapter": str(a), "sha256": _hash(a)} for a in adapters]}


def _hash(adapter: str | Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(adapter_folder(adapter).glob("adapter_model.*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _direction(folders: Sequence[Path], saved: Sequence[dict[str, Any] | None]) -> Attention | None:
    """Return the direction in which all of these adapters were trained; None: the base's."""
    for folder, record in zip(folders, saved, strict=True):
        if record is None and not (folder / "modules.json").is_file():
            raise ModelError(
                f"{folder}: records no direction of attention, and peft would load it as causal; "
                "give the attention, or compat if llm2vec trained it"
            )
    directions = {record["attention"] for record in saved if record is not None}
    if len(directions) > 1:
        raise ModelError(
            f"{', '.join(map(str, folders))}: were trained in different directions; "
            "give the attention of the merged model"
        )
    return directions.pop() if directions else None


def _settings_of(published: Llm2Vec) -> Settings:
    roles = ("query", "document")
    return Settings(
        pooling=published.pooling,
        rules="llm2vec",
        normalize=False,
        prompts=dict.fromkeys(roles, published.before) if published.before else {},
        suffixes=dict.fromkeys(roles, published.after) if published.after else {},
        pool_suffix=True,
        pool_prompt=published.pool_instruction,
        pool_special=published.pool_instruction,
        query_tokens=published.max_tokens,
        document_tokens=published.max_tokens,
    )
