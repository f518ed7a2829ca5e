"""Distil a large model into a small one, and measure how much of it the student retains.

Decides where the student's text comes from: a corpus or conversations, cut into rows as in the other stages.
A share of the rows may be the student's own continuations of a text, so that it learns where its own mistakes
lead. The control is the same run with alpha=1, without a teacher.
Reference: Hinton et al. 2015; Agarwal et al. 2024 (on-policy distillation); `train.distill` for the loss.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import Loaded, load_checkpoint, save_checkpoint
from primechat.checkpoint.run_dir import recall_separator
from primechat.config import DistillConfig, GPTConfig, RuntimeConfig
from primechat.config.model import list_shapes, set_shape, shrink_model
from primechat.config.names import parse_plain
from primechat.config.stages import check_rows
from primechat.errors import ConfigError
from primechat.events import NoteEvent, OnEvent, TrainResult
from primechat.infer.engine import Engine
from primechat.infer.samples import write_continuation
from primechat.infer.sampling import draw_floats
from primechat.metrics.retention import judge_writing, measure_retention, write_texts
from primechat.model.gpt import GPT
from primechat.seeds import derive_seed
from primechat.stages.finetune import make_job
from primechat.stages.job import Batches, Job
from primechat.stages.pretrain import (
    CHAT_PROMPTS,
    TEXT_PROMPTS,
    cache_corpus,
    identify_text,
    make_windows,
    pack_rows,
)
from primechat.stages.reading import check_resumed_text, describe_text
from primechat.stages.trainer import TrainingRun, pick_device
from primechat.text.batches import split_rows
from primechat.text.tokenizer import Tokenizer
from primechat.train.autotune import list_devices
from primechat.train.distill import DistillLoss, Mix, TeacherCache, make_projector, mark_own
from primechat.train.loop import SumLoss
from primechat.train.parallel import join_ranks, wait_turn

PROMPT_SHARE = 4  # a row written by the student begins with a quarter of a row of text
COMPARED_TOKENS = 16_384  # of each validation, for agreement and KL


def distill(
    config: DistillConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> TrainResult:
    """Train a student, or resume a run, and return its result; val_bpb is the student's.

    Raises:
        ConfigError: the settings contradict each other, the teacher or an existing run.
        CheckpointError: the teacher or the student cannot be opened, or their tokenizers differ.
    """
    # Teacher and student.
    device = list_devices(config.runtime.device)[0]
    teacher, tokenizer, meta = registry.open_model(config.teacher, device=device, on_event=on_event)
    if not isinstance(teacher, GPT):
        raise ConfigError(
            f"teacher={config.teacher!r} must be a model of this program's kind; try base/d20."
        )
    shape, start = choose_student(config, teacher.config, tokenizer)
    if on_event:
        share = shape.n_params / teacher.config.n_params
        said = f"The student has {shape.n_params:,} parameters, {share:.1%} of the teacher's"
        on_event(NoteEvent(text=f"{said} ({shape.n_layer} layers of width {shape.n_embd})."))

    # The text, as a job without a teacher.
    pretend = Loaded(step=0, config=shape, model_state={}, meta={"user_config": {}})
    plain = (
        make_job(config, pretend, tokenizer, meta["identifier"], on_event)
        if config.dialogues
        else make_text_job(config, shape, tokenizer, on_event)
    )

    # The loss, and the job that adds the teacher.
    mix = Mix(
        alpha=config.alpha,
        temperature=config.temperature,
        kind=config.loss,
        beta=config.beta,
        hidden=config.hidden if config.alpha < 1 else 0.0,
        top_k=config.top_k,
    )
    if not config.dialogues or config.learn == "all":
        plain = replace(plain, family="base")
    made: dict[str, GPT] = {}
    kept = {
        **vars(plain),
        "open_batches": mix_own_words(config, plain, made, tokenizer),
        "meta": {**plain.meta, "teacher": meta["identifier"]},
        "start_state": None if start is None else (lambda: start.model_state),
    }
    job = DistillJob(
        **kept,
        teacher=teacher,
        mix=mix,
        seed=config.seed,
        made=made,
        cache=open_teacher_cache(config, teacher, meta["identifier"], shape.sequence_len),
    )
    return TrainingRun(config, job, on_event, stop).run()


def mix_own_words(
    config: DistillConfig, plain: Job, made: dict[str, GPT], tokenizer: Tokenizer
) -> Callable[[int, int, int, dict[str, Any] | None], Batches]:
    """Return a function that opens a job's batches, of which the student writes `config.on_policy`."""

    def open_batches(
        rows: int, rank: int, world_size: int, cursor: dict[str, Any] | None
    ) -> Batches:
        inner = plain.open_batches(rows, rank, world_size, cursor)
        if not config.on_policy:
            return inner
        first, _ = split_rows(rows, rank, world_size)
        student, share = made["student"], config.on_policy
        return OwnBatches(inner, student, tokenizer, share, config.seed, first_row=first)

    return open_batches


