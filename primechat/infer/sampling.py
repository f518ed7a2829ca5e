"""Logits to token ids, and logits to measures: pure functions of a (B, V) float32 matrix.

Hides: how a token is drawn. One uniform number a row, from the row's own generator, goes through the inverse
of the cumulative distribution: 20 microseconds at V = 4096 on a CPU where an exponential race or
`torch.multinomial` takes 110, and a seed means the same numbers on every device. Only top_p sorts, and no
further than needed.
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
FIRST_CANDIDATES = (
    512  # top_p looks at this many tokens first, then at eight times as many, and so on
)


def check_sampling(
    temperature: float, top_k: int | None, top_p: float | None, seed: int, penalty: float = 1.0
) -> None:
    """Refuse settings that no sampling can have.

    Raises:
        ConfigError: one of them breaks its rule.
    """
    check_number("temperature", temperature, low=0, high=100)
    check_number("top_k", 1 if top_k is None else top_k, low=1, whole=True)
    check_number("top_p", 1 if top_p is None else top_p, low=1e-6, high=1)
    check_number("repetition_penalty", penalty, low=1, high=10)
    if type(seed) is not int:
        raise ConfigError(f"seed={seed!r} must be a whole number; try 0.")


def seed_row(seed: int, row: int) -> int:
    """Return the seed of one row of a batch; row 0 has the batch's own.

    A row draws from its own generator, so that its text does not depend on its neighbours.

    >>> seed_row(7, 0), seed_row(7, 1) != seed_row(8, 0)
    (7, True)
    """
    return derive_seed(seed, "row", row) if row else seed


def draw_floats(seed: int) -> Iterator[float]:
    """Yield the numbers of a seed's own generator: multiples of 2**-24 in [0, 1).

    They come from numpy, which reads all bits of a seed and starts on every machine alike. Several are drawn
    at a time, as each call takes a microsecond.

    >>> source = draw_floats(0)
    >>> [round(next(source), 4) for _ in range(2)]
    [0.8079, 0.6088]
    """
    generator = np.random.Generator(np.random.PCG64(derive_seed(seed, "draws")))
    while True:
        yield from generator.random(16, dtype=np.float32).tolist()


def penalise_seen(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Make tokens that were there less likely: a positive logit is divided, a negative one multiplied.

    Args:
        logits: (B, V) float32.
        seen: (B, V) bool, the tokens of each row so far.
        penalty: 1 changes nothing; 1.2 is what the source recommends.

    Source: Keskar et al. 2019, CTRL, section 4.1; for negative logits its published code.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample_logits(
    logits: torch.Tensor,
    draws: Sequence[Iterator[float] | None],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> torch.Tensor:
    """Draw one token a row: temperature first, then top_k, then top_p of what is left.

    Args:
        logits: (B, V) float32.
        draws: B sources of uniform numbers (`draw_floats`); a row with None gets just any token.
        temperature: divides the logits; 0 takes the likeliest (of equals the lowest id) and draws nothing.
        top_k: keep exactly this many of the likeliest tokens, also where several are equally likely.
        top_p: keep the smallest set of the likeliest tokens whose probabilities sum to at least this.

    Returns:
        Token ids, (B,) int64, on the logits' device.

    Source: Holtzman et al. 2020, section 3.1 (nucleus); Devroye 1986, chapter II.2 (inverse transform).
    """
    if temperature < GREEDY_BELOW:
        return logits.argmax(-1)
    ids = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k)  # (B, k), likeliest first, whatever the temperature
    if temperature != 1:
        logits = logits / temperature
    masses = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        cdf, ids, total = find_nucleus(masses, ids, top_p)
    else:
        cdf = masses.cumsum(-1)
        total = cdf[:, -1:]
    drawn = [0.0 if source is None else next(source) for source in draws]
    # rand ends at 1 - 2**-24, so in float32 a point stays below its total and no token of mass 0 is drawn
    if len(drawn) == 1:
        points = total * drawn[0]
    else:
        points = total * torch.tensor(drawn, dtype=cdf.dtype, device=cdf.device)[:, None]
    places = torch.searchsorted(
        cdf, points, right=True
    )  # (B, 1): the first whose cdf is above the point
    places.clamp_(max=cdf.shape[-1] - 1)  # nan would point behind the end
    return (places if ids is None else ids.gather(-1, places)).squeeze(-1)


def find_nucleus(
    masses: torch.Tensor, ids: torch.Tensor | None, top_p: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Find the smallest set of the likeliest tokens whose probabilities sum to at least top_p.

    Args:
        masses: (B, V) probabilities of all tokens; or (B, k), likeliest first, of the tokens `ids`.
        ids: (B, k), or None.
        top_p: probability to reach.

    Returns:
        Cumulative probabilities (B, n), likeliest first; their ids (B, n); the nucleus's probability
        (B, 1), which is the cumulative one of its last token.
    """
    width, count = masses.shape[-1], FIRST_CANDIDATES
    whole = ids is not None
    ordered = masses
    while True:
        if not whole:
            whole = (
                count >= width or masses.device.type != "cpu"
            )  # looking at the sum would stall a GPU
            ordered, ids = masses.sort(-1, descending=True) if whole else masses.topk(count)
        cdf = ordered.cumsum(-1)
        # the first place where top_p is reached
        last = torch.searchsorted(cdf, cdf.new_full((cdf.shape[0], 1), top_p))
        if whole or int(last.max()) < count:
            assert ids is not None, "candidates have ids"
            return cdf, ids, cdf.gather(-1, last.clamp_max(cdf.shape[-1] - 1))
        count *= 8


def measure_logits(logits: torch.Tensor, ids: torch.Tensor, n_alternatives: int = 0) -> list[Token]:
    """Measure each row's token and the distribution it was drawn from, before temperature and truncation.

    With p = softmax(logits): log p(id), entropy H = -sum p ln p, varentropy sum p (ln p + H)^2, and rank, the
    number of tokens likelier than id. One transfer from the device; float32, so within 1e-5 of the exact
    values.

    Args:
        logits: (B, V) float32; -inf stands for a token that cannot occur.
        ids: (B,) int64.
        n_alternatives: how many of the likeliest tokens to name.

    Returns:
        One `Token` a row.

    Source: entropy, Shannon 1948; varentropy, Kontoyiannis and Verdu 2014.
    """
    n = min(n_alternatives, logits.shape[-1])
    logprobs = logits.log_softmax(-1)
    p, finite = logprobs.exp(), logprobs.clamp_min(-1e4)  # 0 * -inf would be nan
    entropy = -(p * finite).sum(-1, keepdim=True)
    varentropy = (p * (finite + entropy).square_()).sum(-1, keepdim=True)
    own = logprobs.gather(-1, ids[:, None])
    rank = (logprobs > own).sum(-1, keepdim=True)
    likeliest, places = logprobs.topk(n)
    columns = (ids[:, None], own, entropy, varentropy, rank, likeliest, places)
    tokens = []
    # ids are exact in float32 up to 2**24
    for row in torch.cat([column.float() for column in columns], -1).tolist():
        named = zip(map(int, row[5 + n :]), row[5 : 5 + n], strict=True)
        figures = dict(logprob=row[1], entropy=row[2], varentropy=row[3], rank=int(row[4]))
        tokens.append(Token(id=int(row[0]), alternatives=tuple(named), **figures))
    return tokens
