"""The folder format of sentence-transformers: the files beside weights and tokenizer.

- ``modules.json``: which modules a text passes through, in order
- ``1_Pooling/config.json``: which tokens become the vector, and how
- ``1_Layer`` and ``tercet_layer.py``: a trained layer before the pooling, and the code that runs
  it; such a folder is opened with ``trust_remote_code=True``
- ``sentence_bert_config.json``: the longest text, in tokens
- ``config_sentence_transformers.json``: prompts by name, similarity, versions

The layout written is that of releases 2 to 5, which release 6 and programs that serve models read.
"""

import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, get_args

from tokenizers import Tokenizer

from tercet.errors import ModelError, RecipeError
from tercet.files.artifacts import write_json
from tercet.models.choices import LayerSettings, PoolingName
from tercet.models.network.loading import as_object, read_object, read_value
from tercet.models.settings import Settings, changed, named_prompts
from tercet.types import Role

# Their name -> our name, and the flag that stands for it before release 6.
POOLINGS: Final[Mapping[str, tuple[PoolingName | None, str]]] = {
    "cls": ("first", "pooling_mode_cls_token"),
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "max": (None, "pooling_mode_max_tokens"),
    "mean_sqrt_len_tokens": (None, "pooling_mode_mean_sqrt_len_tokens"),
    "weightedmean": ("weighted_mean", "pooling_mode_weightedmean_tokens"),
    "lasttoken": ("last", "pooling_mode_lasttoken"),
}
MODULES: Final = ("Transformer", "Layer", "Pooling", "Normalize")
LAYER: Final = "tercet_layer.Layer"  # the layer's class, in the file that is copied into the folder
LAYER_CODE: Final = Path(__file__).with_name("tercet_layer.py")
WRITTEN_AS: Final = "5.0.0"  # the release whose layout is written; readers compare it with theirs
REMEDY: Final = "load the model with sentence-transformers itself, or use another one"


def write_modules(folder: Path, settings: Settings, dim: int) -> None:
    """Make a folder with weights and tokenizer one that ``SentenceTransformer(folder)`` loads.

    Of a trained layer it writes code and prompts, not sizes and weights. A tokenizer without a
    padding token gets its end token as one, since texts are padded there.
    """
    _complete_tokenizer(folder / "tokenizer_config.json")
    used = {"Transformer": True, "Pooling": True}
    used |= {"Layer": settings.layer is not None, "Normalize": settings.normalize}
    modules = [name for name in MODULES if used[name]]
    paths = {name: f"{i}_{name}" if i else "" for i, name in enumerate(modules)}
    write_json(
        folder / "modules.json",
        [
            {
                "idx": i,
                "name": str(i),
                "path": paths[name],
                "type": LAYER if name == "Layer" else f"sentence_transformers.models.{name}",
            }
            for i, name in enumerate(modules)
        ],
    )
    for path in paths.values():
        (folder / path).mkdir(exist_ok=True)
    if settings.layer is not None:
        shutil.copyfile(LAYER_CODE, folder / LAYER_CODE.name)
        write_json(folder / paths["Layer"] / "prompts.json", prompt_ids(folder, settings))
    modes = {flag: ours == settings.pooling for ours, flag in POOLINGS.values()}
    write_json(
        folder / paths["Pooling"] / "config.json",
        {"word_embedding_dimension": dim, **modes, "include_prompt": settings.pool_prompt},
    )
    longest = max(settings.query_tokens, settings.document_tokens)
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False}
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "__version__": {
                "sentence_transformers": WRITTEN_AS,
                "transformers": version("transformers"),
                "pytorch": version("torch"),
            },
            "prompts": dict(named_prompts(settings)),
            "default_prompt_name": settings.default_prompt,
            "similarity_fn_name": "cosine",
        },
    )


def _complete_tokenizer(path: Path) -> None:
    """Name a padding token, and a tokenizer class that transformers knew before release 5."""
    config = read_object(path, optional=True)
    complete = dict(config)
    if config.get("eos_token") and not config.get("pad_token"):
        complete["pad_token"] = config["eos_token"]
    if config.get("tokenizer_class") == "TokenizersBackend":
        complete["tokenizer_class"] = "PreTrainedTokenizerFast"
    if complete != config:
        write_json(path, complete)


