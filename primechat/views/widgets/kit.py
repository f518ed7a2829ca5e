"""The base of every widget: joins the shared script and looks with those of the widget's own files.

Hides: how a widget without a build step shares code. `kit.js` and `x.js` are plain ES modules; here they
become one, the import of "./kit.js" dropped. Reference: anywidget.dev, "_esm" and "_css".
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import anywidget

from primechat.views.theme import write_variables

HERE = Path(__file__).parent
IMPORT = re.compile(r'^import\s*\{[^}]*\}\s*from\s*"\./kit\.js";?\s*$', re.M)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|let|class)\b)", re.M)


def join_scripts(own: str) -> str:
    """Return a widget's module with the kit's functions in it."""
    return EXPORT.sub("", (HERE / "kit.js").read_text(encoding="utf-8")) + "\n" + IMPORT.sub("", own)


class Widget(anywidget.AnyWidget):
    """A widget whose script and looks stand beside its module, as `<stem>.js` and `<stem>.css`.

    A subclass declares its state as synchronized traits (`traitlets.Unicode().tag(sync=True)`).
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        path = Path(str(sys.modules[cls.__module__].__file__))
        script = path.with_suffix(".js")
        if script.is_file():
            looks = path.with_suffix(".css")
            own = looks.read_text(encoding="utf-8") if looks.is_file() else ""
            cls._esm = join_scripts(script.read_text(encoding="utf-8"))
            kit = (HERE / "kit.css").read_text(encoding="utf-8")
            cls._css = "\n".join([write_variables(), kit, own])
        super().__init_subclass__(**kwargs)
