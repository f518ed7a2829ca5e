"""Figures of conversations: ranks of tokens, heat strips, diversity over turns and generations.

They take plain numbers; a control is always drawn beside the finding. Reference: primechat.views.theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go

from primechat.views.theme import SERIES, push_apart, style_figure


def draw_ranks(shares: Mapping[str, Mapping[str, float]]) -> go.Figure:
    """Return a bar chart of the ranks of sampled tokens: by model, the share of tokens in each bucket."""
    figure = go.Figure()
    for i, (name, found) in enumerate(shares.items()):
        colour = SERIES[0] if i == 0 else SERIES[5]
        figure.add_bar(
            x=list(found),
            y=[100 * share for share in found.values()],
            name=name,
            marker_color=colour,
            text=[f"{100 * share:.0f} %" for share in found.values()],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y:.1f} % of tokens<extra>" + name + "</extra>",
        )
        figure.add_annotation(
            x=1,
            xref="paper",
            y=1.08 - 0.09 * i,
            yref="paper",
            text=f"■ {name}",
            font_color=colour,
            showarrow=False,
            xanchor="right",
        )
    title = "How likely the model held the token that it took"
    style_figure(figure, height=300, bargap=0.3, title_text=title)
    figure.update_xaxes(title_text="Place among all tokens, the likeliest first")
    most = max(share for found in shares.values() for share in found.values())
    # The range leaves room for the names.
    figure.update_yaxes(title_text="Share of tokens, %", range=[0, 130 * most])
    return figure


COLOURS = {
    "the model": SERIES[0],
    "always the likeliest": SERIES[3],
    "people": SERIES[2],
    "shuffled": SERIES[5],
    "planted loop": SERIES[1],
}


def pick_colour(name: str, i: int = 0) -> str:
    """Return the colour of a name, the same in all figures of a lab."""
    return COLOURS.get(name, SERIES[i % len(SERIES)])


def label_line(
    figure: go.Figure, x: float, y: float, name: str, colour: str, shift: int = 0
) -> None:
    """Write the name of a line at its end, in its colour."""
    figure.add_annotation(
        x=x,
        y=y,
        text=name,
        showarrow=False,
        xanchor="left",
        xshift=6,
        yshift=shift,
        font_color=colour,
    )


def draw_bands(traces: Mapping[str, np.ndarray], what: str) -> go.Figure:
    """Return a plot of a measure over the turns, with the mean of each group.

    For the first group, a band shows the middle 80 % of its conversations.

    Args:
        traces: values by group, (conversations, turns), nan where nothing was measured.
        what: name of the measure.
    """
    figure = go.Figure()
    ends, top = list[tuple[float, str, str]](), 0.0

    # The mean of each group, and the band of the first.
    for i, (name, x) in enumerate(traces.items()):
        known = ~np.isnan(x).all(axis=0)
        turns, colour = np.flatnonzero(known), pick_colour(name, i)
        if not turns.size:
            continue
        mean = np.nanmean(x[:, known], axis=0)
        if i == 0 and len(x) > 2:
            low, high = np.nanquantile(x[:, known], [0.1, 0.9], axis=0)
            top = float(high.max())
            figure.add_scatter(
                x=[*turns, *turns[::-1]],
                y=[*high, *low[::-1]],
                fill="toself",
                line_width=0,
                opacity=0.25,
                fillcolor=colour,
                hoverinfo="skip",
                mode="lines",
            )
        figure.add_scatter(
            x=turns,
            y=mean,
            mode="lines+markers",
            line_color=colour,
            marker_size=5,
            name=name,
            hovertemplate="turn %{x}: %{y:.2f}<extra>" + name + "</extra>",
        )
        ends.append((float(mean[-1]), name, colour))
        top = max(top, float(mean.max()))

    # The names, which must not overlap.
    last = max((x.shape[1] - 1 for x in traces.values()), default=1)
    places = push_apart([y for y, _, _ in ends], 0.08 * (top or 1))
    for place, (_, name, colour) in zip(places, ends, strict=True):
        label_line(figure, last, place, name, colour)
    style_figure(figure, height=330, title_text=f"{what}, turn by turn", margin_r=150)
    figure.update_xaxes(title_text="Turn")
    figure.update_yaxes(title_text=what, rangemode="tozero")
    return figure


def draw_repeats(found: Mapping[str, Sequence[float]], sentence: str) -> go.Figure:
    """Return a plot of the probability of a sentence against how often it has been said before."""
    figure = go.Figure()
    for i, (name, p) in enumerate(found.items()):
        colour = SERIES[0] if i == 0 else SERIES[5]
        figure.add_scatter(
            x=list(range(len(p))),
            y=list(p),
            mode="lines+markers",
            line_color=colour,
            marker_size=6,
            hovertemplate="said %{x} times before: %{y:.3f}<extra>" + name + "</extra>",
        )
        label_line(figure, len(p) - 1, p[-1], name, colour, shift=9)
    style_figure(figure, height=300, title_text=f"“{sentence}”, said over and over", margin_r=130)
    figure.update_xaxes(title_text="Times that it was said before")
    figure.update_yaxes(title_text="Mean probability of its tokens", range=[0, 1.02])
    return figure


def draw_drift(maps: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> go.Figure:
    """Return a map of the path of one conversation per group; later turns have larger dots.

    The names are at the right, at the heights of the last turns, which are ringed.

    Args:
        maps: by group, places of the turns (turns, 2) and their drift (turns,).
    """
    figure = go.Figure()
    ends = list[tuple[float, str, str]]()

    # The paths.
    for i, (name, (places, drift)) in enumerate(maps.items()):
        colour = pick_colour(name, i)
        figure.add_scatter(
            x=places[:, 0],
            y=places[:, 1],
            mode="lines+markers",
            line=dict(color=colour, width=1),
            marker=dict(
                color=colour,
                size=np.linspace(5, 15, len(places)),
                line_color=SERIES[5],
                line_width=[0] * (len(places) - 1) + [2],
            ),
            customdata=drift,
            hovertemplate="turn %{pointNumber}, drift %{customdata:.2f}<extra>" + name + "</extra>",
            opacity=1 if i == 0 else 0.55,
        )
        hop = (
            float(np.linalg.norm(np.diff(places, axis=0), axis=1).mean())
            if len(places) > 1
            else 0.0
        )
        label = f"{name}, mean hop {hop:.1f}"
        ends.append((float(places[-1, 1]), label, colour))

    # The names, which must not overlap.
    span = float(np.ptp(np.concatenate([places[:, 1] for places, _ in maps.values()]))) or 1.0
    for place, (_, label, colour) in zip(
        push_apart([y for y, _, _ in ends], 0.08 * span), ends, strict=True
    ):
        figure.add_annotation(
            x=1,
            xref="paper",
            y=place,
            text=label,
            showarrow=False,
            xanchor="left",
            xshift=6,
            font_color=colour,
        )
    style_figure(figure, height=380, title_text="Where the conversation goes", margin_r=230)
    figure.update_xaxes(title_text="First direction of largest spread", showticklabels=False)
    figure.update_yaxes(title_text="Second direction of largest spread", showticklabels=False)
    return figure


Spread = Mapping[str, tuple[float, float, float]]


def draw_spreads(
    groups: Mapping[str, Spread], title: str, limits: tuple[float, float] | None = None
) -> go.Figure:
    """Return one panel per measure, with a dot for the mean of each group and a bar for its interval.

    Args:
        groups: by group and measure, (mean, low, high).
        title: title of the figure.
        limits: range that all measures share; then all panels have the same axis and colour.
    """
    from plotly.subplots import make_subplots

    names = list(next(iter(groups.values()), {}))
    figure = make_subplots(
        rows=1,
        cols=max(len(names), 1),
        shared_yaxes=True,
        subplot_titles=names,
        horizontal_spacing=0.025,
    )
    labels = list(groups)[::-1]
    for c, measure in enumerate(names, 1):
        for i, (name, found) in enumerate(groups.items()):
            mean, low, high = found[measure]
            colour = SERIES[0] if limits else pick_colour(name, i)
            figure.add_scatter(
                x=[mean],
                y=[name],
                mode="markers",
                marker=dict(color=colour, size=9),
                row=1,
                col=c,
                error_x=dict(
                    type="data",
                    symmetric=False,
                    array=[high - mean],
                    arrayminus=[mean - low],
                    width=0,
                ),
                hovertemplate=f"{name}, {measure}: %{{x:.3f}}, {low:.3f} to {high:.3f}<extra></extra>",
            )
    margins = dict(l=150, r=16, t=80, b=40)
    style_figure(figure, height=110 + 34 * len(groups), title_text=title, margin=margins)
    figure.update_yaxes(categoryorder="array", categoryarray=labels, ticks="")
    figure.update_xaxes(nticks=3)
    if limits:
        margin = 0.03 * (limits[1] - limits[0])
        figure.update_xaxes(range=[limits[0] - margin, limits[1] + margin], nticks=6)
    figure.update_annotations(font_size=13)
    return figure


def draw_generations(
    found: Mapping[str, Sequence[Spread]], people: Spread, measure: str
) -> go.Figure:
    """Return a plot of a measure over the generations, with intervals, beside that of people.

    Args:
        found: by training mix, the spreads of each generation.
        people: spread of human conversations.
        measure: name of the measure.
    """
    figure = go.Figure()
    longest = max(map(len, found.values()), default=1)

    # One line per mix.
    for i, (name, spreads) in enumerate(found.items()):
        values, colour = [one[measure] for one in spreads], SERIES[i]
        figure.add_scatter(
            x=list(range(len(values))),
            y=[v[0] for v in values],
            mode="lines+markers",
            line_color=colour,
            error_y=dict(
                type="data",
                symmetric=False,
                array=[v[2] - v[0] for v in values],
                arrayminus=[v[0] - v[1] for v in values],
                width=4,
            ),
            hovertemplate="generation %{x}: %{y:.3f}<extra>" + name + "</extra>",
        )
        label_line(figure, len(values) - 1, values[-1][0], name, colour, shift=9 * (1 - 2 * i))

    # People. The invisible points extend the axis, which a line alone does not.
    unseen = dict(opacity=0, hoverinfo="skip", mode="markers")
    figure.add_scatter(x=[0, 0], y=list(people[measure][1:]), **unseen)
    figure.add_hline(y=people[measure][0], line_color=COLOURS["people"], line_dash="dot")
    figure.add_hrect(
        y0=people[measure][1],
        y1=people[measure][2],
        fillcolor=COLOURS["people"],
        opacity=0.12,
        line_width=0,
    )
    figure.add_annotation(
        x=0,
        y=people[measure][0],
        text="people",
        showarrow=False,
        xanchor="left",
        yshift=9,
        font_color=COLOURS["people"],
    )

    # Titles.
    words = {
        "Vendi": "Really different turns (Vendi)",
        "distinct-2": "Share of different pairs (distinct-2)",
    }
    said = words.get(measure, measure)
    title = (
        f"{said}, generation by generation" if found else f"{said}: nothing yet, press Start above"
    )
    style_figure(figure, height=330, title_text=title, margin_r=160)
    figure.update_xaxes(
        title_text="Generation: 0 is the model as it was",
        dtick=1,
        range=[-0.1, max(longest, 2) - 0.9],
    )
    figure.update_yaxes(title_text=said)
    return figure


def save_strip(
    values: Mapping[str, np.ndarray], scales: Mapping[str, float], path: Path
) -> list[Path]:
    """Write a heat strip as PNG and SVG and return the paths.

    Args:
        values: values of each measure by turn.
        scales: value of the strongest colour for each measure.
        path: path of the files; the suffix is replaced.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.6), layout="constrained")
    axes = figure.subplots()
    shares = np.array([values[name] / scales[name] for name in values])
    axes.imshow(np.clip(shares, 0, 1), aspect="auto", cmap="Blues", vmin=0, vmax=1)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_xlabel("Turn")
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=160)
    return files
