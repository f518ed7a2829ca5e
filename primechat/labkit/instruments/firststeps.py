"""What lab 00 stands on: facts of this machine, a check of a model, a download, each for its card.

Hides: threads. A check and a download run on threads of their own and tell their card how far they are.
Reference: primechat.cli.check, primechat.cli.download.
"""

from __future__ import annotations

import os
import platform
import shutil
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import primechat
from primechat.checkpoint import registry
from primechat.checkpoint.download import DownloadPlan, measure_space
from primechat.errors import PrimechatError, explain_error
from primechat.events import Event, PhaseEvent, ProgressEvent
from primechat.interp.embeddings.tables import count_tokens
from primechat.labkit.lab import borrow_model, describe_entry
from primechat.text.corpora import load_chitchat, split_last
from primechat.views.widgets.start import CheckCard, DownloadCard, MachineCard

BUNDLES = {
    "diego-d20-base": "a base model of nanochat's depth 20, 561 million parameters: it goes on with any text",
    "sdobson-d20": "a chat model of depth 20",
    "d32": "nanochat's own chat model of depth 32, 1.9 billion parameters, if there is room",
}
READING = ("an evening", "a month of working days", "a lifetime")
WORDS_PER_MINUTE = 250
EXTRAS = dict(
    transformers="other people's models", umap="the map of lab 03", tiktoken="other tokenizers"
)


def measure_reading() -> tuple[str, str]:
    """Return which of READING the training text of the model that ships takes a person, and in words how
    much it is and how often the model went through it. The letters that mark who speaks are no words.
    """
    talks = split_last(load_chitchat(), "train")
    n_words = sum(len(text.split()) for turns in talks for _, text in turns)
    hours = n_words / WORDS_PER_MINUTE / 60

    _, tokenizer, meta = borrow_model("shipped/base")
    n_tokens = int(count_tokens(tokenizer, step=1).sum()) + len(talks)  # a mark begins each talk
    passes = meta["tokens"] / n_tokens

    length = READING[0] if hours < 8 else READING[1] if hours < 2_000 else READING[2]
    return length, (
        f"It is {n_words / 1e6:.1f} million words of people's chats, some **{hours:.0f} hours**, and the "
        f"model went through them {passes:.1f} times."
    )


def open_machine() -> MachineCard:
    """Return the card of this machine and of the models that are here."""
    return MachineCard(find_facts)


def find_facts() -> dict[str, Any]:
    """Return what the card of the machine shows."""
    base = registry.base_dir()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    missing = [f"`{name}` ({use})" for name, use in EXTRAS.items() if not find_spec(name)]
    under = f"Python {platform.python_version()}, torch {find_version('torch')}"
    rows = [
        ("primechat", primechat.__version__, under),
        ("computes on", *name_device()),
        ("memory", f"{memory:,.0f} GB", f"{os.cpu_count()} cores"),
        ("free disk", f"{measure_space(base) / 1e9:,.0f} GB", ""),
        (
            "notebooks",
            f"marimo {find_version('marimo')}, JupyterLab {find_version('jupyterlab')}",
            "",
        ),
        (
            "not installed",
            "some extras" if missing else "nothing that the labs use",
            ", ".join(missing),
        ),
    ]
    models = [
        {"identifier": e.identifier, "about": describe_entry(e)}
        for e in registry.list_models()
        if not e.by_product
    ]
    place = str(base).replace(os.path.expanduser("~"), "~", 1)
    return {"rows": [list(row) for row in rows], "models": models, "place": place}


