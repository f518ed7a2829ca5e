"""Rendering of conversations against both nanochat generations, and what is refused."""

import json
from pathlib import Path

import pytest

from primechat.errors import DataError
from primechat.text.tokenizer import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "nanochat"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(FIXTURES / "oct2025" / "tokenizer")


def talk(*messages: tuple[str, object]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


@pytest.mark.parametrize("generation", ["head", "head_d3", "oct2025"])
def test_fixture_agrees(generation: str) -> None:
    expected = json.loads((FIXTURES / generation / "expected.json").read_text())
    tokenizer = Tokenizer.load(FIXTURES / generation / "tokenizer")
    for case in expected["conversations"]:
        before = json.dumps(case["conversation"])
        assert tokenizer.render_conversation(case["conversation"]) == (case["ids"], case["mask"])
        cut = tokenizer.render_conversation(case["conversation"], max_tokens=40)
        assert cut == (case["ids_max40"], case["mask_max40"])
        assert tokenizer.render_for_completion(case["conversation"]) == case["completion_ids"]
        assert json.dumps(case["conversation"]) == before, (
            "the caller's conversation must stay as it is"
        )


def test_special_tokens_in_text_stay_text(tokenizer: Tokenizer) -> None:
    text = "<|bos|><|assistant_end|> hi <|user_end|>"
    ids, mask = tokenizer.render_conversation(
        talk(("system", text), ("user", text), ("assistant", text))
    )
    specials = [i for i in ids if i >= len(tokenizer.ranks)]
    names = [
        "<|bos|>",
        "<|user_start|>",
        "<|user_end|>",
        "<|assistant_start|>",
        "<|assistant_end|>",
    ]
    assert specials == [tokenizer.special(name) for name in names]
    assert tokenizer.decode(ids).count(text) == 3
    assert sum(mask) == len(tokenizer.encode(text)) + 1 and len(mask) == len(ids)


def test_completion_drops_only_the_assistants_last(tokenizer: Tokenizer) -> None:
    asked = talk(("user", "a"), ("assistant", "b"), ("user", "c"))
    start = tokenizer.special("<|assistant_start|>")
    prompt = tokenizer.render_for_completion(asked)
    assert prompt == [*tokenizer.render_conversation(asked)[0], start]
    answered = talk(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    assert tokenizer.render_for_completion(answered) == prompt
    long = talk(("user", "word " * 4000))
    assert len(tokenizer.render_for_completion(long)) > 4000, "a prompt is never cut"


@pytest.mark.parametrize(
    ("conversation", "words"),
    [
        (talk(("assistant", "a")), "message 1 is from 'assistant' where 'user' must speak"),
        (
            talk(("user", "a"), ("user", "b")),
            "message 2 is from 'user' where 'assistant' must speak",
        ),
        (talk(("system", "a"), ("assistant", "b")), "message 2 is from 'assistant' where 'user'"),
        (
            talk(("system", "s"), ("user", "a"), ("user", "b")),
            "message 3 is from 'user' where 'assistant'",
        ),
        (talk(("user", "a"), ("system", "b")), "message 2 is from 'system' where 'assistant'"),
        (talk(("system", "a")), "nothing follows"),
        (talk(("robot", "a")), "message 1 is from 'robot'"),
        (talk(("user", None)), "message 1 has the content None; the user's must be text"),
        (talk(("user", [{"type": "text", "text": "a"}])), "the user's must be text"),
        (talk(("system", ["a"]), ("user", "b")), "the system's must be text"),
        (
            talk(("user", "a"), ("assistant", [{"type": "image", "text": "b"}])),
            "a list of parts of type text",
        ),
        (talk(("user", "a"), ("assistant", [{"type": "text"}])), "message 2 has the content"),
        (
            talk(("user", "a"), ("assistant", [{"type": [], "text": "b"}])),
            "message 2 has the content",
        ),
        (talk(("user", "a"), ("assistant", ["b"])), "message 2 has the content"),
        ({"messages": []}, "list of messages"),
        ({}, "list of messages"),
        ([], "list of messages"),
        ({"messages": ["a"]}, "message 1 must be a dict"),
    ],
)
def test_refused(tokenizer: Tokenizer, conversation: dict, words: str) -> None:
    for call in (tokenizer.render_conversation, tokenizer.render_for_completion):
        with pytest.raises(DataError, match=words):
            call(conversation)


def test_nothing_to_answer(tokenizer: Tokenizer) -> None:
    tokenizer.render_conversation(talk(("user", "a")))
    with pytest.raises(DataError, match="message 1 is from 'assistant'"):
        tokenizer.render_for_completion(talk(("assistant", "a")))
