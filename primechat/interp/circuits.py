"""Analyses of a forward pass: logit lens, attribution, attention heads, ablation and patching.

Hides: the bookkeeping of the residual stream. Nothing is trained and no gradient is taken. Attribution is
exact up to rounding: with the scale of the final norm frozen, a logit before the softcap is a sum over parts.
Reference: nostalgebraist 2020 (logit lens); Elhage et al. 2021 (attribution); Olsson et al. 2022 (induction
heads); Meng et al. 2022 (patching).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from primechat.errors import ConfigError
from primechat.interp.anatomy import GPTBody, dissect
from primechat.interp.hooks import Capture, Recorder, capture, check_ids, cut_parts, to_numpy
from primechat.model.gpt import GPT, NoHook

Ids = Sequence[int] | np.ndarray
# The points that attribution needs, and those that the lens needs.
READABLE = ("token", "embed", "layer.*.attn.heads", "layer.*.mlp.out", "last")
STREAM = ("embed", "layer.*.resid", "last")


@dataclass(frozen=True, kw_only=True)
class Lens:
    """Predictions read from each stage of the stream: R stages, T positions, K guesses.

    `stages` names the R rows; `ids` and `probs` (R, T, K) are the most likely next tokens; `target` (R, T) is
    the probability of the token that is most likely after the whole model; `entropy` (R, T) is in bits.
    """

    stages: tuple[str, ...]
    ids: np.ndarray
    probs: np.ndarray
    target: np.ndarray
    entropy: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """The contribution of each part to the logit of `token` at position `at`, before the softcap.

    `values` belong to `parts`, in the order of the pass, and sum to `logit`. With `against`, they explain the
    difference of the two tokens' logits.
    """

    at: int
    token: int
    against: int | None
    parts: tuple[str, ...]
    values: np.ndarray
    logit: float


@dataclass(frozen=True, kw_only=True)
class HeadScores:
    """Scores of each head on one text, each (L, H), averaged over all tokens but the first.

    `entropy` of the attention weights in bits; mean `distance` in tokens to what the head reads; `previous`
    and `first`: weight on the previous and on the first token; `induction`: weight on tokens that followed an
    earlier occurrence of the current one, NaN if no token recurs.
    """

    entropy: np.ndarray
    distance: np.ndarray
    previous: np.ndarray
    first: np.ndarray
    induction: np.ndarray


def read_lens(model: Any, seen: Capture, n_guesses: int = 3) -> Lens:
    """Return the predictions read from every stage of the stream, as if the model ended there.

    Args:
        model: the model that was captured.
        seen: a capture with the points STREAM.
        n_guesses: number of most likely tokens to keep, K.

    Source: nostalgebraist 2020; every stage is read by the model's own final norm and output matrix.
    """
    body = dissect(model)
    stages = [name for name in seen.points if name in ("embed", "last") or name.endswith(".resid")]
    rows: list[tuple[np.ndarray, ...]] = []
    best: torch.Tensor | None = None
    with torch.inference_mode():
        for stage in reversed(stages):  # `last` first: it gives the target token
            logs = body.read_stream(torch.from_numpy(seen[stage]).to(body.device)).log_softmax(-1)
            best = logs.argmax(-1) if best is None else best
            top = logs.topk(min(n_guesses, logs.size(-1)))
            bits = -(logs.exp() * logs).sum(-1) / np.log(2)
            target = logs.gather(-1, best[:, None])[:, 0].exp()
            rows.append(
                tuple(x.cpu().numpy() for x in (top.indices, top.values.exp(), target, bits))
            )
    parts = [np.stack(part) for part in zip(*reversed(rows), strict=True)]
    return Lens(
        stages=tuple(stages), ids=parts[0], probs=parts[1], target=parts[2], entropy=parts[3]
    )


def list_coefficients(body: Any) -> tuple[np.ndarray, float]:
    """Return the factors of each layer's output (L,) and of the embedding in the final stream."""
    n = body.n_layer
    layers, embed = np.zeros(n), 1.0
    middle: tuple[np.ndarray, float] = (layers.copy(), embed)
    for i in range(n):
        layers *= body.keep[i]
        embed = embed * body.keep[i] + body.again[i]
        layers[i] = 1.0
        if i == body.middle:
            middle = layers.copy(), embed
    return layers - body.backout * middle[0], embed - body.backout * middle[1]


