"""Scatter plots and stacked bars as inline SVG, whose marks tell what they are under the pointer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 34, 46  # margins of the plotted area


@dataclass(frozen=True)
class Mark:
    """A point of a scatter plot."""

    x: float
    y: float
    label: str  # shown by the browser when the pointer rests on it
    ringed: bool = False
    note: str = ""  # written above it


@dataclass(frozen=True)
class Series:
    """Marks of one name and colour."""

    name: str
    colour: str
    marks: Sequence[Mark]
    line: bool = False  # joined, left to right


@dataclass(frozen=True)
class Bar:
    """A horizontal bar; a part is a name, a colour and a length."""

    label: str
    parts: Sequence[tuple[str, str, float]]


def scatter(title: str, x_label: str, y_label: str, series: Sequence[Series], from_zero: bool = False) -> str:
    """from_zero: the y axis begins at 0."""
    marks = [mark for one in series for mark in one.marks]
    xs = _ticks(min(mark.x for mark in marks), max(mark.x for mark in marks))
    ys = _ticks(0.0 if from_zero else min(mark.y for mark in marks), max(mark.y for mark in marks))
    x_of = _scale(xs[0], xs[-1], LEFT, WIDTH - RIGHT)
    y_of = _scale(ys[0], ys[-1], HEIGHT - BOTTOM, TOP)
    parts = []
    for x in xs:
        parts.append(f'<line class="grid" x1="{x_of(x)}" x2="{x_of(x)}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(_text(x_of(x), HEIGHT - BOTTOM + 16, _number(x), "tick", "middle"))
    for y in ys:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(y)}" y2="{y_of(y)}"/>')
        parts.append(_text(LEFT - 7, y_of(y) + 4, _number(y), "tick", "end"))
    for one in series:
        if one.line:
            path = " ".join(f"{x_of(m.x)},{y_of(m.y)}" for m in sorted(one.marks, key=lambda mark: mark.x))
            parts.append(f'<polyline points="{path}" fill="none" stroke="{one.colour}" stroke-width="1.8"/>')
        for mark in one.marks:
            x, y = x_of(mark.x), y_of(mark.y)
            if mark.ringed:
                parts.append(f'<circle cx="{x}" cy="{y}" r="9" fill="none" stroke="#111" stroke-width="1.6"/>')
            if mark.note:
                below = y - 12 < TOP + 8  # where it would run into the title
                parts.append(_text(x, y + 21 if below else y - 12, mark.note, "tick", "middle"))
            tip = f"<title>{escape(mark.label)}</title>"
            parts.append(f'<circle cx="{x}" cy="{y}" r="4.5" fill="{one.colour}" fill-opacity="0.85">{tip}</circle>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(LEFT, 18, title, "title", "start"))
    parts.append(_text(middle, HEIGHT - 8, x_label, "label", "middle"))
    centre = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 14 {centre})"'
    parts.append(f'<text class="label" x="14" y="{centre}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    return _svg(WIDTH, HEIGHT, title, parts) + legend([(one.name, one.colour) for one in series])


def bars(title: str, x_label: str, rows: Sequence[Bar]) -> str:
    """Stacked bars from 0, one below the other."""
    left, step = 190, 22
    width, height = 2 * WIDTH, TOP + step * len(rows) + BOTTOM
    ticks = _ticks(0.0, max(sum(length for *_, length in row.parts) for row in rows))
    x_of = _scale(0.0, ticks[-1], left, width - 40)
    parts = [_text(left, 18, title, "title", "start")]
    for x in ticks:
        parts.append(f'<line class="grid" x1="{x_of(x)}" x2="{x_of(x)}" y1="{TOP - 4}" y2="{height - BOTTOM}"/>')
        parts.append(_text(x_of(x), height - BOTTOM + 16, _number(x), "tick", "middle"))
    for index, row in enumerate(rows):
        y = TOP + step * index
        parts.append(_text(left - 8, y + 13, row.label, "tick", "end"))
        begin = 0.0
        for name, colour, length in row.parts:
            box = (
                f'x="{x_of(begin)}" y="{y}" width="{round(x_of(begin + length) - x_of(begin), 2)}" height="{step - 5}"'
            )
            parts.append(f'<rect {box} fill="{colour}"><title>{escape(name)}: {length:.2f} ms</title></rect>')
            begin += length
    parts.append(_text((left + width - 40) / 2, height - 8, x_label, "label", "middle"))
    return _svg(width, height, title, parts) + legend([(name, colour) for name, colour, _ in rows[0].parts])


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """A line of names, each with its colour, as HTML."""
    keys = (f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in entries)
    return f'<div class="legend">{"".join(keys)}</div>'


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg {size} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _scale(low: float, high: float, begin: float, end: float) -> Callable[[float], float]:
    return lambda value: round(begin + (value - low) / (high - low) * (end - begin), 2)


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that enclose `low` to `high`."""
    span = (high - low) or abs(high) or 1.0
    raw = span / about
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _number(value: float) -> str:
    return f"{value:,.10g}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"
