"""Cross-encoders (rerankers) of transformers: they read a query and a document together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig

from tercet.errors import ModelError
from tercet.files.artifacts import fingerprint
from tercet.models.foreign_code import refuse_code, refuse_code_in
from tercet.models.network.fingerprints import fingerprint_of
from tercet.models.network.loading import check_sizes, check_weights, loading, quiet, read_object
from tercet.models.tokens import load_tokenizer
from tercet.models.zoo import zoo
from tercet.segments import batches_by_length

_SUFFIX: Final = "ForSequenceClassification"
_USUAL_TOKENS: Final = 512  # of a pair, where neither model nor tokenizer names a limit
_BATCH_TOKENS: Final = 4096  # with padding


def is_cross_encoder(source: str) -> bool:
    """Whether a folder or hub id holds a classifier of sequences, by its config's architectures.

    False where the config cannot be read; loading says why.
    """
    place = zoo.resolve(source)
    try:
        if Path(place).is_dir():
            config: Mapping[str, Any] = read_object(Path(place) / "config.json")
        else:
            with quiet():
                config, _ = PreTrainedConfig.get_config_dict(str(place))
    except (OSError, ValueError, ModelError):
        return False
    return names_classifier(config.get("architectures"))


def names_classifier(architectures: object) -> bool:
    """Whether the architectures in a config name a classifier of sequences."""
    named = architectures if isinstance(architectures, list) else []
    return any(str(name).endswith(_SUFFIX) for name in named)


class CrossEncoder:
    """A reranker of one label; its score is the logit, without a sigmoid."""

    def __init__(self, model: nn.Module, tokenizer: Any, batch_tokens: int | None = None) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.batch_tokens = batch_tokens or _BATCH_TOKENS
        self.max_tokens = min(_position_limit(model), _tokenizer_limit(tokenizer))

    @classmethod
    def load(
        cls,
        source: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        batch_tokens: int | None = None,
    ) -> "CrossEncoder":
        """Load a folder or a hub id; no code of a model is run.

        Raises:
            ModelError: if files are missing or damaged, name custom code, or have other than one
                label.
        """
        place = str(zoo.resolve(source))
        with loading(f"{source}: cannot be loaded as a cross-encoder"), quiet():
            refuse_code(place, "config.json")
            check_sizes(Path(place))
            config = AutoConfig.from_pretrained(place, trust_remote_code=False)
            refuse_code_in(f"{source}: its config.json", config.to_dict())
            if config.num_labels != 1:
                raise ModelError(
                    f"{source}: a reranker must have 1 label; got {config.num_labels}, as a "
                    "classifier has; give a model that was trained to score pairs"
                )
            check_weights(Path(place), config)
            model, report = AutoModelForSequenceClassification.from_pretrained(
                place,
                trust_remote_code=False,
                config=config,
                dtype=dtype,
                output_loading_info=True,
            )
        if lost := sorted(report["missing_keys"]):
            raise ModelError(
                f"{source}: {len(lost)} weights are missing, such as {lost[0]}; the folder is "
                "incomplete or holds no reranker; copy or download it again"
            )
        tokenizer = load_tokenizer(place)
        if tokenizer.pad_token_id is None:
            raise ModelError(
                f"{source}: the tokenizer has no padding token, which batches of pairs need; name "
                "one in tokenizer_config.json"
            )
        # A decoder scores a pair at its last token before the padding.
        model.config.pad_token_id = tokenizer.pad_token_id
        return cls(model.to(device), tokenizer, batch_tokens)

    def fingerprint(self) -> str:
        """Return a fingerprint of weights, their type, the tokenizer and the longest pair."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        words = self.tokenizer.get_vocab() if fast is None else fast.to_str()
        read = fingerprint(repr((words, self.tokenizer.init_kwargs.get("do_lower_case"))))
        dtype = next(self.model.parameters()).dtype
        return f"{fingerprint_of(self.model.state_dict())} {self.max_tokens} {dtype} {read}"

    @torch.no_grad()
    def score(self, queries: Sequence[str], documents: Sequence[str]) -> Float[Tensor, "pairs"]:
        """Return the logit of each query with the document at its position, in float32.

        Pairs of similar length are read together. Of a pair that is too long, the longer text loses
        its end.
        """
        if not queries:
            return torch.zeros(0)
        encoded = self.tokenizer(
            list(queries),
            list(documents),
            truncation="longest_first",
            max_length=self.max_tokens,
        )
        lengths = [len(ids) for ids in encoded["input_ids"]]
        scores = torch.zeros(len(lengths))
        device = next(self.model.parameters()).device
        for rows in _padded_batches(lengths, self.batch_tokens):
            features = {name: [values[row] for row in rows] for name, values in encoded.items()}
            padded = self.tokenizer.pad(features, return_tensors="pt").to(device)
            scores[torch.tensor(rows)] = self.model(**padded).logits[:, 0].float().cpu()
        return scores


def _padded_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cut rows into batches that have ``budget`` tokens at most once they are padded."""
    found: list[list[int]] = []
    for rows in batches_by_length(lengths, budget):  # longest first
        most = max(budget // max(lengths[rows[0]], 1), 1)
        found += [rows[start : start + most] for start in range(0, len(rows), most)]
    return found


def _position_limit(model: nn.Module) -> int:
    """Return how many positions a model has for tokens: RoBERTa's begin after the padding's."""
    config: Any = model.config
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    tables: Mapping[str, nn.Module] = dict(model.named_modules())
    table = next((m for name, m in tables.items() if name.endswith(".position_embeddings")), None)
    padding = getattr(table, "padding_idx", None)
    return int(most or _USUAL_TOKENS) - (0 if padding is None else padding + 1)


def _tokenizer_limit(tokenizer: Any) -> int:
    limit = tokenizer.model_max_length
    return _USUAL_TOKENS if limit > 1_000_000 else int(limit)  # transformers' "no limit" is 1e30
