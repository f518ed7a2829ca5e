"""A detector of conversations that go round in circles, and the controls to test it with.

Decides what counts as a loop. A conversation is stuck if its last turn ends with a phrase said three times in
a row, or if three of its last four turns have few words that are new compared with the four turns before each
of them. A repetition that the conversation leaves again is not a loop. The detector compares words only, so
it misses a conversation that says the same thing in ever new words. Reference: Xu et al. 2022, Learning to
Break the Loop (sentences reinforce themselves); Holtzman et al. 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from primechat.events import Turn
from primechat.metrics.diversity import split_words

if TYPE_CHECKING:
    from primechat.protocols import ChatTokenizer

MIN_REPEATS = 3  # repeats of a phrase in a row; also repetitive turns among the last REACH
MIN_WORDS = 6  # covered by a repeated phrase in total: "no, no, no" is not a loop
NEAR = 0.7  # share of words said before from which a turn counts as repetitive
REACH = 4  # previous turns that a turn is compared with
SHORT = 3  # words: a shorter turn (ok, yes, thanks) is similar only to an equal one


@dataclass(frozen=True)
class Loop:
    """The start of a loop: its first `turn`, counted from 0, what repeats, and the period in turns."""

    turn: int
    kind: str  # phrase, turns or silence
    period: int


def find_phrase(words: Sequence[str]) -> int:
    """Return the length of the phrase that a text repeats at its end at least three times, or 0."""
    n = len(words)
    for period in range(1, n // MIN_REPEATS + 1):
        repeats = 1
        while (repeats + 1) * period <= n and list(words[n - period :]) == list(
            words[n - (repeats + 1) * period : n - repeats * period]
        ):
            repeats += 1
        if repeats >= MIN_REPEATS and repeats * period >= MIN_WORDS:
            return period
    return 0


def compare_turns(first: Sequence[str], second: Sequence[str]) -> float:
    """Return the share of words that two turns have in common, counting repetitions (Jaccard index)."""
    if min(len(first), len(second)) < SHORT:
        return float(list(first) == list(second))
    names = {word: i for i, word in enumerate(dict.fromkeys([*first, *second]))}
    counts = [
        np.bincount([names[word] for word in words], minlength=len(names))
        for words in (first, second)
    ]
    return float(np.minimum(*counts).sum() / np.maximum(*counts).sum())


def say_again(words: Sequence[str], before: Sequence[Sequence[str]]) -> bool:
    """Return whether a turn has hardly any words that the turns before it did not have."""
    if len(words) < SHORT:
        return list(words) in [list(turn) for turn in before]
    said = {word for turn in before for word in turn}
    return sum(word in said for word in words) >= NEAR * len(words)


def find_loop(texts: Sequence[str]) -> Loop | None:
    """Return the loop in which a conversation is stuck at its end, or None.

    Args:
        texts: the turns of the conversation.
    """
    turns = [split_words(text) for text in texts]
    phrases = [find_phrase([word for word in words if word.isalnum()] or words) for words in turns]
    again = [
        bool(phrases[t]) or say_again(words, turns[max(0, t - REACH) : t])
        for t, words in enumerate(turns)
    ]

    def is_stuck(end: int) -> bool:
        """Return whether the first `end` turns of the conversation are stuck at their end."""
        return end > 0 and (
            phrases[end - 1] > 0 or sum(again[max(0, end - REACH) : end]) >= MIN_REPEATS
        )

    end = len(turns)
    if not is_stuck(end):
        return None

    # Go back to the first turn after which it was stuck, then to the turn that began the loop.
    while is_stuck(end - 1):
        end -= 1
    window = range(max(0, end - REACH), end)
    many = sum(again[t] for t in window) >= MIN_REPEATS
    start = next(t for t in window if again[t]) if many else end - 1
    if phrases[start]:
        return Loop(start, "phrase", phrases[start])

    # The period is the distance at which the turns are most similar.
    likeness = {
        back: np.mean([compare_turns(turns[t], turns[t - back]) for t in range(start, len(turns))])
        for back in range(1, min(start, REACH) + 1)
    }
    kind = "turns" if any(turns[start:]) else "silence"
    return Loop(start, kind, max(likeness, key=lambda back: float(likeness[back])))


# Controls


def shuffle_turns(talks: Sequence[Sequence[str]], seed: int = 0) -> list[list[str]]:
    """Return conversations of the same lengths with all turns shuffled among them: no thread is left."""
    order = np.random.default_rng(seed).permutation(sum(map(len, talks)))
    flat = [text for talk in talks for text in talk]
    shuffled = iter([flat[i] for i in order])
    return [[next(shuffled) for _ in talk] for talk in talks]


def plant_loop(
    talk: Sequence[str], *, kind: str = "turns", period: int = 2, at: int = 4
) -> list[str]:
    """Return a conversation that loops from turn `at` on, to test a detector.

    Args:
        talk: conversation of at least `at` turns.
        kind: turns repeats the `period` turns before `at`; phrase repeats words within each turn.
        period: turns per repetition.
        at: the first turn that repeats.
    """
    kept = list(talk[:at])
    if kind == "phrase":
        return kept + [" ".join([" ".join(text.split()[:4])] * 6) for text in talk[at:]]
    return kept + [kept[at - period + i % period] for i in range(len(talk) - at)]


# What a model does with repetition


def measure_repeats(
    model: Any, tokenizer: ChatTokenizer, sentence: str, repeats: int = 12
) -> list[float]:
    """Return the mean probability of a sentence's tokens at each repetition of the sentence.

    Args:
        model: a GPT; one pass gives the logits of the whole text.
        tokenizer: its tokenizer.
        sentence: the text to repeat, separated by spaces.
        repeats: number of repetitions, at most as many as fit the model's sequence_len.

    Source: Xu et al. 2022, section 2: the probability of a sentence against its earlier occurrences.
    """
    import torch

    unit = tokenizer.encode(f" {sentence.strip()}")
    repeats = min(repeats, (model.sequence_len - 1) // len(unit))
    ids = torch.tensor([[tokenizer.bos_id, *unit * repeats]], device=model.device)
    with torch.inference_mode():
        logp = model(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None])[0, :, 0]
    return logp.exp().view(repeats, len(unit)).mean(1).tolist()


def embed_texts(model: Any, tokenizer: ChatTokenizer, texts: Sequence[str]) -> np.ndarray:
    """Return a vector for each text, (T, n_embd): the model's last hidden states averaged over its tokens."""
    import torch

    rows = []
    with torch.inference_mode():
        for text in texts:
            ids = [tokenizer.bos_id, *tokenizer.encode(text)][: model.sequence_len]
            states = model.hidden(torch.tensor([ids], device=model.device))[0]
            rows.append(states[1:].mean(0) if len(ids) > 1 else states[0])
    return torch.stack(rows).float().cpu().numpy()


