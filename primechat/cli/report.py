"""`primechat report`: curves, samples and settings of a run as one HTML page, and the curves as PNGs.

Only the folder of the run is read, so that a run pulled from another machine looks like a local one, and the
page needs no other files. Reference: registry.load_run.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from primechat.checkpoint.registry import base_dir, load_run
from primechat.cli.progress import format_seconds
from primechat.errors import PrimechatError
from primechat.events import TrainResult, describe_bpb, pair_bpb
from primechat.files.paths import make_folder, resolve_path, write_file
from primechat.files.weights import read_json
from primechat.views.theme import DARK, FONT, LIGHT, SERIES, open_figure

SMOOTH = 0.03  # width of the running mean, as a share of the run
CURVES = (  # file, title, lines as (kind of event, field)
    ("loss", "Training loss, nats a token", (("step", "loss_nats"),)),
    ("bpb", "Validation, bits per byte", (("loss", "paired_bpb"), ("loss", "general_bpb"))),
    ("kept", "What the student has of its teacher", (("loss", "retention"), ("loss", "agreement"))),
    ("writing", "What it writes, in word pairs", (("loss", "distinct_2"), ("loss", "repetition"))),
    ("speed", "Tokens a second", (("step", "tokens_per_s"),)),
    ("rate", "Learning rate, share of its peak", (("step", "lr_ratio"),)),
    ("norms", "Norms", (("step", "grad_norm"), ("step", "update_norm"))),
)
LABELS = {
    "grad_norm": "gradient",
    "update_norm": "update",
    "paired_bpb": "validation",
    "general_bpb": "text it knew",
    "distinct_2": "different ones",
    "repetition": "said before",
}
STYLE = """
body { font: 16px/1.55 %s; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.5rem;
       color: var(--ink); background: var(--bg) }
h1 { font-size: 1.7rem; margin: 0 0 1rem } h2 { font-size: 1.15rem; margin: 2.5rem 0 .6rem }
dl { display: flex; flex-wrap: wrap; gap: 1rem 2.6rem; margin: 0 }
dt { color: var(--muted); font-size: .85rem }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.6rem }
figure { margin: 0 } img { width: 100%% }
table { border-collapse: collapse; width: 100%% } td { text-align: left; vertical-align: top;
       border-bottom: 1px solid var(--line); padding: .45rem .8rem .45rem 0 }
td:first-child { color: var(--muted); white-space: nowrap; font-variant-numeric: tabular-nums }
pre { white-space: pre-wrap; font-size: .85rem; background: var(--surface); padding: 1rem;
      border-radius: 8px }
"""


@dataclass(frozen=True, kw_only=True)
class ReportFlags:
    """Write a run's curves, samples and settings as one HTML page, and the curves as PNGs."""

    model: str = ""
    """The run: base/d4, sft/d4, or the path of its folder."""
    output: str = ""
    """Folder to write; empty is `report` in the run's folder."""


def run_report(flags: ReportFlags) -> int:
    """Write the report of a run and return the exit code.

    Raises:
        PrimechatError: there is no such run, or matplotlib is missing.
    """
    if not flags.model:
        raise PrimechatError("report needs a run; name one, as in `primechat report base/d4`.")
    run = load_run(flags.model)
    folder = base_dir() / run.path
    target = folder / "report"
    if flags.output:
        target = resolve_path(flags.output, "output", folder=True)
    make_folder(target)
    pictures = {name: draw_curve(run, title, lines) for name, title, lines in CURVES}
    drawn = {name: data for name, data in pictures.items() if data}
    for name, data in drawn.items():
        write_file(target / f"{name}.png", data)
    path = target / "index.html"
    write_file(path, write_page(run, folder, drawn))
    print(f"{path} and {len(drawn)} pictures beside it")
    return 0


