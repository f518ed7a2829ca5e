"""Forecast of the bits per byte of larger runs from small ones, with an interval.

The curve is bpb = E + A x N^-a + B x D^-b: E is the irreducible part, N the parameters, D the tokens read. A
few runs cannot determine five numbers, so every E, a and b on a grid is tried with its best A and B and
weighted by its fit; the interval covers all of them and the noise of the runs. Reference: Hoffmann et al.
2022, section 3.3; Kaplan et al. 2020, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from primechat.errors import ConfigError

MIN_RUNS = 5
FAR = 30.0  # times the size or text of the largest run: beyond that, a fit of small runs is meaningless
NOISE = 0.005  # relative spread of bpb over seeds for runs of this size
DRAWS = 4000
# Number of values of E, between 0 and the least bpb; values of a and b.
FLOORS, POWERS = 60, np.linspace(0.06, 1.0, 28)


@dataclass(frozen=True, kw_only=True)
class SmallRun:
    """A small run and the bits per byte that it reached."""

    n_layer: int
    n_params: int
    tokens: int
    bpb: float


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Predicted bits per byte of a run: the median, and bounds that contain about 90 % of the outcomes.

    In simulations on curves of this form, with nine runs each, the bounds contain 88 to 98 % of the outcomes,
    on average 93 %; 86 to 91 % if runs vary twice as much as assumed, and nearly all if they vary half as
    much. If the curve has another form, there is no guarantee.
    """

    bpb: float
    low: float
    high: float


def forecast_bpb(
    runs: Sequence[SmallRun],
    targets: Sequence[tuple[int, int]],
    *,
    noise: float = NOISE,
    seed: int = 0,
) -> list[Forecast]:
    """Return the predicted bits per byte of runs of other sizes and lengths.

    Args:
        runs: small runs with the same text and settings.
        targets: (parameters, tokens) of the runs to predict.
        noise: relative spread of bpb over seeds.
        seed: of the random draws.

    Raises:
        ConfigError: there are too few or too similar runs, invalid numbers, or a target is too far away.
    """
    # Check the runs and the targets.
    table = np.array([(run.n_params, run.tokens, run.bpb) for run in runs], dtype=float).reshape(
        -1, 3
    )
    n, d, bpb = table.T
    if len(table) < MIN_RUNS or not np.isfinite(table).all() or table.min() <= 0:
        raise ConfigError(
            f"{len(table)} runs are too few or no positive numbers, a forecast needs {MIN_RUNS}; train more."
        )
    for name, values, i in (("sizes", n, 0), ("numbers of tokens", d, 1)):
        if values.max() < 1.5 * values.min():
            raise ConfigError(
                f"The runs are of nearly equal {name}, a forecast needs two; add another."
            )
        far = max(target[i] for target in targets)
        if far > FAR * values.max():
            raise ConfigError(
                f"{far:,} is more than {FAR:.0f} times the largest of the {name}, {values.max():,.0f}; train "
                "a larger one first."
            )

    # The grid of E, a and b.
    mid_n, mid_d = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())
    floors = np.linspace(0, 0.98 * bpb.min(), FLOORS)
    u, v = (n / mid_n) ** -POWERS[:, None], (d / mid_d) ** -POWERS[:, None]  # (powers, runs)
    w, y = (noise * bpb) ** -2, bpb - floors[:, None]  # (runs,), (floors, runs)

    # Least squares for A and B at every point of the grid; the axes are E, a, b.
    uu, vv, uv = (
        (w * u**2).sum(1)[None, :, None],
        (w * v**2).sum(1)[None, None, :],
        ((w * u) @ v.T)[None],
    )
    uy, vy, yy = (
        ((w * y) @ u.T)[:, :, None],
        ((w * y) @ v.T)[:, None, :],
        (w * y**2).sum(1)[:, None, None],
    )
    det = uu * vv - uv**2
    A, B = (vv * uy - uv * vy) / det, (uu * vy - uv * uy) / det
    misfit = np.maximum(yy - A * uy - B * vy, 0)
    misfit = np.where((A > 0) & (B > 0), misfit, np.inf)  # more size or text must not hurt
    best, flat = misfit.min(), (w * (bpb - np.average(bpb, weights=w)) ** 2).sum()
    if not best < 0.5 * flat:  # little better than a constant
        raise ConfigError(
            "bpb does not fall with size and text in these runs; train each of them longer."
        )

    # Weight every point by its fit; more scatter than seeds explain widens the interval.
    wide = max(1.0, float(best) / max(1, len(table) - 4))
    weight = np.exp(-0.5 * (misfit - best) / wide)
    chance = np.random.default_rng(seed)
    pick = chance.choice(weight.size, DRAWS, p=weight.ravel() / weight.sum())
    at_e, at_a, at_b = np.unravel_index(pick, weight.shape)
    uu, uv, det, A, B = (
        np.broadcast_to(part, weight.shape).ravel()[pick] for part in (uu, uv, det, A, B)
    )

    # Draw A and B with their errors, which are correlated.
    z = chance.standard_normal((2, DRAWS)) * wide**0.5
    drawn_b = B + z[0] * np.sqrt(uu / det)
    drawn_a = np.maximum(A - (drawn_b - B) * uv / uu + z[1] / np.sqrt(uu), 0)
    luck = 1 + noise * wide**0.5 * chance.standard_normal(DRAWS)

    # Quantiles of the curves drawn, with the noise of a single run.
    told = []
    for n_params, tokens in targets:
        drawn = floors[at_e] + drawn_a * (n_params / mid_n) ** -POWERS[at_a]
        drawn = (drawn + np.maximum(drawn_b, 0) * (tokens / mid_d) ** -POWERS[at_b]) * luck
        low, middle, high = map(float, np.quantile(drawn, [0.05, 0.5, 0.95]))
        told.append(Forecast(bpb=middle, low=low, high=high))
    return told