# Turn by turn

MEASURES = {  # of a turn: (description, value at the top of the heat strip's scale)
    "entropy": ("how open its choices were, nats a token", 5.0),
    "surprise": ("how unlikely the model held its words, nats a token", 6.0),
    "said before": ("share of its three-word pieces that an earlier turn had", 1.0),
    "like its last": ("share of words in common with the speaker's turn before", 1.0),
    "new words": ("share of its words that stand nowhere before", 1.0),
    "words": ("its length in words", 40.0),
}


def measure_turns(turns: Sequence[Turn]) -> dict[str, np.ndarray]:
    """Return the MEASURES of each turn of a conversation, (T,) each; nan if there is nothing to measure.

    The token that ends a turn does not count, as turns of people (`measure_transcript`) have none.
    """
    found = {name: np.full(len(turns), np.nan) for name in MEASURES}
    words = [split_words(turn.text) for turn in turns]
    seen_words, seen_grams = set[str](), set[tuple[str, ...]]()
    for t, (turn, own) in enumerate(zip(turns, words, strict=True)):
        grams = [tuple(own[i : i + 3]) for i in range(len(own) - 2)]
        found["words"][t] = len(own)
        spoken = len(turn.entropy) - turn.stopped  # without the token that ends the turn
        if spoken > 0:
            found["entropy"][t] = np.mean(turn.entropy[:spoken])
            found["surprise"][t] = -np.mean(turn.logprob[:spoken])
        if grams and t:
            found["said before"][t] = np.mean([gram in seen_grams for gram in grams])
        if own and t:
            found["new words"][t] = np.mean([word not in seen_words for word in own])
        if t >= 2:
            found["like its last"][t] = compare_turns(own, words[t - 2])
        seen_words.update(own)
        seen_grams.update(grams)
    return found


def measure_transcript(model: Any, tokenizer: ChatTokenizer, texts: Sequence[str]) -> list[Turn]:
    """Return a conversation with a model's measures of each turn, as if the model were to say it.

    This makes human conversations comparable with a model's own: the entropy is that of the reading model,
    not of the writer.
    """
    import torch

    from primechat.infer.sampling import measure_logits

    turns = []
    for t, text in enumerate(texts):
        ids = tokenizer.encode(text)
        if not t or not ids:
            turns.append(Turn(speaker=t % 2, model="human", text=text))
            continue

        # The prompt: as many of the turns before as fit.
        for start in range((t + 1) % 2, t, 2):
            messages = [
                {"role": ("user", "assistant")[(i - start) % 2], "content": texts[i]}
                for i in range(start, t)
            ]
            prompt = tokenizer.render_for_completion({"messages": messages})
            if len(prompt) + len(ids) <= model.sequence_len:
                break

        # The turn's tokens, scored in one pass.
        row = [*prompt, *ids][-model.sequence_len :]
        kept = ids[-min(len(ids), len(row) - 1) :]
        with torch.inference_mode():
            logits = model(torch.tensor([row], device=model.device))[0, -len(kept) - 1 : -1]
            tokens = measure_logits(logits, torch.tensor(kept, device=model.device))
        figures: dict[str, Any] = {
            name: [getattr(token, name) for token in tokens]
            for name in ("logprob", "entropy", "varentropy", "rank")
        }
        turns.append(Turn(speaker=t % 2, model="human", text=text, ids=kept, **figures))
    return turns
