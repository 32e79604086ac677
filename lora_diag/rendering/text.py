"""Formatting of numbers, names and small graphics as text.

Which function formats a number:

- ``fraction`` for a fraction in a table, two decimals; ``small_fraction`` where it is mostly below
  0.1, such as the value of random directions. ``percent`` for a fraction in a sentence, and in a
  table where exactly none or all matters; ``small_percent`` where values differ below 1%.
- ``number`` for any other real number; ``factor`` where the distance from 1 matters; ``count`` for
  parameters and entries, ``byte_count`` for memory, ``duration`` for time, ``quantity`` for a
  number with its noun.
- Losses have four decimals, ``.4f``, and differences of losses ``+.4f``, with ``plus_minus`` for a
  standard error or ``with_limits`` for an interval.
- ``span`` for the range of whole numbers, ``ends`` for that of real ones.
- A missing value is a dash in a table (``format_shown``), and empty on a page (``plain``).

``written`` is the entry for columns: it takes the name of a form (``FORMS``) or a format.
"""

from __future__ import annotations

import codecs
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Protocol, TypeVar

from lora_diag.errors import safe as safe
from lora_diag.errors import safe_lines as safe_lines

if TYPE_CHECKING:
    from rich.console import RenderableType


T = TypeVar("T")
Word = TypeVar("Word", bound=str)


class HasLayer(Protocol):
    """A record of one layer."""

    @property
    def layer(self) -> str:
        """The weight's name in BASE."""
        ...


BARS = "▁▂▃▄▅▆▇█"
# Placeholder of a bar whose value was not computed.
UNKNOWN = "·"

# ASCII replacements, of the same width for what bars and tables use, for terminals without these
# characters.
_ASCII = str.maketrans("▁▂▃▄▅▆▇█·─×−–…‖Δσεℓ⟨⟩÷", ".:-=+%#@*-x--~|dsel<>/") | str.maketrans(
    {
        "²": "^2",
        "½": "1/2",
        "ᵀ": "^T",
        "√": "sqrt ",
        "Σ": "sum ",
        "≥": ">=",
        "≤": "<=",
        "≈": "~",
        "±": "+-",
        "→": "->",
    }
    | {"λ": "lambda", "ρ": "rho", "κ": "kappa", "α": "alpha", "μ": "mu", "∇": "grad "}
)

# Background and foreground by fraction, light to dark blue: ordered in grey and for colour-blind
# readers (xterm colours).
SHADES = (
    ("#f7fbff", "#000000"),
    ("#deebf7", "#000000"),
    ("#c6dbef", "#000000"),
    ("#9ecae1", "#000000"),
    ("#6baed6", "#000000"),
    ("#3182bd", "#ffffff"),
    ("#08519c", "#ffffff"),
)


