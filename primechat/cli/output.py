"""The streams of the process, made safe: what is printed may get lost, the work goes on.

Hides: how a stream fails. A character that its encoding lacks is written in ASCII; a stream whose reader has
gone, whose disk is full or whose terminal was closed falls silent, and its loss is told once on the other
one. Only a verb whose whole result is what it prints ends then (`require_output`): there is no point in
computing what nobody can read. Reference: pipe(7); closeout of GNU's gnulib.
"""

from __future__ import annotations

import codecs
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

ERRORS = "primechat.plain"  # the name of `write_plainly` among Python's handlers of encoding errors
PLAIN = {
    "→": "->",
    "←": "<-",
    "·": "|",
    "…": "...",
    "×": "x",
    "−": "-",
    "–": "-",
    "—": "-",
    "≈": "~",
    "≤": "<=",
    "≥": ">=",
    "’": "'",
    "“": '"',
    "”": '"',
    "␣": "_",
    **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼", "+"),
    **dict.fromkeys("─━╸╺", "-"),
    **dict.fromkeys("│┃", "|"),
}
READER_GONE = 141  # what a shell reports of a program that SIGPIPE ended


class OutputLost(BaseException):
    """Nobody can read what a verb was asked to print; no `except Exception` on the way holds it up."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.reason = getattr(error, "strerror", None) or str(error)
        self.reader_gone = isinstance(error, BrokenPipeError)


class SafeStream:
    """A text stream to write to that never raises for what becomes of the text, but for `OutputLost`."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self.stream, self.name = stream, name
        self.lost = self.required = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it where the stream is lost; return its length."""
        if not self.lost:
            try:
                self.stream.write(text)
            except BlockingIOError:
                pass  # a pipe that does not wait is full: this piece is lost, the next may not be
            except (OSError, ValueError) as error:  # ValueError: the stream was closed
                self.lose(error)
        return len(text)

    def flush(self) -> None:
        """Hand on what is buffered, if anybody takes it."""
        if not self.lost:
            try:
                self.stream.flush()
            except BlockingIOError:
                pass
            except (OSError, ValueError) as error:
                self.lose(error)

    def lose(self, error: Exception) -> None:
        """Be silent from now on, and tell so.

        Raises:
            OutputLost: the output is all that the verb is for.
        """
        self.lost = True
        with suppress(
            OSError, ValueError
        ):  # what is buffered, and what children write, goes nowhere
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, self.stream.fileno())
            os.close(descriptor)
        if self.required:
            raise OutputLost(error)
        if self.name == "stdout" and isinstance(sys.stderr, SafeStream):
            lost = OutputLost(error)
            reason = "nobody reads the output any more" if lost.reader_gone else ""
            reason = reason or f"the output cannot be written ({lost.reason})"
            print(f"primechat: {reason}; the work goes on, Ctrl-C stops it.", file=sys.stderr)


def require_output(required: bool = True) -> None:
    """Set whether the loss of stdout ends the program: for a verb whose whole result is what it prints."""
    if isinstance(sys.stdout, SafeStream):
        sys.stdout.required = required


@contextmanager
def guard_streams() -> Iterator[None]:
    """Make the process's streams safe, and give them back as they were."""
    if isinstance(sys.stdout, SafeStream):
        yield
        return
    open_closed()
    before = sys.stdin, sys.stdout, sys.stderr
    handlers = [getattr(stream, "errors", None) for stream in before]
    install_guard()
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, SafeStream):
                stream.required = False
                stream.flush()
        sys.stdin, sys.stdout, sys.stderr = before
        for stream, errors in zip(before, handlers, strict=True):
            set_errors(stream, errors)


def install_guard() -> None:
    """Make the process's streams safe for good, as an exported script wants it."""
    if isinstance(sys.stdout, SafeStream):
        return
    open_closed()
    set_errors(sys.stdin, "replace")
    set_errors(sys.stdout, ERRORS)
    set_errors(sys.stderr, ERRORS)
    out: Any = SafeStream(sys.stdout, "stdout")
    err: Any = SafeStream(sys.stderr, "stderr")
    sys.stdout, sys.stderr = out, err


def open_closed() -> None:
    """Open streams that the process was started without (`>&-`) on nothing.

    Else the next file that is opened gets the number of the closed one, and what is printed ends up in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(number)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
        mode = "w" if number else "r"
        setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


def set_errors(stream: Any, errors: str | None) -> None:
    """Set what a stream does with a character that its encoding lacks, where it can be set."""
    with suppress(AttributeError, OSError, ValueError):
        if errors:
            stream.reconfigure(errors=errors)


def write_plainly(error: UnicodeError) -> tuple[str, int]:
    """Return the ASCII that stands for what cannot be encoded, and where to go on.

    >>> "step 3 → 4 · é".encode("ascii", "primechat.plain")
    b'step 3 -> 4 | ?'
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(character, "?") for character in text), error.end


codecs.register_error(ERRORS, write_plainly)
