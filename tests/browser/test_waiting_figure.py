"""Figures and answers that wait for a guess: in marimo, in JupyterLab and in a page without Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from browser import SMALL_LABS, run_all_cells
from playwright.sync_api import Browser, expect

from primechat.labkit import pages
from primechat.labkit.start_stop import show
from primechat.views.widgets.controls import Live, Prediction
from primechat.views.widgets.figure import WaitingFigure

LAB = SMALL_LABS / "waiting.py"


def test_what_waits_is_made_once_and_late() -> None:
    made: list[int] = []

    def draw() -> go.Figure:
        made.append(1)
        return go.Figure(go.Bar(y=[1.5, 2.5]))

    widget = show(draw, after="Which?")
    assert (
        isinstance(widget, WaitingFigure)
        and widget.gate == "Which?"
        and not made
        and not widget.figure
    )
    assert widget.answer_settle()["figure"]["data"][0]["type"] == "bar"
    widget.answer_settle()
    assert made == [1]
    assert "newPlot" in widget.answer_script()["script"]
    assert isinstance(show(go.Figure(), after="Which?"), WaitingFigure)
    assert isinstance(show(go.FigureWidget(), after="Which?"), WaitingFigure)
    with pytest.raises(TypeError, match="a str cannot wait for a guess"):
        show("text", after="Which?")


def test_answers_are_measured_when_asked_for() -> None:
    asked: list[int] = []
    guess = Prediction("How many?", ("one", "two"), lambda: asked.append(1) or "two")
    assert not asked and guess.answer is None
    assert guess.answer_settle() == {"answer": "two", "why": ""} and guess.answer == "two"
    with pytest.raises(ValueError, match="answer='three' must be one of"):
        Prediction("How many?", ("one", "two"), lambda: "three").answer_settle()


def guess_and_look(page: Any) -> None:
    """Guess, ask for the answer, and see both figures only then."""
    page.get_by_text("guess above first").nth(1).wait_for(timeout=60_000)
    assert page.locator(".js-plotly-plot").count() == 0, "the answer is not beside the guess"
    page.get_by_label("My guess").fill("40")
    page.get_by_role("button", name="Show the answer").click()
    page.get_by_text("It is 37").wait_for(timeout=60_000)
    page.locator(".js-plotly-plot .gtitle", has_text="a figure").wait_for(timeout=60_000)
    page.locator(".pc-figure").nth(1).scroll_into_view_if_needed()  # it is drawn when it is come to
    page.locator(".js-plotly-plot .gtitle", has_text="a function").wait_for(timeout=60_000)
    assert page.locator(".js-plotly-plot .bars .point").count() == 3
    assert page.get_by_text("guess above first").first.is_hidden()


@pytest.mark.slow
@pytest.mark.parametrize("host", ["run", "jupyter"])
def test_figures_wait_for_the_guess(
    host: str, shared: Callable[..., str], lab_page: Callable[..., Any]
) -> None:
    found = lab_page(shared(host, LAB))
    if host == "jupyter":
        run_all_cells(found.page)
        said = found.page.locator(".jp-OutputArea-output", has_text="COMPUTED")
        assert said.count() == 0, "nothing is measured before it is asked for"
    guess_and_look(found.page)
    found.check()


@pytest.mark.slow
def test_figures_wait_in_a_page_too(tmp_path: Path, lab_page: Callable[..., Any]) -> None:
    page = tmp_path / "page.html"
    page.write_text(pages.write_lab(LAB), encoding="utf-8")
    found = lab_page(f"file://{page}", offline=True)
    guess_and_look(found.page)
    found.check()


TWO_VIEWS = """async (script) => {
  const url = URL.createObjectURL(new Blob([script], { type: "text/javascript" }));
  const { default: widget } = await import(url);
  const controls = [{ name: "text", form: "text", start: "x", label: "Text" }], heard = [];
  const state = { kind: "live", seen: true, values: { text: "x" }, output: { "#": 0, parts: [] }, controls };
  const model = {
    get: (name) => state[name], set: (name, value) => { state[name] = value; }, off: () => {},
    on: (name, work) => { if (name === "change:output") heard.push(work); },
    save_changes: () => setTimeout(() => {
      state.output = { "#": state.values["#"], parts: [{ kind: "text", text: `said ${state.values.text}` }] };
      heard.forEach((work) => work());
    }, 20),
  };
  for (const el of document.querySelectorAll("div")) widget.render({ model, el });
}"""


@pytest.mark.slow
def test_live_answers_a_second_view(browser: Browser) -> None:
    """JupyterLab can show an output twice; what one view has asked leaves the other its voice."""
    page = browser.new_page()
    page.set_content("<body><div></div><div></div></body>")
    page.evaluate(TWO_VIEWS, Live._esm)
    for i, text in enumerate(("one", "two", "three")):
        page.locator("textarea").nth(i % 2).fill(text)
        expect(page.get_by_text(f"said {text}")).to_have_count(2, timeout=5000)
    page.close()
