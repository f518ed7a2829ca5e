"""What every training stage does around the loop: run directory, settings, events, checkpoints, resuming.

Decides the order in which files are written, so that a run killed at any moment can resume. The run directory
holds config.json (the settings with every open choice made), metrics.jsonl (one event per line), the
checkpoints and a copy of the tokenizer. Only rank 0 writes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import (
    Loaded,
    find_steps,
    measure_snapshots,
    prune_checkpoints,
    save_snapshot,
)
from primechat.checkpoint.run_dir import MetricsFile, RunDirLock, read_metrics, take_frozen
from primechat.config import EvalConfig, FinetuneConfig, PretrainConfig, encode_config
from primechat.config.history import rename_fields
from primechat.errors import ConfigError, DataError
from primechat.events import (
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
    count_noun,
    describe_bpb,
)
from primechat.files.paths import parse_json, write_file, write_whole
from primechat.infer.engine import Engine
from primechat.metrics.bits import Bits, score_windows, sum_windows
from primechat.model.gpt import GPT
from primechat.seeds import derive_seed
from primechat.stages.eval_budget import CHOSEN, LADDER, MOST_EVALS, Cost, plan_evals
from primechat.stages.job import Batches, Windows
from primechat.stages.job import Job as Job
from primechat.train.autotune import COMPILE_GUESS, Tuning, time_call, tune_runtime
from primechat.train.loop import SumLoss, fit
from primechat.train.optim import make_optimizer
from primechat.train.parallel import (
    Ranks,
    SpreadLoss,
    any_rank,
    broadcast_object,
    gather_objects,
    join_ranks,
)

logger = logging.getLogger(__name__)
SAVE_EVERY_S = 60.0
SETTLE_SHARE = 0.1
VALIDATION = "validation: the loss on text that it does not learn from"
LAST_CHECK = "last check: the loss on text that it has not seen"
GENERAL = "general text: how much of it is forgotten"
COMPILE_FILE = "compiling.json"  # in the base directory
OPEN_FILE = "steps_to_settle.json"  # in the run directory, while the number of steps is provisional
GENERAL_TOKENS = 100_000  # of the general text, when validation uses its whole split
TIMED_ROWS = 4  # windows scored to measure the speed of validation


def open_folder(config: PretrainConfig | FinetuneConfig, family: str) -> Path:
    """Return the run directory of a config.

    Raises:
        ConfigError: the directory holds checkpoints and `resume` is not set, or `resume` finds no run.
    """
    folder = registry.run_dir(family, config.tag)
    steps = find_steps(folder)
    if steps and not config.resume:
        raise ConfigError(
            f"tag={config.tag!r} has a {family} model of {count_noun(steps[-1], 'step')} in {folder}; "
            "resume it (--resume) or choose another tag."
        )
    if config.resume and not (folder / "config.json").exists():
        raise ConfigError(
            f"tag={config.tag!r} has no {family} run to resume in {folder}; leave out --resume to start it."
        )
    return folder


def describe_compiler() -> str:
    """Return a description of this machine for the compile measurements, which hold only on the same one."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"


def recall_compiling() -> dict[str, float]:
    """Return the compile time and speedup measured earlier on this machine, as `tune_runtime` takes them."""
    try:
        known = parse_json((registry.base_dir() / COMPILE_FILE).read_bytes())
        figures = {key: float(known[key]) for key in COMPILE_GUESS if key in known}
        fits = known["machine"] == describe_compiler() and all(
            0 < n < 1e6 for n in figures.values()
        )
        return figures if fits else {}
    except (OSError, ValueError, TypeError, LookupError):
        return {}  # missing or damaged: the default guess is used


def remember_compiling(learned: dict[str, float]) -> None:
    """Save the measured compile time and speedup; of the times the longest, as later ones hit a cache."""
    known = recall_compiling()
    longest = max(known.get("compile_s", 0.0), learned["compile_s"])
    figures = {"machine": describe_compiler(), **known, **learned, "compile_s": longest}
    with suppress(OSError):  # without the file, the next run measures again
        registry.base_dir().mkdir(parents=True, exist_ok=True)
        write_whole(registry.base_dir() / COMPILE_FILE, json.dumps(figures).encode())


def write_open_time(folder: Path, open_s: float) -> None:
    """Save the training time that a run should fill; 0 removes it, once the number of steps is final."""
    path = folder / OPEN_FILE
    if open_s:
        write_file(path, json.dumps({"seconds": open_s}))
    else:
        path.unlink(missing_ok=True)


