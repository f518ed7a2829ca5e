from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tiny import HistoryModel, ScriptModel, byte_tokenizer

from primechat.chat import terminal
from primechat.chat.terminal import ChatConfig, run_chat
from primechat.checkpoint import registry
from primechat.errors import CheckpointError, ConfigError
from primechat.infer.engine import Engine
from primechat.seeds import derive_seed
from primechat.text.chat_format import read_messages

TOKENIZER = byte_tokenizer()
BOS, END = TOKENIZER.stop_ids
CUE = TOKENIZER.special("<|assistant_start|>")
MODELS = {
    "sft/a": ScriptModel([*b"hello", END], CUE, sequence_len=64, max_context=400),
    "sft/b": ScriptModel(
        [*"é\x1b[31m[bold]x\x07\r\n".encode(), END], CUE, sequence_len=64, max_context=400
    ),
    "base/c": ScriptModel([*b" and on", BOS], ord("."), sequence_len=64, max_context=400),
}


def open_fake(identifier: str) -> tuple[Any, Any, dict[str, Any]]:
    identifier = identifier or "sft/a"
    if identifier not in MODELS:
        raise CheckpointError(f"{identifier} is missing; train it.")
    return MODELS[identifier], TOKENIZER, {"identifier": f"{identifier}@9", "skipped": []}


def talk(*lines: str, opener: terminal.Opener = open_fake, **settings: Any) -> tuple[str, str]:
    """Pipe lines into a chat; return what it wrote to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    stdin = io.StringIO("".join(f"{line}\n" for line in lines))
    assert run_chat(ChatConfig(**settings), opener=opener, stdin=stdin, stdout=out, stderr=err) == 0
    return out.getvalue(), err.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def talk_in_terminal(
    monkeypatch: pytest.MonkeyPatch,
    *steps: str | type[BaseException],
    opener: terminal.Opener = open_fake,
) -> str:
    """Chat as in a terminal, by lines and by what is raised while one is typed; return the screen."""
    screen, todo = Terminal(), list(steps)

    def type_line(prompt: str) -> str:
        screen.write(prompt)
        step = todo.pop(0) if todo else EOFError
        if isinstance(step, str):
            return step
        if step is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
            pytest.fail("Ctrl-C does nothing at the prompt")
        raise step

    monkeypatch.setattr("builtins.input", type_line)
    assert (
        run_chat(ChatConfig(), opener=opener, stdin=Terminal(), stdout=screen, stderr=io.StringIO())
        == 0
    )
    return screen.getvalue()


def test_pipe_writes_replies_only() -> None:
    assert talk("hi", "", "  there ") == ("hello\nhello\n", "you> hi\nyou> there\n"), (
        "and tells what was asked"
    )
    assert talk() == ("", "")
    assert talk("hi", "/quit", "unread")[0] == "hello\n"
    assert talk("hi", "/exit", "unread")[0] == "hello\n"


def test_conversation_grows_and_clears() -> None:
    prompts: list[int] = []
    model = ScriptModel([*b"hello", END], CUE, sequence_len=64, max_context=400)
    read, model.advance = (
        model.advance,
        lambda ids, cache: (prompts.append(ids.shape[1]), read(ids, cache))[1],
    )  # type: ignore[method-assign]
    talk("hi", "hi", "/clear", "hi", opener=lambda _: (model, TOKENIZER, {"identifier": "sft/x"}))
    first, second, third = (n for n in prompts if n > 1)
    assert first == third == len("hi") + 4 and second == first + len("hello") + 1 + len("hi") + 3


def test_model_text_cannot_control_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = talk("hi", model="sft/b")
    assert out == "é\ufffd[31m[bold]x\ufffd\ufffd\n\n"
    screen = talk_in_terminal(monkeypatch, "/model sft/b", "hi")
    assert "\x07" not in screen and "\x1b[31m" not in screen and "bot> é\ufffd[31m[bold]x" in screen
    assert "\x1b" not in talk("/\x1b[31mx", "/model \x1b[2J")[1]


def test_switch_model_keeps_conversation(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    out, err = talk("hi", "/model base/c", "And.", "/model nothere", "/models", f"/save {path}")
    assert "After /model can stand: shipped/base, " in err
    assert out == "hello\n and on\n"
    assert (
        err.count("base model") == 1
        and "nothere is missing; train it." in err
        and "This is base/c@9" in err
    )
    assert [m["content"] for m in json.loads(path.read_text())["messages"]] == [
        "hi",
        "hello",
        "And.",
        " and on",
    ]


def test_first_model_missing_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="sft/zz is missing"):
        talk("hi", model="sft/zz")


def test_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = Engine.chat

    def spy(self: Engine, messages: Any, **options: Any) -> Any:
        seen.append([options[key] for key in ("temperature", "top_k", "seed", "max_new_tokens")])
        return real(self, messages, **options)

    monkeypatch.setattr(Engine, "chat", spy)
    _, err = talk(
        "hi", "/temp 0", "hi", "/temp", "/temp hot", "/temp -1", "/temp nan", "hi", seed=5
    )
    talk("hi", top_k=0, max_new_tokens=3, temperature=1)
    assert seen == [
        [0.8, 50, 5, 256],
        [0.0, 50, derive_seed(5, "reply", 1), 256],
        [0.0, 50, derive_seed(5, "reply", 2), 256],
        [1, None, 0, 3],
    ]
    assert err.count("The temperature is 0.") == 2 and "'hot' must be a number" in err
    assert "temperature=-1.0 must" in err and "temperature=nan must" in err


def test_again_and_long_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last message is answered anew by another seed and stands once; /temperature is /temp."""
    seen: list[Any] = []
    real = Engine.chat

    def spy(self: Engine, messages: Any, **options: Any) -> Any:
        seen.append(([m["content"] for m in messages], options["seed"]))
        return real(self, messages, **options)

    monkeypatch.setattr(Engine, "chat", spy)
    out, err = talk("/again", "one", "two", "/again", "/temperature 0.5", "/clearly", seed=3)
    assert out == "hello\n" * 3 and "/again needs a message that was answered" in err
    assert seen == [
        (["one"], 3),
        (["one", "hello", "two"], derive_seed(3, "reply", 1)),
        (["one", "hello", "two"], derive_seed(3, "reply", 2)),
    ]
    assert "The temperature is 0.5." in err and "/clearly is no command" in err


