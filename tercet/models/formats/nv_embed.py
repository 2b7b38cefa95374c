"""Published NV-Embed folders: configuration, names of weights, instructions, and loading them.

None of the code in such a folder runs. Its licence (cc-by-nc-4.0) allows loading it, but neither
passing it on nor passing on weights that were made from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tercet.errors import ModelError
from tercet.models.choices import Attention, LayerSettings, Window
from tercet.models.formats.parts import ModelParts, replaced_layer
from tercet.models.network.backbone import Backbone
from tercet.models.network.latent_attention import AttentionLayer, build_layer
from tercet.models.network.loading import (
    REMEDY,
    as_object,
    check_sizes,
    loading,
    misfits,
    quiet,
    read_object,
)
from tercet.models.settings import Settings, as_prompt, changed
from tercet.models.tokens import load_tokenizer

MAX_TOKENS: Final = 4_096  # the reference's default; the model itself has more positions

PartName: TypeAlias = Literal["backbone", "layer"]

# Sizes that a configuration may leave out.
DEFAULTS: Final[Mapping[str, Any]] = {
    "num_latents_value": 512,
    "num_cross_heads": 8,
    "cross_dim_head": 4096,
    "hidden_dim": 4096,
    "latent_dim": 4096,
    "output_normalize": True,
}
PREFIXES: Final[Mapping[PartName, str]] = {
    "backbone": "embedding_model.",
    "layer": "latent_attention_model.",
}
_READ: Final = "cross_attend_blocks.0"
_CHANGE: Final = "cross_attend_blocks.1"
LAYER_NAMES: Final[Mapping[str, str]] = {  # ours -> the published one without its prefix
    "latents": "latents",
    "norm_query.weight": f"{_READ}.norm.weight",
    "norm_query.bias": f"{_READ}.norm.bias",
    "norm_context.weight": f"{_READ}.norm_context.weight",
    "norm_context.bias": f"{_READ}.norm_context.bias",
    "to_q.weight": f"{_READ}.fn.to_q.weight",
    "to_kv.weight": f"{_READ}.fn.to_kv.weight",
    "to_out.weight": f"{_READ}.fn.to_out.weight",
    "norm_ff.weight": f"{_CHANGE}.norm.weight",
    "norm_ff.bias": f"{_CHANGE}.norm.bias",
    "ff_in.weight": f"{_CHANGE}.fn.net.0.weight",
    "ff_in.bias": f"{_CHANGE}.fn.net.0.bias",
    "ff_out.weight": f"{_CHANGE}.fn.net.2.weight",
    "ff_out.bias": f"{_CHANGE}.fn.net.2.bias",
}


@dataclass(frozen=True, slots=True)
class NvEmbed:
    """The configuration of a published model."""

    text_config: Mapping[str, Any]  # of a Mistral of transformers
    latents: int
    heads: int
    head_size: int
    normalize: bool
    masks_instruction: bool  # whether the reference leaves instructions out of the mean at all
    instructions: Mapping[str, Mapping[str, str]]  # task -> role -> instruction, not yet a prompt


def load_nv_embed(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    attention: Attention | None = None,
    window: Window | None = None,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> ModelParts:
    """Load a folder in the format of ``nvidia/NV-Embed-v1`` and ``-v2``; none of its code runs.

    Weight files are read one at a time, so that no weight is in memory twice. The default is
    bidirectional attention without sliding windows; ``changes`` replace settings.

    Raises:
        ModelError: if weights are missing, unknown or of another size.
    """
    published = read_nv_embed(folder)
    backbone, layer = _load_weights(folder, published, dtype, attention, window)
    settings = Settings(
        pooling="mean",
        normalize=published.normalize,
        task_prompts={
            task: {role: as_prompt(text) for role, text in roles.items()}
            for task, roles in published.instructions.items()
        },
        layer=layer.layer,
        append_end=True,
        pool_prompt=not published.masks_instruction,
        query_tokens=MAX_TOKENS,
        document_tokens=MAX_TOKENS,
    )
    with quiet():  # transformers warns that it does not know the type of this configuration
        tokenizer = load_tokenizer(folder)
    if "layer" in changes:
        settings, used = replaced_layer(folder, changed(settings, changes), layer, backbone.hidden)
    else:
        settings, used = changed(settings, changes), layer
    return ModelParts(backbone=backbone, tokenizer=tokenizer, settings=settings, layer=used)


def _load_weights(
    folder: Path,
    published: NvEmbed,
    dtype: torch.dtype,
    attention: Attention | None,
    window: Window | None,
) -> tuple[Backbone, AttentionLayer]:
    from transformers import MistralConfig, MistralModel  # not needed for other models

    sizes = LayerSettings(
        latents=published.latents, heads=published.heads, head_size=published.head_size
    )
    with loading(f"{folder}: its config.json describes no network"), torch.device("meta"):
        config = MistralConfig.from_dict(dict(published.text_config))
        model: Any = MistralModel(config)
        layer = build_layer(sizes, config.hidden_size)
    model.rotary_emb = type(model.rotary_emb)(config=config)  # computed, not stored in files
    _fill({"backbone": model, "layer": layer}, folder, dtype)
    backbone = Backbone(
        model.eval(), attention=attention or "bidirectional", window=window or "full"
    )
    backbone.prove()
    return backbone, layer.eval()


def _fill(parts: Mapping[PartName, nn.Module], folder: Path, dtype: torch.dtype) -> None:
    """Load the weights of all files into modules whose parameters are on the meta device."""
    files = weight_files(folder)
    places: dict[str, tuple[PartName, str, tuple[int, ...]]] = {
        published_name(part, name): (part, name, tuple(weight.shape))
        for part, module in parts.items()
        for name, weight in module.state_dict().items()
    }
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        hint = "; copy or download it again"
        with loading(f"{path}: cannot be read", hint), safe_open(path, framework="pt") as weights:
            for name in weights.keys():
                found[name] = tuple(weights.get_slice(name).get_shape())
    if problems := misfits(found, {name: place[2] for name, place in places.items()}):
        raise ModelError(
            f"{folder}: its weights are not those of NV-Embed-v1 or -v2 with this config.json: "
            f"{problems}; copy or download the folder again"
        )
    for path in files:
        read: dict[PartName, dict[str, Tensor]] = {"backbone": {}, "layer": {}}
        with safe_open(path, framework="pt") as weights:
            for published in weights.keys():
                part, name, _ = places[published]
                # A copy: a tensor read from a file is unaligned, and keeps the file open.
                read[part][name] = weights.get_tensor(published).to(dtype, copy=True)
        for part, module in parts.items():
            module.load_state_dict(read[part], strict=False, assign=True)


def is_nv_embed(folder: Path) -> bool:
    """Whether the folder's config.json is that of a published NV-Embed model."""
    return read_object(folder / "config.json", optional=True).get("model_type") == "nvembed"


