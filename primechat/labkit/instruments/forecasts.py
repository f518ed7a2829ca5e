"""What small runs say about a larger one: training them, and a picture of forecast and outcome.

Hides: which runs are laid in the curve and which is held out. The runs that ship as a file were recorded,
with the day, the machine and the command in it; the model that they are held against is the one in data/.
Reference: primechat.cloud.forecast; Hoffmann et al. 2022.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import find_steps, read_meta
from primechat.checkpoint.run_dir import read_frozen
from primechat.cloud.forecast import Forecast, SmallRun, forecast_bpb
from primechat.config import EvalConfig, GPTConfig, OptimConfig, PretrainConfig, RuntimeConfig
from primechat.config.names import parse_identifier
from primechat.config.runtime import check_number
from primechat.errors import ConfigError
from primechat.events import NoteEvent, OnEvent, count_noun
from primechat.views.theme import INK, SERIES, open_figure

RECORD = Path(__file__).with_name("small_runs.json")
VOCAB, CONTEXT = 2048, 256


@dataclass(frozen=True, kw_only=True)
class SeriesOfRuns:
    """Runs for the curve, and those that were held out, each with a name."""

    identifier: str
    runs: tuple[SmallRun, ...]
    held_out: tuple[tuple[str, SmallRun], ...] = ()
    stopped: bool = False


@dataclass(frozen=True, kw_only=True)
class SmallRunsConfig:
    """Train small models, and one larger one to be forecast."""

    tag: str = "small"
    """Beginning of the runs' names."""
    resume: bool = False
    """Go on with a series that was stopped."""
    depths: str = "1, 2, 3"
    """Numbers of blocks of the small models, with commas between."""
    tokens: str = "100000, 200000, 400000"
    """Tokens that each of them reads, a run each."""
    held_out: int = 4
    """Blocks of the model that is forecast; it reads the most of these tokens. 0 trains none."""
    batch_tokens: int = 2048
    """Tokens read for each step."""
    eval_tokens: int = 40_960
    """Held-out tokens that a run is measured on at its end; 0 is all of them."""
    seed: int = 0
    """Seed of the weights and of the order of the text."""

    def __post_init__(self) -> None:
        check_number("held_out", self.held_out, low=0, high=12, whole=True)
        check_number("seed", self.seed, low=0, whole=True)
        for name, low, high in (("depths", 1, 12), ("tokens", 10_000, 10**9)):
            for word in getattr(self, name).split(","):
                if not word.strip().isdecimal() or not low <= int(word) <= high:
                    raise ConfigError(
                        f"{name}={word.strip()!r} must be whole numbers from {low:,} to {high:,} with commas "
                        "between; write 1, 2, 3."
                    )
        if self.held_out in self.list_numbers("depths"):
            raise ConfigError(
                f"held_out={self.held_out} must not be among the depths; take a larger one."
            )

    def list_numbers(self, name: str) -> list[int]:
        """Return the numbers in a field, the smallest first."""
        return sorted({int(word) for word in getattr(self, name).split(",")})

    def plan_runs(self) -> list[PretrainConfig]:
        """Return the runs in the order in which they are made: small ones first, then the one held out."""
        depths, lengths = self.list_numbers("depths"), self.list_numbers("tokens")
        shapes = [(depth, tokens) for depth in depths for tokens in lengths]
        return [
            self.plan_run(*shape) for shape in [*shapes, (self.held_out, lengths[-1])] if shape[0]
        ]

    def plan_run(self, depth: int, tokens: int) -> PretrainConfig:
        """Return one run: the settings of `shipped/base`, another size and length."""
        steps = max(2, round(tokens / self.batch_tokens))
        return PretrainConfig(
            tag=f"{self.tag}-{depth}-{tokens}-{self.seed}",
            batch_tokens=self.batch_tokens,
            steps=steps,
            model=GPTConfig.modern(depth, vocab_size=VOCAB, sequence_len=CONTEXT, head_dim=64),
            seed=self.seed,
            optim=OptimConfig(warmdown_ratio=0.6),
            runtime=RuntimeConfig(compile="off"),
            eval=EvalConfig(
                every=steps,
                tokens=CONTEXT,
                last_tokens=self.eval_tokens,
                sample_every=-1,
                snapshots=False,
            ),
        )


