"""Conversations between models: many at once, turn by turn, each token with its entropy.

Each speaker sees its own turns as the assistant's and the other's as the user's; what no longer fits its
context is dropped, oldest first. The next turns of a batch of conversations are generated together and
written to disk; turns lost to a kill are drawn again from the same seeds. A loop shows model collapse: each
generation is finetuned on the conversations of the one before (Shumailov et al. 2024).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from primechat.checkpoint import registry
from primechat.checkpoint.run_dir import RunDirLock, read_frozen
from primechat.config import EvalConfig, FinetuneConfig, encode_config, find_difference
from primechat.config.autochat import AutochatConfig
from primechat.errors import ConfigError, DataError
from primechat.events import AutochatResult, OnEvent, PhaseEvent, ProgressEvent, Turn
from primechat.files.paths import parse_json, resolve_path, write_file
from primechat.infer.cpu import settle_threads
from primechat.infer.engine import Engine
from primechat.seeds import derive_seed
from primechat.stages.finetune import finetune
from primechat.stages.trainer import pick_device
from primechat.text.corpora import read_conversations

HUMAN = "human"  # in place of a model's name
TUNE_TOKENS = 2048  # per optimizer step when a generation is finetuned
STREAMS = 2  # version of the assignment of random streams: in 1, conversations shared them
EVAL_TOKENS = 4096  # per validation of a generation: few, as only its conversations matter here


def autochat(
    config: AutochatConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> AutochatResult:
    """Let a model talk to itself or to another, and return where the conversations are and their speed.

    With generations, the model is then finetuned on its conversations and talks again.

    Raises:
        ConfigError: the settings contradict those of existing conversations.
        PrimechatError: a model or a text cannot be used.
    """
    t_start, results = time.perf_counter(), list[AutochatResult]()
    model = config.model or str(registry.choose_model())
    for generation in range(config.generations + 1):
        tag = f"{config.tag}-g{generation}" if config.generations else config.tag
        part = replace(config, tag=tag, model=model, generations=0)
        results.append(run_conversations(part, on_event, stop, generation))
        if results[-1].stopped or generation == config.generations:
            break
        model = learn_conversations(config, results[-1], model, generation + 1, on_event, stop)
        if stop is not None and stop.is_set():
            break

    # One result for all generations.
    last = results[-1]
    whole = len(results) == config.generations + 1 and not last.stopped
    return replace(
        last,
        path=results[0].path,
        generations=tuple(one.path for one in results),
        stopped=not whole,
        total_s=time.perf_counter() - t_start,
    )


def learn_conversations(
    config: AutochatConfig,
    said: AutochatResult,
    model: str,
    generation: int,
    on_event: OnEvent | None,
    stop: threading.Event | None,
) -> str:
    """Finetune a model on its own and a share of human conversations; return the new model's identifier."""
    # Its own conversations, and as many human ones as the share asks for.
    talks = read_transcripts(said.path)
    own = [build_messages(turns) for turns in talks]
    n_human = round(len(own) * config.human_share / (1 - config.human_share))
    human = [talk["messages"] for talk in islice(read_conversations("chitchat", "train"), n_human)]
    path = registry.base_dir() / said.path / "learned.jsonl"
    mixed = [messages for messages in [*human, *own] if len(messages) > 1]
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in mixed]
    write_file(path, ("\n".join(lines) + "\n").encode())

    # Settings of a short finetuning.
    tag = f"{config.tag}-g{generation}"
    evaluation = EvalConfig(
        snapshots=False,
        sample_every=-1,
        every=config.tune_steps,
        tokens=EVAL_TOKENS,
        last_tokens=EVAL_TOKENS,
    )
    runtime = config.runtime
    if runtime.compile == "auto":
        runtime = replace(runtime, compile="off")  # compiling takes longer than so few steps
    # Without config.json, the run was killed before its first step and starts again.
    there = (registry.run_dir("sft", tag) / "config.json").exists()
    registry.mark_by_product(
        registry.run_dir("sft", tag), f"generation {generation} of {config.tag}"
    )
    result = finetune(
        FinetuneConfig(
            tag=tag,
            base=model,
            dialogues=str(path),
            steps=config.tune_steps,
            batch_tokens=TUNE_TOKENS,
            seed=config.seed,
            general="none",
            eval=evaluation,
            runtime=runtime,
            resume=config.resume and there,
        ),
        on_event=on_event,
        stop=stop,
    )
    return result.identifier