def to_text(renderable: RenderableType, width: int, color: bool) -> str:
    """Return the text as shown by a terminal of ``width`` columns, with ANSI colours if ``color``.

    The only control characters are line ends and these colours, whatever the texts contain.
    """
    from rich.console import Console  # deferred: a third of the time of --help
    from rich.segment import Segment, Segments

    buffer = io.StringIO()
    console = Console(
        file=buffer,
        width=width,
        force_terminal=color,
        color_system="truecolor" if color else None,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    segments = [
        Segment(safe_lines(segment.text), segment.style) for segment in console.render(renderable)
    ]
    console.print(Segments(segments), crop=False)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def replace_unencodable(text: str, encoding: str) -> str:
    """Return text in a terminal's encoding, with ASCII replacements for missing characters.

    >>> replace_unencodable("‖ΔW‖ ≥ 2 ▁▅█", "ascii"), replace_unencodable("4×4 文", "latin-1")
    ('|dW| >= 2 .+@', '4×4 ?')
    """
    return text.encode(encoding, "ascii signs").decode(encoding)


def _replace_with_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    signs = error.object[error.start : error.end].translate(_ASCII)
    return signs.encode("ascii", "replace").decode(), error.end


codecs.register_error("ascii signs", _replace_with_ascii)


def short(layer: str) -> str:
    """Return a layer's name for display: safe, and without the common suffix ``.weight``.

    >>> short("model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj'
    """
    return safe(layer.removesuffix(".weight"))


def list_names(layers: Sequence[str], limit: int = 3) -> str:
    """Return the first names for display, and the number of further ones.

    >>> list_names(["a.weight", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    first = ", ".join(map(short, layers[:limit]))
    return f"{first} and {len(layers) - limit} more" if len(layers) > limit else first


def list_layers(records: Iterable[HasLayer], limit: int = 3) -> str:
    """Return the first layers of records for display, and the number of further ones."""
    return list_names([record.layer for record in records], limit)


def quantity(number_of: int, noun: str = "matrix", plural: str = "") -> str:
    """Return a number with its noun, in the plural unless it is 1.

    Args:
        number_of: The number.
        noun: The noun in the singular.
        plural: Its plural, if that does not end in -s only.

    >>> quantity(1), quantity(2), quantity(0, "layer")
    ('1 matrix', '2 matrices', '0 layers')
    """
    nouns = "matrices" if noun == "matrix" else plural or f"{noun}s"
    return f"{number_of} {noun if number_of == 1 else nouns}"


def list_counts(words: Iterable[Word], texts: Mapping[Word, str]) -> list[str]:
    """Return how often each known word occurs, as phrases in the order of ``texts``; without those
    that do not occur.

    Args:
        words: The words.
        texts: The known words, with the texts that replace them.

    >>> list_counts(["b", "a", "b"], {"a": "apples", "b": "pears", "c": "plums"})
    ['1 apples', '2 pears']
    """
    counts = Counter(words)
    return [f"{counts[word]} {text}" for word, text in texts.items() if counts[word]]


def crop(text: str, width: int) -> str:
    """Return text truncated at its beginning to ``width``; the end of a layer's name is more
    specific.

    >>> crop("block_sparse_moe.experts.*.w1", 16)
    '…oe.experts.*.w1'
    """
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]


def bar(share: float) -> str:
    """Return one character whose height is a fraction in [0, 1].

    >>> bar(0.0) + bar(0.5) + bar(1.0)
    '▁▅█'
    """
    return BARS[min(len(BARS) - 1, int(share * len(BARS)))]


def shade(share: float) -> str:
    """Return the rich style of a fraction in [0, 1]."""
    background, foreground = SHADES[min(len(SHADES) - 1, int(share * len(SHADES)))]
    return f"{foreground} on {background}"


def number(value: float) -> str:
    """Return a number with up to three significant digits, whole from 100; with an exponent below
    1e-3 and from 1e6.

    >>> number(0.0312345), number(2.1e-5), number(1234.5), number(0)
    ('0.0312', '2.1e-05', '1234', '0')
    """
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def fraction(share: float) -> str:
    """Return a fraction in four characters; 1.00 only if it is 1 within 5e-7.

    >>> fraction(0.4123), fraction(0.9987), fraction(1.0)
    ('0.41', '0.99', '1.00')
    """
    return f"{share if share >= 1 - 5e-7 else min(share, 0.99):.2f}"


def middle(values: Sequence[float | None]) -> float | None:
    """Return the median of known values; None without any."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def format_shown(value: float | None, formatter: Callable[[float], str] = number) -> str:
    """Return a value as written in a table; a dash for None.

    >>> format_shown(0.5), format_shown(0.5, percent), format_shown(None)
    ('0.5', '50%', '-')
    """
    return "-" if value is None else formatter(value)


def span(values: Iterable[int], to: str = "-") -> str:
    """Return the common value, or the range of values; a dash without values.

    >>> span([8, 8]), span([16, 4]), span([16, 4], " to "), span([])
    ('8', '4-16', '4 to 16', '-')
    """
    known = sorted(values)
    return to.join(map(str, sorted({known[0], known[-1]}))) if known else "-"


def select_evenly(items: Sequence[T], count: int) -> list[T]:
    """Return at most ``count`` items (2 or more), evenly spaced, including the first and the last.

    >>> select_evenly([0, 1, 2, 3, 4], 3)
    [0, 2, 4]
    """
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def ends(values: Sequence[float], form: str) -> str:
    """Return the range of several numbers as text, from the smallest to the largest; a dash for
    fewer than two.

    >>> ends([0.25, 0.125], ".3f"), ends([0.25, -0.125], ".3f"), ends([0.25], ".3f")
    ('0.125-0.250', '-0.125 to 0.250', '-')
    """
    if len(values) < 2:
        return "-"
    low, high = min(values), max(values)
    # A minus sign next to a dash would be overlooked.
    return f"{low:{form}}{' to ' if low < 0 else '-'}{high:{form}}"


def median_rank(ranks: Sequence[int | None], kept: int) -> str:
    """Return the upper median of ranks, where None is a rank beyond the kept values.

    >>> median_rank([3, None, 5], kept=8), median_rank([3, None, None], kept=8)
    ('5', '> 8')
    """
    middle = sorted(kept + 1 if rank is None else rank for rank in ranks)[len(ranks) // 2]
    return f"> {kept}" if middle > kept else str(middle)


def percent(share: float) -> str:
    """Return a fraction in [0, 1] as a percentage that never rounds up to 100 or down to 0.

    >>> percent(0.4123), percent(0.99996), percent(1.0), percent(0.00001)
    ('41%', '>99.9%', '100%', '<0.1%')
    """
    if share in {0.0, 1.0}:
        return f"{share:.0%}"
    if share < 0.001:
        return "<0.1%"
    if share > 0.999:
        return ">99.9%"
    return f"{share:.1%}" if share < 0.1 or share > 0.99 else f"{share:.0%}"


def small_percent(share: float) -> str:
    """Return a percentage with enough digits to distinguish small ranks.

    >>> small_percent(0.00390625), small_percent(0.25), small_percent(1.0)
    ('0.391%', '25.0%', '100%')
    """
    if share < 1e-4 or share == 1:
        return percent(share)
    return f"{share * 100:.3f}%" if share < 0.1 else f"{share:.1%}"


def count(value: int) -> str:
    """Return a count in a short form.

    >>> count(999), count(999_999), count(1_050_000), count(6_738_415_616)
    ('999', '1 M', '1.05 M', '6.74 B')
    """
    return (
        _scale(value, {10**12: "T", 10**9: "B", 10**6: "M"})
        or _scale(value, {1000: "k"}, 10**4)
        or str(value)
    )


def byte_count(size: int) -> str:
    """Return a size in decimal units, as options of a size read it.

    >>> byte_count(999), byte_count(999_999), byte_count(67_108_864), byte_count(10**15)
    ('999 B', '1 MB', '67.1 MB', '1000 TB')
    """
    return _scale(size, {10**12: "TB", 10**9: "GB", 10**6: "MB", 1000: "kB"}) or f"{size} B"


def _scale(value: int, units: Mapping[int, str], least: int = 0) -> str:
    """Return a number in three digits in the first unit that these reach; empty if none, or below
    ``least``.
    """
    rounded = float(f"{value:.3g}")
    return next(
        (
            f"{rounded / size:g} {unit}"
            for size, unit in units.items()
            if rounded >= size and value >= least
        ),
        "",
    )


def small_fraction(share: float) -> str:
    """Return a fraction as ``fraction`` does, or below 0.1 with up to two significant digits.

    >>> small_fraction(0.4123), small_fraction(0.0312), small_fraction(0.9987)
    ('0.41', '0.031', '0.99')
    """
    return fraction(share) if share >= 0.1 or share == 0 else f"{share:.2g}"


def plus_minus(error: float) -> str:
    """Return a standard error as written after a value, in two significant digits, zeros included.

    >>> plus_minus(12.3), plus_minus(0.01234), plus_minus(0.00998), plus_minus(2e-6)
    (' ±12', ' ±0.012', ' ±0.010', ' ±<1e-4')
    """
    return " ±" + f"{error:#.2g}".rstrip(".") if error >= 1e-4 else " ±<1e-4"


def with_limits(value: float, half: float | None) -> str:
    """Return a signed value with its interval, four decimals each; the value alone if the interval
    is not known.

    >>> with_limits(0.01, 0.02), with_limits(0.01, None)
    ('+0.0100 [-0.0100, 0.0300]', '+0.0100')
    """
    return f"{value:+.4f}" + ("" if half is None else f" [{value - half:.4f}, {value + half:.4f}]")


def factor(value: float) -> str:
    """Return a factor with up to five significant digits between 0.5 and 2, elsewhere as ``number``
    does.

    >>> factor(0.998765), factor(0.0312345)
    ('0.99877', '0.0312')
    """
    return f"{value:.5g}" if 0.5 < value < 2 else number(value)


def plain(value: float | int | str | None) -> str:
    """Return a value as shown on pages; empty for None.

    >>> plain(None), plain(8), plain(0.0312345), plain("rank")
    ('', '8', '0.0312', 'rank')
    """
    return "" if value is None else number(value) if isinstance(value, float) else str(value)


FORMS: Mapping[str, Callable[[float], str]] = {
    "percent": percent,
    "count": lambda value: count(int(value)),
    "factor": factor,
    "small": small_fraction,
    "small_percent": small_percent,
    "bytes": lambda value: byte_count(int(value)),
    "speed": lambda value: f"{byte_count(round(value))}/s",
    "time": lambda value: "<1 s" if value < 1 else duration(value),
}


def written(value: float, form: str = "", share: bool = False) -> str:
    """Return a number as shown in a table.

    Args:
        value: The number.
        form: A name in ``FORMS``, or a format; empty for two decimals of a fraction and three
            digits of other numbers.
        share: Whether it is a fraction in [0, 1].

    >>> (
    ...     written(0.4123, share=True),
    ...     written(0.4123, "percent"),
    ...     written(0.4123, "+.3f"),
    ...     written(1234.5),
    ... )
    ('0.41', '41%', '+0.412', '1234')
    """
    if not form:
        return fraction(value) if share else number(value)
    return FORMS[form](value) if form in FORMS else format(value, form)


def spark(s: Sequence[float], total: int, width: int = 8) -> str:
    """Return a spectrum as bars: i log-spaced from 1 to ``total``, height log σ_i/σ_1 over 3
    decades, ``·`` beyond s.

    All bars are the lowest without values or if σ_1 = 0.

    >>> spark([1.0, 1.0, 1.0, 0.03, 0.0001, 0.0, 0.0, 0.0], 8, 4), spark([1.0, 1.0], 8, 4)
    ('██▄▁', '██··')
    """
    if not s or s[0] <= 0:
        return BARS[0] * width
    points = [round(total ** (i / (width - 1))) - 1 for i in range(width)]
    return "".join(
        bar(1 + math.log10(max(s[i] / s[0], 1e-3)) / 3) if i < len(s) else UNKNOWN for i in points
    )


def strip(shares: Sequence[float | None], width: int) -> str:
    """Return fractions in [0, 1] as one line of bars, averaged into ``width`` bins if there are
    more.

    None is ignored in a bin with known values, and a dot in one without.

    >>> strip([0.0, 0.5, 1.0], 10), strip([0.0, 0.0, 1.0, 1.0], 2), strip([None, 1.0], 2)
    ('▁▅█', '▁█', '·█')
    """
    columns = min(width, len(shares))
    edges = [round(i * len(shares) / columns) for i in range(columns + 1)] if columns else []
    bins = [[share for share in shares[a:b] if share is not None] for a, b in pairwise(edges)]
    return "".join(bar(sum(known) / len(known)) if known else UNKNOWN for known in bins)


def duration(seconds: float) -> str:
    """Return a duration in a convenient unit.

    >>> duration(0.4), duration(75), duration(160), duration(8000), duration(400_000)
    ('1 s', '75 s', '2.7 min', '2.2 h', '4.6 days')
    """
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    for limit, unit, name in ((7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.{0 if seconds / unit >= 10 else 1}f} {name}"
    return f"{seconds / 86_400:.1f} days"
