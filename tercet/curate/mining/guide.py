"""A guide: a model whose stored vectors decide which documents of a batch are ignored.

As GISTEmbed does (arXiv 2402.16829, sec. 3), but the guide encodes each distinct text once, before
the training. The vectors are mapped from files of the cache; memory holds a number for each text.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from tercet.curate.mining.document_pools import Pool, StoredVectors, TextStore, encode_pool
from tercet.curate.mining.ranks import prompt_for
from tercet.curate.mining.relevant import blocks
from tercet.data.files.sources import Source
from tercet.data.files.texts import text_key
from tercet.files.atomic import clear_about
from tercet.files.progress import Bars, bar
from tercet.models.embedder import Embedder
from tercet.types import Example, Role


class Guide:
    """A guide's vectors of all queries and documents of some examples.

    A text is read after the prompt of its row or, without one, the guide's for the row's task. Of
    texts that differ in case or spaces only, the first is encoded. Several processes, which all
    make one, share the encoding.

    Raises:
        ModelError: if a vector contains NaN or infinity.
        StorageError: if the disk refuses.
        DataError: if a source has changed since it was opened.
    """

    def __init__(
        self, guide: Embedder, sources: Sequence[Source], folder: Path, *, bars: Bars = bar
    ) -> None:
        self._settings, self._dim = guide.settings, guide.dim
        self._pools: dict[tuple[Role, str], Pool] = {}
        with clear_about(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for source in sources:
                for examples in blocks(source):
                    for example in examples:
                        if example.score is None:  # pairs with a score have no negatives
                            self._add(example, folder)
        stored = StoredVectors(guide, folder)
        with bars("guide", sum(map(len, self._pools.values()))) as advance:
            for (role, _), pool in self._pools.items():
                encode_pool(pool, _of_role(stored, role), advance)
        for pool in self._pools.values():
            pool.texts.close()

    def _add(self, example: Example, folder: Path) -> None:
        for role in get_args(Role):
            prompt = prompt_for(self._settings, example, role, "row")
            pool = self._pools.get((role, prompt))
            if pool is None:
                pool = self._pools[role, prompt] = Pool(prompt, TextStore(folder))
            for text in texts_of(example, role):
                pool.add(text)

    def __call__(
        self, texts: Sequence[str], role: Role, examples: Sequence[Example]
    ) -> Float[Tensor, "texts dim"]:
        """Return the vectors of texts of these examples, of unit length; from any thread.

        A blank text, which a negative may be, has a vector of zeros.
        """
        of_prompt: dict[str, list[int]] = defaultdict(list)
        for place, example in enumerate(examples):
            if texts[place].strip():
                of_prompt[prompt_for(self._settings, example, role, "row")].append(place)
        found = torch.zeros(len(texts), self._dim)
        for prompt, places in of_prompt.items():
            pool = self._pools[role, prompt]
            rows = np.array([pool.rows[text_key(texts[place])] for place in places])
            vectors = torch.from_numpy(pool.vectors(rows))
            found[places] = torch.nn.functional.normalize(vectors, dim=1)
        return found


def _of_role(
    stored: StoredVectors, role: Role
) -> Callable[[Sequence[str], Role, Sequence[str]], Path]:
    """Return what encodes a shard of a pool, whose texts have this role."""
    return lambda texts, _, prompts: stored.shard(texts, role, prompts)


def texts_of(example: Example, role: Role) -> Iterator[str]:
    """Yield the texts of an example that are read in this role."""
    if role == "query":
        yield example.query
    else:
        yield from example.positives
        yield from example.negatives