def test_makers_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model's makers advise is followed and said, but for what the command line or /temp says."""
    seen: list[Any] = []
    real = Engine.chat

    def spy(self: Engine, messages: Any, **options: Any) -> Any:
        seen.append([options[key] for key in ("temperature", "top_k", "top_p")])
        return real(self, messages, **options)

    def open_advised(identifier: str) -> tuple[Any, Any, dict[str, Any]]:
        model, tokenizer, meta = open_fake("sft/a")
        advice = ({"temperature": 0.2, "top_p": 0.9}, "its card") if identifier != "sft/b" else None
        return model, tokenizer, {**meta, "sampling": advice}

    monkeypatch.setattr(Engine, "chat", spy)
    _, err = talk("hi", "/temp", "/temp 1", "hi", "/model sft/b", "hi", opener=open_advised)
    assert seen == [[0.2, 50, 0.9], [1.0, 50, 0.9], [1.0, 50, 1.0]]
    assert (
        "its card advises temperature 0.2, top_p 0.9: so it is" in err
        and "temperature is 0.2." in err
    )
    seen.clear()
    talk("hi", opener=open_advised, temperature=0.8)
    assert seen == [[0.8, 50, 0.9]], "also where it is the usual one"


def test_stats_on_and_off() -> None:
    _, err = talk("/stats", "hi", "/stats", "hi")
    assert err.count("6 tokens, ") == 1 and "context 12 of 64" in err
    assert "reply: on." in err and "reply: off." in err


def test_save(tmp_path: Path) -> None:
    path = tmp_path / "a b.jsonl"
    _, err = talk(
        f"/save {path}", "hi", "/save", f"/save {path}", "é", f"/save {path}", f"/save {tmp_path}"
    )
    assert (
        err.count("needs a file name") == 2
        and "Saved 4 messages" in err
        and f"{tmp_path} is there already" in err
    )
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 and "é" in lines[0]
    messages = read_messages(json.loads(lines[0]))
    assert messages == [
        {"role": r, "content": c}
        for c in ("hi", "é")
        for r, c in (("user", c), ("assistant", "hello"))
    ]
    _, err = talk("hi", f"/save {path}")
    assert "is not overwritten" in err and path.read_text(encoding="utf-8").splitlines() == lines


def test_save_half_a_character(tmp_path: Path) -> None:
    """A terminal of another encoding gives half characters, which no UTF-8 file holds as they are."""
    path = tmp_path / "half.jsonl"
    _, err = talk("caf\udce9", f"/save {path}")
    assert "Saved 2 messages" in err
    messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
    assert messages[0]["content"] == "caf\udce9"


def test_unknown_and_help() -> None:
    out, err = talk("/frobnicate now", "/help", "/")
    assert out == "" and "/frobnicate is no command; /help lists them, /quit leaves." in err
    assert all(f"/{name}" in err for name in [*terminal.COMMANDS, "quit", "exit"])


