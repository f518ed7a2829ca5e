"""Labs 00-03 over time: their time machines on the snapshots that ship, and a page closed in mid-work."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from browser import ROOT, LabPage, Server, run_all_cells
from playwright.sync_api import Page, expect

from primechat import capture
from primechat.checkpoint.registry import list_models, open_model
from primechat.interp.embeddings.atlas import TimeAtlas

pytestmark = pytest.mark.slow
TEXT = "My sister has a small dog. My sister has a big cat. I like the dog, but I love the cat."
Serve, Shared, LabOpener = Callable[..., Server], Callable[..., str], Callable[..., LabPage]


def find_lab(number: str) -> Path:
    (path,) = (ROOT / "labs").glob(f"{number}_*.py")
    return path


def name_snapshots() -> list[str]:
    (film,) = (entry for entry in list_models() if entry.shipped and len(entry.snapshots) > 1)
    return [f"shipped/{film.family}/{film.tag}@snap:{step}" for step in film.snapshots]


def test_heads_over_the_shipped_snapshots(shared: Shared, lab_page: LabOpener) -> None:
    """The slider of lab 02: loss and lens are those of the snapshot under it."""
    found = lab_page(shared("run", find_lab("02")))
    view = found.page.locator(".pc-time")
    view.wait_for(state="attached", timeout=120_000)
    view.scroll_into_view_if_needed()
    view.locator("summary").click()
    bar = view.locator("input[type=range]")
    expect(bar).to_be_visible(timeout=60_000)
    names = name_snapshots()
    expect(bar).to_have_attribute("max", str(len(names) - 1))
    losses = []
    for key, name in (("Home", names[0]), ("End", names[-1])):
        model, tokenizer, _ = open_model(name)
        seen = capture(model, [tokenizer.bos_id, *tokenizer.encode(TEXT)])
        losses.append(float(seen.losses.mean()))
        bar.focus()
        found.page.keyboard.press(key)
        expect(view.locator(".pc-stat dd").first).to_have_text(f"{losses[-1]:.2f}", timeout=60_000)
        best = tokenizer.token_bytes(int(seen.last.argmax())).decode("utf-8", "replace")
        expect(view.locator(".pc-rung").last).to_contain_text(best.strip())
    assert losses[0] > losses[1] + 1, "training is seen"
    found.check()


def test_map_over_the_shipped_snapshots(shared: Shared, lab_page: LabOpener) -> None:
    """The slider of lab 03: at each end the neighbours beside the map are those that are measured here."""
    found = lab_page(shared("run", find_lab("03")))
    film = found.page.locator(".pc-atlas").nth(1)
    film.locator(".pc-scatter[data-painter]").wait_for(state="attached", timeout=120_000)
    film.scroll_into_view_if_needed()
    truth = TimeAtlas(name_snapshots())
    bar, lists = film.locator(".pc-atlas-time input"), []
    for key, frame in (("End", len(truth.steps) - 1), ("Home", 0)):
        bar.focus()
        found.page.keyboard.press(key)
        expect(film.locator(".pc-atlas-time output")).to_have_text(f"{truth.steps[frame]:,}")
        point = truth.labels.index(film.locator(".pc-atlas-name").inner_text())
        near = truth.near("input", "PCA", 2, frame, point)
        lists.append([truth.labels[i] for i in near.true])
        expect(film.locator(".pc-atlas-true .pc-atlas-near .pc-mono")).to_have_text(
            lists[-1], timeout=60_000
        )
    assert lists[0] != lists[1]
    found.check()


def work_in(page: Page, number: str) -> None:
    """Begin something in a lab, and do not wait for its end."""
    if number == "00":
        page.locator(".pc-check").get_by_role("button").first.click()
    elif number == "01":
        page.locator(".pc-area").fill("strawberry fields")
        page.locator(".pc-trainer").scroll_into_view_if_needed()
        page.locator('.pc-trainer[data-ready="true"]').get_by_role("button", name="Learn").click()
    elif number == "02":
        page.locator(".pc-prompt textarea").fill("one two one two one")
        page.locator(".pc-switches").get_by_role("button", name="Try each one alone").click()
    else:
        page.locator(".pc-atlas").first.get_by_role("tab", name="UMAP").click()


def check_alive(page: Page, number: str) -> None:
    """The lab answers: a control is used, and what it shows follows."""
    if number == "00":
        page.locator(".pc-check").get_by_role("button").first.click()
        expect(page.locator(".pc-check")).to_contain_text(re.compile(r"\d\.\d\d"), timeout=120_000)
    elif number == "01":
        page.locator(".pc-area").fill("blueberry")
        expect(page.locator('.pc-playground [data-name="characters"]')).to_have_text(
            "9", timeout=60_000
        )
    elif number == "02":
        page.locator(".pc-prompt textarea").fill("red blue red blue")
        expect(page.locator(".pc-heads .pc-token")).to_have_count(
            1 + len(open_model("shipped/base")[1].encode("red blue red blue")), timeout=60_000
        )
    else:
        view = page.locator(".pc-atlas").first
        view.get_by_label("Find a token").fill("you")
        expect(view.locator(".pc-atlas-find")).to_contain_text("found", timeout=60_000)
        page.keyboard.press("Enter")
        expect(view.locator(".pc-atlas-name")).to_contain_text("you", timeout=60_000)


# each lab once, in a host that keeps its kernel (edit, jupyter) or makes a new one (run)
@pytest.mark.parametrize(
    "number, host", [("00", "run"), ("01", "edit"), ("02", "jupyter"), ("03", "run")]
)
def test_closed_in_mid_work_and_opened_again(
    number: str, host: str, serve: Serve, shared: Shared, lab_page: LabOpener
) -> None:
    """The tab goes while something is under way; the lab that is opened again answers, without errors."""
    path = find_lab(number)  # the shared editor's kernels end with their page
    url = serve(host, path).url if host == "edit" else shared(host, path)
    first = {
        "00": ".pc-check",
        "01": ".pc-token",
        "02": ".pc-heads canvas",
        "03": ".pc-scatter[data-painter]",
    }
    for visit in range(2):
        found = lab_page(url)
        if host == "jupyter":
            run_all_cells(found.page, 180)
        found.page.wait_for_selector(first[number], timeout=120_000, state="attached")
        if visit == 0:
            work_in(found.page, number)
            found.page.close()
    check_alive(found.page, number)
    found.check()