def prompt_ids(folder: Path, settings: Settings) -> list[list[int]]:
    """Return token ids of the prompts that a layer leaves out of the vectors.

    Each is tokenized alone, with the special tokens before it and without the one after it.
    """
    prompts = dict.fromkeys(prompt for _, prompt in named_prompts(settings) if prompt)
    if settings.pool_prompt or not prompts:
        return []
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    found = [one.ids[: len(one.ids) - one.special_tokens_mask[-1]] for one in encoded if one.ids]
    return [ids for ids in found if ids]


def read_modules(folder: Path) -> Settings | None:
    """Return the settings in a sentence-transformers folder; None for any other folder.

    Raises:
        ModelError: if a file is missing or damaged, or the model has a part that tercet lacks.
    """
    if not (folder / "modules.json").is_file():
        return None
    modules = _read_module_list(folder / "modules.json")
    pooling, pool_prompt = _read_pooling(folder / modules["Pooling"] / "config.json")
    query_tokens, document_tokens = _read_max_tokens(folder)
    found = {
        "pooling": pooling,
        "rules": "sentence_transformers",
        "normalize": "Normalize" in modules,
        "layer": LayerSettings()
        if "Layer" in modules
        else None,  # its sizes are beside its weights
        **_read_prompts(folder / "config_sentence_transformers.json"),
        "pool_prompt": pool_prompt,
        "query_tokens": query_tokens,
        "document_tokens": document_tokens,
    }
    try:
        return changed(Settings(), found)
    except RecipeError as error:
        raise ModelError(f"{folder}: {error}; correct the files of the model") from error


def _read_module_list(path: Path) -> dict[str, str]:
    """Return the subfolder of each module by its class, transformer and pooling included."""
    try:
        found = [(module["type"], module["path"]) for module in read_value(path)]
    except (KeyError, TypeError) as error:
        raise ModelError(f"{path}: must be a list of modules with type and path") from error
    if not all(isinstance(part, str) for module in found for part in module):
        raise ModelError(f"{path}: must be a list of modules with type and path, both texts")
    names = [kind.rpartition(".")[2] for kind, _ in found]
    for (kind, _), name in zip(found, names, strict=True):
        theirs = kind.startswith("sentence_transformers.") and name != "Layer"
        if name not in MODULES or not (theirs or kind == LAYER):
            raise ModelError(f'{path}: has the module "{kind}", which tercet lacks; {REMEDY}')
    needed = {"Transformer", "Pooling"} <= {*names}
    if not needed or names != [name for name in MODULES if name in names]:
        raise ModelError(
            f"{path}: has the modules {', '.join(names) or '(none)'}; tercet reads Transformer, "
            f"Pooling, Normalize in this order, the last one optional; {REMEDY}"
        )
    if found[0][1]:
        raise ModelError(
            f"{path}: keeps the transformer in the subfolder {found[0][1]}, as very old releases "
            "did; load and save it with a current sentence-transformers first"
        )
    subfolders = {name: subfolder for name, (_, subfolder) in zip(names, found, strict=True)}
    if subfolders.get("Layer", "1_Layer") != "1_Layer":
        raise ModelError(
            f'{path}: keeps the layer in "{subfolders["Layer"]}"; tercet reads "1_Layer": rename it'
        )
    return subfolders