def train_small(
    config: SmallRunsConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> SeriesOfRuns:
    """Train the runs one after the other; those that are finished are kept, so a stopped series goes on."""
    from primechat.stages.pretrain import pretrain

    stop, runtime, found = stop or threading.Event(), None, list[SmallRun]()
    plans = config.plan_runs()
    for i, plan in enumerate(plans):
        folder = registry.run_dir("base", plan.tag)
        there = (folder / "config.json").exists()
        one = replace(plan, runtime=runtime or plan.runtime, resume=there)
        shape = (
            f"{count_noun(plan.model.n_layer, 'block')}, {plan.steps * plan.batch_tokens:,} tokens"
        )
        if on_event:
            on_event(NoteEvent(text=f"Run {i + 1} of {len(plans)}: {shape}"))
        registry.mark_by_product(folder, f"the small runs of lab 04, series {config.tag}")
        run = pretrain(one, on_event=on_event, stop=stop)
        if run.stopped:
            return SeriesOfRuns(identifier=config.tag, runs=tuple(found), stopped=True)
        size = dict(n_layer=plan.model.n_layer, n_params=run.n_params)
        found.append(SmallRun(**size, tokens=run.tokens, bpb=run.val_bpb))
        # what was measured for the first holds for all: the search is not made ten times
        runtime = runtime or read_frozen(folder, PretrainConfig).runtime
    held = (
        ((f"{count_noun(config.held_out, 'block')}, held out", found.pop()),)
        if config.held_out
        else ()
    )
    return SeriesOfRuns(identifier=config.tag, runs=tuple(found), held_out=held)


def read_record() -> tuple[SeriesOfRuns, dict[str, str]]:
    """Return the recorded runs, the shipped base model held out, and how they were recorded."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    runs = tuple(SmallRun(**run) for run in record["runs"])
    held = [(name, SmallRun(**run)) for name, run in record["held_out"].items()]
    shipped = open_outcome()
    held += [("shipped/base", shipped)] if shipped else []
    series = SeriesOfRuns(identifier="recorded", runs=runs, held_out=tuple(held))
    return series, {name: record[name] for name in ("date", "machine", "command")}


def open_outcome(identifier: str = "shipped/base") -> SmallRun | None:
    """Return a model's size, the tokens that it read and what it reached, None where it is not here."""
    entry = next((e for e in registry.list_models() if e.identifier == identifier), None)
    if entry is None or entry.val_bpb is None:
        return None
    folder, _ = registry.locate_model(parse_identifier(identifier))
    meta = read_meta(folder, find_steps(folder)[-1])
    n_layer = int(meta["user_config"]["model"]["n_layer"])
    return SmallRun(
        n_layer=n_layer, n_params=entry.n_params, tokens=int(meta["tokens"]), bpb=entry.val_bpb
    )


def show_record() -> list[Any]:
    """Return the forecast from the recorded runs, how it came true, and where the runs are from."""
    series, how = read_record()
    said = f"Recorded on {how['date']}, {how['machine']}: {how['command']}"
    return [*show_forecast(series), said]


def show_forecast(series: SeriesOfRuns | None, state: str = "") -> list[Any]:
    """Return a table of forecasts and outcomes, and a picture; words where there are no runs yet."""
    if series is None:
        is_running = state == "running"
        waiting = (
            "The runs are under way above." if is_running else "Nothing has run yet: press Start."
        )
        return [f"{waiting} The forecast comes when all of them are done."]
    if series.stopped or not series.held_out:
        return [
            "There is no run to hold the forecast against: let the series end, with one held out."
        ]
    pairs = zip(series.held_out, foretell(series), strict=True)
    return [[judge_forecast(name, run, told) for (name, run), told in pairs], draw_forecast(series)]


def foretell(series: SeriesOfRuns) -> list[Forecast]:
    """Return the forecast of each run that was held out."""
    return forecast_bpb(series.runs, [(run.n_params, run.tokens) for _, run in series.held_out])


def judge_forecast(name: str, run: SmallRun, told: Forecast) -> dict[str, str]:
    """Return a row: what was foretold, what came, and whether the one held the other."""
    gap = run.bpb - told.bpb
    inside = told.low <= run.bpb <= told.high
    beyond = run.bpb - (told.high if gap > 0 else told.low)
    return {
        "held out": name,
        "tokens": f"{run.tokens / 1e6:.1f} million",
        "forecast, bits per byte": f"{told.bpb:.3f}",
        "90 % interval": f"{told.low:.3f} to {told.high:.3f}",
        "outcome": f"{run.bpb:.3f}",
        "so the forecast": "held" if inside else f"missed, by {abs(beyond):.3f}",
    }


def draw_forecast(series: SeriesOfRuns) -> Any:
    """Return a picture: a curve for each size through its runs, the band of the forecast, the outcomes."""

    outcomes = [run for _, run in series.held_out]
    end = max(run.tokens for run in [*series.runs, *outcomes])
    grid = np.geomspace(min(run.tokens for run in series.runs) * 0.8, end * 1.15, 40).astype(int)
    sizes = sorted({(run.n_params, run.n_layer) for run in series.runs})
    with open_figure(8.4, 4.0) as (figure, axes):
        for (n_params, n_layer), colour in zip(sizes, SERIES[1:], strict=False):
            mine = [run for run in series.runs if run.n_params == n_params]
            until = grid[grid <= 1.3 * max(run.tokens for run in mine)]
            told = forecast_bpb(series.runs, [(n_params, int(tokens)) for tokens in until])
            axes.plot(until, [one.bpb for one in told], color=colour, linewidth=1.3)
            axes.plot([r.tokens for r in mine], [r.bpb for r in mine], "o", color=colour)
            name = f"  {count_noun(n_layer, 'block')}"
            axes.annotate(name, (until[-1], told[-1].bpb), color=colour, va="center")
        draw_band(axes, series, grid)
        axes.set(xscale="log", xlabel="tokens read, millions", ylabel="bits per byte on new text")
        marks = [
            m * 10**k for k in range(4, 10) for m in (1, 2, 5) if grid[0] <= m * 10**k <= grid[-1]
        ]
        axes.set_xticks(marks, [f"{mark / 1e6:g}" for mark in marks])
        axes.minorticks_off()
        axes.set_xlim(grid[0], grid[-1] * 1.5)  # room for the names at the ends
    return figure


def draw_band(axes: Any, series: SeriesOfRuns, grid: np.ndarray) -> None:
    """Draw what is foretold of each size that was held out, and what came."""
    colour = SERIES[0]
    for n_params, n_layer in sorted({(run.n_params, run.n_layer) for _, run in series.held_out}):
        told = forecast_bpb(series.runs, [(n_params, int(tokens)) for tokens in grid])
        low, high = [t.low for t in told], [t.high for t in told]
        axes.fill_between(grid, low, high, color=colour, alpha=0.16, linewidth=0)
        axes.plot(grid, [t.bpb for t in told], color=colour, linestyle="--", linewidth=1.3)
        name = f"  {count_noun(n_layer, 'block')},\n  forecast"
        axes.annotate(name, (grid[-1], told[-1].bpb), color=colour, va="center")
    outcomes = [run for _, run in series.held_out]
    for run, told_of in zip(outcomes, foretell(series), strict=True):
        away = 12 if run.bpb > told_of.bpb else -24  # from the line
        axes.plot([run.tokens], [run.bpb], "D", color=INK, markersize=7)
        axes.annotate(
            f"came out: {run.bpb:.3f}",
            (run.tokens, run.bpb),
            xytext=(0, away),
            textcoords="offset points",
            ha="center",
            color=INK,
        )
