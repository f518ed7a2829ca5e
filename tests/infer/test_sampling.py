from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from primechat.errors import ConfigError
from primechat.infer import sampling
from primechat.infer.sampling import (
    check_sampling,
    draw_floats,
    measure_logits,
    penalise_seen,
    sample_logits,
    seed_row,
)
from primechat.seeds import derive_seed, fold_seed


def draw(logits: torch.Tensor, n: int, **options: Any) -> torch.Tensor:
    """Return n draws of each row of logits (V,) or (B, V): (n, B)."""
    logits = logits.view(-1, logits.shape[-1])
    sources = [draw_floats(i) for i in range(len(logits))]
    return torch.stack([sample_logits(logits, sources, **options) for _ in range(n)])


def share(draws: torch.Tensor, size: int) -> torch.Tensor:
    return torch.bincount(draws.flatten(), minlength=size) / draws.numel()


def test_draws_follow_softmax() -> None:
    logits = torch.tensor([1.0, -math.inf, 0.0, 2.0, -1.0])
    n = 8000
    for temperature in (1.0, 0.5, 2.0):
        p = (logits / temperature).softmax(-1)
        error = (share(draw(logits, n, temperature=temperature), 5) - p).abs()
        assert bool((error <= 4.5 * (p * (1 - p) / n).sqrt()).all()), (temperature, error)


def test_zero_temperature_is_argmax() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    empty: Iterator[float] = iter(())  # argmax draws nothing
    for temperature in (0.0, 1e-30):
        ids = sample_logits(logits, [empty, empty], temperature, top_k=2, top_p=0.5)
        assert ids.tolist() == [1, 0] and ids.dtype == torch.int64


def test_top_k_exact() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 3.0])
    assert set(draw(logits, 200, top_k=2).flatten().tolist()) == {1, 3}
    for k in (1, 3, 7):  # equal logits: exactly k remain
        assert len(set(draw(torch.zeros(10), 400, top_k=k).flatten().tolist())) == k
    assert torch.equal(draw(logits, 50, top_k=99), draw(logits, 50))


def test_top_k_renormalises() -> None:
    logits = torch.tensor([0.5, 0.3, 0.1, 0.1]).log()
    assert abs(float(share(draw(logits, 8000, top_k=2), 4)[0]) - 0.625) < 0.025


@pytest.mark.parametrize("first", [512, 2])  # the second widens its search several times
def test_nucleus_smallest(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    monkeypatch.setattr(sampling, "FIRST_CANDIDATES", first)
    p = torch.tensor([0.05, 0.4, 0.02, 0.3, 0.2, 0.03])
    for top_p, kept in (
        (0.1, {1}),
        (0.39, {1}),
        (0.5, {1, 3}),
        (0.71, {1, 3, 4}),
        (0.97, {0, 1, 3, 4, 5}),
        (1.0, set(range(6))),
    ):
        assert set(draw(p.log(), 600, top_p=top_p).flatten().tolist()) == kept, top_p
    shares = share(draw(p.log(), 8000, top_p=0.69), 6)
    assert abs(float(shares[1]) - 0.4 / 0.7) < 0.025


def test_nucleus_equals_plain_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "FIRST_CANDIDATES", 4)
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[0.1], [1.0], [6.0]]
    )
    for top_p in (0.01, 0.3, 0.9, 0.999):
        cdf, ids, total = sampling.find_nucleus(logits.softmax(-1), None, top_p)
        ordered = logits.double().softmax(-1).sort(-1, descending=True)
        counts = (ordered.values.cumsum(-1) < top_p).sum(-1) + 1
        for row, n in enumerate(counts.tolist()):
            assert ids[row, :n].tolist() == ordered.indices[row, :n].tolist()
            assert float(total[row]) == float(cdf[row, n - 1])
            assert float(total[row]) == pytest.approx(
                float(ordered.values[row, :n].sum()), abs=1e-6
            )


def test_order_of_cuts() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(draw(logits, 300, top_k=2, top_p=0.5).flatten().tolist()) == {
        0
    }  # 0.4 / 0.7 reaches 0.5
    assert set(draw(logits, 300, top_p=0.5).flatten().tolist()) == {0, 1}
    assert set(draw(logits, 300, temperature=0.5, top_p=0.5).flatten().tolist()) == {
        0
    }  # 0.16 / 0.30 reaches 0.5


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
def test_ends_of_the_range(u: float) -> None:
    for size in (3, 4096, 65_536):
        logits = torch.full((1, size), -math.inf)
        logits[0, 1 : size - 1] = torch.randn(
            size - 2, generator=torch.Generator().manual_seed(size)
        )
        token = int(sample_logits(logits, [iter([u])]))
        assert math.isfinite(float(logits[0, token])), "a token of mass 0 was drawn"


def test_rows_are_their_own() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    for options in (
        {},
        {"top_k": 10},
        {"top_p": 0.8},
        {"top_k": 10, "top_p": 0.8, "temperature": 0.7},
    ):
        together, alone = ([draw_floats(i) for i in range(3)] for _ in range(2))
        for _ in range(30):
            rows = sample_logits(logits, together, **options).tolist()
            assert rows == [
                int(sample_logits(logits[i : i + 1], [alone[i]], **options)) for i in range(3)
            ]


