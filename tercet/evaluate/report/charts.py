"""Charts of a page as inline SVG, without any package.

They are as wide as the page: places are percentages, so letters keep their size on a telephone.
Colours come from the page, which has light and dark ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10
from typing import Final, Literal, NewType, TypeAlias

import numpy as np
from jaxtyping import Float64, Int64

from tercet.evaluate.report.intervals import Interval

Html = NewType("Html", str)
"""Text with markup, in which everything that came from outside is escaped."""

Ink: TypeAlias = Literal["own", "faint", "other", "second", "third", "fourth", "fifth"]
"""A colour: of the user's model, a lighter one, that of baselines, and further ones."""

Numbers: TypeAlias = Sequence[float | int]

SERIES: Final[tuple[Ink, ...]] = ("own", "second", "third", "fourth", "fifth", "faint")
_POINTS: Final = 1_500  # of a curve; more cannot be seen and make the page heavy
_TRACK: Final = 16  # pixels: height of a system in a row
_SIDE: Final = 1_000  # of the square in which curves are drawn


@dataclass(frozen=True, slots=True)
class Line:
    """A curve; with ``dots`` its points are marked."""

    name: str
    x: Numbers
    y: Numbers
    ink: Ink = "own"
    dots: bool = False
    filled: bool = False  # down to zero, in steps: a histogram


def line_chart(  # noqa: PLR0913 (independent choices, each with a default)
    lines: Sequence[Line],
    *,
    name: str,
    x: str,
    y: str,
    from_zero: bool = False,
    powers: int | None = None,
    height: int = 200,
) -> Html:
    """Draw curves over a common axis; ``name`` is what a screen reader says, with last values.

    With ``powers`` of 2, the ``x`` of lines are logarithms to this base.
    """
    lines = [_thinned_line(line) for line in lines]
    across = _Axis.of(
        [v for line in lines for v in line.x], whole=x == "step" or powers is not None
    )
    up = _Axis.of([v for line in lines for v in line.y], from_zero=from_zero)
    inside = "".join(_path(line, across, up) for line in lines)
    marks = "".join(
        f'<circle class="{line.ink}" cx="{across.share(a):.2f}%" cy="{100 - up.share(b):.2f}%" '
        'r="3.5"/>'
        for line in lines
        if line.dots or len(line.x) == 1
        for a, b in zip(line.x, line.y, strict=True)
        if isfinite(b)
    )
    said = escape(f"{name}: " + "; ".join(map(_spoken, lines)))
    chart = (
        f'<svg class="plot" role="img" aria-label="{said}" height="{height}">'
        f"{_grid_of(across, up, powers)}"
        f'<svg width="100%" height="100%" viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none">'
        f"{inside}</svg>{marks}</svg>"
    )
    key = _key({line.name: line.ink for line in lines}) if len(lines) > 1 else ""
    return Html(
        f'<div class="chart"><p class="axes"><b>{escape(y)}</b>{key}</p>{chart}'
        f'<p class="across">{escape(x)}</p></div>'
    )


def histogram(
    samples: Mapping[str, Numbers], *, name: str, x: str, bins: int = 40, reach: Numbers = ()
) -> Html:
    """Draw how values of several samples are distributed, each in percent of its own number.

    The axis includes the values of ``reach``, so that two histograms can have the same one.
    """
    parts = [np.asarray(each, np.float64) for each in (*samples.values(), reach)]
    everything = np.concatenate(parts)
    everything = everything[np.isfinite(everything)]
    low, high = (everything.min(), everything.max()) if len(everything) else (0.0, 1.0)
    if high - low < 1e-3:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1)
    lines = [
        Line(
            label,
            np.repeat(edges, 2)[1:-1].tolist(),
            np.repeat(100 * np.histogram(values, edges)[0] / max(len(values), 1), 2).tolist(),
            ink,
            filled=True,
        )
        for (label, values), ink in zip(samples.items(), SERIES, strict=False)
    ]
    return line_chart(lines, name=name, x=x, y="% of pairs", from_zero=True, height=170)


