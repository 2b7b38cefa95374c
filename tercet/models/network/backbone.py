"""An unmodified transformers model that reads packed texts, causal or bidirectional, with proof.

Whether a decoder is really bidirectional cannot be seen from its settings, which some architectures
ignore. So all flags are set, and :func:`probe` changes a token to see which states change.
"""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from tercet.errors import ModelError
from tercet.models.choices import Attention, Window
from tercet.models.devices import exact_products
from tercet.models.foreign_code import refuse_code, refuse_code_in
from tercet.models.network.attention import (
    NAME,
    Layout,
    kernel_runs_on,
    kernel_takes_width,
)
from tercet.models.network.cpu.direct import DirectForward
from tercet.models.network.cpu.int8 import int8_layers
from tercet.models.network.cpu.int8_files import mark_int8, read_int8
from tercet.models.network.cpu.memory import keep_freed_memory
from tercet.models.network.loading import check_sizes, check_weights, loading, quiet
from tercet.models.zoo import zoo
from tercet.segments import Packed, moved, offsets_of, ragged_places

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_PROBED_WINDOW: Final = 2_048  # wider ones are not probed: the text would be longer
_IN_STATES: Final = (  # numbers of a config that change states and no weight
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "hidden_activation",
    "layer_norm_eps",
    "norm_eps",
    "rms_norm_eps",
    "rope_parameters",
)
_DROPOUTS: Final = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")