def run_conversations(
    config: AutochatConfig,
    on_event: OnEvent | None,
    stop: threading.Event | None,
    generation: int = 0,
) -> AutochatResult:
    """Write the conversations of one config, continuing those in its folder, and return the result.

    Turns written by an earlier version are kept; the rest is drawn from this version's random streams.
    """
    t_start, emit = time.perf_counter(), on_event or (lambda event: None)
    folder = registry.base_dir() / "autochat" / config.tag
    with RunDirLock(folder):
        # Opening turns, speakers, and the turns already written.
        openings = read_openings(config.openings, config.n_conversations)
        speakers = [
            Speaker(config, name or config.model) for name in (config.model, config.partner)
        ]
        if speakers[0].identifier == speakers[1].identifier:
            speakers[1] = speakers[0]
        lines = resume_turns(config, folder)
        emit(PhaseEvent(name="autochat", total=config.n_conversations * config.turns, unit="turns"))

        # Batch by batch, turn by turn.
        new_tokens, busy_s = 0, 0.0
        with (folder / "talks.jsonl").open("ab") as file:
            for start in range(0, config.n_conversations, config.batch_rows):
                rows = range(start, min(start + config.batch_rows, config.n_conversations))
                talks = {i: lines[i] for i in rows}
                for turn in range(min(map(len, talks.values())), config.turns):
                    if stop is not None and stop.is_set():
                        break
                    t_turn = time.perf_counter()
                    new = take_turn(config, speakers[turn % 2], turn, talks, openings, generation)
                    busy_s += time.perf_counter() - t_turn
                    new_tokens += sum(len(one.ids) for one in new)
                    for i, one in zip(rows, new, strict=True):
                        talks[i].append(one)
                        file.write(
                            json.dumps({"talk": i, "turn": turn, **vars(one)}).encode() + b"\n"
                        )
                    file.flush()
                    os.fsync(file.fileno())
                    emit(ProgressEvent(done=sum(map(len, lines))))

    done = sum(map(len, lines))
    return AutochatResult(
        tag=config.tag,
        path=str(folder.relative_to(registry.base_dir())),
        n_conversations=config.n_conversations,
        turns=config.turns,
        stopped=done < config.n_conversations * config.turns,
        tokens=new_tokens,
        tokens_per_s=new_tokens / max(busy_s, 1e-9),
        total_s=time.perf_counter() - t_start,
    )


