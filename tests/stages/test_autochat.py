"""Models that talk to each other: the turns, the files, resuming, generations; and the loop detector."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import VOCAB_SIZE, HistoryCache, HistoryModel, byte_tokenizer, measure_prediction

from primechat.checkpoint import registry
from primechat.cli.main import main
from primechat.config import (
    AutochatConfig,
    EvalConfig,
    FinetuneConfig,
    PretrainConfig,
    RuntimeConfig,
)
from primechat.config.model import GPTConfig
from primechat.errors import ConfigError, DataError
from primechat.events import Event, ProgressEvent, Turn
from primechat.infer.engine import Engine
from primechat.metrics import loops
from primechat.model.gpt import GPT
from primechat.stages import autochat as stage
from primechat.stages.autochat import HUMAN, Speaker, autochat, build_messages, read_transcripts
from primechat.stages.finetune import finetune
from primechat.stages.pretrain import pretrain

RUNTIME = RuntimeConfig(device="cpu", threads=1, compile="off", micro_batch_rows=2, dtype="float32")
EVAL = EvalConfig(snapshots=False, sample_every=-1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def base(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base directory with a tiny chat model, made once."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    if not (home / "base_checkpoints").exists():
        text = home / "text.txt"
        text.write_text("\n\n".join("hello there, how are you? " * 90 for _ in range(6)))
        dialogues = home / "dialogues.jsonl"
        talk = [{"role": ("user", "assistant")[i % 2], "content": f"well, {i}"} for i in range(4)]
        dialogues.write_text((json.dumps({"messages": talk}) + "\n") * 6)
        byte_tokenizer().save(home / "tokenizer")
        shape = GPTConfig.modern(2, vocab_size=VOCAB_SIZE, sequence_len=128, head_dim=16)
        pretrain(
            PretrainConfig(
                tag="d2",
                model=shape,
                corpus=str(text),
                batch_tokens=256,
                steps=2,
                eval=EVAL,
                runtime=RUNTIME,
            )
        )
        finetune(
            FinetuneConfig(
                tag="d2",
                dialogues=str(dialogues),
                batch_tokens=256,
                steps=2,
                eval=EVAL,
                runtime=RUNTIME,
            )
        )
    return home


def build(**changes: Any) -> AutochatConfig:
    small = dict(
        tag="t", model="sft/d2", n_conversations=3, turns=4, max_new_tokens=6, runtime=RUNTIME
    )
    return AutochatConfig(**{**small, **changes})


def test_turns_alternate_and_are_measured(base: Path) -> None:
    result = autochat(build(tag="plain", personas=("You are A.", "")))
    talks = read_transcripts(result.path)
    assert [len(turns) for turns in talks] == [4, 4, 4] and not result.stopped
    assert {turns[0].model for turns in talks} == {HUMAN} and talks[0][1].model == "sft/d2@2"
    assert [turn.speaker for turn in talks[0]] == [0, 1, 0, 1]
    model, tokenizer, _ = registry.open_model("sft/d2")
    turn = talks[1][2]
    speaker = Speaker(build(), "sft/d2")
    prompt = speaker.render(talks[1][:2], 0, "You are A.", 122)
    seen = tokenizer.decode(prompt)
    assert (
        "You are A." in seen and talks[1][0].text not in seen
    )  # its own opening is not the other's
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + turn.ids]))[0, len(prompt) - 1 : -1].numpy()
    entropy, varentropy = measure_prediction(logits)
    assert turn.entropy == pytest.approx(entropy, abs=2e-3)
    assert turn.varentropy == pytest.approx(varentropy, abs=5e-3)
    own = logits[np.arange(len(turn.ids)), turn.ids]
    assert turn.rank == [int((row > x).sum()) for row, x in zip(logits, own, strict=True)]
    assert result.tokens == sum(len(turn.ids) for turns in talks for turn in turns)


def test_what_does_not_fit_is_forgotten_from_the_front() -> None:
    speaker = Speaker(build(), "sft/d2")
    turns = [loops_turn(i) for i in range(9)]
    prompt = speaker.engine.tokenizer.decode(speaker.render(turns, 1, "", 40))
    assert "turn 8" in prompt and "turn 7" in prompt and "turn 0" not in prompt
    whole = speaker.engine.tokenizer.decode(speaker.render(turns, 1, "", 10_000))
    assert all(f"turn {i}" in whole for i in range(9))
    prompt = speaker.render([Turn(speaker=0, model="x", text="word " * 999 + "END")], 1, "", 40)
    tokenizer = (
        speaker.engine.tokenizer
    )  # one turn alone is too long: its end, and whose turn it is, stay
    assert len(prompt) == speaker.engine.model.max_context // 2 and prompt[0] == tokenizer.bos_id
    assert tokenizer.decode(prompt).endswith("word END<|user_end|><|assistant_start|>")


def loops_turn(i: int) -> Any:
    return Turn(speaker=i % 2, model="x", text=f"turn {i}")


def test_a_killed_run_goes_on_the_same(base: Path) -> None:
    whole = autochat(build(tag="whole", n_conversations=5, batch_rows=2))
    stop, seen = threading.Event(), list[float]()

    def hear(event: Event) -> None:
        if isinstance(event, ProgressEvent):
            seen.append(event.done)
            if len(seen) == 5:
                stop.set()

    part = autochat(build(tag="part", n_conversations=5, batch_rows=2), on_event=hear, stop=stop)
    assert part.stopped and 0 < sum(map(len, read_transcripts(part.path))) < 20
    file = base / part.path / "talks.jsonl"
    file.write_bytes(file.read_bytes()[:-30])  # a kill tears the last line
    with pytest.raises(ConfigError, match="--resume"):
        autochat(build(tag="part", n_conversations=5, batch_rows=2))
    with pytest.raises(ConfigError, match="temperature"):
        autochat(build(tag="part", n_conversations=5, batch_rows=2, resume=True, temperature=0.5))
    done = autochat(build(tag="part", n_conversations=5, batch_rows=2, resume=True))
    assert not done.stopped and read_transcripts(done.path) == read_transcripts(whole.path)
    again = autochat(build(tag="part", n_conversations=5, batch_rows=2, resume=True))
    assert again.tokens == 0 and read_transcripts(again.path) == read_transcripts(whole.path)


class UniformModel(HistoryModel):
    """A model to which all 256 bytes are equally likely: what it writes is its random numbers alone."""

    def __init__(self) -> None:
        super().__init__(sequence_len=64, max_context=256)

    def advance(self, ids: torch.Tensor, cache: HistoryCache) -> torch.Tensor:
        logits = torch.full((ids.shape[0], VOCAB_SIZE), -torch.inf)
        logits[:, :256] = 0.0
        return logits


def write_uniform(tag: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[list[Turn]]:
    """Let the model of uniform logits talk to itself; return the turns of each conversation."""
    found = (UniformModel(), byte_tokenizer(), {"identifier": "uniform"})
    monkeypatch.setattr(registry, "open_model", lambda *names, **options: found)
    small: Any = dict(top_k=0, temperature=1.0, max_new_tokens=8, batch_rows=32)
    return read_transcripts(autochat(build(tag=tag, **{**small, **changes})).path)


def test_no_two_places_write_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """With uniform logits a text is its stream: 64 conversations of 40 turns, and two seeds more."""
    whole = write_uniform("uniform", monkeypatch, n_conversations=64, turns=40)
    more = [
        write_uniform(f"uniform-{seed}", monkeypatch, n_conversations=16, turns=40, seed=seed)
        for seed in (1, 2)
    ]
    talks = [*whole, *more[0], *more[1]]
    texts = [tuple(turn.ids) for turns in talks for turn in turns[1:]]
    assert len(texts) == 96 * 39 and all(len(ids) == 8 for ids in texts)
    assert len(set(texts)) == len(texts)
    firsts = {ids[0] for ids in texts}
    assert len(firsts) == 256, "first tokens of independent streams are spread over the vocabulary"


def test_a_conversation_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on how many are written at once, nor on how many there are."""
    whole = write_uniform("alone-32", monkeypatch, n_conversations=12, turns=6)
    assert write_uniform("alone-5", monkeypatch, n_conversations=12, turns=6, batch_rows=5) == whole
    assert (
        write_uniform("alone-few", monkeypatch, n_conversations=3, turns=6, batch_rows=1)
        == whole[:3]
    )