def read_nv_embed(folder: Path) -> NvEmbed:
    """Return what the folder's files say.

    Raises:
        ModelError: if a file is missing or damaged, or sizes contradict each other.
    """
    path = folder / "config.json"
    check_sizes(folder)
    config = read_object(path)
    text = dict(as_object(path, config.get("text_config")))
    if text.pop("model_type", None) not in ("bidir_mistral", "mistral"):
        raise ModelError(f'{path}: "text_config" must be that of a Mistral; {REMEDY}')
    for name in ("architectures", "auto_map", "_name_or_path", "_attn_implementation"):
        text.pop(name, None)
    sizes = {**DEFAULTS, **as_object(path, config.get("latent_attention_config") or {})}
    for name, default in DEFAULTS.items():
        if type(sizes[name]) is not type(default) or not (default is True or sizes[name] > 0):
            raise ModelError(f'{path}: "{name}" must be like {default!r}; got {sizes[name]!r}')
    widths = {sizes["hidden_dim"], sizes["latent_dim"], text.get("hidden_size", 4096)}
    if len(widths) > 1:
        raise ModelError(
            f"{path}: hidden_dim, latent_dim and the text model's hidden_size must be equal; got "
            f"{', '.join(sorted(map(str, widths)))}; {REMEDY}"
        )
    return NvEmbed(
        text_config=MappingProxyType(text),
        latents=sizes["num_latents_value"],
        heads=sizes["num_cross_heads"],
        head_size=sizes["cross_dim_head"],
        normalize=sizes["output_normalize"],
        masks_instruction=bool(config.get("is_mask_instruction", True))
        and config.get("padding_side", "right") == "right",
        instructions=_read_instructions(folder / "instructions.json"),
    )


def published_name(part: PartName, name: str) -> str:
    """Return the name under which a weight of our model is published."""
    return PREFIXES[part] + (name if part == "backbone" else LAYER_NAMES[name])


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights, in order.

    Raises:
        ModelError: if one of them is missing.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = [folder / "model.safetensors"]
    else:
        places = as_object(index, read_object(index).get("weight_map"))
        files = [folder / name for name in sorted({*map(str, places.values())})]
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise ModelError(f"{folder}: lacks {', '.join(missing) or 'weights'}; {REMEDY}")
    return files


def _read_instructions(path: Path) -> dict[str, dict[str, str]]:
    """Return instructions by task and role; a single text counts for both roles."""
    found: dict[str, dict[str, str]] = {}
    for task, said in read_object(path, optional=True).items():
        sides = {"query": said, "document": said} if isinstance(said, str) else said
        if not isinstance(sides, dict) or not all(isinstance(x, str) for x in sides.values()):
            raise ModelError(f'{path}: "{task}" must be a text, or texts by side; {REMEDY}')
        document = next((sides[n] for n in ("document", "corpus", "passage") if n in sides), "")
        roles = {"query": sides.get("query", ""), "document": document}
        found[task] = {role: text for role, text in roles.items() if text}
    return found