def _read_pooling(path: Path) -> tuple[PoolingName, bool]:
    """Return the pooling and whether prompts are pooled; release 6 and earlier ones differ."""
    config = read_object(path)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [name for name, (_, flag) in POOLINGS.items() if config.get(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    ours = POOLINGS.get(modes[0], (None,))[0] if len(modes) == 1 else None
    if ours is None:
        known = ", ".join(name for name, (our_name, _) in POOLINGS.items() if our_name)
        raise ModelError(
            f'{path}: pooling must be one of {known}; got "{" + ".join(modes)}"; {REMEDY}'
        )
    dim = config.get("embedding_dimension", config.get("word_embedding_dimension"))
    if not isinstance(dim, int):
        raise ModelError(f"{path}: has no embedding_dimension; is the download complete?")
    return ours, config.get("include_prompt", True)


# Entries of sentence_bert_config.json that change no vector, or are read below.
_KNOWN: Final = (
    *("max_seq_length", "query_length", "document_length", "do_lower_case", "unpad_inputs"),
    *("transformer_task", "modality_config", "module_output_name", "backend"),
)
# Entries with options of a library, and those options that change no vector.
_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "model": ("dtype", "torch_dtype", "attn_implementation", "low_cpu_mem_usage", "device_map"),
    "processor": ("padding_side", "model_max_length", "use_fast", "clean_up_tokenization_spaces"),
    "tokenizer": ("padding_side", "model_max_length", "use_fast", "clean_up_tokenization_spaces"),
    "config": ("use_cache", "output_hidden_states", "output_attentions"),
    "processing": (),
}
_HARMLESS: Final = ("trust_remote_code", "local_files_only", "revision", "cache_dir", "token")


def lowers_case(folder: Path) -> bool:
    """Whether texts are put into lower case before the tokenizer reads them."""
    return bool(_read_reader_config(folder)[1].get("do_lower_case"))


def _read_reader_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file that says how texts are read, and its content."""
    # Old releases put the architecture in the name: sentence_roberta_config.json.
    names = [
        "sentence_bert_config.json",
        *sorted(p.name for p in folder.glob("sentence_*_config.json")),
    ]
    path = folder / next((name for name in names if (folder / name).is_file()), names[0])
    return path, read_object(path, optional=True)


def _read_max_tokens(folder: Path) -> tuple[int, int]:
    """Return the longest query and document: as set, else what both tokenizer and model take."""
    path, config = _read_reader_config(folder)
    task = config.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise ModelError(
            f'{path}: transformer_task must be feature-extraction; got "{task}"; {REMEDY}'
        )
    if unknown := _unknown_options(config):
        raise ModelError(
            f"{path}: sets {unknown}, which tercet does not apply, so its vectors would differ; "
            f"{REMEDY}"
        )
    limits = [config.get("max_seq_length")]
    if not limits[0]:
        tokenizer = read_object(folder / "tokenizer_config.json", optional=True)
        model = read_object(folder / "config.json", optional=True)
        limits = [tokenizer.get("model_max_length"), model.get("max_position_embeddings")]
    known = [limit for limit in limits if isinstance(limit, int)]
    if not known:
        raise ModelError(
            f'{folder}: the longest text is unknown; set "max_seq_length" in '
            "sentence_bert_config.json"
        )
    longest = min(known)
    return config.get("query_length") or longest, config.get("document_length") or longest


def _unknown_options(config: Mapping[str, Any]) -> str | None:
    """Return the first entry in use that may change vectors and that tercet does not read."""
    for name, value in config.items():
        if name in _KNOWN or value in (None, {}, [], False, ""):
            continue
        kind, _, ending = name.rpartition("_")
        if kind not in _OPTIONS or ending not in ("args", "kwargs") or not isinstance(value, dict):
            return f'"{name}"'
        for option in value:
            if option not in (*_OPTIONS[kind], *_HARMLESS):
                return f'"{option}" in "{name}"'
    return None


def _read_prompts(path: Path) -> dict[str, Any]:
    """Return prompts by role and by task; "passage" and "corpus" are names of "document"."""
    config = read_object(path, optional=True)
    read = as_object(path, config.get("prompts") or {})
    named = {name: prompt or "" for name, prompt in read.items()}
    default = config.get("default_prompt_name") or None
    if default is not None and default not in named:
        raise ModelError(
            f"{path}: default_prompt_name must be one of {', '.join(named) or 'no prompts'}; got "
            f"{default!r}"
        )
    for name in ("passage", "corpus"):
        if named.get(name) and not named.get("document"):
            named["document"] = named[name]
    found: dict[str, Any] = {"prompts": {}, "task_prompts": {}, "default_prompt": default}
    for name, prompt in named.items():
        task, dash, role = name.rpartition("-")
        if dash and role in get_args(Role) and name != default:
            found["task_prompts"].setdefault(task, {})[role] = prompt
        else:
            found["prompts"][name] = prompt
    return found
