"""Sizes, fonts and colours, for a column of a paper and for a slide.

Matplotlib's global settings are changed only within ``with`` blocks, and no figure is registered with ``pyplot``.
"""

from __future__ import annotations

import bisect
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import matplotlib as mpl
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import LogLocator, NullFormatter

from lora_diag.errors import UsageError

FORMATS = ("png", "svg", "pdf")


@dataclass(frozen=True, slots=True)
class PageStyle:
    """A kind of page: size in inches, text in points.

    Args:
        name: Name of the page.
        width: Width of the figure; where a panel is drawn, of the panel.
        height: Default height of a figure.
        text: Size of labels; titles are larger, tick labels smaller.
        line: Width of a line.
        dpi: Resolution of a PNG.
        columns: Number of small multiples side by side.
        panel: Minimum height of one of them.
        plain: Whether to omit title and notes, for a paper with its own caption.
    """

    name: str
    width: float
    height: float
    text: float
    line: float
    dpi: int
    columns: int
    panel: float
    plain: bool = False

    @property
    def ticks(self) -> float:
        """Size of tick labels and notes."""
        return 0.88 * self.text

    @property
    def title(self) -> float:
        """Size of the figure's title."""
        return 1.2 * self.text


# 3.3 inches is the column width of most two-column journals; 6 points are their minimum font size.
COLUMN = PageStyle("column", 3.3, 2.6, text=7, line=0.7, dpi=300, columns=2, panel=0.85)
SLIDE = PageStyle("slide", 10, 5.6, text=12.5, line=1.3, dpi=150, columns=4, panel=1.5)
PAGE_STYLES = (COLUMN, SLIDE)
# A single panel in a notebook.
PANEL = PageStyle("panel", 5, 3.6, text=9, line=1, dpi=150, columns=1, panel=2)

# Okabe and Ito 2008, "Color universal design", without black, the text colour, and yellow, which is faint on white.
CATEGORIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, QUIET, FLOOR, UNKNOWN = "#222222", "#666666", "#BDBDBD", "#E4E4E4"

# viridis without its last eighth, a yellow that is faint on white.
DEPTH: Colormap = ListedColormap(mpl.colormaps["viridis"].resampled(256)(range(224)), "depth")
SHARES: Colormap = mpl.colormaps["cividis"]

# Dashes of baselines and reference lines, and of what is expected by chance or by energy alone.
DASHED, DOTTED = (0, (4, 2)), (0, (1, 1.5))

_FAMILY = ["DejaVu Sans", "Verdana", "Arial", "sans-serif"]

# Settings that neither a name in a file nor a notebook may change.
_PLAIN: dict[Any, Any] = {"text.parse_math": False, "text.usetex": False, "axes.unicode_minus": True}
# Settings of the process, not of a figure.
_PROCESS_SETTINGS = {"backend", "backend_fallback", "interactive", "toolbar", "timezone", "webagg.port"}


def page_style_of(name: str) -> PageStyle:
    """Return the page of a given name.

    Raises:
        UsageError: The name is unknown.
    """
    for style in PAGE_STYLES:
        if style.name == name:
            return style
    raise UsageError(f"--width {name}: unknown; use {' or '.join(style.name for style in PAGE_STYLES)}")


@contextmanager
def apply_style(style: PageStyle | None) -> Iterator[None]:
    """Set fonts, sizes and widths inside the block; None keeps the sizes of a notebook's own axes."""
    with mpl.rc_context(_PLAIN if style is None else _make_settings(style)):
        yield


def _make_settings(style: PageStyle) -> dict[Any, Any]:
    return {
        # Based on the defaults, not on the user's matplotlibrc: the same bytes on every machine.
        **{key: value for key, value in mpl.rcParamsDefault.items() if key not in _PROCESS_SETTINGS},
        **_PLAIN,
        "font.family": ["sans-serif"],
        "font.sans-serif": _FAMILY,
        "font.size": style.text,
        "text.color": INK,
        "axes.edgecolor": QUIET,
        "axes.labelcolor": INK,
        "axes.labelsize": style.text,
        "axes.titlesize": style.text,
        "axes.titlelocation": "left",
        "axes.titlepad": 0.35 * style.text,
        "axes.labelpad": 0.3 * style.text,
        "axes.linewidth": 0.7 * style.line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.fontsize": style.ticks,
        "legend.frameon": False,
        "lines.linewidth": style.line,
        "lines.markersize": 4 * style.line,
        "hatch.linewidth": 0.5 * style.line,
        **{f"{axis}tick.{key}": value for axis in "xy" for key, value in _format_tick(style).items()},
        "svg.fonttype": "none",
        "svg.hashsalt": "loradiag",
        "pdf.fonttype": 42,
    }


def _format_tick(style: PageStyle) -> dict[str, Any]:
    return {
        "labelsize": style.ticks,
        "labelcolor": INK,
        "color": QUIET,
        "major.size": 3 * style.line,
        "major.width": 0.7 * style.line,
        "minor.size": 1.8 * style.line,
        "minor.width": 0.5 * style.line,
        "major.pad": 0.25 * style.text,
    }


def encode_figure(figure: Figure, kind: str, width: str = "slide") -> bytes:
    """Return a figure as the bytes of a file; the same figure gives the same bytes.

    Args:
        figure: The figure.
        kind: ``png``, ``svg`` (text stays text) or ``pdf`` (fonts embedded).
        width: Width of its page, which determines the resolution of a PNG.
    """
    style = page_style_of(width)
    metadata: dict[str, dict[str, str | None]] = {
        "png": {"Software": "loradiag"},  # recognized by lora_diag.files
        "svg": {"Date": None},
        "pdf": {"CreationDate": None},
    }
    buffer = io.BytesIO()
    with apply_style(style):
        figure.savefig(buffer, format=kind, dpi=style.dpi, metadata=metadata[kind])
    return buffer.getvalue()