def test_generations_draw_from_streams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "learn_conversations", lambda *args: "uniform")
    first = write_uniform("own", monkeypatch, n_conversations=4, turns=4, generations=1)
    second = read_transcripts("autochat/own-g1")
    texts = [turn.text for turns in [*first, *second] for turn in turns[1:]]
    assert len(texts) == len(set(texts)) == 2 * 4 * 3


def test_seeds_partners_and_human_turns(base: Path) -> None:
    one, two = (autochat(build(tag=f"seed{i}", seed=i)) for i in (0, 1))
    said = [[turn.text for turn in turns] for turns in read_transcripts(one.path)]
    assert said != [[turn.text for turn in turns] for turns in read_transcripts(two.path)]
    assert len({turns[1] for turns in said}) > 1
    mixed = read_transcripts(
        autochat(build(tag="mixed", partner="shipped/sft", turns=6, human_every=4)).path
    )
    assert [turn.model for turn in mixed[0]] == [
        HUMAN,
        mixed[0][1].model,
        "sft/d2@2",
        mixed[0][1].model,
        HUMAN,
        mixed[0][1].model,
    ]
    assert mixed[0][1].model.startswith("shipped/sft")


def test_generations_learn_from_their_talk(base: Path) -> None:
    result = autochat(
        build(tag="gen", generations=2, human_share=0.5, tune_steps=1, n_conversations=4)
    )
    assert result.generations == ("autochat/gen-g0", "autochat/gen-g1", "autochat/gen-g2")
    assert [read_transcripts(path)[0][1].model for path in result.generations] == [
        "sft/d2@2",
        "sft/gen-g1@1",
        "sft/gen-g2@1",
    ]
    lines = (base / "autochat/gen-g0/learned.jsonl").read_text(encoding="utf-8").splitlines()
    own = [build_messages(turns) for turns in read_transcripts("autochat/gen-g0")]
    assert len(lines) == 8 and [json.loads(line)["messages"] for line in lines[4:]] == own
    # a kill while finetune measures the machine leaves a folder without settings
    shutil.rmtree(base / "chatsft_checkpoints/gen-g2")
    (base / "chatsft_checkpoints/gen-g2").mkdir()
    again = build(
        tag="gen", generations=2, human_share=0.5, tune_steps=1, n_conversations=4, resume=True
    )
    assert (
        not autochat(again).stopped and (base / "chatsft_checkpoints/gen-g2/config.json").exists()
    )