def attribute(
    model: Any, seen: Capture, at: int, token: int, against: int | None = None
) -> Attribution:
    """Return the contribution of each part of the model to the logit of a token.

    Args:
        model: the model that was captured.
        seen: a capture with the points READABLE.
        at: position whose next token is predicted; negative numbers count from the end.
        token: token whose logit is explained.
        against: second token; if given, the difference of the two logits is explained.

    Returns:
        Attribution to the parts token (the token's own embedding), smear (the contribution of the previous
        token, if the model has it), layer.<i>.head.<h> and layer.<i>.mlp.

    Source: Elhage et al. 2021; the scale of the final norm is frozen at that of this pass.
    """
    # The direction in the stream that raises the logit.
    body = dissect(model)
    at = at % len(seen.ids)
    chosen = [token] if against is None else [token, against]
    rows = body.readout(torch.from_numpy(seen["last"][at]), chosen)
    pull = (rows[0] - rows[1] if against is not None else rows[0]).numpy()  # (C,)

    # The embedding, then every head and MLP.
    layers, embed = list_coefficients(body)
    own = seen["token"][at].astype(np.float64)
    parts, values = ["token"], [embed * float(own @ pull)]
    if body.has_smear:
        parts.append("smear")
        values.append(embed * float((seen["embed"][at] - own) @ pull))
    for i in range(body.n_layer):
        heads = torch.from_numpy(seen[f"layer.{i}.attn.heads"][at]).double()  # (H, D)
        written = torch.einsum("hd,hdc->hc", heads, body.head_map(i).cpu().double()).numpy()
        parts += [f"layer.{i}.head.{j}" for j in range(body.n_head)]
        values += list(layers[i] * (written @ pull))
        parts.append(f"layer.{i}.mlp")
        values.append(layers[i] * float(seen[f"layer.{i}.mlp.out"][at].astype(np.float64) @ pull))
    logit = float(seen["last"][at].astype(np.float64) @ pull)
    return Attribution(
        at=at,
        token=token,
        against=against,
        parts=tuple(parts),
        values=np.array(values),
        logit=logit,
    )


def score_heads(weights: np.ndarray, ids: Ids) -> HeadScores:
    """Return scores of what each head reads.

    Args:
        weights: (L, H, T, T), as returned by `Capture.stack("attn.weights")`, with T of at least 2.
        ids: (T,) token ids.

    Source: Olsson et al. 2022 for the induction score: the weight from a token to those that followed it
    earlier.
    """
    w, ids = weights[:, :, 1:].astype(np.float64), np.asarray(ids)  # queries 1..T-1
    place = np.arange(len(ids))
    back = place[1:, None] - place  # (T - 1, T), negative for later keys
    bits = -(w * np.log2(np.where(w > 0, w, 1.0))).sum(-1)

    # Induction: key s counts if the token before it, ids[s - 1], is that of the query.
    recurs = np.zeros(back.shape, dtype=bool)
    recurs[:, 1:] = (ids[1:, None] == ids[None, :-1]) & (back[:, 1:] > 0)
    rows = recurs.any(-1)
    hits = (w * recurs).sum(-1)[:, :, rows]
    return HeadScores(
        entropy=bits.mean(-1),
        distance=(w * np.maximum(back, 0)).sum((-1, -2)) / len(back),
        previous=(w * (back == 1)).sum((-1, -2)) / len(back),
        first=w[..., 0].mean(-1),
        induction=hits.mean(-1) if rows.any() else np.full(w.shape[:2], np.nan),
    )


