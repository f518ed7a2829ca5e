"""What a larger run will reach, told from small ones, with an honest interval.

Hides: the curve. bpb = E + A x C^-a, with C the FLOPs of a run and E the part that no compute removes. A
few runs cannot fix E, so every E on a grid is tried, each weighed by how well it fits, and the interval is
that of all of them together, with the runs' own noise. Reference: Hoffmann et al. 2022, section 3.3; Kaplan
et al. 2020, section 6.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from primechat.errors import ConfigError

MIN_RUNS = 3
FAR = 100.0  # times the largest run's compute: beyond it a fit of small runs says nothing
NOISE = 0.005  # relative spread of bpb over seeds, of runs of this size
DRAWS = 4000


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Predicted bits per byte of a run: the middle, and the bounds of 90 % of the outcomes."""

    flops: float
    bpb: float
    low: float
    high: float
    runs: tuple[tuple[float, float], ...]


def forecast_bpb(
    runs: Sequence[tuple[float, float]], flops: float, *, noise: float = NOISE, seed: int = 0
) -> Forecast:
    """Predict what a run of so many FLOPs reaches.

    Args:
        runs: (FLOPs, bits per byte) of small runs of one family: same text, same tokens a parameter.
        flops: of the run to predict.
        noise: relative spread of bpb over seeds.
        seed: of the draws behind the interval.

    Raises:
        ConfigError: too few runs, no numbers, or the target is too far away.
    """
    points = np.array(sorted(runs), dtype=float)
    if len(points) < MIN_RUNS or not np.isfinite(points).all() or points.min() <= 0:
        raise ConfigError(
            f"{len(runs)} run(s) are too few or no positive numbers, a forecast needs {MIN_RUNS}; train more."
        )
    x = np.log(points[:, 0])
    if np.ptp(x) < np.log(1.5):
        raise ConfigError("The runs are of nearly one size, a forecast needs different ones; add a smaller.")
    if flops > FAR * points[-1, 0]:
        raise ConfigError(
            f"flops={flops:.3g} is more than {FAR:.0f} times the largest run's {points[-1, 0]:.3g}; "
            "train a larger one first."
        )
    floor = np.linspace(0, 0.98 * points[:, 1].min(), 120)  # E
    y = np.log(points[:, 1, None] - floor)  # (runs, grid)
    sigma = noise * points[:, 1, None] / (points[:, 1, None] - floor)  # of y
    w = sigma**-2
    mean_x, mean_y = (w * x[:, None]).sum(0) / w.sum(0), (w * y).sum(0) / w.sum(0)
    dx = x[:, None] - mean_x
    spread = (w * dx**2).sum(0)
    slope = (w * dx * y).sum(0) / spread
    residual = y - mean_y - slope * dx
    # a flat prior over E; a curve that rises with compute is no curve of this kind
    score = -0.5 * (w * residual**2).sum(0)
    score = np.where(slope < 0, score, -np.inf)
    if not np.isfinite(score).any():
        raise ConfigError("bpb does not fall with compute in these runs; train each of them longer.")
    # more scatter than seeds explain widens everything
    best = int(score.argmax())
    wide = max(1.0, float((w * residual**2).sum(0)[best] / max(1, len(points) - 2)))
    chance = np.random.default_rng(seed)
    weight = np.exp((score - score[best]) / wide)
    pick = chance.choice(len(floor), DRAWS, p=weight / weight.sum())
    far = np.log(flops) - mean_x[pick]
    error = np.sqrt(wide * (1 / w.sum(0)[pick] + far**2 / spread[pick]))
    drawn = floor[pick] + np.exp(mean_y[pick] + slope[pick] * far + error * chance.standard_normal(DRAWS))
    drawn *= 1 + noise * wide**0.5 * chance.standard_normal(DRAWS)
    low, middle, high = np.quantile(drawn, [0.05, 0.5, 0.95])
    return Forecast(
        flops=flops, bpb=float(middle), low=float(low), high=float(high), runs=tuple(map(tuple, points))
    )
