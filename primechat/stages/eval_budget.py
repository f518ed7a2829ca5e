"""How much validation text a run scores: chosen once, before its first step, from the measured speed.

All validations during a run may take a tenth of its training time, and the last one a quarter. The number of
tokens comes from a ladder, so that runs of about the same length score the same tokens; a larger part of the
text contains the smaller ones (text.batches.validation_windows).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from primechat.config import EvalConfig

LADDER = (4_000, 20_000, 100_000, 400_000)  # tokens; above the last rung, the whole split
RUN_SHARE, LAST_SHARE = 0.1, 0.25  # of the training time
MOST_EVALS = 10  # per run, including the one before its first step
CHOSEN = -1  # marks a number of validation tokens that is still to be chosen


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a validation: seconds per scored token, and fixed seconds per validation."""

    token_s: float
    fixed_s: float = 0.0


def plan_evals(
    evaluation: EvalConfig, *, steps: int, train_s: float, cost: Cost, whole: int
) -> tuple[EvalConfig, int]:
    """Return the settings with the tokens per validation chosen, and the number of validations.

    A short run is validated less often; settings made by hand are kept.

    Args:
        evaluation: Settings in which the tokens may be CHOSEN.
        steps: Optimizer steps of the run.
        train_s: Training time of the run in seconds.
        cost: Cost of a validation on all ranks together.
        whole: Tokens of the whole validation split.
    """
    n_evals = math.ceil(steps / evaluation.every) if evaluation.every else min(MOST_EVALS, steps)
    spare_s = RUN_SHARE * train_s
    chosen = evaluation

    # Validations during the run: if not even the smallest fit, there are fewer of them.
    if evaluation.tokens == CHOSEN:
        if not evaluation.every:
            smallest_s = cost.fixed_s + cost.token_s * min(LADDER[0], whole)
            n_evals = max(1, min(n_evals, int(spare_s / smallest_s))) if smallest_s else n_evals
        affordable = (spare_s / n_evals - cost.fixed_s) / cost.token_s
        chosen = replace(chosen, tokens=choose_tokens(affordable, whole))

    # The last one.
    if evaluation.last_tokens == CHOSEN:
        affordable = (LAST_SHARE * train_s - cost.fixed_s) / cost.token_s
        chosen = replace(chosen, last_tokens=choose_tokens(affordable, whole))
    return chosen, n_evals


def choose_tokens(affordable: float, whole: int) -> int:
    """Return the highest affordable rung of the ladder, at least the lowest; 0 means the whole split.

    >>> [choose_tokens(n, 250_000) for n in (10, 25_000, 240_000, 250_000)]
    [4000, 20000, 100000, 0]
    """
    rung = max((rung for rung in LADDER if rung <= affordable), default=LADDER[0])
    return 0 if rung < whole <= affordable else rung
