"""The optimizer: Muon for the matrices of the blocks, fused AdamW for embeddings, head and scalars.

Hides: which parameter gets which rule. Reference: Jordan et al. 2024 (Muon); Amsel et al. 2025 (Polar
Express); Li et al. 2025 (NorMuon); learning rates and their scaling by width as in nanochat. With several
ranks each keeps the state of its share alone, moves that share, and gets the others' while it computes;
`state_dict` is whole all the same, so that a run can resume on another number of ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from primechat.config import OptimConfig
from primechat.train.parallel import Share, sum_numbers

# Polar Express, Amsel et al. 2025, degree 5, five steps, for singular values from 1e-3 to 1. All but the last
# are damped, as there: bfloat16 rounds a value of 1 up, and beyond 1 each step makes it much larger still.
DAMPING = 1.02
EXACT_STEPS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
POLAR_STEPS = [(a / DAMPING, b / DAMPING**3, c / DAMPING**5) for a, b, c in EXACT_STEPS[:-1]]
POLAR_STEPS += EXACT_STEPS[-1:]
SCALARS = ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda", "smear_gate")


def orthogonalize(stack: Tensor) -> Tensor:
    """Return for each matrix of (n, r, c) the nearest one with singular values near 1, within about 0.15.

    Source: Polar Express (Amsel et al. 2025): X <- aX + (bA + cA^2)X with A = XX^T, from X / |X|.
    """
    tall = stack.size(1) > stack.size(2)
    x = stack.mT if tall else stack
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in POLAR_STEPS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon:
    """Momentum, then orthogonalisation, for matrices; those of one shape are handled as one stack."""

    def __init__(self, params: list[nn.Parameter], half: bool) -> None:
        groups: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for p in params:
            groups[tuple(p.shape)].append(p)
        self.groups = [groups[shape] for shape in sorted(groups)]
        self.half = half
        self.shares = [Share(len(g)) for g in self.groups]
        pairs = [(s.hi - s.lo, g[0]) for s, g in zip(self.shares, self.groups, strict=True)]
        self.momenta = [torch.zeros(n, *p.shape, device=p.device) for n, p in pairs]
        self.second = [torch.zeros(n, *row_shape(p), device=p.device) for n, p in pairs]

    def step(self, lr: float, momentum: float, weight_decay: float, beta2: float = 0.95) -> float:
        """Move all matrices by one step; return the squared norm of the move."""
        moved, coming = 0.0, []
        for params, share, m, s in zip(
            self.groups, self.shares, self.momenta, self.second, strict=True
        ):
            mine = params[share.lo : share.hi]
            if mine:
                moved += self.move(mine, m, s, lr, momentum, weight_decay, beta2)
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
        beta2: float,
    ) -> float:
        """Move matrices of one shape; return the squared norm of the move."""
        grad = torch.stack([p.grad for p in params if p.grad is not None]).float()
        m.lerp_(grad, 1 - momentum)
        grad.lerp_(m, momentum)  # Nesterov
        update = orthogonalize(grad.to(torch.bfloat16) if self.half else grad).float()
        # NorMuon: even out the rows by a running mean square, at the same total norm
        dim = 2 if s.size(2) == 1 else 1
        size = update.norm(dim=(1, 2), keepdim=True)
        s.lerp_(update.square().mean(dim=dim, keepdim=True), 1 - beta2)
        update = update / s.clamp(min=1e-10).sqrt()
        update *= size / update.norm(dim=(1, 2), keepdim=True).clamp(min=1e-10)
        scale = lr * max(1.0, params[0].size(0) / params[0].size(1)) ** 0.5
        for p, u in zip(params, update, strict=True):
            if weight_decay:
                p.mul_(1 - lr * weight_decay)
            p.add_(u, alpha=-scale)
        return float(update.square().sum()) * scale**2


def row_shape(p: Tensor) -> tuple[int, int]:
    """Return the shape of a second moment with one number along the longer side of a matrix."""
    return (p.size(0), 1) if p.size(0) >= p.size(1) else (1, p.size(1))


class Adam:
    """Fused AdamW; of a table each rank keeps and moves its rows, scalars are moved on every rank.

    Its function and not `torch.optim.AdamW`: making one of those loads torch's compiler, which takes seconds
    of the time before a first step.
    """

    def __init__(self, groups: list[tuple[list[nn.Parameter], float]]) -> None:
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
        for params, peak in self.groups:
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
                    beta1=0.8,
                    beta2=0.95,
                    lr=peak * ratio,
                    weight_decay=0.0,
                    eps=1e-10,
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
        self.config = config
        by_width = (width / 768) ** -0.5
        kinds: dict[str, list[nn.Parameter]] = {
            "matrix": [],
            "embedding": [],
            "head": [],
            "scalar": [],
            "added": [],
        }
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            if ".adapter." in name or name.startswith("projector"):
                kinds["added"].append(p)
            elif name.startswith(SCALARS):
                kinds["scalar"].append(p)
            elif name.startswith("lm_head"):
                kinds["head"].append(p)
            else:
                kinds["matrix" if ".h." in name else "embedding"].append(p)
        self.params = [p for group in kinds.values() for p in group]
        self.muon = Muon(kinds["matrix"], half)
        rates = {
            "embedding": config.embedding_lr * by_width,
            "head": config.unembedding_lr * by_width,
            "scalar": config.scalar_lr * 0.01,
            "added": config.added_lr,
        }
        self.adam = Adam([(kinds[k], lr) for k, lr in rates.items() if kinds[k]])

    @torch.no_grad()
    def step(self, ratio: float, momentum: float) -> tuple[float, float]:
        """Move every parameter, each by `ratio` of its peak learning rate, and drop the gradients; return the
        gradient's norm before clipping, and the norm of the matrices' move.
        """
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(grads))
        if self.config.grad_clip and norm > self.config.grad_clip:
            torch._foreach_mul_(grads, self.config.grad_clip / norm)
        wait = self.adam.step(ratio)
        moved = self.muon.step(
            self.config.matrix_lr * ratio, momentum, self.config.weight_decay * ratio
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
