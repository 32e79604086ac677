"""Pages of several panels: of sets or runs, each wide enough to be read; of module types, as small multiples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from lora_diag.rendering.figures.losses import panel_width, panels_of
from lora_diag.rendering.figures.sheet import FigureText, finish_grid, grid_of, sheet
from lora_diag.rendering.figures.style import PageStyle, crop_names, wrap_text

# Draws a panel: ``draw(ax, inches=...)``, on axes of this width in inches.
Draw = Callable[..., object]


def page_of(
    panels: Sequence[tuple[str, Draw]],
    text: FigureText,
    style: PageStyle,
    *,
    height: float = 1.9,
    xlabel: str = "",
    ylabel: str = "",
) -> Figure:
    """Return a page of panels with separate axes.

    Args:
        panels: The title of each, and what draws it.
        text: The text around them.
        style: The page.
        height: Least height of a panel over that of the page's small multiples.
        xlabel: Label of all x axes; as drawn if empty.
        ylabel: Label of all y axes; as drawn if empty.
    """
    rows, columns = panels_of(len(panels), style)
    inches = panel_width(style, columns)
    figure, axes = sheet(style, text, rows, columns, panel=height * style.panel, share=False)
    for (title, draw), ax in zip(panels, axes, strict=False):
        draw(ax, inches=inches)
        ax.set_title(wrap_text(title, inches, style.text), parse_math=False)
        ax.set(**{name: label for name, label in (("xlabel", xlabel), ("ylabel", ylabel)) if label})
    for ax in axes[len(panels) :]:
        ax.remove()
    return figure


def multiples_of(
    panels: Mapping[str, Draw], text: FigureText, style: PageStyle, xlabel: str, ylabel: str, width: float = 0.97
) -> Figure:
    """Return a page of one panel for each module type, with shared axes.

    Args:
        panels: What draws the panel of each type.
        text: The text around them.
        style: The page.
        xlabel: Label of the x axes at the bottom.
        ylabel: Label of the y axes at the left.
        width: Share of the page's width that the panels have.
    """
    rows, columns = grid_of(len(panels), style)
    inches = (style.width * width - 3.4 * style.text / 72) / columns - 1.2 * style.text / 72
    figure, axes = sheet(style, text, rows, columns)
    titles = crop_names(list(panels), inches, style.text)
    for (name, draw), ax in zip(panels.items(), axes, strict=False):
        draw(ax, inches=inches)
        ax.set_title(titles[name], parse_math=False)
    finish_grid(axes, len(panels), columns, xlabel, ylabel)
    return figure
