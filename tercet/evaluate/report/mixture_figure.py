"""A figure of a mixture of training data: a bar a source, a colour a language."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_SOURCES: Final = 40  # the largest; those after them share one bar
_COLOURED: Final = 20  # languages with a colour of their own


def mixture_bars(shares: Mapping[str, Mapping[str, float]]) -> "Figure":
    """Shares by source and language, the largest source on top. Draw inside ``drawing()``."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    totals = {source: sum(langs.values()) for source, langs in shares.items()}
    names = sorted(totals, key=lambda name: -totals[name])
    rows = {name: dict(shares[name]) for name in names[:MOST_SOURCES]}
    for name in names[MOST_SOURCES:]:
        rest = rows.setdefault(f"{len(names) - MOST_SOURCES} others", {})
        for lang, share in shares[name].items():
            rest[lang] = rest.get(lang, 0.0) + share
    langs: dict[str, float] = {}
    for of_source in rows.values():
        for lang, share in of_source.items():
            langs[lang] = langs.get(lang, 0.0) + share
    figure = Figure(figsize=(7.2, 1.2 + 0.28 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    left = np.zeros(len(rows))
    for number, lang in enumerate(sorted(langs, key=lambda lang: -langs[lang])):
        widths = np.array([100 * of_source.get(lang, 0.0) for of_source in rows.values()])
        colour = colormaps["tab20"](number) if number < _COLOURED else "#BBBBBB"
        label = (lang or "not told") if number < _COLOURED else f"_{lang}"
        axes.barh(range(len(rows)), widths, left=left, height=0.7, color=colour, label=label)
        left += widths
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlabel("% of the rows")
    axes.legend(ncols=min(len(langs), 8), fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    return figure
