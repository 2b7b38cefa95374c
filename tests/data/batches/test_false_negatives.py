from math import inf, nan
from typing import Any

import pytest
import torch

from tercet.data.batches.false_negatives import IgnoreRule
from tercet.errors import RecipeError


@pytest.mark.parametrize(
    ("rule", "limits"),
    [
        (IgnoreRule(), [0.9, -0.3, inf]),
        (IgnoreRule(kind="margin", value=-0.05), [0.75, -0.45, inf]),
        (IgnoreRule(kind="percent"), [0.76, -0.42, inf]),
        (IgnoreRule(kind="percent", value=1.0), [0.8, -0.4, inf]),
        (IgnoreRule(kind="percent", value=1.5), [1.2, -0.2, inf]),
    ],
)
def test_the_limits_of_the_papers_also_for_negative_scores(rule: IgnoreRule, limits: list[float]):
    positives = torch.tensor([0.8, -0.4, inf], dtype=torch.float64)
    torch.testing.assert_close(rule.limit(positives), torch.tensor(limits, dtype=torch.float64))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"value": nan}, "^ignore_value must be finite; got nan$"),
        ({"value": 10.0}, "^ignore_value must be between -2 and 2 for the rule margin, .* 10.0$"),
        (
            {"kind": "percent", "value": 95.0},
            "^ignore_value must be above 0 and at most 2 for the rule percent, as in 0.95; got 95",
        ),
        ({"kind": "percent", "value": 0.0}, "^ignore_value must be above 0 and at most 2 "),
    ],
)
def test_impossible_values_are_refused(given: dict[str, Any], message: str):
    with pytest.raises(RecipeError, match=message):
        IgnoreRule(**given)