def test_command_line_and_refusals(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    openings = tmp_path / "openings.txt"
    openings.write_text("Ahoy!\n\nWho goes there?\n")
    words = [
        "autochat",
        "--model",
        "sft/d2",
        "--tag",
        "cli",
        "--n_conversations",
        "2",
        "--turns",
        "2",
        "--max_new_tokens",
        "3",
    ]
    words += ["--openings", str(openings), "--runtime.device", "cpu"]
    assert main(words) == 0 and "2 conversations of 2 turns" in capsys.readouterr().out
    assert [turns[0].text for turns in read_transcripts("autochat/cli")] == [
        "Ahoy!",
        "Who goes there?",
    ]
    alone = {"n_conversations": 1, "generations": 1}  # nothing would be held out
    for wrong in (
        {"turns": 1},
        {"human_share": 1.0},
        {"temperature": -1},
        {"personas": ("a",)},
        alone,
    ):
        with pytest.raises(ConfigError):
            build(**wrong)
    (tmp_path / "empty.txt").write_text("\n")
    for path in ("nowhere.txt", str(tmp_path / "empty.txt")):
        with pytest.raises(DataError, match="openings"):
            autochat(build(tag="wrong", openings=path))
    with pytest.raises(DataError, match="primechat autochat"):
        read_transcripts("autochat/none")


def test_rows_of_different_lengths_decode_as_alone() -> None:
    """The short way for one token a row, with windows: against the plain pass over the whole text."""
    for make in (GPTConfig.modern, GPTConfig.classic):
        model = GPT(make(4, vocab_size=VOCAB_SIZE, sequence_len=32))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=0.2, generator=generator)
        model.requires_grad_(False).eval()
        prompts = [list(range(n, 3 * n)) for n in (3, 20, 11, 45)]
        found = Engine(model, byte_tokenizer()).measure_batch(
            prompts, max_new_tokens=12, stop_ids=(), seed=3
        )
        for prompt, tokens in zip(prompts, found, strict=True):
            ids = [token.id for token in tokens]
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
            own = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
            assert [token.logprob for token in tokens] == pytest.approx(own.tolist(), abs=2e-4)


