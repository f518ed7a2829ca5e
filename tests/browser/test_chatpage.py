"""The chat page in a browser: what a reader does, and what a hostile model cannot do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="needs the extra test")
from browser import ROOT, SMALL_LABS, Browser, LabPage, measure_load, run_all_cells  # noqa: E402

pytestmark = pytest.mark.slow
HOSTILE = [
    "<script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 2'>",
    "[click](javascript:window.pwned=3)",
    "![x](https://example.invalid/spy.png) <svg onload='window.pwned=4'>",
    "<a href='javascript:window.pwned=5'>a</a> [b](data:text/html,<script>window.pwned=6</script>)",
    "</div></article><style>* { display: none }</style><iframe srcdoc='<script>parent.pwned=7</script>'>",
    "**never [closed `and _so ~~on\n\n- <b>list\n> quote <i>\n```html\n<script>window.pwned = 8</script>",
    "[ok](https://example.org/a_b) and JaVaScRiPt:window.pwned=9 [c](  java\tscript:window.pwned=10 )",
]


class Chat:
    """What a reader does on the page."""

    def __init__(self, opened: LabPage) -> None:
        self.opened, self.page = opened, opened.page
        self.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.line = self.page.get_by_label("Message", exact=True)
        self.line.wait_for(timeout=60_000)
        self.page.get_by_label("Model", exact=True).wait_for(timeout=60_000)

    def say(self, text: str, wait: bool = True, button: bool = False) -> None:
        n_replies = len(self.replies)
        self.line.fill(text)
        if button:
            self.press("Send")
        else:
            self.line.press("Enter")
        if wait:
            new = self.page.locator(".pc-chat-reply .pc-chat-body").nth(n_replies)
            new.wait_for(state="attached", timeout=60_000)
            self.settle()

    def settle(self) -> None:
        self.page.wait_for_timeout(150)
        self.page.get_by_role("button", name="Send", exact=True).wait_for(timeout=60_000)
        self.page.wait_for_timeout(80)

    @property
    def replies(self) -> list[str]:
        return self.page.locator(".pc-chat-reply .pc-chat-body").all_inner_texts()

    @property
    def said(self) -> list[str]:
        return self.page.locator(".pc-chat-said").all_inner_texts()

    def press(self, name: str, at: int = -1) -> None:
        found = self.page.get_by_role("button", name=name, exact=True)
        (found.last if at < 0 else found.nth(at)).click()

    def clipboard(self) -> str:
        self.page.wait_for_timeout(100)
        return str(self.page.evaluate("navigator.clipboard.readText()"))


@pytest.fixture
def chat(shared: Callable[..., str], lab_page: Callable[..., LabPage]) -> Iterator[Chat]:
    found = Chat(lab_page(shared("run", SMALL_LABS / "echo.py")))
    yield found
    found.opened.check()


def test_pick_stream_stop_copy(chat: Chat) -> None:
    page = chat.page
    chat.say("Hello, you!")
    assert chat.replies == ["Hello, you!"] and page.get_by_text("trained on").count() == 0
    figures = page.locator(".pc-chat-figures")
    assert re.fullmatch(
        r"[\d,.]+ tokens/s · first token [\d.,]+ m?s · 12 tokens", figures.inner_text()
    )
    chat.press("more")
    assert "15 read + 12 written" in page.locator(".pc-chat-more").inner_text()
    chat.press("Copy")
    assert chat.clipboard() == "Hello, you!"

    page.get_by_label("Model", exact=True).select_option(
        "shipped/base"
    )  # in the middle of the talk
    chat.say("and now?")
    assert chat.replies[-1] == "AND NOW?"
    chat.press("Copy all")
    assert chat.clipboard() == (
        "You: Hello, you!\n\nshipped/sft: Hello, you!\n\nYou: and now?\n\nshipped/base: AND NOW?"
    )

    chat.say("endless: go", wait=False)
    page.get_by_role("button", name="Stop", exact=True).wait_for()
    page.wait_for_timeout(700)
    first = len(chat.replies[-1])
    assert figures.last.inner_text().startswith("~")
    for _ in range(50):
        page.wait_for_timeout(100)
        if len(chat.replies[-1]) > first > 20:
            break
    assert len(chat.replies[-1]) > first > 20, "it appears as it is written"
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Send", exact=True).wait_for(timeout=5000)
    kept = chat.replies[-1]
    page.wait_for_timeout(400)
    assert (
        chat.replies[-1] == kept and "Stopped." in page.locator(".pc-chat-reply").last.inner_text()
    )
    assert not figures.last.inner_text().startswith("~")
    chat.press("Copy")
    assert chat.clipboard().startswith("on and on and")


def test_edit_regenerate_and_turn(chat: Chat) -> None:
    chat.say("first")
    chat.say("second")
    chat.line.press("ArrowUp")  # edits the last message
    chat.page.keyboard.type(" thought")
    chat.page.keyboard.press("Enter")
    chat.settle()
    assert chat.said == ["first", "second thought"] and chat.replies[-1] == "second thought"
    chat.page.get_by_role("button", name="The answer before").last.click()
    chat.settle()
    assert chat.said == ["first", "second"]
    chat.page.keyboard.press("Alt+r")
    chat.settle()
    assert "2 / 2" in chat.page.locator(".pc-chat-reply").last.inner_text()
    chat.page.keyboard.press("Alt+ArrowLeft")
    chat.settle()
    assert "1 / 2" in chat.page.locator(".pc-chat-reply").last.inner_text()


def test_a_token_its_alternatives_and_a_branch(chat: Chat) -> None:
    chat.say("hello")
    chat.page.keyboard.press("Alt+t")
    tokens = chat.page.locator(".pc-chat-token")
    tokens.first.wait_for()
    assert tokens.all_inner_texts()[:5] == list("hello")
    assert chat.page.get_by_text("Click a token to see what else it might have said").is_visible()
    chat.page.locator(".pc-chat-act[aria-pressed=true]").wait_for()
    chat.page.locator(".pc-chat-token:focus").wait_for()  # the keys walk at once
    chat.page.keyboard.press("ArrowRight")
    chat.page.keyboard.press("Enter")
    popup = chat.page.get_by_role("dialog")
    popup.wait_for()
    assert chat.page.locator(".pc-chat-token[aria-expanded=true]").inner_text() == "e"
    options = popup.get_by_role("button").all_inner_texts()
    assert options[0].split()[0] == "e" and options[1].split()[0] == "x" and len(options) == 8
    chat.page.screenshot()
    popup.get_by_role("button").nth(1).click()
    chat.settle()
    chat.page.wait_for_timeout(200)
    assert "".join(tokens.all_inner_texts()).startswith("hxllo")
    chat.page.keyboard.press("Alt+t")
    chat.page.wait_for_timeout(200)
    assert chat.replies == ["hxllo"]


def test_compare_side_by_side(chat: Chat) -> None:
    chat.press("+ Compare")
    chat.page.get_by_label("Model 2").wait_for()
    chat.say("same")
    assert chat.replies == ["same", "SAME"]
    boxes = [one.bounding_box() for one in chat.page.locator(".pc-chat-reply").all()]
    assert all(boxes) and boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]  # type: ignore[index]
    chat.press("Go on with this one")
    chat.settle()
    chat.page.get_by_role("button", name="Leave out shipped/base").click()
    chat.page.get_by_label("Model 2").wait_for(state="detached")
    chat.say("on")
    chat.press("Copy all")
    assert "shipped/base: SAME" in chat.clipboard() and "shipped/sft: same" not in chat.clipboard()


def test_page_follows_what_is_written(chat: Chat) -> None:
    far = "(s) => s.scrollHeight - s.scrollTop - s.clientHeight"
    scroll = chat.page.locator(".pc-chat-scroll")
    chat.press("+ Compare")
    chat.page.get_by_label("Model 2").wait_for()
    for text in ("many\n\n" * 30, "same", "again"):
        chat.say(text)
        chat.page.wait_for_timeout(300)
        assert scroll.evaluate(far) < 40, text
    chat.say("endless: go", wait=False)
    chat.page.get_by_role("button", name="Stop", exact=True).wait_for()
    chat.page.wait_for_timeout(500)
    scroll.hover()
    chat.page.mouse.wheel(0, -600)
    chat.page.wait_for_timeout(800)
    assert scroll.evaluate(far) > 200, "who scrolls up reads on in peace"
    chat.press("Stop")
    chat.settle()


def test_settings_save_and_load(chat: Chat, tmp_path: Path) -> None:
    page = chat.page
    chat.press("Settings")
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Seed").fill("7")
    page.wait_for_timeout(400)
    chat.say("{2*21} is it")
    reply = page.locator(".pc-chat-reply").last
    assert reply.locator(".pc-chat-call").inner_text() == "2*21"
    assert reply.locator(".pc-chat-result").inner_text() == "42"
    chat.press("more")
    assert "seed 7" in reply.inner_text()
    with page.expect_download() as download:
        chat.press("Save")
    saved = Path(download.value.path()).read_text(encoding="utf-8")
    messages = json.loads(saved)["messages"]
    assert (
        messages[0] == {"role": "system", "content": "Be brief."}
        and messages[1]["content"] == "{2*21} is it"
    )
    path = tmp_path / "talks.jsonl"
    path.write_text(saved * 2, encoding="utf-8")
    page.locator("input[type=file]").set_input_files(path)
    page.get_by_label("Conversation").first.wait_for()
    chat.settle()
    assert chat.said == ["{2*21} is it"]
    chat.say("goes on")
    assert chat.replies[-1] == "goes on"


def test_settings_open_and_close_on_a_phone(chat: Chat) -> None:
    """The panel hangs below the bar, whatever its height, with all its fields inside."""
    page = chat.page
    page.set_viewport_size({"width": 420, "height": 900})
    chat.press("Settings")
    panel = page.locator(".pc-chat-panel")
    box, bar = panel.bounding_box(), page.locator(".pc-chat-bar").bounding_box()
    assert box and bar and box["y"] >= bar["y"] + bar["height"] - 1 and box["width"] > 250
    assert panel.evaluate("e => e.scrollWidth <= e.clientWidth"), "nothing reaches beyond it"
    chat.press("Settings")
    panel.wait_for(state="hidden")


def test_nothing_that_a_model_writes_can_act(chat: Chat) -> None:
    page, asked = chat.page, []
    page.on("request", lambda request: asked.append(request.url))
    for text in HOSTILE:
        chat.say(text, button=True)
    assert len(chat.replies) == len(HOSTILE)
    for link in page.locator(".pc-md a").all():
        assert (link.get_attribute("href") or "").startswith("https://example.org/")
        assert "noopener" in (link.get_attribute("rel") or "")
    for bad in ("script", "img", "svg", "iframe", "style", "b", "i", "[onerror]", "[onload]"):
        assert page.locator(f".pc-chat-body {bad}").count() == 0, bad
    assert page.evaluate("window.pwned") is None
    assert not [url for url in asked if "example" in url]
    assert (
        "<script>window.pwned = 1</script>" in chat.replies[0]
        and "window.pwned=3" in chat.replies[2]
    )
    assert page.locator(".pc-md-code").last.inner_text() == "<script>window.pwned = 8</script>"
    chat.say("still here")
    assert chat.replies[-1] == "still here"


def test_markdown_is_drawn(chat: Chat) -> None:
    chat.say(
        "# Title\n\nSome **bold** and *soft* `code_x` text_with_names.\n\n1. one\n2. two\n   - inner\n\n"
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n> said",
        button=True,
    )
    body = chat.page.locator(".pc-chat-body")
    for where, text in (
        (".pc-md-heading", "Title"),
        ("strong", "bold"),
        ("em", "soft"),
        (".pc-md-inline", "code_x"),
        ("ol > li >> nth=0", "one"),
        ("ol ul li", "inner"),
        ("td >> nth=1", "2"),
        ("blockquote", "said"),
    ):
        assert body.locator(where).inner_text() == text
    assert body.locator("em").count() == 1


def test_the_browser_keeps_what_was_said(chat: Chat) -> None:
    """A page that is loaded again has a session of its own; what was said before can be brought there."""

    def load_again() -> Chat:
        chat.page.reload()
        return Chat(chat.opened)

    chat.say("first <b>talk</b>")
    chat.press("New chat")
    chat.say("second")
    page = load_again()
    assert page.said == []
    page.say("third")  # whoever does not bring them back loses none either
    page = load_again()
    page.page.get_by_text("that this browser has kept: 3").wait_for()
    page.press("Bring back")
    page.page.locator(".pc-chat-reply").wait_for()
    assert (page.said, page.replies) == (["third"], ["third"])
    options = (
        page.page.get_by_label("Conversation", exact=True).first.locator("option").all_inner_texts()
    )
    assert options == ["third", "first <b>talk</b>", "second"]
    page = load_again()
    page.press("Forget")
    page = load_again()
    page.settle()
    assert page.page.get_by_role("button", name="Bring back").count() == 0


def test_a_loop_of_marks_is_drawn_at_once(chat: Chat, tmp_path: Path) -> None:
    """A small model that repeats itself for thousands of tokens must not keep the page busy for minutes."""
    loops = [
        f"so {mark * 10_000}"
        for mark in ("`", "*", "[", "_a", "~~", "![a", "**a ", "[a](", "`a``a")
    ]
    talk = [
        {"role": role, "content": c}
        for loop in loops
        for role, c in (("user", "go"), ("assistant", loop))
    ]
    path = tmp_path / "loops.jsonl"
    path.write_text(json.dumps({"messages": talk}), encoding="utf-8")
    chat.page.locator("input[type=file]").set_input_files(path)
    chat.page.locator(".pc-chat-reply").nth(len(loops) - 1).wait_for(
        state="attached", timeout=60_000
    )
    chat.settle()
    chat.say("``a`b`` and `c` and ` alone")
    spans = chat.page.locator("article").last.locator(".pc-md-inline")
    assert spans.all_inner_texts() == ["a`b", "c"]
    assert chat.page.locator(".pc-chat-reply .pc-chat-body").first.text_content() == loops[0]
    assert chat.page.get_by_text("longer than any that the model was trained on").count() == 1


def test_long_talks_stay_smooth(chat: Chat, tmp_path: Path) -> None:
    words = "a few **plain** words that were said, " * 12
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": f"{i}: {words}"} for i in range(200)
    ]
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"messages": messages}), encoding="utf-8")
    page = chat.page
    page.locator("input[type=file]").set_input_files(path)
    chat.settle()
    chat.say("endless: while scrolling", wait=False)
    page.get_by_role("button", name="Stop", exact=True).wait_for()
    frames: list[float] = page.locator(".pc-chat-scroll").evaluate(
        """(scroll) => new Promise((resolve) => {
          const times = [];
          let last = performance.now(), n = 0;
          const next = (now) => {
            times.push(now - last);
            last = now;
            scroll.scrollTop = (Math.sin(n / 15) + 1) / 2 * scroll.scrollHeight;
            if (++n < 120) requestAnimationFrame(next); else resolve(times);
          };
          requestAnimationFrame(next);
        })"""
    )
    chat.press("Stop")
    chat.settle()
    assert len(chat.said) == 101
    frames = sorted(frames[5:])
    median, high = frames[len(frames) // 2], frames[int(len(frames) * 0.9)]
    assert median <= 60 * measure_load(), (
        f"half of the frames took {median:.0f} ms or more, nine in ten {high:.0f} ms"
    )


def test_two_people_on_one_server(chat: Chat, browser: Browser) -> None:
    chat.say("my secret")
    context: Any = browser.new_context()
    try:
        page = context.new_page()
        page.goto(chat.opened.url)
        other = Chat(LabPage(page, chat.opened.url))
        other.say("who is there?")
        assert other.said == ["who is there?"] and "secret" not in page.locator("body").inner_text()
    finally:
        context.close()
    assert chat.said == ["my secret"]


def test_lab_10_chats_in_jupyter(
    shared: Callable[..., str], lab_page: Callable[..., LabPage]
) -> None:
    """The twin with the model that ships: a message, its reply and figures, stop, copy."""
    opened = lab_page(shared("jupyter", ROOT / "labs" / "10_chat.py"))
    run_all_cells(opened.page, timeout_s=240)
    chat = Chat(opened)
    low = "(line) => [line.offsetHeight, line.closest('.pc-chat').getBoundingClientRect().bottom"
    high, room = chat.line.evaluate(f"{low} - line.getBoundingClientRect().bottom]")
    assert high < 50 and room < 40, "one line at the bottom, whichever widget's style came last"
    chat.say("Hi! How was your day?")
    opened.page.locator(".pc-chat-figures").first.wait_for(timeout=60_000)
    assert chat.said == ["Hi! How was your day?"]
    assert "tokens/s" in opened.page.locator(".pc-chat-figures").inner_text()
    chat.press("Copy all")
    assert chat.clipboard().startswith("You: Hi! How was your day?\n\nshipped/sft: ")
    opened.check()
