"""The optimizer: Muon for the matrices of the blocks, fused AdamW for embeddings, head and scalars.

`PARAMETER_KINDS` assigns each parameter to a kind; `adam_rules` gives each kind its learning rate, betas and
weight decay from OptimConfig. With several ranks, each rank keeps the optimizer state of its own share only,
updates that share, and receives the other shares while it computes. `state_dict` still returns the whole
state, so a run can resume on a different number of ranks.
Reference: Jordan et al. 2024 (Muon); Amsel et al. 2025 (Polar Express); Li et al. 2025 (NorMuon); Chen et
al. 2025 (cautious decay).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from primechat.config import OptimConfig
from primechat.train.parallel import Shard, sum_numbers

if TYPE_CHECKING:
    from primechat.model.gpt import GPT

# The kinds of parameters, each with the patterns of its names. Muon updates `matrix` and AdamW the
# others; a checkpoint stores AdamW's states in this order.
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
    # Parameters added to a model: LoRA, the projector of a distillation.
    "added": (
        "*.adapter.*",
        "projector*",
    ),
}

# Muon's iteration: X <- aX + (bA + cA^2)X with A = XX^T, one (a, b, c) per step.
Steps = tuple[tuple[float, float, float], ...]

# Amsel et al. 2025, degree 5, five steps, for singular values from 1e-3 to 1. All steps but the last
# are damped, as in the paper: bfloat16 may round a value of 1 up, and each step enlarges values
# above 1 further.
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
# The same for five steps with a safety factor of 0.02 and a cushion of 2: nanochat's values of 2026.
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
    """One method of orthogonalisation; it starts with X = G / (margin * |G| + epsilon)."""

    margin: float
    epsilon: float
    steps: Steps


ITERATIONS = {
    "polar-damped": Iteration(margin=1.01, epsilon=1e-7, steps=DAMPED_STEPS),
    "polar-express": Iteration(margin=1.01, epsilon=1e-6, steps=CUSHIONED_STEPS),
    "newton-schulz": Iteration(margin=1.0, epsilon=1e-7, steps=NEWTON_SCHULZ_STEPS),
}


def parameter_kind(name: str) -> str:
    """Return the kind of a parameter, given its name.

    Raises:
        LookupError: the name matches no kind; a new parameter must be added to PARAMETER_KINDS.

    >>> parameter_kind("transformer.h.3.attn.c_proj.weight"), parameter_kind("smear_gate.weight")
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
    """Return, for each matrix of (n, r, c), the nearest matrix with singular values near 1.

    Args:
        stack: n matrices of one shape.
        method: a key of ITERATIONS. Known error of the singular values: about 0.15 for the polar methods,
            0.35 for newton-schulz.
        equalize_rows: first scale the rows of each matrix to equal length, keeping the norm of the matrix.
        restore_norm: set the norm of the result to sqrt(min(r, c)), as with singular values of exactly 1.

    Source: Polar Express (Amsel et al. 2025, algorithm 1); Newton-Schulz (Jordan et al. 2024).
    """
    plan = ITERATIONS[method]
    x = level_rows(stack) if equalize_rows else stack

    # Iterate on the wide form of each matrix, where XX^T is the smaller product.
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
    """Return each matrix of (n, r, c) with its rows scaled to equal length, keeping the matrix norm.

    Source: MuonEq (2026), arXiv 2603.28254; applied to rows as in nanochat.
    """
    whole = stack.float()
    target = whole.norm(dim=(1, 2), keepdim=True) / stack.size(1) ** 0.5
    rows = whole.norm(dim=2, keepdim=True).clamp(min=1e-6)
    return stack * (target / rows).to(stack.dtype)


