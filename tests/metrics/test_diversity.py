"""The measures of diversity, against values worked out by hand and against plain loops."""

from __future__ import annotations

import gzip
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import measure_prediction

from primechat.errors import DataError
from primechat.metrics import diversity as d

A, B, C = "the cat sat".split(), "the cat ran".split(), "a dog ran home".split()


def test_distinct_by_hand() -> None:
    # bigrams: the-cat cat-sat | the-cat cat-ran | a-dog dog-ran ran-home: 7, 6 of them different
    assert d.measure_distinct([A, B, C], 2) == pytest.approx(6 / 7)
    assert d.measure_distinct([A, B, C], 1) == pytest.approx(7 / 10)
    assert d.measure_distinct([["a", "b"], ["a", "b"]], 2) == 0.5  # no bigram b-a over the border
    assert math.isnan(d.measure_distinct([["a"]], 2)) and math.isnan(d.measure_distinct([], 1))
    with pytest.raises(DataError, match="n=0"):
        d.measure_distinct([A], 0)


def test_ead_by_hand() -> None:
    # V = 2, C = 2, N = 1: expected 2 (1 - (1/2)^2) = 1.5
    assert d.measure_ead([["x", "x"]], 2) == pytest.approx(1 / 1.5)
    # V = 4, C = 3, N = 2: expected 4 (1 - (3/4)^3) = 37/16
    assert d.measure_ead([["x", "y"], ["x"]], 4) == pytest.approx(2 / (37 / 16))


def test_bleu_by_hand() -> None:
    # A against B and C: 1-grams 2/3, 2-grams 1/2, no brevity penalty
    assert d.measure_bleu([A, B, C], 2)[0] == pytest.approx(math.sqrt(2 / 3 * 1 / 2))
    # B: 1-grams 3/3 (ran from C), 2-grams 1/2
    assert d.measure_bleu([A, B, C], 2)[1] == pytest.approx(math.sqrt(1 * 1 / 2))
    # C: 1-grams 1/4 (ran), no 2-gram: 0.1/3; longer than both others, so no penalty
    assert d.measure_bleu([A, B, C], 2)[2] == pytest.approx(math.sqrt(1 / 4 * 0.1 / 3))
    assert d.measure_selfbleu([A, A, A], 3) == pytest.approx(1.0)
    # clipping: "the" once in the reference counts once of three; 2-grams floor; lengths 3 and 4: exp(1 - 4/3)
    got = d.measure_bleu([["the", "the", "the"], ["the", "cat", "sat", "down"]], 2)[0]
    assert got == pytest.approx(math.sqrt(1 / 3 * 0.1 / 2) * math.exp(1 - 4 / 3))
    assert d.measure_bleu([["x"], ["y"]], 1).tolist() == [0, 0]
    with pytest.raises(DataError, match="at least 2"):
        d.measure_selfbleu([A])