def find_version(name: str) -> str:
    """Return the version of a package, or that there is none."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return "(missing)"


def name_device() -> tuple[str, str]:
    """Return what a model runs on here and a remark, without importing torch."""
    if shutil.which("nvidia-smi"):
        return "a CUDA GPU", "models fit it as far as its own memory goes"
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "Apple silicon", "its GPU is used where it is the faster one"
    return "the CPU", "all labs are made for that; a GPU is not needed"


def open_check() -> CheckCard:
    """Return the card that checks a model on this machine."""
    return CheckCard(find_checkable, begin_check)


def find_checkable() -> list[str]:
    """Return the models that the card can check, the one that greets the learner first, by-products last."""
    entries = [entry for entry in registry.list_models() if entry.family in registry.FAMILIES]
    entries.sort(key=lambda e: (not (e.shipped and e.family == "sft"), e.by_product))
    return [entry.identifier for entry in entries]


def begin_check(card: CheckCard, identifier: str) -> None:
    """Check a model on a thread of its own."""
    card.message = "It reads a page of plain English four times: a few seconds for a small model."
    card.state = "running"
    threading.Thread(target=run_check, args=(card, identifier), daemon=True).start()


def run_check(card: CheckCard, identifier: str) -> None:
    """Check a model and report it to the card."""
    try:
        from primechat.cli.check import check_model

        result = check_model(identifier)
    except Exception as error:  # told where the learner looks
        card.message, card.state = explain_error(error), "failed"
        return
    bars = [
        ("this model", result.bpb, True),
        ("its ids shuffled", result.shuffled_bpb, False),
        ("random weights", result.fresh_bpb, False),
        ("every token equally likely", result.noise_bpb, False),
    ]
    card.report = {
        "verdict": result.verdict,
        "identifier": result.identifier,
        "sample": result.sample,
        "sentence": f"{'; '.join((*result.reasons, result.advice))}.",
        "rows": [list(row) for row in result.card],
        "bars": [[name, value, own] for name, value, own in bars if value is not None],
    }
    card.state = "done"


class Stopped(PrimechatError):
    """The learner pressed Stop."""


class Downloader:
    """Plans and fetches for one card, one thing at a time."""

    def __init__(self) -> None:
        self.stop, self.plan = (
            threading.Event(),
            DownloadPlan(fetch=(), whole=(), kept=(), torn=(), n_bytes=0),
        )
        self.total, self.t_start, self.t_told = 0.0, 0.0, 0.0

    def act(self, card: DownloadCard, word: str, bundle: str) -> None:
        """Do what a button asks for."""
        if word == "stop":
            self.stop.set()
            if card.state == "asking":  # the Hub's answer is no longer waited for
                card.message, card.state = "", "ready"
        elif card.state not in ("asking", "loading"):
            self.stop = threading.Event()
            card.message, card.state = "", "asking" if word == "plan" else "loading"
            work = self.ask if word == "plan" else self.fetch
            threading.Thread(
                target=self.work, args=(card, work, bundle, self.stop), daemon=True
            ).start()

    def work(self, card: DownloadCard, job: Any, bundle: str, stop: threading.Event) -> None:
        """Run a job and tell how it ended."""
        try:
            state, message = job(card, bundle)
        except Exception as error:  # told where the learner looks
            state, message = (
                ("ready" if isinstance(error, Stopped) else "failed"),
                explain_error(error),
            )
        if not (stop.is_set() and job == self.ask):
            card.message, card.state = message, state

    def ask(self, card: DownloadCard, bundle: str) -> tuple[str, str]:
        """Find out what a bundle would bring; nothing is moved."""
        from primechat.checkpoint.download import plan_download
        from primechat.cli.download import DownloadConfig, build_parcels

        config = DownloadConfig(bundle=(bundle,), no_optim=True)  # type: ignore[arg-type]
        plan = plan_download(list(build_parcels(config)), optim=False)
        if self.stop.is_set():
            return "ready", ""
        self.plan = plan
        base = registry.base_dir()
        fates = (
            ("", plan.fetch),
            ("is here", plan.whole),
            ("another one is here and stays", plan.kept),
        )
        found = [(fate, file) for fate, group in fates for file in group]
        files = [[str(file.path.relative_to(base)), file.size, fate] for fate, file in found]
        card.plan = {
            "bundle": bundle,
            "files": files,
            "total": plan.n_bytes,
            "free": measure_space(base),
        }
        return "planned", "" if plan.fetch else "All of it is here already."

    def fetch(self, card: DownloadCard, bundle: str) -> tuple[str, str]:
        """Fetch what was planned."""
        from primechat.checkpoint.download import download_files

        download_files(self.plan, registry.base_dir(), lambda event: self.hear(card, event))
        return (
            "done",
            "It is here. Check it above, then talk to it; the pickers of all labs show it.",
        )

    def hear(self, card: DownloadCard, event: Event) -> None:
        """Tell the card how far the download is; end it where Stop was pressed."""
        if self.stop.is_set():
            raise Stopped("Stopped. Files that were whole stay; the next try fetches the others.")
        if isinstance(event, PhaseEvent):
            self.total, self.t_start = event.total, time.monotonic()
        elif isinstance(event, ProgressEvent) and time.monotonic() - self.t_told > 0.4:
            self.t_told = time.monotonic()
            left = (
                (self.t_told - self.t_start) * (self.total / event.done - 1) if event.done else None
            )
            card.progress = {"done": event.done, "total": self.total, "left_s": left}


def open_download() -> DownloadCard:
    """Return the card that brings in models from the Hugging Face Hub."""
    bundles = [{"name": name, "title": name, "about": about} for name, about in BUNDLES.items()]
    return DownloadCard(bundles, Downloader().act)