def shuffle_blocks(model: Any, seed: int = 0) -> Any:
    """Return a control: the model with every block matrix replaced by random numbers of the same spread.

    Embeddings and output matrix are shared with the model, not copied.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(p: torch.Tensor) -> torch.Tensor:
        return (torch.randn(p.shape, generator=generator) * p.float().std().cpu()).to(p)

    if isinstance(model, GPT):
        own = {key: p for key, p in model.state_dict().items() if ".adapter." not in key}
        state = {key: draw(p) if ".h." in key else p for key, p in own.items()}
        return GPT.from_state(
            model.config, state, device=str(model.device), dtype=model.compute_dtype
        )
    body = dissect(model)
    blocks = {id(p) for layer in body.layers for p in layer.parameters()}
    kept = {id(p): p for p in model.network.parameters() if id(p) not in blocks}
    twin = copy.copy(model)
    twin.network = copy.deepcopy(model.network, kept)
    with torch.no_grad():
        for p in (p for layer in dissect(twin).layers for p in layer.parameters() if p.ndim > 1):
            p.copy_(draw(p))
    return twin


def repeat_text(ids: Ids, seed: int = 0, n_tokens: int = 24) -> np.ndarray:
    """Return the distinct tokens of a text in random order, said twice.

    On the second half, only copying helps.
    """
    distinct = np.unique(np.asarray(ids, dtype=np.int64))
    order = np.random.default_rng(seed).permutation(distinct)[:n_tokens]
    return np.concatenate([order, order])


def mix_second(twice: Ids, n_orders: int = 8) -> np.ndarray:
    """Return a control: a text said twice (2K,) with its second half in other orders (n_orders, 2K).

    Its second half still has the same tokens, but not their order, so whatever helps there is not copying.
    """
    first, second = np.split(np.asarray(twice, dtype=np.int64), 2)
    orders = [np.random.default_rng(seed).permutation(second) for seed in range(n_orders)]
    return np.stack([np.concatenate([first, order]) for order in orders])


def list_parts(body: GPTBody) -> list[str]:
    """Return the names of all parts that can be ablated: each head and each MLP, layer by layer."""
    return [
        f"layer.{i}.{part}"
        for i in range(body.n_layer)
        for part in [*(f"head.{j}" for j in range(body.n_head)), "mlp"]
    ]


def scan_ablations(
    model: Any,
    ids: Ids,
    parts: Sequence[str] | None = None,
    measure: Callable[[np.ndarray], float] = lambda losses: float(losses.mean()),
) -> Iterator[tuple[str, float]]:
    """Yield each part with the increase of the loss when it is ablated.

    Args:
        model: the model.
        ids: (T,) token ids, at least two.
        parts: parts to ablate one at a time; None means every head and every MLP.
        measure: function of the losses (T - 1,) in nats; by default their mean.
    """
    whole = measure(capture(model, ids).losses)
    for part in list_parts(dissect(model)) if parts is None else parts:
        yield part, measure(capture(model, ids, ablate=(part,)).losses) - whole


def measure_losses(model: Any, rows: np.ndarray, ablate: Sequence[str] = ()) -> np.ndarray:
    """Return the losses in nats (N, T - 1) of texts of equal length, as one batch.

    Args:
        model: the model.
        rows: (N, T) token ids, T of at least two.
        ablate: parts whose output becomes zero, as in `capture`.
    """
    body = dissect(model)
    batch = torch.from_numpy(np.stack([check_ids(body, row) for row in rows])).to(body.device)
    with torch.inference_mode():
        logits = body.trace(batch, Recorder((), cut_parts(body, ablate)))
        flat = logits[:, :-1].flatten(0, 1)
        losses = F.cross_entropy(flat, batch[:, 1:].flatten(), reduction="none")
    return to_numpy(losses.view(len(rows), -1))


def patch_grid(
    model: Any, clean: Ids, corrupt: Ids, token: int, against: int
) -> tuple[np.ndarray, float, float]:
    """Return how much of the clean answer returns when one state is patched into a corrupt prompt.

    Args:
        model: the model.
        clean: (T,) ids after which `token` is right.
        corrupt: (T,) ids after which `against` is right.
        token: right answer to the clean prompt.
        against: right answer to the corrupt prompt.

    Returns:
        The grid (L + 1, T) of logit differences, token minus against, at the last position, with the state of
        the stream after layer r - 1 (row 0: the embedding) at position t patched in; then the difference of
        the unpatched clean and corrupt prompts.

    Source: Meng et al. 2022, causal tracing, without noise.

    Raises:
        ConfigError: the prompts have different lengths.
    """
    # States of the clean prompt.
    body = dissect(model)
    rows = [check_ids(body, ids) for ids in (clean, corrupt)]
    stages = ["embed", *(f"layer.{i}.resid" for i in range(body.n_layer))]
    seen = capture(model, rows[0], points=stages)
    n = len(rows[1])
    if len(rows[0]) != n:
        raise ConfigError(
            f"the prompts have {len(rows[0])} and {n} tokens and must be equal; reword one."
        )

    # One pass per stage: row t of the batch has the state at position t patched.
    batch = torch.from_numpy(rows[1]).to(body.device)[None].expand(n, n).contiguous()
    grid = np.zeros((len(stages), n))
    with torch.inference_mode():
        for r, stage in enumerate(stages):
            last = body.trace(batch, Carrier(stage, seen[stage]))[:, -1]
            grid[r] = (last[:, token] - last[:, against]).cpu().numpy()

    # The two prompts without a patch.
    ends = [capture(model, ids).last for ids in rows]
    top, bottom = (float(z[token] - z[against]) for z in ends)
    return grid, top, bottom


class Carrier(NoHook):
    """A hook that patches position t of a captured state into row t of a batch."""

    def __init__(self, stage: str, states: np.ndarray) -> None:
        self.stage, self.states = stage, states

    def __call__(self, point: str, x: torch.Tensor) -> torch.Tensor:
        """Return the tensor that the pass continues with."""
        if point != self.stage:
            return x
        x, at = x.clone(), torch.arange(x.size(1))
        x[at, at] = torch.from_numpy(self.states).to(x)
        return x
