"""`primechat lab render`: pages that need neither Python nor a network."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from primechat.chat.session import open_chat
from primechat.cli import main as cli
from primechat.exercises.start_here import EXERCISES
from primechat.labkit import lab, pages, start_stop, twins

LAB = """
import marimo

app = marimo.App()


@app.cell(hide_code=True)
def _(mo):
    mo.md("# What stands in a page?")
    return


@app.cell
def _():
    import marimo as mo
    import matplotlib.pyplot as plt
    import plotly.graph_objects as go

    from primechat.labkit.lab import Live, predict, show, stage
    from primechat.config import PretrainConfig
    return Live, PretrainConfig, go, mo, plt, predict, show, stage


@app.cell
def _():
    print("printed </script> here")
    return


@app.cell
def _(Live, show):
    show(Live(lambda text: text, text="</script><b>bold</b>"))
    return


@app.cell
def _(predict):
    predict("How many?", ["one", "two"], "two", why="Counted.")
    return


@app.cell
def _(go):
    go.FigureWidget(go.Scatter(y=[1, 2, 3]))
    return


@app.cell
def _(plt):
    plt.subplots()[0]
    return


@app.cell
def _(PretrainConfig, stage):
    def never(config, *, on_event=None, stop=None):
        raise RuntimeError("a page trains nothing")

    stage(never, PretrainConfig(), title="Train")
    return


if __name__ == "__main__":
    app.run()
"""


@pytest.fixture
def little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "labs"
    folder.mkdir()
    monkeypatch.setattr(twins, "LABS", folder)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    (folder / "07_little.py").write_text(LAB)
    return folder


def test_page_holds_the_whole_lab(
    little: Path, tmp_path: Path, lab_page: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["lab", "render", str(out)]) == 0
    assert not start_stop.still and {path.name for path in out.iterdir()} == {
        "index.html",
        "07_little.html",
    }
    text = (out / "07_little.html").read_text(encoding="utf-8")
    assert text.count("</script>") == text.count("<script") == 3 + text.count("Plotly.newPlot("), (
        "one plotly, data, code"
    )
    assert "printed &lt;/script&gt; here" in text and 'src="data:image/png;base64,' in text
    found = lab_page(f"file://{out / '07_little.html'}", offline=True)
    asked: list[str] = []
    found.page.on("request", lambda request: asked.append(request.url))
    found.page.reload()
    found.page.locator(".pc-live .pc-output").wait_for()
    assert found.page.locator(".pc-live .pc-output").inner_text() == "</script><b>bold</b>"
    found.page.get_by_label("two").check()
    found.page.get_by_role("button", name="Show the answer").click()
    assert "1 of 1 guesses" in found.page.locator(".pc-prediction").inner_text()
    assert found.page.locator(".pc-stage .pc-badge").inner_text() == "Ready"
    found.page.get_by_role("button", name="Start").click()
    found.page.get_by_text("This page is a picture").wait_for()
    assert found.page.locator(".js-plotly-plot .main-svg").count() > 0
    assert all(url.startswith(("file:", "blob:", "data:")) for url in asked)
    found.check()


def test_chosen_labs_alone_without_private_models(
    little: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "mine"))
    where = 'print(__import__("os").environ["NANOCHAT_BASE_DIR"], "printed'
    (little / "08_other.py").write_text(LAB.replace('print("printed', where))
    out = tmp_path / "out"
    assert cli.main(["lab", "render", str(out), "8"]) == 0
    assert {path.name for path in out.iterdir()} == {"index.html", "08_other.html"}
    text = (out / "08_other.html").read_text(encoding="utf-8")
    assert str(tmp_path / "mine") not in text and "07_little.html" not in text
    assert "~/.cache/nanochat printed" in text, (
        "the folder that stands in for it is not told either"
    )
    assert os.environ["NANOCHAT_BASE_DIR"] == str(tmp_path / "mine")
    assert cli.main(["lab", "render", str(out), "08", "--own"]) == 0
    assert str(tmp_path / "mine") in (out / "08_other.html").read_text(encoding="utf-8")
    assert cli.main(["lab", "render", str(out), "07"]) == 0
    assert (
        "08_other.html" in (out / "07_little.html").read_text()
        and "08_other" in (out / "index.html").read_text()
    )
    assert cli.main(["lab", "render", str(out), "33"]) == 2


def test_fault_of_one_lab_is_told(
    little: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (little / "08_broken.py").write_text(
        LAB.replace('print("printed', 'raise OSError("no ink")  # ("')
    )
    assert cli.main(["lab", "render", str(tmp_path / "out")]) == 1
    said = capsys.readouterr()
    assert "08_broken.py: OSError: no ink" in said.err and "07_little.html" in said.out
    assert cli.main(["lab", "render"]) == 2 and "needs a folder" in capsys.readouterr().err


def test_a_page_opens_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that opens one would still be at it when the pages are written, and torch aborts then."""
    monkeypatch.setattr(start_stop, "still", True)
    before = threading.active_count()
    view = open_chat("shipped/sft")
    assert threading.active_count() == before and view.first["chosen"] == ["shipped/sft"]
    assert lab.exercise(EXERCISES[0]).message.startswith("To try it, open the lab"), (
        "it cannot be run here"
    )


def test_bytes_and_numbers_travel() -> None:
    import numpy as np

    assert (
        pages.encode_bytes(memoryview(b"ab")) == {"base64": "YWI="}
        and pages.encode_bytes(np.float32(1)) == 1
    )
    with pytest.raises(TypeError, match="set cannot stand"):
        pages.encode_bytes({1})
    assert lab.stage is not None


@pytest.mark.slow
@pytest.mark.parametrize("path", twins.list_labs(), ids=lambda path: path.stem)
def test_every_lab_is_a_page(path: Path, tmp_path: Path, lab_page: Callable[..., Any]) -> None:
    """Every cell runs, as in a script, and its widgets are drawn; stages, which take minutes, wait."""
    page = tmp_path / "page.html"
    page.write_text(pages.write_lab(path), encoding="utf-8")
    assert page.stat().st_size < 25e6
    found = lab_page(f"file://{page}", offline=True)
    places = found.page.locator("[data-widget]")
    found.page.wait_for_function(
        "[...document.querySelectorAll('[data-widget]')].every((one) => one.shadowRoot)"
    )
    found.page.wait_for_timeout(1000)
    assert places.count() > 0 and found.page.locator("[data-widget] .pc").count() >= places.count()
    assert not re.search(r"could not be drawn", found.page.locator("main").inner_text())
    assert found.page.locator(".pc-chat-fault").count() == 0, "nobody has asked for anything yet"
    stages = len(re.findall(r"= \(?\s*stage\(", path.read_text(encoding="utf-8")))
    assert found.page.get_by_role("button", name="Start", exact=True).count() == stages
    found.check()
