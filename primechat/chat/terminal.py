"""Chat with a model in the terminal, or through a pipe.

A reply is written as it is generated. Ctrl-C sets the engine's `cancel` during a reply and clears the line at
the prompt. A model's text is never interpreted: no markup, no control characters. In a pipe, only replies go
to stdout; questions and everything else go to stderr.
Reference: nanochat's chat_cli.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from primechat.chat.tree import Advice, ChatSettings, is_base, write_line
from primechat.cli.output import ERRORS, set_errors
from primechat.cli.progress import ProgressView, clean_text
from primechat.config.runtime import DEVICES, SAMPLING, check_choice, check_drawing
from primechat.errors import ConfigError, PrimechatError
from primechat.files.paths import resolve_path, write_file
from primechat.seeds import derive_seed

if TYPE_CHECKING:
    from primechat.checkpoint.registry import ModelEntry
    from primechat.infer.engine import Engine
    from primechat.infer.reply import Reply
    from primechat.protocols import ChatTokenizer, LanguageModel

Opener = Callable[[str], "tuple[LanguageModel, ChatTokenizer, dict[str, Any]]"]

CLEARLY_WORSE = (
    1.05  # ratio of bits per byte; leaves a margin, as a short run scores only part of the text
)
LEAVE = ("quit", "exit")
LEAVING = "Ctrl-D or /quit leaves."


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Talk to a model in the terminal; /help lists what can be typed besides text."""

    model: str = ""
    """Model to talk to, for example sft/d4 or sft/d4@600; empty takes yours, or the one that ships if
    that is clearly better."""
    device: str = "auto"
    """cpu, mps, cuda, or auto."""
    tokenizer: str = ""
    """Folder of the model's tokenizer; empty takes the one that was saved with it."""
    temperature: float | None = None
    """0 always takes the likeliest token; higher is more varied. None, here and below, is what the model's
    makers advise; without advice it is 0.8."""
    top_k: int | None = None
    """Sample from this many of the likeliest tokens; 0 from all. Without advice 50."""
    top_p: float | None = None
    """Sample from the likeliest tokens that reach this probability together. Without advice 1."""
    repetition_penalty: float | None = None
    """Above 1, tokens that were there become less likely (Keskar et al. 2019). Without advice 1, off."""
    max_new_tokens: int = 256
    """Tokens of a reply at most."""
    seed: int = 0
    """Seed of the first reply; each further one adds 1."""

    def __post_init__(self) -> None:
        check_choice("device", self.device, DEVICES)
        check_drawing(self.settings)

    @property
    def settings(self) -> ChatSettings:
        """The sampling settings in the form that a chat page uses."""
        given: Any = {name: x for name in SAMPLING if (x := getattr(self, name)) is not None}
        return ChatSettings(
            **given, max_new_tokens=self.max_new_tokens, seed=self.seed, chosen=tuple(given)
        )


def run_chat(
    config: ChatConfig,
    *,
    opener: Opener | None = None,
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
) -> int:
    """Chat until the user leaves, and return the exit code.

    Args:
        config: model, device and sampling settings.
        opener: takes an identifier and returns model, tokenizer and metadata; None is registry.open_model.
        stdin: stream to read from; None is that of the process, as for `stdout` and `stderr`.
        stdout: stream for replies.
        stderr: stream for everything else in a pipe.

    Raises:
        PrimechatError: the first model cannot be opened.
    """
    conversation = TerminalChat(
        config,
        opener or build_opener(config),
        stdin or sys.stdin,
        stdout or sys.stdout,
        stderr or sys.stderr,
    )
    with conversation.catch_interrupts():
        model, why = (config.model, "") if config.model or opener else choose_chat_model()
        conversation.open(model)
        if why:
            conversation.say(f"{why} `/model NAME` changes it.")
        conversation.run()
    return 0


