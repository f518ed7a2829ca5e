"""Settings that several stages share: the machine, and how often to evaluate.

The string below a field is its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from primechat.errors import ConfigError

DEVICES = ("auto", "cpu", "mps", "cuda")
DTYPES = ("auto", "float32", "bfloat16")
COMPILE = ("auto", "on", "off")


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How a stage uses the machine; `auto` and 0 are measured once before step 0 and then kept."""

    device: str = "auto"
    """cpu, mps, cuda, or auto."""
    dtype: str = "auto"
    """Precision of matrix products: float32, bfloat16, or auto (the faster one)."""
    threads: int = 0
    """CPU threads; 0 takes the faster of one and all cores."""
    compile: str = "auto"
    """torch.compile: on, off, or auto (on where the time saved exceeds the time it takes)."""
    micro_batch_rows: int = 0
    """Rows of one forward and backward pass; 0 takes the fastest measured."""
    checkpoint_blocks: bool = False
    """Keep only each block's input and compute the block again in the backward pass: for models whose
    activations do not fit.
    """
    max_hours: float = 0.0
    """Save and stop after so many hours, those before a resume included; 0 is no limit."""
    max_dollars: float = 0.0
    """Save and stop once so much is spent at `dollars_per_hour`; 0 is no limit."""
    dollars_per_hour: float = 0.0
    """What the machine costs."""

    def __post_init__(self) -> None:
        for name, allowed in (("device", DEVICES), ("dtype", DTYPES), ("compile", COMPILE)):
            check_choice(f"runtime.{name}", getattr(self, name), allowed)
        for name in ("threads", "micro_batch_rows"):
            check_number(f"runtime.{name}", getattr(self, name), low=0, whole=True)
        for name in ("max_hours", "max_dollars", "dollars_per_hour"):
            check_number(f"runtime.{name}", getattr(self, name), low=0)
        if self.max_dollars and not self.dollars_per_hour:
            raise ConfigError(
                f"runtime.max_dollars={self.max_dollars} needs runtime.dollars_per_hour; set it to the price."
            )

    @property
    def budget_s(self) -> float:
        """Seconds until the run has to stop, infinity if nothing limits it."""
        limits = [3600 * self.max_hours] if self.max_hours else []
        limits += [3600 * self.max_dollars / self.dollars_per_hour] if self.max_dollars else []
        return min(limits, default=float("inf"))


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How often a run is evaluated, sampled and saved."""

    every: int = 0
    """Steps between validations; 0 spreads ten over the run, fewer over a short one. The last step is always
    validated.
    """
    tokens: int = -1
    """Validation tokens of each validation but the last: -1 chooses 4,000, 20,000, 100,000, 400,000 or all,
    so that together they take at most a tenth of the training time; 0 is the whole split.
    """
    last_tokens: int = -1
    """Validation tokens of the last validation: -1 chooses so that it takes at most a quarter of the training
    time; 0 is the whole split, of shards 10,485,760 tokens.
    """
    sample_every: int = 0
    """Steps between samples; 0 takes them with the validations, -1 never."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves about once a minute. A run is always saved when it ends or is
    stopped.
    """
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay on disk."""
    snapshots: bool = True
    """Keep small bfloat16 copies of the weights at steps 0, 1, 2, 4, 8 ... and at the end, for the labs."""
    snapshot_budget_mb: int = 2000
    """No snapshot is written once they would exceed this, in megabytes."""

    def __post_init__(self) -> None:
        for name, low in (
            ("every", 0),
            ("tokens", -1),
            ("last_tokens", -1),
            ("sample_every", -1),
            ("save_every", 0),
            ("keep_checkpoints", 1),
            ("snapshot_budget_mb", 0),
        ):
            check_number(f"eval.{name}", getattr(self, name), low=low, whole=True)


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise a ConfigError unless the value is one of the allowed ones."""
    if value not in allowed:
        raise ConfigError(
            f"{name}={value!r} must be one of {', '.join(allowed)}; try {allowed[0]}."
        )


# Sampling settings: lowest value, highest value, whether it is a whole number.
SAMPLING = {"temperature": (0, 100, False), "top_p": (1e-6, 1, False), "top_k": (0, None, True)}
SAMPLING["repetition_penalty"] = (1, 10, False)


def check_drawing(config: Any, most_tokens: float | None = None) -> None:
    """Raise a ConfigError for invalid sampling settings; `most_tokens` limits the length of a reply."""
    bounds = {**SAMPLING, "max_new_tokens": (1, most_tokens, True), "seed": (0, None, True)}
    for name, (low, high, whole) in bounds.items():
        check_number(name, getattr(config, name), low=low, high=high, whole=whole)


def check_number(
    name: str, value: object, *, low: float, high: float | None = None, whole: bool = False
) -> None:
    """Raise a ConfigError unless a setting is a finite number from `low` to `high` (None: 1e18)."""
    top = 10**18 if high is None else high
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if number and low <= value <= top:  # type: ignore[operator]
        return
    beyond = number and value > top  # type: ignore[operator]
    most = f"{top:,}" if whole else f"{top:g}"
    bounds = f"of at least {low}" if high is None and not beyond else f"from {low} to {most}"
    kind = "a whole number" if whole else "a number"
    raise ConfigError(
        f"{name}={show_value(value)} must be {kind} {bounds}; try {min(max(low, 1), top):g}."
    )


def show_value(value: object) -> str:
    """Return a value for an error message, on one line: long ones are cut, huge numbers described.

    >>> show_value(10**400), show_value("x" * 90)[-1]
    ('1000000000... (a number of about 400 digits)', '…')
    """
    if isinstance(value, int) and abs(value) >= 10**40:
        digits = int(value.bit_length() * 0.30103)  # Python prints at most 4,300 digits
        return f"{value // 10 ** (digits - 9)}... (a number of about {digits} digits)"
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"