def test_uniform_numbers_are_the_generators() -> None:
    """Many at a time are the same numbers as one by one, below 1, and of the seed alone."""
    generator = np.random.Generator(np.random.PCG64(derive_seed(4, "draws")))
    ones = [float(generator.random(dtype=np.float32)) for _ in range(50)]
    assert list(islice(draw_floats(4), 50)) == ones != list(islice(draw_floats(5), 50))
    assert list(islice(draw_floats(4 + 2**32), 50)) != ones, "all bits of a seed count"
    many = np.array(list(islice(draw_floats(6), 100_000)))
    assert 0 <= many.min() and many.max() < 1 and (many * 2**24 % 1 == 0).all()
    assert abs(many.mean() - 0.5) < 0.004 and abs(many.var() - 1 / 12) < 0.002


def test_none_draws_nothing() -> None:
    logits = torch.zeros(2, 9)
    a, b = draw_floats(5), draw_floats(5)
    for _ in range(5):
        assert int(sample_logits(logits, [None, a])[1]) == int(sample_logits(logits[:1], [b]))


def test_global_seed_untouched() -> None:
    before = torch.random.get_rng_state()
    draw(torch.zeros(10), 3, top_k=5, top_p=0.5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_row_seeds_differ() -> None:
    seeds = [seed_row(seed, row) for seed in (*range(50), -1, 2**70) for row in range(500)]
    assert len(set(seeds)) == len(seeds)
    assert seed_row(11, 0) == 11
    assert all(0 <= seed_row(seed, 3) < 2**63 for seed in (-5, 2**80))


def test_streams_of_all_places_differ() -> None:
    """64 rows and 40 turns of several seeds: no two streams begin alike, and neighbours are unrelated."""
    places = itertools.product((0, 1, 2, 2**32, -1), range(64), range(40))
    streams = [
        tuple(islice(draw_floats(derive_seed(seed, "talk", row, turn)), 2))
        for seed, row, turn in places
    ]
    assert len(set(streams)) == 5 * 64 * 40
    first = np.array(streams)[:, 0].reshape(5, 64, 40)
    for axis in range(3):  # the same row a turn later, the next row, the next seed
        a, b = np.delete(first, -1, axis), np.delete(first, 0, axis)
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / a.size**0.5
    a, b = first[:, 1:, :-1], first[:, :-1, 1:]  # row i at turn t, row i - 1 at turn t + 1
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / a.size**0.5


def test_seeds_for_torch_are_told_apart() -> None:
    """Its CPU generator reads 32 bits of a seed; a small seed stays as it is."""

    def begin(seed: int) -> float:
        return float(torch.rand((), generator=torch.Generator().manual_seed(seed)))

    assert begin(5) == begin(5 + 2**32), "this is why fold_seed is needed"
    assert begin(fold_seed(5)) == begin(5) != begin(fold_seed(5 + 2**32))
    assert derive_seed(1, "a", 2) == derive_seed(1, "a", np.int64(2)) != derive_seed(1, "a", "2")


def test_measures_equal_formulas() -> None:
    logits = 4 * torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 7, 39, int(logits[3].argmax()), int(logits[4].argmin())])
    logp = logits.double().log_softmax(-1)
    p = logp.exp()
    entropy = -(p * logp).sum(-1)
    varentropy = (p * (logp + entropy[:, None]) ** 2).sum(-1)
    for i, token in enumerate(measure_logits(logits, ids, 4)):
        assert token.id == ids[i]
        assert token.logprob == pytest.approx(float(logp[i, ids[i]]), abs=1e-5)
        assert token.entropy == pytest.approx(float(entropy[i]), abs=1e-5)
        assert token.varentropy == pytest.approx(float(varentropy[i]), abs=1e-4)
        order = logits[i].sort(descending=True).indices.tolist()
        assert token.rank == order.index(int(ids[i]))
        assert [a for a, _ in token.alternatives] == order[:4]
        assert [b for _, b in token.alternatives] == pytest.approx(
            logp[i, order[:4]].tolist(), abs=1e-5
        )
    assert measure_logits(logits, ids)[0].alternatives == ()
    assert len(measure_logits(logits, ids, 99)[0].alternatives) == 40


def test_measures_of_known_distributions() -> None:
    even = measure_logits(torch.zeros(1, 8), torch.tensor([3]))[0]
    assert (even.entropy, even.varentropy, even.rank) == (
        pytest.approx(math.log(8)),
        pytest.approx(0, abs=1e-9),
        0,
    )
    sure = measure_logits(torch.tensor([[-math.inf, 0.0, -math.inf]]), torch.tensor([1]), 1)[0]
    assert (sure.logprob, sure.entropy, sure.varentropy) == (0, 0, 0) and sure.alternatives == (
        (1, 0.0),
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((-0.1, None, None, 0), "temperature=-0.1"),
        ((math.nan, None, None, 0), "temperature=nan"),
        (("hot", None, None, 0), "temperature='hot'"),
        ((101, None, None, 0), "temperature=101"),
        ((1.0, 0, None, 0), "top_k=0"),
        ((1.0, 2.5, None, 0), "top_k=2.5"),
        ((1.0, True, None, 0), "top_k=True"),
        ((1.0, None, 0.0, 0), "top_p=0.0"),
        ((1.0, None, 1.1, 0), "top_p=1.1"),
        ((1.0, None, None, "x"), "seed='x'"),
    ],
)
def test_refusals(settings: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_sampling(*settings)
    assert str(caught.value).startswith(said + " must be ") and ";" in str(caught.value)


def test_penalty_is_as_published() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5, float("-inf")], [2.0, -1.0, 0.5, 4.0]])
    seen = torch.tensor([[True, True, False, True], [False, False, False, True]])
    expected = torch.tensor([[1.0, -2.0, 0.5, float("-inf")], [2.0, -1.0, 0.5, 2.0]])
    assert torch.equal(penalise_seen(logits, seen, 2.0), expected)
    assert torch.equal(penalise_seen(logits, seen, 1.0), logits)