def loop_bleu(texts: list[list[str]], i: int, max_n: int) -> float:
    """BLEU as the paper words it, with dictionaries."""
    own, others, total = texts[i], texts[:i] + texts[i + 1 :], 0.0
    for n in range(1, max_n + 1):
        grams = [
            Counter(tuple(t[k : k + n]) for k in range(len(t) - n + 1)) for t in [own, *others]
        ]
        matched = sum(min(c, max(o[g] for o in grams[1:])) for g, c in grams[0].items())
        if n == 1 and not matched:
            return 0.0
        total += math.log((matched or 0.1) / max(1, len(own) - n + 1)) / max_n
    near = min((abs(len(o) - len(own)), len(o)) for o in others)[1]
    return math.exp(total + min(0.0, 1 - near / len(own)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcd"), max_size=9), min_size=2, max_size=5))
def test_counts_equal_plain_loops(texts: list[list[str]]) -> None:
    for i, got in enumerate(d.measure_bleu(texts, 3)):
        assert got == pytest.approx(loop_bleu(texts, i, 3))
    for n in (1, 2, 3):
        grams = Counter(tuple(t[k : k + n]) for t in texts for k in range(len(t) - n + 1))
        assert sorted(d.count_grams(texts, n)) == sorted(grams.values())
        spread = {
            g: sum(g in zip(*(t[k:] for k in range(n)), strict=False) for t in texts) for g in grams
        }
        sums = [sum(spread[tuple(t[k : k + n])] - 1 for k in range(len(t) - n + 1)) for t in texts]
        assert d.measure_selfrepetition(texts, n) == pytest.approx(
            np.mean([math.log(1 + s) for s in sums])
        )
    assert d.count_vectors(texts).sum() == sum(map(len, texts))


def test_entropy_and_zipf_by_hand() -> None:
    # 1-grams a a b c: p = 1/2 1/4 1/4, entropy 1.5 ln 2
    assert d.measure_entropy([list("aabc")], 1) == pytest.approx(1.5 * math.log(2))
    # counts 4 and 2 at ranks 1 and 2: ln(2/4) / ln(2/1) = -1
    assert d.fit_zipf([list("aaaabb")]) == pytest.approx(-1.0)
    assert d.fit_zipf([list("abcd")]) == pytest.approx(0.0)
    assert math.isnan(d.fit_zipf([list("aaa")]))


def test_mtld_by_hand() -> None:
    # a a: ratio 1/2 < 0.72 closes a factor; a a a a is two factors either way: 4 / 2
    assert d.measure_mtld(list("aaaa")) == pytest.approx(2.0)
    # a b a: ratio 2/3 < 0.72 at 3: one factor, then b with ratio 1: (1 - 1)/0.28 = 0. Backward b a b closes
    # one, a is left: 4 / 1 both ways
    assert d.measure_mtld(list("abab")) == pytest.approx(4.0)
    # a b c a: 3/4 stays above: partial (1 - 0.75) / 0.28; backward the same
    assert d.measure_mtld(list("abca")) == pytest.approx(4 / (0.25 / 0.28))
    # exactly 0.72 does not close: 18 types in 25
    tokens = [str(i) for i in range(18)] + ["0"] * 7
    assert d.count_factors(np.array([int(t) for t in tokens])) == pytest.approx(
        1.0
    )  # partial 0.28 / 0.28
    assert math.isnan(d.measure_mtld(list("abc")))


def test_repetition_keeps_the_last_gram() -> None:
    # a b a b: ab ba ab, 2 of 3 different; the fault would see ab ba only
    assert d.measure_repetition(list("abab"), 2) == pytest.approx(1 / 3)
    # rep-2 1/3, rep-3 0 (aba bab), rep-4 0
    assert d.measure_diversity(list("abab")) == pytest.approx(2 / 3)
    assert d.measure_diversity(list("aaaaaaaa")) == pytest.approx(1 / 7 * 1 / 6 * 1 / 5)
    assert d.measure_repetition(list("ab"), 4) == 0.0


def test_compression_compresses_once() -> None:
    text = "so it goes, " * 200
    assert d.measure_compression(text) == len(text) / len(gzip.compress(text.encode(), 9, mtime=0))
    assert d.measure_compression(text) > 20 > d.measure_compression("qwzxv")


def test_selfrepetition_by_hand() -> None:
    # 2-grams: the-cat is in A and B: N = 1 each; C shares none: mean of ln 2, ln 2, 0
    assert d.measure_selfrepetition([A, B, C], 2) == pytest.approx(2 * math.log(2) / 3)


def test_vendi_by_hand() -> None:
    assert d.measure_vendi(np.eye(5)) == pytest.approx(5.0)
    assert d.measure_vendi(np.ones((4, 3))) == pytest.approx(1.0)
    # two items with cosine 0.6: eigenvalues 0.8 and 0.2 of K / 2
    p = np.array([0.8, 0.2])
    x = np.array([[1.0, 0.0], [0.6, 0.8]])
    assert d.measure_vendi(x) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    wide = np.random.default_rng(0).normal(size=(6, 40))
    assert d.measure_vendi(wide) == pytest.approx(d.measure_vendi(np.hstack([wide, 0 * wide])))
    assert d.measure_vendi(np.repeat(np.eye(3), 30, axis=0)) == pytest.approx(3.0)  # n > d
    for wrong in (np.zeros((2, 2)), np.ones(3)):
        with pytest.raises(DataError):
            d.measure_vendi(wrong)


def test_prediction_by_hand() -> None:
    # p = 3/4, 1/4: H = ln 4 - 3/4 ln 3; varentropy p q (ln(p/q))^2
    entropy, varentropy = measure_prediction(np.log([[0.75, 0.25], [0.5, 0.5]]))
    assert entropy == pytest.approx([math.log(4) - 0.75 * math.log(3), math.log(2)])
    assert varentropy == pytest.approx([0.75 * 0.25 * math.log(3) ** 2, 0])
    entropy, varentropy = measure_prediction(np.array([[0.0, -np.inf], [7.0, 7.0]]))
    assert entropy == pytest.approx([0, math.log(2)]) and varentropy == pytest.approx([0, 0])
    assert measure_prediction(np.zeros((2, 3, 8)))[0] == pytest.approx(np.full((2, 3), math.log(8)))


def test_prediction_equals_the_engine() -> None:
    import torch

    from primechat.infer.sampling import measure_logits

    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 3
    entropy, varentropy = measure_prediction(logits.numpy())
    tokens = measure_logits(logits, torch.zeros(6, dtype=torch.long))
    assert [t.entropy for t in tokens] == pytest.approx(entropy, abs=1e-5)
    assert [t.varentropy for t in tokens] == pytest.approx(varentropy, abs=1e-4)


def test_drift_and_information_by_hand() -> None:
    assert d.measure_drift(np.array([[1, 0], [0, 2], [-3, 0], [1, 1]])) == pytest.approx(
        [0, 1, 2, 1 - math.sqrt(0.5)]
    )
    assert d.measure_information([-1.0, -2.0], [-3.0, -2.5]) == pytest.approx((2 + 0.5) / 2)


def test_mtld_of_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the definition's plain loop has it, factors long and short, in time that grows with the text."""
    words = [i * i % 97 if i % 1000 > 700 else i % 1300 for i in range(9000)]

    def count(tokens: list[int]) -> float:
        factors, types, n = 0.0, set[int](), 0
        for token in tokens:
            types, n = types | {token}, n + 1
            if len(types) / n < 0.72:
                factors, types, n = factors + 1, set(), 0
        return factors + ((1 - len(types) / n) / (1 - 0.72) if n else 0)

    wanted = [len(words) / count(order) for order in (words, words[::-1])]
    assert d.measure_mtld(words) == pytest.approx(sum(wanted) / 2)
    sizes, add_up = list[int](), np.cumsum
    monkeypatch.setattr(np, "cumsum", lambda x: (sizes.append(len(x)), add_up(x))[1])
    d.measure_mtld([i * i % 97 for i in range(20_000)])
    assert len(sizes) > 100 and sum(sizes) < 20 * 20_000, "each factor read on to the end"


def test_groups_differ_from_their_controls() -> None:
    varied = [
        f"I saw {a} near the {b} while it was {c}."
        for a, b, c in zip("abcdef", "ghijkl", "mnopqr", strict=True)
    ]
    loops = ["I like music. " * 8] * 6
    found, looped = d.measure_texts(varied), d.measure_texts(loops)
    assert set(found) == set(d.MEASURES)
    assert (
        looped["compression"] > 5 * found["compression"]
        and looped["diversity"] < 0.05 < found["diversity"]
    )
    assert (
        looped["self-BLEU"] > 0.99
        and looped["Vendi"] == pytest.approx(1)
        and looped["MTLD"] < found["MTLD"]
    )
    assert math.isnan(d.measure_texts(["one text"])["self-BLEU"])
