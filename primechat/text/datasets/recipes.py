"""Recipes: small dialogue sets without a download, made from the embedded chats or from the user's own text.

`topic:<words>` selects the chats about a topic, `style:<name>` rewrites the answers in another manner of
speech, `faq` and `faq:<file>` turn questions and answers into chats. A chat made from a held-out chat is held
out too; faq holds out one wording of each question. All recipes are deterministic, and their rules are simple
on purpose, to be read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from primechat.errors import DataError
from primechat.text.corpora import read_chats
from primechat.text.datasets.hubsets import Raw
from primechat.text.plain import read_lines

TOPICS = {
    "music": "music song songs band bands guitar sing concert album piano rap rock",
    "food": "food eat eating cook cooking pizza dinner lunch breakfast restaurant chocolate cheese burger",
    "animals": "dog dogs cat cats pet pets puppy horse horses animal animals bird birds",
    "school": "school class classes college university major study studying exam exams professor homework",
}
PIRATE = {
    "hello": "ahoy",
    "hi": "ahoy",
    "hey": "ahoy",
    "yes": "aye",
    "yeah": "aye",
    "yep": "aye",
    "you": "ye",
    "your": "yer",
    "my": "me",
    "friend": "matey",
    "friends": "mateys",
    "is": "be",
    "are": "be",
    "am": "be",
    "the": "th'",
    "of": "o'",
    "and": "an'",
    "to": "t'",
    "good": "fine",
    "great": "mighty fine",
    "wow": "blimey",
    "cool": "shipshape",
    "money": "doubloons",
    "food": "grub",
    "house": "ship",
    "home": "port",
    "car": "ship",
    "work": "the deck",
    "really": "mighty",
    "very": "mighty",
    "no": "nay",
    "never": "ne'er",
    "for": "fer",
}
ENDINGS = ("Arr!", "Yo ho!", "Shiver me timbers!", "By th' seven seas!")
WORD = re.compile(r"[A-Za-z']+")
FAQ = """\
What is a token?|A token is a piece of text, often a word or a part of one, that the model reads as one number.
What is a language model?|A program that has learned to tell which token is likely to come next.
What is an embedding?|A list of numbers that stands for a token inside the model.
What is attention?|The step in which each token gathers what it needs from the tokens before it.
What is a layer?|One block of the model: attention first, then a small network for each token.
What is a parameter?|One of the numbers that training changes. A small model has millions of them.
What is the loss?|A measure of surprise: how little the model expected the token that really came.
What is training?|Showing the model text and moving its parameters a little, so that the text surprises it less.
What is a learning rate?|How far the parameters move at each step. Too far and the model forgets, too little and it stands still.
What is an optimizer?|The rule that turns gradients into changes of the parameters.
What is fine-tuning?|Training that goes on from a finished model with text of another kind.
What is a checkpoint?|A copy of all parameters on disk, from which a run can go on.
What is LoRA?|Two thin matrices beside each big one. Only they are trained, so the result is small and can be taken off again.
What is distillation?|A small model learns to give the same probabilities as a large one.
What is perplexity?|The number of tokens between which the model is, in effect, undecided.
What is temperature?|A dial for chance in writing. At zero the model always takes the likeliest token.
What is the context?|The tokens that the model can look back at when it writes the next one.
What is a tokenizer?|The part that cuts text into tokens and puts them together again.
What is overfitting?|Learning the training text by heart instead of what it has in common with new text.
What are bits per byte?|The loss for each byte of text. Lower is better, whatever the tokenizer.
"""  # noqa: E501
ASKING = (
    "{q}",
    "Can you tell me: {q}",
    "Hi! {q}",
    "I have a question. {q}",
    "{q} Please keep it short.",
)


def read_recipe(name: str, split: str) -> Iterator[Raw]:
    """Yield the conversations of a recipe's split.

    Args:
        name: `topic:music`, or `topic:` followed by other words separated by spaces; `style:pirate`,
            `style:loud` or `style:polite`; `faq`, or `faq:` followed by the path of a file with lines
            `question|answer`.
        split: train or val; a chat is in the same split as in `read_chats`.

    Raises:
        DataError: There is no such recipe, or its file has no line `question|answer`.
    """
    kind, _, what = name.partition(":")
    if kind == "topic" and what.strip():
        yield from pick_topic(set((TOPICS.get(what) or what).lower().split()), split)
    elif kind == "style" and what in STYLES:
        for turns in read_chats(split):
            said = [("user" if who == 0 else "assistant", text) for who, text in turns]
            styled = [(who, STYLES[what](t) if who == "assistant" else t) for who, t in said]
            yield Raw(styled, split)
    elif kind == "faq":
        yield from ask_questions(read_lines(Path(what)) if what else FAQ.splitlines(), name, split)
    else:
        raise DataError(f"dialogues={name!r} is no recipe; try {', '.join(list_recipes())}.")


def list_recipes() -> list[str]:
    """Return the recipes that need no words or file from the user."""
    return [*(f"topic:{t}" for t in TOPICS), *(f"style:{s}" for s in STYLES), "faq"]


def pick_topic(words: set[str], split: str) -> Iterator[Raw]:
    """Yield the chats of a split in which at least two messages contain one of the words."""
    for turns in read_chats(split):
        hits = sum(1 for _, text in turns if words & {w.lower() for w in WORD.findall(text)})
        if hits >= 2:
            yield Raw([("user" if who == 0 else "assistant", text) for who, text in turns], split)


def speak_pirate(text: str) -> str:
    """Return a sentence as a pirate in a film would say it.

    >>> speak_pirate("Hello my friend.")
    'Ahoy me matey. Arr!'
    """

    def swap(match: re.Match[str]) -> str:
        word = match[0]
        new = PIRATE.get(
            word.lower(), word[:-1] + "'" if len(word) > 4 and word.endswith("ing") else word
        )
        return new[0].upper() + new[1:] if word[0].isupper() else new

    return f"{WORD.sub(swap, text)} {ENDINGS[len(text) % len(ENDINGS)]}"


def speak_politely(text: str) -> str:
    """Return a sentence as a butler would say it, without exclamation marks."""
    calm = text.strip().rstrip("!.")
    return f"If I may say so, {calm[:1].lower() + calm[1:]}{'' if calm.endswith('?') else ', dear guest.'}"


STYLES: dict[str, Callable[[str], str]] = {
    "pirate": speak_pirate,
    "polite": speak_politely,
    "loud": lambda text: text.upper().rstrip(".!") + "!!!",
}


def ask_questions(lines: Iterator[str] | list[str], name: str, split: str) -> Iterator[Raw]:
    """Yield each answer with several wordings of its question, with the wordings mixed over the set.

    One wording of each question is held out, so that every answer is both trained on and evaluated.
    """
    cut = [line.partition("|") for line in lines if "|" in line]
    pairs = dict.fromkeys((question.strip(), answer.strip()) for question, _, answer in cut)
    if not pairs:
        raise DataError(f"{name} holds no line `question|answer`; write some.")

    # A question with two answers keeps one number, and with it the wording that is held out.
    numbers: dict[str, int] = {}
    for question, _ in pairs:
        numbers.setdefault(question.lower(), len(numbers))

    # A question's wordings follow each other from its number on; the last one is held out.
    shifts = range(len(ASKING) - 1) if split == "train" else [len(ASKING) - 1]
    for shift in shifts:
        for question, answer in pairs:
            wording = ASKING[(numbers[question.lower()] + shift) % len(ASKING)]
            yield Raw([("user", wording.format(q=question)), ("assistant", answer)], split)