def name_of(layer: str) -> str:
    r"""Return a name from a file as drawn: without ``.weight``; characters that the font lacks or hides are escaped.

    >>> name_of("model.layers.0.mlp.up_proj.weight"), name_of("a$b$\n")
    ('model.layers.0.mlp.up_proj', 'a$b$\\n')
    """
    drawable = _load_characters()
    return "".join(
        char
        if char.isprintable() and ord(char) in drawable
        else char.encode("unicode_escape", "surrogatepass").decode()
        for char in layer.removesuffix(".weight")
    )


@cache
def _load_characters() -> frozenset[int]:
    return frozenset(get_font(_find_font()).get_charmap())


@cache
def _find_font() -> str:
    return findfont(FontProperties(family=_FAMILY))


def log_label(value: float, _: object = None) -> str:
    """Return the label of a power of ten on a log axis; empty for other values.

    >>> log_label(1e-3), log_label(10.0), log_label(1.0), log_label(2.0)
    ('10⁻³', '10', '1', '')
    """
    power = math.log10(value) if value > 0 else 0.5
    if abs(power - round(power)) > 1e-9:
        return ""
    if round(power) in {0, 1}:
        return f"{value:.0f}"
    return "10" + str(round(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def format_log_axis(axis: Axis, low: float, high: float) -> None:
    """Label the powers of ten of a logarithmic axis between two values; 2 and 5 too if they are within two decades."""
    near = high / low < 100
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,), numticks=6))
    axis.set_major_formatter(format_value if near else log_label)
    axis.set_minor_formatter(NullFormatter())


def format_value(value: float, _: object = None) -> str:
    """Return a number with three digits, from a thousand on as an integer with thin spaces.

    >>> format_value(0.012345), format_value(12345.6)
    ('0.0123', '12\u202f346')
    """
    return f"{value:,.0f}".replace(",", "\u202f") if 1000 <= abs(value) < 1e15 else f"{value:.3g}"


def category(number: int) -> str:
    """Return the colour of the n-th compared item."""
    return CATEGORIES[number % len(CATEGORIES)]


def width_of(text: str, size: float) -> float:
    """Return the width of the longest line of text in inches, at a font size in points."""
    return max((_measure_line(line) for line in text.split("\n")), default=0.0) * size / 72


@lru_cache(4096)
def _measure_line(line: str) -> float:
    """Return the width of a line in points at a font size of one point."""
    font = get_font(_find_font())
    font.set_size(100, 72)
    font.set_text(line, 0.0)
    return float(font.get_width_height()[0]) / 64 / 100


def crop_name(text: str, inches: float, size: float) -> str:
    """Truncate a name at its beginning until it fits; its end is more specific."""
    return _first_fitting([text, *("…" + text[start:] for start in range(2, max(3, len(text) - 3)))], inches, size)


def crop_end(text: str, inches: float, size: float) -> str:
    """Truncate a sentence at its end until it fits."""
    return _first_fitting([text, *(text[:end] + "…" for end in range(len(text) - 2, 3, -1))], inches, size)


def _first_fitting(texts: Sequence[str], inches: float, size: float) -> str:
    """Return the first text that fits, of several in order of decreasing length; else the shortest."""
    index = bisect.bisect_left(range(len(texts)), True, key=lambda n: width_of(texts[n], size) <= inches)
    return texts[min(index, len(texts) - 1)]


def crop_names(names: Sequence[str], inches: float, size: float) -> dict[str, str]:
    """Shorten names to a width, and keep them unambiguous where possible.

    Names of one family, which share the part before the first dot, are cut at the same dot. If that makes any name
    ambiguous, all are truncated at the beginning instead, or else at the end.

    Args:
        names: The full names.
        inches: Maximum width.
        size: Font size in points.

    Returns:
        The short name of each full name, in the order of ``names``.
    """
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(name.split(".")[0], []).append(name)
    dots = {
        name: next(
            (n for n in range(4) if all(width_of(_drop_to_dot(member, n), size) <= inches for member in family)), 0
        )
        for family in families.values()
        for name in family
    }
    ways: list[Callable[[str], str]] = [
        lambda name: crop_name(_drop_to_dot(name, dots[name]), inches, size),
        lambda name: crop_name(name, inches, size),
        lambda name: crop_end(name, inches, size),
    ]
    cropped_names = [{name: way(name) for name in names} for way in ways]
    return next((short for short in cropped_names if _is_unambiguous(short)), cropped_names[1])


def _is_unambiguous(short: Mapping[str, str]) -> bool:
    """Return whether no short name equals or ends another name."""
    ends = [(name, text.removeprefix("…")) for name, text in short.items() if text != name]
    unambiguous = not any(other.endswith(end) for name, end in ends for other in short if other != name)
    return unambiguous and len(set(short.values())) == len(short)


def _drop_to_dot(name: str, dot: int) -> str:
    parts = name.split(".")
    dot = min(dot, len(parts) - 1)
    return f"…{'.'.join(parts[dot:])}" if dot else name


def wrap_text(text: str, inches: float, size: float) -> str:
    """Wrap text between words, and break words that are too long."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            longer = f"{line} {word}" if line else word
            if line and width_of(longer, size) > inches:
                lines.append(line)
                longer = word
            while width_of(longer, size) > inches and len(longer) > 1:
                fitting = bisect.bisect(range(1, len(longer)), inches, key=lambda n: width_of(longer[:n], size))
                position = max(1, fitting)
                lines.append(longer[:position])
                longer = longer[position:]
            line = longer
        lines.append(line)
    return "\n".join(lines)
