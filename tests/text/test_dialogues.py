"""Dialogue sets on small files of their true schemas, quirks included; cleaning, mixtures, streaming."""

from __future__ import annotations

import csv
import json
import re
import tracemalloc
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from primechat.errors import ConfigError, DataError, HubError
from primechat.events import Event
from primechat.text import dialogues
from primechat.text.chat_format import read_messages
from primechat.text.corpora import read_conversations, read_documents
from primechat.text.datasets.recipes import ASKING, FAQ, list_recipes
from primechat.text.dialogues import (
    SETS,
    DialogueOptions,
    SeenFilter,
    identify_mixture,
    parse_mixture,
    stream_dialogues,
)


def make_options(folder: Path, **kind: Any) -> DialogueOptions:
    return DialogueOptions(base_dir=folder, **kind)


def take(
    mixture: str, split: str, options: DialogueOptions | None = None
) -> tuple[list[Any], dict[str, Counter[str]]]:
    counts: dict[str, Counter[str]] = {}
    found = list(stream_dialogues(mixture, split, options, counts=counts))
    for conversation in found:
        read_messages(conversation)  # strict alternation, as training wants it
        assert conversation["messages"][-1]["role"] == "assistant"
        assert {"source", "language", "licence"} < set(conversation)
    return found, counts


def say(conversation: Any) -> list[str]:
    return [f"{m['role'][0]}:{m['content']}" for m in conversation["messages"]]


def write_personas(folder: Path) -> None:
    (folder / "data").mkdir(parents=True)
    columns = ["user 1 personas", "user 2 personas", "Best Generated Conversation"]
    rows = {
        "Synthetic-Persona-Chat_train": [
            ("I ski.\nI bake.", "I sing.", "User 1: Hi!\nUser 2: Hello.\nIt is cold.\nUser 1: Bye"),
            (
                "I run.",
                "I read.",
                "Here is one:\n\nUser 1: Hi, [user 2's name]!\nUser 2: Hey there",
            ),
            ("I run.", "I read.", "User 1: I am [user 1's name].\nUser 2: Nice"),
            ("I run.", "I read.", ""),
        ],
        "Synthetic-Persona-Chat_valid": [("a", "b", "User 1: What?\nUser 2: That.")],
        "Synthetic-Persona-Chat_test": [("a", "b", "User 1: Who?\nUser 2: Me.")],
        "New-Persona-New-Conversations": [
            ("c", "d", 'User 1: "Quote", he said\nUser 2: Yes, I see')
        ],
    }
    for stem, lines in rows.items():
        with (folder / "data" / f"{stem}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerows([columns, *lines])


def test_personas(tmp_path: Path) -> None:
    write_personas(tmp_path / "dialogues" / "persona")
    train, counts = take("persona", "train", make_options(tmp_path, personas=False))
    assert sorted(say(c) for c in train) == [
        ['u:"Quote", he said', "a:Yes, I see"],
        ["u:Hi!", "a:Hello.\nIt is cold."],
        ["u:Hi!", "a:Hey there"],
    ]
    seen = counts["persona"]
    assert (
        seen["text before the first speaker"] == 1
        and seen["conversations with an unfilled name"] == 1
    )
    assert seen["unfilled names removed"] == 1 and seen["trailing user turns"] == 1
    assert seen["conversations left empty"] == 1 and seen["kept"] == 3
    assert all(c["licence"] == "cc-by-4.0" and c["language"] == "English" for c in train)
    val, _ = take("persona", "val", make_options(tmp_path))
    assert len(val) == 2 and val[0]["messages"][0] == {
        "role": "system",
        "content": "You are talking as someone of whom this is true: b",
    }
    both, _ = take("persona", "train", make_options(tmp_path, mirrored=True))
    first = [c for c in both if "cold" in str(c)]
    assert say(first[1]) == [
        "s:You are talking as someone of whom this is true: I ski. I bake.",
        "u:Hello.\nIt is cold.",
        "a:Bye",
    ]


def test_dailydialog(tmp_path: Path) -> None:
    folder = tmp_path / "dialogues" / "dailydialog"
    folder.mkdir(parents=True)

    def make_row(split: str, *said: str) -> dict[str, Any]:
        turns = [
            {
                "speaker": ("user", "system")[i % 2],
                "utterance": text,
                "utt_idx": i,
                "dialogue_acts": {},
                "emotion": "no emotion",
            }
            for i, text in enumerate(said)
        ]
        names = {
            "dataset": "dailydialog",
            "dialogue_id": "d-1",
            "original_id": "1",
            "domains": ["Work"],
        }
        return {**names, "data_split": split, "turns": turns}

    rows = [
        make_row("train", "Say , Jim , how about a beer ? ", " It ' s late .", "Oh ."),
        make_row("validation", "Hello !", "Good day .", "  ", "I ' m fine ."),
        make_row("test", "Ready ?", "Ready ."),
    ]
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        archive.writestr("data/dialogues.json", json.dumps(rows))
        archive.writestr("data/ontology.json", "{}")
    train, _ = take("dailydialog", "train", make_options(tmp_path))
    assert say(train[0]) == ["u:Say, Jim, how about a beer?", "a:It's late."]
    val, counts = take("dailydialog", "val", make_options(tmp_path))
    assert [say(c) for c in val] == [
        ["u:Hello!", "a:Good day.\nI'm fine."],
        ["u:Ready?", "a:Ready."],
    ]
    assert counts["dailydialog"]["empty turns"] == counts["dailydialog"]["merged turns"] == 1
    (folder / "data.zip").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="damaged or no zip"):
        take("dailydialog", "train", make_options(tmp_path))


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def talk(*said: str) -> list[dict[str, str]]:
    return [{"content": text, "role": ("user", "assistant")[i % 2]} for i, text in enumerate(said)]


