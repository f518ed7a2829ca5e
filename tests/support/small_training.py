"""A small corpus with its tokenizer, and the settings of a training on it that takes about a second."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

from primechat.config import EvalConfig, GPTConfig, PretrainConfig, RuntimeConfig, TokenizerConfig
from primechat.stages.tokenizer import train_tokenizer

STEPS = 12


def make_corpus(folder: Path) -> Path:
    """Write 40 documents of six words, train the tokenizer `base` on them, and return the file."""
    chance = random.Random(0)
    path = folder / "text.jsonl"
    colours = ["red", "green", "blue", "yellow", "ping", "pong"]
    texts = [" ".join(chance.choice(colours) for _ in range(80)) for _ in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(TokenizerConfig(corpus=str(path), vocab_size=280))
    return path


def make_config(corpus: Path, steps: int = STEPS) -> PretrainConfig:
    shape = GPTConfig.modern(2, vocab_size=280, sequence_len=16, head_dim=8)
    return PretrainConfig(
        tag="tiny",
        model=replace(shape, n_embd=32, n_head=2, n_kv_head=2),
        corpus=str(corpus),
        batch_tokens=64,
        steps=steps,
        eval=EvalConfig(every=4, tokens=64, last_tokens=64),
        runtime=RuntimeConfig(
            device="cpu", dtype="float32", threads=1, compile="off", micro_batch_rows=2
        ),
    )
