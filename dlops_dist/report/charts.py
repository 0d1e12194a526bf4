"""Charts in a page: SVG whose colours are the page's, light or dark, and bars and matrices of HTML."""

import base64
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import pairwise

import numpy as np
from PIL import Image

from dlops_dist.figures import Line, Panel

WIDTH, HEIGHT = 420, 250
RIGHT, TOP, BOTTOM, LETTER = 12, 10, 36, 7.2
COLOURS, EDGE = 8, 8
POINTS = 400
"""Of a line at most, evenly; the last one among them."""
TOLD = 60
"""Points of a line at most that say their values."""
NUMBERED = 20
"""Classes at most whose confusion is written down."""
COUNTED = ("epoch", "step")
"""What has no parts."""
BLUE = (37, 113, 205)


def grid(charts: Iterable[str]) -> str:
    return f"<div class=charts>{''.join(charts)}</div>"


def chart(panel: Panel) -> str:
    """Lines over epochs or steps."""
    lines = [line for line in panel.lines if any(panel.is_drawn(y) for _, y in line.points)]
    xs = [x for line in lines for x, _ in line.points]
    low, high = _ends([y for line in lines for _, y in line.points if panel.is_drawn(y)], panel.log)
    numbered = {y: _power(y) for y in _log_ticks(low, high)} if panel.log else _numbered(ticks(low, high))
    left = LETTER * max(map(len, numbered.values())) + 12
    across, down = _axis(min(xs), max(xs), left, WIDTH - RIGHT), _axis(low, high, HEIGHT - BOTTOM, TOP, panel.log)
    parts = [_rules(panel, left, numbered, down), _foot(panel, left, (min(xs), max(xs)), across)]
    for line in lines:
        points = [(across(x), down(y if panel.is_drawn(y) else math.nan), x, y) for x, y in _thinned(line.points)]
        look = f"line {_colour(line)}{' faint' * line.faint}"
        parts.append(f"<path class='{look}' d='{_path(points)}'><title>{escape(line.label)}</title></path>")
        if not line.faint and len(points) <= TOLD:
            parts += [
                f"<circle class='{_colour(line)}' cx='{px:.1f}' cy='{py:.1f}' r='2.4'>"
                f"<title>{escape(', '.join(filter(None, (line.label, f'{panel.x} {x:g}: {y:.6g}'))))}</title></circle>"
                for px, py, x, y in points
                if math.isfinite(py)
            ]
    keys = "".join(_key(line) for line in lines if line.label and not line.faint)
    drawing = _svg(parts, f"{panel.name}, over the {panel.x}")
    return f"<figure><figcaption>{escape(panel.name)}</figcaption>{drawing}<ul class=keys>{keys}</ul></figure>"


def _svg(parts: Iterable[str], label: str, height: int = HEIGHT) -> str:
    return f"<svg viewBox='0 0 {WIDTH} {height}' role=img aria-label='{escape(label)}'>{''.join(parts)}</svg>"


def _key(line: Line) -> str:
    return f"<li><i class='{_colour(line)}'></i>{escape(line.label)}</li>"


def _colour(line: Line) -> str:
    return f"c{line.colour % COLOURS}{' other' * (line.colour >= COLOURS)}"


def _ends(values: Sequence[float], log: bool) -> tuple[float, float]:
    """A little beyond the smallest and largest."""
    low, high = min(values), max(values)
    if log:
        return low / 1.1, high * 1.1
    room = (high - low or abs(high) or 1) * 0.05
    return low - room, high + room


def _axis(low: float, high: float, start: float, end: float, log: bool = False) -> Callable[[float], float]:
    """From a value to its place."""
    scale = math.log10 if log else float
    first, length = scale(low), scale(high) - scale(low)

    def place(value: float) -> float:
        if not math.isfinite(value):
            return math.nan
        return start + (end - start) * ((scale(value) - first) / length if length else 0.5)

    return place


def _rules(panel: Panel, left: float, numbered: Mapping[float, str], down: Callable[[float], float]) -> str:
    """Lines at round values, with these on the left."""
    parts = []
    for value, text in numbered.items():
        y = down(value)
        parts.append(f"<path class=rule d='M{left} {y:.1f}H{WIDTH - RIGHT}'/>")
        parts.append(f"<text x='{left - 6}' y='{y + 4:.1f}' text-anchor=end>{text}</text>")
    return "".join(parts)