def test_lmsys(tmp_path: Path) -> None:
    def make_row(
        messages: list[dict[str, str]], flags: list[bool], language: str = "English"
    ) -> Any:
        moderation = [
            {"categories": {"violence": f}, "category_scores": {"violence": 0.5}, "flagged": f}
            for f in flags
        ]
        return {
            "conversation_id": "x",
            "model": "vicuna-13b",
            "conversation": messages,
            "turn": 1,
            "language": language,
            "openai_moderation": moderation,
            "redacted": "NAME_1" in str(messages),
        }

    rows = [
        make_row(talk("Hi", "Hello NAME_1", "more", "bad"), [False, False, False, True]),
        make_row(talk("worse", "no"), [True, False]),
        make_row(talk("Salut", "Bonjour"), [False, False], "French"),
        make_row(talk("Hi", "Hello NAME_1"), [False, False]),
        make_row(talk("Two", "Three"), [False, False]),
    ]
    write_table(tmp_path / "dialogues" / "lmsys" / "data" / "train-00000-of-00006.parquet", rows)
    train, counts = take("lmsys", "train", make_options(tmp_path))
    assert [say(c) for c in train] == [["u:Hi", "a:Hello NAME_1"], ["u:Two", "a:Three"]]
    expected = {"moderated turns": 4, "other languages": 1, "duplicates": 1, "kept": 2}
    assert {k: counts["lmsys"][k] for k in expected} == expected
    assert counts["lmsys"]["conversations with redacted names"] == 2
    french, _ = take("lmsys", "train", make_options(tmp_path, language="french"))
    assert [c["language"] for c in french] == ["French"]
    assert len(take("lmsys", "train", make_options(tmp_path, language=""))[0]) == 3