def choose_chat_model() -> tuple[str, str]:
    """Return the model that a chat starts with, and why it is not the user's own ("" if it is).

    It is the user's newest chat model, unless there is only a base model or the shipped model is clearly
    better. The latter is decided by the recorded bits per byte, and only if both were measured on the replies
    of the same dialogues; the tokenizers may differ.
    """
    from primechat.checkpoint import registry

    # The user's model is the shipped one, or nothing ships.
    name, shipped = registry.choose_model(), "shipped/sft"
    entries = registry.list_models()
    ready = next((entry for entry in entries if entry.identifier == shipped), None)
    if name.shipped or ready is None:
        return str(name), ""

    # The user has only a base model.
    folder, full = registry.locate_model(name)
    if name.family == "base":
        return (
            shipped,
            f"{shipped} answers: your {full} has not learned to chat; it is in the list too.",
        )

    # The shipped model is clearly better on the same replies.
    own = next((entry for entry in entries if entry.path == str(folder)), None)
    if own and own.val_bpb and ready.val_bpb and own.val_bpb > CLEARLY_WORSE * ready.val_bpb:
        text = read_dialogues(ready)
        if text and read_dialogues(own) == text:
            figures = f"{ready.val_bpb:.2f} bits per byte, your {full} {own.val_bpb:.2f}"
            why = f"on held-out replies of {text[0]} it has {figures} (lower is better)"
            return shipped, f"{shipped} answers: {why}; yours is in the list too."
    return str(name), ""


def read_dialogues(entry: ModelEntry) -> tuple[str, str] | None:
    """Return the dialogues and turns that a model's bits per byte were measured on; None if unrecorded."""
    from primechat.checkpoint.checkpoint import read_meta

    settings = read_meta(Path(entry.path), max(entry.steps)).get("user_config")
    if not isinstance(settings, dict) or not settings.get("dialogues"):
        return None
    return str(settings["dialogues"]), str(settings.get("learn"))


def build_opener(config: ChatConfig) -> Opener:
    """Return a function that opens models on disk; `config.tokenizer` applies to the first model only."""

    def open_named(identifier: str) -> tuple[LanguageModel, ChatTokenizer, dict[str, Any]]:
        import torch

        from primechat.checkpoint.registry import open_model

        device = config.device
        if device == "auto":  # mps is used only on request
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = config.tokenizer if identifier == config.model else ""
        view = ProgressView(sys.stderr)
        return open_model(
            identifier, device=device, dtype="auto", tokenizer=folder or None, on_event=view
        )

    return open_named


