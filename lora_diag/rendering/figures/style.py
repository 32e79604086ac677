"""Sizes, fonts and colours of figures, for a column of a paper, a slide, and a single panel.

Matplotlib's global settings are changed only within ``with`` blocks, and no figure is registered
with ``pyplot``.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import matplotlib as mpl
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import LogLocator, NullFormatter

from lora_diag.errors import Given, UsageError
from lora_diag.rendering.text import crop

FORMATS = ("png", "svg", "pdf")


@dataclass(frozen=True, slots=True)
class PageStyle:
    """A kind of page: size in inches, text in points.

    Args:
        name: Name of the page.
        width: Width of the figure.
        height: Default height of a figure.
        text: Size of labels; the title of the figure is larger, tick labels are smaller.
        line: Width of a line.
        dpi: Resolution of a PNG.
        columns: Number of small multiples side by side, or one less than it.
        panel: Default height of one of them.
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
# A single panel in a notebook.
PANEL = PageStyle("panel", 5, 3.6, text=9, line=1, dpi=150, columns=1, panel=2)

# Okabe and Ito 2008, "Color universal design", without black, the text colour, and yellow, which is
# faint on white.
CATEGORIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, QUIET, FLOOR, UNKNOWN = "#222222", "#666666", "#BDBDBD", "#E4E4E4"

# viridis without its last eighth, a yellow that is faint on white.
DEPTH: Colormap = ListedColormap(mpl.colormaps["viridis"].resampled(256)(range(224)), "depth")
SHARES: Colormap = mpl.colormaps["cividis"]

# Dashes of baselines and reference lines, and of what is expected by chance or by energy alone.
DASHED, DOTTED = (0, (4, 2)), (0, (1, 1.5))

_FAMILY = ["DejaVu Sans", "Verdana", "Arial", "sans-serif"]

# Settings that neither a name in a file nor a notebook may change.
_PLAIN: dict[Any, Any] = {
    "text.parse_math": False,
    "text.usetex": False,
    "axes.unicode_minus": True,
}
# Settings of the process, not of a figure.
_PROCESS_SETTINGS = {
    "backend",
    "backend_fallback",
    "interactive",
    "toolbar",
    "timezone",
    "webagg.port",
}


def page_style_of(name: str) -> PageStyle:
    """Return the page of a given name.

    Raises:
        UsageError: The name is unknown.
    """
    for style in (COLUMN, SLIDE):
        if style.name == name:
            return style
    raise UsageError(Given("width", name), "unknown", "use column or slide")


@contextmanager
def apply_style(style: PageStyle | None) -> Iterator[None]:
    """Set fonts, sizes and widths inside the block; None keeps the sizes of a
    notebook's own axes.
    """
    with mpl.rc_context(_PLAIN if style is None else _make_settings(style)):
        yield


def _make_settings(style: PageStyle) -> dict[Any, Any]:
    ticks = {
        "labelsize": style.ticks,
        "labelcolor": INK,
        "color": QUIET,
        "major.size": 3 * style.line,
        "major.width": 0.7 * style.line,
        "minor.size": 1.8 * style.line,
        "minor.width": 0.5 * style.line,
        "major.pad": 0.25 * style.text,
    }
    # Based on the defaults, not on the user's matplotlibrc: the same bytes on every machine.
    defaults = mpl.rcParamsDefault.items()
    return {
        **{key: value for key, value in defaults if key not in _PROCESS_SETTINGS},
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
        **{f"{axis}tick.{key}": value for axis in "xy" for key, value in ticks.items()},
        "svg.fonttype": "none",
        "svg.hashsalt": "loradiag",
        "pdf.fonttype": 42,
    }


