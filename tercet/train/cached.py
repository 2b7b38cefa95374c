"""Batches whose texts were tokenized before the training began."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from tercet.data.batches.collate import Collator
from tercet.data.batches.token_cache import CachedTokens, stored_tokens
from tercet.data.files.sources import Source
from tercet.models.embedder import Embedder
from tercet.train.batches import max_tokens_of
from tercet.train.recipe import Stage
from tercet.types import Role


def with_cached_tokens(
    collate: Collator, embedder: Embedder, stage: Stage, sources: Sequence[Source]
) -> Collator:
    """The same batches, of tokens that are kept on disk; they are made now where they are not.

    All processes have to call this. A stage that does not learn from pairs makes its batches in
    another way, and is left as it is.

    Raises:
        StorageError: when the disk refuses.
    """
    if not stage.objective.traits.cacheable:
        return collate
    tokenizer = embedder.tokenizer.stock.backend_tokenizer.to_str()
    digest = hashlib.blake2b(tokenizer.encode(), digest_size=16).hexdigest()

    def made_with(role: Role) -> str:
        limit = max_tokens_of(stage, embedder, role)
        return f"{digest} {embedder.settings.form(role)!r} {limit}"

    stored = stored_tokens(sources, made_with, collate.tokenize, collate.prompt_of)
    return replace(collate, tokenize=CachedTokens(collate.tokenize, stored))