class Muon:
    """Momentum followed by orthogonalisation, for matrices; those of one shape form a stack."""

    def __init__(
        self, params: list[nn.Parameter], half: bool, config: OptimConfig | None = None
    ) -> None:
        # Group the matrices by shape.
        groups: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for p in params:
            groups[tuple(p.shape)].append(p)
        self.groups = [groups[shape] for shape in sorted(groups)]
        self.half, self.config = half, config or OptimConfig()

        # Each rank keeps the state of its share of every group.
        self.shards = [Shard(len(g)) for g in self.groups]
        pairs = [(s.hi - s.lo, g[0]) for s, g in zip(self.shards, self.groups, strict=True)]
        self.momenta = [torch.zeros(n, *p.shape, device=p.device) for n, p in pairs]
        self.second = [torch.zeros(n, *row_shape(p), device=p.device) for n, p in pairs]

    def step(self, lr: float, momentum: float, weight_decay: float) -> float:
        """Update all matrices by one step and return the squared norm of the update."""
        # Update this rank's share of each stack and start to exchange it.
        moved, coming = 0.0, []
        for params, shard, m, s in zip(
            self.groups, self.shards, self.momenta, self.second, strict=True
        ):
            mine = params[shard.lo : shard.hi]
            if mine:
                moved += self.move(mine, m, s, lr, momentum, weight_decay)
            if shard.world_size > 1:  # the next stack is computed during the transfer
                stack = torch.stack([*mine]) if mine else params[0].new_zeros(0, *params[0].shape)
                coming.append((params, shard, shard.gather(stack)))

        # Copy what the other ranks updated.
        for params, shard, wait in coming:
            whole = wait()
            others = [i for i in range(len(params)) if not shard.lo <= i < shard.hi]
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
        """Update matrices of one shape and return the squared norm of the update.

        Args:
            params: n matrices (r, c).
            m: their momenta (n, r, c), updated in place.
            s: their mean squares by row or column, (n, *row_shape), updated in place.
            lr: learning rate of this step.
            momentum: Muon's momentum of this step.
            weight_decay: weight decay of this step.
        """
        # Nesterov momentum: the gradient is mixed into the running mean a second time.
        grad = torch.stack([p.grad for p in params if p.grad is not None]).float()
        m.lerp_(grad, 1 - momentum)
        grad.lerp_(m, momentum)

        # Orthogonalise, then even out the rows if the config asks for it.
        config = self.config
        update = orthogonalize(
            grad.to(torch.bfloat16) if self.half else grad,
            config.orthogonalize,
            equalize_rows=config.equalize_rows,
            restore_norm=config.restore_norm,
        ).float()
        if config.row_beta2:
            update = even_out(update, s, config.row_beta2)

        # A tall matrix has more outputs than inputs, so the same change per output is a larger step.
        scale = lr * max(1.0, params[0].size(0) / params[0].size(1)) ** 0.5
        for p, u in zip(params, update, strict=True):
            if weight_decay and config.cautious_decay:
                p.sub_(torch.where(u * p >= 0, p, 0.0), alpha=scale * weight_decay)
            elif weight_decay:
                p.mul_(1 - lr * weight_decay)
            p.add_(u, alpha=-scale)
        return float(update.square().sum()) * scale**2


def even_out(update: Tensor, s: Tensor, beta2: float) -> Tensor:
    """Return an update (n, r, c) with rows (or columns) divided by their running root mean square.

    Each matrix keeps its norm. `s` holds the running mean squares and is updated in place.

    Source: NorMuon (Li et al. 2025, algorithm 1), along the longer side as in nanochat.
    """
    dim = 2 if s.size(2) == 1 else 1
    size = update.norm(dim=(1, 2), keepdim=True)
    s.lerp_(update.square().mean(dim=dim, keepdim=True), 1 - beta2)
    update = update / s.clamp(min=1e-10).sqrt()
    update *= size / update.norm(dim=(1, 2), keepdim=True).clamp(min=1e-10)
    return update


def row_shape(p: Tensor) -> tuple[int, int]:
    """Return the shape of the second moment of a matrix: one number per index of its longer side."""
    return (p.size(0), 1) if p.size(0) >= p.size(1) else (1, p.size(1))


@dataclass(frozen=True, kw_only=True)
class AdamRule:
    """AdamW's settings for one kind of parameter."""

    lr: float
    beta1: float = 0.8
    beta2: float = 0.95
    eps: float = 1e-10
    weight_decay: float = 0.0


