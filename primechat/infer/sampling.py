"""Logits to token ids, and logits to measures: pure functions of a (B, V) float32 matrix.

Hides: how a token is drawn. One uniform number per row, from the row's own generator, goes through the
inverse of the cumulative distribution. That takes 20 microseconds at V = 4096 on a CPU, where an exponential
race or `torch.multinomial` takes 110, and a seed gives the same numbers on every device. Only top_p sorts,
and no further than needed.
Reference: Holtzman et al. 2020, The Curious Case of Neural Text Degeneration (top-k and nucleus sampling).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from primechat.config.runtime import check_number
from primechat.errors import ConfigError
from primechat.events import Token
from primechat.seeds import derive_seed

GREEDY_BELOW = 1e-5  # a lower temperature is argmax: dividing by it would overflow float32
FIRST_CANDIDATES = 512  # top_p sorts this many tokens first, then eight times as many, and so on


def check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, seed: int, penalty: float = 1.0
) -> None:
    """Check the settings of sampling.

    Raises:
        ConfigError: a setting breaks its rule.
    """
    check_number("temperature", temperature, low=0, high=100)
    check_number("top_k", 1 if top_k is None else top_k, low=1, whole=True)
    check_number("top_p", 1 if top_p is None else top_p, low=1e-6, high=1)
    check_number("repetition_penalty", penalty, low=1, high=10)
    if type(seed) is not int:
        raise ConfigError(f"seed={seed!r} must be a whole number; try 0.")


def seed_row(seed: int, row: int) -> int:
    """Return the seed of one row of a batch; row 0 uses the seed of the batch itself.

    Each row draws from its own generator, so that its text does not depend on its neighbours.

    >>> seed_row(7, 0), seed_row(7, 1) != seed_row(8, 0)
    (7, True)
    """
    return derive_seed(seed, "row", row) if row else seed


def draw_floats(seed: int) -> Iterator[float]:
    """Yield the uniform numbers that belong to a seed: multiples of 2**-24 in [0, 1).

    They come from numpy, which uses all bits of a seed and gives the same numbers on every machine. Several
    are drawn at a time, because each call takes a microsecond.

    >>> source = draw_floats(0)
    >>> [round(next(source), 4) for _ in range(2)]
    [0.8079, 0.6088]
    """
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "draws")))
    while True:
        yield from generator.random(16, dtype=np.float32).tolist()


def penalise_seen(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Return logits in which the tokens seen so far are less likely.

    A positive logit of such a token is divided by the penalty, a negative one is multiplied by it.

    Args:
        logits: (B, V) float32.
        seen: (B, V) bool, the tokens of each row so far.
        penalty: 1 changes nothing; the source recommends 1.2.

    Source: Keskar et al. 2019, CTRL, section 4.1; for negative logits, its published code.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample_logits(
    logits: torch.Tensor,
    draws: Sequence[Iterator[float] | None],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """Return one sampled token per row: temperature first, then top_k, then top_p of what remains.

    Args:
        logits: (B, V) float32.
        draws: B sources of uniform numbers (`draw_floats`); a row with None gets an arbitrary token.
        temperature: divides the logits; 0 takes the likeliest token (of equals the lowest id) and draws
            nothing.
        top_k: keep exactly this many of the likeliest tokens, even if several are equally likely.
        top_p: keep the smallest set of the likeliest tokens whose probabilities sum to at least this.

    Returns:
        Token ids, (B,) int64, on the logits' device.

    Source: Holtzman et al. 2020, section 3.1 (nucleus); Devroye 1986, chapter II.2 (inverse transform).
    """
    if temperature < GREEDY_BELOW:
        return logits.argmax(-1)

    # Temperature keeps the order of the tokens, so the top k can be taken first.
    ids = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)  # (B, k), likeliest first
    if temperature != 1:
        logits = logits / temperature
    masses = logits.softmax(-1)

    # The cumulative distribution of the tokens that remain, and its total.
    if top_p is not None and top_p < 1:
        cdf, ids, total = find_nucleus(masses, ids, top_p)
    else:
        cdf = masses.cumsum(-1)
        total = cdf[:, -1:]

    # The draws end at 1 - 2**-24, so in float32 a point stays below its total, and no token of
    # mass 0 is drawn.
    drawn = [0.0 if source is None else next(source) for source in draws]
    if len(drawn) == 1:
        points = total * drawn[0]
    else:
        points = total * torch.tensor(drawn, dtype=cdf.dtype, device=cdf.device)[:, None]

    # Take the first token whose cdf exceeds the point.
    places = torch.searchsorted(cdf, points, right=True)  # (B, 1)
    places.clamp_(max=cdf.shape[-1] - 1)  # a nan would give an index past the end
    return (places if ids is None else ids.gather(-1, places)).squeeze(-1)


def find_nucleus(
    masses: torch.Tensor, ids: torch.Tensor | None, top_p: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the smallest set of the likeliest tokens whose probabilities sum to at least top_p.

    Args:
        masses: (B, V) probabilities of all tokens; or (B, k), likeliest first, of the tokens `ids`.
        ids: (B, k), or None.
        top_p: probability to reach.

    Returns:
        Cumulative probabilities (B, n), likeliest first; their ids (B, n); and the probability of the
        nucleus (B, 1), the cumulative probability of its last token. Some of the n tokens may lie outside
        the nucleus.
    """
    width, count = masses.shape[-1], FIRST_CANDIDATES
    whole = ids is not None
    ordered = masses
    while True:
        # Sort the likeliest `count` tokens; on a GPU all of them, because checking whether they
        # suffice would stall it.
        if not whole:
            whole = count >= width or masses.device.type != "cpu"
            ordered, ids = masses.sort(-1, descending=True) if whole else masses.topk(count)

        # Find the first token at which top_p is reached; if it is not, sort more of them.
        cdf = ordered.cumsum(-1)
        last = torch.searchsorted(cdf, cdf.new_full((cdf.shape[0], 1), top_p))
        if whole or int(last.max()) < count:
            assert ids is not None, "candidates have ids"
            return cdf, ids, cdf.gather(-1, last.clamp_max(cdf.shape[-1] - 1))
        count *= 8


