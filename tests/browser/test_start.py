"""Lab 00: facts of the machine, a check of a model, a download that asks first and stops."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect
from waiting import wait_until

import primechat.checkpoint.download as model_download
import primechat.cli.download as desk_download
from primechat.checkpoint import registry
from primechat.checkpoint.download import DownloadPlan
from primechat.errors import HubError
from primechat.events import PhaseEvent, ProgressEvent
from primechat.files.hub import HubFile
from primechat.labkit import lab
from primechat.labkit.instruments import firststeps
from primechat.labkit.twins import find_lab
from primechat.text.corpora import read_documents
from primechat.views.widgets.start import CheckCard


def test_machine_card_tells_what_is_here(base_dir: Path) -> None:
    card = firststeps.open_machine()
    names = [row[0] for row in card.rows]
    assert names == [
        "primechat",
        "computes on",
        "memory",
        "free disk",
        "notebooks",
        "not installed",
    ]
    assert [model["identifier"] for model in card.models] == [
        e.identifier for e in registry.list_models()
    ]
    card.models = []
    assert card.answer_find() == {} and card.models and card.place == str(base_dir)
    assert firststeps.find_version("no-such-package") == "(missing)"


def test_check_card_compares_with_readers_that_know_nothing(base_dir: Path) -> None:
    card = firststeps.open_check()
    assert card.models[0] == "shipped/sft"
    known, card.models = card.models, []
    assert card.answer_find() == {} and card.models == known
    card.answer_check("shipped/sft")
    wait_until(lambda: card.state == "done")
    report = card.report
    assert [bar[0] for bar in report["bars"]] == [
        "this model",
        "its ids shuffled",
        "random weights",
        "every token equally likely",
    ]
    own, *others = [value for _, value, _ in report["bars"]]
    assert own < min(others) and report["verdict"] == "ok" and report["sample"] and report["rows"]
    card.answer_check("base/nothing")
    wait_until(lambda: card.state == "failed")
    assert "nothing" in card.message


def test_reading_counts_words_not_the_marks_of_speakers() -> None:
    length, said = firststeps.measure_reading()
    documents = list(read_documents("chitchat", "train"))
    words = [word for text in documents for word in text.split() if word not in ("A:", "B:")]
    hours = len(words) / 250 / 60
    assert length == "a month of working days" and 19 < hours / 8 < 21
    assert f"{len(words) / 1e6:.1f} million words" in said and f"**{hours:.0f} hours**" in said

    _, tokenizer, meta = lab.borrow_model("shipped/base")
    encoded = tokenizer.encode_batch(documents[::20])
    n_tokens = 20 * sum(len(ids) + 1 for ids in encoded)  # a sample of the documents
    passes = meta["user_config"]["steps"] * meta["user_config"]["batch_tokens"] / n_tokens
    told = re.search(r"went through them ([\d.]+) times", said)
    assert told and float(told[1]) == pytest.approx(passes, rel=0.1)


def make_plan(base: Path) -> DownloadPlan:
    file = HubFile(
        repo="owner/name",
        name="model_1.pt",
        revision="abc",
        size=10_000_000,
        path=base / "x" / "model_1.pt",
        sha256="",
    )
    return DownloadPlan(fetch=(file,), whole=(), kept=(), torn=(), n_bytes=file.size)


def test_download_asks_first_then_fetches_or_stops(
    base_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    monkeypatch.setattr(desk_download, "build_parcels", lambda config: [config])
    monkeypatch.setattr(model_download, "plan_download", lambda parcels, **_: make_plan(base_dir))
    fetched: list[DownloadPlan] = []

    def download_files(plan: DownloadPlan, base: Path, on_event: Any, **_: Any) -> None:
        on_event(PhaseEvent(name="download", total=plan.n_bytes, unit="bytes"))
        for done in range(1, 200):
            go.wait(0.02)
            on_event(ProgressEvent(done=done * 50_000))
        fetched.append(plan)

    monkeypatch.setattr(model_download, "download_files", download_files)
    card = firststeps.open_download()
    assert {b["name"] for b in card.bundles} == set(desk_download.BUNDLES)
    card.answer_act("plan", "d32")
    wait_until(lambda: card.state == "planned")
    assert (
        card.plan["files"] == [["x/model_1.pt", 10_000_000, ""]]
        and card.plan["total"] == 10_000_000
    )
    assert not base_dir.exists(), "asking moves nothing"
    card.answer_act("fetch", "d32")
    wait_until(lambda: bool(card.progress))
    card.answer_act("stop", "d32")
    wait_until(lambda: card.state == "ready")
    assert "Stopped" in card.message and not fetched
    go.set()
    card.answer_act("plan", "d32")
    wait_until(lambda: card.state == "planned")
    card.answer_act("fetch", "d32")
    wait_until(lambda: card.state == "done")
    assert len(fetched) == 1


def test_download_tells_why_it_cannot(base_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(parcels: Any, **_: Any) -> DownloadPlan:
        raise HubError("the Hub cannot be reached; check the network.")

    monkeypatch.setattr(desk_download, "build_parcels", lambda config: [config])
    monkeypatch.setattr(model_download, "plan_download", refuse)
    card = firststeps.open_download()
    card.answer_act("plan", "d32")
    wait_until(lambda: card.state == "failed")
    assert "cannot be reached" in card.message


TWO_CARDS = """async (script) => {
  const url = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
  const { default: widget } = await import(url);
  const show = (state) => {
    const heard = {};
    const model = {
      get: (name) => state[name], off: () => {}, on: (name, work) => (heard[name] ??= []).push(work),
      put: (name, value) => { state[name] = value; heard[`change:${name}`].forEach((work) => work()); },
      send: ({ ask, id }) => { if (ask === "find") model.put("models", ["shipped/sft", "base/new"]); },
    };
    widget.render({ model, el: document.body.appendChild(document.createElement("div")) });
    return model;
  };
  show({ kind: "check", models: ["shipped/sft"], state: "ready", report: {}, message: "" });
  const card = show({ kind: "download", bundles: [], state: "loading", plan: {}, progress: {}, message: "" });
  card.put("state", "done");
}"""


@pytest.mark.slow
def test_what_was_brought_in_can_be_checked(browser: Browser) -> None:
    page = browser.new_page()
    page.evaluate(TWO_CARDS, CheckCard._esm)
    expect(page.locator(".pc-check option")).to_have_text(["shipped/sft", "base/new"])
    assert page.locator(".pc-check select").input_value() == "shipped/sft", "the choice stays"
    page.close()


@pytest.mark.slow
def test_tour_in_a_browser(shared: Callable[..., Any], lab_page: Callable[..., Any]) -> None:
    """Five minutes in seconds: talk in the first screen, guess, check, ask for a size without a network."""
    found = lab_page(shared("run", find_lab("00")))
    page = found.page
    page.get_by_role("button", name="How was your day?").click()
    page.locator(".pc-chat").get_by_text("tokens/s").first.wait_for(timeout=90_000)
    line = page.get_by_placeholder("Write a message").bounding_box()
    assert line and line["y"] + line["height"] < 720, "one talks to it without scrolling"
    page.get_by_label("a month of working days").check()
    page.get_by_role("button", name="Show the answer").click()
    page.locator(".pc-prediction .pc-mark", has_text="right: your guess").wait_for()
    page.get_by_role("button", name="Check it").click()
    page.locator(".pc-check .pc-badge", has_text="Sound").wait_for(timeout=90_000)
    assert page.locator(".pc-check .pc-bars > div").count() == 4
    page.get_by_placeholder("Write a message").fill("I like cats.")
    page.get_by_role("button", name="Send").click()
    page.locator(".pc-chat").get_by_text("tokens/s").nth(1).wait_for(timeout=90_000)
    page.get_by_role("button", name="Show its size").click()
    page.locator(".pc-download .pc-error").wait_for(timeout=60_000)
    assert "HF_HUB_OFFLINE" in page.locator(".pc-download .pc-error").inner_text()
    found.check()
