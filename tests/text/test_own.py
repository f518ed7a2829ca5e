"""Conversations in files of one's own: the usual forms, and what is refused by its name and place."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from primechat.errors import DataError
from primechat.text.datasets.own import read_own
from primechat.text.dialogues import stream_dialogues

SAID = [("user", "Hi?"), ("assistant", "Yes.")]
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}]}
OPENAI = {
    "messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
}
CHATML = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"


def read(path: Path, *rows: Any, text: str = "") -> list[list[tuple[str, Any]]]:
    path.write_text(text or "\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return [[(role, content) for role, content in messages] for messages, _ in read_own(path)]


def plain(path: Path) -> list[list[str]]:
    """What training reads of both splits."""
    found = [c for split in ("train", "val") for c in stream_dialogues(str(path), split)]
    return [[f"{m['role'][0]}:{m['content']}" for m in c["messages"]] for c in found]


@pytest.mark.parametrize(
    "row",
    [
        OPENAI,
        OPENAI["messages"],
        {"conversation": OPENAI["messages"]},
        SHAREGPT,
        {"instruction": "Hi?", "input": "", "output": "Yes."},
        {"instruction": "Hi?", "output": "Yes.", "text": "Below is an instruction"},
        {"text": CHATML},
        CHATML + "<|im_start|>assistant\n",
    ],
)
def test_forms(tmp_path: Path, row: Any) -> None:
    (found,) = read(tmp_path / "a.jsonl", row)
    names = {"human": "user", "gpt": "assistant"}
    assert [(names.get(role, role), content) for role, content in found] == SAID
    other = {"instruction": "Add", "input": "1 and 2", "output": "3"}
    read(tmp_path / "a.jsonl", row, other)
    assert plain(tmp_path / "a.jsonl") == [["u:Hi?", "a:Yes."], ["u:Add\n\n1 and 2", "a:3"]]


def test_content_parts(tmp_path: Path) -> None:
    def part(*texts: str, kind: str = "text") -> list[dict[str, str]]:
        return [{"type": kind, "text": text} for text in texts]

    tool = [*part("so"), {"type": "python", "text": "1+1"}]
    rows = [
        [
            {"role": "system", "content": part("Be brief.")},
            {"role": "user", "content": part("Look", "here", kind="input_text")},
            {"role": "assistant", "content": part("Yes.", kind="output_text")},
            {"role": "user", "content": ["sum?"]},
            {"role": "assistant", "content": tool},
        ],
        SHAREGPT,
    ]
    found = read(tmp_path / "a.jsonl", *rows)
    said = ["Be brief.", "Look\nhere", "Yes.", "sum?", tool]
    assert [content for _, content in found[0]] == said
    assert plain(tmp_path / "a.jsonl")[0][:3] == ["s:Be brief.", "u:Look\nhere", "a:Yes."]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "line 3, message 1 has a part of type 'image_url'; only text can be read",
        ),
        (
            [{"role": "user", "content": [{"type": "python", "text": "1"}]}],
            "a part of type 'python'",
        ),
        ([{"role": "user", "content": [3]}], "a part of type 'int'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "type 'text' without a text"),
        ([{"role": "user", "content": 3}], "message 1 has a int as its content"),
        ([{"content": "a"}], "message 1 has content; it must have role and content, or from"),
        (["a"], "message 1 is a str; it must be an object with role and content"),
        ({"prompt": "a", "completion": "b"}, "line 3 is an object with prompt, completion; a conv"),
        ({"question": "a", "answer": "b"}, r"is `messages` with role and content \(OpenAI\)"),
        ({"text": "a story"}, "line 3 is a document .`text`., which `primechat pretrain"),
        ({"conversations": {"a": 1}}, "line 3 has a dict in `conversations`"),
        ({"instruction": "a", "output": ["b"]}, "line 3 has a list in `output`; it must be text"),
        ({"text": "<|im_start|>user\nHi"}, "line 3 has '<|im_start|>user.*ChatML has messages"),
        ({}, "line 3 is an empty object"),
        (3, "line 3 is a int; a conversation is"),
        ("Hi", "line 3 is a str"),
    ],
)
def test_refused(tmp_path: Path, row: Any, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(OPENAI)}\n\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match=f"a.jsonl {words}" if words.startswith("line") else words):
        list(stream_dialogues(str(path), "train"))


@pytest.mark.parametrize("indent", [None, 1])
def test_json_list(tmp_path: Path, indent: int | None) -> None:
    path = tmp_path / "a.json"
    rows = [{"instruction": f"q{i}", "input": "", "output": f"[a], {i}"} for i in range(40)]
    for text in (json.dumps(rows, indent=indent), "\n".join(map(json.dumps, rows)), f"\n {rows}"):
        found = read(path, text=text.replace("'", '"'))
        assert [m[1] for m in found] == [("assistant", f"[a], {i}") for i in range(40)]
    assert len(read(path, text=json.dumps([[*OPENAI["messages"]], OPENAI]))) == 2
    lines = json.dumps(rows, indent=1).replace('"q39"', "39").split("\n")
    line = 1 + max(i for i, text in enumerate(lines) if text.strip() == "{")
    for text, words in (
        ("\n".join(lines), f"a.json line {line} has a int in `instruction`"),
        (
            json.dumps(rows, indent=1)[:-2],
            f"a.json line {len(lines) - 1} ends before its list does",
        ),
        (json.dumps(rows, indent=1)[:-5], f"a.json line {line} is not JSON"),
        ('{"data": []}', "a.json line 1 is an object with data"),
        ("no JSON", "a.json line 1 is not JSON"),
    ):
        with pytest.raises(DataError, match=words):
            read(path, text=text)


def test_chatml_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    system = "<|im_start|>system\nBe brief.\n\nVery.<|im_end|>\n"
    for between in ("\n", "<|endoftext|>", "<|endoftext|>\n", "\n\n"):
        found = read(path, text=between.join([CHATML, CHATML * 2, system + CHATML]))
        assert [len(messages) for messages in found] == [2, 4, 3], repr(between)
        assert found[2][0] == ("system", "Be brief.\n\nVery.")
    found = read(path, text=(system + CHATML) * 3)
    assert [len(messages) for messages in found] == [3, 3, 3]
    assert plain(path) == [["s:Be brief.\n\nVery.", "u:Hi?", "a:Yes."]] * 2, (
        "train has one, val one"
    )
    one = (
        CHATML.replace("\n", "", 1).replace("user", "user\n").replace("<|im_end|>\n", "<|im_end|>")
    )
    assert read(path, text=one) == [SAID]
    for text, words in (
        (f"{CHATML}\nHi!\n{CHATML}", "a.txt line 6 has 'Hi!"),
        (f"{CHATML}<|im_start|>user\nWhat", "a.txt line 5 has"),
        ("Once upon a time\n", "a.txt line 1 has 'Once upon a time'; ChatML has messages between"),
        (f"<|im_start|>user\nHi\n{CHATML}", "a.txt line 1 has"),
    ):
        with pytest.raises(DataError, match=words):
            read(path, text=text)


def test_other_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(
        DataError, match=r"is a \.csv, conversations are read from a \.jsonl, \.json or"
    ):
        list(stream_dialogues(str(tmp_path / "a.csv"), "train"))
    with pytest.raises(DataError, match=r"or the path of a \.jsonl, \.json or \.txt file"):
        list(stream_dialogues(str(tmp_path / "none.json"), "train"))


@pytest.mark.parametrize("suffix", [".json", ".txt", ".jsonl"])
def test_a_long_file_takes_no_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    rows = [
        {"instruction": f"question {i} " * 40, "input": "", "output": "answer " * 200}
        for i in range(10_000)
    ]
    if suffix == ".json":
        path.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        path.write_text(
            "\n".join(
                CHATML.replace("Hi?", row["instruction"]).replace("Yes.", row["output"])
                for row in rows
            )
        )
    del rows
    tracemalloc.start()
    n = sum(1 for _ in read_own(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 10_000 and peak < 7e6 < path.stat().st_size / 2
