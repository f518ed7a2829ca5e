"""Intervals cover what they say, by simulation; verdicts over several tricks are as seldom wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import comb

import numpy as np
import pytest

from primechat.errors import DataError
from primechat.events import Turn
from primechat.labkit.instruments import pretraining, series, talks
from primechat.metrics import intervals as iv

Draw = Callable[[np.random.Generator, int], np.ndarray]


def cover(
    estimate: Callable[[Sequence[float]], iv.Interval], draw: Draw, n: int, true: float
) -> float:
    """Return the share of 3,000 intervals over n values that hold the true figure."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(3000):
        _, low, high = estimate(draw(rng, n).tolist())
        hits += low <= true <= high
    return hits / 3000


# Student's t


def test_t_by_the_table() -> None:
    for degrees, t in ((1, 12.706205), (2, 4.302653), (3, 3.182446), (9, 2.262157), (60, 2.000298)):
        assert iv.find_t(0.95, degrees) == pytest.approx(t, abs=1e-6)
        assert iv.enclose_t(t, degrees) == pytest.approx(0.95, abs=1e-6)
    assert iv.find_t(0.9, 5) == pytest.approx(2.015048, abs=1e-6)


def test_t_equals_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="SciPy comes with the extra labs")
    for degrees in (1, 2, 3, 4, 7, 12, 31, 100, 999):
        for level in (0.5, 0.9, 0.95, 0.99):
            wanted = stats.t.ppf((1 + level) / 2, degrees)
            assert iv.find_t(level, degrees) == pytest.approx(wanted, rel=1e-9)
        for t in (0.0, 0.3, 2.0, 9.0, 40.0):
            wanted = 2 * stats.t.sf(t, degrees)
            assert 1 - iv.enclose_t(t, degrees) == pytest.approx(wanted, abs=1e-12)


def test_means_by_hand() -> None:
    mean, low, high = iv.estimate_mean([1, 2, 3, math.nan])  # s = 1, two degrees of freedom
    assert mean == 2 and high - 2 == pytest.approx(4.302653 / 3**0.5) == pytest.approx(2 - low)
    assert iv.estimate_mean([2, 2, 2]) == (2, 2, 2)
    for few in ([7.0], [7.0, math.nan]):
        assert iv.estimate_mean(few)[0] == 7 and all(map(math.isnan, iv.estimate_mean(few)[1:]))
    assert all(map(math.isnan, iv.estimate_mean([])))


DRAWN: dict[str, tuple[Draw, float]] = {
    "normal": (lambda rng, n: rng.normal(3, 2, n), 3.0),
    "uniform": (lambda rng, n: rng.random(n), 0.5),
    "a share near its end": (lambda rng, n: rng.beta(16, 2, n), 16 / 18),  # as distinct-2
    "right-skewed": (lambda rng, n: rng.gamma(4, 1, n), 4.0),  # as compression and MTLD
}


@pytest.mark.parametrize(
    ("kind", "n"),
    [
        *(("normal", n) for n in (2, 3, 6, 8, 20)),
        *(("uniform", n) for n in (6, 8, 20)),
        *(("a share near its end", n) for n in (8, 20)),
        *(("right-skewed", n) for n in (8, 20)),
    ],
)
def test_means_cover_what_they_say(kind: str, n: int) -> None:
    """Over conversations (6, 8, 20) and over seeds (2, 3)."""
    draw, true = DRAWN[kind]
    assert 0.93 <= cover(iv.estimate_mean, draw, n, true) <= 0.97
    if kind == "normal":
        nine = cover(lambda values: iv.estimate_mean(values, 0.9), draw, n, true)
        assert 0.88 <= nine <= 0.92


@pytest.mark.parametrize("n", [6, 8, 20])
def test_skewed_means_cover_what_they_say(n: int) -> None:
    """As self-repetition and self-BLEU over conversations, and what is not skewed at all."""

    def estimate(values: Sequence[float]) -> iv.Interval:
        return iv.estimate_mean(values, skewed=True)

    drawn: list[tuple[Draw, float]] = [
        (lambda rng, n: rng.gamma(1.5, 1, n), 1.5),
        (lambda rng, n: rng.gamma(4, 1, n), 4.0),
        DRAWN["a share near its end"],
        DRAWN["normal"],
    ]
    for draw, true in drawn:
        assert 0.93 <= cover(estimate, draw, n, true) <= 0.97
    draw, true = drawn[0]
    assert cover(iv.estimate_mean, draw, n, true) < cover(estimate, draw, n, true)


