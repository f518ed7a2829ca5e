"""The instrument of lab 09: a model's talk with itself, beside people's and three controls.

Hides: where the conversations come from. The model's are kept in autochat/, so that a lab that opens again
shows the same ones; what people said is read by the same model, so that its entropy can be compared.
Reference: primechat.stages.autochat, primechat.metrics.loops.
"""

from __future__ import annotations

import csv
import io
import json
import re
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from primechat.checkpoint.registry import list_models
from primechat.config import AutochatConfig, RuntimeConfig
from primechat.events import AutochatResult, OnEvent, Turn
from primechat.files.paths import make_folder, resolve_path, write_file
from primechat.metrics.diversity import measure_drift, measure_texts
from primechat.metrics.intervals import Interval, estimate_kappa, estimate_mean, estimate_share
from primechat.metrics.loops import (
    MEASURES,
    embed_texts,
    find_loop,
    measure_repeats,
    measure_transcript,
    measure_turns,
    plant_loop,
    shuffle_turns,
)
from primechat.stages.autochat import STREAMS, autochat, read_transcripts
from primechat.text.corpora import read_conversations

Talks = list[list[Turn]]
Spreads = dict[str, dict[str, Interval]]
SURE = "always the likeliest"
ABOUT = {
    "the model": "The model talks to itself at temperature 0.8; only the first turn is a person's.",
    SURE: "The model talks to itself at temperature 0: no chance at all. Only the first turn is a person's.",
    "people": "Two people; the model reads along, and its entropy is shown.",
    "shuffled": "The same people's turns in a random order: nothing follows from anything.",
    "planted loop": "People's talk that was made to go round from turn 4 on, to see what a loop looks like.",
}
SENTENCE = "I like to go out with my friends."
MOST_MODELS = 6
SEEDS = 3  # of the collapse experiment
RECORDED = Path(__file__).with_name("collapse.json")
LABELLED = Path(__file__).with_name("labelled.jsonl")
KEPT = ("distinct-2", "self-BLEU", "self-repetition", "compression", "MTLD", "Vendi")


