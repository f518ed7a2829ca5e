"""Safe standard streams: output may be lost, but the work continues.

Hides: how a stream fails. A character that the encoding lacks is written in ASCII. A stream whose reader has
gone, whose disk is full or whose terminal was closed becomes silent, and its loss is reported once on the
other stream. Only a verb whose whole result is its output ends then (`require_output`), because there is no
point in computing what nobody can read. Reference: pipe(7); closeout of GNU's gnulib.
"""

from __future__ import annotations

import codecs
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

ERRORS = "primechat.plain"  # name under which `write_plainly` is registered as an error handler
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
READER_GONE = 141  # exit code that a shell reports for a program ended by SIGPIPE


class OutputLost(BaseException):
    """Nobody can read the output of a verb; a BaseException, so that no `except Exception` catches it."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.reason = getattr(error, "strerror", None) or str(error)
        self.reader_gone = isinstance(error, BrokenPipeError)


class SafeStream:
    """A text stream for output that raises nothing but `OutputLost` when its text cannot be written."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self.stream, self.name = stream, name
        self.lost = self.required = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it if the stream is lost; return its length."""
        if not self.lost:
            try:
                self.stream.write(text)
            except BlockingIOError:
                pass  # a non-blocking pipe is full: this piece is lost, the next may not be
            except (OSError, ValueError) as error:  # ValueError: the stream was closed
                self.lose(error)
        return len(text)

    def flush(self) -> None:
        """Write out the buffer, unless the stream is lost."""
        if not self.lost:
            try:
                self.stream.flush()
            except BlockingIOError:
                pass
            except (OSError, ValueError) as error:
                self.lose(error)

    def lose(self, error: Exception) -> None:
        """Be silent from now on, and report it on the other stream.

        Raises:
            OutputLost: the output is the whole result of the verb.
        """
        self.lost = True
        # Redirect the buffer, and whatever child processes write, to nowhere.
        with suppress(OSError, ValueError):
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
    """Set whether the loss of stdout ends the program, as it does for a verb that only prints."""
    if isinstance(sys.stdout, SafeStream):
        sys.stdout.required = required


@contextmanager
def guard_streams() -> Iterator[None]:
    """Make the standard streams safe inside the context, and restore them afterwards."""
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
    """Make the standard streams safe for the rest of the process, for example in an exported script."""
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
    """Open standard streams that the process was started without (`>&-`) on /dev/null.

    Otherwise the next file to be opened gets the descriptor of the closed stream, and output ends up in it.
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
    """Set the error handler of a stream for characters that its encoding lacks, if that is possible."""
    with suppress(AttributeError, OSError, ValueError):
        if errors:
            stream.reconfigure(errors=errors)


def write_plainly(error: UnicodeError) -> tuple[str, int]:
    """Return the ASCII replacement of what cannot be encoded, and the position at which to continue.

    >>> "step 3 → 4 · é".encode("ascii", "primechat.plain")
    b'step 3 -> 4 | ?'
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(character, "?") for character in text), error.end


codecs.register_error(ERRORS, write_plainly)