def test_skewness_moves_an_interval_by_hand() -> None:
    values = [0.0, 0.0, 1.0, 1.0, 2.0, 8.0]
    mean, low, high = iv.estimate_mean(values, skewed=True)
    _, plain_low, plain_high = iv.estimate_mean(values)
    assert mean == 2 and low > plain_low and high > plain_high, "the long tail is to the right"
    mirrored = iv.estimate_mean([-x for x in values], skewed=True)
    assert mirrored == pytest.approx((-mean, -high, -low))
    even = [1.0, 2.0, 3.0, 5.0, 6.0, 7.0]
    assert iv.estimate_mean(even, skewed=True) == pytest.approx(iv.estimate_mean(even))
    assert iv.estimate_mean(values[:5], skewed=True) == iv.estimate_mean(values[:5])
    assert iv.estimate_mean([2.0] * 6, skewed=True) == (2, 2, 2)
    # where Hall's transformation of T, T + g T^2 / 3 sqrt(n) + g^2 T^3 / 27 n + g / 6 sqrt(n), is t
    x, n = np.array(values), 6
    g = ((x - 2) ** 3).sum() * n / (5 * 4 * x.std(ddof=1) ** 3) / n**0.5
    at = (2 - low) / (x.std(ddof=1) / n**0.5)
    assert at + g * at**2 / 3 + g**2 * at**3 / 27 + g / 6 == pytest.approx(iv.find_t(0.95, 5))


def test_several_seeds_cover_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lab 09's spreads of three training runs of eight conversations, that are alike within a run."""
    monkeypatch.setattr(talks, "measure_texts", lambda texts, names: {"x": float(texts[0])})
    rng, hits = np.random.default_rng(1), 0
    opening = Turn(speaker=0, model="human", text="")
    for _ in range(1500):
        runs = rng.normal(0, 0.05, (3, 1)) + rng.normal(0.8, 0.08, (3, 8))
        seeds = [[[opening, Turn(speaker=1, model="m", text=str(x))] for x in run] for run in runs]
        _, low, high = talks.measure_spread(*seeds, names=("x",))["x"]
        hits += low <= 0.8 <= high
    assert 0.93 <= hits / 1500 <= 0.97
    found = talks.measure_spread(seeds[0], names=("x",))["x"]
    assert found == pytest.approx(iv.estimate_mean(runs[0].tolist(), skewed=True))


def test_tables_of_three_seeds_cover_what_they_say() -> None:
    """What labs 06 to 08 print as `0.123 ± 0.045`."""
    rng, hits = np.random.default_rng(2), 0
    for _ in range(2000):
        rows = [{"name": "a", "gain": x} for x in rng.normal(0.5, 0.1, 3)]
        mean, margin = map(float, series.sum_rows(rows, ["gain"])[0]["gain"].split(" ± "))
        hits += abs(mean - 0.5) <= margin
    assert 0.93 <= hits / 2000 <= 0.97


# Shares and kappa


def test_shares_by_hand_and_on_average() -> None:
    # none of ten: 0 to z^2 / (n + z^2)
    z2 = 1.959964**2
    assert iv.estimate_share([0] * 10) == pytest.approx((0, 0, z2 / (10 + z2)))
    assert iv.estimate_share([1] * 10) == pytest.approx((1, 1 - z2 / (10 + z2), 1))
    for wrong in ([], [0.5, 1.5], [-0.1]):
        with pytest.raises(DataError, match="from 0 to 1"):
            iv.estimate_share(wrong)
    true = np.linspace(0.005, 0.995, 199)
    for n in (8, 10, 14, 29):  # exact: each number of successes by its probability
        ends = [iv.estimate_share([1] * k + [0] * (n - k)) for k in range(n + 1)]
        covered = sum(
            comb(n, k) * true**k * (1 - true) ** (n - k) * ((low <= true) & (true <= high))
            for k, (_, low, high) in enumerate(ends)
        )
        assert 0.945 <= covered.mean() <= 0.965
        inner = covered[(true >= 0.1) & (true <= 0.9)]
        assert 0.88 <= inner.min() and inner.max() <= 0.995


def test_kappa_by_hand() -> None:
    # 20 yes-yes, 15 no-no, 5 and 10 apart: agreement 0.7, chance 0.5 (a classic example)
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert iv.measure_kappa(first, second) == pytest.approx(0.4)
    assert math.isnan(iv.measure_kappa("aa", "aa")) and iv.measure_kappa("ab", "ab") == 1
    a, b = ([word == "y" for word in words] for words in (first, second))
    kappa, low, high = iv.estimate_kappa(a, b)
    assert kappa == pytest.approx(0.4)
    for end in (low, high):  # there the counts 20, 15 and 15 have a chi-squared of 1.96 squared
        p = 0.55
        cells = np.array([p * p, 2 * p * (1 - p), (1 - p) ** 2]) + end * p * (1 - p) * np.array(
            [1, -2, 1]
        )
        misfit = ((np.array([20, 15, 15]) - 50 * cells) ** 2 / (50 * cells)).sum()
        assert misfit == pytest.approx(3.8415, abs=0.02)
    assert iv.estimate_kappa([True, False] * 9, [True, False] * 9)[2] == 1, "no disagreement at all"
    assert all(map(math.isnan, iv.estimate_kappa([True] * 5, [True] * 5)))


