"""Check a device against the CPU: `python tests/support/device_main.py mps`.

The model that ships must give the same logits and losses there as on the CPU and write the same greedy
reply, and a few training steps must lower the loss by about as much. Exits with 1 and a sentence at the
first difference.
"""

from __future__ import annotations

import itertools
import sys

import torch

from primechat import Engine, open_model
from primechat.config import OptimConfig
from primechat.train.loop import fit
from primechat.train.optim import Optimizer

MODEL = "shipped/sft"
TEXT = "A: Hi! How was your day?\nB: It was fine, thank you. And yours?\nA: "
# float32 sums in another order; the logits lie between -15 and 15.
LOGITS_WITHIN = 1e-2
LOSS_WITHIN_NATS = 1e-3
STEPS = 8


def measure(device: str) -> dict[str, torch.Tensor]:
    """Return what the model computes on a device, as float32 tensors on the CPU."""
    model, tokenizer, _ = open_model(MODEL, device=device)
    ids = torch.tensor([tokenizer.encode(TEXT)], device=device)
    with torch.no_grad():
        logits = model(ids)
        loss = model.loss(ids[:, :-1], ids[:, 1:], "mean")

    engine = Engine(model, tokenizer)
    reply = list(engine.generate(tokenizer.encode(TEXT), max_new_tokens=24, temperature=0))

    return {
        "logits": logits.float().cpu(),
        "loss": loss.float().cpu(),
        "reply": torch.tensor(reply),
        "losses of training": torch.tensor(train(device)),
    }


def train(device: str) -> list[float]:
    """Return the losses, in nats, of a few steps on one batch."""
    model, tokenizer, _ = open_model(MODEL, device=device, phase="train")
    ids = torch.tensor([tokenizer.encode(TEXT)], device=device)
    losses: list[float] = []
    fit(
        Optimizer(model, OptimConfig(), model.config.n_embd),
        itertools.repeat((ids[:, :-1], ids[:, 1:])),
        lambda x, y: model.loss(x, y, "sum"),
        steps=STEPS,
        micro_batch_rows=1,
        device=device,
        on_step=lambda event: losses.append(event.loss_nats),
    )
    return losses


def main(device: str) -> int:
    """Compare a device with the CPU; return the exit code."""
    here, there = measure("cpu"), measure(device)
    within = {
        "logits": LOGITS_WITHIN,
        "loss": LOSS_WITHIN_NATS,
        "reply": 0,
        "losses of training": 0.05,
    }
    for name, most in within.items():
        found = (here[name] - there[name]).abs().max().item()
        print(f"{name}: at most {found:.2g} apart, {most:g} allowed")
        if found > most:
            print(f"{device} computes other {name} than the CPU.")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2] or ["mps"]))
