"""Published NV-Embed folders: configuration, names of weights, instructions, and loading them.

None of the code in such a folder runs. Its licence (cc-by-nc-4.0) allows loading it, but neither
passing it on nor passing on weights that were made from it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tercet.errors import ModelError
from tercet.models.formats.parts import ModelParts, replaced_layer
from tercet.models.network.backbone import Attention, Backbone, Window
from tercet.models.network.latent_attention import AttentionLayer, Layer, build_layer
from tercet.models.network.loading import quiet
from tercet.models.settings import Settings, as_prompt, changed
from tercet.models.tokens import load_tokenizer

MAX_TOKENS: Final = 4_096  # the reference's default; the model itself has more positions

Part: TypeAlias = Literal["backbone", "layer"]

# The sizes of a configuration that leaves them open.
DEFAULTS: Final[Mapping[str, Any]] = {
    "num_latents_value": 512,
    "num_cross_heads": 8,
    "cross_dim_head": 4096,
    "hidden_dim": 4096,
    "latent_dim": 4096,
    "output_normalize": True,
}
PREFIXES: Final[Mapping[Part, str]] = {
    "backbone": "embedding_model.",
    "layer": "latent_attention_model.",
}
_READ: Final = "cross_attend_blocks.0"
_CHANGE: Final = "cross_attend_blocks.1"
LAYER_NAMES: Final[Mapping[str, str]] = {  # ours, and the published one without its prefix
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
_OURS: Final[Mapping[str, str]] = {theirs: ours for ours, theirs in LAYER_NAMES.items()}
_REMEDY: Final = "is the download complete?"


@dataclass(frozen=True, slots=True)
class NvEmbed:
    """What a published model says, apart from its weights."""

    text_config: Mapping[str, Any]  # of a stock Mistral
    latents: int
    heads: int
    head_size: int
    normalize: bool
    masks_instruction: bool  # whether the reference leaves instructions out of the mean at all
    instructions: Mapping[str, Mapping[str, str]]  # task -> role -> what to do, not yet a prompt


def load_nv_embed(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    attention: Attention | None = None,
    window: Window | None = None,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> ModelParts:
    """Load a folder as ``nvidia/NV-Embed-v1`` and ``-v2`` are; none of its code runs.

    The files are read one after another, so that no weight is there twice. Texts carry no prompt
    unless a task of the folder's ``instructions.json`` is asked for. It is read both ways, and all
    windows are open, unless asked otherwise; ``changes`` replace settings.

    Raises:
        ModelError: when weights are missing, unknown or of another size.
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
    with quiet():  # transformers does not know this kind of configuration, and need not
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

    config = MistralConfig.from_dict(dict(published.text_config))
    sizes = Layer(latents=published.latents, heads=published.heads, head_size=published.head_size)
    with torch.device("meta"):
        model: Any = MistralModel(config)
        layer = build_layer(sizes, config.hidden_size)
    model.rotary_emb = type(model.rotary_emb)(config=config)  # computed, so in no file
    _fill({"backbone": model, "layer": layer}, folder, dtype)
    backbone = Backbone(
        model.eval(), attention=attention or "bidirectional", window=window or "full"
    )
    backbone.prove()
    return backbone, layer.eval()


def _fill(parts: Mapping[Part, nn.Module], folder: Path, dtype: torch.dtype) -> None:
    """Put the weights of all files in their places, which are on no device yet."""
    files = weight_files(folder)
    places = {
        published_name(part, name): place.shape
        for part, module in parts.items()
        for name, place in module.state_dict().items()
    }
    shapes = {name: shape for path in files for name, shape in _shapes(path)}
    check_names(folder, [*shapes], [*places])
    for name, shape in shapes.items():
        if shape != tuple(places[name]):
            raise ModelError(
                f"{folder}: {name} is {shape} and should be {tuple(places[name])}, as config.json "
                "has it; copy or download the folder again"
            )
    for path in files:
        found: dict[Part, dict[str, Tensor]] = {"backbone": {}, "layer": {}}
        with safe_open(path, framework="pt") as weights:
            for published in weights.keys():
                place = our_name(published)
                assert place is not None  # names were checked
                part, name = place
                # A copy: a tensor read from a file lies at odd places, and hangs on the file.
                found[part][name] = weights.get_tensor(published).to(dtype, copy=True)
        for part, module in parts.items():
            module.load_state_dict(found[part], strict=False, assign=True)


