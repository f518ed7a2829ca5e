"""The models in data/: small, whole, opened by their names, and as good as their card says."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

import primechat as pc
from primechat.checkpoint import registry
from primechat.config import (
    EvaluateConfig,
    GPTConfig,
    PretrainConfig,
    RuntimeConfig,
    TokenizerConfig,
    decode_config,
)
from primechat.stages.pretrain import find_shipped
from primechat.text.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parents[2] / "data"
CARD = DATA / "README.md"
LIMIT_BYTES = 25e6  # base and chat together
TOLERANCE = 2e-3  # bits per byte: another CPU rounds otherwise


def read_card(name: str) -> float:
    """Return the bits per byte that the card's table gives a model."""
    row = re.search(
        rf"^\| `{re.escape(name)}` \|.*?\| ([0-9.]+) \|", CARD.read_text(encoding="utf-8"), re.M
    )
    assert row, f"the card has no row for {name}"
    return float(row[1])


def test_small_and_listed() -> None:
    entries = {entry.identifier: entry for entry in registry.list_models() if entry.shipped}
    pair = [entry for entry in entries.values() if entry.tag == "d4"]
    assert {entry.family for entry in pair} == {"base", "sft"}
    assert sum(entry.n_bytes for entry in pair) < LIMIT_BYTES
    assert all(entry.architecture == "modern" for entry in entries.values())
    lapse = next(entry for entry in entries.values() if entry.tag == "timelapse")
    assert len(lapse.snapshots) >= 5 and lapse.snapshots[0] == 0
    assert len({entry.tokenizer_identity for entry in entries.values()}) == 1


def test_what_stands_in_where_nothing_is_trained() -> None:
    model, tokenizer, meta = pc.open_model()
    assert (
        meta["identifier"] == "shipped/sft"
        and tokenizer.vocab_size == model.config.vocab_size == 2048
    )
    reply = pc.Engine(model, tokenizer).chat(
        [{"role": "user", "content": "Hi! How are you?"}], max_new_tokens=40, temperature=0.0
    )
    assert re.search(r"[a-z]{2,}", reply.read()), "it answers in letters"


def test_metadata_names_no_machine() -> None:
    for path in DATA.rglob("meta_*.json"):
        meta = json.loads(path.read_text(encoding="utf-8"))
        paths = [
            v for v in meta["user_config"].values() if isinstance(v, str) and v.startswith("/")
        ]
        assert not paths, path
        if meta["user_config"]["class"] == "PretrainConfig":
            assert isinstance(
                decode_config(meta["user_config"], PretrainConfig, str(path)), PretrainConfig
            )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shipped/base", "shipped/sft"])
def test_bits_per_byte_are_those_of_the_card(name: str) -> None:
    runtime = RuntimeConfig(device="cpu", dtype="float32", threads=1)
    result = pc.evaluate(EvaluateConfig(model=name, runtime=runtime))
    assert result.scored_bytes == 699_021 and result.bpb == pytest.approx(
        read_card(name), abs=TOLERANCE
    )


def test_shipped_tokenizer_is_what_training_gives(base_dir: Path) -> None:
    """So a first run on the text that ships takes it, instead of training the very same again."""
    made = pc.train_tokenizer(TokenizerConfig(tag="again", corpus="chitchat", vocab_size=2048))
    config = PretrainConfig(
        tag="new", model=GPTConfig.modern(1, vocab_size=2048, sequence_len=64, head_dim=64)
    )
    found = find_shipped(config)
    assert found and Tokenizer.load(found).identity == made.identity
    larger = GPTConfig.modern(1, vocab_size=2112, sequence_len=64, head_dim=64)
    assert find_shipped(replace(config, model=larger)) is None
