"""The widgets of lab 01 without a page: what they answer is what the tokenizer says."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import traitlets

from primechat.labkit.instruments import passages, tokenizers
from primechat.labkit.instruments.tokenizers import Tokenizers, begin_learning, play_merges
from primechat.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from primechat.views.widgets.tokens.choices import Choice, Opened
from primechat.views.widgets.tokens.playground import Playground, find_change
from primechat.views.widgets.tokens.trainer import TokenizerTrainer
from primechat.views.widgets.tokens.vocabulary import KINDS, VocabularyBrowser

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "nanochat" / "oct2025" / "tokenizer"
PIECES = ["the ", "naïve", "🧑🏽‍🚀", "\n", "  ", "日本", "12345", "e", "\ud83e", "don't"]


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    return Tokenizer.train([passages.ENGLISH * 3, "the cat sat on the mat " * 5], 330)


@pytest.fixture
def opened(own: Tokenizer) -> Opened:
    other = Tokenizer.load(FIXTURE)

    def refuse() -> None:
        raise OSError("no network here")

    return Opened(
        [
            Choice(key="own", label="mine", context=64, open=lambda: own),
            Choice(key="other", label="theirs", context=64, open=lambda: other),
            Choice(key="far", label="far", context=64, open=refuse),
        ]
    )


class Page:
    """What the page does with the answers: it keeps ids and lengths and patches them."""

    def __init__(self, answer: dict) -> None:
        self.panes: dict[str, tuple[list[int], list[int]]] = {}
        self.take(answer)

    def take(self, answer: dict) -> int:
        self.revision = answer["revision"]
        for pane in answer["panes"]:
            ids, sizes = self.panes.get(pane["key"], ([], []))
            cut = len(ids) if pane["whole"] else pane["cut"]
            for old, new in ((ids, pane["ids"]), (sizes, pane["sizes"])):
                old[pane["at"] : pane["at"] + cut] = new
            self.panes[pane["key"]] = (ids, sizes)
        return sum(len(pane["ids"]) for pane in answer["panes"])


def units(text: str) -> int:
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


@pytest.mark.parametrize("seed", range(12))
def test_edits_patch_to_encode(opened: Opened, seed: int) -> None:
    rng = random.Random(seed)
    text = "".join(rng.choice(PIECES) for _ in range(30))
    widget = Playground(opened, text, ["own", "other"])
    page = Page(widget.start)
    for _ in range(40):
        at = rng.randint(0, len(text))
        cut, put = rng.choice((0, 0, 1, 3)), rng.choice([*PIECES, ""])
        cut = min(cut, len(text) - at)
        edit = {"at": units(text[:at]), "cut": units(text[at : at + cut]), "put": put}
        text = text[:at] + put + text[at + cut :]
        page.take(widget.answer_edit(page.revision, **edit, shown=["own", "other"]))
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        for key, (ids, sizes) in page.panes.items():
            tokenizer = opened.get(key)
            assert ids == tokenizer.encode(whole), (key, text)
            assert sizes == [len(tokenizer.token_bytes(i)) for i in ids]


def test_only_what_changed_is_sent(opened: Opened) -> None:
    text = (passages.ENGLISH + "\n") * 90
    assert len(text) > 9_000
    widget = Playground(opened, text, ["own"])
    page = Page(widget.start)
    assert len(page.panes["own"][0]) > 2_000
    for i, char in enumerate("quite new words."):
        assert (
            page.take(
                widget.answer_edit(page.revision, at=4000 + i, cut=0, put=char, shown=["own"])
            )
            <= 12
        )
    assert page.panes["own"][0] == opened.get("own").encode(
        text[:4000] + "quite new words." + text[4000:]
    )


def test_another_view_makes_an_edit_stale(opened: Opened) -> None:
    widget = Playground(opened, "abc", ["own"])
    first = widget.start["revision"]
    assert "panes" in widget.answer_edit(first, at=3, cut=0, put="d", shown=["own"])
    assert widget.answer_edit(first, at=3, cut=0, put="e", shown=["own"]) == {"stale": True}
    assert widget.answer_open("xyz", ["own"])["panes"][0]["whole"]


def test_a_fault_leaves_the_others(opened: Opened) -> None:
    panes = Playground(opened, "abc", ["own", "far", "other"]).start["panes"]
    assert [pane.get("fault") for pane in panes] == [None, "no network here", None]


def test_a_slow_tokenizer_is_pending(own: Tokenizer) -> None:
    gate = threading.Event()

    def open_slowly() -> Tokenizer:
        gate.wait(20)
        return own

    opened = Opened(
        [
            Choice(key="own", label="mine", context=64, open=lambda: own),
            Choice(key="slow", label="slow", context=64, open=open_slowly),
        ]
    )
    widget = Playground(opened, "abc", ["own"])
    fast, slow = widget.answer_open("abc", ["own", "slow"], wait_s=0.05)["panes"]
    assert fast["ids"] and slow["pending"] and slow["fault"].startswith("Opening slow.")
    edited = widget.answer_edit(widget._revision, at=3, cut=0, put="d", shown=["own", "slow"])[
        "panes"
    ]
    assert edited[1]["pending"], "typing goes on meanwhile"
    gate.set()
    opened.get("slow")
    assert widget.answer_open("abc", ["own", "slow"])["panes"][1]["ids"] == own.encode("abc")


def test_a_tokenizer_that_rewrites_is_refused(own: Tokenizer) -> None:
    class Lower:
        vocab_size = own.vocab_size
        token_bytes = own.token_bytes

        def encode(self, text: str) -> list[int]:
            return own.encode(text.replace(" ", ""))

    opened = Opened([Choice(key="x", label="lower", context=1, open=Lower)])
    (pane,) = Playground(opened, "a b", ["x"]).start["panes"]
    assert pane["fault"].startswith("lower rewrites the text before it cuts it, so its 2 tokens")


@pytest.mark.parametrize(
    ("old", "new", "change"),
    [
        ([], [1, 2], (0, 0)),
        ([1, 2], [], (0, 2)),
        ([1, 2, 3], [1, 9, 3], (1, 1)),
        ([1, 2, 3], [1, 2, 3], (3, 0)),
        ([1, 1], [1, 1, 1], (2, 0)),
        ([1, 1, 1], [1], (1, 2)),
        ([1, 2], [2], (0, 1)),
    ],
)
def test_change_is_the_middle(old: list[int], new: list[int], change: tuple[int, int]) -> None:
    assert find_change(np.array(old, np.int32), np.array(new, np.int32)) == change


def test_replay_ends_where_encode_does(own: Tokenizer) -> None:
    for text in ("", "the cats 🧑🏽‍🚀 naïve\n", passages.ENGLISH):
        play = play_merges(own, text)
        assert play["equal"] and play["ids"] == own.encode(text)
        assert len(play["data"]) == len(play["removed_at"]) == len(text.encode())
        assert max(play["removed_at"], default=-1) == len(play["steps"]) - 1
    with pytest.raises(ValueError, match="keeps no merges by rank"):
        play_merges(object(), "a")


def test_trainer_learns_what_rustbpe_learns() -> None:
    kit = Tokenizers()
    trainer = TokenizerTrainer(
        [("1", "a thousand characters")],
        begin_learning,
        tokenizers.cut_now,
        kit.adopt,
        preview="The dog.",
        special_count=len(SPECIAL_TOKENS),
    )
    state = trainer.answer_state()
    assert (
        state["vocab_size"] == 265
        and state["n_bytes"] == state["n_tokens"] == 1000
        and not state["counts"]
    )
    assert len(state["preview"]) == len("The dog.")
    one = trainer.answer_advance(1, 300)
    assert one["counts"] == [state["pairs"][0][2]] and one["vocab_size"] == 266
    while not trainer.done:
        state = trainer.answer_advance(10, 300)
    assert state["vocab_size"] == 300 and "the same merges in the same order (35)" in state["said"]
    assert kit.opened.get("mine") == Tokenizer.train(trainer.learner.texts, 300)
    assert state["n_tokens"] == sum(
        map(len, map(kit.opened.get("mine").encode, trainer.learner.texts))
    )
    state = trainer.answer_begin("", "aab aab", 4096)
    while not trainer.done:
        state = trainer.answer_advance(50, state["goal"])
    assert state["goal"] == state["vocab_size"] < 275, (
        "a text that has no pairs left ends the training"
    )
    with pytest.raises(ValueError, match="Your text is empty"):
        trainer.answer_begin("", " \n", 512)


def test_what_is_trained_is_offered_everywhere() -> None:
    kit = Tokenizers()
    widgets = [kit.playground("a"), kit.replay("a"), kit.fertility(), kit.vocabulary()]
    kit.adopt(begin_learning("", passages.ENGLISH))
    for widget in widgets:
        assert ["mine", "my own, 265 tokens", 256] in widget.choices
    assert widgets[0].answer_open("é", ["mine"])["panes"][0]["sizes"] == [1, 1]


def test_chat_is_drawn_as_rendered() -> None:
    kit = Tokenizers()
    if not kit.chat_keys:
        pytest.skip("needs a model with a tokenizer; data/ has none")
    widget = kit.chat()
    tokenizer = kit.tokenizer
    ids, mask = tokenizer.render_conversation({"messages": tokenizers.DIALOGUE})
    drawn = widget.start
    assert drawn["ids"] == ids and drawn["mask"] == mask and drawn["cut"] == 0
    assert [bytes(piece) for piece in drawn["pieces"]] == [tokenizer.token_bytes(i) for i in ids]
    assert {ids[i] for i, bit in enumerate(drawn["special"]) if bit} <= set(
        tokenizer.specials.values()
    )
    assert widget.answer_draw(widget.key, tokenizers.DIALOGUE, 10)["cut"] == len(ids) - 10
    with pytest.raises(Exception, match="must speak"):
        widget.answer_draw(widget.key, [{"role": "assistant", "content": "x"}], 10)


def test_vocabulary_search(opened: Opened, own: Tokenizer) -> None:
    def count(tokenizer: Tokenizer) -> tuple[np.ndarray, str]:
        counts = np.bincount(tokenizer.encode(passages.ENGLISH), minlength=tokenizer.vocab_size)
        return counts, "counted"

    widget = VocabularyBrowser(opened, count, "own", "about")
    assert widget.start["total"] == own.vocab_size == len(own.ranks) + 9
    found = widget.answer_find("own", "THE", limit=1000)
    expected = [i for i, token in enumerate(own.ranks) if b"the" in token.lower()]
    assert [row[0] for row in found["rows"]] == expected and found["never"] is None
    assert widget.answer_find("own", "66")["rows"][0][:2] == [66, [66]]
    by_kind = {kind: widget.answer_find("own", kind=kind)["total"] for kind in KINDS}
    assert sum(by_kind.values()) == own.vocab_size and by_kind["special"] == 9
    assert by_kind["part of a character"] == 128
    longest = widget.answer_find("own", order="longest", limit=3)["rows"]
    assert len(longest[0][1]) == max(map(len, [*own.ranks, *(s.encode() for s in own.specials)]))
    said = widget.answer_count("own")
    never = widget.answer_find("own", kind="never seen", limit=1000)
    assert said["never"] == never["total"] and all(row[3] == 0 for row in never["rows"])
    top = widget.answer_find("own", order="most seen", limit=1)["rows"][0]
    assert top[3] == max(own.encode(passages.ENGLISH).count(i) for i in range(own.vocab_size))


def test_counting_the_training_text(own: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the cat", "the mat"]
    monkeypatch.setattr(tokenizers, "read_documents", lambda *_: iter(texts))
    counts, said = tokenizers.count_tokens(own)
    assert counts[: len(own.ranks)].sum() == sum(len(own.encode(text)) for text in texts)
    assert set(counts[len(own.ranks) :]) == {-1} and "of 2 conversations" in said


def test_passages_are_parallel() -> None:
    found = passages.list_passages()
    assert found[0][0] == "English" and len({name for name, _, _ in found}) == len(found) >= 16
    shuffled = dict((name, text) for name, _, text in found)["English, letters shuffled"]
    assert (
        sorted(shuffled) == sorted(passages.ENGLISH.lower())
        and shuffled != passages.ENGLISH.lower()
    )
    assert [c.isalpha() for c in shuffled] == [c.isalpha() for c in passages.ENGLISH]


def test_lab_needs_no_torch() -> None:
    code = (
        "import sys; from primechat.labkit.lab import show, predict, exercise;"
        "from primechat.labkit.instruments.tokenizers import Tokenizers; kit = Tokenizers();"
        "[getattr(kit, n)() for n in ('playground', 'replay', 'trainer', 'fertility', 'chat', 'vocabulary')];"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_widgets_say_their_state_in_traits() -> None:
    for widget in (Tokenizers().playground("ab"), Tokenizers().replay("ab")):
        assert (
            isinstance(widget, traitlets.HasTraits)
            and widget.text == "ab"
            and widget.start["text"] == "ab"
        )
