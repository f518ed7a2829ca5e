"""`primechat lab render`: each lab as one HTML page that can be read without Python and without a network.

Hides: what replaces the kernel. A lab is run once, and the state of its widgets is stored in the page. Their
own scripts draw it there on top of `page.js`, a widget model without a kernel. plotly's script is included
only if it is needed, and once. Reference: anywidget.dev, "render".
"""

from __future__ import annotations

import base64
import html
import importlib.util
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from primechat.files.paths import make_folder, write_file
from primechat.labkit import start_stop, twins
from primechat.views.theme import write_variables
from primechat.views.widgets.kit import Widget

HERE = Path(__file__).parent
MAX_TEXT = 20_000
INTERNAL = ("comm", "layout", "tabbable", "tooltip")


class CellOutput(io.StringIO):
    """Standard output that records which cell of a lab writes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.by_cell: dict[str, str] = {}

    def write(self, text: str) -> int:
        """Store a text for the cell whose code is on the stack, and return its length."""
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if "__marimo__cell_" in name:
                cell = name.rpartition("__marimo__cell_")[2].partition("_.")[0]
                self.by_cell[cell] = self.by_cell.get(cell, "") + text
                break
            frame = frame.f_back  # type: ignore[assignment]
        return len(text)


@dataclass(frozen=True)
class Part:
    """One cell of a page: its code, whether the code is folded, its output and its printed text."""

    code: str
    folded: bool
    output: Any
    printed: str


def run_cells(path: Path, *, train: bool) -> list[Part]:
    """Return the cells of a lab after running it as a script; with `train`, its stages run too."""
    # Load the lab as a module.
    spec = importlib.util.spec_from_file_location(f"lab_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "a lab is a Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    # Run its cells without flags.
    said = CellOutput()
    argv, sys.argv = sys.argv, [str(path)]
    try:
        start_stop.still = not train
        with redirect_stdout(said):
            outputs, _ = module.app.run()
    finally:
        sys.argv, start_stop.still = argv, False

    # Match codes, folds and outputs.
    manager = module.app._cell_manager
    names, codes = [str(name) for name in manager.cell_ids()], list(manager.codes())
    rows = zip(codes, twins.read_folds(path), outputs, names, strict=True)
    return [
        Part(code, folded, output, said.by_cell.get(name, ""))
        for code, folded, output, name in rows
    ]


class PageWriter:
    """Writer of a lab's cells as HTML; scripts and styles shared by several widgets are written once."""

    def __init__(self) -> None:
        self.kinds: dict[str, dict[str, str]] = {}
        self.states: list[dict[str, Any]] = []
        self.has_plotly = False

    def write_part(self, part: Part) -> str:
        """Return a cell as HTML."""
        has_text = hasattr(part.output, "text") and not isinstance(part.output, Widget)
        is_prose = has_text and "mo.md(" in part.code
        blocks = []
        if not is_prose and part.code.strip() != "import marimo as mo":
            mark = "" if part.folded else " open"
            code = html.escape(part.code)
            blocks.append(
                f"<details class=code{mark}><summary>Code</summary><pre>{code}</pre></details>"
            )
        if part.printed.strip():
            blocks.append(f"<pre class=said>{html.escape(part.printed[:MAX_TEXT])}</pre>")
        if part.output is not None:
            blocks.append(self.write_output(part.output))
        return "\n".join(blocks)

    def write_output(self, output: Any) -> str:
        """Return the output of a cell as HTML."""
        if isinstance(output, Widget):
            return self.write_widget(output)

        # plotly.
        if hasattr(output, "to_plotly_json") and hasattr(output, "to_html"):
            self.has_plotly = True
            return str(output.to_html(full_html=False, include_plotlyjs=False))

        # matplotlib: a figure, or something that belongs to one.
        figure: Any = output if hasattr(output, "savefig") else getattr(output, "figure", None)
        if hasattr(figure, "savefig"):
            picture = io.BytesIO()
            figure.savefig(picture, format="png", bbox_inches="tight", dpi=144)
            return f'<img alt="" src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}">'

        # Prose of marimo, then anything that Jupyter could show.
        if "marimo" in type(output).__module__ and hasattr(output, "text"):
            return f"<div class=prose>{output.text}</div>"
        made: Callable[[], Any] | None = getattr(output, "_repr_html_", None)
        found = made() if made else None
        return (
            str(found) if found else f"<pre class=said>{html.escape(repr(output)[:MAX_TEXT])}</pre>"
        )

    def write_widget(self, widget: Widget) -> str:
        """Return the placeholder of a widget; its state and script are written at the end of the page."""
        getattr(widget, "answer_settle", dict)()  # ends the wait for a reader, who is not there
        self.has_plotly = self.has_plotly or widget.has_trait("figure")
        name = f"{type(widget).__module__}.{type(widget).__name__}"
        self.kinds[name] = {"script": str(widget._esm), "looks": str(widget._css)}
        state = {
            key: value
            for key, value in widget.get_state().items()
            if not key.startswith("_") and key not in INTERNAL
        }
        self.states.append({"kind": name, "state": state})
        return f'<div class=widget data-widget="{len(self.states) - 1}"></div>'

    def write_page(self, title: str, body: str, nav: str) -> str:
        """Return the whole page."""
        plotly = ""
        if self.has_plotly:
            from plotly.offline import get_plotlyjs

            plotly = f"<script>{get_plotlyjs()}</script>"
        data = json.dumps({"kinds": self.kinds, "widgets": self.states}, default=encode_bytes)
        # In a script element, only these characters need escaping.
        data = (
            data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
        )
        script = (HERE / "page.js").read_text(encoding="utf-8")
        looks = f"{write_variables()}\n{(HERE / 'page.css').read_text(encoding='utf-8')}"
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}'
            '</title><meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{looks}</style>{plotly}"
            f'</head><body><div class="pc page">{nav}<main>{body}</main></div>'
            f'<script type="application/json" id="lab">{data}</script><script type="module">{script}</script>'
            "</body></html>\n"
        )


