"""The optimizer: Muon for the matrices of the blocks, fused AdamW for embeddings, head and scalars.

`PARAMETER_KINDS` says which parameter is of which kind; `adam_rules` gives each kind its rate, betas and
decay from OptimConfig. Reference: Jordan et al. 2024 (Muon); Amsel et al. 2025 (Polar Express); Li et al.
2025 (NorMuon); Chen et al. 2025 (cautious decay). With several ranks each keeps the state of its share
alone, moves that share, and gets the others' while it computes; `state_dict` is whole all the same, so that
a run can resume on another number of ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from primechat.config import OptimConfig
from primechat.train.parallel import Share, sum_numbers

# Kind of a parameter: the names that are of it. Muon moves `matrix`, AdamW the others, whose states lie in a
# checkpoint in this order.
PARAMETER_KINDS: dict[str, tuple[str, ...]] = {
    "matrix": (
        "transformer.h.*.c_[qkv].weight",
        "transformer.h.*.c_proj.weight",
        "transformer.h.*.c_fc.weight",
        "transformer.h.*.ve_gate.weight",
    ),
    "embedding": ("transformer.wte.weight",),
    "value_embedding": ("value_embeds.*.weight",),
    "unembedding": ("lm_head.weight",),
    "residual": ("resid_lambdas",),
    "x0": ("x0_lambdas",),
    "smear": ("smear_lambda", "backout_lambda", "smear_gate.weight"),
    "added": (
        "*.adapter.*",
        "projector*",
    ),  # what hangs beside the model: LoRA, a distillation's projector
}

# Muon's iterations: X <- aX + (bA + cA^2)X with A = XX^T, one (a, b, c) a step.
Steps = tuple[tuple[float, float, float], ...]

# Amsel et al. 2025, degree 5, five steps, for singular values from 1e-3 to 1. All but the last are damped, as
# there: bfloat16 rounds a value of 1 up, and beyond 1 each step makes it much larger still.
DAMPING = 1.02
EXACT_STEPS: Steps = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
DAMPED_STEPS: Steps = (
    *((a / DAMPING, b / DAMPING**3, c / DAMPING**5) for a, b, c in EXACT_STEPS[:-1]),
    EXACT_STEPS[-1],
)
# the same for five steps with a safety factor of 0.02 and a cushion of 2: the numbers of nanochat's 2026
CUSHIONED_STEPS: Steps = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NEWTON_SCHULZ_STEPS: Steps = ((3.4445, -4.7750, 2.0315),) * 5  # Jordan et al. 2024


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """One way to orthogonalise: X starts as G / (margin * |G| + epsilon)."""

    margin: float
    epsilon: float
    steps: Steps


ITERATIONS = {
    "polar-damped": Iteration(margin=1.01, epsilon=1e-7, steps=DAMPED_STEPS),
    "polar-express": Iteration(margin=1.01, epsilon=1e-6, steps=CUSHIONED_STEPS),
    "newton-schulz": Iteration(margin=1.0, epsilon=1e-7, steps=NEWTON_SCHULZ_STEPS),
}


def find_kind(name: str) -> str:
    """Return the kind of a parameter by its name.

    Raises:
        LookupError: no kind has it; a new parameter must be put into the list.

    >>> find_kind("transformer.h.3.attn.c_proj.weight"), find_kind("smear_gate.weight")
    ('matrix', 'smear')
    """
    for kind, patterns in PARAMETER_KINDS.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return kind
    raise LookupError(f"parameter {name!r} is of no kind; add it to PARAMETER_KINDS.")


def orthogonalize(
    stack: Tensor,
    method: str = "polar-damped",
    *,
    equalize_rows: bool = False,
    restore_norm: bool = False,
) -> Tensor:
    """Return for each matrix of (n, r, c) the nearest one with singular values near 1.

    Args:
        stack: n matrices of one shape.
        method: a key of ITERATIONS. The polar ones come within about 0.15 of 1, newton-schulz within 0.35.
        equalize_rows: bring the rows to one length first, at the same norm of the whole.
        restore_norm: set the norm of the result to sqrt(min(r, c)), that of exact singular values.

    Source: Polar Express (Amsel et al. 2025, algorithm 1); Newton-Schulz (Jordan et al. 2024).
    """
    plan = ITERATIONS[method]
    x = level_rows(stack) if equalize_rows else stack

    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) * plan.margin + plan.epsilon)
    for a, b, c in plan.steps:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if tall else x

    if restore_norm:
        norm = x.float().norm(dim=(1, 2), keepdim=True).clamp(min=1e-6)
        x = x * (min(x.size(1), x.size(2)) ** 0.5 / norm).to(x.dtype)
    return x


def level_rows(stack: Tensor) -> Tensor:
    """Return each matrix of (n, r, c) with rows of one length and the norm that it had.

    Source: MuonEq (2026), arXiv 2603.28254: rows as in nanochat.
    """
    whole = stack.float()
    target = whole.norm(dim=(1, 2), keepdim=True) / stack.size(1) ** 0.5
    rows = whole.norm(dim=2, keepdim=True).clamp(min=1e-6)
    return stack * (target / rows).to(stack.dtype)


class Muon:
    """Momentum, then orthogonalisation, for matrices; those of one shape are handled as one stack."""

    def __init__(
        self, params: list[nn.Parameter], half: bool, config: OptimConfig | None = None
    ) -> None:
        groups: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for p in params:
            groups[tuple(p.shape)].append(p)
        self.groups = [groups[shape] for shape in sorted(groups)]
        self.half, self.config = half, config or OptimConfig()
        self.shares = [Share(len(g)) for g in self.groups]
        pairs = [(s.hi - s.lo, g[0]) for s, g in zip(self.shares, self.groups, strict=True)]
        self.momenta = [torch.zeros(n, *p.shape, device=p.device) for n, p in pairs]
        self.second = [torch.zeros(n, *row_shape(p), device=p.device) for n, p in pairs]

    def step(self, lr: float, momentum: float, weight_decay: float) -> float:
        """Move all matrices by one step; return the squared norm of the move."""
        moved, coming = 0.0, []
        for params, share, m, s in zip(
            self.groups, self.shares, self.momenta, self.second, strict=True
        ):
            mine = params[share.lo : share.hi]
            if mine:
                moved += self.move(mine, m, s, lr, momentum, weight_decay)
            if share.world_size > 1:  # the next stack is computed while this one travels
                stack = torch.stack([*mine]) if mine else params[0].new_zeros(0, *params[0].shape)
                coming.append((params, share, share.gather(stack)))
        for params, share, wait in coming:
            whole = wait()
            others = [i for i in range(len(params)) if not share.lo <= i < share.hi]
            if others:
                torch._foreach_copy_([params[i] for i in others], [whole[i] for i in others])
        device = self.momenta[0].device if self.momenta else torch.device("cpu")
        return sum_numbers([moved], device)[0]

    def move(
        self,
        params: list[nn.Parameter],
        m: Tensor,
        s: Tensor,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> float:
        """Move matrices of one shape; return the squared norm of the move.

        Args:
            params: n matrices (r, c).
            m: their momenta (n, r, c), changed in place.
            s: their mean squares by row or column, as `row_shape` has them, changed in place.
        """
        grad = torch.stack([p.grad for p in params if p.grad is not None]).float()
        m.lerp_(grad, 1 - momentum)
        grad.lerp_(m, momentum)  # Nesterov: the gradient once more, on top of the mean

        config = self.config
        update = orthogonalize(
            grad.to(torch.bfloat16) if self.half else grad,
            config.orthogonalize,
            equalize_rows=config.equalize_rows,
            restore_norm=config.restore_norm,
        ).float()
        if config.row_beta2:
            update = even_out(update, s, config.row_beta2)

        # a tall matrix maps to more numbers than it reads: a step of the same effect on each is larger
        scale = lr * max(1.0, params[0].size(0) / params[0].size(1)) ** 0.5
        for p, u in zip(params, update, strict=True):
            if weight_decay and config.cautious_decay:
                p.sub_(torch.where(u * p >= 0, p, 0.0), alpha=scale * weight_decay)
            elif weight_decay:
                p.mul_(1 - lr * weight_decay)
            p.add_(u, alpha=-scale)
        return float(update.square().sum()) * scale**2


def even_out(update: Tensor, s: Tensor, beta2: float) -> Tensor:
    """Return a step (n, r, c) whose rows (or columns) are divided by their running root mean square `s`, at
    the norm that each matrix had.

    Source: NorMuon (Li et al. 2025, algorithm 1), along the longer side as in nanochat.
    """
    dim = 2 if s.size(2) == 1 else 1
    size = update.norm(dim=(1, 2), keepdim=True)
    s.lerp_(update.square().mean(dim=dim, keepdim=True), 1 - beta2)
    update = update / s.clamp(min=1e-10).sqrt()
    update *= size / update.norm(dim=(1, 2), keepdim=True).clamp(min=1e-10)
    return update


def row_shape(p: Tensor) -> tuple[int, int]:
    """Return the shape of a second moment with one number along the longer side of a matrix."""
    return (p.size(0), 1) if p.size(0) >= p.size(1) else (1, p.size(1))


@dataclass(frozen=True, kw_only=True)
class AdamRule:
    """How AdamW moves one kind of parameter."""

    lr: float
    beta1: float = 0.8
    beta2: float = 0.95
    eps: float = 1e-10
    weight_decay: float = 0.0


def adam_rules(config: OptimConfig, width: int) -> dict[str, AdamRule]:
    """Return AdamW's rule of each kind of parameter, in the order of PARAMETER_KINDS.

    Source: nanochat: rates of tables and head were found at width 768 and scale by (width / 768) ** -0.5.
    """
    by_width = (width / 768) ** -0.5

    def rule(lr: float, **changes: float) -> AdamRule:
        common = dict(beta1=config.adam_beta1, beta2=config.adam_beta2, eps=config.adam_eps)
        return AdamRule(lr=lr, **{**common, **changes})

    embedding_lr = config.embedding_lr * by_width
    return {
        "embedding": rule(
            embedding_lr, beta2=config.embedding_beta2, weight_decay=config.embedding_decay
        ),
        "value_embedding": rule(
            embedding_lr * config.value_embedding_ratio,
            beta2=config.embedding_beta2,
            weight_decay=config.value_embedding_decay,
        ),
        "unembedding": rule(
            config.unembedding_lr * by_width,
            beta2=config.unembedding_beta2,
            weight_decay=config.unembedding_decay,
        ),
        "residual": rule(config.residual_lr, weight_decay=config.residual_decay),
        "x0": rule(config.x0_lr, beta1=config.x0_beta1),
        "smear": rule(config.smear_lr),
        "added": rule(config.added_lr),
    }


class Adam:
    """Fused AdamW; of a table each rank keeps and moves its rows, scalars are moved on every rank.

    Its function and not `torch.optim.AdamW`: making one of those loads torch's compiler, which takes seconds
    of the time before a first step.
    """

    def __init__(self, groups: list[tuple[list[nn.Parameter], AdamRule]]) -> None:
        self.groups = groups
        self.params = [p for params, _ in groups for p in params]
        self.shares = [Share(len(p)) if p.ndim == 2 and len(p) > 1 else None for p in self.params]
        self.mine = {
            p: p.data[share.lo : share.hi] if share and share.world_size > 1 else p
            for p, share in zip(self.params, self.shares, strict=True)
        }
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    def step(self, ratio: float) -> Callable[[], None]:
        """Move this rank's rows; the call that is returned waits for the others'."""
        shares = dict(zip(self.params, self.shares, strict=True))
        for params, rule in self.groups:
            ready, grads = [p for p in params if p.grad is not None], []
            for p in ready:
                share, whole, mine = shares[p], p.grad, self.mine[p]
                assert whole is not None, "only parameters with a gradient are moved"
                grads.append(whole[share.lo : share.hi] if share and mine is not p else whole)
                if p not in self.state:
                    zeros = {key: torch.zeros_like(mine.data) for key in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
            keys = ("exp_avg", "exp_avg_sq", "step")
            first, second, steps = ([self.state[p][key] for p in ready] for key in keys)
            if ready:
                adamw(
                    [self.mine[p] for p in ready],
                    grads,
                    first,
                    second,
                    [],
                    steps,
                    fused=True,
                    amsgrad=False,
                    beta1=rule.beta1,
                    beta2=rule.beta2,
                    lr=rule.lr * ratio,
                    weight_decay=rule.weight_decay,
                    eps=rule.eps,
                    maximize=False,
                )
        spread = [(p, share) for p, share in shares.items() if share and self.mine[p] is not p]
        coming = [(p, share.gather(self.mine[p])) for p, share in spread]

        def wait() -> None:
            for p, whole in coming:
                p.copy_(whole())

        return wait

    def state_dict(self) -> dict[str, Any]:
        """Return AdamW's state of whole tables."""
        whole = {}
        for i, (p, share) in enumerate(zip(self.params, self.shares, strict=True)):
            found: dict[str, Tensor] = dict(self.state.get(p, {}))
            if self.mine[p] is not p and share:
                tables = {key: share.gather(found[key])().clone() for key in found if key != "step"}
                found |= tables
            if found:
                whole[i] = found
        return {"state": whole}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's rows of a whole state."""
        for i, found in state["state"].items():
            p, share = self.params[int(i)], self.shares[int(i)]
            rows = slice(share.lo, share.hi) if self.mine[p] is not p and share else slice(None)
            self.state[p] = {
                key: (value if key == "step" else value[rows]).to(
                    p.device, torch.float32, copy=True
                )
                for key, value in found.items()
            }


