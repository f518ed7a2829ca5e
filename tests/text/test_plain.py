"""Text files as documents: marks between documents, cuts by size, streaming."""

from __future__ import annotations

import json
import random
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from primechat.checkpoint import registry
from primechat.checkpoint.checkpoint import read_meta
from primechat.config import (
    EvalConfig,
    EvaluateConfig,
    GPTConfig,
    PretrainConfig,
    RuntimeConfig,
    TokenizerConfig,
)
from primechat.errors import ConfigError
from primechat.events import Event
from primechat.stages.evaluate import evaluate
from primechat.stages.pretrain import pretrain
from primechat.text.corpora import corpus_identity, read_documents
from primechat.text.plain import MarkCounts, read_plain

MARK = "<|endoftext|>"


def cut(path: Path, text: str, separator: str = "auto") -> list[str]:
    path.write_text(text, encoding="utf-8")
    return [document for document in read_plain(path, separator) if document.strip()]


@pytest.mark.parametrize("mark", [MARK, "<|bos|>", "</s>"])
def test_marks_between_documents(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "a.txt"
    texts = ['One day.\n\n"Hi!" he said.', '"Two," she said.', "  three\n  lines", "four"]
    for text in (
        f"\n{mark}\n".join(texts),  # as in TinyStories
        f"{mark}\n".join(texts),
        f"\r\n {mark} \r\n".join(texts),
    ):
        assert cut(path, text) == texts, repr(text)
    texts[2] = "three\n  lines"
    assert cut(path, mark.join(texts)) == texts, "as in GPT-2's corpora"
    assert cut(path, f"\n\n{mark} ".join(["", *texts, ""])) == texts
    assert cut(path, f" {mark}\n".join(texts)) == texts
    assert cut(path, (mark * 2).join(texts)) == texts


@pytest.mark.parametrize(
    "text",
    [
        f"The token {MARK} ends a text.",
        f'It is "{MARK}" there, `{MARK}` here and ({MARK}) elsewhere.',
        f'tokenizer.encode("{MARK}")',
        f"Special: {MARK}, <|bos|>; {MARK}s and <|bos|>-led texts",
        f"| {MARK} | 50256 |",
        "It was <s>ten</s>five dollars.",
        "It was <s>ten</s>",
        "<|user_start|>Hi<|user_end|><|assistant_start|>",
        "<|im_start|>user\nHi<|im_end|>\n",
    ],
)
def test_texts_that_speak_of_marks_stay(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.txt"
    assert cut(path, f"{text}\n") == [text.strip()]
    assert cut(path, f"before\n{text}\nafter") == [f"before\n{text}\nafter"]


def test_another_separator(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    assert cut(path, f"a {MARK} b\n{MARK}\nc", MARK) == ["a", "b", "c"], "wherever it stands"
    assert cut(path, f"a\n###\nb### c {MARK}", "###") == ["a", "b", f"c {MARK}"]
    assert cut(path, "a.b", ".") == ["a", "b"], "no regular expression"
    assert cut(path, f"a\n{MARK}\nb", "none") == [f"a\n{MARK}\nb"]
    for wrong in ("", " ", "a\nb"):
        with pytest.raises(ConfigError, match="corpus_separator=.* must be auto, none or a mark"):
            TokenizerConfig(corpus_separator=wrong)


def cut_plainly(text: str) -> Iterator[str]:
    """The rule for a text without marks, over the whole text at once."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= 20_000 or (size >= 2_000 and not line.strip()):
            yield "".join(lines).strip("\n")
            lines, size = [], 0
    yield "".join(lines).strip("\n")


def test_texts_without_marks_are_cut_as_ever(tmp_path: Path) -> None:
    """Also where the longest lines are read in pieces."""
    rng = random.Random(0)
    for _ in range(60):
        kinds = ["z" * rng.randrange(300), "y " * rng.randrange(1, 3_000), "   ", "w" * 70_000]
        parts = rng.choices(kinds, [6, 1, 1, 0.1], k=rng.randrange(200))
        text = "".join(part + rng.choice(["\n", "\n", "\n\n", ""]) for part in parts)
        expected = [document for document in cut_plainly(text) if document.strip()]
        assert cut(tmp_path / "a.txt", text) == expected


def test_size_of_documents_with_marks(tmp_path: Path) -> None:
    """Up to 20,000 characters a document stays whole; a longer one is cut as a text without marks is."""
    paragraph = "word " * 100 + "\n\n"
    short, long = paragraph * 30, paragraph * 60
    found = cut(tmp_path / "a.txt", f"\n{MARK}\n".join([short, long, short]))
    assert found[0] == found[-1] == short.strip("\n")
    assert "\n\n".join(found[1:-1]) == long.strip("\n")
    assert len(found) > 6 and max(map(len, found)) < 20_000


@pytest.mark.parametrize("length", [7, 999, 2**20 - 1, 2**20 - 6, 2**20, 2**20 + 1])
def test_one_endless_line(tmp_path: Path, length: int) -> None:
    """A mark is found wherever the pieces end in which a long line is read."""
    texts = [str(i) + "x" * (length - 2) + "." for i in range(4)]
    assert cut(tmp_path / "a.txt", MARK.join(texts)) == texts


def test_a_long_text_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for between in (MARK, f"\n{MARK}\n", "\n\n", "\n"):
        path.write_text((f"It was a long story.{' And then more.' * 99}{between}") * 20_000)
        tracemalloc.start()
        n = sum(1 for _ in read_plain(path))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert n > 1_000 and peak < 8e6 < path.stat().st_size / 3


def test_marks_are_counted_and_said(tmp_path: Path) -> None:
    path, heard = tmp_path / "a.txt", list[Event]()
    story = "Once upon a time. " * 30
    path.write_text(f"{story}\n{MARK}\n" * 40 + f"The mark {MARK} here.\n" + story)
    for split in ("train", "val"):
        documents = list(read_documents(str(path), split, on_event=heard.append))
        assert all(document.strip() in story or "The mark" in document for document in documents)
    (note,) = heard
    assert "40 <|endoftext|> between documents" in note.text  # type: ignore[union-attr]
    assert "1 <|endoftext|> inside lines stay text; --corpus_separator" in note.text  # type: ignore[union-attr]
    next(read_documents(str(path), "train", separator="###", on_event=heard.append))
    assert "'###' is nowhere" in heard[-1].text  # type: ignore[union-attr]
    marks: MarkCounts = MarkCounts()
    list(read_plain(path, "none", marks))
    assert not marks


def test_identity_knows_the_separator(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    found = {corpus_identity(str(path), "val", separator=s) for s in ("auto", "none", "###")}
    assert len(found) == 3
    path = path.rename(tmp_path / "a.jsonl")
    assert len({corpus_identity(str(path), "val", separator=s) for s in ("auto", "none")}) == 1


def test_runs_know_the_separator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mark reaches tokenizer or model; a run from before marks were known goes on with its text."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    path = tmp_path / "stories.txt"
    path.write_text(
        f"\n{MARK}\n\n".join(f"Story {i}. " + "Then it rained. " * 30 for i in range(40))
    )
    evaluation = EvalConfig(sample_every=-1, snapshots=False, every=99)
    runtime = RuntimeConfig(
        device="cpu", threads=1, compile="off", dtype="float32", micro_batch_rows=2
    )
    config: Any = PretrainConfig(
        tag="d1",
        corpus=str(path),
        model=GPTConfig.modern(1, vocab_size=300, sequence_len=32, head_dim=16),
        batch_tokens=64,
        steps=2,
        eval=evaluation,
        runtime=runtime,
    )
    heard: list[Event] = []
    result = pretrain(config, on_event=heard.append)
    assert any("39 <|endoftext|> between" in getattr(event, "text", "") for event in heard)
    tokenizer = registry.load_tokenizer(result.identifier)
    assert not any(b"<|" in tokenizer.token_bytes(i) for i in range(290))

    frozen = tmp_path / "base" / result.path / "config.json"
    assert '"corpus_separator": "auto"' in frozen.read_text()
    for separator in ("auto", "none"):
        kind: Any = dict(model="base/d1", corpus=str(path), runtime=runtime)
        measured = evaluate(EvaluateConfig(**kind, corpus_separator=separator))
        held_out = read_documents(str(path), "val", separator=separator)
        assert measured.scored_bytes == sum(len(text.encode()) for text in held_out)

    old = replace(config, tag="old", corpus_separator="none", steps=4)
    stop = threading.Event()
    pretrain(old, on_event=lambda event: stop.set() if event.kind == "step" else None, stop=stop)
    folder = tmp_path / "base" / "base_checkpoints" / "old"
    settings = json.loads((folder / "config.json").read_text())
    assert settings.pop("corpus_separator") == "none"
    (folder / "config.json").write_text(json.dumps(settings))
    text = read_meta(folder, 1)["corpus"]
    with pytest.raises(ConfigError, match="corpus_separator: 'none' != '###'"):
        pretrain(replace(old, corpus_separator="###", resume=True))
    result = pretrain(replace(old, corpus_separator="auto", resume=True))
    assert result.step == 4 and read_meta(folder, 4)["corpus"] == text
    assert '"corpus_separator": "none"' in (folder / "config.json").read_text()