def _shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():
                yield name, tuple(weights.get_slice(name).get_shape())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read: {error}; copy or download it again") from error


def is_nv_embed(folder: Path) -> bool:
    """Whether the folder is laid out as the published models are."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    config = _read(path)
    return isinstance(config, dict) and config.get("model_type") == "nvembed"


def read_nv_embed(folder: Path) -> NvEmbed:
    """What the folder says.

    Raises:
        ModelError: when a file is missing or damaged, or the sizes do not belong together.
    """
    path = folder / "config.json"
    config = _object(path, _read(path))
    text = dict(_object(path, config.get("text_config")))
    if text.pop("model_type", None) not in ("bidir_mistral", "mistral"):
        raise ModelError(f'{path}: "text_config" is not that of a Mistral; {_REMEDY}')
    for name in ("architectures", "auto_map", "_name_or_path", "_attn_implementation"):
        text.pop(name, None)
    sizes = {**DEFAULTS, **_object(path, config.get("latent_attention_config") or {})}
    for name, default in DEFAULTS.items():
        if type(sizes[name]) is not type(default) or not (default is True or sizes[name] > 0):
            raise ModelError(f'{path}: "{name}" is {sizes[name]!r}; it should be like {default!r}')
    widths = {sizes["hidden_dim"], sizes["latent_dim"], text.get("hidden_size", 4096)}
    if len(widths) > 1:
        raise ModelError(
            f"{path}: gives the width as {', '.join(map(str, sorted(widths)))}; hidden_dim, "
            f"latent_dim and the text model's hidden_size should be one number; {_REMEDY}"
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


def our_name(published: str) -> tuple[Part, str] | None:
    """The part of our model that a published weight belongs to, and its name in there."""
    for part, prefix in PREFIXES.items():
        if published.startswith(prefix):
            name = published.removeprefix(prefix)
            found = name if part == "backbone" else _OURS.get(name)
            return None if found is None else (part, found)
    return None


def published_name(part: Part, name: str) -> str:
    """The name under which a weight of ours is published."""
    return PREFIXES[part] + (name if part == "backbone" else LAYER_NAMES[name])


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, in order.

    Raises:
        ModelError: when one of them is missing.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        files = [folder / "model.safetensors"]
    else:
        places = _object(index, _object(index, _read(index)).get("weight_map"))
        files = [folder / name for name in sorted({*map(str, places.values())})]
    missing = [path.name for path in files if not path.is_file()]
    if missing or not files:
        raise ModelError(f"{folder}: lacks {', '.join(missing) or 'weights'}; {_REMEDY}")
    return files


def check_names(folder: Path, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Refuse weights that are missing, and those that nobody would read.

    Raises:
        ModelError: naming some of them.
    """
    missing, extra = sorted({*wanted} - {*found}), sorted({*found} - {*wanted})
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("are missing", missing), ("are unknown", extra))
        if names
    ]
    if problems:
        raise ModelError(
            f"{folder}: of the weights {' and '.join(problems)}; it is not laid out as "
            "NV-Embed-v1 and -v2 are, or not complete; copy or download it again"
        )


def _read_instructions(path: Path) -> dict[str, dict[str, str]]:
    """Instructions by task: one text for both sides, or one each for queries and documents."""
    if not path.is_file():
        return {}
    found: dict[str, dict[str, str]] = {}
    for task, said in _object(path, _read(path)).items():
        sides = {"query": said, "document": said} if isinstance(said, str) else said
        if not isinstance(sides, dict) or not all(isinstance(x, str) for x in sides.values()):
            raise ModelError(f'{path}: "{task}" should be a text, or texts by side; {_REMEDY}')
        document = next((sides[n] for n in ("document", "corpus", "passage") if n in sides), "")
        roles = {"query": sides.get("query", ""), "document": document}
        found[task] = {role: text for role, text in roles.items() if text}
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: is missing; {_REMEDY}") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ModelError(f"{path}: is not JSON ({error}); {_REMEDY}") from error


def _object(path: Path, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ModelError(f"{path}: should hold a JSON object where it does not; {_REMEDY}")
    return content
