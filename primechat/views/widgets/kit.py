"""The base class of all widgets, which combines the shared script and styles with a widget's own files.

Hides: how widgets share code without a build step. `kit.js`, `x.js` and the files it imports by a relative
path are plain ES modules; here they are joined into one and the imports are dropped. Hides also how the page
calls Python: `ask(name, given)` in the script calls the widget's method `answer_<name>`.
Reference: anywidget.dev, "_esm" and "_css".
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from primechat.views.theme import write_variables

HERE = Path(__file__).parent
logger = logging.getLogger(__name__)
IMPORT = re.compile(r'^import\s*\{[^}]*\}\s*from\s*"(\.{1,2}/[\w./-]+\.js)";?[ \t]*$', re.M)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|let|class)\b)", re.M)


def join_scripts(own: str, folder: Path = HERE) -> str:
    """Return the source of a widget's module joined with the kit and with the files that it imports."""
    parts: dict[Path, str] = {}

    def add(path: Path) -> None:
        if path not in parts:
            text = path.read_text(encoding="utf-8")
            for name in IMPORT.findall(text):
                add((path.parent / name).resolve())
            parts[path] = EXPORT.sub("", IMPORT.sub("", text))

    for path in [HERE / "kit.js", *(folder / name for name in IMPORT.findall(own))]:
        add(path.resolve())
    return "\n".join([*parts.values(), IMPORT.sub("", own)])


class Widget(anywidget.AnyWidget):
    """A widget whose script and style are in `<stem>.js` and `<stem>.css` beside its module.

    The styles of the scripts that it imports are included. A subclass declares its state as synchronised
    traits (`traitlets.Unicode().tag(sync=True)`). `gate` is the question of a prediction on the same page;
    the widget stays hidden until it is answered.
    """

    gate = traitlets.Unicode("").tag(sync=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        path = Path(str(sys.modules[cls.__module__].__file__))
        script = path.with_suffix(".js")
        # ipywidgets derives another class when it adds traits, which already has its script.
        if script.is_file() and "_esm" not in cls.__dict__:
            own = script.read_text(encoding="utf-8")
            cls._esm = join_scripts(own, path.parent)
            looks = [
                (path.parent / name).with_suffix(".css").resolve() for name in IMPORT.findall(own)
            ]
            wanted = dict.fromkeys([HERE / "kit.css", *looks, path.with_suffix(".css")])
            found = [look.read_text(encoding="utf-8") for look in wanted if look.is_file()]
            cls._css = "\n".join([write_variables(), *found])
        super().__init_subclass__(**kwargs)

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        self.on_msg(self._hear)

    def _send(self, msg: Any, buffers: Any = None) -> None:
        """Send a message, and keep ipykernel from redirecting the page's answers.

        ipykernel 7.4 would route them to the subshell of the last message received before we sent, and drop
        them once that page is closed.
        """
        super()._send(msg, buffers=buffers)
        if hasattr(self.comm, "_reply_subshell_id"):
            del self.comm._reply_subshell_id

    def _hear(self, _: Any, message: Any, buffers: Any) -> None:
        """Answer a request of the page; an exception becomes a sentence that the page shows."""
        if not isinstance(message, dict) or "ask" not in message:
            return
        try:
            answer = getattr(self, f"answer_{message['ask']}")(**message.get("given", {}))
        except Exception as error:
            logger.debug("answer_%s failed", message["ask"], exc_info=True)
            answer = {"error": str(error) or type(error).__name__}
        self.send({**answer, "re": message.get("id")})