def interval_chart(
    rows: Mapping[str, Mapping[str, Interval]],
    *,
    name: str,
    baselines: Sequence[str] = (),
    signed: bool = False,
) -> Html:
    """Draw a row for each name, with a dot and an interval for each system in it.

    Systems in ``baselines`` are grey squares, the others strong dots. Those of a row are below each
    other, and its number is that of the first.
    """
    values = [each for row in rows.values() for each in row.values() if isfinite(each.mean)]
    bounds = [bound for each in values for bound in (each.low, each.high, each.mean)]
    axis = _Axis.of([*bounds, 0.0] if signed else bounds, steps=4)
    parts = []
    for label, row in rows.items():
        first = next(iter(row.values()))
        number = _number(first, signed)
        tracks = "".join(
            _track(each, axis, system in baselines, _TRACK * place)
            for place, (system, each) in enumerate(row.items())
            if isfinite(each.mean)
        )
        grid = _ticks_across(axis, signed)
        parts.append(
            f'<span class="name">{escape(label)}</span>'
            f'<svg aria-hidden="true" height="{_TRACK * len(row) + 6}">{grid}{tracks}</svg>'
            f'<span class="number">{number}</span>'
        )
    labels = "".join(
        f'<text x="{axis.share(tick):.2f}%" y="12" text-anchor="middle">{text}</text>'
        for tick, text in axis.labels(signed)
    )
    foot = f'<span class="name"></span><svg class="foot" height="16">{labels}</svg><span></span>'
    systems = dict.fromkeys(system for row in rows.values() for system in row)
    inks: dict[str, Ink] = {each: "other" if each in baselines else "own" for each in systems}
    key = f'<p class="axes">{_key(inks)}</p>' if any(len(r) > 1 for r in rows.values()) else ""
    said = "; ".join(
        f"{label} {_number(each, signed)}" + (f" ({system})" if len(row) > 1 else "")
        for label, row in rows.items()
        for system, each in row.items()
    )
    return Html(
        f'{key}<div class="rows" role="img" aria-label="{escape(f"{name}: {said}")}">'
        f"{''.join(parts)}{foot}</div>"
    )


def running_mean(values: Float64[np.ndarray, "steps"]) -> Float64[np.ndarray, "steps"]:
    """Return the mean of the values around each, a thirtieth of all on either side.

    Values that are not finite are left out; NaN if there are no others.
    """
    reach, finite = len(values) // 30, np.isfinite(values)
    sums = np.concatenate([[0.0], np.where(finite, values, 0.0).cumsum()])
    counts = np.concatenate([[0], finite.cumsum()])
    place = np.arange(len(values))
    first, end = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    number = counts[end] - counts[first]
    nothing = np.full(len(values), np.nan)
    return np.divide(sums[end] - sums[first], number, out=nothing, where=number > 0)


def with_mean(name: str, x: Numbers, y: Numbers) -> list[Line]:
    """Return a curve in a faint colour, and its running mean in a strong one."""
    smooth = running_mean(np.asarray(y, dtype=np.float64))
    return [Line(name, x, y, "faint"), Line("running mean", x, smooth.tolist(), "own")]


# ---- parts -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Axis:
    """A range of numbers, with round ones to label."""

    low: float
    high: float
    step: float

    @classmethod
    def of(
        cls,
        values: Numbers,
        *,
        from_zero: bool = False,
        whole: bool = False,
        steps: int = 5,
    ) -> "_Axis":
        """Return the axis for some values, a little wider than their range."""
        known = [float(value) for value in values if isfinite(value)] or [0.0, 1.0]
        low, high = (0.0 if from_zero else min(known)), max(known)
        if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
            low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
        rough = (high - low) / steps
        power = 10.0 ** floor(log10(rough))
        step = next(power * each for each in (1, 2, 5, 10) if power * each >= rough * 0.999)
        step = max(step, 1.0) if whole else step
        margin = 0.03 * (high - low)
        return cls(low if from_zero else low - margin, high + margin, step)

    def share(self, value: float | int) -> float:
        """Return where a value is, in percent."""
        return 100 * (value - self.low) / (self.high - self.low)

    def labels(self, signed: bool = False) -> list[tuple[float, str]]:
        """Return the round numbers on the axis, with their texts."""
        first, last = ceil(self.low / self.step - 1e-9), floor(self.high / self.step + 1e-9)
        ticks = [number * self.step for number in range(first, last + 1)]
        return [(tick, _tick(tick, self.step, signed)) for tick in ticks]