@pytest.mark.parametrize("column", ["messages", "conversation"])
def test_magpie(tmp_path: Path, column: str) -> None:
    rows = [
        {"model": "llama", column: talk(f"q{i}", f"a{i}"), "embedding": [0.5] * 64, "score": None}
        for i in range(40)
    ]
    write_table(
        tmp_path / "dialogues" / "magpie" / "filtered" / "train-00000-of-00001.parquet", rows
    )
    train, _ = take("magpie", "train", make_options(tmp_path))
    val, _ = take("magpie", "val", make_options(tmp_path))
    assert len(train) == 38 and [say(c)[0] for c in val] == ["u:q19", "u:q39"]
    wrong = tmp_path / "dialogues" / "magpie" / "filtered" / "train-00000-of-00001.parquet"
    write_table(wrong, [{"text": "x"}])
    with pytest.raises(DataError, match="no column messages or conversation"):
        take("magpie", "train", make_options(tmp_path))


def test_smoltalk_own_split(tmp_path: Path) -> None:
    folder = tmp_path / "dialogues" / "smol-smoltalk" / "data"
    system = [{"content": "Be brief.", "role": "system"}]
    for name, n in (("train", 3), ("test", 2)):
        rows = [{"messages": [*system, *talk(f"{name}{i}", "ok")], "source": "s"} for i in range(n)]
        write_table(folder / f"{name}-00000-of-00001.parquet", rows)
    # a file named train carries no split of its own: every 20th is held out there, and test is held out whole
    train, _ = take("smol-smoltalk", "train", make_options(tmp_path))
    val, _ = take("smol-smoltalk", "val", make_options(tmp_path))
    assert len(train) == 3 and len(val) == 2 and say(train[0])[0] == "s:Be brief."


