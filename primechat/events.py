"""What stages, probes and the engine return: plain data, no torch.

Events are what a running stage tells: the command line draws a progress bar from them, a notebook a live
view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class NoteEvent:
    """A sentence for the reader: what was chosen, found or skipped."""

    text: str
    kind: str = "note"


def count_noun(n: int, noun: str) -> str:
    """Return a number with its noun, which has an s unless there is one thing.

    >>> count_noun(1, "step"), count_noun(1200, "step")
    ('1 step', '1,200 steps')
    """
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def describe_bpb(bpb: float, tokens: int, digits: int = 4) -> str:
    """Return bits per byte with the number of tokens that were scored, where that is known.

    >>> describe_bpb(1.64831, 100_096), describe_bpb(1.5, 0, 2)
    ('1.6483 bits per byte on 100,096 tokens', '1.50 bits per byte')
    """
    scored = f" on {count_noun(tokens, 'token')}" if tokens else ""
    return f"{bpb:.{digits}f} bits per byte{scored}"


def pair_bpb(event: Mapping[str, Any]) -> float:
    """Return bits per byte of a logged validation, on the tokens of those before it where that is known; nan
    where nothing was scored.
    """
    paired = event.get("paired_bpb")
    found = event.get("val_bpb") if paired is None else paired
    return float("nan") if found is None else float(found)


@dataclass(frozen=True, kw_only=True)
class PhaseEvent:
    """A stage begins a part of its work; `total` is in `unit`, 0 where unknown."""

    name: str
    total: float = 0.0
    unit: str = "steps"
    kind: str = "phase"


@dataclass(frozen=True, kw_only=True)
class ProgressEvent:
    """How far the present phase has come, in its unit."""

    done: float
    kind: str = "progress"


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """One optimizer step; `left_s` is what the run still takes, validations included, where that is known."""

    step: int
    steps: int
    loss_nats: float
    lr_ratio: float
    grad_norm: float
    update_norm: float
    tokens: int
    tokens_per_s: float
    elapsed_s: float
    left_s: float | None = None
    kind: str = "step"


@dataclass(frozen=True, kw_only=True)
class LossEvent:
    """One validation on `tokens` tokens; `whole` tells whether they are the whole split, `cut_short` whether
    Stop left some of them out.

    The paired figures are on the tokens that the run's earlier validations scored, so that they can be
    compared with those. `general_bpb` is on a general text, where a stage that could forget it measures that;
    a student's retention, agreement and KL are against its teacher, distinct-2 and repetition are of what it
    writes.
    """

    step: int
    val_bpb: float
    val_loss_nats: float
    whole: bool
    elapsed_s: float
    tokens: int = 0
    cut_short: bool = False
    paired_bpb: float | None = None
    paired_loss_nats: float | None = None
    general_bpb: float | None = None
    retention: float | None = None
    agreement: float | None = None
    kl_nats: float | None = None
    distinct_2: float | None = None
    repetition: float | None = None
    kind: str = "loss"


@dataclass(frozen=True, kw_only=True)
class SampleEvent:
    """A text that the model wrote after a prompt."""

    step: int
    prompt: str
    text: str
    kind: str = "sample"


@dataclass(frozen=True, kw_only=True)
class CheckpointEvent:
    """A checkpoint or a snapshot was committed."""

    step: int
    path: str
    snapshot: bool = False
    kind: str = "checkpoint"


@dataclass(frozen=True, kw_only=True)
class DoneEvent:
    """The stage has ended; `stopped` tells whether it was asked to."""

    step: int
    elapsed_s: float
    stopped: bool = False
    kind: str = "done"


Event = (
    NoteEvent
    | PhaseEvent
    | ProgressEvent
    | StepEvent
    | LossEvent
    | SampleEvent
    | CheckpointEvent
    | DoneEvent
)
OnEvent = Callable[[Event], None]  # what a stage calls with each event


@dataclass(frozen=True, kw_only=True)
class Token:
    """One sampled token; all measures are of the model's distribution before temperature and truncation.

    `logprob`, `entropy` and `varentropy` are in nats (squared for the last); `rank` is 0 for the likeliest
    token; `alternatives` are (id, logprob) pairs, likeliest first.
    """

    id: int
    logprob: float
    entropy: float
    varentropy: float
    rank: int
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(kw_only=True)
class ReplyStats:
    """Counts and speeds of one reply; `final` is False while it is being written."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    ttft_s: float = 0.0
    prefill_tok_s: float = 0.0
    decode_tok_s: float = 0.0
    total_s: float = 0.0
    context_used: float = 0.0
    stop_reason: str = ""
    final: bool = False


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a conversation; `model` is human for text that none wrote, and then there are no tokens.

    `logprob`, `entropy`, `varentropy` and `rank` are those of `Token`, one a token; `stopped` tells whether
    the model ended the turn itself, its last token then being the one that ended it.
    """

    speaker: int
    model: str
    text: str
    ids: list[int] = field(default_factory=list)
    logprob: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    varentropy: list[float] = field(default_factory=list)
    rank: list[int] = field(default_factory=list)
    stopped: bool = False


@dataclass(frozen=True, kw_only=True)
class AutochatResult:
    """Conversations of models; paths are relative to the base directory, one a generation."""

    tag: str
    path: str
    n_talks: int
    turns: int
    stopped: bool
    tokens: int
    tokens_per_s: float
    total_s: float
    generations: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TokenizerResult:
    """A trained tokenizer."""

    path: str
    identity: str
    vocab_size: int
    trained_chars: int
    elapsed_s: float
    bytes_per_token: float


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A trained model; `path` is its run directory, relative to the base directory. `val_tokens` were scored
    for `val_bpb`; 0 is not known.
    """

    identifier: str
    path: str
    step: int
    stopped: bool
    val_bpb: float
    n_params: int
    tokens: int
    tokens_per_s: float
    train_s: float
    total_s: float
    val_tokens: int = 0
    events: tuple[dict[str, Any], ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True)