def _tick(value: float, step: float, signed: bool) -> str:
    if step >= 1:
        return f"{value:+,.0f}" if signed and value else f"{value:,.0f}"
    if step < 1e-4:
        return f"{value:.3g}"
    places = max(0, -floor(log10(step) + 1e-9))
    return f"{value:+.{places}f}" if signed and round(value, places) else f"{value:.{places}f}"


def _grid_of(across: _Axis, up: _Axis, powers: int | None) -> str:
    parts = []
    for tick, text in up.labels():
        y = 100 - up.share(tick)
        parts.append(
            f'<line class="grid" x1="0" x2="100%" y1="{y:.2f}%" y2="{y:.2f}%"/>'
            f'<text x="-8" y="{y:.2f}%" dy=".35em" text-anchor="end">{text}</text>'
        )
    for tick, text in across.labels():
        x = across.share(tick)
        text = text if powers is None else f"{powers**tick:,.0f}"
        parts.append(
            f'<line class="grid" y1="0" y2="100%" x1="{x:.2f}%" x2="{x:.2f}%"/>'
            f'<text x="{x:.2f}%" y="100%" dy="1.4em" text-anchor="middle">{text}</text>'
        )
    return "".join(parts)


def _ticks_across(axis: _Axis, signed: bool) -> str:
    return "".join(
        f'<line class="{"zero" if signed and abs(tick) < axis.step / 2 else "grid"}" y1="0" '
        f'y2="100%" x1="{axis.share(tick):.2f}%" x2="{axis.share(tick):.2f}%"/>'
        for tick, _ in axis.labels()
    )


def _track(each: Interval, axis: _Axis, baseline: bool, top: int) -> str:
    low, mean, high = (axis.share(value) for value in (each.low, each.mean, each.high))
    ink = "other" if baseline else "own"
    middle = top + 3 + _TRACK // 2
    bar = ""
    if isfinite(low) and isfinite(high):
        bar = f'<line class="{ink}" x1="{low:.2f}%" x2="{high:.2f}%" y1="{middle}" y2="{middle}"/>'
    if baseline:
        square = f'x="{mean:.2f}%" y="{middle - 4}" width="8" height="8" transform="translate(-4)"'
        return f'{bar}<rect class="{ink}" {square}/>'
    return f'{bar}<circle class="{ink}" cx="{mean:.2f}%" cy="{middle}" r="5"/>'


def _number(each: Interval, signed: bool) -> str:
    if not isfinite(each.mean):
        return "-"
    return f"{each.mean:+.3f}" if signed else f"{each.mean:.3f}"


def _path(line: Line, across: _Axis, up: _Axis) -> str:
    scale = _SIDE / 100
    parts: list[str] = []
    pen = "M"
    for a, b in zip(line.x, line.y, strict=True):
        if not isfinite(b):
            pen = "M"
            continue
        parts.append(f"{pen}{across.share(a) * scale:.1f} {_SIDE - up.share(b) * scale:.1f}")
        pen = "L"
    if not parts:
        return ""
    path = "".join(parts)
    if not line.filled:
        return f'<path class="{line.ink}" d="{path}"/>'
    floor_ = _SIDE - up.share(0) * scale
    first, last = (across.share(line.x[place]) * scale for place in (0, -1))
    shape = f"M{first:.1f} {floor_:.1f}L{path[1:]}L{last:.1f} {floor_:.1f}"
    return f'<path class="{line.ink} filled" d="{shape}"/>'


def _key(inks: Mapping[str, Ink]) -> str:
    """Return a legend; a baseline has a square, as in the charts."""
    return "".join(
        f'<span class="key"><i class="{ink}" aria-hidden="true"></i>{escape(name)}</span>'
        for name, ink in inks.items()
    )


def _spoken(line: Line) -> str:
    known = [value for value in line.y if isfinite(value)]
    if not known:
        return f"{line.name}, no values"
    return f"{line.name}, first {known[0]:.4g}, last {known[-1]:.4g}"


def _thinned_line(line: Line) -> Line:
    kept = _thinned(len(line.x))
    if len(kept) == len(line.x):
        return line
    return Line(
        line.name,
        [line.x[place] for place in kept],
        [line.y[place] for place in kept],
        line.ink,
        line.dots,
        line.filled,
    )


def _thinned(count: int) -> Int64[np.ndarray, "points"]:
    """Return the indices of at most ``_POINTS`` points, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, _POINTS)).round().astype(np.int64))