def read_series(run: TrainResult, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and values of one field of a run's events, where it is a number."""
    events = [event for event in run.events if event.get("kind") == kind]
    pairs: list[tuple[Any, Any]]
    if name == "paired_bpb":  # runs of earlier versions have only the unpaired figure
        pairs = [(event["step"], pair_bpb(event)) for event in events]
    else:
        pairs = [(event["step"], event.get(name)) for event in events]
    found = [(step, value) for step, value in pairs if isinstance(value, (int, float))]
    return np.array([s for s, _ in found], float), np.array([v for _, v in found], float)


def smooth_series(values: np.ndarray) -> np.ndarray:
    """Return a running mean over a small share of the run, with a shorter window at the ends."""
    width = max(1, round(len(values) * SMOOTH))
    kernel = np.ones(width)
    ones = np.convolve(np.ones(len(values)), kernel, "same")
    return np.convolve(values, kernel, "same") / ones


def draw_curve(run: TrainResult, title: str, lines: tuple[tuple[str, str], ...]) -> bytes:
    """Return a PNG of some fields over the steps, empty if the run has none of them."""
    series = [(name, *read_series(run, kind, name)) for kind, name in lines]
    series = [(name, x, y) for name, x, y in series if len(x)]
    if not series:
        return b""
    if not find_spec("matplotlib"):
        raise PrimechatError(
            "report draws with matplotlib, which is missing; pip install matplotlib."
        )
    with open_figure(7, 3.6, dpi=130) as (figure, axes):
        paint_curve(axes, title, series)
        out = io.BytesIO()
        figure.savefig(out, format="png")
    return out.getvalue()


def paint_curve(axes: Any, title: str, series: list[tuple[str, np.ndarray, np.ndarray]]) -> None:
    """Draw series, smoothed if they have many points, each with its name at its end."""
    for (name, x, y), colour in zip(series, SERIES, strict=False):
        noisy = len(y) > 60
        if noisy:
            axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
        marker = "" if noisy else "o"
        smooth = smooth_series(y) if noisy else y
        axes.plot(x, smooth, color=colour, linewidth=1.8, marker=marker, markersize=3)
        if len(series) > 1:
            axes.annotate(f" {LABELS.get(name, name)}", (x[-1], y[-1]), color=colour, va="center")
    axes.set(title=title, xlabel="optimizer steps")
    axes.margins(x=0.02 if len(series) == 1 else 0.12)


def write_page(run: TrainResult, folder: Path, pictures: dict[str, bytes]) -> str:
    """Return the HTML page of a run; `pictures` are PNGs by name of the curve."""
    titles = {name: title for name, title, _ in CURVES}
    plots = "".join(
        f'<figure><img alt="{titles[name]}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        "</figure>"
        for name, data in pictures.items()
    )
    figures = "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in list_figures(run)
    )
    name = html.escape(run.identifier)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
        f"<style>{write_style()}</style>"
        f"<h1>{name}</h1><dl>{figures}</dl><h2>Curves</h2><div class=plots>{plots}</div>"
        f"{''.join(write_samples(run))}{write_settings(folder)}</html>\n"
    )


def write_style() -> str:
    """Return the style of the page, light or dark like the reader's system."""
    light, dark = (
        "".join(f"--{name}: {value}; " for name, value in t.items()) for t in (LIGHT, DARK)
    )
    scheme = f":root {{ color-scheme: light dark; {light}}}"
    return f"{scheme}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}{STYLE % FONT}"


def list_figures(run: TrainResult) -> Iterator[tuple[str, str]]:
    """Yield the figures of a run as (name, value)."""
    yield "parameters", f"{run.n_params:,}"
    yield "validation", describe_bpb(run.val_bpb, run.val_tokens)
    yield "steps", f"{run.step:,}" + (", stopped" if run.stopped else "")
    yield "tokens", f"{run.tokens:,}"
    yield "training time", format_seconds(run.train_s)
    yield "speed", f"{run.tokens_per_s:,.0f} tokens a second"


def write_samples(run: TrainResult) -> Iterator[str]:
    """Yield a table for each prompt with the model's continuations over the training."""
    samples = [e for e in run.events if e.get("kind") == "sample"]
    for prompt in dict.fromkeys(str(e["prompt"]) for e in samples):
        rows = "".join(
            f"<tr><td>step {e['step']:,}<td>{html.escape(str(e['text']))}"
            for e in samples
            if e["prompt"] == prompt
        )
        yield f"<h2>{html.escape(prompt)} …</h2><table>{rows}</table>"


def write_settings(folder: Path) -> str:
    """Return the section of the page with the settings of the run, "" if they are missing."""
    path = folder / "config.json"
    if not path.is_file():
        return ""
    return f"<h2>Settings</h2><pre>{html.escape(json.dumps(read_json(path), indent=2))}</pre>"