# ---- loops

TALK = [
    "Hello, how are you today?",
    "I am fine, thanks. I went to the market this morning.",
    "What did you buy there?",
    "Some apples and a loaf of bread for dinner.",
    "That sounds great, do you bake too?",
    "Only on Sundays, when I have time.",
    "My mother bakes every day of the week.",
    "Lucky you! What does she make best?",
    "Plum cake, it is the best in town.",
    "Then I must come and visit you soon.",
    "Please do, we live near the old mill.",
    "I know it, there is a bridge.",
]


def test_planted_loops_are_found_and_talk_is_not() -> None:
    assert loops.find_loop(TALK) is None and loops.find_loop([]) is None
    assert all(loops.find_loop(talk) is None for talk in loops.shuffle_turns([TALK[:6], TALK[6:]]))
    for period in (1, 2, 3, 4):
        for at in (4, 6):
            found = loops.find_loop(loops.plant_loop(TALK, period=period, at=at))
            assert found is not None and found.kind == "turns" and at <= found.turn <= at + period
            assert found.period == period
    phrase = loops.find_loop(loops.plant_loop(TALK, kind="phrase", at=5))
    assert phrase == loops.Loop(5, "phrase", 4)
    assert loops.find_loop([*TALK[:3], "", "", "", ""]) == loops.Loop(4, "silence", 1)
    assert loops.find_loop(["no, no, no", "yes"]) is None
    assert loops.find_loop(["I like it very much. " * 4]) == loops.Loop(0, "phrase", 5)


def test_near_copies_count() -> None:
    near = [
        f"I really like {thing} very much, do you?" for thing in ("dogs", "cats", "birds", "fish")
    ]
    found = loops.find_loop([*TALK[:2], *near])
    assert found is not None and found.turn == 3
    changed = [
        "I saw the new film and liked it",
        "the film is new and I liked it",
        "I liked the new film, it is fun",
    ]
    round_again = [*changed, "it is the new film that I liked", "the new film is fun, I liked it"]
    found = loops.find_loop([*TALK[:4], *round_again])
    assert found is not None and found.turn == 5, "the same words in another order"
    assert loops.find_loop([*TALK[:4], *round_again, *TALK[4:7]]) is None, (
        "a loop that is left again"
    )
    assert loops.say_again(["b", "a", "a"], [["a"], ["b"]]) and not loops.say_again(
        ["a", "b", "c"], [["a", "b"]]
    )
    assert loops.compare_turns(["a", "b", "b"], ["b", "c", "c"]) == pytest.approx(1 / 5)
    assert (
        loops.compare_turns(["ok"], ["ok"]) == 1
        and loops.compare_turns(["ok"], ["ok", "then"]) == 0
    )


def test_shuffling_keeps_the_turns() -> None:
    talks = [TALK[:5], TALK[5:]]
    shuffled = loops.shuffle_turns(talks, seed=1)
    assert [len(talk) for talk in shuffled] == [5, 7] and shuffled != talks
    assert sorted(sum(shuffled, [])) == sorted(TALK)


def test_repeats_and_embeddings() -> None:
    model, tokenizer, _ = registry.open_model("shipped/sft")
    found = loops.measure_repeats(model, tokenizer, "I like to eat pizza with my friends.", 6)
    assert len(found) == 6 and all(0 < p < 1 for p in found)
    unit = tokenizer.encode(" I like to eat pizza with my friends.")
    with torch.inference_mode():
        p = model(torch.tensor([[tokenizer.bos_id, *unit]])).softmax(-1)[0]
    first = [float(p[i, token]) for i, token in enumerate(unit)]
    assert found[0] == pytest.approx(np.mean(first), rel=1e-3)
    vectors = loops.embed_texts(model, tokenizer, ["hello there", "", "hello there"])
    assert vectors.shape == (3, model.config.n_embd) and np.allclose(vectors[0], vectors[2])
