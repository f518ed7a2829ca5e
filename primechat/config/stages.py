"""One config per stage, which serves scripts, JSON files, forms and the command line alike.

The string below a field is its help text on the command line and in forms.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from primechat.config.model import STUDENT_SIZES, GPTConfig, InitConfig
from primechat.config.optim import OptimConfig
from primechat.config.runtime import (
    EvalConfig,
    RuntimeConfig,
    check_choice,
    check_number,
)
from primechat.errors import ConfigError

LAYOUTS = ("packed", "masked", "padded")  # how conversations share rows
LEARN = ("assistant", "all")  # whose tokens count in the loss
DISTANCES = ("forward", "reverse", "jsd")  # between student and teacher
COUNTED = ("all", "matrices")  # which parameters `tokens_per_param` counts
ROWS = ("stream", "best-fit")  # how documents share rows


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Train a byte-pair tokenizer."""

    tag: str = ""
    """Empty writes $NANOCHAT_BASE_DIR/tokenizer; a name writes the tokenizer of that base model."""
    resume: bool = False
    """Accept a tokenizer that is there already, if it was trained with these settings."""
    corpus: str = "chitchat"
    """chitchat (ships with primechat), fineweb-edu, climbmix, or a path to .txt, .jsonl or .parquet files."""
    corpus_separator: str = "auto"
    """Mark between the documents of a .txt: auto splits at <|endoftext|>, <|bos|> and </s> where they stand
    between documents, none splits at no mark, anything else is the mark itself; marks are left out.
    """
    vocab_size: int = 4096
    """Number of token ids, the nine special tokens included."""
    max_chars: int = 2_000_000_000
    """Characters of text to train on."""
    max_doc_chars: int = 10_000
    """Characters taken of each document."""

    def __post_init__(self) -> None:
        check_tag(self.tag, empty=True)
        check_number("vocab_size", self.vocab_size, low=265, high=1_000_000, whole=True)
        check_number("max_chars", self.max_chars, low=1, whole=True)
        check_number("max_doc_chars", self.max_doc_chars, low=1, whole=True)
        check_separator(self.corpus_separator)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Train a base model: predict the next token of plain text."""

    tag: str = "d4"
    """Name of the run's folder in base_checkpoints."""
    resume: bool = False
    """Go on from the newest checkpoint of this tag."""
    model: GPTConfig = field(
        default_factory=lambda: GPTConfig.modern(4, vocab_size=4096, sequence_len=256, head_dim=64)
    )
    """Shape and switches of the model."""
    corpus: str = "chitchat"
    """chitchat (ships with primechat), fineweb-edu, climbmix, or a path to .txt, .jsonl or .parquet files."""
    corpus_separator: str = "auto"
    """Mark between the documents of a .txt: auto splits at <|endoftext|>, <|bos|> and </s> where they stand
    between documents, none splits at no mark, anything else is the mark itself; marks are left out.
    """
    allow_changed_corpus: bool = False
    """Resume with another text than the run has read so far, or with one that was edited; it is read from its
    beginning.
    """
    n_shards: int = 8
    """Shards of fineweb-edu or climbmix to use (about 100 MB and 52 M tokens each)."""
    keep_shards: int = 0
    """Shards that may lie on the disk at once: read ones are removed to make room; 0 keeps all."""
    skip_bad_shards: bool = False
    """Go on without a shard that cannot be read, after naming it, instead of stopping."""
    tokenizer: str = ""
    """Folder of the tokenizer; empty takes the tag's own, else $NANOCHAT_BASE_DIR/tokenizer."""
    batch_tokens: int = 8192
    """Tokens read for each step of training, on all GPUs together."""
    steps: int = 0
    """Optimizer steps; 0 derives them from `seconds`, else from `tokens_per_param`."""
    seconds: float = 0.0
    """Training time to fill, compilation included, validation apart, which takes up to a third more. Steps
    are counted before the first one, and once more after a tenth of the time.
    """
    tokens_per_param: float = 20.0
    """Training tokens for each parameter, where neither steps nor seconds is given."""
    params_counted: str = "all"
    """Which parameters `tokens_per_param` counts: all, or matrices (of the blocks and the output head)."""
    rows: str = "stream"
    """How documents share rows: stream cuts one endless stream; best-fit begins each row with a document,
    fills it with the longest that fits, and drops the rest of the one that is cut at its end.
    """
    seed: int = 0
    """Seed of the weights and of the order of the text."""
    init: InitConfig = field(default_factory=InitConfig)
    """Fresh weights."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Validation, samples, checkpoints."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Device, precision, threads, compilation."""

    def __post_init__(self) -> None:
        check_tag(self.tag)
        check_training(self, self.model.sequence_len)
        check_separator(self.corpus_separator)
        check_number("n_shards", self.n_shards, low=1, whole=True)
        check_number("keep_shards", self.keep_shards, low=0, whole=True)
        if self.keep_shards == 1:
            raise ConfigError(
                "keep_shards=1 leaves no room for the next shard; try 8, or 0 for all."
            )
        check_number("tokens_per_param", self.tokens_per_param, low=0)
        check_choice("params_counted", self.params_counted, COUNTED)
        check_choice("rows", self.rows, ROWS)

    @property
    def n_params_counted(self) -> int:
        """Number of parameters that `tokens_per_param` is multiplied by."""
        whole = self.params_counted == "all"
        return self.model.n_params if whole else self.model.n_matrix_params

    @property
    def default_steps(self) -> int:
        """Number of steps if neither steps nor seconds is set: as many whole ones as the tokens allow."""
        tokens = int(self.tokens_per_param * self.n_params_counted)
        return max(1, tokens // self.batch_tokens)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Teach a base model to answer: train on conversations, on the assistant's tokens only."""

    tag: str = "d4"
    """Name of the run's folder in chatsft_checkpoints."""
    resume: bool = False
    """Go on from the newest checkpoint of this tag."""
    base: str = ""
    """Model to start from, for example base/d4 or base/d4@600; empty is base/<tag>."""
    dialogues: str = "chitchat"
    """Sets with weights and caps, for example `chitchat, persona*0.5, talk.jsonl@2000`. Sets: chitchat
    (ships with primechat), persona, dailydialog, lmsys, magpie, smol-smoltalk; files of your own: .jsonl or
    .json in the form of OpenAI, ShareGPT or Alpaca, .txt in ChatML; recipes: topic:music, style:pirate, faq.
    """
    language: str = "English"
    """Language of the conversations, for sets that have several; empty takes all."""
    personas: bool = True
    """Give what a set says about the assistant's person as a system message."""
    dialogue_shards: int = 2
    """Files to fetch of a set that has many large ones."""
    layout: str = "packed"
    """packed lays conversations end to end; masked does too, and lets none see its neighbour; padded keeps
    them in rows of their own.
    """
    learn: str = "assistant"
    """assistant learns from the assistant's tokens; all learns from everybody's (midtraining) and writes to
    mid_checkpoints.
    """
    general: str = ""
    """Text on whose validation split forgetting is measured; empty takes what the base model was trained on,
    if it is on this machine; none measures nothing.
    """
    batch_tokens: int = 4096
    """Tokens read for each step of training, on all GPUs together."""
    steps: int = 0
    """Optimizer steps; 0 derives them from `seconds`, else from one pass over the dialogues."""
    seconds: float = 0.0
    """Training time to fill, validation apart."""
    seed: int = 0
    """Seed of the order of the dialogues."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            matrix_lr=0.006,
            embedding_lr=0.06,
            unembedding_lr=0.002,
            residual_lr=0.0005,
            x0_lr=0.0005,
            smear_lr=0.0005,
        )
    )
    """Optimizer."""
    eval: EvalConfig = field(default_factory=lambda: EvalConfig(snapshots=False))
    """Validation, samples, checkpoints."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Device, precision, threads, compilation."""

    def __post_init__(self) -> None:
        check_tag(self.tag)
        check_training(self, 1)
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("learn", self.learn, LEARN)
        check_number("dialogue_shards", self.dialogue_shards, low=1, whole=True)


@dataclass(frozen=True, kw_only=True)
class LoRAConfig(FinetuneConfig):
    """Train an adapter: low-rank matrices beside a model's own, which stay frozen."""

    tag: str = "pirate"
    """Name of the adapter, as in lora:pirate+sft/d4."""
    base: str = "sft"
    """Model to adapt, for example sft/d4 or shipped/sft."""
    dialogues: str = "style:pirate"
    """Sets and recipes with weights and caps, as `finetune` takes them; recipes: topic:music, style:pirate,
    style:polite, faq, faq:FILE.
    """
    rank: int = 8
    """Rank r of the matrices; 0 adds nothing."""
    alpha: float = 16.0
    """Their product is scaled by alpha / rank."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    dropout: float = 0.0
    """Share of the inputs that an adapter does not see at each step."""
    targets: tuple[str, ...] = ("c_q", "c_k", "c_v", "attn.c_proj", "c_fc", "mlp.c_proj")
    """Linear maps to adapt."""
    batch_tokens: int = 4096
    """Tokens read for each step of training, on all GPUs together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "." in self.tag:
            raise ConfigError(
                f"tag={self.tag!r} must have no dot, as it names an adapter; try pirate."
            )
        check_number("rank", self.rank, low=0, high=65_536, whole=True)
        check_number("alpha", self.alpha, low=0)
        check_number("dropout", self.dropout, low=0, high=0.95)


@dataclass(frozen=True, kw_only=True)
class DistillConfig(FinetuneConfig):
    """Teach a small model the probabilities of a large one."""

    tag: str = "student"
    """Name of the student's folder: in base_checkpoints, with dialogues in chatsft_checkpoints."""
    base: str = ""
    """Student to go on with, for example base/student; empty starts from fresh weights."""
    teacher: str = ""
    """Model to learn from, for example base/d20; empty is the default model."""
    size: str = "quarter"
    """half, quarter or eighth of the teacher's parameters, or 100m, 100m-deep, 100m-flat for a d20."""
    n_layer: int = 0
    """The student's blocks; 0 takes what `size` gives."""
    n_embd: int = 0
    """The student's width; 0 takes what `size` gives."""
    n_head: int = 0
    """The student's heads; 0 takes what `size` gives."""
    corpus: str = "chitchat"
    """Text to learn on: chitchat, fineweb-edu, climbmix or a path; unused where dialogues are given."""
    corpus_separator: str = "auto"
    """Mark between the documents of a .txt: auto splits at <|endoftext|>, <|bos|> and </s> where they stand
    between documents, none splits at no mark, anything else is the mark itself; marks are left out.
    """
    allow_changed_corpus: bool = False
    """Resume with another text than the run has read so far, or with one that was edited; it is read from its
    beginning.
    """
    n_shards: int = 8
    """Shards of fineweb-edu or climbmix to use."""
    dialogues: str = ""
    """Conversations to learn on instead, on the assistant's tokens; as `finetune` takes them."""
    general: str = "none"
    """Text on whose validation split forgetting is measured; none measures nothing."""
    alpha: float = 0.1
    """Share of the loss on the text itself; 1 leaves the teacher out: the control."""
    temperature: float = 2.0
    """Both distributions are softened by this; the loss is scaled back by its square."""
    loss: str = "forward"
    """forward or reverse KL, or jsd."""
    beta: float = 0.5
    """The teacher's share in jsd's mixture."""
    hidden: float = 0.0
    """Weight of a term on the last hidden states, through a learned projector."""
    top_k: int = 0
    """Keep this many of the teacher's likeliest tokens on disk, with one bucket for the rest, so that
    further passes and further students need no teacher; 0 asks the teacher each time.
    """
    on_policy: float = 0.0
    """Share of the rows that the student writes itself, from the beginning of a text on."""
    batch_tokens: int = 4096
    """Tokens read for each step of training, on all GPUs together."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (
            ("alpha", 0, 1),
            ("temperature", 0.1, 100),
            ("beta", 0.001, 0.999),
            ("hidden", 0, 1000),
            ("on_policy", 0, 1),
        ):
            check_number(name, getattr(self, name), low=low, high=high)
        for name in ("n_layer", "n_embd", "n_head", "top_k"):
            check_number(name, getattr(self, name), low=0, whole=True)
        if self.top_k and self.on_policy:
            raise ConfigError(
                f"top_k={self.top_k} must be 0 with on_policy={self.on_policy}: what the student writes is "
                "never seen again; drop one of them."
            )
        check_separator(self.corpus_separator)
        check_choice("size", self.size, STUDENT_SIZES)
        check_choice("loss", self.loss, DISTANCES)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a model: bits per byte on validation text."""

    tag: str = ""
    """Unused by a measurement; kept so that every stage has it."""
    resume: bool = False
    """Unused by a measurement; kept so that every stage has it."""
    model: str = ""
    """Model to measure, for example base/d4, sft/d4@600 or base/d4@snap:64; empty is the default model."""
    corpus: str = "chitchat"
    """Text to measure on: its validation split."""
    corpus_separator: str = "auto"
    """Mark between the documents of a .txt: auto splits at <|endoftext|>, <|bos|> and </s> where they stand
    between documents, none splits at no mark, anything else is the mark itself; marks are left out.
    """
    max_tokens: int = 0
    """Tokens to score, in windows spread evenly over the split; 0 is all of it."""
    stride: int = 0
    """Tokens between windows; 0 is the window itself, so that none is read twice."""
    window: int = 0
    """Tokens of context; 0 is the model's sequence_len."""
    batch_rows: int = 16
    """Windows of one forward pass."""
    contamination: str = ""
    """Mixture of dialogues, as `finetune` takes it: tells how many runs of 13 words of the evaluation text
    stand in it too.
    """
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Device and precision."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "stride", "window"):
            check_number(name, getattr(self, name), low=0, whole=True)
        check_number("batch_rows", self.batch_rows, low=1, whole=True)
        check_separator(self.corpus_separator)


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """All stages on the text that ships with primechat: tokenizer, base model, chat model, a short
    dialogue.
    """

    tag: str = ""
    """Name of the model; empty takes quickstart, or the next free quickstart-N."""
    resume: bool = False
    """Go on where an interrupted quickstart of this tag stopped."""
    seconds: float = 150.0
    """Pretraining time to fill; every schedule stretches to it."""
    fast: bool = False
    """A first model that forms words within a minute, all stages included."""
    depth: int = 0
    """Number of blocks; the width is 64 times as much. 0 takes 4, or 2 where it has to be fast."""
    vocab_size: int = 4096
    """Number of token ids."""
    seed: int = 0
    """Seed of every stage."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Device, precision, threads, compilation."""

    def __post_init__(self) -> None:
        check_tag(self.tag, empty=True)
        check_number("seconds", self.seconds, low=1)
        check_number("depth", self.depth, low=0, whole=True)
        check_number("seed", self.seed, low=0, whole=True)


@dataclass(frozen=True, kw_only=True)
class SpeedrunConfig:
    """A full run, stage by stage: tokenizer, base model, chat model, evaluation; made for torchrun."""

    tag: str = ""
    """Unused: the tag is that of `pretrain`."""
    resume: bool = False
    """Go on with the stage that an interrupted run had come to."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Base model, its tokenizer included; --depth gives all of it."""
    finetune: FinetuneConfig = field(default_factory=lambda: FinetuneConfig(batch_tokens=65_536))
    """Chat model; its tag and base are those of `pretrain`."""
    eval_tokens: int = 10_485_760
    """Validation tokens that the base model is measured on at the end; 0 is the whole split."""

    def __post_init__(self) -> None:
        check_number("eval_tokens", self.eval_tokens, low=0, whole=True)


def check_tag(tag: object, *, empty: bool = False) -> None:
    """Raise a ConfigError unless a tag is a plain folder name."""
    if not isinstance(tag, str) or not (
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", tag) or (empty and tag == "")
    ):
        raise ConfigError(
            f"tag={tag!r} must be a plain name of letters, digits, '.', '_' and '-'; try d4."
        )


def check_separator(separator: object) -> None:
    """Raise a ConfigError unless a document separator can occur within one line of text."""
    if not isinstance(separator, str) or not separator.strip() or len(separator.splitlines()) > 1:
        raise ConfigError(
            f"corpus_separator={separator!r} must be auto, none or a mark within one line; "
            "try '<|endoftext|>'."
        )


def check_training(config: PretrainConfig | FinetuneConfig, row_tokens: int) -> None:
    """Raise a ConfigError for sizes and durations that no run can have."""
    check_number("batch_tokens", config.batch_tokens, low=1, whole=True)
    check_number("steps", config.steps, low=0, whole=True)
    check_number("seconds", config.seconds, low=0)
    check_number("seed", config.seed, low=0, whole=True)
    check_rows(config.batch_tokens, row_tokens)


def check_rows(batch_tokens: int, sequence_len: int, whose: str = "model.") -> None:
    """Raise a ConfigError unless a batch is a whole number of rows; `whose` prefixes sequence_len in it."""
    if batch_tokens % sequence_len:
        near = max(1, round(batch_tokens / sequence_len)) * sequence_len
        rule = f"must be a multiple of {whose}sequence_len={sequence_len}"
        raise ConfigError(f"batch_tokens={batch_tokens} {rule}; try {near}.")
