"""What lab 05 shows around a run: its plan, other runs over it, a bench that takes tricks away, the folder.

Hides: which runs belong to an ablation. Each is an ordinary run of its own tag, so a bench that was stopped
goes on where it was. Reference: primechat.stages.pretrain; Henderson et al. 2018 on seeds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from primechat.checkpoint import registry
from primechat.checkpoint.run_dir import read_frozen
from primechat.cloud.export import export_lab, find_lab
from primechat.cloud.plan import (
    count_flops,
    count_steps,
    find_machine,
    format_hours,
    full_config,
    make_plan,
)
from primechat.config import PretrainConfig
from primechat.config.recipes import INIT_2026, scalar_rates_2026
from primechat.config.runtime import check_choice, check_number
from primechat.errors import ConfigError, PrimechatError
from primechat.events import NoteEvent, OnEvent, TrainResult, pair_bpb
from primechat.files.paths import resolve_path
from primechat.metrics.intervals import adjust_holm, compare_pairs, estimate_mean
from primechat.stages.eval_budget import LAST_SHARE, RUN_SHARE
from primechat.views.theme import SERIES, open_figure, push_apart

MIN_SEEDS = 3  # fewer give no verdict: of two, the spread is hardly known
SWITCHES: dict[str, dict[str, Any]] = {  # trick: what takes it away
    "value_embeddings": {"value_embeddings": False},
    "residual_scalars": {"residual_scalars": False},
    "smear": {"smear": False},
    "backout": {"backout": False},
    "qk_gain": {"qk_gain": 1.0},
    "logit_softcap": {"logit_softcap": 0.0},
}


def take_rates(base: PretrainConfig) -> PretrainConfig:
    """Return a run with the rates that nanochat gives the scalars and gates, at whatever batch."""
    rates: dict[str, Any] = scalar_rates_2026()
    return replace(base, optim=replace(base.optim, **rates))


RATES: dict[str, Callable[[PretrainConfig], PretrainConfig]] = {
    "quickstart": lambda base: base,
    "nanochat2026": take_rates,
    "nanochat2026+init": lambda base: replace(take_rates(base), init=INIT_2026),
}


def describe_plan(config: PretrainConfig) -> dict[str, str]:
    """Return what a run will take here and on rented GPUs, before it is started."""
    flops = count_flops(config.model)
    work = f"{flops / 1e6:,.1f} million"
    figures = {"parameters": f"{config.model.n_params:,}", "multiplications and sums a token": work}
    try:
        here = find_machine("here", registry.base_dir())
        tokens = count_steps(config, here.flops_per_s) * config.batch_tokens
        figures["tokens"] = f"about {tokens:,}"
        train_s = tokens * flops / here.flops_per_s
        more_s = (RUN_SHARE + LAST_SHARE) * train_s
        figures["time here"] = (
            f"{format_hours(train_s)}, and validation up to {format_hours(more_s)}"
        )
    except ConfigError:
        more_s = (RUN_SHARE + LAST_SHARE) * config.seconds
        known = f"{format_hours(config.seconds)}, and validation up to {format_hours(more_s)}"
        known = known if config.seconds else ""
        figures["time here"] = known or "`primechat bench train` tells"
    cloud = make_plan(full_config(20), find_machine("8xH200"))
    return {
        **figures,
        "a d20 (20 blocks) on 8 H200": f"{format_hours(cloud.train_s)}, ${cloud.dollars:,.0f}",
    }


def list_runs() -> list[str]:
    """Return the runs on this machine whose history is here, the newest first, by-products left out."""
    models = registry.list_models()
    entries = (entry for entry in models if entry.family == "base" and not entry.by_product)
    logs = {entry.identifier: Path(entry.path) / "metrics.jsonl" for entry in entries}
    here = [name for name, log in logs.items() if log.is_file()]
    return sorted(here, key=lambda name: -logs[name].stat().st_mtime)


def overlay_runs(runs: str) -> Any:
    """Return a picture of several runs, named with commas between; a run from elsewhere by its folder."""
    names = [name.strip() for name in runs.split(",") if name.strip()]
    if not names:
        return "No run has been named yet. Train one above; its name is then base/ and its tag."
    curves = []
    for name in names[: len(SERIES)]:
        events = [e for e in registry.load_run(name).events if e.get("kind") == "loss"]
        tokens = {
            e["step"]: e["tokens"]
            for e in registry.load_run(name).events
            if e.get("kind") == "step"
        }
        total = np.cumsum([tokens.get(step, 0) for step in range(1, max(tokens, default=0) + 1)])
        curves.append(
            (
                name,
                [total[e["step"] - 1] if e["step"] else 0 for e in events],
                [pair_bpb(e) for e in events],
            )
        )
    return paint_lines(curves, "tokens read", "bits per byte on new text")


def paint_lines(
    curves: Sequence[tuple[str, Sequence[float], Sequence[float]]], x: str, y: str
) -> Any:
    """Return a picture of lines, each named at its end."""
    with open_figure(7.6, 3.6) as (figure, axes):
        for (_, xs, ys), colour in zip(curves, SERIES, strict=False):
            axes.plot(xs, ys, marker="o", markersize=3, color=colour)
        axes.set(xlabel=x, ylabel=y)
        end = max((max(xs, default=0) for _, xs, _ in curves), default=0)
        axes.set_xlim(0, 1.2 * end or 1)  # room for the names at the ends
        axes.locator_params(axis="x", integer=True)
        shown = [pair for pair in zip(curves, SERIES, strict=False) if len(pair[0][1])]
        low, high = axes.get_ylim()
        places = push_apart([ys[-1] for (_, _, ys), _ in shown], 0.07 * (high - low))
        for ((name, xs, _), colour), place in zip(shown, places, strict=True):
            axes.annotate(f"  {name}", (xs[-1], place), color=colour, va="center")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Take tricks away one at a time, at equal steps and seeds."""

    tag: str = "ablation"
    """Beginning of the runs' names."""
    resume: bool = False
    """Go on with a bench that was stopped."""
    switches: str = "value_embeddings, smear, backout"
    """Which tricks, with commas between."""
    seeds: int = 3
    """Runs of each, which differ in their first weights and the order of the text; below 3 no verdict."""
    steps: int = 60
    """Optimizer steps of each run."""
    rates: str = "nanochat2026"
    """Rates of the learned scalars and gates: nanochat2026's own, these with its first weights
    (nanochat2026+init), or quickstart's, 0.005 for all.
    """
    base: PretrainConfig = field(default_factory=PretrainConfig)
    """The run with every trick on."""

    def __post_init__(self) -> None:
        check_number("seeds", self.seeds, low=2, high=9, whole=True)
        check_number("steps", self.steps, low=2, whole=True)
        check_choice("rates", self.rates, tuple(RATES))
        unknown = [name for name in self.list_switches() if name not in SWITCHES]
        if unknown:
            raise ConfigError(
                f"switches={unknown[0]!r} must be among {', '.join(SWITCHES)}; name one of these."
            )

    def list_switches(self) -> list[str]:
        """Return the names of the tricks."""
        return [name.strip() for name in self.switches.split(",") if name.strip()]


