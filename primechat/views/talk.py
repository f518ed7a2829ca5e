"""Pictures of talk: ranks of tokens, heat strips, diversity over turns and generations.

Hides: how they are laid out. They take plain numbers; a control is always drawn with the finding. Reference:
primechat.views.theme.
"""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go

from primechat.views.theme import SERIES, style_figure


def draw_ranks(shares: Mapping[str, Mapping[str, float]]) -> go.FigureWidget:
    """Draw how likely the model held the tokens that it took, for each of several models.

    Args:
        shares: for each model, the share of its tokens in each bucket of ranks.
    """
    figure = go.FigureWidget()
    for i, (name, found) in enumerate(shares.items()):
        colour = SERIES[0] if i == 0 else SERIES[5]
        figure.add_bar(
            x=list(found), y=[100 * share for share in found.values()], name=name, marker_color=colour,
            text=[f"{100 * share:.0f} %" for share in found.values()], textposition="outside",
            cliponaxis=False, hovertemplate="%{y:.1f} % of tokens<extra>" + name + "</extra>",
        )  # fmt: skip
        figure.add_annotation(
            x=1, xref="paper", y=1.08 - 0.09 * i, yref="paper", text=f"■ {name}", font_color=colour,
            showarrow=False, xanchor="right",
        )  # fmt: skip
    style_figure(
        figure, height=300, bargap=0.3, title_text="How likely the model held the token that it took"
    )
    figure.update_xaxes(title_text="Place among all tokens, the likeliest first")
    figure.update_yaxes(title_text="Share of tokens, %", rangemode="tozero")
    return figure