def test_own_file_is_cleaned(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    rows: list[Any] = [
        [
            {"role": "assistant", "content": "Welcome"},
            *talk("a", "b"),
            {"role": "assistant", "content": "c"},
        ],
        {"messages": [*talk("d", "e", "f"), {"role": "user", "content": "g"}]},
        {"messages": talk("A", "B\n")},
        {"messages": [{"role": "narrator", "content": "h"}, *talk("i", "j")]},
        {"messages": talk("", " ")},
        {"messages": talk("a", "b")},
        {"messages": talk("k", "l"), "language": "German"},
        talk("m", "n"),
        talk("last", "one"),
    ]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    train, counts = take(str(path), "train")
    assert [say(c) for c in train] == [
        ["u:a", "a:b\nc"],
        ["u:d", "a:e"],
        ["u:A", "a:B"],
        ["u:m", "a:n"],
    ]
    assert counts[str(path)] == {
        "leading assistant turns": 1,
        "merged turns": 2,
        "trailing user turns": 1,
        "empty turns": 2,
        "conversations with an unknown role": 1,
        "conversations left empty": 1,
        "duplicates": 1,
        "other languages": 1,
        "kept": 4,
        "kept messages": 8,
    }
    assert [say(c) for c in take(str(path), "val")[0]] == [["u:last", "a:one"]]
    path.write_text('{"messages": "x"}\n[]\n')
    with pytest.raises(
        DataError, match="line 1 has a str in `messages`; a conversation is `messages`"
    ):
        take(str(path), "train")
    path.write_text("[]\n")
    with pytest.raises(DataError, match="fewer than 2"):
        take(str(path), "train")
    with pytest.raises(DataError, match="must be chitchat, persona"):
        take("nosuch.jsonl", "train")


def test_tool_parts_stay(tmp_path: Path) -> None:
    path = tmp_path / "tool.jsonl"
    parts = [{"type": "text", "text": "so"}, {"type": "python", "text": "1+1"}]
    row = [
        {"role": "user", "content": "sum?"},
        {"role": "assistant", "content": parts},
        {"role": "assistant", "content": "two"},
    ]
    path.write_text("\n".join([json.dumps(row)] * 3))
    found, _ = take(str(path), "train")
    assert found[0]["messages"][1]["content"] == [*parts, {"type": "text", "text": "two"}]


def test_odd_line_ends(tmp_path: Path) -> None:
    """What holds out the last conversations counts the lines that are read: none is taken for a blank one."""
    path, rows = tmp_path / "old.jsonl", [json.dumps(talk(f"q{i}", f"a{i}")) for i in range(5)]
    for content in ("\r".join(rows), "\ufeff\n" + "\n".join(rows) + "\n\u3000\n\xa0\n"):
        path.write_bytes(content.encode())
        train, val = take(str(path), "train")[0], take(str(path), "val")[0]
        assert [len(train), [say(c) for c in val]] == [4, [["u:q4", "a:a4"]]]


def test_mixture_weights(tmp_path: Path) -> None:
    for name in "ab":
        rows = [talk(f"{name}{i}", "x") for i in range(105)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    found, counts = take(f"{a}*2.5@40, {b}*0.25", "train")
    by = Counter(c["source"] for c in found)
    assert by == {str(a): 100, str(b): 25} and counts[str(a)]["kept"] == 40
    times = Counter(say(c)[0] for c in found if c["source"] == str(a))
    assert Counter(times.values()) == {3: 20, 2: 20}  # two whole passes, and half of a third
    head = Counter(c["source"] for c in found[:44])
    assert head == {str(a): 40, str(b): 4}  # 2.5 : 0.25, from the first line on
    again, _ = take(f"{a}*2.5@40, {b}*0.25", "train")
    assert again == found
    val, _ = take(f"{a}*2.5@40, {b}*0.25", "val")
    assert Counter(c["source"] for c in val) == {
        str(a): 2,
        str(b): 5,
    }  # caps shrink with it, weights do not
    # what one set has brought, the next does not bring again
    b.write_text(a.read_text())
    found, counts = take(f"{a},{b}", "train")
    assert len(found) == len({str(say(c)) for c in found}) == 100
    assert counts[str(a)]["duplicates"] + counts[str(b)]["duplicates"] == 100


@pytest.mark.parametrize(
    "text", ["", " , ", "chitchat*0", "chitchat@0", "chitchat, chitchat*2", "a*1000"]
)
def test_bad_mixtures(text: str) -> None:
    with pytest.raises(ConfigError, match="dialogues"):
        parse_mixture(text)


def list_said(texts: Iterable[str]) -> set[str]:
    """Return the turns of some texts that are long enough to be one conversation's own, normalised."""
    turns = (" ".join(turn.lower().split()) for text in texts for turn in text.split("\n"))
    return {turn for turn in turns if len(turn.split()) >= 6}


def test_a_chat_is_held_out_of_everything_or_of_nothing() -> None:
    """Joined on what was said: no chat that pretraining holds out is in any training set, and none that it
    was trained on is in any validation set, whatever a set makes of the chats.
    """
    documents = {
        split: [
            re.sub("^[AB]: ", "", text, flags=re.M) for text in read_documents("chitchat", split)
        ]
        for split in ("train", "val")
    }
    said = {split: list_said(texts) for split, texts in documents.items()}
    own = {"train": said["train"] - said["val"], "val": said["val"] - said["train"]}
    known = sum(not own["val"].isdisjoint(list_said([text])) for text in documents["val"])
    assert known > 250, "most chats held out can be told from the others"

    names = ["chitchat", *list_recipes(), "topic:movie film"]
    for split, other in (("train", "val"), ("val", "train")):
        sets = {name: stream_dialogues(name, split) for name in names}
        sets["both sides"] = stream_dialogues("chitchat", split, DialogueOptions(mirrored=True))
        sets["people"] = read_conversations("chitchat", split)
        for name, found in sets.items():
            texts = list_said(str(m["content"]) for c in found for m in c["messages"])
            assert own[other].isdisjoint(texts), f"{name} has chats of {other} in {split}"
            assert name == "faq" or not own[split].isdisjoint(texts), f"{name} is made of the chats"

    # What pretraining holds out and has seen nevertheless: greetings that nobody answered.
    seen = {text.lower() for text in documents["train"]}
    assert all("\n" not in text for text in documents["val"] if text.lower() in seen)


def test_every_answer_of_a_faq_is_learned_and_tested(tmp_path: Path) -> None:
    path = tmp_path / "faq.txt"
    path.write_text("Who made you?|A person.\nHow old are you?|One day.\nWHO MADE YOU?|Not you.\n")
    for name, answers in (("faq", FAQ.count("|")), (f"faq:{path}", 3)):
        train, val = ({tuple(say(c)) for c in take(name, split)[0]} for split in ("train", "val"))
        assert {answer for _, answer in train} == {answer for _, answer in val}
        assert len({answer for _, answer in val}) == len(val) == answers
        assert len(train) == (len(ASKING) - 1) * answers
        wordings = [{question.lower() for question, _ in split} for split in (train, val)]
        assert not wordings[0] & wordings[1]


def test_recipes_hold_out(tmp_path: Path) -> None:
    sizes = {}
    for name in list_recipes():
        train, val = take(f"{name}@200", "train")[0], take(f"{name}@200", "val")[0]
        assert len(train) > 3 * len(val) > 0 and not {str(c) for c in train} & {str(c) for c in val}
        sizes[name] = len(train)
    assert sizes["faq"] < sizes["topic:music"] == 200
    pirates, _ = take("style:pirate@50", "train")
    assert all(say(c)[1].endswith(("!", "\n")) or "!" in say(c)[1] for c in pirates)
    path = tmp_path / "faq.txt"
    path.write_text("Who made you?|A person.\nHow old are you?|One day.\n")
    found, _ = take(f"faq:{path}", "train")
    assert len(found) == 8 and {say(c)[1] for c in found} == {"a:A person.", "a:One day."}
    path.write_text("nothing here")
    with pytest.raises(DataError, match="question|answer"):
        take(f"faq:{path}", "train")
    for odd in (
        "~nobody-here/a.jsonl",
        f"{'zz ' * 100}.jsonl",
        "faq:~nobody-here/a",
        "topic:" + "zz " * 100,
    ):
        identify_mixture(f"faq,{odd}", "train", DialogueOptions())
        with pytest.raises(DataError, match="must be chitchat|cannot be read|is left in train"):
            take(odd, "train")
    with pytest.raises(DataError, match="is no recipe"):
        take("style:martian", "train")


def test_licence_before_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The licence and the gate are said, and only then is the Hub asked; without it the remedy is named."""
    said: list[Event] = []
    for name in SETS:
        with pytest.raises(HubError, match="copy it to"):
            take_events = stream_dialogues(
                name, "train", make_options(tmp_path), on_event=said.append
            )
            next(take_events)
    texts = [event.text for event in said]  # type: ignore[union-attr]
    assert len(texts) == len(SETS) and "not for commercial use" in texts[1] and "gated" in texts[2]
    assert "Llama 3.1 405B" in texts[3] and all("Licence: " in text for text in texts)
    order: list[str] = []

    def list_hub_files(repo: str) -> dict[str, int]:
        order.append("asked")
        return {
            "data/train-1.parquet": 5,
            "data/train-2.parquet": 6,
            "data/train-3.parquet": 7,
            "README": 1,
        }

    def fetch_files(files: Any, staging: Path, on_event: Any) -> None:
        order.extend(f"{f.repo}:{f.name}:{f.size}" for f in files)

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(dialogues, "list_hub_files", list_hub_files)
    monkeypatch.setattr(dialogues, "fetch_files", fetch_files)
    dialogues.prepare_set("lmsys", make_options(tmp_path), lambda event: order.append("told"))
    repo = "lmsys/lmsys-chat-1m"
    assert order == [
        "told",
        "asked",
        f"{repo}:data/train-1.parquet:5",
        f"{repo}:data/train-2.parquet:6",
    ]


def test_files_of_another_form(tmp_path: Path) -> None:
    """What was copied by hand may be anything."""
    persona, daily, magpie = (
        tmp_path / "dialogues" / name for name in ("persona", "dailydialog", "magpie")
    )
    for folder in (persona, daily, magpie):
        folder.mkdir(parents=True)
    head = b"user 1 personas,user 2 personas,Best Generated Conversation\na,b,"
    for content in (b"\xff\n", b'"User 1: ' + b"a" * 200_000 + b'"\n'):
        (persona / "a_train.csv").write_bytes(head + content)
        with pytest.raises(DataError, match="persona has a file of another form"):
            take("persona", "train", make_options(tmp_path))
    with zipfile.ZipFile(daily / "data.zip", "w") as file:
        file.writestr("dialogues.json", '[{"turns": 3}]')
    pq.write_table(pa.table({"messages": ["no list"]}), magpie / "train-1.parquet")
    for name in ("dailydialog", "magpie"):
        with pytest.raises(DataError, match=f"{name} has a file of another form"):
            take(name, "train", make_options(tmp_path))


def test_a_fetch_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of a set's files is not the set: what a kill left out is fetched by the next run."""
    asked: list[list[str]] = []

    def fetch_files(files: list[Any], staging: Path, tell: Any) -> None:
        asked.append([file.name for file in files])
        for file in files:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            file.path.write_bytes(b"x" * file.size)
            if len(asked) == 1:
                raise KeyboardInterrupt

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(
        dialogues, "list_hub_files", lambda repo: {f"data/train-{i}.parquet": 5 for i in (1, 2)}
    )
    monkeypatch.setattr(dialogues, "fetch_files", fetch_files)
    with pytest.raises(KeyboardInterrupt):
        dialogues.prepare_set("lmsys", make_options(tmp_path))
    for _ in range(2):
        dialogues.prepare_set("lmsys", make_options(tmp_path))
    assert asked == [["data/train-1.parquet", "data/train-2.parquet"], ["data/train-2.parquet"]]


def test_identity_follows_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(talk(str(i), "x")) for i in range(4)))
    names = [f"{path}", f"{path}*2", f"{path}@3", "chitchat", "topic:food"]
    found = [identify_mixture(name, "train", DialogueOptions()) for name in names]
    found += [identify_mixture(names[0], "val", DialogueOptions())]
    found += [identify_mixture(names[0], "train", DialogueOptions(language="German"))]
    path.write_text("\n".join(json.dumps(talk(str(i), "yy")) for i in range(4)))
    found += [identify_mixture(names[0], "train", DialogueOptions())]
    assert len(set(found)) == len(found)