def choose_student(
    config: DistillConfig, teacher: GPTConfig, tokenizer: Tokenizer
) -> tuple[GPTConfig, Loaded | None]:
    """Return the student's shape, and the checkpoint to start from or None.

    Raises:
        ConfigError: only some of n_layer, n_embd and n_head are given.
        CheckpointError: the checkpoint and the teacher have different tokenizers.
    """
    if config.base:
        folder, name = registry.locate_model(parse_plain(config.base))
        loaded = load_checkpoint(folder, name.step)
        registry.check_pair(loaded.config, loaded.meta, tokenizer, config.base)
        return loaded.config, loaded
    given = (config.n_layer, config.n_embd, config.n_head)
    if any(given):
        if not all(given):
            names = "n_layer={}, n_embd={}, n_head={}".format(*given)
            raise ConfigError(f"{names} must be given together; or choose a size.")
        return set_shape(teacher, *given), None
    return shrink_model(teacher, config.size), None


def make_text_job(
    config: DistillConfig, shape: GPTConfig, tokenizer: Tokenizer, on_event: OnEvent | None
) -> Job:
    """Return the job of training a student on plain text."""
    config = recall_separator(config, registry.run_dir("base", config.tag))
    with wait_turn(join_ranks(pick_device(config.runtime.device))):
        fresh_text = check_resumed_text(
            config,
            tokenizer,
            lambda: identify_text(config),
            lambda: cache_corpus(config, "train", tokenizer, on_event),
            on_event,
        )
        train, val = (
            cache_corpus(config, split, tokenizer, on_event) for split in ("train", "val")
        )
    T = shape.sequence_len
    check_rows(config.batch_tokens, T, "")
    return Job(
        family="base",
        model=shape,
        start_state=None,
        tokenizer=tokenizer,
        open_batches=pack_rows(train, T, config.seed),
        open_windows=make_windows(val, T),
        val_tokens=val.tokens,
        default_steps=max(1, round(train.tokens / config.batch_tokens)),
        prompts=CHAT_PROMPTS if config.corpus == "chitchat" else TEXT_PROMPTS,
        write_sample=write_continuation,
        meta=describe_text(config.corpus, identify_text(config)),
        fresh_text=fresh_text,
    )


def open_teacher_cache(
    config: DistillConfig, teacher: GPT, name: str, T: int
) -> TeacherCache | None:
    """Return the cache of the teacher's most likely tokens, or None if `top_k` is 0.

    Its key contains the weights, as a tag may be trained again, and the name, which has an adapter's scale.
    """
    if not config.top_k:
        return None
    if config.top_k > teacher.vocab_size:
        raise ConfigError(
            f"top_k={config.top_k} must be at most {teacher.vocab_size}, all tokens; try 32."
        )
    key = f"{name} {config.top_k} {config.temperature} {T} {config.layout == 'masked'}"
    sha = hashlib.sha256(key.encode())
    for tensor in teacher.state_dict().values():
        sha.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return TeacherCache(
        registry.base_dir() / "teacher_cache" / sha.hexdigest()[:24], config.top_k, T
    )


