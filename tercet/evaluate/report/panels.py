"""Many small drawings of one kind beside each other: curves over steps, with their intervals."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Final

from tercet.evaluate.report.figures import COLOURS, GRID, Point, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Panel = Mapping[str, Sequence[Point]]
"""The curves of one drawing, by name."""

_COLUMNS: Final = 4
_HEIGHT: Final = 1.75  # inches of a row
_CHARACTERS: Final = 24  # of a title, in a line


def panels(
    groups: Mapping[str, Mapping[str, Panel]],
    *,
    x: str,
    y: str,
    marked: float | None = None,
) -> "Figure":
    """A heading a group, and below it a drawing a name; bands are the intervals.

    Drawings of one group have one scale. A dotted line stands at ``marked``.
    """
    rows = [-(-len(group) // _COLUMNS) for group in groups.values()]
    figure = new_figure(height=0.5 + _HEIGHT * sum(rows) + 0.3 * len(rows))
    parts = figure.subfigures(len(groups), 1, height_ratios=rows, squeeze=False)[:, 0]
    handles, labels = [], []
    for part, (heading, group), count in zip(parts, groups.items(), rows, strict=True):
        part.suptitle(heading, x=0.01, ha="left", fontsize=11, fontweight="bold")
        grid = part.subplots(count, _COLUMNS, sharex=True, sharey=True, squeeze=False)
        for axes, (title, lines) in zip(grid.flat, group.items(), strict=False):
            _draw(axes, lines, marked)
            axes.set_title(fill(title, _CHARACTERS), loc="left", fontsize=9)
            handles, labels = axes.get_legend_handles_labels()
        for axes in grid.flat[len(group) :]:
            axes.set_visible(False)
        for axes in grid.flat[max(len(group) - _COLUMNS, 0) : len(group)]:
            axes.set_xlabel(x, fontsize=8)
            axes.tick_params(labelbottom=True)
        for axes in grid[:, 0]:
            axes.set_ylabel(y, fontsize=8)
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), fontsize=9)
    return figure


def _draw(axes: "Axes", lines: Panel, marked: float | None) -> None:
    for number, (name, points) in enumerate(lines.items()):
        steps = [point.x for point in points]
        colour = COLOURS[2 * number % len(COLOURS)]
        means = [point.value.mean for point in points]
        axes.plot(steps, means, color=colour, marker="o", markersize=3, linewidth=1.5, label=name)
        low, high = ([getattr(p.value, side) for p in points] for side in ("low", "high"))
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    if marked is not None:
        axes.axvline(marked, color="#888888", linestyle=":", linewidth=1)
    axes.tick_params(labelsize=8)
    axes.grid(color=GRID, linewidth=0.7)
