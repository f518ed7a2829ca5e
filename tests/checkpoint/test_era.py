"""Architectures are told apart, in-between eras refused by name, sizes bounded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from primechat.checkpoint.nanochat_format import detect_era, encode_model
from primechat.config import GPTConfig
from primechat.config.model import list_shapes
from primechat.errors import CheckpointError
from primechat.files.weights import inspect_model
from primechat.model.gpt import GPT

NANOCHAT = Path(__file__).parents[1] / "fixtures" / "nanochat"
SIZES = dict(sequence_len=64, vocab_size=100, n_layer=3, n_head=4, n_kv_head=2, n_embd=64)
SWITCHES = dict(
    value_embeddings=True,
    residual_scalars=True,
    smear=True,
    backout=True,
    qk_gain=1.2,
    rope_base=1e5,
)
MODERN = GPTConfig(**SIZES, **SWITCHES, rope_dtype="compute", window_pattern="L", vocab_multiple=64)  # type: ignore[arg-type]
CLASSIC = GPTConfig(**SIZES)


def nanochat_meta(**changes: Any) -> dict[str, Any]:
    """Return metadata as nanochat writes it."""
    return {"model_config": {**SIZES, **changes}}


@pytest.mark.parametrize(
    "folder, config",
    [
        ("oct2025/base_checkpoints/d2", dict(n_layer=2)),
        ("oct2025/base_checkpoints/d2-compiled", dict(n_layer=2)),
        ("head/base_checkpoints/d2", dict(n_layer=2, window_pattern="SSL")),
        ("head/base_checkpoints/d2-compiled", dict(n_layer=2, window_pattern="SSL")),
        ("head_d3/base_checkpoints/d3", dict(n_layer=3, window_pattern="SSL")),
    ],
)
def test_fixtures_are_told_apart(folder: str, config: dict[str, Any]) -> None:
    base = CLASSIC if folder.startswith("oct") else MODERN
    expected = dataclasses.replace(base, sequence_len=256, vocab_size=600, **config)
    path = NANOCHAT / folder
    specs = inspect_model(path / "model_000010.pt")
    meta = json.loads((path / "meta_000010.json").read_text())
    found = detect_era({key: spec.shape for key, spec in specs.items()}, meta)
    assert found == expected
    assert found.architecture == ("classic" if base is CLASSIC else "modern")
    assert found.n_params == sum(GPT(found).get_parameter(key).numel() for key in specs)


def test_missing_window_is_long() -> None:
    assert detect_era(list_shapes(MODERN), nanochat_meta()) == MODERN
    assert detect_era(list_shapes(CLASSIC), nanochat_meta()) == CLASSIC
    assert (
        detect_era(list_shapes(MODERN), nanochat_meta(window_pattern="sL")).window_pattern == "SL"
    )


@pytest.mark.parametrize("switch", ["", "value_embeddings", "residual_scalars", "smear", "backout"])
def test_shapes_are_the_models(switch: str) -> None:
    for config in (CLASSIC, MODERN):
        config = dataclasses.replace(
            config, **({switch: not getattr(config, switch)} if switch else {})
        )
        assert list_shapes(config) == {
            key: tuple(t.shape) for key, t in GPT(config).state_dict().items()
        }
        meta = json.loads(json.dumps(encode_model(config)))
        assert detect_era(list_shapes(config), meta) == config
        names = {*SIZES, "window_pattern"}
        assert set(meta["model_config"]) <= names, "nanochat's own loader takes no other names"


@pytest.mark.parametrize(
    "gone",
    [
        "resid_lambdas",
        "x0_lambdas",
        "smear_gate",
        "smear_lambda",
        "backout",
        "value_emb",
        "ve_gate",
    ],
)
def test_era_between_is_named(gone: str) -> None:
    shapes = {key: shape for key, shape in list_shapes(MODERN).items() if gone not in key}
    with pytest.raises(
        CheckpointError, match=rf"between.*they have .*they lack {gone}\w*; the formulas"
    ):
        detect_era(shapes, nanochat_meta())


def test_other_traces_of_an_era() -> None:
    gates = {k: (2, 32) if "ve_gate" in k else shape for k, shape in list_shapes(MODERN).items()}
    with pytest.raises(CheckpointError, match="between.*gates of 32 channels"):
        detect_era(gates, nanochat_meta())
    with pytest.raises(CheckpointError, match="between.*window_pattern"):
        detect_era(list_shapes(CLASSIC), nanochat_meta(window_pattern="SSSL"))
    padded = list_shapes(dataclasses.replace(CLASSIC, vocab_multiple=64))
    with pytest.raises(CheckpointError, match="between.*padded to 128 rows"):
        detect_era(padded, nanochat_meta())


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("config", [CLASSIC, MODERN])
def test_keys_and_shapes_must_agree(config: GPTConfig, ours: bool) -> None:
    meta, shapes = encode_model(config) if ours else nanochat_meta(), list_shapes(config)
    key = "transformer.h.1.mlp.c_fc.weight"
    with pytest.raises(CheckpointError, match=f"lack {key} and have nothing"):
        detect_era({k: shape for k, shape in shapes.items() if k != key}, meta)
    with pytest.raises(CheckpointError, match="lack nothing and have surprise"):
        detect_era({**shapes, "surprise": (1,)}, meta)
    with pytest.raises(CheckpointError, match=rf"{key} of shape \(64, 256\).*\(256, 64\)"):
        detect_era({**shapes, key: (64, 256)}, meta)
    with pytest.raises(CheckpointError, match="n_layer=3"):
        detect_era(list_shapes(dataclasses.replace(config, n_layer=5)), meta)
    other = json.loads(json.dumps(meta).replace('"n_embd": 64', '"n_embd": 128'))
    with pytest.raises(
        CheckpointError, match=r"wte.weight of shape \(\d+, 64\), the metadata asks"
    ):
        detect_era(shapes, other)


@pytest.mark.parametrize(
    "name, value",
    [
        ("vocab_size", 10**12),
        ("n_layer", 10**9),
        ("n_embd", 2**40),
        ("sequence_len", 2**62),
        ("n_head", 0),
        ("n_layer", -1),
        ("vocab_size", True),
        ("n_embd", 64.0),
        ("n_embd", "64"),
        ("n_kv_head", None),
        ("vocab_size", [1]),
    ],
)
def test_absurd_sizes_are_refused(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"{name}=.* must be a whole number from 1"):
        detect_era(list_shapes(CLASSIC), nanochat_meta(**{name: value}))
    meta = encode_model(CLASSIC)
    with pytest.raises(CheckpointError, match=name):
        detect_era(
            list_shapes(CLASSIC), {**meta, "gpt_config": {**meta["gpt_config"], name: value}}
        )


def test_other_bounds() -> None:
    with pytest.raises(CheckpointError, match="rotary table"):
        detect_era(list_shapes(CLASSIC), nanochat_meta(sequence_len=2**20, n_embd=65_536))
    with pytest.raises(CheckpointError, match="n_head"):
        detect_era(list_shapes(CLASSIC), nanochat_meta(n_head=5))
    with pytest.raises(CheckpointError, match="no model_config"):
        detect_era(list_shapes(CLASSIC), {"model_config": []})
    for change in (
        {"vocab_multiple": 10**9},
        {"unknown": 1},
        {"rope_dtype": "int3"},
        {"qk_gain": "big"},
    ):
        meta = encode_model(CLASSIC)
        with pytest.raises(CheckpointError, match="metadata"):
            detect_era(
                list_shapes(CLASSIC), {**meta, "gpt_config": {**meta["gpt_config"], **change}}
            )
    with pytest.raises(CheckpointError, match="gpt_config"):
        detect_era(list_shapes(CLASSIC), {**encode_model(CLASSIC), "gpt_config": [1]})