def adam_rules(config: OptimConfig, width: int) -> dict[str, AdamRule]:
    """Return AdamW's settings for each kind of parameter, in the order of PARAMETER_KINDS.

    Source: nanochat. The learning rates of tables and head were tuned at width 768 and scale by
        (width / 768) ** -0.5.
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
    """Fused AdamW; each rank updates its own rows of a table, and every rank updates the scalars.

    It calls the function `adamw` because creating a `torch.optim.AdamW` loads torch's compiler, which delays
    the first step by seconds.
    """

    def __init__(self, groups: list[tuple[list[nn.Parameter], AdamRule]]) -> None:
        self.groups = groups
        self.params = [p for params, _ in groups for p in params]
        self.shards = [Shard(len(p)) if p.ndim == 2 and len(p) > 1 else None for p in self.params]
        self.mine = {
            p: p.data[shard.lo : shard.hi] if shard and shard.world_size > 1 else p
            for p, shard in zip(self.params, self.shards, strict=True)
        }
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}

    def step(self, ratio: float) -> Callable[[], None]:
        """Update this rank's rows and return a function that waits for the rows of the other ranks."""
        shards = dict(zip(self.params, self.shards, strict=True))
        for params, rule in self.groups:
            # This rank's rows of each gradient; the state is created at the first step.
            ready, grads = [p for p in params if p.grad is not None], []
            for p in ready:
                shard, whole, mine = shards[p], p.grad, self.mine[p]
                assert whole is not None, "only parameters with a gradient are moved"
                grads.append(whole[shard.lo : shard.hi] if shard and mine is not p else whole)
                if p not in self.state:
                    zeros = {key: torch.zeros_like(mine.data) for key in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"step": torch.zeros((), device=p.device), **zeros}

            # One fused call for all parameters of a kind.
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

        # Start to exchange the rows of tables that are spread over the ranks.
        spread = [(p, shard) for p, shard in shards.items() if shard and self.mine[p] is not p]
        coming = [(p, shard.gather(self.mine[p])) for p, shard in spread]

        def wait() -> None:
            for p, whole in coming:
                p.copy_(whole())

        return wait

    def state_dict(self) -> dict[str, Any]:
        """Return AdamW's state for whole tables, gathered from all ranks."""
        whole = {}
        for i, (p, shard) in enumerate(zip(self.params, self.shards, strict=True)):
            found: dict[str, Tensor] = dict(self.state.get(p, {}))
            if self.mine[p] is not p and shard:
                tables = {key: shard.gather(found[key])().clone() for key in found if key != "step"}
                found |= tables
            if found:
                whole[i] = found
        return {"state": whole}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load this rank's rows from a state of whole tables."""
        for i, found in state["state"].items():
            p, shard = self.params[int(i)], self.shards[int(i)]
            rows = slice(shard.lo, shard.hi) if self.mine[p] is not p and shard else slice(None)
            self.state[p] = {
                key: (value if key == "step" else value[rows]).to(
                    p.device, torch.float32, copy=True
                )
                for key, value in found.items()
            }


def make_optimizer(model: GPT, config: OptimConfig) -> Optimizer:
    """Return a new optimizer for a model; it orthogonalises in bfloat16 if the model computes in it."""
    half = model.compute_dtype == torch.bfloat16
    return Optimizer(model, config, model.config.n_embd, half=half)


class Optimizer:
    """Muon and AdamW under one learning-rate schedule; `step` takes the ratio of the schedule."""

    def __init__(
        self, model: nn.Module, config: OptimConfig, width: int, half: bool = False
    ) -> None:
        """Sort the trainable parameters of a model by kind.

        Args:
            model: the parameters with `requires_grad` are optimised.
            config: learning rates, momenta and weight decay.
            width: n_embd of the model, with which the learning rates of tables and head scale.
            half: orthogonalise in bfloat16.

        Raises:
            LookupError: a trainable parameter is of no known kind.
        """
        self.config = config
        kinds: dict[str, list[nn.Parameter]] = {kind: [] for kind in PARAMETER_KINDS}
        for name, p in model.named_parameters():
            if p.requires_grad:
                kinds[parameter_kind(name)].append(p)
        self.params = [p for group in kinds.values() for p in group]
        self.muon = Muon(kinds["matrix"], half, config)
        rules = adam_rules(config, width)
        self.adam = Adam([(kinds[kind], rule) for kind, rule in rules.items() if kinds[kind]])

    @torch.no_grad()
    def step(self, ratio: float, momentum: float, decay_ratio: float = 1.0) -> tuple[float, float]:
        """Update every parameter, drop the gradients, and return the norms of gradient and update.

        Args:
            ratio: learning rates of this step, as a share of their peaks.
            momentum: Muon's momentum of this step.
            decay_ratio: weight decay of the matrices, as a share of its peak.

        Returns:
            The norm of the gradient before clipping, and the norm of the update of the matrices.
        """
        # Clip the gradient by its norm over all parameters.
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if self.config.grad_clip and norm > self.config.grad_clip:
            torch._foreach_mul_(grads, self.config.grad_clip / norm)

        # Muon computes while AdamW's rows are exchanged between ranks.
        wait = self.adam.step(ratio)
        moved = self.muon.step(
            self.config.matrix_lr * ratio, momentum, self.config.weight_decay * decay_ratio
        )
        wait()
        for p in self.params:
            p.grad = None
        return norm, moved**0.5

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state that the next step depends on, as plain containers of tensors.

        With several ranks, all of them must call this; the tensors are then copies.
        """
        parts = zip(self.muon.shards, self.muon.momenta, self.muon.second, strict=True)
        whole = [(shard.gather(m)(), shard.gather(s)()) for shard, m, s in parts]
        return {
            "adam": self.adam.state_dict(),
            "momenta": [m for m, _ in whole],
            "second": [s for _, s in whole],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state returned by `state_dict`, on any number of ranks."""
        self.adam.load_state_dict(state["adam"])
        for mine, theirs in (
            (self.muon.momenta, state["momenta"]),
            (self.muon.second, state["second"]),
        ):
            for shard, a, b in zip(self.muon.shards, mine, theirs, strict=True):
                a.copy_(b[shard.lo : shard.hi])