def read_open_time(folder: Path) -> float:
    """Return the training time that a run without checkpoints should fill, or 0 if its steps are final."""
    try:
        return float(parse_json((folder / OPEN_FILE).read_bytes())["seconds"])
    except (OSError, ValueError, TypeError, LookupError):
        return 0.0


class TrainingRun:
    """A training run, from its directory to its result; `run` runs it."""

    def __init__(
        self,
        config: PretrainConfig | FinetuneConfig,
        job: Job,
        on_event: OnEvent | None,
        stop: threading.Event | None,
    ) -> None:
        self.config, self.job, self.stop = config, job, stop or threading.Event()
        self.asked_eval, self.t_start, self.on_event = config.eval, time.perf_counter(), on_event
        # While the number of steps is provisional: the time to fill, the steps taken by this process,
        # and the time of its first step.
        self.open_s, self.timed_steps, self.first_s, self.just_settled = 0.0, 0, 0.0, False
        self.folder = open_folder(config, job.family)
        self.ranks: Ranks = join_ranks(pick_device(config.runtime.device))
        seen = gather_objects((config.resume, find_steps(self.folder)))
        if any(one != seen[0] for one in seen):
            raise ConfigError(
                f"the machines find different steps in {self.folder}; set NANOCHAT_BASE_DIR to a disk that "
                "all of them share."
            )
        self.log: MetricsFile | None = None
        self.saved_step, self.t_saved, self.save_s = -1, time.monotonic(), 0.0
        self.trained_s, self.tokens, self.tokens_per_s = 0.0, 0, 0.0
        # The latest validation: its sums, its seconds including samples, and its seconds of scoring alone.
        self.last_bits, self.eval_s, self.score_s = Bits(), 0.0, 0.0
        self.n_evals = MOST_EVALS

    def emit(self, event: Event) -> None:
        """Emit an event, and log it if it belongs to the run's history."""
        if not self.ranks.is_main:
            return
        if self.log and event.kind in ("step", "loss", "sample", "checkpoint", "done"):
            if not self.log.append(asdict(event)) and self.log.lost == 1:
                reason = f"{self.log.path} cannot be written ({self.log.refusal})"
                self.notify(NoteEvent(text=f"{reason}; training goes on, its history has gaps."))
        self.notify(event)

    def notify(self, event: Event) -> None:
        """Pass an event to the listener; an output stream that fails must not end the training."""
        try:
            if self.on_event:
                self.on_event(event)
        except (OSError, UnicodeError) as error:
            self.on_event = None
            logger.warning("the training goes on unwatched: %s", error)

    def run(self) -> TrainResult:
        """Run the training while holding the lock of its directory."""
        threads = torch.get_num_threads()
        try:
            with RunDirLock(self.folder) if self.ranks.is_main else nullcontext():
                return self.train()
        finally:
            torch.set_num_threads(threads)

    def train(self) -> TrainResult:
        """Set up, train, and return the result."""
        # Settings: those of the run to resume, or measured and frozen.
        loaded = self.adopt_settings() if self.config.resume else None
        model = self.model = GPT(self.job.model)
        model.checkpoint_blocks = self.config.runtime.checkpoint_blocks
        self.job.prepare(model)
        loss = None if self.config.resume else self.choose_settings(model)
        if self.ranks.is_main:
            self.write_config()

        # Weights, optimizer state and history.
        self.fill_model(loaded)
        start_step, cursor = self.restore(loaded)
        self.open_log(start_step, loaded)

        # The loop.
        self.batches = self.open_batches(cursor)
        self.engine = Engine(model, self.job.tokenizer)
        name = f"training {self.job.identify(self.config.tag)}"
        self.emit(PhaseEvent(name=name, total=self.config.steps, unit="steps"))
        step = fit(
            self.optimizer,
            self.batches,
            loss or SpreadLoss(model, self.job.make_loss(model, self.config.runtime)),
            steps=self.config.steps,
            start_step=start_step,
            micro_batch_rows=self.config.runtime.micro_batch_rows,
            device=self.config.runtime.device,
            elapsed_s=self.trained_s,
            count_steps=self.count_steps,
            on_step=self.note_step,
            on_eval=self.evaluate,
            on_save=self.save,
            stop=self.stop,
        )

        stopped = step < self.config.steps
        self.emit(DoneEvent(step=step, elapsed_s=self.trained_s, stopped=stopped))
        return self.describe_result(step, stopped, loaded)

    def adopt_settings(self) -> Loaded | None:
        """Adopt the frozen settings of the run and return its latest checkpoint, or None if it has none."""
        self.config = take_frozen(self.config, self.folder)
        if not find_steps(self.folder):
            self.open_s = read_open_time(self.folder)
            return None

        loaded = self.job.load_step(self.folder)
        for reason in loaded.skipped:
            self.emit(NoteEvent(text=f"Skipped {reason}"))

        # The number of steps comes from the checkpoint: config.json may be older or newer.
        if "open_s" in loaded.meta:
            self.open_s = float(loaded.meta["open_s"])
            saved = rename_fields(loaded.meta["user_config"], type(self.config).__name__)
            saved_eval = rename_fields(saved["eval"], "EvalConfig")
            every = {name: saved_eval[name] for name in ("every", "sample_every")}
            evaluation = replace(self.config.eval, **every)
            self.config = replace(self.config, steps=saved["steps"], eval=evaluation)
            self.n_evals = math.ceil(saved["steps"] / evaluation.every)
        return loaded

    def choose_settings(self, model: GPT) -> SumLoss | None:
        """Freeze the open settings; return the loss to train with if tuning has built it, else None."""
        batches = self.open_batches(None)
        tuning = self.tune(model, *next(iter(batches)))
        getattr(batches, "close", lambda: None)()
        self.config = self.freeze(tuning)
        return tuning.loss if self.ranks.world_size == 1 else None

    def open_batches(self, cursor: dict[str, Any] | None) -> Batches:
        """Return this rank's batches, starting at a cursor."""
        rows = self.config.batch_tokens // self.job.model.sequence_len
        return self.job.open_batches(rows, self.ranks.rank, self.ranks.world_size, cursor)

    def fill_model(self, loaded: Loaded | None) -> None:
        """Load the initial or resumed weights, move the model to its device and create its optimizer."""
        runtime, model = self.config.runtime, self.model
        if runtime.threads:
            torch.set_num_threads(runtime.threads)
        model.to(
            "cpu"
        )  # fresh weights are drawn on the CPU, so that they do not depend on the device
        model.compute_dtype = getattr(torch, runtime.dtype)
        self.job.fill_model(model, loaded, self.config.seed)
        model.to(runtime.device)
        self.optimizer = make_optimizer(model, self.config.optim)

    def restore(self, loaded: Loaded | None) -> tuple[int, dict[str, Any] | None]:
        """Restore the optimizer; return the step and the text cursor to resume from."""
        if loaded is None or loaded.optim_state is None:
            return 0, None
        self.optimizer.load_state_dict(loaded.optim_state["optimizer"])
        torch.set_rng_state(loaded.optim_state["rng"])
        self.trained_s, self.tokens = float(loaded.meta["train_s"]), int(loaded.meta["tokens"])
        self.t_start -= float(loaded.meta.get("spent_s", 0))
        self.emit(NoteEvent(text=f"Going on from step {loaded.step} of {self.config.steps}."))
        return loaded.step, None if self.job.fresh_text else loaded.meta["cursors"][0]

    def open_log(self, start_step: int, loaded: Loaded | None) -> None:
        """Open the run's history and drop the events after the step to resume from."""
        self.saved_step = start_step  # step 0 needs no checkpoint: its weights can be drawn again
        if self.ranks.is_main:
            self.log = MetricsFile(self.folder)
            self.log.drop_after(start_step if loaded is not None else -1)

    def note_step(self, event: StepEvent) -> None:
        """Record a finished step, and stop the run once its budget is spent."""
        self.trained_s, self.tokens_per_s = event.elapsed_s, event.tokens_per_s
        self.tokens += event.tokens
        self.emit(replace(event, left_s=self.estimate_left(event)))
        spent_s = time.perf_counter() - self.t_start
        if spent_s > self.config.runtime.budget_s and not self.stop.is_set():
            self.stop.set()
            rest = "resume with a higher --max-hours or --max-dollars to go on"
            said = f"The budget is spent ({spent_s / 3600:.2f} h): saving; {rest}."
            self.emit(NoteEvent(text=said))

    def describe_result(self, step: int, stopped: bool, loaded: Loaded | None) -> TrainResult:
        """Return the result of the run."""
        val_bpb, val_tokens = self.last_bits.bpb, self.last_bits.tokens
        if loaded is not None and not self.last_bits.n_bytes:
            val_bpb, val_tokens = loaded.meta["val_bpb"], loaded.meta.get("val_tokens") or 0
        events = read_metrics(self.folder / "metrics.jsonl") if self.ranks.is_main else []
        return TrainResult(
            identifier=self.job.identify(self.config.tag),
            path=str(self.folder.relative_to(registry.base_dir())),
            step=step,
            stopped=stopped,
            n_params=self.job.count_params(self.model),
            tokens=self.tokens,
            val_bpb=val_bpb,
            tokens_per_s=self.tokens / self.trained_s if self.trained_s else 0.0,
            train_s=self.trained_s,
            total_s=time.perf_counter() - self.t_start,
            val_tokens=val_tokens,
            events=tuple(events),
        )

    def tune(self, model: GPT, ids: Tensor, targets: Tensor) -> Tuning:
        """Return the fastest runtime settings, measured here; all ranks use the choice of rank 0."""
        config = self.config
        steps = config.steps or self.job.default_steps
        tuning = tune_runtime(
            model,
            lambda: make_optimizer(model, config.optim),
            ids,
            targets,
            config.runtime,
            self.ranks,
            seconds=config.seconds,
            steps=steps,
            known=recall_compiling(),
            make=self.job.make_loss,
            on_phase=lambda name, seconds: self.emit(
                PhaseEvent(name=name, total=seconds, unit="s")
            ),
        )
        for note in tuning.notes:
            self.emit(NoteEvent(text=note))
        if self.ranks.is_main and tuning.learned:
            remember_compiling(tuning.learned)
        return tuning

    def freeze(self, tuning: Tuning) -> Any:
        """Return the config with every open setting chosen."""
        config = replace(self.config, runtime=tuning.runtime)
        steps = config.steps
        if not steps and config.seconds:
            self.open_s = config.seconds - tuning.compile_s
            steps = max(1, int(self.open_s / tuning.step_s))
        steps = broadcast_object(steps or self.job.default_steps)
        train_s = broadcast_object(self.open_s or steps * tuning.step_s)
        config = replace(config, eval=self.choose_evals(config, steps, train_s))
        return self.plan_steps(config, steps)

    def choose_evals(self, config: Any, steps: int, train_s: float) -> EvalConfig:
        """Return the validation settings, with open token counts chosen from the measured speed."""
        if CHOSEN not in (config.eval.tokens, config.eval.last_tokens):
            return config.eval
        whole = self.whole_tokens
        cost = broadcast_object(self.time_validation(config.runtime.device))
        evaluation, self.n_evals = plan_evals(
            config.eval, steps=steps, train_s=train_s, cost=cost, whole=whole
        )
        during, last = (evaluation.tokens or whole, evaluation.last_tokens or whole)
        said = f"Validation: about {min(during, whole):,} tokens each time, {min(last, whole):,} at the end"
        self.emit(NoteEvent(text=f"{said}, of {whole:,}: as many as the run's time allows."))
        return evaluation

    @property
    def whole_tokens(self) -> int:
        """Number of validation tokens that count as the whole split."""
        whole, most = self.job.val_tokens, self.job.most_eval_tokens
        return min(whole, most) if most else whole

    def time_validation(self, device: str) -> Cost:
        """Return the cost of a validation, measured on a few windows."""
        ids, targets = next(iter(self.job.open_windows(LADDER[0], 0, 1)))
        ids, targets = ids[:TIMED_ROWS].to(device), targets[:TIMED_ROWS].to(device)

        def score() -> None:
            with torch.no_grad():
                self.model.loss(ids, targets, "none")

        pass_s = time_call(score, device) / ids.numel() / self.ranks.world_size
        t_start = time.perf_counter()
        self.job.measure_more(self.model, LADDER[0])
        more_s = time.perf_counter() - t_start
        return Cost(token_s=pass_s * self.job.weigh_scoring(), fixed_s=more_s)

    def plan_steps(self, config: Any, steps: int) -> Any:
        """Return the config with its number of steps set and its evaluations spread over them."""
        every = self.asked_eval.every or max(1, math.ceil(steps / self.n_evals))
        evaluation = replace(
            config.eval, every=every, sample_every=self.asked_eval.sample_every or every
        )
        return replace(config, steps=steps, eval=evaluation)

    def count_steps(self, step: int, elapsed_s: float) -> int:
        """Return the number of steps of the run.

        For a run of a given time the number becomes final after the first tenth of that time: a few steps
        measured beforehand, on a processor shared with other programs, may be half as fast.
        """
        if self.open_s:
            self.settle_steps(step, elapsed_s)
        return int(self.config.steps)

    def settle_steps(self, step: int, elapsed_s: float) -> None:
        """Fix the number of steps that fills the run's time, once the speed is known well enough."""
        self.timed_steps += 1
        if self.timed_steps == 1:
            # The first step is slower: it creates the optimizer's state and may compile again.
            self.first_s = elapsed_s
        due = elapsed_s > SETTLE_SHARE * self.open_s or step == self.config.steps
        if not any_rank(due, self.model.device):
            return

        # The speed of all steps but the first gives the steps that fit into the rest of the time.
        counted = self.timed_steps - 1
        step_s = (elapsed_s - self.first_s) / counted if counted else elapsed_s / step
        steps = broadcast_object(step + max(1, round((self.open_s - elapsed_s) / step_s)))
        self.open_s, self.config = 0.0, self.plan_steps(self.config, steps)
        self.just_settled = True

    def write_config(self) -> None:
        """Write the run's copy of the tokenizer, config.json, and the time that the run should fill."""
        self.job.tokenizer.save(self.folder / "tokenizer")
        text = json.dumps(encode_config(replace(self.config, resume=False)), indent=2)
        write_file(self.folder / "config.json", text)
        write_open_time(self.folder, self.open_s)

    def evaluate(self, step: int, last: bool) -> None:
        """Validate and write samples, if they are due at this step."""
        t_start = time.perf_counter()
        evaluation = self.config.eval
        validates = last or step % evaluation.every == 0
        if validates:
            self.validate(step, last)

        due = evaluation.sample_every > 0 and (last or step % evaluation.sample_every == 0)
        if due and self.ranks.is_main and not self.stop.is_set():
            for i, prompt in enumerate(self.job.prompts):
                seed = derive_seed(self.config.seed, "sample", step, i)
                text = self.job.write_sample(self.engine, prompt, seed)
                self.emit(SampleEvent(step=step, prompt=prompt, text=text))
        if validates:
            self.eval_s = time.perf_counter() - t_start

    def validate(self, step: int, last: bool) -> None:
        """Score the validation text and emit its loss; if stopped early, only the last check still counts."""
        evaluation, whole = self.config.eval, self.whole_tokens
        tokens = (
            evaluation.last_tokens if last else evaluation.tokens
        ) or self.job.most_eval_tokens
        t_start = time.perf_counter()
        scored, cut_short = self.score(
            LAST_CHECK if last else VALIDATION, self.job.open_windows, tokens
        )
        self.score_s = time.perf_counter() - t_start
        if cut_short and not last:
            return

        # The windows that every validation of this run scores give a second, comparable figure.
        bits = self.last_bits = sum_windows([scored])
        n_paired = -(-(evaluation.tokens or whole) // self.job.model.sequence_len)
        paired = sum_windows([scored[:n_paired]]) if len(scored) >= n_paired else None
        more: dict[str, Any] = {}
        if not any_rank(self.stop.is_set(), self.model.device):
            more = self.measure_more(tokens)
        event = LossEvent(
            step=step,
            val_bpb=bits.bpb,
            val_loss_nats=bits.loss_nats,
            whole=not cut_short and (not tokens or tokens >= self.job.val_tokens),
            elapsed_s=self.trained_s,
            tokens=bits.tokens,
            cut_short=cut_short,
            paired_bpb=paired.bpb if paired else None,
            paired_loss_nats=paired.loss_nats if paired else None,
            **more,
        )
        self.emit(event)
        if cut_short:
            said = describe_bpb(bits.bpb, bits.tokens)
            self.emit(NoteEvent(text=f"The last check was stopped: {said} of about {whole:,}."))

    def measure_more(self, tokens: int) -> dict[str, Any]:
        """Return further measurements of a validation: the loss on a general text, and those of the stage.

        The general text is scored on the same number of tokens each time, as only the change matters.
        """
        general = None
        if self.job.open_general:
            few = self.config.eval.tokens or GENERAL_TOKENS
            general = sum_windows([self.score(GENERAL, self.job.open_general, few)[0]]).bpb
        return {"general_bpb": general, **self.job.measure_more(self.model, tokens)}

    def score(self, name: str, opened: Windows, tokens: int) -> tuple[np.ndarray, bool]:
        """Return the scores of a text's windows, computed by all ranks, up to its end or the run's stop.

        At least one batch of windows is scored.

        Returns:
            Nats, tokens and bytes of each window, (N, 3) in the order of the windows, and whether some of
            them are missing.
        """
        total = tokens or self.whole_tokens
        self.emit(PhaseEvent(name=name, total=total, unit="tokens"))
        windows = iter(opened(tokens, self.ranks.rank, self.ranks.world_size))
        batches: list[np.ndarray] = []
        done = 0
        for scored in score_windows(
            lambda x, y: self.model.loss(x, y, "none"),
            windows,
            self.job.tokenizer.byte_lengths(),
            device=self.model.device,
            stop=self.stop,
        ):
            batches.append(scored)
            done += len(scored) * self.job.model.sequence_len * self.ranks.world_size
            self.emit(ProgressEvent(done=min(done, total)))
        cut_short = self.stop.is_set() and next(windows, None) is not None

        # Batch i belongs to rank i modulo the number of ranks; in this order the sums do not depend on it.
        everyone = gather_objects((batches, cut_short))
        turns = zip_longest(*(theirs for theirs, _ in everyone))
        rows = [batch for turn in turns for batch in turn if batch is not None]
        return np.concatenate([np.zeros((0, 3)), *rows]), any(cut for _, cut in everyone)

    def estimate_left(self, event: StepEvent) -> float:
        """Return the estimated seconds until the run ends, including validations at their latest speed."""
        evaluation = self.config.eval
        training_s = event.elapsed_s / event.step * (event.steps - event.step)
        n_evals = max(0, (event.steps - 1) // evaluation.every - event.step // evaluation.every)
        few, many = (
            min(n or self.whole_tokens, self.whole_tokens)
            for n in (evaluation.tokens, evaluation.last_tokens)
        )
        last_s = self.eval_s + self.score_s * (many / max(1, few) - 1)
        return training_s + n_evals * self.eval_s + last_s

    def save(self, step: int, last: bool) -> None:
        """Write a snapshot and a checkpoint, if they are due at this step."""
        evaluation, main = self.config.eval, self.ranks.is_main

        # A snapshot at steps 0, 1, 2, 4, 8 ... as long as they fit their budget.
        small = evaluation.snapshots and (last or step & (step - 1) == 0)
        room = evaluation.snapshot_budget_mb * 1e6 - 2 * self.job.model.n_params
        if main and small and measure_snapshots(self.folder) <= room:
            save_snapshot(
                self.folder, step, self.model.state_dict(), self.job.model, self.describe(step)
            )
            self.emit(
                CheckpointEvent(step=step, path=f"snapshots/model_{step:06d}.pt", snapshot=True)
            )

        # Is a checkpoint due?
        if evaluation.save_every:
            due = step % evaluation.save_every == 0
        else:
            due = time.monotonic() - self.t_saved > max(SAVE_EVERY_S, 30 * self.save_s)
        due = due or last or self.just_settled
        if step == self.saved_step or not any_rank(main and due, self.model.device):
            return

        # All ranks must be at the same place; nodes with their own shards may differ.
        cursors = gather_objects(self.batches.cursor)
        if cursors.count(cursors[0]) < len(cursors):
            raise DataError(
                f"step {step}: the ranks read different text; compare their shards and resume."
            )

        # All ranks collect the optimizer's state; the main one writes it.
        self.saved_step, t_start = step, time.monotonic()
        state = {"optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
        if main:
            meta = {**self.describe(step), "cursors": cursors[:1]}
            self.job.save_step(self.folder, step, self.model, state, meta)
            prune_checkpoints(self.folder, evaluation.keep_checkpoints)
            self.emit(CheckpointEvent(step=step, path=f"model_{step:06d}.pt"))
            if self.just_settled:
                # Only now: a resume from an earlier step must not use the new number of steps.
                self.write_config()
        self.just_settled = False

        # Shards that no resumed run will read again can be removed.
        getattr(self.batches, "release", lambda: None)()
        self.t_saved = time.monotonic()
        self.save_s = self.t_saved - t_start

    def describe(self, step: int) -> dict[str, Any]:
        """Return the metadata of a checkpoint."""
        known = math.isfinite(self.last_bits.bpb)
        return {
            **self.job.meta,
            "val_bpb": self.last_bits.bpb if known else None,
            "val_tokens": self.last_bits.tokens if known else None,
            "tokenizer_identity": self.job.tokenizer.identity,
            "tokens": self.tokens,
            "train_s": self.trained_s,
            "spent_s": time.perf_counter() - self.t_start,
            "open_s": self.open_s,
            "user_config": encode_config(self.config),
        }


def pick_device(wanted: str) -> str:
    """Return the type of device that the ranks communicate on."""
    return wanted if wanted != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