def _foot(panel: Panel, left: float, ends: tuple[float, float], across: Callable[[float], float]) -> str:
    """Both axes, with the numbers of the lower one."""
    right, bottom, values = WIDTH - RIGHT, HEIGHT - BOTTOM, ticks(*ends)
    if panel.x in COUNTED:
        values = sorted({float(round(value)) for value in values})
    parts = [
        f"<text x='{across(value):.1f}' y='{bottom + 15}' text-anchor=middle>{text}</text>"
        for value, text in _numbered(values).items()
        if ends[0] <= value <= ends[1]
    ]
    parts.append(f"<path class=axis d='M{left} {TOP}V{bottom}H{right}'/>")
    parts.append(f"<text x='{(left + right) / 2}' y='{HEIGHT - 5}' text-anchor=middle>{escape(panel.x)}</text>")
    return "".join(parts)


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round values from low to high, so many at most, where there is room for two."""
    raw = (high - low or abs(high) or 1.0) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)] or [low]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = [10.0**n for n in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    within = [power for power in powers if low <= power <= high]
    if len(within) > 1:
        return within[:: math.ceil(len(within) / 6)]
    return [v for power in powers for v in (power, 2 * power, 5 * power) if low <= v <= high] or [low, high]


def _numbered(values: Sequence[float]) -> dict[float, str]:
    """Values at equal steps, written with the digits that tell them apart."""
    largest, step = max(map(abs, values)), min((b - a for a, b in pairwise(values)), default=0) or abs(values[0]) or 1
    if largest and not 1e-3 <= largest < 1e6:
        digits = int(math.log10(largest / step)) + 2
        return {value: _power(value, digits) for value in values}
    decimals = max(0, math.ceil(-math.log10(step) - 1e-9))
    return {value: f"{value:,.{decimals}f}" for value in values}


def _power(value: float, digits: int = 6) -> str:
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")


def _thinned(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    every = math.ceil(len(points) / POINTS)
    return points if every < 2 else [*points[:-1:every], points[-1]]


def _path(points: Iterable[tuple[float, float, float, float]]) -> str:
    """With a gap where there is no value."""
    found, pen = [], "M"
    for x, y, *_ in points:
        if math.isfinite(y):
            found.append(f"{pen}{x:.1f} {y:.1f}")
        pen = "L" if math.isfinite(y) else "M"
    return "".join(found)


def bars(title: str, values: Sequence[tuple[str, float | None]], most: float = 1.0) -> str:
    """A bar beside each name, of parts of `most`."""
    lines = "".join(
        f"<div><span class=name>{escape(name)}</span><span class=bar><i style='width:{100 * (value or 0) / most:.1f}%'>"
        f"</i></span><span class=value>{'-' if value is None else f'{100 * value:.1f} %'}</span></div>"
        for name, value in values
    )
    return f"<figure><figcaption>{escape(title)}</figcaption><div class=bars>{lines}</div></figure>"


def matrix(counts: np.ndarray, classes: Sequence[str]) -> str:
    """How many samples of a class (row) were taken for which (column); of many classes as a picture."""
    most = max(1, int(counts.max()))
    if len(classes) > NUMBERED:
        alpha = (255 * np.sqrt(counts / most)).round().astype(np.uint8)
        pixels = np.dstack([np.full_like(alpha, value) for value in BLUE] + [alpha])
        return (
            f"<figure class=matrix><figcaption>A row for each of {len(classes)} classes, in it a column for each that "
            f"its images were taken for, both in the order of the list; the darker the more</figcaption>"
            f"<img class=pixels alt='confusion matrix' src='{image_data(_png(pixels), 'png')}'></figure>"
        )
    heads = "".join(f"<th><span>{escape(name)}</span></th>" for name in classes)
    lines = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(_cell(count, most) for count in row) + "</tr>"
        for name, row in zip(classes, counts.tolist(), strict=True)
    )
    caption = "Images of a class (row) that were taken for which (column)"
    return (
        f"<figure class=matrix><figcaption>{caption}</figcaption><div class=scrolls><table class=confusion>"
        f"<thead><tr><td></td>{heads}</tr></thead><tbody>{lines}</tbody></table></div></figure>"
    )


def _cell(count: int, most: int) -> str:
    return f"<td style='--part:{count / most:.2f}'{' class=most' * (2 * count > most)}>{count or ''}</td>"


def scatter(title: str, places: np.ndarray, kinds: Sequence[tuple[str, np.ndarray]], others: np.ndarray) -> str:
    """Spots (n, 2), both axes alike, in a colour for each kind, which is given by its spots; others are grey."""
    low, high = places.min(axis=0), places.max(axis=0)
    wide, tall = (high - low).tolist()
    scale = (WIDTH - 2 * EDGE) / max(wide, tall, 1e-12)
    xy = (places - low) * [1, -1] * scale + [EDGE, EDGE + tall * scale]
    parts = [f"<path class='spots others' d='{_spots(xy[others])}'/>"]
    lines = [Line(name, (), colour) for colour, (name, _) in enumerate(kinds)]
    for line, (_, spots) in zip(lines, kinds, strict=True):
        look = f"spots {_colour(line)}"
        parts.append(f"<path class='{look}' d='{_spots(xy[spots])}'><title>{escape(line.label)}</title></path>")
    keys = "".join(map(_key, lines)) + "<li><i class=others></i>all others</li>" * bool(len(others))
    drawing = _svg(parts, title, round(tall * scale) + 2 * EDGE)
    return f"<figure class=map><figcaption>{escape(title)}</figcaption>{drawing}<ul class=keys>{keys}</ul></figure>"


def _spots(xy: np.ndarray) -> str:
    return "".join(f"M{x:.0f} {y:.0f}h0" for x, y in xy.tolist())


def picture(name: str, caption: str, png: bytes, kind: str = "pixels") -> str:
    """A PNG file in the page.

    Args:
        kind: "pixels", each of which is to be seen, or a "plot", whose letters are to be read on a phone too.
    """
    image = f"<img class={kind} alt='{escape(name)}' src='{image_data(png, 'png')}'>"
    return f"<figure><figcaption>{escape(caption)}</figcaption><div class=scrolls>{image}</div></figure>"


def image_data(content: bytes, kind: str = "jpeg") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()
