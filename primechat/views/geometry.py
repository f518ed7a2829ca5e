"""Figures of lab 03: bars with their controls, vector norms against frequency, curves over training.

They take plain numbers and are readable on white and on near-black; labels are placed at what they name.
Reference: primechat.views.theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from primechat.views.theme import INK, SERIES, open_figure

CONTROL = SERIES[5]
WIDTH = 10.2  # inches: the width of a lab's column at a readable font size


def draw_bars(
    rows: Sequence[tuple[str, float, bool]], *, title: str, unit: str, digits: int = 1
) -> Any:
    """Return a bar chart of rows (label, value, whether it is a control), with controls in grey."""
    with open_figure(WIDTH, 0.75 + 0.4 * len(rows)) as (figure, axes):
        values = [round(value, digits) + 0.0 for _, value, _ in rows]  # avoids -0.0
        colours = [CONTROL if control else SERIES[0] for _, _, control in rows]
        bars = axes.barh(range(len(rows)), values, color=colours, height=0.62)
        axes.bar_label(bars, [f"{value:,.{digits}f}" for value in values], padding=4, color=INK)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        axes.invert_yaxis()
        axes.set_xlim(min(0, *values), (max(values) or 1) * 1.12)
        axes.set_xlabel(unit)
        axes.set_title(title, loc="left")
        axes.grid(visible=False, axis="y")
        return figure


def draw_groups(
    rows: Sequence[tuple[str, Sequence[float]]], names: Sequence[str], *, title: str, unit: str
) -> Any:
    """Return a bar chart with one group of bars per row; the last bar of a group is a control."""
    with open_figure(WIDTH, 0.9 + 0.75 * len(rows)) as (figure, axes):
        high = 0.8 / len(names)
        colours = [*SERIES[: len(names) - 1], CONTROL]
        most = max([max(values) for _, values in rows] + [1e-9])

        # The bars of each name, which is written at its first bar only.
        for j, (name, colour) in enumerate(zip(names, colours, strict=True)):
            places = [i + (j - (len(names) - 1) / 2) * high for i in range(len(rows))]
            values = [row[1][j] for row in rows]
            bars = axes.barh(places, values, height=high * 0.88, color=colour)
            texts = [
                f"{value:.0f}" + (f"  {name}" if i == 0 else "") for i, value in enumerate(values)
            ]
            axes.bar_label(bars, texts, padding=4, color=INK, fontsize=9.5)

        # Axes, with room for the names.
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, most * 1.45)
        if unit.startswith("%"):
            axes.set_xticks([tick for tick in axes.get_xticks() if tick <= 100])
        axes.set_xlabel(unit)
        axes.set_title(title, loc="left")
        axes.grid(visible=False, axis="y")
        return figure


def draw_norms(
    counts: np.ndarray,
    norms: np.ndarray,
    labels: Sequence[str],
    *,
    real: float,
    shuffled: float,
    title: str,
) -> Any:
    """Return a scatter plot of each token's norm against its count, beside the same norms shuffled.

    Args:
        counts: how often each token was seen, (V,).
        norms: norm of each token's vector, (V,).
        labels: name of each token.
        real: rank correlation of the two.
        shuffled: rank correlation after shuffling.
        title: label of the y axis.
    """
    # At most 6,000 points are drawn.
    rng = np.random.default_rng(0)
    shown = (
        np.arange(len(counts))
        if len(counts) <= 6000
        else rng.choice(len(counts), 6000, replace=False)
    )
    with open_figure(WIDTH, 3.9, columns=2) as (figure, axes):
        # The two panels.
        mixed = rng.permutation(norms)
        panels = ((norms, real, "as trained", SERIES[0]), (mixed, shuffled, "shuffled", CONTROL))
        for place, (values, correlation, name, colour) in zip(axes, panels, strict=True):
            place.scatter(
                counts[shown] + 0.5, values[shown], s=6, alpha=0.5, color=colour, linewidths=0
            )
            place.set_xscale("log")
            place.set_ylim(0, float(norms.max()) * 1.08)
            place.set_xlabel("times seen in the sample, plus ½")
            place.set_title(f"{name}: rank correlation {correlation:+.2f}", loc="left")
        axes[0].set_ylabel(title)

        # Name the extreme tokens.
        for i in np.unique([norms.argmax(), norms.argmin(), counts.argmax()]):
            left = counts[i] > np.sqrt(counts.max())
            at, side = (-5 if left else 5, 3), "right" if left else "left"
            place = counts[i] + 0.5, norms[i]
            axes[0].annotate(
                labels[i], place, xytext=at, textcoords="offset points", ha=side, color=INK
            )
        return figure


def draw_course(
    places: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    controls: Sequence[str] = (),
) -> Any:
    """Return a plot of lines over steps (on a logarithmic axis) or layers, named at their ends.

    Args:
        places: steps or layers.
        lines: values by name of the line.
        title: title of the figure.
        x_label: label of the x axis.
        y_label: label of the y axis.
        controls: names of the lines to draw dashed and in grey.
    """
    with open_figure(WIDTH, 3.8) as (figure, axes):
        for j, (name, values) in enumerate(lines.items()):
            control = name in controls
            colour = CONTROL if control else SERIES[j % 5]
            style = "--" if control else "-"
            axes.plot(places, values, color=colour, linestyle=style, marker="o", markersize=3.5)
            end, beside = (places[-1], values[-1]), dict(xytext=(8, 0), textcoords="offset points")
            axes.annotate(name, end, **beside, va="center", color=colour)
        if len(places) > 3 and places[-1] > 50:
            axes.set_xscale("symlog", linthresh=1, base=2)
            axes.set_xticks(places, [f"{int(x):,}" for x in places])
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_title(title, loc="left")
        return figure