def encode_bytes(value: Any) -> Any:
    """Return a value that JSON cannot hold in another form: bytes in base64, numpy numbers as numbers."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"base64": base64.b64encode(bytes(value)).decode()}
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot stand in a page")


def write_nav(here: Path, shown: Sequence[Path]) -> str:
    """Return the navigation bar with links to the labs that have a page."""
    links = []
    for path in shown:
        name = f"{path.stem[:2]} {path.stem[3:].replace('_', ' ')}"
        mark = ' aria-current="page"' if path == here else ""
        links.append(f'<a href="{path.stem}.html"{mark}>{html.escape(name)}</a>')
    return f'<nav aria-label="Labs"><a href="index.html">primechat</a>{"".join(links)}</nav>'


def write_lab(path: Path, shown: Sequence[Path] = (), *, train: bool = False) -> str:
    """Return a lab as an HTML page with links to the labs in `shown`; with `train`, its stages run too."""
    writer = PageWriter()
    parts = [writer.write_part(part) for part in run_cells(path, train=train)]
    note = (
        f"<p class=note>A picture of this lab as it ran once. What needs Python does not answer here; "
        f"<code>primechat lab {path.stem[:2]}</code> opens the lab itself.</p>"
    )
    body = "\n".join(
        f"<section>{part}</section>" for part in [*parts[:1], note, *parts[1:]] if part
    )
    return writer.write_page(twins.read_title(path), body, write_nav(path, shown))


@contextmanager
def hide_models() -> Iterator[str]:
    """Use an empty base directory, so that a page for others shows no models of one's own; yield its path."""
    before = os.environ.get("NANOCHAT_BASE_DIR")
    with tempfile.TemporaryDirectory(prefix="primechat-") as empty:
        os.environ["NANOCHAT_BASE_DIR"] = empty
        try:
            yield empty
        finally:
            os.environ.pop("NANOCHAT_BASE_DIR")
            os.environ.update({} if before is None else {"NANOCHAT_BASE_DIR": before})


def write_pages(
    folder: Path, labs: Sequence[Path], *, train: bool = False, own: bool = False
) -> int:
    """Write labs and an index as pages into a folder; return 1 if a lab could not be run, else 0.

    Pages of other labs that are already in the folder keep their links.

    Args:
        folder: folder to write.
        labs: labs to write.
        train: whether to run their stages too.
        own: whether to show the user's own models and runs too, not only those that ship.
    """
    make_folder(folder)
    failed, rows = 0, []
    pages = {path: folder / f"{path.stem}.html" for path in twins.list_labs()}
    shown = [path for path, page in pages.items() if path in labs or page.is_file()]

    # The labs.
    for path in labs:
        try:
            with nullcontext("") if own else hide_models() as hidden:
                text = write_lab(path, shown, train=train)
            text = text.replace(hidden, "~/.cache/nanochat") if hidden else text
            write_file(pages[path], text)
        except Exception as error:  # a failing lab must not keep the others from being written
            failed += 1
            print(f"{path.name}: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        print(f"written: {pages[path]} ({pages[path].stat().st_size / 1e6:.1f} MB)")

    # The index.
    for path in shown:
        if not (page := pages[path]).is_file():
            continue
        number, name = path.stem[:2], path.stem[3:].replace("_", " ")
        title = (
            f"<strong>{html.escape(twins.read_title(path))}</strong><em>{html.escape(name)}</em>"
        )
        rows.append(f'<li><a href="{page.name}"><span>{number}</span>{title}</a></li>')
    body = f"<h1>How is a small ChatGPT made?</h1><ol class=labs>{''.join(rows)}</ol>"
    write_file(folder / "index.html", PageWriter().write_page("primechat", body, ""))
    return int(failed > 0)