@dataclass(frozen=True, kw_only=True)
class DistillJob(Job):
    """A job whose loss compares with a teacher; `made` holds the student once it exists."""

    teacher: GPT
    mix: Mix
    seed: int
    cache: TeacherCache | None
    made: dict[str, GPT]

    def prepare(self, model: GPT) -> None:
        """Add a projector to the student if hidden states are compared."""
        self.made["student"] = model
        if self.mix.hidden:
            width = self.teacher.config.n_embd
            model.add_module(
                "projector",
                make_projector(self.model.n_embd, width, derive_seed(self.seed, "projector")),
            )

    def fill_model(self, model: GPT, loaded: Loaded | None, seed: int) -> None:
        """Load or draw the weights, with the projector of the checkpoint or a new one."""
        self.prepare(model)
        extra = {k: v for k, v in model.state_dict().items() if k.startswith("projector")}
        if loaded is not None and loaded.optim_state is not None:
            extra |= loaded.optim_state.get("projector", {})
        if loaded is None and self.start_state is None:
            # A seed of its own, so that the student does not start with the teacher's initial weights.
            model.init_weights(torch.Generator().manual_seed(derive_seed(seed, "student")))
            self.prepare(model)
        else:
            state = loaded.model_state if loaded is not None else self.start_state()  # type: ignore[misc]
            model.load_state_dict({**state, **extra})

    def make_loss(self, model: GPT, runtime: RuntimeConfig) -> SumLoss:
        """Return the loss against the teacher."""
        return DistillLoss(model, self.teacher, self.mix, self.cache, self.bos_id)

    def save_step(
        self, folder: Any, step: int, model: GPT, optim_state: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        """Save the student; the projector is saved with the optimizer, as only training needs it."""
        state, shapes = model.state_dict(), list_shapes(self.model)
        extra = {key: tensor for key, tensor in state.items() if key not in shapes}
        save_checkpoint(
            folder,
            step,
            model_state={key: state[key] for key in shapes},
            config=self.model,
            optim_state={**optim_state, "projector": extra},
            meta=meta,
        )

    def weigh_scoring(self) -> float:
        """Return the forward passes per scored token, including the comparison of student and teacher."""
        return super().weigh_scoring() + 1 + self.teacher.config.n_params / self.model.n_params

    def measure_more(self, model: GPT, tokens: int) -> dict[str, Any]:
        """Return the retention on the beginning of the validation text, and the variety of written texts."""
        windows = list(self.open_windows(min(tokens or COMPARED_TOKENS, COMPARED_TOKENS), 0, 1))
        self.teacher.compute_dtype = model.compute_dtype
        found = measure_retention(model, self.teacher, windows, self.tokenizer.byte_lengths()).total
        compared = {
            "retention": found.retention,
            "agreement": found.agreement,
            "kl_nats": found.kl_nats,
        }
        return compared | judge_writing(write_texts(model, self.tokenizer, windows))


class OwnBatches:
    """Batches in which a share of the rows is written by the student, from the beginning of a row of text.

    Each row of a step has its own random stream, whatever its rank: `first_row` is this rank's first row.
    """

    def __init__(
        self,
        inner: Batches,
        model: GPT,
        tokenizer: Tokenizer,
        share: float,
        seed: int,
        first_row: int = 0,
    ) -> None:
        self.inner, self.share, self.seed, self.first_row = inner, share, seed, first_row
        self.engine = Engine(model, tokenizer)
        self.source = iter(inner)

    @property
    def cursor(self) -> dict[str, Any]:
        """The position of the next token in the text."""
        return self.inner.cursor

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Return ids and targets (R, T); the targets of tokens that the student wrote are marked."""
        # Draw which rows the student writes.
        place = [int(v) for v in self.cursor.values() if isinstance(v, int)]
        ids, targets = next(self.source)
        seeds = [
            derive_seed(self.seed, "own words", *place, self.first_row + i) for i in range(len(ids))
        ]
        mine = [i for i, seed in enumerate(seeds) if next(draw_floats(seed)) < self.share]
        T = ids.size(1)
        start = max(1, T // PROMPT_SHARE)
        if not mine:
            return ids, targets

        # Continue the beginning of each of these rows.
        prompts = [ids[i, :start].tolist() for i in mine]
        written = self.engine.generate_batch(
            prompts,
            max_new_tokens=T + 1 - start,
            seeds=[derive_seed(seeds[i], "words") for i in mine],
            stop_ids=(),
        )

        # Replace the rows; the prompt itself is not a target.
        ids, targets = ids.clone(), targets.clone()
        for i, words in zip(mine, written, strict=True):
            row = torch.tensor([*prompts[mine.index(i)], *words])
            ids[i] = row[:-1]
            targets[i] = -1
            targets[i, start - 1 :] = mark_own(row[start:], self.engine.tokenizer.vocab_size)
        return ids, targets
