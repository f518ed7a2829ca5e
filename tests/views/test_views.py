"""The theme and the base of the widgets: one look, shared code, nothing fetched."""

from __future__ import annotations

import re
from pathlib import Path

import plotly.graph_objects as go
import pytest

from primechat.views import theme
from primechat.views.widgets import kit

WIDGETS = Path(kit.__file__).parent


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours (WCAG 2.2, 1.4.3)."""

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [theme.LIGHT, theme.DARK], ids=["light", "dark"])
def test_text_is_readable(colours: dict[str, str]) -> None:
    for paper in ("bg", "surface", "raised"):
        for ink in ("ink", "muted", "accent", "good", "warn", "bad"):
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5


def test_plots_read_on_both_grounds() -> None:
    for colour in (theme.INK, *theme.SERIES):
        assert (
            min(contrast(colour, theme.LIGHT["bg"]), contrast(colour, theme.DARK["bg"])) >= 2.9
        ), colour
    figure = theme.style_figure(
        go.Figure(go.Scatter(y=[1, 2])), height=200, yaxis_title="bits per byte"
    )
    assert figure.layout.height == 200 and figure.layout.yaxis.title.text == "bits per byte"
    assert figure.layout.font.color == theme.INK
    import matplotlib.pyplot as plt

    with plt.rc_context(theme.style_matplotlib()):
        assert plt.rcParams["text.color"] == theme.INK


def test_variables_of_both_themes() -> None:
    css = theme.write_variables()
    assert css.count("--pc-accent: ") == 2 and f"--pc-ink: {theme.DARK['ink']}" in css


def test_scripts_are_joined() -> None:
    own = 'import { frame, h } from "./kit.js";\nexport default { render: (c) => frame(c, "x").end };\n'
    joined = kit.join_scripts(own)
    assert "import" not in re.sub(r"//.*|/\*.*?\*/", "", joined, flags=re.S).split()
    assert (
        joined.count("export ") == 1
        and "export default" in joined
        and "\nfunction frame(" in joined
    )


def test_scripts_share_files_once(tmp_path: Path) -> None:
    (tmp_path / "one.js").write_text('import { h } from "./two.js";\nexport const one = 1;\n')
    (tmp_path / "two.js").write_text("export function two() { return 2; }\n")
    own = 'import { one } from "./one.js";\nimport { two } from "./two.js";\nexport default { one, two };\n'
    joined = kit.join_scripts(own, tmp_path)
    assert (
        joined.count("function two()")
        == joined.count("const one = 1")
        == joined.count("function frame(")
        == 1
    )
    assert joined.index("function two()") < joined.index("const one = 1") and 'from "' not in joined


def test_page_asks_python() -> None:
    class Adder(kit.Widget):
        _esm = "export default {}"

        def answer_add(self, a: int, b: int) -> dict[str, int]:
            return {"sum": a + b}

    widget, sent = Adder(), []
    widget.send = lambda content, buffers=None: sent.append(content)  # type: ignore[method-assign]
    widget._hear(widget, {"ask": "add", "given": {"a": 1, "b": 2}, "id": "x"}, [])
    widget._hear(widget, {"ask": "add", "given": {"a": 1, "b": "2"}, "id": "y"}, [])
    widget._hear(widget, {"other": 1}, [])
    assert sent[0] == {"sum": 3, "re": "x"} and len(sent) == 2
    assert sent[1]["re"] == "y" and "unsupported operand" in sent[1]["error"]


def test_pages_that_come_later_are_heard() -> None:
    """ipykernel 7.4 remembers, with each message of ours, a subshell that a closed tab takes with it."""

    class Comm:
        comm_id, kernel, sent = "x", "there", 0

        def on_msg(self, _: object) -> None: ...

        def send(self, **_: object) -> None:
            self.sent += 1
            self._reply_subshell_id = "of a tab that is closed"

    class Plain(kit.Widget):
        _esm = "export default {}"

    widget, comm = Plain(), Comm()
    comm._reply_subshell_id = "of the cell"
    widget.comm = comm
    widget.send({"any": "thing"})
    widget.gate = "changed"
    assert comm.sent == 2 and not hasattr(comm, "_reply_subshell_id")


def test_scripts_are_safe_and_alone() -> None:
    """No text of a model is ever read as HTML, and no page asks another machine for anything."""
    for path in sorted(WIDGETS.rglob("*.js")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
        ), path
        assert not re.search(r"https?://(?!www\.w3\.org)", text), path
        shared = any(
            f'/{path.name}"' in other.read_text(encoding="utf-8") for other in WIDGETS.rglob("*.js")
        )
        assert path.with_suffix(".py").is_file() or shared, f"{path.name} is nobody's"
    for path in sorted(WIDGETS.rglob("*.css")):
        assert not re.search(
            r"https?://|@import|#[0-9a-fA-F]{3,8}\b", path.read_text(encoding="utf-8")
        ), path


def test_widget_can_be_made() -> None:
    """ipywidgets derives a class from a widget's own as it is made; script and looks stay what they are."""
    from primechat.views.widgets.attention.heads import HeadView

    one, two = HeadView(at=3), HeadView()
    assert one.at == 3 and two.at == 0 and "function paintHeat(" in one._esm
    assert all(
        look in one._css
        for look in ("--pc-accent", ".pc .pc-button", ".pc .pc-token", ".pc .pc-thumb")
    )
