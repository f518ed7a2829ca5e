"""One visual theme for all widgets, plots and pages: calm, with one accent colour, dark and light.

Hides: the colours. Widgets receive them as CSS variables (`write_variables`), plots through `style_figure`
and `style_matplotlib`. A plot cannot know whether its page is dark, so its text is a grey that is readable on
both. Reference: Okabe & Ito 2008 (colours for colour-blind readers); WCAG 2.2 (contrast).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

LIGHT = {
    "bg": "#ffffff",
    "surface": "#f6f7f9",
    "raised": "#ffffff",
    "ink": "#1d2330",
    "muted": "#5d6678",
    "line": "#dfe3ea",
    "accent": "#2a62c9",
    "accent-soft": "#e3ecfb",
    "on-accent": "#ffffff",
    "good": "#1b7f5a",
    "warn": "#8f5f00",
    "bad": "#b3361f",
}
DARK = {
    "bg": "#15181e",
    "surface": "#1e222a",
    "raised": "#262b35",
    "ink": "#e6e9ef",
    "muted": "#a3acbc",
    "line": "#39414f",
    "accent": "#86aef8",
    "accent-soft": "#263a63",
    "on-accent": "#0f1420",
    "good": "#5cc79e",
    "warn": "#e2ad45",
    "bad": "#f28e77",
}
SERIES = ("#3f7fe0", "#d9822b", "#2a9d76", "#a45fc4", "#c8506b", "#7a8294")
INK, FAINT = "#737b8c", "rgba(122, 130, 148, 0.25)"  # for plots: readable on white and near-black
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
MONO = 'ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace'


def write_variables() -> str:
    """Return the CSS variables of `.pc` (light) and `.pc[data-theme=dark]`."""
    rules = []
    for selector, colours in ((".pc", LIGHT), ('.pc[data-theme="dark"]', DARK)):
        lines = "".join(f"--pc-{name}: {value}; " for name, value in colours.items())
        rules.append(f"{selector} {{ {lines}}}")
    series = "".join(f"--pc-series-{i}: {colour}; " for i, colour in enumerate(SERIES))
    return "\n".join([*rules, f".pc {{ {series}--pc-font: {FONT}; --pc-mono: {MONO}; }}"])


def push_apart(heights: Sequence[float], gap: float) -> list[float]:
    """Return positions for labels that belong at these heights: in the same order, at least `gap` apart.

    >>> push_apart([3.0, 1.0, 1.0], 0.5)
    [3.0, 1.0, 1.5]
    """
    places, below = list(heights), float("-inf")
    for i in sorted(range(len(heights)), key=lambda i: heights[i]):
        places[i] = below = max(heights[i], below + gap)
    return places


def style_figure(figure: go.Figure, *, height: int = 340, **layout: Any) -> go.Figure:
    """Return a plotly figure styled with the theme.

    Args:
        figure: figure to style, in place.
        height: height in pixels.
        layout: further settings of the layout, which override the theme.
    """
    axis = dict(
        gridcolor=FAINT,
        zerolinecolor=FAINT,
        linecolor=FAINT,
        ticks="outside",
        tickcolor=FAINT,
        title_font_size=13,
        automargin=True,
    )
    figure.update_layout(
        height=height,
        font=dict(family=FONT, size=13, color=INK),
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        colorway=list(SERIES),
        margin=dict(l=56, r=24, t=40, b=48),
        title_font_size=15,
        hoverlabel=dict(font_family=FONT),
        showlegend=False,
        modebar=dict(bgcolor="rgba(0,0,0,0)", color=FAINT, activecolor=INK),
    )
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure.update_layout(**layout)


@contextmanager
def open_figure(
    width: float, height: float, columns: int = 1, **kind: Any
) -> Iterator[tuple[Any, Any]]:
    """Yield a matplotlib figure with the theme and its axes, `columns` side by side; sizes in inches."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = style_matplotlib()
    with rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained", **kind)
        axes = figure.subplots(1, columns, squeeze=False)[0]
        yield figure, axes[0] if columns == 1 else axes


def style_matplotlib() -> dict[str, Any]:
    """Return the theme as matplotlib settings for `plt.rc_context`."""
    from cycler import cycler

    faint = (0.478, 0.510, 0.580, 0.35)
    return {
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.edgecolor": faint,
        "grid.color": faint,
        "axes.grid": True,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=SERIES),
        "font.size": 10.5,
        "axes.titlesize": 12,
        "figure.dpi": 110,
        "lines.linewidth": 1.8,
    }
