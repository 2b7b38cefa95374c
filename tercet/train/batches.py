"""A stage's batches: the recipe speaks of tokens, the sampler of the bytes that files are made of."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tercet import distributed
from tercet.data.sampler import BatchPlan, Sampler
from tercet.data.sources import Source
from tercet.errors import RecipeError
from tercet.nn.embedder import Embedder
from tercet.train.recipe import Stage

SAMPLE: Final = 64