def encode_figure(figure: Figure, kind: str, width: str = "slide") -> bytes:
    """Return a figure as the bytes of a file; the same figure gives the same bytes.

    Args:
        figure: The figure.
        kind: ``png``, ``svg`` (text stays text) or ``pdf`` (fonts embedded).
        width: Name of its page, ``column`` or ``slide``, which determines the resolution of a PNG.
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
    r"""Return a name from a file as drawn: without ``.weight``; characters that the font lacks or
    hides are escaped.

    >>> name_of("model.layers.0.mlp.up_proj.weight"), name_of("a$b$\n")
    ('model.layers.0.mlp.up_proj', 'a$b$\\n')
    """
    return "".join(map(_escape_undrawable, layer.removesuffix(".weight")))


def _escape_undrawable(char: str) -> str:
    """Return a character, escaped if the font lacks or hides it."""
    if char.isprintable() and ord(char) in _load_characters():
        return char
    return char.encode("unicode_escape", "surrogatepass").decode()


@cache
def _load_characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=_FAMILY))).get_charmap())


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
    """Label the powers of ten of a logarithmic axis between two values; 2 and 5 too if they are
    within two decades.
    """
    near = high / low < 100
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if near else (1,), numticks=6))
    axis.set_major_formatter(format_value if near else log_label)
    axis.set_minor_formatter(NullFormatter())


def format_value(value: float, _: object = None) -> str:
    """Return a number with up to three digits, from a thousand on as an integer with thin spaces.

    >>> format_value(0.012345), format_value(999.9), format_value(12345.6)
    ('0.0123', '1\u202f000', '12\u202f346')
    """
    return f"{value:,.0f}".replace(",", "\u202f") if 999.5 <= abs(value) < 1e15 else f"{value:.3g}"


def category(number: int) -> str:
    """Return the colour of the n-th compared item, from 0; colours repeat beyond the last."""
    return CATEGORIES[number % len(CATEGORIES)]


def fit_chars(inches: float, size: float) -> int:
    """Return about how many characters fit into a width, at a font size in points; at least 4.

    >>> fit_chars(1, 12), fit_chars(0, 12)
    (10, 4)
    """
    return max(4, int(inches * 72 / (0.6 * size)))


def wrap_text(text: str, inches: float, size: float) -> str:
    """Return text wrapped between words to a width, at a font size in points; words that are too
    long are broken.
    """
    return textwrap.fill(text, fit_chars(inches, size), break_on_hyphens=False)


def crop_names(names: Iterable[str], chars: int) -> dict[str, str]:
    """Return names shortened to a number of characters, by name, and unambiguous where possible.

    If any is too long, all lose their common first parts. A name that is still too long keeps its
    last parts, which are more specific, or if that makes any name ambiguous, its last or its first
    characters.

    >>> crop_names(["self_attn.q_proj", "mlp.up"], 10)
    {'self_attn.q_proj': '…q_proj', 'mlp.up': 'mlp.up'}
    >>> crop_names(["h.0.attn.q", "h.0.mlp.up"], 8)
    {'h.0.attn.q': '…attn.q', 'h.0.mlp.up': '…mlp.up'}
    """
    names = list(dict.fromkeys(names))
    parts = [name.split(".") for name in names]
    common = next(
        (place for place, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), 0
    )
    if max(map(len, names), default=0) <= chars:
        return {name: name for name in names}
    if common:
        inner = crop_names([".".join(part[common:]) for part in parts], chars - 1)
        cropped = [f"…{short.removeprefix('…')}" for short in inner.values()]
        return dict(zip(names, cropped, strict=True))

    def keep_parts(name: str) -> str:
        end = crop(name, chars)
        return f"…{end.partition('.')[2] or end[1:]}"

    def keep_end(name: str) -> str:
        return crop(name, chars)

    def keep_start(name: str) -> str:
        return f"{name[: chars - 1]}…"

    for shorten in (keep_parts, keep_end, keep_start):
        short = {name: name if len(name) <= chars else shorten(name) for name in names}
        if _is_unambiguous(short):
            return short
    return {name: crop(name, chars) for name in names}


def _is_unambiguous(short: Mapping[str, str]) -> bool:
    """Return whether no two short names are equal, and no shortened one ends another full name."""
    ends = [(name, text.removeprefix("…")) for name, text in short.items() if text != name]
    for name, end in ends:
        if any(other.endswith(end) for other in short if other != name):
            return False
    return len(set(short.values())) == len(short)
