"""The folder format of sentence-transformers: what it says beside weights and tokenizer.

Nothing here imports sentence-transformers: the format is a few small JSON files.

- ``modules.json``: which modules a text passes through, in order
- ``1_Pooling/config.json``: which tokens become the vector, and how
- ``1_Layer`` and ``tercet_layer.py``: a trained layer before the pooling, and the code that runs
  it; such a folder is opened with ``trust_remote_code=True``
- ``sentence_bert_config.json``: the longest text, in tokens
- ``config_sentence_transformers.json``: prompts by name, similarity, versions

It is written as releases 2 to 5 wrote it. Release 6 renamed modules and keys but still reads the
old ones without a warning; other programs that serve embedders know the old ones only.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, get_args

from tokenizers import Tokenizer

from tercet.errors import ModelError
from tercet.models.network.latent_attention import Layer
from tercet.models.network.pooling import PoolingName
from tercet.models.settings import Settings, named_prompts
from tercet.types import Role

# Our name, their name, and the flag by which releases before 6 say the same.
POOLINGS: Final[Mapping[str, tuple[PoolingName | None, str]]] = {
    "cls": ("first", "pooling_mode_cls_token"),
    "mean": ("mean", "pooling_mode_mean_tokens"),
    "max": (None, "pooling_mode_max_tokens"),
    "mean_sqrt_len_tokens": (None, "pooling_mode_mean_sqrt_len_tokens"),
    "weightedmean": ("weighted_mean", "pooling_mode_weightedmean_tokens"),
    "lasttoken": ("last", "pooling_mode_lasttoken"),
}
MODULES: Final = ("Transformer", "Layer", "Pooling", "Normalize")
LAYER: Final = "tercet_layer.Layer"  # the class of the layer, in the file that is written beside
LAYER_CODE: Final = Path(__file__).with_name("tercet_layer.py")
WRITTEN_AS: Final = "5.0.0"  # the release whose layout is written; readers compare it with theirs
REMEDY: Final = "load the model with sentence-transformers itself, or use another one"


def write_modules(folder: Path, settings: Settings, dim: int) -> None:
    """Make a folder with weights and tokenizer one that ``SentenceTransformer(folder)`` loads.

    Attention both ways of a decoder is not said here but by ``is_causal`` in ``config.json``. The
    sizes and weights of a trained layer are not written here, but its code and its prompts. A
    tokenizer that has no padding gets its end token for it, as is usual: texts are padded there.
    """
    _mend_tokenizer(folder / "tokenizer_config.json")
    used = {"Transformer": True, "Pooling": True}
    used |= {"Layer": settings.layer is not None, "Normalize": settings.normalize}
    modules = [name for name in MODULES if used[name]]
    paths = {name: f"{i}_{name}" if i else "" for i, name in enumerate(modules)}
    _write(
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
        _write(folder / paths["Layer"] / "prompts.json", prompt_ids(folder, settings))
    modes = {flag: ours == settings.pooling for ours, flag in POOLINGS.values()}
    _write(
        folder / paths["Pooling"] / "config.json",
        {"word_embedding_dimension": dim, **modes, "include_prompt": settings.pool_prompt},
    )
    longest = max(settings.query_tokens, settings.document_tokens)
    _write(
        folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False}
    )
    _write(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "SentenceTransformer",
            "__version__": {
                "sentence_transformers": WRITTEN_AS,
                "transformers": version("transformers"),
                "pytorch": version("torch"),
            },
            "prompts": dict(named_prompts(settings)),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )


def _mend_tokenizer(path: Path) -> None:
    """Name a padding token, and the tokenizer's class as transformers before release 5 knows it."""
    config = _read_object(path) if path.is_file() else {}
    mended = dict(config)
    if config.get("eos_token") and not config.get("pad_token"):
        mended["pad_token"] = config["eos_token"]
    if config.get("tokenizer_class") == "TokenizersBackend":
        mended["tokenizer_class"] = "PreTrainedTokenizerFast"
    if mended != config:
        _write(path, mended)


