"""Settings of the optimizer: learning rates, betas, weight decay, variants of Muon, and schedules.

Each kind of parameter has its own learning rate; `PARAMETER_KINDS` in train/optim.py lists which parameter is
of which kind. The defaults are ours, for small runs; nanochat's are in recipes.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from primechat.config.runtime import check_choice, check_number
from primechat.errors import ConfigError

ORTHOGONALIZE = ("polar-damped", "polar-express", "newton-schulz")
DECAY_SCHEDULES = ("rate", "cosine")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Muon for the matrices of the blocks and AdamW for everything else, under one schedule.

    Learning rates are peak values; those of embeddings and output head are for width 768 and are scaled by
    (width / 768) ** -0.5.
    """

    matrix_lr: float = 0.02
    """Muon's learning rate, for the matrices of the blocks."""
    embedding_lr: float = 0.3
    """AdamW's learning rate of the token embedding."""
    value_embedding_ratio: float = 1.0
    """Learning rate of the value embeddings, as a multiple of `embedding_lr`."""
    unembedding_lr: float = 0.004
    """AdamW's learning rate of the output head."""
    residual_lr: float = 0.005
    """AdamW's learning rate of each layer's factor on the residual stream."""
    x0_lr: float = 0.005
    """AdamW's learning rate of each layer's share of the first embedding."""
    smear_lr: float = 0.005
    """AdamW's learning rate of the smear's gate and strength and of the backout's strength."""
    added_lr: float = 0.005
    """AdamW's learning rate of what stands beside the model: adapters, projectors."""

    adam_beta1: float = 0.8
    """AdamW's decay of the mean gradient, per step."""
    x0_beta1: float = 0.8
    """The same, for each layer's share of the first embedding."""
    adam_beta2: float = 0.95
    """AdamW's decay of the mean squared gradient, per step, for scalars, gates and adapters."""
    embedding_beta2: float = 0.95
    """The same, for token and value embeddings."""
    unembedding_beta2: float = 0.95
    """The same, for the output head."""
    adam_eps: float = 1e-10
    """Added to the root of AdamW's mean squared gradient."""

    embedding_decay: float = 0.0
    """Decoupled weight decay of the token embedding, times its learning rate."""
    value_embedding_decay: float = 0.0
    """Decoupled weight decay of the value embeddings, times their learning rate."""
    unembedding_decay: float = 0.0
    """Decoupled weight decay of the output head, times its learning rate."""
    residual_decay: float = 0.0
    """Decoupled weight decay of the factors on the residual stream, times their learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the matrices, times their learning rate and `decay_schedule`."""
    cautious_decay: bool = False
    """Decay a weight only where the step moves it towards 0 as well, at the matrix's own rate, its shape
    factor included.
    """
    decay_schedule: str = "rate"
    """How the matrices' weight decay falls: rate (with the learning rate's schedule) or cosine (to 0 at the
    last step).
    """

    orthogonalize: str = "polar-damped"
    """Muon's iteration: polar-damped (ours), polar-express (nanochat's of 2026), newton-schulz (of 2025)."""
    equalize_rows: bool = False
    """Bring all rows of a step to one length before it is orthogonalised (MuonEq)."""
    restore_norm: bool = False
    """Set the norm of an orthogonalised step to that of an exactly orthogonal one (Muon+)."""
    row_beta2: float = 0.95
    """Decay of the mean square by which rows, or columns, of a step are evened out (NorMuon); 0 is off."""
    momentum: float = 0.95
    """Muon's momentum, after it has risen."""
    momentum_start: float = 0.85
    """Muon's momentum at the first step."""
    momentum_steps: int = 300
    """Steps in which the momentum rises."""
    momentum_share: float = 0.25
    """Largest share of the run in which it rises; 0 sets no limit."""
    momentum_end: float = 0.0
    """Muon's momentum at the end of the run, reached while the learning rate falls; 0 leaves it alone."""

    grad_clip: float = 0.0
    """Largest norm of the gradient; 0 leaves it alone."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises from 0; 0 takes `warmup_ratio`."""
    warmup_ratio: float = 0.0
    """Share of the steps in which the learning rate rises from 0."""
    warmdown_ratio: float = 0.5
    """Share of the steps, at the end, in which it falls."""
    whole_steps: bool = False
    """Round the steps in which it falls to a whole number, as nanochat does."""
    final_lr_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        for name in RATES:
            check_number(f"optim.{name}", getattr(self, name), low=0)
        for name in SHARES:
            check_number(f"optim.{name}", getattr(self, name), low=0, high=1)
        for name in BETAS:  # at 1 the mean would never change
            check_number(f"optim.{name}", getattr(self, name), low=0, high=0.999999)
        for name in ("momentum_steps", "warmup_steps"):
            check_number(f"optim.{name}", getattr(self, name), low=0, whole=True)
        check_choice("optim.orthogonalize", self.orthogonalize, ORTHOGONALIZE)
        check_choice("optim.decay_schedule", self.decay_schedule, DECAY_SCHEDULES)
        if self.warmup_ratio + self.warmdown_ratio > 1:
            raise ConfigError(
                f"optim.warmup_ratio={self.warmup_ratio} and warmdown_ratio={self.warmdown_ratio} must sum "
                "to at most 1; lower one of them."
            )
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError(
                f"optim.warmup_steps={self.warmup_steps} and warmup_ratio={self.warmup_ratio} name the "
                "same thing; set one of them to 0."
            )


RATES = (
    "matrix_lr",
    "embedding_lr",
    "value_embedding_ratio",
    "unembedding_lr",
    "residual_lr",
    "x0_lr",
    "smear_lr",
    "added_lr",
    "adam_eps",
    "embedding_decay",
    "value_embedding_decay",
    "unembedding_decay",
    "residual_decay",
    "weight_decay",
    "grad_clip",
)
SHARES = (
    "momentum",
    "momentum_start",
    "momentum_share",
    "momentum_end",
    "warmup_ratio",
    "warmdown_ratio",
    "final_lr_ratio",
)
BETAS = (
    "adam_beta1",
    "x0_beta1",
    "adam_beta2",
    "embedding_beta2",
    "unembedding_beta2",
    "row_beta2",
)
