"""Figures of post-training: gain against forgetting, singular values, retention.

They take plain numbers. Reference: primechat.views.theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from primechat.views.theme import SERIES, push_apart, style_figure


def wait_for(figure: go.Figure) -> go.Figure:
    """Return the figure; if nothing is drawn in it, it says that it waits for a run."""
    if not any(trace.x is not None and len(trace.x) for trace in figure.data):
        figure.update_xaxes(visible=False)
        figure.update_yaxes(visible=False)
        figure.add_annotation(
            text="Nothing to draw yet:<br>it comes when the run is done.",
            showarrow=False,
            font_size=15,
            x=0.5,
            y=0.5,
            xref="paper",
            yref="paper",
        )
        figure.update_layout(height=160)
    return figure


def draw_tradeoff(
    rows: Sequence[Mapping[str, Any]], gain: str, loss: str, *, title: str = ""
) -> go.Figure:
    """Return a plot of what runs gained against what they lost, one dot per run.

    Args:
        rows: dicts with `name` and the two figures; rows with the same name are seeds of one setting.
        gain: key of the gain, on the x axis; also the title of the axis.
        loss: key of the loss, on the y axis (lower is better); also the title of the axis.
        title: title of the figure.
    """
    figure = go.Figure()
    for i, name in enumerate(dict.fromkeys(str(row["name"]) for row in rows)):
        mine = [row for row in rows if row["name"] == name]
        x, y = [float(row[gain]) for row in mine], [float(row[loss]) for row in mine]
        colour = SERIES[i % len(SERIES)]
        figure.add_scatter(
            x=x,
            y=y,
            mode="markers",
            marker=dict(size=10, color=colour, opacity=0.75),
            name=name,
            hovertemplate="%{x:.3f} · %{y:.3f}<extra>" + name + "</extra>",
        )
        middle = sum(x) / len(x)
        figure.add_annotation(
            x=middle, y=max(y), text=name, showarrow=False, yshift=16, font_color=colour
        )
    style_figure(figure, height=360, title_text=title)
    figure.update_xaxes(title_text=gain)
    figure.update_yaxes(title_text=loss)
    return wait_for(figure)


def draw_lines(
    series: Mapping[str, Sequence[tuple[float, ...]]],
    x_title: str,
    y_title: str,
    *,
    title: str = "",
    faint: Sequence[str] = (),
    **layout: Any,
) -> go.Figure:
    """Return a plot of curves that are named at their ends.

    Args:
        series: points (x, y), or (x, y, low, high) with an interval, by name of the curve.
        x_title: title of the x axis.
        y_title: title of the y axis.
        title: title of the figure.
        faint: names of the curves to draw dotted and in grey.
        layout: further settings of the layout.
    """
    figure = go.Figure()

    # Places of the names, which must not overlap.
    ends = {name: points[-1][1] for name, points in series.items() if points}
    heights = [value for points in series.values() for p in points for value in p[1:]] or [0.0]
    apart = push_apart(list(ends.values()), 0.08 * (max(heights) - min(heights)))
    places = dict(zip(ends, apart, strict=True))

    # The curves.
    for i, (name, points) in enumerate(series.items()):
        control = name in faint
        colour = SERIES[5] if control else SERIES[i % 5]
        x, y = [p[0] for p in points], [p[1] for p in points]
        spans = [(p[1] - p[2], p[3] - p[1]) if len(p) > 2 else (0.0, 0.0) for p in points]
        low, high = ([span[end] for span in spans] for end in (0, 1))
        figure.add_scatter(
            x=x,
            y=y,
            mode="lines+markers" if len(x) < 40 else "lines",
            name=name,
            line=dict(color=colour, width=2, dash="dot" if control else "solid"),
            marker=dict(size=6),
            error_y=dict(array=high, arrayminus=low, width=5, visible=any(high)),
            hovertemplate="%{x} · %{y:.3f}<extra>" + name + "</extra>",
        )
        if x:
            figure.add_annotation(
                x=1,
                xref="paper",
                y=places[name],
                text=name,
                showarrow=False,
                xanchor="left",
                xshift=6,
                font_color=colour,
            )
    style_figure(figure, height=340, title_text=title, margin=dict(l=64, r=170, t=48, b=52))
    figure.update_xaxes(title_text=x_title)
    figure.update_yaxes(title_text=y_title)
    return wait_for(figure.update_layout(**layout))
