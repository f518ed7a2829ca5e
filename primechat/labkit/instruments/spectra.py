"""Is a change of low rank? The singular values of what training added to one matrix, beside two controls.

Muon orthogonalises each of its steps: all directions get the same size, so its changes look like random ones
whatever the task needs. AdamW does not, so the same training by AdamW stands beside it, and random numbers.
Reference: Jordan et al. 2024 (Muon); Hu et al. 2021, section 7 (the rank that a change needs).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from primechat.config import FinetuneConfig
from primechat.labkit.instruments.series import SeriesConfig
from primechat.labkit.lab import borrow_model
from primechat.model.gpt import GPT
from primechat.model.lora import weight_changes

PATH = "transformer.h.0.mlp.c_fc"
ADAMW_LR = 3e-4
N_SHOWN = 64  # singular values that are drawn
_tuned: dict[SeriesConfig, Tensor] = {}

Points = list[tuple[float, float]]


def add_up(change: Tensor, n: int = N_SHOWN) -> Points:
    """Return (k, percent) for k = 1..n: how much of a matrix its k largest singular values hold, as a share
    of the sum of all squares, which is that of the squares of its entries.

    >>> add_up(torch.diag(torch.tensor([3.0, 1.0])))
    [(1.0, 90.0), (2.0, 100.0)]
    """
    squares = torch.linalg.svdvals(change.detach().double()).square()
    shares = 100 * squares.cumsum(0) / squares.sum()
    return [(float(k), round(float(share), 6)) for k, share in enumerate(shares[:n], start=1)]


def tune_by_adamw(model: GPT, batches: Sequence[tuple[Tensor, Tensor]], path: str = PATH) -> Tensor:
    """Return what full fine-tuning by AdamW adds to one matrix; the model itself stays as it is.

    Args:
        model: where the training starts.
        batches: ids and targets (R, T) of each step, -1 where nothing is learned.
        path: of the matrix, without `.weight`.
    """
    state = {name: p.detach().float().clone() for name, p in model.state_dict().items()}
    pupil = GPT.from_state(model.config, state).requires_grad_(True)
    before = pupil.get_parameter(f"{path}.weight").detach().clone()

    optimizer = torch.optim.AdamW(pupil.parameters(), lr=ADAMW_LR, weight_decay=0.0)
    for ids, targets in batches:
        pupil.loss(ids, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return pupil.get_parameter(f"{path}.weight").detach() - before


def repeat_by_adamw(config: SeriesConfig) -> Tensor:
    """Return what AdamW adds in the place of a series' full fine-tuning: the same talks, steps and tokens,
    from seed 0; kept for the next call.
    """
    from primechat.stages.finetune import cache_dialogues
    from primechat.text.batches import PackedBatches

    if config not in _tuned:
        model, tokenizer, _ = borrow_model(config.model)
        talks = cache_dialogues(FinetuneConfig(dialogues="style:pirate"), "train", tokenizer)
        T = model.config.sequence_len
        rows = max(1, config.batch_tokens // T)
        batches = PackedBatches(talks, sequence_len=T, rows=rows, seed=0)
        _tuned[config] = tune_by_adamw(model, list(islice(batches, config.steps)))
    return _tuned[config]


def find_spectra(rows: Sequence[dict[str, Any]] | None, config: SeriesConfig) -> dict[str, Points]:
    """Return for the changes of one matrix how much their largest singular values hold, as `add_up` does: of
    the widest adapter of a series, of full fine-tuning by Muon and by AdamW, and of random numbers.
    """
    found = {row["name"]: row["identifier"] for row in rows or ()}
    ranks = sorted((name for name in found if name.isdigit()), key=int)
    if not ranks or "full" not in found:
        return {}
    adapted, full, plain = (
        borrow_model(name)[0] for name in (found[ranks[-1]], found["full"], config.model)
    )
    added = full.get_parameter(f"{PATH}.weight") - plain.get_parameter(f"{PATH}.weight")
    noise = torch.randn(added.shape, generator=torch.Generator().manual_seed(0))
    return {
        f"adapter, rank {ranks[-1]}": add_up(weight_changes(adapted)[PATH]),
        "full, by AdamW": add_up(repeat_by_adamw(config)),
        "full, by Muon": add_up(added),
        "random numbers": add_up(noise),
    }