class Speaker:
    """A model and its engine, as one side of the conversations."""

    def __init__(self, config: AutochatConfig, identifier: str) -> None:
        device = pick_device(config.runtime.device)
        model, tokenizer, meta = registry.open_model(
            identifier, device=device, dtype=config.runtime.dtype
        )
        settle_threads(model, min(config.batch_rows, config.n_conversations))
        self.engine, self.identifier = (
            Engine(model, tokenizer),
            str(meta.get("identifier", identifier)),
        )

    def render(self, turns: Sequence[Turn], speaker: int, persona: str, room: int) -> list[int]:
        """Return the prompt for a speaker's next turn: as many of the last turns as fit in `room` tokens."""
        # The prompt begins with a turn of the other speaker.
        first = next(i for i, turn in enumerate(turns) if turn.speaker != speaker)
        system = [{"role": "system", "content": persona}] if persona else []
        for start in range(first, len(turns), 2):
            messages = [
                {"role": "assistant" if turn.speaker == speaker else "user", "content": turn.text}
                for turn in turns[start:]
            ]
            ids = self.engine.tokenizer.render_for_completion({"messages": [*system, *messages]})
            if len(ids) <= room:
                return ids

        # Even one turn is too long: keep its end.
        return [ids[0], *ids[1 - self.engine.model.max_context // 2 :]]


def take_turn(
    config: AutochatConfig,
    speaker: Speaker,
    turn: int,
    talks: dict[int, list[Turn]],
    openings: Sequence[str],
    generation: int = 0,
) -> list[Turn]:
    """Return the next turn of each conversation, drawn from a random stream of its own.

    The stream is seeded by the seed, the generation, the conversation and the turn, so that a turn depends
    neither on the other conversations of its batch nor on the batch size.
    """
    # A turn taken from human text.
    side = turn % 2
    if turn == 0 or (config.human_every and turn % config.human_every == 0):
        texts = [openings[(i + turn) % len(openings)] for i in talks]
        return [Turn(speaker=side, model=HUMAN, text=text) for text in texts]

    # A turn written by the speaker.
    engine = speaker.engine
    room = max(engine.model.sequence_len - config.max_new_tokens, 1)
    prompts = [speaker.render(turns, side, config.personas[side], room) for turns in talks.values()]
    tokens = engine.measure_batch(
        prompts,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k or None,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        seeds=[derive_seed(config.seed, "talk", generation, i, turn) for i in talks],
    )

    # Text and measures of each token.
    new = []
    for row in tokens:
        stopped = bool(row) and row[-1].id in engine.tokenizer.stop_ids
        text = engine.tokenizer.decode([token.id for token in row[: len(row) - stopped]])
        new.append(
            Turn(
                speaker=side,
                model=speaker.identifier,
                text=text,
                ids=[token.id for token in row],
                logprob=[round(token.logprob, 4) for token in row],
                entropy=[round(token.entropy, 4) for token in row],
                varentropy=[round(token.varentropy, 4) for token in row],
                rank=[token.rank for token in row],
                stopped=stopped,
            )
        )
    return new


def read_openings(openings: str, count: int) -> list[str]:
    """Return opening turns, from held-out human conversations or the lines of a file."""
    if openings == "chitchat":
        firsts = (talk["messages"][0]["content"] for talk in read_conversations("chitchat", "val"))
        return list(islice((text for text in firsts if 8 <= len(text) <= 200), max(count, 64)))
    try:
        found = resolve_path(openings, "openings").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"openings={openings!r} cannot be read ({error}); give chitchat or a .txt file."
        ) from None
    lines = [line.strip() for line in found if line.strip()]
    if not lines:
        raise DataError(f"openings={openings!r} has no line of text; write one opening a line.")
    return lines


def resume_turns(config: AutochatConfig, folder: Path) -> list[list[Turn]]:
    """Return the turns already written, only those complete in a whole batch, after checking the config."""
    path, talks = folder / "config.json", [list[Turn]() for _ in range(config.n_conversations)]
    given = replace(config, resume=True)
    if path.is_file():
        if not config.resume:
            raise ConfigError(
                f"{folder} holds conversations; add --resume to go on, or change --tag."
            )
        frozen = read_frozen(folder, AutochatConfig)
        if difference := find_difference(frozen, given, ("runtime",)):
            raise ConfigError(
                f"{difference} (the conversations', then yours); drop it or change --tag."
            )

        # A turn that part of its batch lacks is drawn again.
        talks = read_transcripts(folder, config.n_conversations)
        for start in range(0, config.n_conversations, config.batch_rows):
            group = talks[start : start + config.batch_rows]
            whole = min(map(len, group))
            for turns in group:
                del turns[whole:]
    else:
        write_file(path, json.dumps(encode_config(given), indent=2).encode())

    lines = [
        json.dumps({"talk": i, "turn": turn, **vars(one)})
        for i, turns in enumerate(talks)
        for turn, one in enumerate(turns)
    ]
    write_file(folder / "talks.jsonl", "".join(line + "\n" for line in lines).encode())
    return talks


def read_transcripts(path: str | Path, n_conversations: int = 0) -> list[list[Turn]]:
    """Return the turns of each conversation in a folder, given absolute or relative to the base directory.

    Raises:
        DataError: the folder has no conversations.
    """
    file, talks = registry.base_dir() / path / "talks.jsonl", dict[int, list[Turn]]()
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror}); run `primechat autochat`."
        ) from None
    for line in lines:
        try:
            row: dict[str, Any] = parse_json(line)
            talk, turn = row.pop("talk"), row.pop("turn")
            turns = talks.setdefault(talk, [])
            if turn == len(turns):  # else the line is a duplicate or follows a gap
                turns.append(Turn(**row))
        except (ValueError, LookupError, TypeError):
            continue  # cut off by a kill
    return [talks.get(i, []) for i in range(max(n_conversations, max(talks, default=-1) + 1))]


def build_messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Return a conversation as messages for finetuning, up to the last turn of the second speaker."""
    roles = ("user", "assistant")
    messages = [{"role": roles[turn.speaker], "content": turn.text} for turn in turns]
    return messages[: len(messages) // 2 * 2]