def test_ends_are_told() -> None:
    assert "[cut at 3 tokens]" in talk("hi", max_new_tokens=3)[1]
    assert "[cut" not in talk("And.", model="base/c", max_new_tokens=3)[1]
    out, err = talk("x" * 394, "/clear", "x" * 60, "hi", "/clear", "x" * 60)
    assert out == "he\n" + "hello\n" * 3 and "[the 400 tokens of its context are full" in err
    assert err.count("of its training") == 3, "said once a conversation"


def test_failed_turn_leaves_no_trace() -> None:
    out, err = talk("x" * 500, "hi")
    assert out == "hello\n" and "504 tokens where 400 is the most" in err


def interrupting(after: int, times: int = 1) -> terminal.Opener:
    """Return an opener of a model that sends Ctrl-C to this process in its pass number `after`."""
    model = HistoryModel(sequence_len=200, max_context=2000)

    def press() -> None:
        if len(model.calls) == after:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    model.on_advance = press
    return lambda _: (model, TOKENIZER, {"identifier": "sft/x"})


def test_ctrl_c_stops_the_reply_only(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    path = tmp_path / "talk.jsonl"
    _, err = talk("hi", "/stats", "hi", f"/save {path}", opener=interrupting(4), max_new_tokens=8)
    assert err.count("[stopped]") == 1 and "Saved 4 messages" in err, "what was said before is kept"
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_leaves_a_pipe() -> None:
    with pytest.raises(KeyboardInterrupt):
        talk("hi", opener=interrupting(4, times=2))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = talk_in_terminal(monkeypatch, "hi", KeyboardInterrupt, "/nope", "hi")
    assert screen.count("you> ") == 5 and screen.count("bot> hello\n") == 2
    assert screen.count("Ctrl-D or /quit leaves.") == 2 and "This is sft/a@9 on cpu" in screen
    assert "is no command" in screen and screen.endswith("you> \n")


def test_interrupted_opening_keeps_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(identifier: str) -> Any:
        if identifier == "sft/slow":
            signal.raise_signal(signal.SIGINT)
        return open_fake(identifier)

    screen = talk_in_terminal(monkeypatch, "/model sft/slow", "hi", opener=slow)
    assert "bot> hello\n" in screen


def test_runs_off_the_main_thread() -> None:
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(talk("hi")))
    thread.start()
    thread.join()
    assert got == [("hello\n", "you> hi\n")]


def test_broken_encodings_end_nothing() -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    err = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9 \xff\n"), encoding="utf-8")
    run_chat(ChatConfig(model="sft/b"), opener=open_fake, stdin=stdin, stdout=out, stderr=err)
    out.flush()
    assert out.buffer.getvalue().startswith(b"?")  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "settings",
    [{"device": "tpu"}, {"temperature": -1}, {"top_k": -1}, {"max_new_tokens": 0}, {"seed": -1}],
)
def test_config_refusals(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings))}="):
        ChatConfig(**settings)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, primechat.chat.terminal as c; c.ChatConfig(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


def test_a_chat_begins_with_a_model_that_can_talk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert terminal.choose_chat_model() == ("shipped/sft", "")
    own, ready = tmp_path / "chatsft_checkpoints" / "mine", registry.SHIPPED / "chatsft_checkpoints"
    shutil.copytree(next(ready.iterdir()), own)
    assert terminal.choose_chat_model() == ("sft", ""), "as good as what ships: one's own"
    (path,) = own.glob("meta_*.json")
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({**meta, "val_bpb": 1.5 * meta["val_bpb"]}))
    name, why = terminal.choose_chat_model()
    assert name == "shipped/sft" and f"your sft/mine {1.5 * meta['val_bpb']:.2f}" in why
    assert "replies of chitchat" in why, "the text is named"
    other = {**meta["user_config"], "dialogues": "mine.jsonl"}
    path.write_text(json.dumps({**meta, "val_bpb": 1.5 * meta["val_bpb"], "user_config": other}))
    assert terminal.choose_chat_model() == ("sft", ""), "figures of other text are not compared"
    path.write_text(json.dumps({**meta, "val_bpb": None}))
    assert terminal.choose_chat_model()[0] == "sft", (
        "nothing is recorded: no reason to prefer another"
    )
    (tmp_path / "base_checkpoints").mkdir()
    own.rename(tmp_path / "base_checkpoints" / "mine")
    name, why = terminal.choose_chat_model()
    assert name == "shipped/sft" and "base/mine has not learned to chat" in why