def measure_logits(logits: torch.Tensor, ids: torch.Tensor, n_alternatives: int = 0) -> list[Token]:
    """Return measures of each row's token and of its distribution before temperature and truncation.

    With p = softmax(logits): log p(id), entropy H = -sum p ln p, varentropy sum p (ln p + H)^2, and rank, the
    number of tokens likelier than id. The values are float32, within 1e-5 of the exact ones, and come from
    the device in one transfer.

    Args:
        logits: (B, V) float32; -inf marks a token that cannot occur.
        ids: (B,) int64.
        n_alternatives: how many of the likeliest tokens to list.

    Returns:
        One `Token` per row.

    Source: entropy, Shannon 1948; varentropy, Kontoyiannis and Verdu 2014.
    """
    # The measures of each row, on the device.
    n = min(n_alternatives, logits.shape[-1])
    logprobs = logits.log_softmax(-1)
    p, finite = logprobs.exp(), logprobs.clamp_min(-1e4)  # 0 * -inf would be nan
    entropy = -(p * finite).sum(-1, keepdim=True)
    varentropy = (p * (finite + entropy).square_()).sum(-1, keepdim=True)
    own = logprobs.gather(-1, ids[:, None])
    rank = (logprobs > own).sum(-1, keepdim=True)
    likeliest, places = logprobs.topk(n)

    # Transfer them as one float32 matrix; ids are exact in it up to 2**24.
    columns = (ids[:, None], own, entropy, varentropy, rank, likeliest, places)
    tokens = []
    for row in torch.cat([column.float() for column in columns], -1).tolist():
        named = zip(map(int, row[5 + n :]), row[5 : 5 + n], strict=True)
        figures = dict(logprob=row[1], entropy=row[2], varentropy=row[3], rank=int(row[4]))
        tokens.append(Token(id=int(row[0]), alternatives=tuple(named), **figures))
    return tokens