class Backbone(nn.Module):
    """A network that maps packed tokens to one hidden state per token.

    ``attention`` None keeps the model's direction. ``window`` "keep" leaves sliding windows, "full"
    lets every layer see the whole text. None means "keep", but "full" for a bidirectional decoder
    whose layers all have windows (Mistral), as in LLM2Vec and NV-Embed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attention: Attention | None = None,
        window: Window | None = None,
    ) -> None:
        super().__init__()
        self.model: Any = model
        _switch_to_packed(model)
        self._proved: set[tuple[Attention, str, bool]] = set()  # what passed the probe
        self.direct: DirectForward | None = None  # of a copy that only reads
        self.is_decoder = _is_decoder(model)
        self.attention: Attention = _direction(model, attention)
        self.attention_dropout: float | None = None  # in training; None: the model's default
        self.window: Window = window or _usual_window(model, self.attention)
        self.position_offset = _position_offset(model)
        _set_direction(model, self.attention)
        if self.window == "full":
            _open_windows(model)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.train(model.training)

    @staticmethod
    def load(
        source: str | Path,
        *,
        attention: Attention | None = None,
        window: Window | None = None,
        dtype: torch.dtype = torch.float32,
        keep_layers: int | None = None,
    ) -> "Backbone":
        """Load a zoo name, a local folder, a GGUF file or a hub id, and probe it.

        ``keep_layers`` keeps only the first layers: a smaller and worse model, for experiments on
        small machines.

        Raises:
            ModelError: if files are missing or the model cannot be packed, with the reason.
        """
        model = _load_model(str(source), dtype, keep_layers)
        backbone = Backbone(model, attention=attention, window=window)
        backbone.prove()
        return backbone

    def prove(self) -> None:
        """Probe the current direction once on each kind of device, and with a GPU's kernel.

        Raises:
            ModelError: see :func:`probe`.
        """
        what = self.attention, self.device.type, self.uses_kernel
        if what not in self._proved:
            probe(self)
            self._proved.add(what)

    def facts(self) -> list[object]:
        """Return what states depend on besides the weights.

        That is the direction of attention, the windows, and the entries of the config that people
        change.
        """
        config = self.config.get_text_config()
        window = None if _windows(self.model) is None else self.window
        entries = [getattr(config, name, None) for name in _IN_STATES]
        return [self.attention, window, json.dumps(entries, sort_keys=True, default=str)]

    @property
    def uses_kernel(self) -> bool:
        """Whether a GPU's kernel for rows of varying length would do the attention now."""
        autocast = torch.is_autocast_enabled(self.device.type)
        in_16_bits = autocast or next(self.model.parameters()).dtype.itemsize == 2
        return in_16_bits and kernel_runs_on(self.device)

    @property
    def dropout_left_out(self) -> float:
        """The usual dropout of attention weights that training in 16 bits leaves out here."""
        if self.attention_dropout is not None:
            return 0.0
        config = self.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None) or 1
        width = getattr(config, "head_dim", None) or self.hidden // heads
        on_gpu = kernel_runs_on(self.device) and kernel_takes_width(width)
        fused = on_gpu or self.device.type == "cpu"
        return self.usual_dropout if fused and not self.changes_scores else 0.0

    @property
    def changes_scores(self) -> bool:
        """Whether attention scores are capped or have sinks, for which no kernel is fused."""
        capped = getattr(self.config.get_text_config(), "attn_logit_softcapping", None) is not None
        return capped or any(name.endswith("sinks") for name, _ in self.named_parameters())

    @property
    def usual_dropout(self) -> float:
        """The dropout that the model puts on its attention weights in training."""
        config = self.config.get_text_config()
        return max(float(getattr(config, name, None) or 0) for name in _DROPOUTS)

    @property
    def config(self) -> Any:
        """The transformers config, with the direction written into it."""
        return self.model.config

    @property
    def hidden(self) -> int:
        """The width of hidden states."""
        return self.config.get_text_config().hidden_size

    @property
    def max_tokens(self) -> int:
        """The longest text that the model has positions for.

        Some rotary positions change for all texts of a batch if one is longer than a limit
        (longrope, dynamic). There it is the longest text that never does that.
        """
        config = self.config.get_text_config()
        limits = [getattr(config, "max_position_embeddings", None), _rotary_limit(config)]
        return min((int(each) for each in limits if each), default=1_000_000) - self.position_offset

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    def forward(self, texts: Packed) -> Float[Tensor, "tokens hidden"]:
        """Return the last hidden states, in the order of the tokens, of at least one text.

        Texts are sorted by length inside, so that those of one length are attended together.
        """
        return self._run(texts, lambda output: output.last_hidden_state)[0]

    def layer_states(self, texts: Packed) -> Float[Tensor, "layers tokens hidden"]:
        """Return the states before the first layer, and those after each layer."""
        return self._run(
            texts, lambda output: torch.cat(output.hidden_states), output_hidden_states=True
        )

    def _run(self, texts: Packed, states_of: Callable[[Any], Tensor], **options: Any) -> Tensor:
        """Return what ``states_of`` takes from the output: [any, tokens, hidden]."""
        lengths = texts.lengths
        order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
        is_sorted = order == list(range(len(lengths)))
        read = texts if is_sorted else texts.take(order)
        if hasattr(self.config, "use_cache"):
            options["use_cache"] = False
        layout, places = Layout(read, dropout=self.attention_dropout), read.places
        places = places + self.position_offset if self.position_offset else places
        if self.direct is not None and not options.get("output_hidden_states"):
            states = self.direct(read.ids, places, layout)[None]
        else:
            with layout.in_force():
                output = self.model(
                    input_ids=read.ids[None], position_ids=places[None], layout=layout, **options
                )
            states = states_of(output)
        if is_sorted:
            return states
        begins = offsets_of(torch.tensor([lengths[text] for text in order]))[:-1]
        begins = begins[torch.tensor(order).argsort()]  # of each text among the sorted ones
        back, _ = ragged_places(begins, begins + torch.tensor(lengths))
        return states[:, moved(back, states.device)]

    def turned(self, attention: Attention) -> "Backbone":
        """Return a copy that reads in this direction, probed; it shares the weights.

        Raises:
            ModelError: if an encoder is asked to be causal, or a decoder fails the probe.
        """
        if attention != self.attention and not self.is_decoder:
            raise ModelError(
                f"{type(self.model).__name__} is an encoder, which is always bidirectional"
            )
        copied = sharing_copy(self)
        if attention != self.attention:
            copied.attention = attention
            _set_direction(copied.model, attention)
        copied.prove()
        self._proved |= copied._proved
        return copied

    def freeze_embeddings(self) -> None:
        """Do not train the token table, which holds most weights of a small multilingual model."""
        self.model.get_input_embeddings().weight.requires_grad_(False)

    def add_lora(self, rank: int, alpha: int, dropout: float) -> None:
        """Freeze all weights and add trainable LoRA (peft) to every linear layer.

        Raises:
            ModelError: if they have 8 bits.
        """
        self.require_float("LoRA cannot be trained on it")
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear"
        )
        self.model = get_peft_model(self.model, config)

    @property
    def has_int8(self) -> bool:
        """Whether linear layers have 8-bit weights."""
        return next(int8_layers(self.model), None) is not None

    def require_float(self, what: str) -> None:
        """Raise if linear layers have 8-bit weights.

        Raises:
            ModelError: with ``what`` cannot be done.
        """
        if self.has_int8:
            raise ModelError(
                f"the model has 8-bit weights, so {what}; use the model that it was made from"
            )

    def merge_lora(self) -> None:
        """Add the LoRA updates to their weights, in float32, and remove them."""
        if not self.has_lora:
            return
        dtype = next(self.model.parameters()).dtype
        self.model = self.model.float().merge_and_unload().to(dtype)
        _set_direction(self.model, self.attention)

    @property
    def has_lora(self) -> bool:
        """Whether the model has LoRA updates that are not merged."""
        return hasattr(self.model, "merge_and_unload")


