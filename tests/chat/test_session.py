"""The session behind a chat page: the tree, the worker, what it tells the page."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from chat_pages import MODELS, TOKENIZER, EchoModel, open_echo
from hypothesis import given, settings
from hypothesis import strategies as st

from primechat.chat.session import ChatSession
from primechat.chat.tree import ChatSettings
from primechat.errors import ConfigError, DataError
from primechat.text.dialogues import stream_dialogues


class Page:
    """A page without a browser: keeps the nodes that it was sent."""

    def __init__(self, **settings: Any) -> None:
        self.nodes: dict[int, dict[str, Any]] = {}
        self.told: list[dict[str, Any]] = []
        self.listens = True
        start = ChatSettings(**{"temperature": 0.0, "max_new_tokens": 20_000, **settings})
        models = [{"identifier": name, "about": ""} for name in MODELS]
        self.session = ChatSession(self.push, open_echo, lambda: models, "shipped/sft", start)
        self.do("ready")
        self.wait()

    def push(self, message: dict[str, Any]) -> bool:
        json.dumps(message)
        self.told.append(message)
        for node in message.get("nodes", []):
            self.nodes[node["id"]] = node
        if message["kind"] == "tokens":
            node = self.nodes[message["id"]]
            node["tokens"][message["at"] :] = message["tokens"]
        return self.listens

    def do(self, name: str, **given: Any) -> dict[str, Any]:
        answer = self.session.act(name, given)
        for node in answer.get("nodes", []):
            self.nodes[node["id"]] = node
        return answer

    def wait(self) -> None:
        worker = self.session._worker
        assert worker is not None
        worker.join(20)
        assert not worker.is_alive() and not self.session.busy

    def say(self, text: str) -> dict[str, Any]:
        self.do("send", text=text)
        self.wait()
        return self.last

    @property
    def path(self) -> list[int]:
        return [node.id for node in self.session.conversation.walk()]

    @property
    def last(self) -> dict[str, Any]:
        return self.nodes[self.path[-1]]


def read(node: dict[str, Any]) -> str:
    return node["text"] or "".join(token[0] for token in node["tokens"])


def test_replies_come_as_they_are_written() -> None:
    page = Page()
    reply = page.say("héllo 👋 wörld")
    assert read(reply) == "héllo 👋 wörld" and reply["state"] == "done"
    assert [len(t) for t in reply["tokens"]] == [5] * len(reply["tokens"])  # all measured
    stats = reply["stats"]
    assert stats["final"] and stats["new_tokens"] == len("héllo 👋 wörld".encode()) + 1
    assert stats["prompt_tokens"] == stats["new_tokens"] + 3 and stats["stop_reason"] == "stop"
    assert stats["ttft_s"] > 0 and stats["entropy"] > 0 and stats["seed"] == 0
    page.say("again")
    assert [read(page.nodes[i]) for i in page.path[2:]] == ["again", "again"]
    page.do("models", chosen=["slow"])
    page.say("streamed, bit by bit, and not all at once at the end")
    streams = [m for m in page.told if m["kind"] == "tokens" and m["id"] == page.path[-1]]
    assert len(streams) >= 3 and not streams[0]["stats"]["final"]
    assert all(
        a["at"] + len(a["tokens"]) == b["at"] for a, b in zip(streams, streams[1:], strict=False)
    )


def test_stop_is_heard_within_a_token() -> None:
    page = Page()
    page.do("models", chosen=["slow"])
    page.wait()
    page.do("send", text="endless: x")
    model = MODELS["slow"]
    while sum(m["kind"] == "tokens" for m in page.told) < 4:
        time.sleep(0.005)
    before = model.steps
    page.do("stop")
    page.wait()
    assert model.steps - before <= 2  # one may have been under way
    assert page.last["state"] == "stopped" and read(page.last).startswith("on and on")
    steps = model.steps
    time.sleep(0.05)
    assert model.steps == steps
    kept = read(page.last)
    page.session.settings = ChatSettings(temperature=0, max_new_tokens=14)
    page.do("go_on", id=page.path[-1])
    page.wait()
    assert read(page.last).startswith(kept) and len(read(page.last)) == len(kept) + 14
    assert page.last["state"] == "length"


def test_stop_counts_exactly_one_step() -> None:
    page = Page()
    model, seen = EchoModel(), []

    def note() -> None:
        seen.append(page.session._cancel.is_set())
        if len(seen) == 20:
            page.session.stop()

    model.on_advance = note
    page.session.opener = lambda name: (model, TOKENIZER, {"identifier": "sft/echo"})
    page.say("endless: x")
    assert len(seen) == 20 and page.last["state"] == "stopped"  # no pass began after the stop
    assert page.last["stats"]["new_tokens"] in (19, 20)


def test_what_was_never_answered_can_be_loaded_again() -> None:
    """A reply that was stopped before its first token is no message; the next question takes its place."""
    page = Page()
    page.session.opener = lambda name: (page.session.stop(), open_echo(name))[1]
    page.say("stopped at once")
    assert page.last["state"] == "stopped" and read(page.last) == ""
    page.session.opener = open_echo
    page.say("a\u2028b\x85c")  # line ends to Unicode, not to JSON lines
    saved = page.do("save")
    assert [m["content"] for m in json.loads(saved["text"])["messages"]] == ["a\u2028b\x85c"] * 2
    assert Page().do("load", text=saved["text"].replace("\n", "\r\n"))["conversations"] == ["a b c"]


def test_a_message_that_could_not_be_answered_does_not_stay_in_the_way() -> None:
    """Where it is too long, "shorten it" says the page: the next one stands in its place, not behind it."""
    page = Page()
    page.say("Hi")
    page.session.opener = lambda name: MODELS["missing"]
    assert page.say("Too long")["state"] == "failed"
    page.session.opener = open_echo
    assert page.say("Shorter")["state"] == "done"
    asked = [node for node in page.session.conversation.walk() if node.role == "user"]
    assert [node.text for node in asked] == ["Hi", "Shorter"] and len(
        page.nodes[asked[1].id]["siblings"]
    ) == 2


def test_a_page_that_is_gone_ends_its_reply() -> None:
    page = Page()
    page.listens = False
    page.do("send", text="endless: x")
    page.wait()
    assert page.session._cancel.is_set()


def test_edit_regenerate_branch_choose() -> None:
    page = Page()
    page.say("one")
    page.say("two")
    first, answer = page.path[0], page.path[1]
    page.do("edit", id=first, text="uno")
    page.wait()
    assert [read(page.nodes[i]) for i in page.path] == ["uno", "uno"]
    assert page.nodes[page.path[0]]["siblings"] == [first, page.path[0]]
    shown = page.do("choose", id=first)
    assert [read(n) for n in shown["nodes"]] == ["one", "one", "two", "two"]  # nothing was lost
    page.do("regenerate", id=answer)
    page.wait()
    assert (
        len(page.last["siblings"]) == 2
        and read(page.last) == "one"
        and (page.last["stats"]["seed"], page.last["stats"]["take"]) == (0, 1)
    )
    found = page.do("alternatives", id=answer, index=1)
    assert found["rows"][0]["text"] == "n" and found["taken"] == ord("n") and found["rank"] == 0
    assert found["rows"][1]["text"] == "x" and 0 < found["rows"][1]["p"] < found["rows"][0]["p"]
    page.do("branch", id=answer, index=1, token=ord("x"))
    page.wait()
    assert read(page.last) == "oxe" and len(page.last["siblings"]) == 3
    assert [len(t) for t in page.last["tokens"]] == [5, 5, 5, 5] and page.last["tokens"][1][4] == 1
    assert page.do("alternatives", id=page.last["id"], index=1)["taken"] == ord("x")
    with pytest.raises(ConfigError, match="alternatives"):
        page.do("branch", id=answer, index=1, token=3)


def test_models_switch_and_compare() -> None:
    page = Page()
    page.say("hi")
    page.do("models", chosen=["shipped/base"])
    page.wait()
    assert read(page.say("loud")) == "LOUD"
    page.do("models", chosen=["shipped/sft", "shipped/base", "shipped/sft", "slow"])
    page.wait()
    page.say("both")
    beside = page.last["beside"]
    assert len(beside) == 3 and [read(page.nodes[i]) for i in beside] == ["both", "BOTH", "both"]
    page.do("choose", id=beside[1])
    page.do("models", chosen=["shipped/sft"])
    page.say("on")
    assert read(page.nodes[page.path[-3]]) == "BOTH"
    assert {n["id"] for n in page.do("ready")["nodes"]} >= set(beside)
    for chosen in ([], list("abcde")):
        with pytest.raises(ConfigError, match="1 to 4"):
            page.do("models", chosen=chosen)


def test_tools_are_shown_and_saved(tmp_path: Path) -> None:
    page = Page(system="Be brief.")
    reply = page.say("{1+2}!")
    assert [(t[0], t[1]) for t in reply["tokens"]] == [
        ("[", 3),
        ("1", 1),
        ("+", 1),
        ("2", 1),
        ("]", 3),
        (" = [", 3),
        ("3", 2),
        ("]", 3),
        ("!", 0),
        ("", 3),
    ]
    page.do("new")
    page.say("second")
    saved = page.do("save")
    path = tmp_path / saved["name"]
    path.write_text(saved["text"], encoding="utf-8")
    both = (stream_dialogues(str(path), split) for split in ("train", "val"))  # what finetune reads
    loaded = [conversation for part in both for conversation in part]
    assert len(loaded) == 2 and loaded[0]["messages"][0] == {
        "role": "system",
        "content": "Be brief.",
    }
    assert [part["type"] for part in loaded[0]["messages"][2]["content"]] == [
        "python",
        "python_output",
        "text",
    ]
    other = Page()
    shown = other.do("load", text=saved["text"])
    assert [read(n) for n in shown["nodes"]] == ["{1+2}!", "[1+2] = [3]!"] and shown["settings"][
        "system"
    ] == "Be brief."
    assert shown["conversations"] == ["{1+2}!", "second"] and shown["at"] == 0
    assert read(other.say("more")) == "more"
    assert other.do("open", index=1)["path"] and other.do("save")["count"] == 2
    first = other.path[1]
    other.do("go_on", id=first)  # a reply that was loaded goes on from its text
    other.wait()
    assert read(other.nodes[first]).startswith("second")
    with pytest.raises(ConfigError, match="are unknown"):
        other.do("alternatives", id=other.do("open", index=0)["path"][1], index=0)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "no conversation"),
        ("{", "Line 1.*no JSON"),
        ('\n{"messages": []}', "Line 2"),
        ('[{"role": "x"}]', "x"),
    ],
)
def test_files_that_cannot_be_loaded(text: str, wrong: str) -> None:
    page = Page()
    with pytest.raises(DataError, match=wrong):
        page.do("load", text=text)
    assert page.path == []


def test_refusals_are_sentences() -> None:
    page = Page()
    for act, values in (
        ("send", {"text": " "}),
        ("edit", {"id": 99, "text": "x"}),
        ("nothing", {}),
    ):
        with pytest.raises(ConfigError):
            page.do(act, **values)
    for wrong in ({"temperature": -1}, {"top_k": 1.5}, {"system": 3}, {"seed": -1}):
        with pytest.raises(ConfigError):
            page.do("settings", **wrong)
    page.do("models", chosen=["slow"])
    page.wait()
    page.do("send", text="endless: x")
    for act, values in (("send", {"text": "x"}), ("new", {}), ("edit", {"id": 1, "text": "x"})):
        with pytest.raises(ConfigError, match="stop it first"):
            page.do(act, **values)
    page.do("stop")
    page.wait()


def test_an_adapter_has_a_dial() -> None:
    page, opened = Page(), list[str]()
    page.session.opener = lambda name: (opened.append(name), open_echo("shipped/sft"))[1]
    page.do("models", chosen=["lora:pirate+sft"])
    page.wait()
    page.do("settings", alpha=0.25)
    assert read(page.say("arr")) == "arr"
    assert opened[0] == "lora:pirate+sft" and opened[-1] == "lora:pirate*0.25+sft"


def test_makers_advice_is_followed_until_the_reader_chooses() -> None:
    page = Page(temperature=0.8, max_new_tokens=1)  # as the page begins
    advice = {"temperature": 0.0, "top_p": 0.9}

    def open_advised(name: str) -> Any:
        model, tokenizer, meta = open_echo("shipped/sft")
        return (
            model,
            tokenizer,
            {**meta, "sampling": (advice, "its card")} if name == "advised" else meta,
        )

    page.session.opener = open_advised
    page.do("models", chosen=["advised", "slow"])
    page.wait()
    shown = next(m["advice"] for m in reversed(page.told) if "advice" in m)
    assert shown["advised"] == (advice, "its card") and shown["slow"] == ({}, "")

    def draw() -> list[tuple[float, float]]:
        page.say("x")
        nodes = [page.nodes[id] for id in page.last["beside"]]
        return [(node["stats"]["temperature"], node["stats"]["top_p"]) for node in nodes]

    assert draw() == [(0.0, 0.9), (0.8, 1.0)], "each model in its own way"
    page.do("settings", temperature=1.5, chosen=["temperature"])
    assert draw() == [(1.5, 0.9), (1.5, 1.0)]
    page.do("settings", temperature=0.8, chosen=[])
    assert draw() == [(0.0, 0.9), (0.8, 1.0)]


def test_a_question_does_not_wait_for_every_model() -> None:
    """Models are opened before they are needed; once a question comes, only the one under way is."""
    begun, go, opened = threading.Event(), threading.Event(), []

    def open_slowly(name: str) -> tuple[Any, Any, dict[str, Any]]:
        opened.append(name)
        begun.set()
        assert go.wait(20)
        return open_echo(name)

    session = ChatSession(
        lambda _: True, open_slowly, list, "shipped/sft", ChatSettings(temperature=0.0)
    )
    session.conversation.chosen = ["shipped/sft", "shipped/base"]
    session.act("ready", {})
    assert begun.wait(20)
    session.conversation.chosen = ["shipped/sft"]
    session.act("send", {"text": "hi"})
    go.set()
    assert session._worker is not None
    session._worker.join(20)
    assert opened == ["shipped/sft", "shipped/sft"] and not session.busy


def test_a_model_that_fails_is_told() -> None:
    page = Page()
    page.do("models", chosen=["missing"])
    page.wait()
    assert any(m["kind"] == "status" and m.get("fault") for m in page.told)
    reply = page.say("hi")
    assert reply["state"] == "failed" and "missing" in reply["note"]
    page.do("models", chosen=["shipped/sft"])
    page.wait()
    assert read(page.say("hi")) == "hi"  # the talk goes on


def test_sessions_do_not_see_each_other() -> None:
    one, two = Page(), Page()
    one.say("secret")
    assert two.do("ready")["nodes"] == [] and two.path == []
    two.do("settings", temperature=1.5)
    assert one.session.settings.temperature == 0.0
    pages = [Page() for _ in range(4)]
    threads = [threading.Thread(target=p.say, args=(f"page {i}",)) for i, p in enumerate(pages)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read(p.last) for p in pages] == [f"page {i}" for i in range(4)]


TEXTS = st.text(max_size=12) | st.sampled_from(["", " ", "\u2028", "a\r\nb", "\ud800", "👋"])
PARTS = st.builds(
    lambda kind, text: {"type": kind, "text": text},
    st.sampled_from(["text", "python", "python_output"]),
    TEXTS,
)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Draw the messages of any conversation that `read_messages` allows."""
    system = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    turns = draw(st.integers(1, 5))
    speakers = ["user", "assistant"] * turns
    contents = {"user": TEXTS, "assistant": TEXTS | st.lists(PARTS, max_size=3)}
    return [
        *system,
        *({"role": role, "content": draw(contents[role])} for role in speakers[:turns]),
    ]