class Study:
    """A model's conversations and their controls.

    Args:
        picker: of a chat model; its identifier is read now.
        opener: opens it.
        n_conversations: conversations of the first look.
        turns: of each.
    """

    def __init__(
        self,
        picker: Any,
        opener: Callable[[str], Any],
        *,
        n_conversations: int = 6,
        turns: int = 12,
    ) -> None:
        self.model, self.tokenizer, meta = opener(picker.identifier)
        self.identifier, self.turns = picker.identifier, turns
        step = meta.get("step", 0)
        self.tag = re.sub(
            r"[^A-Za-z0-9]+", "-", f"lab09-v{STREAMS}-{picker.identifier}-{step}"
        ).strip("-")
        self.config = AutochatConfig(
            tag=self.tag,
            model=picker.identifier,
            n_conversations=n_conversations,
            turns=turns,
            max_new_tokens=32,
            resume=True,
        )
        self.sure = read_transcripts(
            run_many(self.plan("sure", temperature=0.0)).path
        )  # the first to be seen

    ticked = False  # the box of `save`, when it was last looked at

    @cached_property
    def talks(self) -> Talks:
        """What the model says by chance, from the same first turns."""
        return read_transcripts(run_many(self.config).path)

    @cached_property
    def groups(self) -> dict[str, Talks]:
        """The model's conversations and the controls, which the model reads when they are first wanted."""
        human = find_people(self.turns, self.config.n_conversations)
        planted = [plant_loop(talk, period=1 + i % 3) for i, talk in enumerate(human[:3])]
        made = {"people": human, "shuffled": shuffle_turns(human), "planted loop": planted}
        read = partial(measure_transcript, self.model, self.tokenizer)
        own = {"the model": self.talks, SURE: self.sure}
        return {**own, **{name: list(map(read, talks)) for name, talks in made.items()}}

    def plan(self, name: str, **changes: Any) -> AutochatConfig:
        """Return the settings of one of the further studies of this model, in a folder of its own."""
        return replace(self.config, tag=f"{self.tag}-{name}", **changes)

    def show_strips(self, *names: str) -> Any:
        """Return the heat strips of groups; all but SURE are read, or said, when the page is there."""
        from primechat.views.widgets.strips import TalkStrips

        rows = [
            {"name": name, "about": about, "full": full} for name, (about, full) in MEASURES.items()
        ]
        first = [
            self.describe_group(name) if name == SURE else {"name": name, "talks": []}
            for name in names
        ]
        return TalkStrips(rows, first, lambda: list(map(self.describe_group, names)))

    def describe_group(self, name: str) -> dict[str, Any]:
        """Return a group as the strips show it."""
        talks = self.sure if name == SURE else self.groups[name]
        return {
            "name": name,
            "about": ABOUT[name],
            "talks": [self.describe(turns) for turns in talks],
        }

    def describe(self, turns: Sequence[Turn]) -> dict[str, Any]:
        """Return a conversation as the strips show it."""
        values, loop = measure_turns(turns), find_loop([turn.text for turn in turns])
        drawn = []
        for t, turn in enumerate(turns):
            texts = [self.tokenizer.token_bytes(i).decode("utf-8", "replace") for i in turn.ids]
            last = len(texts) - turn.stopped
            tokens = zip(texts, turn.entropy, np.exp(turn.logprob), turn.rank, strict=True)
            drawn.append(
                {
                    "who": turn.model,
                    "text": turn.text,
                    "values": [
                        None if np.isnan(v[t]) else round(float(v[t]), 3) for v in values.values()
                    ],
                    "tokens": [
                        [text, round(h, 3), round(float(p), 4), r] for text, h, p, r in tokens
                    ][:last],
                }
            )
        first = " ".join(turns[0].text.split())
        return {"title": first[:40] or "...", "loop": loop.turn if loop else -1, "turns": drawn}

    def trace(self, measure: str, said: AutochatResult | None = None) -> dict[str, np.ndarray]:
        """Return a measure of each group, (talks, turns); what was `said` later replaces the first look."""
        groups = {**self.groups, **({"the model": read_transcripts(said.path)} if said else {})}
        groups.pop("planted loop")
        return {
            name: np.array([measure_turns(turns)[measure] for turns in talks])
            for name, talks in groups.items()
        }

    def trace_repeats(self) -> dict[str, list[float]]:
        """Return the probability of a sentence each time it is said again: this model, and random weights."""
        import torch

        from primechat.model.gpt import GPT

        fresh = GPT(self.model.config)
        fresh.init_weights(torch.Generator().manual_seed(0))
        found = {"this model": self.model, "random weights": fresh.requires_grad_(False).eval()}
        return {name: measure_repeats(one, self.tokenizer, SENTENCE) for name, one in found.items()}

    def map_drift(self, talk: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return for a conversation of each group the turns on a common map (T, 2), and their drift (T,)."""
        chosen = {name: talks[min(talk, len(talks) - 1)] for name, talks in self.groups.items()}
        chosen.pop("planted loop")
        vectors = {
            name: embed_texts(self.model, self.tokenizer, [turn.text for turn in turns])
            for name, turns in chosen.items()
        }
        whole = np.concatenate(list(vectors.values()))
        _, _, axes = np.linalg.svd(whole - whole.mean(0), full_matrices=False)
        return {
            name: ((x - whole.mean(0)) @ axes[:2].T, measure_drift(x))
            for name, x in vectors.items()
        }

    def tell_loops(self) -> str:
        """Return whether with chance fewer conversations go round, as many, or more."""
        texts = (
            [[turn.text for turn in turns] for turns in talks] for talks in (self.talks, self.sure)
        )
        chance, sure = (sum(map(bool, map(find_loop, talks))) for talks in texts)
        return "Fewer" if chance < sure else "More" if chance > sure else "As many"

    def tell_trend(self) -> tuple[str, str]:
        """Return whether the model's entropy rises, falls or stays over a conversation, and the figures.

        It stays where the interval of the change, over conversations, holds 0.
        """
        x = np.array([measure_turns(turns)["entropy"] for turns in self.talks])
        third = max(1, (x.shape[1] - 1) // 3)
        thirds = (x[:, 1 : 1 + third], x[:, -third:])
        early, late = (np.array([estimate_mean(row)[0] for row in part]) for part in thirds)
        change, low, high = estimate_mean(late - early)  # of each conversation
        word = "It falls" if high < 0 else "It rises" if low > 0 else "It stays"
        told = f"{np.nanmean(early):.2f} nats a token, then {np.nanmean(late):.2f}"
        return word, f"{told}; a change of {change:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}"

    @cached_property
    def spreads(self) -> Spreads:
        """The published measures of each group, with intervals over its conversations."""
        return {name: measure_spread(talks) for name, talks in self.groups.items()}

    def compare_groups(self, control: Any = None, only: bool = False) -> Spreads:
        """Return `spreads`; where a stage's `control` has run, of its first generations, beside people's.

        Args:
            control: of a stage that returns a Comparison; None in a script.
            only: leave the groups of the first look away also where it has not run yet.
        """
        found = control.result.measure() if control is not None and control.result else {}
        if not found and not only:
            return self.spreads
        beside = {name: self.spreads[name] for name in ("people", "shuffled")}
        return {**{name: one[0] for name, one in found.items()}, **beside}

    def save(self, folder: str, write: bool) -> str:
        """Write the files of `export` once the box is ticked, not at each letter of another folder that is
        typed while it is; say what was written.
        """
        fresh, self.ticked = write and not self.ticked, write
        if not write or not folder.strip():
            return "Nothing is written yet."
        if not fresh:
            return "Take the tick away and set it again to write into this folder."
        return "Written: " + ", ".join(
            str(file) for file in self.export(resolve_path(folder.strip(), "folder", folder=True))
        )

    def export(self, folder: str | Path) -> list[Path]:
        """Write every turn as CSV and the first strip as PNG and SVG; return the files."""
        from primechat.views.conversations import save_strip

        folder = make_folder(Path(folder))
        table, text = folder / "turns.csv", io.StringIO()
        out = csv.writer(text)
        out.writerow(["group", "talk", "turn", "model", "text", *MEASURES])
        for name, talks in self.groups.items():
            for i, turns in enumerate(talks):
                values = measure_turns(turns)
                for t, turn in enumerate(turns):
                    figures = [f"{v[t]:.4f}" for v in values.values()]
                    out.writerow([name, i, t, turn.model, turn.text, *figures])
        write_file(table, text.getvalue())
        values = measure_turns(self.sure[0])
        scales = {name: full for name, (_, full) in MEASURES.items()}
        return [table, *save_strip(values, scales, folder / "strip")]


def find_people(turns: int, count: int) -> list[list[str]]:
    """Return held-out conversations of people, cut to so many turns."""
    texts = (
        [m["content"][:200] for m in talk["messages"]]
        for talk in read_conversations("chitchat", "val")
    )
    return [talk[:turns] for talk in islice((talk for talk in texts if len(talk) >= turns), count)]


def measure_spread(*seeds: Talks, names: Sequence[str] = KEPT) -> dict[str, Interval]:
    """Return each measure's mean over conversations and its 95 % interval by Student's t.

    The conversations of one seed are independent, and their measures skewed. Where there are several seeds,
    each counts once, with the mean of its conversations, and the seeds are what the interval is over:
    conversations of one training run are more alike than those of two.
    """
    found = [
        [
            measure_texts([turn.text for turn in turns[1:] if turn.text.strip()], names)
            for turns in talks
        ]
        for talks in seeds
    ]

    spreads = dict[str, Interval]()
    for name in names:
        groups = [[one[name] for one in group] for group in found]
        if len(groups) == 1:
            spreads[name] = estimate_mean(groups[0], skewed=True)
        else:
            spreads[name] = estimate_mean([estimate_mean(group)[0] for group in groups])
    return spreads


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Conversations under several settings: for each name, generations, of each the folders of its seeds."""

    paths: dict[str, tuple[tuple[str, ...], ...]]
    stopped: bool = False

    def measure(self, names: Sequence[str] = KEPT) -> dict[str, list[dict[str, Interval]]]:
        """Return the measures of each name, one entry a generation."""
        return {
            name: [measure_spread(*map(read_transcripts, seeds), names=names) for seeds in paths]
            for name, paths in self.paths.items()
        }


@cache
def judge_detector() -> tuple[Spreads, Spreads]:
    """Compare the loop detector with labels that were given without knowing its verdict.

    Two language models, not people, read 100 transcripts and a page of rules, and said of each whether it is
    stuck by its end. The detector's verdicts are computed now. Its rule was chosen by the transcripts of odd
    number; those of even number judge it.

    Returns:
        Cohen's kappa of each pair, and by origin the share that is called stuck; each with a 95 % interval
        over the transcripts.
    """
    rows = [json.loads(line) for line in LABELLED.read_text(encoding="utf-8").splitlines()]
    first, second = np.array([row["labels"] for row in rows]).T
    found = np.array([int(find_loop(row["turns"]) is not None) for row in rows])
    odd = np.array([row["number"] % 2 == 1 for row in rows])
    pairs = {
        "the two labellers": (first, second),
        "unseen half, first labeller": (found[~odd], first[~odd]),
        "unseen half, second labeller": (found[~odd], second[~odd]),
        "tuned half, first labeller": (found[odd], first[odd]),
        "tuned half, second labeller": (found[odd], second[odd]),
    }
    kappas = {name: {"Cohen's kappa": estimate_kappa(x, y)} for name, (x, y) in pairs.items()}
    groups, shares = np.array([row["group"] for row in rows]), Spreads()
    for group in sorted(
        set(groups), key=lambda group: ((first + second)[groups == group].mean(), group)
    ):
        own = groups == group
        both = {"the labellers": (first + second)[own] / 2, "the detector": found[own]}
        shares[f"{group} ({own.sum()})"] = {name: estimate_share(x) for name, x in both.items()}
    return kappas, shares


Generations = dict[str, list[dict[str, Interval]]]


def read_recorded() -> Generations:
    """Return what `run_collapse` found with the model that ships, as `Comparison.measure` gives it."""
    found = json.loads(RECORDED.read_text(encoding="utf-8"))["measures"]
    return {
        name: [{measure: tuple(spread) for measure, spread in one.items()} for one in generations]
        for name, generations in found.items()
    }


def describe_recorded() -> str:
    """Return what the intervals of the recorded study are."""
    return str(json.loads(RECORDED.read_text(encoding="utf-8"))["intervals"])


def tell_change(found: Generations, name: str, measure: str) -> tuple[str, str]:
    """Return whether a measure rose, fell or stayed from the first generation to the last, and the figures.

    It rose or fell where the two intervals do not overlap, which asks for more than a change beyond chance.
    """
    (first, low, high), (last, later_low, later_high) = (found[name][i][measure] for i in (0, -1))
    word = "It falls" if later_high < low else "It rises" if later_low > high else "It stays"
    said = f"{measure} {first:.3f} [{low:.3f}, {high:.3f}] before, {last:.3f} [{later_low:.3f}, "
    return word, f"{said}{later_high:.3f}] after {len(found[name]) - 1} generations"


VARIANTS: dict[str, dict[str, Any]] = {
    "as it was": {},
    "temperature 0.3": {"temperature": 0.3},
    "temperature 1.2": {"temperature": 1.2},
    "top-p 0.9": {"top_k": 0, "top_p": 0.9},
    "a person every 4th turn": {"human_every": 4},
    "repetition penalty 1.2": {"repetition_penalty": 1.2},
}


def run_many(
    config: AutochatConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> AutochatResult:
    """Run autochat in a folder whose name tells these settings from others, so that each is kept."""
    plain = replace(config, runtime=RuntimeConfig(), resume=True)
    mark = zlib.crc32(f"{STREAMS} {plain!r}".encode())
    return autochat(
        replace(config, tag=f"{config.tag}-{mark:08x}", resume=True), on_event=on_event, stop=stop
    )


def run_variants(
    config: AutochatConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> Comparison:
    """Let the model talk under each of VARIANTS, from the same openings and seeds."""
    return run_each(config, VARIANTS, on_event, stop)


def run_models(
    config: AutochatConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> Comparison:
    """Let each model that chats talk to itself, up to MOST_MODELS of them, from the same openings."""
    kinds = ("sft", "rl", "lora", "hf")
    chats = [e for e in list_models() if e.family in kinds and not e.by_product]
    names = [entry.identifier for entry in chats[:MOST_MODELS]]
    return run_each(config, {name: {"model": name} for name in names}, on_event, stop)


def run_collapse(
    config: AutochatConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> Comparison:
    """Let the model learn from its own talk for some generations, alone and with people's talk mixed in.

    Each twice more with other seeds of talk and training: SEEDS in all.
    """
    shares = {
        "only its own talk": {"human_share": 0.0},
        "half of it people's": {"human_share": 0.5},
    }
    return run_each(config, shares, on_event, stop, SEEDS)


def name_part(tag: str, name: str, i: int) -> str:
    """Return the tag of one of several runs: a model's name is part of it, as other models come and go."""
    is_model = "/" in name or ":" in name
    return f"{tag}-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-') if is_model else i}"


def run_each(
    config: AutochatConfig,
    variants: dict[str, dict[str, Any]],
    on_event: OnEvent | None,
    stop: threading.Event | None,
    n_seeds: int = 1,
) -> Comparison:
    """Run a config with each set of changes and seed; what ran before is not run again."""
    paths: dict[str, tuple[tuple[str, ...], ...]] = {}
    for i, seed in ((i, seed) for seed in range(n_seeds) for i in range(len(variants))):
        name, changes = list(variants.items())[i]
        tag = name_part(config.tag, name, i) + (f"-s{seed}" if seed else "")
        result: AutochatResult = autochat(
            replace(config, tag=tag, seed=config.seed + seed, resume=True, **changes),
            on_event=on_event,
            stop=stop,
        )
        before = paths.get(name, ((),) * len(result.generations))
        paths[name] = tuple(
            (*old, new) for old, new in zip(before, result.generations, strict=False)
        )
        if stop is not None and stop.is_set():
            return Comparison(paths=paths, stopped=True)
    return Comparison(paths=paths)
