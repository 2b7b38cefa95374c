"""The folder format of sentence-transformers: the files beside weights and tokenizer.

- ``modules.json``: which modules a text passes through, in order
- ``1_Pooling/config.json``: which tokens become the vector, and how
- ``2_Dense`` and the next ones: dense layers after the pooling
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
from tercet.models.choices import Activation, DenseSettings, LayerSettings, PoolingName
from tercet.models.network.loading import as_object, read_object, read_value
from tercet.models.settings import FILE, Settings, changed, named_prompts
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
MODULES: Final = ("Transformer", "Layer", "Pooling", "Dense", "Normalize")  # in this order
# The functions of a dense layer by the classes that files name; nothing that they name is imported.
ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ELU": "elu",
    "torch.nn.modules.activation.SELU": "selu",
    "torch.nn.modules.activation.Softplus": "softplus",
    "torch.nn.modules.activation.LeakyReLU": "leaky_relu",
}
LAYER: Final = "tercet_layer.Layer"  # the layer's class, in the file that is copied into the folder
LAYER_CODE: Final = Path(__file__).with_name("tercet_layer.py")
WRITTEN_AS: Final = "5.0.0"  # the release whose layout is written; readers compare it with theirs
REMEDY: Final = "load the model with sentence-transformers itself, or use another one"


def write_modules(folder: Path, settings: Settings, dim: int) -> None:
    """Make a folder with weights and tokenizer one that ``SentenceTransformer(folder)`` loads.

    Of a trained layer it writes code and prompts, not sizes and weights, and of dense layers no
    weights. A tokenizer without a padding token gets its end token as one, since texts are padded
    there.
    """
    _complete_tokenizer(folder / "tokenizer_config.json")
    modules = _modules(settings)
    write_json(
        folder / "modules.json",
        [
            {
                "idx": i,
                "name": str(i),
                "path": path,
                "type": LAYER if name == "Layer" else f"sentence_transformers.models.{name}",
            }
            for i, (name, path) in enumerate(modules)
        ],
    )
    for _, path in modules:
        (folder / path).mkdir(exist_ok=True)
    for place in module_folders(folder, settings, "Layer"):
        shutil.copyfile(LAYER_CODE, folder / LAYER_CODE.name)
        write_json(place / "prompts.json", prompt_ids(folder, settings))
    modes = {flag: ours == settings.pooling for ours, flag in POOLINGS.values()}
    for place in module_folders(folder, settings, "Pooling"):
        write_json(
            place / "config.json",
            {"word_embedding_dimension": dim, **modes, "include_prompt": settings.pool_prompt},
        )
    _write_dense_configs(folder, settings, dim)
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


def _modules(settings: Settings) -> list[tuple[str, str]]:
    """Return name and subfolder of each module of a model that tercet writes, in order."""
    used = {"Transformer": 1, "Pooling": 1, "Dense": len(settings.dense_layers)}
    used |= {"Layer": int(settings.layer is not None), "Normalize": int(settings.normalize)}
    names = [name for name in MODULES for _ in range(used[name])]
    return [(name, f"{i}_{name}" if i else "") for i, name in enumerate(names)]


def module_folders(folder: Path, settings: Settings, name: str) -> list[Path]:
    """Return where the modules of this name are in a folder that tercet writes."""
    return [folder / path for module, path in _modules(settings) if module == name]


def dense_folders(folder: Path, settings: Settings) -> list[Path]:
    """Return where the dense layers of a model with these settings are, whoever wrote it."""
    if (folder / FILE).exists():
        return module_folders(folder, settings, "Dense")
    modules = _read_module_list(folder / "modules.json")
    return [folder / path for module, path in modules if module == "Dense"]


def _write_dense_configs(folder: Path, settings: Settings, dim: int) -> None:
    paths = {activation: path for path, activation in ACTIVATIONS.items()}
    places = module_folders(folder, settings, "Dense")
    for place, layer in zip(places, settings.dense_layers, strict=True):
        config = {
            "in_features": dim,
            "out_features": layer.width,
            "bias": layer.bias,
            "activation_function": paths[layer.activation],
        }
        # Releases before 5.7 refuse a name that they do not know.
        write_json(
            place / "config.json", config | ({"use_residual": True} if layer.residual else {})
        )
        dim = layer.width


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
    names = [name for name, _ in modules]
    places = {name: folder / path for name, path in modules}
    pooling, pool_prompt = _read_pooling(places["Pooling"] / "config.json")
    if "Normalize" in places:
        _require_vectors(places["Normalize"] / "config.json")
    query_tokens, document_tokens = _read_max_tokens(folder)
    found = {
        "pooling": pooling,
        "rules": "sentence_transformers",
        "normalize": "Normalize" in names,
        "layer": LayerSettings() if "Layer" in names else None,  # its sizes are beside its weights
        "dense_layers": tuple(
            _read_dense(folder / path / "config.json") for name, path in modules if name == "Dense"
        ),
        **_read_prompts(folder / "config_sentence_transformers.json"),
        "pool_prompt": pool_prompt,
        "query_tokens": query_tokens,
        "document_tokens": document_tokens,
    }
    try:
        return changed(Settings(), found)
    except RecipeError as error:
        raise ModelError(f"{folder}: {error}; correct the files of the model") from error


def _read_module_list(path: Path) -> list[tuple[str, str]]:
    """Return class and subfolder of each module in order, transformer and pooling included."""
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
    single = all(name == "Dense" or names.count(name) == 1 for name in names)
    if not needed or not single or names != sorted(names, key=MODULES.index):
        raise ModelError(
            f"{path}: has the modules {', '.join(names) or '(none)'}; tercet reads Transformer, "
            "Pooling, any number of Dense, and Normalize in this order, the last two optional; "
            f"{REMEDY}"
        )
    if found[0][1]:
        raise ModelError(
            f"{path}: keeps the transformer in the subfolder {found[0][1]}, as very old releases "
            "did; load and save it with a current sentence-transformers first"
        )
    modules = [(name, subfolder) for name, (_, subfolder) in zip(names, found, strict=True)]
    layer = dict(modules).get("Layer", "1_Layer")
    if layer != "1_Layer":
        raise ModelError(f'{path}: keeps the layer in "{layer}"; tercet reads "1_Layer": rename it')
    return modules


_OF_DENSE: Final = ("in_features", "out_features", "bias", "activation_function", "use_residual")
_INPUTS: Final = ("module_input_name", "module_output_name")


def _read_dense(path: Path) -> DenseSettings:
    """Return the settings of a dense layer after the pooling."""
    config = read_object(path)
    _require_vectors(path)
    if unknown := sorted(set(config) - {*_OF_DENSE, *_INPUTS}):
        raise ModelError(f'{path}: sets "{unknown[0]}", which tercet does not apply; {REMEDY}')
    named = config.get("activation_function", "torch.nn.modules.activation.Tanh")
    known: dict[str, Activation] = {
        f"torch.nn.{_last(place)}": ours for place, ours in ACTIVATIONS.items()
    }
    every: dict[str, Activation] = {**known, **ACTIVATIONS}
    activation: Activation | None = every.get(named) if isinstance(named, str) else None
    if activation is None:
        raise ModelError(
            f"{path}: activation_function must be one of {', '.join(known)}; got {named!r}; "
            f"{REMEDY}"
        )
    try:
        return DenseSettings(
            width=config["out_features"],
            activation=activation,
            bias=config.get("bias", True),
            residual=config.get("use_residual", False),
        )
    except (KeyError, RecipeError) as error:
        raise ModelError(f"{path}: does not describe a dense layer ({error}); {REMEDY}") from error


def _require_vectors(path: Path) -> None:
    """Raise if a module after the pooling reads or writes anything but the vector of a text."""
    config = read_object(path, optional=True)
    for name in _INPUTS:
        if config.get(name) not in (None, "sentence_embedding"):
            raise ModelError(
                f'{path}: {name} must be "sentence_embedding"; got {config[name]!r}, which tercet '
                f"lacks; {REMEDY}"
            )


def _last(path: str) -> str:
    return path.rpartition(".")[2]


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
    if wrong := _other_output(path, config):
        raise ModelError(f"{path}: {wrong}, and tercet pools the last states of tokens; {REMEDY}")
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


def _other_output(path: Path, config: Mapping[str, Any]) -> str | None:
    """Return which output of the network a folder pools, in words, if it is not the last states."""
    modalities = as_object(path, config.get("modality_config") or {})
    of_text = as_object(path, modalities.get("text") or {})
    usual = {"method": "forward", "method_output_name": "last_hidden_state"}
    for name, value in usual.items():
        if of_text.get(name, value) != value:
            return f'{name} of text is "{of_text[name]}"'
    output = config.get("module_output_name") or "token_embeddings"
    return None if output == "token_embeddings" else f'module_output_name is "{output}"'


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


def other_similarity(folder: Path, settings: Settings) -> str | None:
    """Return the similarity that a folder asks for, unless inner products rank alike."""
    if not (folder / "modules.json").is_file():
        return None
    config = read_object(folder / "config_sentence_transformers.json", optional=True)
    named = str(config.get("similarity_fn_name") or "cosine")
    alike = ("cosine", "dot", "euclidean") if settings.normalize else ("dot",)
    return None if named in alike else named


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