@settings(max_examples=150, deadline=None)
@given(talks=st.lists(conversations(), min_size=1, max_size=4))
def test_what_is_saved_is_loaded_as_it_was(talks: list[list[dict[str, Any]]]) -> None:
    """Each conversation keeps its own system message, or has none; nothing is dropped or joined."""
    session = ChatSession(lambda said: True, open_echo, list, "shipped/sft")
    session.load("\n".join(json.dumps({"messages": messages}) for messages in talks))
    saved = session.save()["text"]
    assert [json.loads(line)["messages"] for line in saved[:-1].split("\n")] == talks
    saved.encode()  # a browser's file is UTF-8

    again = ChatSession(lambda said: True, open_echo, list, "shipped/sft")
    again.load(saved)
    assert again.save()["text"] == saved


def test_each_conversation_has_its_own_system_message() -> None:
    page = Page(system="Be brief.")
    page.say("first")
    page.do("new")
    assert page.do("settings", system="Be rude.")["settings"]["system"] == "Be rude."
    page.say("second")
    page.do("new")
    page.do("settings", system="")
    page.say("third")
    assert page.do("open", index=0)["settings"]["system"] == "Be brief."
    page.do("settings", temperature=0.5)
    saved = [json.loads(line)["messages"] for line in page.do("save")["text"].splitlines()]
    assert [messages[0]["content"] for messages in saved] == ["Be brief.", "Be rude.", "third"]

    # The model is told the message of the conversation that is shown, not of the one loaded last.
    other = Page()
    other.do("load", text=page.do("save")["text"])
    for index, messages in enumerate(saved):
        other.do("open", index=index)
        asked = {"messages": [*messages, {"role": "user", "content": "more"}]}
        expected = len(TOKENIZER.render_for_completion(asked))
        assert other.say("more")["stats"]["prompt_tokens"] == expected