@dataclass(frozen=True, kw_only=True)
class AblationResult:
    """Bits per byte of each variant, one a seed; `stopped` tells whether some are missing."""

    identifier: str
    bpb: dict[str, list[float]]
    stopped: bool


def ablate(
    config: AblationConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> AblationResult:
    """Train the model with every trick, and without each, over several seeds; what has run with the same
    settings is kept, and other settings make other runs.
    """
    from primechat.labkit.instruments.series import run_once, share_evals
    from primechat.stages.pretrain import pretrain

    stop = stop or threading.Event()
    config = replace(config, base=RATES[config.rates](config.base))
    evaluation = replace(config.base.eval, snapshots=False)
    found: dict[str, list[float]] = {}
    variants: dict[str, dict[str, Any]] = {"everything on": {}}
    variants |= {f"without {name}": dict(SWITCHES[name]) for name in config.list_switches()}
    for seed in range(config.seeds):
        for name, change in variants.items():
            tag = f"{config.tag}-{name.replace(' ', '-')}-{seed}"
            one = replace(
                config.base,
                tag=tag,
                seed=seed,
                steps=config.steps,
                seconds=0.0,
                model=replace(config.base.model, **change),
                eval=evaluation,
            )
            if on_event:
                on_event(NoteEvent(text=f"{name}, seed {seed}"))
            run = run_once(pretrain, one, "base", on_event, stop)
            if run.stopped:
                return AblationResult(identifier=config.tag, bpb=found, stopped=True)
            found.setdefault(name, []).append(run.val_bpb)
            folder = registry.base_dir() / run.path
            evaluation = share_evals(evaluation, read_frozen(folder, PretrainConfig).eval)
    return AblationResult(identifier=config.tag, bpb=found, stopped=False)


def judge_ablation(result: AblationResult | None, state: str = "") -> Any:
    """Return a table: what each trick brings, and whether chance alone could have brought it.

    A trick's gap is the mean, over seeds, of bits per byte without it less those with everything on, of the
    same seed; beside it stands its 95 % interval by Student's t. The verdict is a paired t-test, corrected by
    Holm for the number of tricks: where no trick matters, the table names one in at most 5 % of the cases.

    Three seeds find large effects only. Of three tricks, one that shifts the mean by 3 standard deviations of
    its gaps is found in 37 % of the cases, by 6 in 84 %; with five seeds, by 2 in 69 % and by 3 in 95 %.

    Source: Student 1908; Holm 1979. The percentages are simulated, with normal noise.
    """
    if result is None or "everything on" not in result.bpb:
        if state in ("running", "stopping"):
            return "The runs are under way above. The table comes when they are done."
        return "Nothing has run yet: press Start above."
    whole = result.bpb["everything on"]
    gaps = {
        name: [x - y for x, y in zip(values, whole, strict=False)]  # of the same seeds
        for name, values in result.bpb.items()
    }
    verdicts = judge_gaps({name: gap for name, gap in gaps.items() if name != "everything on"})
    rows = []
    for name, values in result.bpb.items():
        mean, low, _ = estimate_mean(gaps[name])
        margin = f" ± {mean - low:.4f}" if len(gaps[name]) >= MIN_SEEDS else ""
        compared = name != "everything on"
        rows.append(
            {
                "variant": name,
                "bits per byte": f"{np.mean(values):.4f}",
                "spread over seeds": f"{np.ptp(values):.4f}",
                "against everything on": f"{mean:+.4f}{margin}" if compared else "",
                "so the trick": verdicts.get(name, ""),
            }
        )
    return rows


def judge_gaps(gaps: dict[str, list[float]]) -> dict[str, str]:
    """Return for each trick whether it helps, hurts, or neither is shown, from its gaps over seeds."""
    ready = {name: compare_pairs(gap) for name, gap in gaps.items() if len(gap) >= MIN_SEEDS}
    corrected = adjust_holm(ready)
    verdicts = dict[str, str]()
    for name, gap in gaps.items():
        if name not in ready:
            verdicts[name] = f"too few seeds: {len(gap)} of {MIN_SEEDS}"
        elif corrected[name] >= 0.05:
            verdicts[name] = "not shown to matter"
        else:
            verdicts[name] = "helps" if np.mean(gap) > 0 else "hurts"
    return verdicts


def describe_ablation(config: AblationConfig, run: TrainResult | None = None) -> dict[str, str]:
    """Return how many runs an ablation takes, and how long, if a step takes as long as in a run made here."""
    variants, steps = 1 + len(set(config.list_switches())), config.steps
    n_runs = variants * config.seeds
    work = f"{variants} variants x {config.seeds} seeds = {n_runs} runs of {steps} steps"
    if run is None or not run.step or not run.train_s:
        return {"work": work, "time here": "known once the run above has ended"}
    seconds = n_runs * steps * run.train_s / run.step
    return {"work": work, "time here": f"about {format_hours(seconds)}, checks not counted"}


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """Write this lab as a folder that runs on rented GPUs."""

    depth: int = 20
    """Number of blocks; the width is 64 times as much."""
    recipe: str = "october2025"
    """october2025, whose cost was measured, or nanochat2026."""
    gpus: str = "8xH200"
    """Machine: 8xH200, 8xH100, 4090 or another count of these."""
    output: str = "runs/d20"
    """Where the folder goes."""
    rehearse: bool = True
    """Run it here for 20 steps of a tiny model with 2 processes before any money is spent."""
    force: bool = False
    """Replace what is in that folder."""


@dataclass(frozen=True, kw_only=True)
class FolderResult:
    """The folder that was written, and what a run of it costs."""

    identifier: str
    cost: str
    next_step: str


def write_folder(lab: str = "05") -> Callable[..., FolderResult]:
    """Return what writes a lab's folder, in the form of a stage."""

    def write(
        config: FolderConfig,
        *,
        on_event: OnEvent | None = None,
        stop: threading.Event | None = None,
    ) -> FolderResult:
        from primechat.cli.cloud import rehearse
        from primechat.labkit import copies

        run = full_config(config.depth, config.recipe)
        plan = make_plan(run, find_machine(config.gpus))
        folder = resolve_path(config.output, "output", folder=True)
        emit = on_event or (lambda event: None)
        source = copies.choose_source(find_lab(lab))
        if source.parent.name == "mine":
            emit(NoteEvent(text=f"The cells are those of {copies.name_path(source)}."))
        export_lab(source, run, plan, folder, base_dir=registry.base_dir(), force=config.force)
        if config.rehearse and rehearse(folder, say=lambda text: emit(NoteEvent(text=text))):
            raise PrimechatError(
                "The rehearsal failed, see the notes; the folder is written all the same."
            )
        return FolderResult(
            identifier=str(folder),
            cost=f"{format_hours(plan.train_s)}, ${plan.dollars:,.0f}"
            if plan.fits
            else f"it does not fit on {plan.machine.name}; `primechat plan` tells why",
            next_step=f"read {folder / 'README.md'}",
        )

    return write
