"""How much of the validation text a run scores: chosen once, before its first step, from the measured speed.

The validations along a run may take a tenth of its training time altogether, the last one a quarter. The
number of tokens comes from a ladder, so that runs of about the same length score the same tokens; larger
parts of the text hold the smaller ones (text.batches.validation_windows).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from primechat.config import EvalConfig

LADDER = (4_000, 20_000, 100_000, 400_000)  # tokens; beyond it comes the whole split
RUN_SHARE, LAST_SHARE = 0.1, 0.25  # of the training time
MOST_EVALS = 10  # along a run, the one before its first step included
CHOSEN = -1  # the tokens of a validation are to be chosen


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a validation takes: seconds of a scored token, and seconds whatever is scored."""

    token_s: float
    fixed_s: float = 0.0


def plan_evals(
    evaluation: EvalConfig, *, steps: int, train_s: float, cost: Cost, whole: int
) -> tuple[EvalConfig, int]:
    """Return the settings with the tokens of the validations chosen, and how many the run makes.

    A short run is looked at less often; what was set by hand stays.

    Args:
        steps: Optimizer steps of the run.
        train_s: Seconds of training that the run takes.
        cost: What a validation takes, all ranks together.
        whole: Tokens of the whole validation split.
    """
    n_evals = math.ceil(steps / evaluation.every) if evaluation.every else min(MOST_EVALS, steps)
    spare_s = RUN_SHARE * train_s
    chosen = evaluation
    if evaluation.tokens == CHOSEN:
        if not evaluation.every:
            smallest_s = cost.fixed_s + cost.token_s * min(LADDER[0], whole)
            n_evals = max(1, min(n_evals, int(spare_s / smallest_s))) if smallest_s else n_evals
        affordable = (spare_s / n_evals - cost.fixed_s) / cost.token_s
        chosen = replace(chosen, tokens=choose_tokens(affordable, whole))
    if evaluation.last_tokens == CHOSEN:
        affordable = (LAST_SHARE * train_s - cost.fixed_s) / cost.token_s
        chosen = replace(chosen, last_tokens=choose_tokens(affordable, whole))
    return chosen, n_evals


def choose_tokens(affordable: float, whole: int) -> int:
    """Return the highest rung of the ladder that is affordable, at least the lowest; 0 is the whole split.

    >>> [choose_tokens(n, 250_000) for n in (10, 25_000, 240_000, 250_000)]
    [4000, 20000, 100000, 0]
    """
    rung = max((rung for rung in LADDER if rung <= affordable), default=LADDER[0])
    return 0 if rung < whole <= affordable else rung
