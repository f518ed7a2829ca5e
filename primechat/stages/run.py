"""What every training stage does around the loop: one run directory, frozen settings, events, checkpoints,
resuming.

Hides: the order in which things become durable. A run's folder holds config.json (the settings with nothing
left open), metrics.jsonl (one event a line), the checkpoints and a tokenizer of its own. Only rank 0 writes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from primechat import store
from primechat.config import FinetuneConfig, PretrainConfig, decode_config, encode_config, find_difference
from primechat.errors import ConfigError
from primechat.infer.engine import Engine
from primechat.metrics.bits import Bits, measure_bits
from primechat.model.checkpoint import (
    find_steps,
    measure_snapshots,
    prune_checkpoints,
    save_snapshot,
)  # fmt: skip
from primechat.model.gpt import GPT
from primechat.model.runlog import MetricsLog, RunLock, read_metrics, write_whole
from primechat.records import (
    CheckpointEvent,
    DoneEvent,
    Event,
    LossEvent,
    NoteEvent,
    OnEvent,
    PhaseEvent,
    ProgressEvent,
    SampleEvent,
    StepEvent,
    TrainResult,
    encode_record,
)  # fmt: skip
from primechat.stages.job import Job as Job
from primechat.train.loop import fit
from primechat.train.optim import Optimizer
from primechat.train.parallel import Ranks, any_rank, gather_objects, join_ranks, share_object, sum_numbers
from primechat.train.tune import Tuning, tune_runtime

Config = TypeVar("Config", bound=PretrainConfig | FinetuneConfig)
SAMPLE_TOKENS = 48
SAVE_EVERY_S = 60.0
GENERAL_TOKENS = 100_000  # where the whole validation split is scored at the end
OPEN_FIELDS = ("resume", "steps")  # what a resumed run may leave out: it takes the frozen value


def write_continuation(engine: Engine, prompt: str, seed: int) -> str:
    """Return what the model writes after a prompt."""
    return engine.complete(prompt, max_new_tokens=SAMPLE_TOKENS, temperature=0.8, top_k=50, seed=seed).read()


def open_folder(config: PretrainConfig | FinetuneConfig, family: str) -> Path:
    """Return the run's folder.

    Raises:
        ConfigError: it holds steps and the config does not say resume, or says resume and there is nothing.
    """
    folder = store.run_dir(family, config.tag)
    steps = find_steps(folder)
    if steps and not config.resume:
        raise ConfigError(
            f"tag={config.tag!r} has a {family} model of {steps[-1]} steps in {folder}; resume it "
            "(--resume) or choose "
            "another tag."
        )
    if config.resume and not (folder / "config.json").exists():
        raise ConfigError(
            f"tag={config.tag!r} has no {family} run to resume in {folder}; leave out --resume to start it."
        )
    return folder


def read_frozen(folder: Path, kind: type[Config]) -> Config:
    """Return the settings that a run froze.

    Raises:
        ConfigError: they are missing or damaged.
    """
    path = folder / "config.json"
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); restore it, or start under another tag."
        ) from error
    return decode_config(data, kind, str(path))


def take_frozen(config: Config, folder: Path) -> Config:
    """Return the settings that a run froze, once it is sure that the given ones do not contradict them.

    Raises:
        ConfigError: a field differs, by name.
    """
    frozen = read_frozen(folder, type(config))
    given = replace(
        config, runtime=fill_open(config.runtime, frozen.runtime), look=fill_open(config.look, frozen.look)
    )
    ignore = OPEN_FIELDS if not config.steps else OPEN_FIELDS[:1]
    difference = find_difference(frozen, given, ignore)
    if difference:
        raise ConfigError(
            f"{difference} (the run's, then yours): a resumed run must keep its settings; drop that flag, "
            "or start under "
            "another tag."
        )
    return replace(frozen, resume=True)


def fill_open(given: Any, frozen: Any) -> Any:
    """Return the given settings with the frozen ones where they were left open (auto or 0)."""
    names = [item.name for item in dataclasses.fields(given) if getattr(given, item.name) in ("auto", 0)]
    kept = {n: getattr(frozen, n) for n in names if not isinstance(getattr(given, n), bool)}
    return replace(given, **kept)


def pick_power(step: int) -> bool:
    """Tell whether a step gets a snapshot: 0, 1, 2, 4, 8 ..."""
    return step & (step - 1) == 0


class TrainingRun:
    """One run from its folder to its result; `work` does it."""

    def __init__(
        self,
        config: PretrainConfig | FinetuneConfig,
        job: Job,
        on_event: OnEvent | None,
        stop: threading.Event | None,
    ) -> None:
        self.config, self.job, self.stop = config, job, stop or threading.Event()
        self.t_start, self.on_event = time.perf_counter(), on_event
        self.folder = open_folder(config, job.family)
        self.ranks: Ranks = join_ranks(pick_device(config.runtime.device))
        self.log: MetricsLog | None = None
        self.last_bits, self.saved_step, self.t_saved, self.save_s = Bits(), -1, time.monotonic(), 0.0
        self.trained_s, self.tokens, self.tokens_per_s = 0.0, 0, 0.0

    def tell(self, event: Event) -> None:
        """Pass an event on, and log it where it belongs to the run's history."""
        if not self.ranks.is_main:
            return
        if self.log and event.kind in ("step", "loss", "sample", "checkpoint", "done"):
            self.log.append(encode_record(event))
        if self.on_event:
            self.on_event(event)

    def work(self) -> TrainResult:
        """Do the run, holding its lock."""
        threads = torch.get_num_threads()
        try:
            with RunLock(self.folder) if self.ranks.is_main else nullcontext():
                return self.train()
        finally:
            torch.set_num_threads(threads)

    def train(self) -> TrainResult:
        """Set up, train, and return the result."""
        job, world = self.job, self.ranks.world_size
        rows, unit = self.config.batch_tokens // job.model.sequence_len, job.model.sequence_len * world
        if self.config.batch_tokens % unit:
            raise ConfigError(
                f"batch_tokens={self.config.batch_tokens} must be a multiple of sequence_len x ranks = "
                f"{job.model.sequence_len} x {world}; try {unit * max(1, rows // world)}."
            )
        config = self.config
        loaded = None
        if config.resume:
            config = take_frozen(config, self.folder)
            if find_steps(self.folder):
                loaded = job.load_step(self.folder)
                for reason in loaded.skipped:
                    self.tell(NoteEvent(text=f"Skipped {reason}"))
        self.config = config
        model = GPT(job.model)
        job.prepare(model)
        rank, world = self.ranks.rank, self.ranks.world_size
        loss = None
        if not config.resume:
            tuning = self.tune(model, *next(iter(job.open_batches(rows, rank, world, None))))
            loss = tuning.loss
            config = self.config = self.freeze(tuning)
        if self.ranks.is_main:
            self.write_config()
        device, dtype = config.runtime.device, getattr(torch, config.runtime.dtype)
        if config.runtime.threads:
            torch.set_num_threads(config.runtime.threads)
        model.to("cpu")  # fresh weights are drawn there, so that they are the same on every device
        model.compute_dtype = dtype
        job.fill_model(model, loaded, config.seed)
        model.to(device)
        optimizer = Optimizer(model, config.optim, job.model.n_embd, half=dtype == torch.bfloat16)
        start_step, cursor = 0, None
        if loaded is not None and loaded.optim_state is not None:
            optimizer.load_state_dict(loaded.optim_state["optimizer"])
            torch.set_rng_state(loaded.optim_state["rng"])
            start_step, cursors = loaded.step, loaded.meta["cursors"]
            cursor = cursors[rank] if rank < len(cursors) else cursors[0]
            self.trained_s, self.tokens = float(loaded.meta["train_s"]), int(loaded.meta["tokens"])
            self.tell(NoteEvent(text=f"Going on from step {start_step} of {config.steps}."))
        if self.ranks.is_main:
            self.log = MetricsLog(self.folder)
            self.log.drop_after(start_step if loaded is not None else -1)
        self.saved_step = start_step  # step 0 needs no checkpoint: it is drawn again
        self.model, self.optimizer = model, optimizer
        self.batches = job.open_batches(rows, rank, world, cursor)
        self.engine = Engine(model, job.tokenizer)
        self.tell(PhaseEvent(name=f"training {job.identify(config.tag)}", total=config.steps, unit="steps"))
        offset_s = self.trained_s

        def on_step(event: StepEvent) -> None:
            self.trained_s, self.tokens_per_s = event.elapsed_s, event.tokens_per_s
            self.tokens += event.tokens
            self.tell(event)

        step = fit(
            optimizer,
            self.batches,
            loss or job.make_loss(model, config.runtime),
            steps=config.steps,
            start_step=start_step,
            micro_batch_rows=config.runtime.micro_batch_rows,
            device=device,
            elapsed_s=offset_s,
            on_step=on_step,
            on_eval=self.look,
            on_save=self.save,
            stop=self.stop,
        )
        stopped = step < config.steps
        self.tell(DoneEvent(step=step, elapsed_s=self.trained_s, stopped=stopped))
        return TrainResult(
            identifier=job.identify(config.tag),
            path=str(self.folder.relative_to(store.base_dir())),
            step=step,
            stopped=stopped,
            val_bpb=self.last_bits.bpb
            if self.last_bits.n_bytes or loaded is None
            else loaded.meta["val_bpb"],
            n_params=job.count_params(model),
            tokens=self.tokens,
            tokens_per_s=self.tokens / self.trained_s if self.trained_s else 0.0,
            train_s=self.trained_s,
            total_s=time.perf_counter() - self.t_start,
            events=tuple(read_metrics(self.folder / "metrics.jsonl")) if self.ranks.is_main else (),
        )

    def tune(self, model: GPT, ids: Tensor, targets: Tensor) -> Tuning:
        """Measure how to run, on rank 0's word."""
        config = self.config
        self.tell(PhaseEvent(name="measuring this machine", total=0, unit="s"))
        steps = config.steps or self.job.default_steps

        def make_optimizer() -> Optimizer:
            return Optimizer(
                model, config.optim, self.job.model.n_embd, half=model.compute_dtype == torch.bfloat16
            )

        tuning = tune_runtime(
            model,
            make_optimizer,
            ids,
            targets,
            config.runtime,
            self.ranks,
            seconds=config.seconds,
            steps=steps,
            make=self.job.make_loss,
        )
        for note in tuning.notes:
            self.tell(NoteEvent(text=note))
        return tuning

    def freeze(self, tuning: Tuning) -> Any:
        """Return the config with nothing left open."""
        config = self.config
        steps = config.steps
        if not steps and config.seconds:
            steps = max(1, int((config.seconds - tuning.compile_s) / tuning.step_s))
        steps = share_object(steps or self.job.default_steps)
        every = config.look.eval_every or max(1, math.ceil(steps / 10))
        look = replace(config.look, eval_every=every, sample_every=config.look.sample_every or every)
        return replace(config, steps=steps, runtime=tuning.runtime, look=look)

    def write_config(self) -> None:
        """Write config.json and the run's own copy of the tokenizer."""
        self.job.tokenizer.save(self.folder / "tokenizer")
        text = json.dumps(encode_config(replace(self.config, resume=False)), indent=2)
        write_whole(self.folder / "config.json", text.encode())

    def look(self, step: int, last: bool) -> None:
        """Validate and sample where it is time to."""
        config = self.config
        if last or step % config.look.eval_every == 0:
            tokens = self.job.last_eval_tokens if last else config.look.eval_tokens
            self.last_bits = self.measure("validation", self.job.open_windows, tokens)
            general = None
            if self.job.open_general:
                few = tokens or GENERAL_TOKENS
                general = self.measure("general text", self.job.open_general, few).bpb
            self.tell(
                LossEvent(
                    step=step,
                    val_bpb=self.last_bits.bpb,
                    val_loss_nats=self.last_bits.loss_nats,
                    whole=tokens == 0,
                    elapsed_s=self.trained_s,
                    general_bpb=general,
                    **self.job.measure_more(self.model, tokens),
                )
            )
        if (
            self.ranks.is_main
            and config.look.sample_every > 0
            and (last or step % config.look.sample_every == 0)
        ):
            for prompt in self.job.prompts:
                text = self.job.write_sample(self.engine, prompt, step)
                self.tell(SampleEvent(step=step, prompt=prompt, text=text))

    def measure(
        self, name: str, opened: Callable[[int, int, int], Iterable[tuple[Tensor, Tensor]]], tokens: int
    ) -> Bits:
        """Score a text over all ranks."""
        self.tell(PhaseEvent(name=name, total=tokens, unit="tokens"))
        windows = opened(tokens, self.ranks.rank, self.ranks.world_size)
        bits = measure_bits(
            lambda x, y: self.model.loss(x, y, "none"), windows, self.job.tokenizer.byte_lengths(),
            device=self.model.device, on_batch=lambda n: self.tell(ProgressEvent(done=n)),
        )  # fmt: skip
        nats, count, n_bytes = sum_numbers([bits.nats, bits.tokens, bits.n_bytes], self.model.device)
        return Bits(nats=nats, tokens=int(count), n_bytes=int(n_bytes))

    def save(self, step: int, last: bool) -> None:
        """Write a snapshot and a checkpoint where it is time to."""
        look, main = self.config.look, self.ranks.is_main
        small = look.snapshots and (last or pick_power(step))
        if main and small and measure_snapshots(self.folder) < look.snapshot_budget_mb * 1e6:
            save_snapshot(self.folder, step, self.model.state_dict(), self.job.model, self.describe(step))
            self.tell(CheckpointEvent(step=step, path=f"snapshots/model_{step:06d}.pt", snapshot=True))
        if look.save_every:
            due = step % look.save_every == 0
        else:
            due = time.monotonic() - self.t_saved > max(SAVE_EVERY_S, 30 * self.save_s)
        if step == self.saved_step or not any_rank(main and (last or due), self.model.device):
            return
        cursors = gather_objects(self.batches.cursor)
        self.saved_step, t_start = step, time.monotonic()
        if main:
            state = {"optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
            meta = {**self.describe(step), "cursors": cursors}
            self.job.save_step(self.folder, step, self.model, state, meta)
            prune_checkpoints(self.folder, look.keep_checkpoints)
            self.tell(CheckpointEvent(step=step, path=f"model_{step:06d}.pt"))
        self.t_saved = time.monotonic()
        self.save_s = self.t_saved - t_start

    def describe(self, step: int) -> dict[str, Any]:
        """Return the metadata of a checkpoint."""
        known = math.isfinite(self.last_bits.bpb)
        return {
            **self.job.meta,
            "val_bpb": self.last_bits.bpb if known else None,
            "tokenizer_identity": self.job.tokenizer.identity,
            "tokens": self.tokens,
            "train_s": self.trained_s,
            "user_config": encode_config(self.config),
        }


def pick_device(wanted: str) -> str:
    """Return the kind of device that ranks talk over."""
    return wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
