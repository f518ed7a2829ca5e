"""Lab 03 in a real browser: search, pick, lasso, colour, turn, play, and read back what the page shows."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from browser import ROOT, SMALL_LABS, LabPage, Server, measure_load, run_all_cells
from matplotlib.image import imread
from playwright.sync_api import Locator, Page, expect

from primechat.checkpoint.checkpoint import save_snapshot
from primechat.checkpoint.registry import open_model
from primechat.interp.embeddings.atlas import TokenAtlas

LAB = ROOT / "labs" / "03_embedding_atlas.py"
SCATTER = 'e => e.closest(".pc-atlas").scatter'
pytestmark = pytest.mark.slow

NO_WEBGL = """
const real = HTMLCanvasElement.prototype.getContext;
HTMLCanvasElement.prototype.getContext = function (kind, ...rest) {
  return kind.includes("webgl") ? null : real.call(this, kind, ...rest);
};
"""


@pytest.fixture
def truth() -> SimpleNamespace:
    """The same model, measured here."""
    model, tokenizer, _ = open_model("shipped/base")
    return SimpleNamespace(model=model, tokenizer=tokenizer, atlas=TokenAtlas(model, tokenizer))


def save_run(base_dir: Path, truth: Any) -> None:
    """Leave a run of three snapshots, from noise to the model."""
    run = base_dir / "base_checkpoints" / "film"
    truth.tokenizer.save(run / "tokenizer")
    for step, share in ((0, 0.0), (8, 0.5), (64, 1.0)):
        state = {key: value.clone() for key, value in truth.model.state_dict().items()}
        weight = state["transformer.wte.weight"]
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        state["transformer.wte.weight"] = share * weight + (1 - share) * noise * weight.std()
        save_snapshot(
            run, step, state, truth.model.config, {"tokenizer_identity": truth.tokenizer.identity}
        )


def find_atlas(page: Page, n: int) -> Locator:
    """Return the n-th map of the lab, drawn and in sight."""
    view = page.locator(".pc-atlas").nth(n)
    view.locator(".pc-scatter[data-painter]").wait_for(state="attached", timeout=90_000)
    view.scroll_into_view_if_needed()
    page.wait_for_timeout(400)
    return view


def read_lists(view: Locator) -> tuple[list[str], list[str]]:
    """Return both lists of neighbours beside the map."""
    return tuple(
        view.locator(f".pc-atlas-{kind} .pc-atlas-near .pc-mono").all_text_contents()
        for kind in ("true", "drawn")
    )  # type: ignore[return-value]


def lasso(page: Page, view: Locator, reach: int) -> int:
    """Draw a square around the middle of the map with Shift held; return how many points are selected."""
    scatter = view.locator(".pc-scatter")
    scatter.scroll_into_view_if_needed()  # all of it: a click that was tried again may have scrolled the page
    box = scatter.bounding_box()
    assert box, "the map is in sight"
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.keyboard.down("Shift")
    page.mouse.move(x - reach, y - reach)
    page.mouse.down()
    for dx, dy in ((reach, -reach), (reach, reach), (-reach, reach)):
        page.mouse.move(x + dx, y + dy, steps=4)
    page.mouse.up()
    page.keyboard.up("Shift")
    title = view.locator(".pc-atlas-table .pc-title")
    expect(title).to_have_text(re.compile(r"^[\d,]+ selected$"), timeout=60_000)
    return int(title.inner_text().split()[0].replace(",", ""))


def test_lab_in_a_browser(
    serve: Callable[..., Server], lab_page: Callable[..., LabPage], truth: Any, tmp_path: Path
) -> None:
    save_run(tmp_path / "host-run" / "nanochat", truth)
    found = lab_page(serve("run", LAB).url)
    page = found.page
    view = find_atlas(page, 0)

    # the token shown first: both lists are those that are measured here
    name = view.locator(".pc-atlas-name").inner_text()
    near = truth.atlas.near("input", "PCA", 2, 0, truth.atlas.labels.index(name))
    labels = truth.atlas.labels
    assert read_lists(view) == ([labels[i] for i in near.true], [labels[i] for i in near.drawn])
    expect(view.locator(".pc-atlas-both")).to_have_text(
        "How many agree stands here after your guess."
    )

    # find another by its name, and go on from it to its nearest neighbour
    view.get_by_label("Find a token").fill("you")
    expect(view.locator(".pc-atlas-find")).to_contain_text("found")
    page.keyboard.press("Enter")
    expect(view.locator(".pc-atlas-name")).to_have_text("·you")
    near = truth.atlas.near("input", "PCA", 2, 0, labels.index("·you"))
    view.locator(".pc-atlas-true .pc-atlas-near").first.click()
    expect(view.locator(".pc-atlas-name")).to_have_text(labels[near.true[0]])
    view.get_by_label("Find a token").fill("")

    # lasso -> table -> data frame in the next cell
    view.get_by_role("button", name="Fit").click()
    n = lasso(page, view, 40)
    assert 0 < n < len(labels)
    assert view.locator(".pc-atlas-rows tbody tr").count() == min(n, 100)
    expect(page.get_by_text(re.compile(rf"^{n:,} rows, \d+ columns$"))).to_be_visible(
        timeout=60_000
    )
    view.get_by_role("button", name="Let go").click()

    # colour, keys, three axes, another table
    view.get_by_label("Colour", exact=True).select_option("frequency")
    expect(view.locator(".pc-atlas-legend")).to_contain_text(f"{truth.atlas.counts.max():,}")
    scatter = view.locator(".pc-scatter")
    before = scatter.evaluate(f"e => ({SCATTER})(e).where(40)")
    scatter.focus()
    page.keyboard.press("+")
    page.keyboard.press("ArrowLeft")
    assert scatter.evaluate(f"e => ({SCATTER})(e).where(40)") != before
    view.get_by_role("tab", name="3-D").click()
    kept = 10 * truth.atlas.show("input", "PCA", 3).kept[0]
    expect(view.locator(".pc-atlas-note")).to_contain_text(
        "stands here after your guess", timeout=60_000
    )
    guess = page.locator(".pc-prediction", has_text="ten true neighbours")
    guess.get_by_label("My guess").fill("3")
    guess.get_by_role("button", name="Show the answer").click()
    expect(view.locator(".pc-atlas-note")).to_contain_text(
        f"{kept:.1f} are neighbours here", timeout=60_000
    )
    expect(view.locator(".pc-atlas-both")).to_contain_text(re.compile(r"^\d+ of 10 agree"))
    both = len(set.intersection(*map(set, read_lists(view))))
    expect(view.locator(".pc-atlas-both")).to_contain_text(f"{both} of 10 agree ({10 * both} %")
    view.get_by_label("Show", exact=True).select_option("output")
    shown = 100 * truth.atlas.show("output", "PCA", 3).shown[0]
    expect(view.locator(".pc-atlas-note")).to_contain_text(f"shows {shown:.1f} %", timeout=60_000)

    # the time machine: related tokens have other neighbours at step 0 than at the end
    film = find_atlas(page, 1)
    first = read_lists(film)[0]
    film.get_by_role("button", name="Play").click()
    bar = film.locator(".pc-atlas-time input")
    expect(bar).to_have_value("2", timeout=60_000)
    expect(film.get_by_role("button", name="Play")).to_be_visible(timeout=60_000)
    page.wait_for_timeout(500)
    assert read_lists(film)[0] != first
    bar.focus()
    page.keyboard.press("Home")
    expect(film.locator(".pc-atlas-true .pc-atlas-near .pc-mono").first).to_have_text(
        first[0], timeout=60_000
    )

    # a text of one's own
    text = find_atlas(page, 2)
    text.get_by_label("Text", exact=True).fill("The bank of the river. The bank has my money.")
    last = truth.atlas.labels[truth.tokenizer.encode(" money")[0]]
    text.get_by_label("Find a token").fill(last)
    expect(text.locator(".pc-atlas-find")).to_contain_text(
        re.compile("[1-9] found"), timeout=60_000
    )
    text.get_by_label("Text", exact=True).fill("Hm")
    expect(text.locator(".pc-error")).to_contain_text("write more", timeout=60_000)
    found.check()


def test_umap_goes_on_in_the_background(
    shared: Callable[..., str], lab_page: Callable[..., LabPage]
) -> None:
    found = lab_page(shared("run", LAB))
    page, view = found.page, find_atlas(found.page, 0)
    view.get_by_role("tab", name="UMAP").click()
    expect(view.locator(".pc-atlas-work")).to_contain_text("in the background", timeout=60_000)
    n = lasso(page, view, 30)  # the page stays alive meanwhile
    assert n > 0
    view.get_by_role("button", name="Stop", exact=True).click()
    expect(view.locator(".pc-atlas-note")).to_contain_text("it was stopped", timeout=60_000)
    expect(view.get_by_role("tab", name="PCA")).to_have_attribute("aria-selected", "true")
    view.get_by_role("tab", name="UMAP").click()
    expect(view.get_by_role("tab", name="UMAP")).to_have_attribute(
        "aria-selected", "true", timeout=240_000
    )
    expect(view.locator(".pc-atlas-note")).to_contain_text("UMAP keeps neighbours together")
    found.check()


def test_twin_is_coloured_and_alive_in_jupyter(
    shared: Callable[..., str], lab_page: Callable[..., LabPage], truth: Any
) -> None:
    """JupyterLab draws a widget before it stands in the page: colours come later."""
    found = lab_page(shared("jupyter", LAB))
    page = found.page
    run_all_cells(page)
    view = find_atlas(page, 0)
    dot = view.locator(".pc-atlas-chip i").first
    expect(dot).to_have_css("background-color", "rgb(63, 127, 224)", timeout=60_000)
    view.get_by_label("Find a token").fill("you")
    expect(view.locator(".pc-atlas-find")).to_contain_text("found")
    page.keyboard.press("Enter")
    expect(view.locator(".pc-atlas-name")).to_have_text("·you")
    near = truth.atlas.near("input", "PCA", 2, 0, truth.atlas.labels.index("·you"))
    expect(view.locator(".pc-atlas-true .pc-atlas-near .pc-mono").first).to_have_text(
        truth.atlas.labels[near.true[0]], timeout=60_000
    )
    found.check()


@pytest.mark.parametrize("painter", ["WebGL", "canvas"])
def test_many_points(
    painter: str, shared: Callable[..., str], lab_page: Callable[..., LabPage]
) -> None:
    found = lab_page("about:blank")
    if painter == "canvas":
        found.page.add_init_script(NO_WEBGL)
    found.page.goto(shared("run", SMALL_LABS / "points.py"))
    page, view = found.page, find_atlas(found.page, 0)
    scatter = view.locator(".pc-scatter")
    if scatter.get_attribute("data-painter") != painter:
        pytest.skip("this Chromium has no WebGL")
    assert scatter.evaluate(f"e => ({SCATTER})(e).count()") == 65_536
    drawing_ms = scatter.evaluate(f"e => ({SCATTER})(e).bench(20)")
    assert drawing_ms < 400 * measure_load(), f"{drawing_ms:.0f} ms a drawing, by software"
    # the point drawn under the pointer is the one that is named and picked
    x, y = scatter.evaluate(f"e => ({SCATTER})(e).where(17)")
    box = scatter.bounding_box()
    assert box, "the map is in sight"
    page.mouse.move(box["x"] + x, box["y"] + y)
    expect(view.locator(".pc-atlas-tip")).to_contain_text("token17", timeout=5000)
    assert lasso(page, view, 200) > 10_000
    picture = (15 * imread(io.BytesIO(scatter.screenshot()))[..., :3]).astype(int).reshape(-1, 3)
    colours = len(np.unique(picture, axis=0))
    assert colours > 30, "six kinds of points, labels and lines"
    found.check()