def sharing_copy(module: ModuleT) -> ModuleT:
    """Return a copy of a module with the same parameters and buffers."""
    same = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, same)


def probe(backbone: Backbone) -> None:
    """Check by numbers that texts are read alone, in the right direction, as transformers would.

    Raises:
        ModelError: if a text depends on its neighbours, a causal model sees the next token or a
            bidirectional one does not, or states differ from those of transformers' attention.
    """
    autocast = torch.is_autocast_enabled(backbone.device.type) and backbone.uses_kernel
    in_type = torch.autocast(backbone.device.type, enabled=autocast)
    with torch.no_grad(), in_type, exact_products():
        _probe(backbone)


def _probe(backbone: Backbone) -> None:
    training = backbone.training
    backbone.eval()
    vocabulary = backbone.config.get_text_config().vocab_size
    draw = torch.Generator().manual_seed(0)
    length = _probed_length(backbone)
    ids = torch.randint(min(10, vocabulary // 2), vocabulary, (length + 20,), generator=draw)
    text, changed, others = ids[:length], ids[:length].clone(), ids[length:].split([7, 13])
    changed[-1] = ids[-1] if ids[-1] != text[-1] else ids[-2]

    alone = _states(backbone, text)
    size = alone.abs().max().item()
    expected = _unpacked_states(backbone, text, "eager")
    close = 1e-4
    if backbone.uses_kernel or next(backbone.parameters()).dtype != torch.float32:
        # Rounding grows from layer to layer, in some models to half of a state. So the tolerance
        # is the difference between two of transformers' implementations.
        other = _unpacked_states(backbone, text, "sdpa")
        noise = 0.0 if expected is None or other is None else _gap(other, expected)
        close = max(5e-2, 4 * noise)
    name = type(backbone.model).__name__

    between = _states(backbone, others[0], text, others[1])[7:][:length]
    if _gap(between, alone) > close:
        raise ModelError(
            f"{name}: a text's states depend on its neighbours, so it cannot be packed; choose a "
            "model whose layers all have a standard attention"
        )
    moved = (_states(backbone, changed) - alone).abs().amax(1) / size  # [tokens]
    if backbone.attention == "causal" and moved[:-1].max() > 1e-5:
        raise ModelError(f"{name}: must be causal, but a token sees the one after it")
    if backbone.attention == "bidirectional" and moved[-2] < 1e-5:
        raise ModelError(
            f"{name}: must be bidirectional, but no token sees the one after it; "
            "this architecture is causal only"
        )
    if expected is not None and _gap(expected, alone) > close:
        raise ModelError(
            f"{name}: packed states differ from the model's own by {_gap(expected, alone):.0%}"
        )
    backbone.train(training)


def _probed_length(backbone: Backbone) -> int:
    """Return the length of the probed text: a GPU's kernel has to get past the edge of a window."""
    window = _windows(backbone.model)
    past = backbone.uses_kernel and window is not None and window <= _PROBED_WINDOW
    return min(window + 8, backbone.max_tokens) if past and window else 12


def _windows(model: nn.Module) -> int | None:
    """Return the smallest sliding window of a model, which modules or the config alone state."""
    parts = (model.config.get_text_config(), *model.modules())  # pyright: ignore
    found = [getattr(part, "sliding_window", None) for part in parts]
    return min((each for each in found if isinstance(each, int)), default=None)


def _gap(a: Tensor, b: Tensor) -> float:
    """Return the norm of the difference relative to that of ``b``."""
    return ((a - b).norm() / b.norm()).item()


def _states(backbone: Backbone, *texts: Tensor) -> Tensor:
    ids = torch.cat(texts)
    offsets = offsets_of(torch.tensor([len(text) for text in texts]))
    packed = Packed(ids, offsets, torch.ones_like(ids, dtype=torch.bool))
    return backbone(packed.to(backbone.device)).float()


def _unpacked_states(backbone: Backbone, text: Tensor, attention: str) -> Tensor | None:
    """Return the states of one text by an attention of transformers; None if unsupported."""
    model = backbone.model
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        return None
    try:
        return model(input_ids=text[None].to(backbone.device)).last_hidden_state[0].float()
    finally:
        model.set_attn_implementation(NAME)


def _load_model(source: str, dtype: torch.dtype, keep_layers: int | None = None) -> PreTrainedModel:
    place = str(zoo.resolve(source))
    hint = f"; {source!r} is no local folder, nor one of {', '.join(m.name for m in zoo.MODELS)}"
    if Path(source).exists():
        hint = "; is it a complete transformers folder (config.json, model.safetensors, tokenizer)?"
    with loading(f"{source}: cannot be loaded", hint), quiet():  # what is missing is checked below
        refuse_code(place, "config.json")
        check_sizes(Path(place))
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)
        if not Path(place).is_dir():  # on the hub
            refuse_code_in(f"{source}: its config.json", config.to_dict())
        if keep_layers is not None:
            _cut_layers(config.get_text_config(), keep_layers, source)
        check_weights(Path(place), config)
        in_8_bits = read_int8(Path(place))
        model, report = _pretrained(place, config, dtype, in_8_bits[0] if in_8_bits else None)
    lost = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if lost:
        raise ModelError(
            f"{source}: {len(lost)} weights are missing, such as {lost[0]}; "
            "the folder is incomplete or holds another architecture; copy or download it again"
        )
    if any("pooler" in key for key in report["missing_keys"]):
        model.pooler = None
    if in_8_bits is not None:
        mark_int8(model, in_8_bits[1])
    return model


def _pretrained(
    place: str, config: Any, dtype: torch.dtype, weights: Mapping[str, Tensor] | None
) -> tuple[Any, Mapping[str, Any]]:
    """Return a network with these weights, or those of a place, and what was missing."""
    how: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    if weights is None:
        return AutoModel.from_pretrained(place, trust_remote_code=False, **how)
    with torch.device("meta"):
        kind: Any = type(AutoModel.from_config(config, trust_remote_code=False))
    return kind.from_pretrained(None, state_dict=dict(weights), **how)


def _cut_layers(config: Any, kept: int, source: str) -> None:
    if not 1 <= kept <= config.num_hidden_layers:
        raise ModelError(
            f"{source}: keep_layers must be between 1 and {config.num_hidden_layers}; got {kept}"
        )
    config.num_hidden_layers = kept
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:kept]


