"""Lab 02 in a real browser: point, click, type and drag, and read back what the page shows."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from browser import HOSTS, ROOT, LabPage, run_all_cells
from playwright.sync_api import Locator, Page, expect

from primechat import capture
from primechat.labkit import lab

LAB = ROOT / "labs" / "02_attention_internals.py"
TEXT = "My sister has a small dog. My sister has a big cat. I like the dog, but I love the cat."
pytestmark = pytest.mark.slow


def find(page: Page, name: str) -> Locator:
    """Return a view of the lab, in sight."""
    view = page.locator(f".pc-{name}").first
    view.wait_for(state="attached", timeout=60_000)
    view.scroll_into_view_if_needed()
    return view


@pytest.fixture
def truth() -> SimpleNamespace:
    """The same model and text, measured here."""
    model, tokenizer, _ = lab.borrow_model("shipped/base")
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    spell = [tokenizer.token_bytes(i).decode("utf-8", "replace") for i in ids]
    return SimpleNamespace(model=model, tokenizer=tokenizer, ids=ids, tokens=spell)


def check_heads(page: Page, truth: Any) -> None:
    """Point at a token and read what it reads; enlarge another head by mouse and by key."""
    heads = find(page, "heads")
    tokens = heads.locator(".pc-token")
    expect(tokens).to_have_count(len(truth.ids), timeout=60_000)
    weights = capture(truth.model, truth.ids, points=["layer.*.attn.weights"]).stack("attn.weights")
    heads.locator(".pc-thumb").nth(1 * truth.model.config.n_head + 2).click()
    expect(heads.locator("h4").nth(1)).to_have_text("Layer 1, head 2")
    place = len(truth.ids) - 3
    tokens.nth(place).hover()
    row = weights[1, 2, place]
    said = heads.locator(".pc-say").inner_text()
    if row.max() > 0.06:
        first = re.search(r"\(([\d.]+) %\)", said)
        assert first and float(first[1]) == pytest.approx(100 * float(row.max()), abs=0.6), (
            said,
            row.max(),
        )
    heads.locator(".pc-thumb").nth(1 * truth.model.config.n_head + 2).focus()
    page.keyboard.press("ArrowRight")
    expect(heads.locator("h4").nth(1)).to_have_text("Layer 1, head 3")
    picture = "node => [...node.querySelectorAll('canvas')].map((c) => c.toDataURL()).join()"
    trained = heads.evaluate(picture)
    heads.locator("input[type=checkbox]").check()
    page.wait_for_function(
        "([node, old]) => [...node.querySelectorAll('canvas')].map((c) => c.toDataURL()).join() !== old",
        arg=[heads.element_handle(), trained],
        timeout=60_000,
    )
    heads.locator("input[type=checkbox]").uncheck()


def check_switches(page: Page, truth: Any) -> None:
    """Switch an MLP and a head off: loss and bars move to what capture says."""
    board = find(page, "switches")
    whole = capture(truth.model, truth.ids).losses.mean()
    stats = board.locator(".pc-stat dd")
    expect(stats.nth(0)).to_have_text(f"{whole:.2f}")
    before = board.locator(".pc-share-value").all_inner_texts()
    parts = ["layer.3.mlp", "layer.0.head.1"]
    for part in parts:
        board.locator(f'.pc-switch[data-part="{part}"]').click()
        expect(board.locator(f'.pc-switch[data-part="{part}"]')).to_have_attribute(
            "aria-checked", "false"
        )
    cut = capture(truth.model, truth.ids, ablate=parts).losses.mean()
    expect(stats.nth(1)).to_have_text(f"{cut:.2f}", timeout=60_000)
    assert board.locator(".pc-share-value").all_inner_texts() != before
    board.get_by_role("button", name="All on").click()
    expect(stats.nth(1)).to_have_text(f"{whole:.2f}", timeout=60_000)
    board.get_by_role("button", name="Try each one alone").click()
    expect(board.get_by_text("Each number: how much the loss grows")).to_be_visible(timeout=90_000)
    alone = capture(truth.model, truth.ids, ablate=["layer.3.mlp"]).losses.mean() - whole
    shown = board.locator('.pc-switch[data-part="layer.3.mlp"]').inner_text().replace("−", "-")
    assert float(shown) == pytest.approx(float(alone), abs=0.011)
    board.get_by_role("tab", name="its words shuffled, twice").click()
    expect(board.get_by_text("same order saves now")).to_be_visible(timeout=60_000)
    expect(board.get_by_text("in other orders now")).to_be_visible()
    board.get_by_role("tab", name="your text").click()
    expect(stats.nth(0)).to_have_text(f"{whole:.2f}", timeout=60_000)


def check_lens(page: Page, truth: Any) -> None:
    """The last row is the whole model; pointing at a cell explains it."""
    lens = find(page, "lens")
    logits = capture(truth.model, truth.ids, points=["logits"])["logits"]
    rows = lens.locator("tbody tr")
    expect(rows).to_have_count(truth.model.config.n_layer + 3, timeout=60_000)
    shown = rows.nth(truth.model.config.n_layer + 1).locator("td").all_inner_texts()
    want = [
        truth.tokenizer.token_bytes(int(i)).decode("utf-8", "replace") for i in logits.argmax(-1)
    ]
    plain = [text.replace("·", " ").replace("⏎", "").strip() for text in shown]
    assert plain == [text.strip() for text in want]
    lens.locator('td[data-r="1"][data-t="2"]').hover()
    expect(lens.locator(".pc-detail h4")).to_contain_text("after layer 0")
    lens.locator(".pc-scroll").focus()
    page.keyboard.press("ArrowDown")
    expect(lens.locator(".pc-detail h4")).to_contain_text("after layer 1")


def check_more(page: Page, truth: Any) -> None:
    """Every part behind "more" opens and draws."""
    for name, drawn in (("scores", ".pc-strip"), ("shares", ".pc-part"), ("neurons", ".pc-band")):
        view = find(page, name)
        view.locator("summary").click()
        expect(view.locator(drawn).first).to_be_visible(timeout=60_000)
    shares = find(page, "shares")
    shown = [
        float(text.replace("−", "-"))
        for text in shares.locator(".pc-parts .pc-value").all_inner_texts()
    ]
    total = re.search(r"Together ([+−][\d.]+)", shares.locator(".pc-say").inner_text())
    assert total and sum(shown) == pytest.approx(
        float(total[1].replace("−", "-")), abs=0.005 * len(shown) + 0.01
    )
    patch = find(page, "patch")
    patch.locator("summary").click()
    patch.get_by_label("second prompt").fill("I")
    expect(patch.get_by_text("must have equally many")).to_be_visible(timeout=60_000)
    times = find(page, "time")
    times.locator("summary").click()
    if times.locator("input[type=range]").count():
        first = times.locator(".pc-rung").all_inner_texts()
        times.locator("input[type=range]").focus()
        page.keyboard.press("Home")
        page.wait_for_function(
            "([node, old]) => [...node.querySelectorAll('.pc-rung')].map((r) => r.innerText).join() !== old",
            arg=[times.element_handle(), ",".join(first)],
            timeout=60_000,
        )


def check_typing(page: Page, truth: Any) -> None:
    """A new text and another model move every view."""
    prompt = find(page, "prompt")
    prompt.locator("textarea").fill("one two one two one")
    ids = [truth.tokenizer.bos_id, *truth.tokenizer.encode("one two one two one")]
    expect(page.locator(".pc-heads .pc-token")).to_have_count(len(ids), timeout=60_000)
    loss = capture(truth.model, ids).losses.mean()
    expect(find(page, "switches").locator(".pc-stat dd").first).to_have_text(
        f"{loss:.2f}", timeout=60_000
    )
    expect(find(page, "lens").locator("thead th")).to_have_count(len(ids) + 1, timeout=60_000)
    find(page, "models").locator("select").select_option("shipped/sft")
    other = capture(lab.borrow_model("shipped/sft")[0], ids).losses.mean()
    assert f"{other:.2f}" != f"{loss:.2f}"
    expect(find(page, "switches").locator(".pc-stat dd").first).to_have_text(
        f"{other:.2f}", timeout=60_000
    )
    find(page, "prompt").locator("textarea").fill("")
    expect(page.get_by_text("Type at least two tokens.")).to_be_visible(timeout=60_000)


@pytest.mark.parametrize("host", HOSTS)
def test_lab_is_alive(host: str, shared: Any, lab_page: Callable[..., LabPage], truth: Any) -> None:
    found = lab_page(shared(host, LAB), "dark" if host == "edit" else "light")
    if host == "jupyter":
        run_all_cells(found.page, 180)
    found.page.wait_for_selector(".pc-headgrid canvas", timeout=90_000, state="attached")
    for check in (check_heads, check_switches, check_lens, check_more, check_typing):
        check(found.page, truth)
    found.check()