class TerminalChat:
    """A chat in the terminal: a model, a conversation, and the commands."""

    def __init__(
        self, config: ChatConfig, opener: Opener, stdin: TextIO, stdout: TextIO, stderr: TextIO
    ) -> None:
        from rich.console import Console

        set_errors(stdin, "replace")  # so that no text ends the program, whatever the locale
        set_errors(stdout, ERRORS)
        set_errors(stderr, ERRORS)
        self.config, self.opener, self.stdin, self.stdout = config, opener, stdin, stdout
        self.interactive = stdin.isatty() and stdout.isatty()
        where = stdout if self.interactive else stderr
        self.console = Console(file=where, highlight=False, markup=False, emoji=False)
        self.settings, self.replies = config.settings, 0
        self.messages: list[dict[str, Any]] = []
        self.saved: set[Path] = set()
        self.show_stats = self.warned_long = False
        self.cancel: threading.Event | None = None  # set while a reply is written
        self.engine: Engine
        self.identifier, self.is_base = "", False

    def say(self, text: str) -> None:
        """Print a message of the program, as opposed to the model."""
        self.console.print(clean_text(text), style="dim", soft_wrap=True)

    @contextmanager
    def catch_interrupts(self) -> Iterator[None]:
        """Let Ctrl-C stop a reply; a second one, or one outside a reply, is a KeyboardInterrupt."""

        def interrupt(number: int, frame: FrameType | None) -> None:
            if self.cancel is None or self.cancel.is_set():
                raise KeyboardInterrupt
            self.cancel.set()

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def open(self, identifier: str) -> None:
        """Open a model; the conversation is kept."""
        from primechat.infer.cpu import settle_threads
        from primechat.infer.engine import Engine

        # Open it.
        model, tokenizer, meta = self.opener(identifier)
        settle_threads(model)
        self.engine, self.identifier = (
            Engine(model, tokenizer),
            str(meta.get("identifier", identifier)),
        )

        # Say which model it is and how it is sampled.
        for reason in meta.get("skipped", ()):
            self.say(str(reason))
        self.is_base = is_base({"identifier": identifier, **meta})
        if self.interactive:
            self.say(
                f"This is {self.identifier} on {model.device}. /help lists the commands. {LEAVING}"
            )
        self.advice: Advice = meta.get("sampling") or ({}, "")
        if self.advice[0]:
            listed = ", ".join(f"{name} {x:g}" for name, x in self.advice[0].items())
            self.say(
                f"{self.advice[1]} advises {listed}: so it is sampled, but for what you set yourself."
            )
        if self.is_base:
            self.say(
                "It is a base model: it goes on from what you type, and knows no questions or answers."
            )

    def run(self) -> None:
        """Read lines until the end of input or /quit."""
        if self.interactive:
            with suppress(ImportError):
                import readline  # noqa: F401 - lets input() edit lines
        while True:
            try:
                line = self.read_line()
                if line is None or (line and not self.take(line)):
                    return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.stdout.write("\n")
                self.say(LEAVING)
            except PrimechatError as error:
                self.say(str(error))

    def read_line(self) -> str | None:
        """Return the next line, stripped, or None at the end of input."""
        if not self.interactive:
            line = self.stdin.readline()
            if line.strip():
                self.say(f"you> {line.strip()}")
            return line.strip() if line else None
        try:
            return input("you> ").strip()
        except EOFError:
            self.stdout.write("\n")
            return None

    def take(self, line: str) -> bool:
        """Answer a line or carry out a command; return False to leave."""
        if not line.startswith("/"):
            self.answer(line)
            return True
        name, _, rest = line[1:].partition(" ")
        # The names of the flag and of the verb work too.
        name = {"temperature": "temp", "models": "model"}.get(name, name)
        if name in COMMANDS:
            COMMANDS[name][0](self, rest.strip())
        elif name not in LEAVE:
            raise ConfigError(f"/{name} is no command; /help lists them, /quit leaves.")
        return name not in LEAVE

    def answer(self, text: str, before: list[dict[str, str]] | None = None) -> None:
        """Write the model's reply to a text and add both to the conversation.

        A reply that is interrupted is kept as far as it got.

        Args:
            text: the user's message.
            before: messages before it; None takes the whole conversation.
        """
        said = {"role": "user", "content": text}
        self.cancel = threading.Event()
        seed = self.settings.seed
        if self.replies:  # the first reply uses the seed itself, each later one its own stream
            seed = derive_seed(seed, "reply", self.replies)
        options = self.settings.fit(self.advice, seed, self.cancel)
        try:
            messages = [*(self.messages if before is None else before), said]
            engine = self.engine
            reply = (
                engine.complete(text, **options)
                if self.is_base
                else engine.chat(messages, **options)
            )
            self.write(reply)
        finally:
            self.cancel = None
        self.replies += 1
        if reply.tokens:
            self.messages = [*messages, reply.message]

    def write(self, reply: Reply) -> None:
        """Write a reply as it is generated, then why it ended and its figures."""
        # The text.
        if self.stdout.isatty():
            self.stdout.write("bot> ")
        try:
            for piece in reply:
                self.stdout.write(clean_text(piece))
                self.stdout.flush()
        finally:
            self.stdout.write("\n")
            self.stdout.flush()

        # Why it ended, if not by itself.
        stats, engine = reply.stats, self.engine
        used, trained = stats.prompt_tokens + stats.new_tokens, engine.model.sequence_len
        ends = {
            "cancelled": "[stopped]",
            "length": f"[cut at {stats.new_tokens} tokens]",
            "context": f"[the {engine.model.max_context} tokens of its context are full; /clear begins anew]",
        }
        if stats.stop_reason in ends and not (self.is_base and stats.stop_reason == "length"):
            self.say(ends[stats.stop_reason])

        # Speed, and a warning if the conversation exceeds the trained context.
        if self.show_stats:
            self.say(
                f"{stats.new_tokens} tokens, {stats.decode_tok_s:,.0f} tokens/s, the first after "
                f"{stats.ttft_s:.3f} s, context {used} of {trained}"
            )
        if used > trained and not self.warned_long and not self.is_base:
            self.warned_long = True
            self.say(
                f"The talk is longer than the {trained} tokens of its training; /clear begins anew."
            )

    # The commands; each receives the text after its name.

    def switch_model(self, name: str) -> None:
        """Open another model, or list the models if no name is given."""
        if name:
            self.open(name)
        else:
            from primechat.checkpoint.registry import list_models

            models = (entry for entry in list_models() if not entry.by_product)
            names = ", ".join(entry.identifier for entry in models)
            self.say(f"This is {self.identifier}. After /model can stand: {names}.")

    def set_temperature(self, value: str) -> None:
        """Set the temperature if a value is given, and print the current one."""
        if value:
            wish: Any = value
            with suppress(ValueError):  # the settings refuse what is not a number
                wish = float(value)
            chosen = (*self.settings.chosen, "temperature")
            self.settings = replace(self.settings, temperature=wish, chosen=chosen)
        now = self.settings.fit(self.advice, 0, threading.Event())
        self.say(f"The temperature is {now['temperature']:g}.")

    def answer_again(self, _: str) -> None:
        """Answer the last message again, with different random numbers."""
        if not self.messages:
            raise ConfigError("/again needs a message that was answered; type one first.")
        self.answer(self.messages[-2]["content"], self.messages[:-2])

    def toggle_stats(self, _: str) -> None:
        """Turn the figures after each reply on or off."""
        self.show_stats = not self.show_stats
        self.say(f"Figures after each reply: {'on' if self.show_stats else 'off'}.")

    def save(self, name: str) -> None:
        """Write the conversation to a file for finetune; only files saved by this chat are overwritten."""
        if not name or not self.messages:
            raise ConfigError(
                "/save needs a file name and something said before; try /save talk.jsonl."
            )
        path = resolve_path(name, "/save")
        if path.exists() and path.resolve() not in self.saved:
            raise ConfigError(
                f"{path} is there already, and is not overwritten; choose another name."
            )
        write_file(path, write_line(self.messages) + "\n")
        self.saved.add(path.resolve())
        self.say(f"Saved {len(self.messages)} messages to {path}.")

    def clear(self, _: str) -> None:
        """Forget the conversation."""
        self.messages, self.warned_long = [], False
        self.say("A new conversation.")

    def show_help(self, _: str) -> None:
        """List the commands."""
        rows = [(f"/{name} {argument}", text) for name, (_, argument, text) in COMMANDS.items()]
        for name, text in [*rows, ("/quit", "leave (also /exit and Ctrl-D)")]:
            self.say(f"{name:14}{text}")
        self.say("Ctrl-C stops a reply and keeps what was said.")


COMMANDS: dict[str, tuple[Callable[[TerminalChat, str], None], str, str]] = {
    "model": (
        TerminalChat.switch_model,
        "NAME",
        "talk to another model, or list them; the conversation stays",
    ),
    "temp": (
        TerminalChat.set_temperature,
        "X",
        "set the temperature; 0 is always the likeliest token",
    ),
    "again": (TerminalChat.answer_again, "", "answer your last message anew"),
    "stats": (TerminalChat.toggle_stats, "", "speed and context after each reply, on and off"),
    "save": (
        TerminalChat.save,
        "FILE",
        "write the conversation as JSONL, which `primechat finetune` reads",
    ),
    "clear": (TerminalChat.clear, "", "begin a new conversation"),
    "help": (TerminalChat.show_help, "", "this list"),
}
