"""Published NV-Embed folders: loading them as an embedder, and encoding as their own code does.

``load_nv_embed`` gives a model that reads texts in tercet's way: borders by character offsets, a
prompt for each text, room for the end token. :class:`NvEmbedEncoder` keeps the reference's rules,
for numbers that are to be compared with published ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import MistralConfig, MistralModel

from tercet.errors import ModelError
from tercet.models.embedder import Embedder
from tercet.models.formats.instructions import as_prompt
from tercet.models.formats.nv_embed_files import (
    NvEmbed,
    Part,
    check_names,
    our_name,
    published_name,
    read_nv_embed,
    weight_files,
)
from tercet.models.formats.sentence_transformer_module import quiet
from tercet.models.network.backbone import Attention, Backbone, Window
from tercet.models.network.latent_attention import AttentionLayer, Layer, build_layer
from tercet.models.network.pooling import mean
from tercet.models.settings import Settings, changed, replaced_layer
from tercet.models.tokens import Form, Tokens, load_tokenizer
from tercet.types import Packed

MAX_TOKENS: Final = 4_096  # the reference's default; the model itself has more positions
_UNCUT: Final = 1 << 30
_BATCH_TOKENS: Final = 2_048


def load_nv_embed(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    attention: Attention | None = None,
    window: Window | None = None,
    changes: Mapping[str, Any] = MappingProxyType({}),
) -> Embedder:
    """An embedder from a folder as ``nvidia/NV-Embed-v1`` and ``-v2`` are; none of its code runs.

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
    embedder = Embedder(backbone, tokenizer, settings, used)
    embedder.eval()
    return embedder


def _load_weights(
    folder: Path,
    published: NvEmbed,
    dtype: torch.dtype,
    attention: Attention | None,
    window: Window | None,
) -> tuple[Backbone, AttentionLayer]:
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


class NvEmbedEncoder:
    """An NV-Embed model, and texts read by the reference's rules; each may be switched off.

    - ``count_mask``: it counts the tokens of the instruction alone, without the one before every
      text, and leaves as many out of the mean, from the first on. Exact only where the tokenizer
      puts one token before a text and cuts off the space that ends the instruction.
    - ``eos_before_truncation``: a text that is cut loses its end token.
    - ``autocast_fp16``: on a GPU it computes in float16, whatever the weights are.

    One thing is not repeated: where an instruction fills the window nothing is left to pool, and
    the reference gives no numbers; here it is the mean of all tokens.
    """

    def __init__(
        self,
        embedder: Embedder,
        *,
        count_mask: bool = True,
        eos_before_truncation: bool = True,
        autocast_fp16: bool = True,
    ) -> None:
        self.embedder = embedder
        self.count_mask = count_mask
        self.eos_before_truncation = eos_before_truncation
        self.autocast_fp16 = autocast_fp16

    def tokenize(
        self, texts: Sequence[str], instruction: str = "", max_tokens: int = MAX_TOKENS
    ) -> Packed:
        """The tokens of instruction, text and end, and which of them are pooled.

        The instruction is put before each text as it stands, so it is a whole prompt.
        """
        tokenizer = self.embedder.tokenizer
        form = Form(pool_prompt=self.embedder.settings.pool_prompt, end=True)
        limit = _UNCUT if self.eos_before_truncation else max_tokens
        tokens = tokenizer(texts, limit, instruction, form)
        skipped = tokens.skipped
        if self.count_mask and not form.pool_prompt:
            alone = tokenizer.stock(instruction, add_special_tokens=False)["input_ids"]
            skipped = [len(alone)] * len(texts)
        ids = [row[:max_tokens] for row in tokens.ids]
        return Tokens(ids, skipped, tokens.truncated).pack()

    def encode(
        self, texts: Sequence[str], instruction: str = "", max_tokens: int = MAX_TOKENS
    ) -> Float[np.ndarray, "texts hidden"]:
        """Vectors of texts after one instruction, float32, in the order given."""
        embedder = self.embedder
        vectors = np.empty((len(texts), embedder.dim), dtype=np.float32)
        if not texts:
            return vectors
        packed = self.tokenize(texts, instruction, max_tokens)
        order = np.argsort(packed.lengths, kind="stable")[::-1]
        size = max(1, _BATCH_TOKENS // max(packed.lengths))
        embedder.eval()
        with torch.inference_mode(), self._precision():
            for start in range(0, len(order), size):
                rows = order[start : start + size].tolist()
                batch = packed.take(rows).to(embedder.device)
                pooled = mean(embedder.states(batch), batch).float()
                pooled = F.normalize(pooled, dim=1) if embedder.settings.normalize else pooled
                vectors[rows] = pooled.cpu().numpy()
        return vectors

    def _precision(self) -> AbstractContextManager[object]:
        if self.autocast_fp16 and self.embedder.device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.float16)
        return nullcontext()