def prompt_ids(folder: Path, settings: Settings) -> list[list[int]]:
    """What a layer has to know of the prompts, where they are left out of the vectors.

    The token ids of each alone, with the special tokens before it and without the one after; the
    folder holds the tokenizer.
    """
    prompts = dict.fromkeys(prompt for _, prompt in named_prompts(settings))
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
        ModelError: a file is missing or damaged, or the model has a part that tercet has not.
    """
    if not (folder / "modules.json").is_file():
        return None
    modules = _read_module_list(folder / "modules.json")
    pooling, pool_prompt = _read_pooling(folder / modules["Pooling"] / "config.json")
    max_tokens = _read_max_tokens(folder)
    return Settings(
        pooling=pooling,
        normalize="Normalize" in modules,
        layer=Layer() if "Layer" in modules else None,  # its sizes are beside its weights
        **_read_prompts(folder / "config_sentence_transformers.json"),
        pool_prompt=pool_prompt,
        query_tokens=max_tokens,
        document_tokens=max_tokens,
    )


def _read_module_list(path: Path) -> dict[str, str]:
    """The subfolder of each module, by its class; transformer and pooling are among them."""
    try:
        found = [(module["type"], module["path"]) for module in _read(path)]
    except (KeyError, TypeError) as error:
        raise ModelError(f"{path}: is not a list of modules with type and path") from error
    names = [kind.rpartition(".")[2] for kind, _ in found]
    for (kind, _), name in zip(found, names, strict=True):
        stock = kind.startswith("sentence_transformers.") and name != "Layer"
        if name not in MODULES or not (stock or kind == LAYER):
            raise ModelError(f'{path}: has the module "{kind}", which tercet does not; {REMEDY}')
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
    config = _read_object(path)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [name for name, (_, flag) in POOLINGS.items() if config.get(flag)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    ours = POOLINGS.get(modes[0], (None,))[0] if len(modes) == 1 else None
    if ours is None:
        known = ", ".join(name for name, (our_name, _) in POOLINGS.items() if our_name)
        raise ModelError(
            f'{path}: pools by "{" + ".join(modes)}"; tercet knows {known}, one of them; {REMEDY}'
        )
    if not isinstance(
        config.get("embedding_dimension", config.get("word_embedding_dimension")), int
    ):
        raise ModelError(f"{path}: says no embedding_dimension; is the download complete?")
    return ours, config.get("include_prompt", True)


def _read_max_tokens(folder: Path) -> int:
    """The longest text: as set, else what both tokenizer and model take."""
    # Old releases put the architecture in the name: sentence_roberta_config.json.
    names = [
        "sentence_bert_config.json",
        *sorted(p.name for p in folder.glob("sentence_*_config.json")),
    ]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    config = _read_object(path) if path else {}
    if config.get("do_lower_case"):
        raise ModelError(
            f"{path}: asks for lower case before the tokenizer, which tercet does not do; if the "
            'tokenizer lower-cases by itself, set "do_lower_case" to false'
        )
    task = config.get("transformer_task", "feature-extraction")
    if task != "feature-extraction":
        raise ModelError(f'{path}: uses the transformer for "{task}", tercet for states; {REMEDY}')
    limits = [config.get("max_seq_length")]
    if not limits[0]:
        tokenizer, model = folder / "tokenizer_config.json", folder / "config.json"
        limits = [
            _read_object(tokenizer).get("model_max_length") if tokenizer.is_file() else None,
            _read_object(model).get("max_position_embeddings") if model.is_file() else None,
        ]
    known = [limit for limit in limits if isinstance(limit, int)]
    if not known:
        raise ModelError(
            f"{folder}: does not say how long a text may be; "
            'set "max_seq_length" in sentence_bert_config.json'
        )
    return min(known)


def _read_prompts(path: Path) -> dict[str, Any]:
    """Return prompts by role and by task, the one for documents also if it has another name.

    Authors call it "passage" or "corpus" as well. Release 6 then encodes documents without a
    prompt, because it adds an empty one called "document" and prefers it.
    """
    read = _read_object(path).get("prompts") if path.is_file() else None
    named = {name: prompt or "" for name, prompt in (read or {}).items()}
    for name in ("passage", "corpus"):
        if named.get(name) and not named.get("document"):
            named["document"] = named[name]
    found: dict[str, Any] = {"prompts": {}, "task_prompts": {}}
    for name, prompt in named.items():
        task, dash, role = name.rpartition("-")
        if dash and role in get_args(Role):
            found["task_prompts"].setdefault(task, {})[role] = prompt
        else:
            found["prompts"][name] = prompt
    return found


def _read_object(path: Path) -> dict[str, Any]:
    content = _read(path)
    if not isinstance(content, dict):
        raise ModelError(f"{path}: should hold one JSON object; is the download complete?")
    return content


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path}: is missing; is the download complete?") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ModelError(f"{path}: is not JSON ({error}); is the download complete?") from error


def _write(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(f"{text}\n", encoding="utf-8")