class OverlapResult:
    """Which n-grams of words an evaluation text shares with a training text."""

    n: int
    documents: int
    too_short: int
    contaminated: int
    n_grams: int
    shared_n_grams: int
    training_texts: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PlaceGroup:
    """A student beside its teacher on some places of a text; retention is 1 where it is as good."""

    name: str
    tokens: int
    student_bpb: float
    teacher_bpb: float
    untrained_bpb: float
    retention: float
    agreement: float
    kl_nats: float


@dataclass(frozen=True, kw_only=True)
class RetentionResult:
    """A student beside its teacher: in all, and grouped by frequency, position and kind."""

    total: PlaceGroup
    groups: dict[str, tuple[PlaceGroup, ...]]


@dataclass(frozen=True, kw_only=True)
class EvaluateResult:
    """Bits per byte of a model on a text."""

    identifier: str
    corpus: str
    bpb: float
    loss_nats: float
    scored_tokens: int
    scored_bytes: int
    window: int
    stride: int
    elapsed_s: float
    overlap: OverlapResult | None = None


@dataclass(frozen=True, kw_only=True)
class SpeedrunResult:
    """What a full run made; what it did not come to, being stopped, is None."""

    base: TrainResult
    chat: TrainResult | None
    evaluation: EvaluateResult | None


@dataclass(frozen=True, kw_only=True)
class QuickstartResult:
    """What a quickstart made."""

    tokenizer: TokenizerResult
    base: TrainResult
    chat: TrainResult
    dialogue: tuple[dict[str, str], ...]
    total_s: float


@dataclass(frozen=True, kw_only=True)
class Channel:
    """One fact of each point, (N,): a number, or the index of one of `names`; `whole` numbers are counts."""

    key: str
    title: str
    values: Any
    names: tuple[str, ...] = ()
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """Points to look at: `places` (F, N, 3) float32 in F frames, of which a picture uses the first `n_axes`.

    `labels` are the points' names. By frame: `shown`, the share of the variance that the picture shows (none
    for UMAP), and `kept`, the share of ten true neighbours that stay neighbours on it; `chance` is what
    random places would keep.
    """

    title: str
    labels: tuple[str, ...]
    places: Any
    frames: tuple[str, ...]
    channels: tuple[Channel, ...]
    method: str = "PCA"
    n_axes: int = 2
    shown: tuple[float, ...] = ()
    kept: tuple[float, ...] = ()
    chance: float = 0.0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Nearby:
    """The neighbours of one point, nearest first: in the true space (with cosines) and on the picture."""

    true: tuple[int, ...]
    cosines: tuple[float, ...]
    drawn: tuple[int, ...]
    chance: float