class Optimizer:
    """Both rules under one learning-rate schedule; `step` takes the schedule's ratio."""

    def __init__(
        self, model: nn.Module, config: OptimConfig, width: int, half: bool = False
    ) -> None:
        """Sort a model's parameters by their kind.

        Args:
            width: n_embd of the model, by which rates of tables and head scale.
            half: orthogonalise in bfloat16.

        Raises:
            LookupError: a parameter that learns is of no known kind.
        """
        self.config = config
        kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in PARAMETER_KINDS}
        for name, p in model.named_parameters():
            if p.requires_grad:
                kinds[find_kind(name)].append(p)
        self.params = [p for group in kinds.values() for p in group]
        self.muon = Muon(kinds["matrix"], half, config)
        rules = adam_rules(config, width)
        self.adam = Adam([(kinds[kind], rule) for kind, rule in rules.items() if kinds[kind]])

    @torch.no_grad()
    def step(self, ratio: float, momentum: float, decay_ratio: float = 1.0) -> tuple[float, float]:
        """Move every parameter and drop the gradients.

        Args:
            ratio: learning rates of this step, as a share of their peaks.
            momentum: Muon's, of this step.
            decay_ratio: weight decay of the matrices, as a share of its peak.

        Returns:
            The gradient's norm before clipping, and the norm of the matrices' move.
        """
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if self.config.grad_clip and norm > self.config.grad_clip:
            torch._foreach_mul_(grads, self.config.grad_clip / norm)
        wait = self.adam.step(ratio)
        moved = self.muon.step(
            self.config.matrix_lr * ratio, momentum, self.config.weight_decay * decay_ratio
        )
        wait()
        for p in self.params:
            p.grad = None
        return norm, moved**0.5

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, as plain containers of tensors, whole.

        With several ranks all of them must call this; the tensors are copies then.
        """
        parts = zip(self.muon.shares, self.muon.momenta, self.muon.second, strict=True)
        whole = [(share.gather(m)(), share.gather(s)()) for share, m, s in parts]
        return {
            "adam": self.adam.state_dict(),
            "momenta": [m for m, _ in whole],
            "second": [s for _, s in whole],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where `state_dict` was taken, on any number of ranks."""
        self.adam.load_state_dict(state["adam"])
        for mine, theirs in (
            (self.muon.momenta, state["momenta"]),
            (self.muon.second, state["second"]),
        ):
            for share, a, b in zip(self.muon.shares, mine, theirs, strict=True):
                a.copy_(b[share.lo : share.hi])