@pytest.mark.parametrize(
    ("n", "first", "second", "kappa"),
    [(50, 0.39, 0.39, 0.78), (50, 0.39, 0.33, 0.78), (50, 0.4, 0.4, 0.5), (100, 0.39, 0.38, 0.95)],
)
def test_kappa_covers_what_it_says(n: int, first: float, second: float, kappa: float) -> None:
    """With as many transcripts as in lab 09, and labellers of whom one says yes more often."""
    chance = first * second + (1 - first) * (1 - second)
    agree = kappa * (1 - chance) + chance
    both = (agree - 1 + first + second) / 2
    cells = [both, first - both, second - both, 1 - first - second + both]
    rng, hits = np.random.default_rng(3), 0
    for _ in range(700):
        counts = rng.multinomial(n, cells)
        a, b = np.repeat([True, True, False, False], counts), np.repeat([True, False] * 2, counts)
        _, low, high = iv.estimate_kappa(a.tolist(), b.tolist())
        hits += low <= kappa <= high
    assert 0.93 <= hits / 700 <= 0.97


# Verdicts over several tricks


def make_gaps(
    rng: np.random.Generator, seeds: int, effects: Sequence[float]
) -> dict[str, list[float]]:
    """Gaps of tricks against one control of the same seeds; effects in standard deviations of a gap."""
    whole, runs = rng.normal(size=seeds), rng.normal(size=(len(effects), seeds))
    gaps = runs - whole + np.sqrt(2) * np.array(effects)[:, None]
    return {f"trick {i}": row.tolist() for i, row in enumerate(gaps)}


@pytest.mark.parametrize(("seeds", "n_tricks"), [(3, 3), (3, 6), (5, 3)])
def test_tricks_that_do_nothing_are_seldom_called_real(seeds: int, n_tricks: int) -> None:
    rng, wrong = np.random.default_rng(4), 0
    for _ in range(3000):
        verdicts = pretraining.judge_gaps(make_gaps(rng, seeds, [0] * n_tricks))
        wrong += any(said in ("helps", "hurts") for said in verdicts.values())
    assert 0.03 <= wrong / 3000 <= 0.06


def test_large_effects_are_found() -> None:
    """The power that `judge_ablation` states: 37 and 84 % with three seeds, 69 and 95 % with five."""
    for seeds, effect, told in ((3, 3, 0.37), (3, 6, 0.84), (5, 2, 0.69), (5, 3, 0.95)):
        rng, found = np.random.default_rng(5), 0
        for _ in range(1500):
            verdicts = pretraining.judge_gaps(make_gaps(rng, seeds, [effect, 0, 0]))
            found += verdicts["trick 0"] == "helps"
        assert found / 1500 == pytest.approx(told, abs=0.04)


def test_two_seeds_give_no_verdict() -> None:
    bpb = {"everything on": [1.5, 1.51], "without smear": [1.6, 1.61]}
    result = pretraining.AblationResult(identifier="x", bpb=bpb, stopped=True)
    rows = pretraining.judge_ablation(result)
    assert [row["so the trick"] for row in rows] == ["", "too few seeds: 2 of 3"]
    three = {name: [*values, values[0] + 0.004] for name, values in bpb.items()}
    rows = pretraining.judge_ablation(
        pretraining.AblationResult(identifier="x", bpb=three, stopped=False)
    )
    assert rows[1]["so the trick"] == "helps" and rows[1]["against everything on"].startswith(
        "+0.1000 ±"
    )
    assert pretraining.AblationConfig().seeds == 3
    said = pretraining.describe_ablation(pretraining.AblationConfig())
    assert said["work"] == "4 variants x 3 seeds = 12 runs of 60 steps"


def test_holm_by_hand() -> None:
    # 3 x 0.01, then 2 x 0.03, then the larger of 0.06 and 0.04
    assert iv.adjust_holm({"c": 0.04, "a": 0.01, "b": 0.03}) == pytest.approx(
        {"c": 0.06, "a": 0.03, "b": 0.06}
    )
    assert iv.adjust_holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and iv.adjust_holm({}) == {}
    assert iv.compare_pairs([1.0, 1.0, 1.0]) == 0 and iv.compare_pairs([0.0, 0.0]) == 1
    assert iv.compare_pairs([1, 2, 3]) == pytest.approx(0.074180, abs=1e-6)  # t = 2 x 3^0.5
