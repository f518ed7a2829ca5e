"""Settings: what they refuse, how they travel, and the shapes that a depth becomes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
from typing import Any

import pytest

from primechat.config import (
    EvalConfig,
    EvaluateConfig,
    FinetuneConfig,
    GPTConfig,
    InitConfig,
    OptimConfig,
    PretrainConfig,
    QuickstartConfig,
    RuntimeConfig,
    TokenizerConfig,
    decode_config,
    encode_config,
    find_difference,
)
from primechat.errors import ConfigError, PrimechatError

STAGES = [TokenizerConfig, PretrainConfig, FinetuneConfig, EvaluateConfig, QuickstartConfig]
ALL = [*STAGES, GPTConfig, InitConfig, RuntimeConfig, OptimConfig, EvalConfig]
SMALL = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=64, vocab_size=300, sequence_len=32)


@pytest.mark.parametrize("cls", ALL)
def test_config_travels(cls: Any) -> None:
    config = cls()
    assert eval(repr(config), {item.__name__: item for item in ALL}) == config
    assert decode_config(json.loads(json.dumps(encode_config(config))), cls) == config


def test_values_travel_too() -> None:
    config = PretrainConfig(
        tag="mine",
        seconds=2.5,
        model=GPTConfig.classic(2, vocab_size=300, sequence_len=64),
        runtime=RuntimeConfig(device="cpu", threads=3),
        optim=OptimConfig(grad_clip=1),
    )
    again = decode_config(json.loads(json.dumps(encode_config(config))), PretrainConfig)
    assert again == config
    assert again != PretrainConfig()
    assert isinstance(again.optim.grad_clip, float)  # an int in JSON becomes the field's float


@pytest.mark.parametrize("cls", ALL)
def test_configs_are_frozen_and_explained(cls: Any) -> None:
    config = cls()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(cls)[0].name, None)
    with pytest.raises(TypeError):
        cls("positional")
    (definition,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(definition, ast.ClassDef)
    for item, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign):  # tyro shows the string below a field as its help
            explained = isinstance(following, ast.Expr) and isinstance(
                following.value, ast.Constant
            )
            assert explained, (
                f"{ast.unparse(item)} of {cls.__name__} has no string that explains it"
            )


@pytest.mark.parametrize("cls", STAGES)
def test_every_stage_has_tag_and_resume(cls: Any) -> None:
    config = cls()
    assert isinstance(config.tag, str) and config.resume is False


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: GPTConfig(n_embd=770, n_head=6, n_kv_head=6),
            ["model.n_embd=770", "model.n_head=6", "768"],
        ),
        (lambda: GPTConfig(**{**SMALL, "n_layer": 0}), ["model.n_layer=0", "from 1 to 256"]),
        (lambda: GPTConfig(**{**SMALL, "n_layer": True}), ["model.n_layer=True"]),
        (lambda: GPTConfig(**{**SMALL, "vocab_size": 300.0}), ["model.vocab_size=300.0"]),
        (lambda: GPTConfig(**{**SMALL, "n_kv_head": 3}), ["model.n_kv_head=3", "model.n_head=4"]),
        (lambda: GPTConfig(**{**SMALL, "n_embd": 12}), ["=3", "even"]),
        (lambda: GPTConfig(**SMALL, window_pattern="SXL"), ["'SXL'", "SSSL"]),
        (lambda: GPTConfig(**SMALL, rope_dtype="float16"), ["'float16'", "compute"]),
        (lambda: GPTConfig(**SMALL, logit_softcap=-1.0), ["-1.0"]),
        (lambda: GPTConfig(**SMALL, logit_softcap=90.0), ["90.0", "70"]),
        (lambda: GPTConfig.classic(0), ["depth=0"]),
        (lambda: GPTConfig.modern(True), ["depth=True"]),
        (lambda: RuntimeConfig(device="tpu"), ["runtime.device='tpu'", "mps", "auto"]),
        (lambda: RuntimeConfig(dtype="float16"), ["runtime.dtype='float16'", "bfloat16"]),
        (lambda: RuntimeConfig(threads=-1), ["runtime.threads=-1"]),
        (lambda: OptimConfig(matrix_lr=-0.1), ["optim.matrix_lr=-0.1"]),
        (lambda: OptimConfig(matrix_lr=float("nan")), ["optim.matrix_lr=nan"]),
        (lambda: OptimConfig(momentum=1.5), ["optim.momentum=1.5"]),
        (lambda: OptimConfig(warmup_ratio=0.6, warmdown_ratio=0.6), ["0.6", "sum"]),
        (lambda: EvalConfig(sample_every=-2), ["eval.sample_every=-2"]),
        (lambda: EvalConfig(keep_checkpoints=0), ["eval.keep_checkpoints=0"]),
        (lambda: TokenizerConfig(vocab_size=100), ["vocab_size=100", "265"]),
        (
            lambda: PretrainConfig(batch_tokens=8000),
            ["batch_tokens=8000", "sequence_len=256", "7936"],
        ),
        (lambda: PretrainConfig(steps=-1), ["steps=-1"]),
        (lambda: PretrainConfig(seconds=float("inf")), ["seconds=inf"]),
        (lambda: PretrainConfig(n_shards=0), ["n_shards=0"]),
        (lambda: EvaluateConfig(batch_rows=0), ["batch_rows=0"]),
        (lambda: QuickstartConfig(seconds=0), ["seconds=0"]),
    ],
)
def test_refusals_name_value_rule_and_remedy(make: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert (
        "\n" not in text
        and text.endswith(".")
        and isinstance(caught.value, (PrimechatError, ValueError))
    )


@pytest.mark.parametrize(
    "tag", ["..", "../x", "a/b", "", ".hidden", "a b", "-x", "x" * 101, "d4\n", "é", 4]
)
def test_tags_stay_in_their_folder(tag: Any) -> None:
    for cls in (PretrainConfig, FinetuneConfig):
        with pytest.raises(ConfigError, match="tag="):
            cls(tag=tag)


@pytest.mark.parametrize("tag", ["d4", "d20-rope.v2", "X_1"])
def test_plain_tags_are_taken(tag: str) -> None:
    assert PretrainConfig(tag=tag).tag == tag


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], ["list", "object"]),
        ({"schema": 99}, ["99", "update"]),
        ({"tga": "d4"}, ["'tga'", "PretrainConfig"]),
        ({"steps": "10"}, ["steps='10'", "int"]),
        ({"steps": True}, ["steps=True", "int"]),
        ({"steps": 1.5}, ["steps=1.5", "int"]),
        ({"resume": 1}, ["resume=1", "bool"]),
        ({"model": 4}, ["model", "int"]),
        ({"model": {"n_layer": "4"}}, ["n_layer='4'"]),
        ({"runtime": {"device": "tpu"}}, ["'tpu'"]),
    ],
)
def test_bad_json_is_refused(data: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        decode_config(data, PretrainConfig)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_first_difference_is_named() -> None:
    old = PretrainConfig()
    assert find_difference(old, old) is None
    new = dataclasses.replace(old, model=dataclasses.replace(old.model, smear=False), seed=1)
    assert find_difference(old, new) == "model.smear: True != False"
    assert find_difference(old, new, ignore=("model.smear",)) == "seed: 0 != 1"
    assert find_difference(old, new, ignore=("model", "seed")) is None


def test_depth_becomes_a_shape() -> None:
    d20 = GPTConfig.classic(20)
    assert (d20.n_layer, d20.n_embd, d20.n_head, d20.n_kv_head, d20.head_dim) == (
        20,
        1280,
        10,
        10,
        128,
    )
    assert (
        d20.n_params == 560_988_160 and d20.padded_vocab == 65_536 and d20.architecture == "classic"
    )
    assert GPTConfig.classic(32).n_params == 1_879_048_192
    assert GPTConfig.modern(3).n_embd == 256  # 192 rounded up to a multiple of the head's 128
    d4 = PretrainConfig().model
    assert (d4.n_layer, d4.n_embd, d4.n_head, d4.head_dim, d4.sequence_len) == (4, 256, 4, 64, 256)
    assert (
        d4.architecture == "modern"
        and dataclasses.replace(d4, smear=False).architecture == "custom"
    )


def test_parameters_are_counted_one_by_one() -> None:
    tiny = GPTConfig(
        **SMALL,
        value_embeddings=True,
        residual_scalars=True,
        smear=True,
        backout=True,
        vocab_multiple=64,
    )
    rows, width, kv = 320, 64, 32  # 300 tokens padded to 320; two key heads of 16
    block = width * width + 2 * width * kv + width * width + 2 * (width * 4 * width)
    one_table = (
        rows * kv + 2 * 12
    )  # of two layers, the last has one; its gate reads 12 channels for 2 heads
    assert tiny.n_params == 2 * rows * width + 2 * block + one_table + 2 * 2 + (24 + 1) + 1


def test_windows_and_value_embeddings_by_layer() -> None:
    modern = GPTConfig.modern(6, sequence_len=2048)
    assert [modern.window(i) for i in range(6)] == [512, 512, 512, 2048, 512, 2048]
    assert GPTConfig.classic(4).window(0) is None
    assert GPTConfig.modern(4, sequence_len=256).window(0) == 128  # a quarter, rounded up to 128
    assert [GPTConfig.modern(3).has_value_embedding(i) for i in range(3)] == [True, False, True]
    assert [GPTConfig.modern(2).has_value_embedding(i) for i in range(2)] == [False, True]
    assert not any(GPTConfig.classic(3).has_value_embedding(i) for i in range(3))