def _configs(model: nn.Module) -> list[Any]:
    """Return every config object that a part of the model reads."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            found[id(config)] = config
    return list(found.values())


def _is_decoder(model: nn.Module) -> bool:
    return any(getattr(module, "is_causal", None) is True for module in model.modules())


def _direction(model: Any, wanted: Attention | None) -> Attention:
    decoder = _is_decoder(model)
    if wanted == "causal" and not decoder:
        raise ModelError(f"{type(model).__name__} is an encoder, which is always bidirectional")
    if wanted is not None:
        return wanted
    config = model.config
    turned = getattr(config, "is_causal", None) is False
    turned = turned or bool(getattr(config, "use_bidirectional_attention", False))
    return "causal" if decoder and not turned else "bidirectional"


def _set_direction(model: nn.Module, attention: Attention) -> None:
    """Set both switches: some architectures obey the config, some the module."""
    for module in model.modules():
        if isinstance(getattr(module, "is_causal", None), bool):
            module.is_causal = attention == "causal"  # pyright: ignore
    for config in _configs(model):
        if not getattr(config, "use_bidirectional_attention", False):  # Gemma's own switch, enough
            config.is_causal = attention == "causal"
        if hasattr(config, "use_cache"):
            config.use_cache = False


def _switch_to_packed(model: PreTrainedModel) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{type(model).__name__} is an encoder with a decoder, which cannot be packed; use a "
            "model of one stack"
        )
    try:
        model.set_attn_implementation(NAME)
        taken = model.config._attn_implementation == NAME
    except (ValueError, KeyError):
        taken = False
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    if "chunked_attention" in kinds:
        raise ModelError(
            f"{type(model).__name__} attends in chunks of a text in some layers, which has no "
            "bidirectional form and cannot be packed; use another model"
        )
    standard = any(isinstance(getattr(m, "is_causal", None), bool) for m in model.modules())
    if not (taken and standard):
        why = "does not let its attention be replaced" if standard else "has no standard attention"
        raise ModelError(
            f"{type(model).__name__} {why}, so it cannot be packed or made bidirectional; "
            "use a model with a standard transformers attention in every layer"
        )


def _usual_window(model: Any, attention: Attention) -> Window:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    all_slide = getattr(config, "sliding_window", None) is not None and (
        kinds <= {"sliding_attention"}
    )
    return "full" if attention == "bidirectional" and _is_decoder(model) and all_slide else "keep"


def _open_windows(model: nn.Module) -> None:
    """Make every window as wide as any text; layer types stay, as rotary bases depend on them."""
    for config in _configs(model):
        limit = getattr(config, "max_position_embeddings", None)
        if limit and getattr(config, "local_attention", None):
            config.local_attention = 2 * limit
        elif limit and getattr(config, "sliding_window", None) is not None:
            config.sliding_window = limit
    for module in model.modules():
        if isinstance(getattr(module, "sliding_window", None), int):
            config: Any = getattr(module, "config", None)
            module.sliding_window = config.sliding_window  # pyright: ignore


def _rotary_limit(config: Any) -> int | None:
    """Return the longest text before rotary positions depend on the longest one of a batch."""
    rope: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    found = []
    for each in (rope, *rope.values()) if isinstance(rope, dict) else ():
        kind = isinstance(each, dict) and (each.get("rope_type") or each.get("type"))
        if kind in ("longrope", "su", "dynamic"):
            name = "original_max_position_embeddings"
            found.append(each.get(name) or getattr(config, name, None))
    return min((int(each) for each in found if each), default=None)


def _position_offset(model: nn.Module) -> int:
    """Return the first position: RoBERTa-like models count from the padding id plus one."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids"):
            return int(getattr(module, "padding_idx", 0) or 0) + 1
    return 0
