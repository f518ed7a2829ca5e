"""The shape of a GPT, with each architectural choice as a named switch.

Hides: how a depth becomes a shape.
Reference: nanochat, its code of October 2025 (`classic`) and of 2026 (`modern`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from primechat.config.runtime import check_choice, check_number
from primechat.errors import ConfigError

MOST = {  # upper limits, far beyond what any machine trains, so that a typing error is refused at once
    "sequence_len": 2**20,
    "vocab_size": 2**20,
    "n_layer": 256,
    "n_head": 1024,
    "n_kv_head": 1024,
    "n_embd": 65_536,
}
SIZES = tuple(MOST)
ROPE_DTYPES = ("float32", "bfloat16", "compute")
NORM_EPS = 2**-23  # nanochat's eps=None in every dtype (measured on a CPU, torch 2.13)
SMEAR_CHANNELS = 24  # nanochat: the gate of the smear reads the first 24 channels
GATE_CHANNELS = 12  # nanochat: the gate of a value embedding reads the first 12 channels
MATRICES = ("uniform", "normal")


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Everything that decides what a GPT computes."""

    sequence_len: int = 2048
    """Tokens of context in training."""
    vocab_size: int = 65_536
    """Number of token ids, special tokens included."""
    n_layer: int = 20
    """Number of blocks."""
    n_head: int = 10
    """Query heads."""
    n_kv_head: int = 10
    """Key and value heads; each serves n_head / n_kv_head query heads."""
    n_embd: int = 1280
    """Width of the residual stream."""
    value_embeddings: bool = False
    """Every other layer, the last included, adds a gated embedding of the token to its values."""
    residual_scalars: bool = False
    """Each layer scales the residual stream and mixes the first embedding back in, by two learned numbers."""
    smear: bool = False
    """Each embedding takes in a gated share of the previous token's."""
    backout: bool = False
    """The final state subtracts a learned share of the middle layer's."""
    qk_gain: float = 1.0
    """Factor on queries and on keys after their norm."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_dtype: str = "bfloat16"
    """Precision of the rotary table: float32, bfloat16, or compute (that of the activations)."""
    logit_softcap: float = 15.0
    """Logits are c * tanh(z / c); 0 switches it off."""
    window_pattern: str = ""
    """One letter a layer, repeated: L sees sequence_len tokens back, S a quarter of it; empty sees all."""
    vocab_multiple: int = 1
    """Embedding tables are padded to a multiple of this many rows."""

    def __post_init__(self) -> None:
        for name, most in (*MOST.items(), ("vocab_multiple", 65_536)):
            check_number(f"model.{name}", getattr(self, name), low=1, high=most, whole=True)
        # A gain of 0 would make attention uniform, and the loss sums exp(softcap) in float32.
        for name, low, high in (
            ("qk_gain", 1e-3, 1000),
            ("rope_base", 1, 1e12),
            ("logit_softcap", 0, 70),
        ):
            check_number(f"model.{name}", getattr(self, name), low=low, high=high)
        if self.n_embd % self.n_head:
            near = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise ConfigError(
                f"model.n_embd={self.n_embd} must be divisible by model.n_head={self.n_head}; try {near}."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model.n_embd/n_head={self.head_dim} must be even for rotary positions; try "
                f"n_head={self.n_embd // 2}."
            )
        if self.n_head % self.n_kv_head:
            raise ConfigError(
                f"model.n_kv_head={self.n_kv_head} must divide model.n_head={self.n_head}; try {self.n_head}."
            )
        read = max(SMEAR_CHANNELS * self.smear, GATE_CHANNELS * self.value_embeddings)
        if self.n_embd < read:
            raise ConfigError(
                f"model.n_embd={self.n_embd} must be at least {SMEAR_CHANNELS} for smear, {GATE_CHANNELS} "
                "for value embeddings; try 64."
            )
        if self.rope_dtype not in ROPE_DTYPES:
            raise ConfigError(
                f"model.rope_dtype={self.rope_dtype!r} must be one of {', '.join(ROPE_DTYPES)}; try compute."
            )
        if set(self.window_pattern) - {"S", "L"}:
            raise ConfigError(
                f"model.window_pattern={self.window_pattern!r} must be made of S and L; try 'SSSL', or '' "
                "for none."
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.n_embd // self.n_head

    @property
    def kv_dim(self) -> int:
        """Width of all key heads together."""
        return self.n_kv_head * self.head_dim

    @property
    def padded_vocab(self) -> int:
        """Rows of the embedding tables."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def architecture(self) -> str:
        """`classic`, `modern`, or `custom` if the switches match neither."""
        for name, other in (("classic", classic_switches()), ("modern", modern_switches())):
            if all(getattr(self, key) == value for key, value in other.items()):
                return name
        return "custom"

    def has_value_embedding(self, layer: int) -> bool:
        """Return whether a layer has a value embedding: every other one, counted back from the last."""
        return self.value_embeddings and layer % 2 == (self.n_layer - 1) % 2

    def window(self, layer: int) -> int | None:
        """Return how many earlier tokens a token attends to in this layer; None is all of them.

        Source: nanochat HEAD, gpt.py: a short window is a quarter of sequence_len, rounded up to a multiple
            of 128.
        """
        if not self.window_pattern:
            return None
        letter = self.window_pattern[layer % len(self.window_pattern)]
        if letter == "L" or layer == self.n_layer - 1:
            return self.sequence_len
        return 128 * -(-self.sequence_len // 512)

    @property
    def n_params(self) -> int:
        """Exact number of parameters, equal to the count of the built model.

        Source: nanochat's own counts, for example 560,988,160 for the classic d20.

        >>> GPTConfig.classic(20).n_params
        560988160
        """
        return sum(count_parts(self).values())

    @property
    def n_matrix_params(self) -> int:
        """Number of parameters in the blocks and the output head, without embeddings and scalars.

        Source: nanochat HEAD, base_train.py: the count with which its loss scales most cleanly.

        >>> GPTConfig.modern(20).n_matrix_params
        477103280
        """
        counts = count_parts(self)
        return counts["attention"] + counts["mlp"] + counts["output head"]

    @classmethod
    def classic(
        cls, depth: int, *, vocab_size: int = 65_536, sequence_len: int = 2048
    ) -> GPTConfig:
        """Return the 2025 model of a depth: width 64 * depth, head_dim 128 or the next smaller that fits."""
        check_depth(depth)
        n_head = next(
            n
            for n in range(-(-depth // 2), depth + 1)
            if 64 * depth % n == 0 and 64 * depth // n % 2 == 0
        )
        plain = cls(vocab_size=vocab_size, sequence_len=sequence_len)
        return set_shape(plain, depth, 64 * depth, n_head)

    @classmethod
    def modern(
        cls, depth: int, *, vocab_size: int = 65_536, sequence_len: int = 2048, head_dim: int = 128
    ) -> GPTConfig:
        """Return the 2026 model of a depth: width 64 * depth rounded up to a multiple of head_dim."""
        check_depth(depth)
        n_head = -(-64 * depth // head_dim)
        switches = {**modern_switches(), "window_pattern": "SSSL"}
        plain = cls(vocab_size=vocab_size, sequence_len=sequence_len, **switches)
        return set_shape(plain, depth, n_head * head_dim, n_head)


def list_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter of a model by name.

    This is the only such table: parameter counts, file formats and loaders all read it.

    Source: the keys of nanochat's state_dict; linear maps are (out, in).

    >>> list_shapes(GPTConfig.classic(20))["transformer.h.0.mlp.c_fc.weight"]
    (5120, 1280)
    """
    rows, C, kv = config.padded_vocab, config.n_embd, config.kv_dim
    shapes: dict[str, tuple[int, ...]] = {}

    if config.residual_scalars:
        shapes["resid_lambdas"] = (config.n_layer,)
        shapes["x0_lambdas"] = (config.n_layer,)
    if config.smear:
        shapes["smear_lambda"] = (1,)
        shapes["smear_gate.weight"] = (1, SMEAR_CHANNELS)
    if config.backout:
        shapes["backout_lambda"] = (1,)

    shapes["transformer.wte.weight"] = (rows, C)
    for layer in range(config.n_layer):
        block = f"transformer.h.{layer}"
        shapes[f"{block}.attn.c_q.weight"] = (C, C)
        shapes[f"{block}.attn.c_k.weight"] = (kv, C)
        shapes[f"{block}.attn.c_v.weight"] = (kv, C)
        shapes[f"{block}.attn.c_proj.weight"] = (C, C)
        shapes[f"{block}.mlp.c_fc.weight"] = (4 * C, C)
        shapes[f"{block}.mlp.c_proj.weight"] = (C, 4 * C)
        if config.has_value_embedding(layer):
            shapes[f"{block}.attn.ve_gate.weight"] = (config.n_kv_head, GATE_CHANNELS)
            shapes[f"value_embeds.{layer}.weight"] = (rows, kv)
    shapes["lm_head.weight"] = (rows, C)
    return shapes


# The parts by which the parameters of a model are counted, and a string that every name in the part contains.
PARTS = {
    "token embedding": "transformer.wte.",
    "value embeddings": "value_embeds.",
    "attention": ".attn.",
    "mlp": ".mlp.",
    "output head": "lm_head.",
}
OTHER_PART = "scalars and gates"


def count_parts(config: GPTConfig) -> dict[str, int]:
    """Return the number of parameters of each part; they sum to `n_params`.

    >>> count_parts(GPTConfig.classic(20))["mlp"], sum(count_parts(GPTConfig.classic(20)).values())
    (262144000, 560988160)
    """
    counts = dict.fromkeys([*PARTS, OTHER_PART], 0)
    for name, shape in list_shapes(config).items():
        part = next((part for part, mark in PARTS.items() if mark in name), OTHER_PART)
        counts[part] += math.prod(shape)
    return counts


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Distributions of the initial weights.

    The projections back into the residual stream (c_proj) and the strength of the smear always start at 0,
    so that each block initially adds nothing.
    """

    embedding_std: float = 0.8
    """Standard deviation of the token embedding, drawn normal."""
    head_std: float = 0.001
    """Standard deviation of the output head, drawn normal; 0 begins with equal chances."""
    matrices: str = "uniform"
    """uniform of standard deviation 1 / sqrt(width), or normal of min(1, sqrt(out / in)) / sqrt(in)."""
    mlp_gain: float = 1.0
    """Factor on the standard deviation of the MLP's first matrix."""
    residual_first: float = 1.0
    """Factor on the residual stream in the first layer; those between lie on a line to the last."""
    residual_last: float = 1.0
    """Factor on the residual stream in the last layer."""
    x0_first: float = 0.1
    """Share of the first embedding in the first layer; those between lie on a line to the last."""
    x0_last: float = 0.1
    """Share of the first embedding in the last layer."""
    backout: float = 0.2
    """Share of the middle layer that the final state subtracts."""
    gate_max: float = 0.0
    """Weights of the gates are drawn uniform between 0 and this."""

    def __post_init__(self) -> None:
        for name in ("embedding_std", "head_std", "mlp_gain", "gate_max"):
            check_number(f"init.{name}", getattr(self, name), low=0, high=1000)
        for name in ("residual_first", "residual_last", "x0_first", "x0_last", "backout"):
            check_number(f"init.{name}", getattr(self, name), low=-1000, high=1000)
        check_choice("init.matrices", self.matrices, MATRICES)


def check_depth(depth: int) -> None:
    """Raise a ConfigError unless the depth is a whole number from 1 to 256."""
    if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= 256:
        raise ConfigError(
            f"depth={depth!r} must be a whole number from 1 to 256; try 4 on a laptop, 20 in the cloud."
        )


STUDENTS = {"100m": (10, 512, 8), "100m-deep": (28, 384, 6), "100m-flat": (3, 640, 10)}  # for a d20
SHARES = {"half": 1 / 2, "quarter": 1 / 4, "eighth": 1 / 8}
STUDENT_SIZES = (*SHARES, *STUDENTS)


def shrink_model(teacher: GPTConfig, size: str) -> GPTConfig:
    """Return the shape of a student: the teacher's vocabulary, context and switches, with fewer parameters.

    Args:
        teacher: config of the teacher.
        size: half, quarter or eighth of the teacher's parameters, as close as whole heads and layers allow,
            or a preset of about 100 million parameters at 65,536 tokens: 100m, 100m-deep, 100m-flat.

    >>> shrink_model(GPTConfig.classic(20), "100m").n_params
    98566144
    """
    if size in STUDENTS:
        return set_shape(teacher, *STUDENTS[size])
    if size not in SHARES:
        raise ConfigError(f"size={size!r} must be one of {', '.join(STUDENT_SIZES)}; try quarter.")

    # A good shape has about the wanted number of parameters and the teacher's ratio of width to depth.
    wanted, slim = SHARES[size] * teacher.n_params, teacher.n_embd / teacher.n_layer

    def miss(config: GPTConfig) -> float:
        off = abs(math.log(config.n_params / wanted))
        return 4 * off + abs(math.log(config.n_embd / config.n_layer / slim))

    # Try all depths and widths up to the teacher's; a smear reads 24 channels.
    head_dim = next(
        d for d in (128, 64, 32, 16, teacher.head_dim) if teacher.n_embd >= 8 * d or d <= 16
    )
    widths = [w for w in range(head_dim, teacher.n_embd + 1, head_dim) if w >= 24]
    shapes = [(n, w, w // head_dim) for n in range(1, teacher.n_layer + 1) for w in widths]
    return min((set_shape(teacher, *shape) for shape in shapes), key=miss)


def set_shape(config: GPTConfig, n_layer: int, n_embd: int, n_head: int) -> GPTConfig:
    """Return a config with another shape and as many key heads as query heads."""
    return replace(config, n_layer=n_layer, n_embd=n_embd, n_head=n_head, n_kv_head=n_head)


def classic_switches() -> dict[str, Any]:
    """Return the switches that make a config `classic`: the defaults; the sizes are free."""
    return {item.name: item.default for item in fields(GPTConfig) if item.name not in SIZES}


def modern_switches() -> dict[str, Any]:
    """Return the switches that make a config `modern`; shapes and windows are free."""
    return dict(
        value_embeddings=True,
        residual_scalars=True,
        smear=True,
        backout=True,
        qk_gain=1.2,
        rope_base=100_000.0,
        rope_dtype="compute",
        logit_softcap=15.0,
        vocab_multiple=64,
    )