def test_filter_knows_what_it_saw() -> None:
    seen = SeenFilter()
    texts = [f"text number {i}" for i in range(20_000)]
    assert sum(seen.add(text) for text in texts) >= 19_999
    assert not any(seen.add(text.upper().replace(" ", "  ")) for text in texts)


@pytest.mark.slow
def test_long_stream_takes_no_memory(tmp_path: Path) -> None:
    """The second half of a long mixture takes no more memory than the first."""
    folder = tmp_path / "dialogues" / "smol-smoltalk" / "data"
    rows = [
        {"messages": talk(f"question {i} " * 8, f"answer {i} " * 12), "source": "s"}
        for i in range(15_000)
    ]
    write_table(folder / "train-0.parquet", rows)
    path = tmp_path / "own.jsonl"
    path.write_text(
        "\n".join(json.dumps(talk(f"ask {i} " * 8, f"say {i} " * 12)) for i in range(15_000))
    )
    del rows
    tracemalloc.start()
    peaks = []
    for i, _ in enumerate(
        stream_dialogues(f"smol-smoltalk, {path}", "train", make_options(tmp_path)), 1
    ):
        if i == 4_000:
            tracemalloc.reset_peak()
        if i in (14_000, 28_000):
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()
    tracemalloc.stop()
    assert i > 28_000 and peaks[1] < peaks[0] + 2e6 and peaks[1] < 40e6
