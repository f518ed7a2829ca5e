from __future__ import annotations

import ctypes
import json
import math
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import VOCAB_SIZE, HistoryModel, ScriptModel, byte_tokenizer

from primechat.checkpoint.registry import open_model
from primechat.config import GPTConfig
from primechat.errors import CheckpointError, ConfigError
from primechat.infer import engine as engine_module
from primechat.infer.cpu import keep_freed_memory, settle_threads
from primechat.infer.engine import PREFILL_CHUNK, Engine
from primechat.infer.sampling import draw_floats, sample_logits, seed_row
from primechat.model.gpt import GPT
from primechat.protocols import ChatTokenizer, LanguageModel

TOKENIZER = byte_tokenizer()
BOS, END = TOKENIZER.stop_ids
CUE = TOKENIZER.special("<|assistant_start|>")
USER = [{"role": "user", "content": "hi"}]


def script(*parts: str | int) -> Engine:
    """Return an engine that replies with the given text and tokens."""
    ids = [i for p in parts for i in (TOKENIZER.encode(p) if isinstance(p, str) else [p])]
    return Engine(ScriptModel([*ids, END], CUE, sequence_len=200, max_context=2000), TOKENIZER)


def tiny_gpt(modern: bool = True) -> GPT:
    make = GPTConfig.modern if modern else GPTConfig.classic
    shape = dict(vocab_size=VOCAB_SIZE, sequence_len=8)
    model = GPT(make(2, **shape))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3, generator=generator)
    return model.eval()


def unbatched(model: Any, prompt: list[int], n: int, seed: int = 0, **cuts: Any) -> list[int]:
    """Sample without the engine: the whole history is read anew for each token."""
    draws, ids = draw_floats(seed), list(prompt)
    with torch.inference_mode():
        for _ in range(n):
            if isinstance(model, GPT):
                logits = model(torch.tensor([ids]))[:, -1]
            else:
                logits = model.score(ids)[None]
            ids.append(int(sample_logits(logits, [draws], **cuts)))
    return ids[len(prompt) :]


CUTS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.2, "top_p": 0.7},
]


@pytest.mark.parametrize("cuts", CUTS)
def test_generate_equals_uncached(cuts: dict[str, Any]) -> None:
    model = HistoryModel()
    got = list(
        Engine(model, TOKENIZER).generate(
            [BOS, 5, 6], max_new_tokens=40, seed=7, stop_ids=(), **cuts
        )
    )
    assert got == unbatched(model, [BOS, 5, 6], 40, 7, **cuts)
    assert model.calls == [(1, 3)] + [(1, 1)] * 39, "the prompt is read once, the last token never"


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("modern", [True, False])
def test_gpt_equals_uncached(modern: bool, cuts: dict[str, Any]) -> None:
    model = tiny_gpt(modern)
    assert isinstance(model, LanguageModel) and isinstance(TOKENIZER, ChatTokenizer)
    prompts = [[BOS, 65, 66, 67], [BOS], [BOS, *range(30)]]
    engine = Engine(model, TOKENIZER)
    expected = [unbatched(model, p, 20, seed_row(3, i), **cuts) for i, p in enumerate(prompts)]
    for i, prompt in enumerate(prompts):  # beyond sequence_len, whatever the windows
        options: dict[str, Any] = dict(max_new_tokens=20, stop_ids=(), **cuts)
        assert list(engine.generate(prompt, seed=seed_row(3, i), **options)) == expected[i]
    assert engine.generate_batch(prompts, seed=3, **options) == expected


@pytest.mark.parametrize("modern", [True, False])
def test_prompts_read_together_equal_each_alone(
    modern: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_gpt(modern)
    prompts = [[BOS, *range(60 + i, 60 + i + n)] for i, n in enumerate((9, 2, 12, 7, 9, 8, 30, 10))]
    calls: list[tuple[int, int]] = []
    together = model.read_padded

    def read(ids: torch.Tensor, counts: list[int], cache: Any) -> torch.Tensor:
        calls.append((ids.shape[0], ids.shape[1]))
        return together(ids, counts, cache)

    monkeypatch.setattr(model, "read_padded", read)
    cuts: dict[str, Any] = dict(max_new_tokens=20, stop_ids=(), temperature=1.0)
    found = Engine(model, TOKENIZER).generate_batch([*prompts, prompts[-1]], seed=4, **cuts)
    assert calls == [(5, 11)], (
        "like lengths are read in one pass, the short and the long ones alone"
    )
    places = [*prompts, prompts[-1]]
    assert found == [unbatched(model, p, 20, seed_row(4, i)) for i, p in enumerate(places)]
    counts = [len(p) for p in prompts]
    rows = torch.tensor([[*p, *[0] * (max(counts) - len(p))] for p in prompts])
    cache = model.new_cache(len(prompts), 40)
    logits = together(rows, counts, cache)
    step = model.advance(rows[:, :1], cache)
    for i, prompt in enumerate(prompts):
        alone = model.new_cache(1, 40)
        with torch.inference_mode():
            first, second = (
                model.advance(torch.tensor([prompt]), alone),
                model.advance(rows[:1, :1], alone),
            )
        torch.testing.assert_close(logits[i : i + 1], first, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(step[i : i + 1], second, rtol=1e-4, atol=1e-4)
    assert cache.lengths == [n + 1 for n in counts]


def test_repetition_penalty() -> None:
    model, prompt, penalty = HistoryModel(), [BOS, *range(100)], 1.5
    engine, ids = Engine(model, TOKENIZER), list(prompt)
    for _ in range(30):  # token by token in plain Python
        scores = model.score(ids).tolist()
        for i in set(ids) - {BOS, END}:
            scores[i] = scores[i] / penalty if scores[i] > 0 else scores[i] * penalty
        ids.append(max(range(VOCAB_SIZE), key=lambda i: scores[i]))
    options: dict[str, Any] = dict(max_new_tokens=30, temperature=0, stop_ids=(BOS, END))
    ids = ids[len(prompt) :]
    expected = ids[: ids.index(END) + 1 if END in ids else None]
    assert list(engine.generate(prompt, repetition_penalty=penalty, **options)) == expected
    assert list(engine.generate(prompt, **options)) != expected
    both = engine.generate_batch([prompt, [BOS, 9]], repetition_penalty=penalty, **options)
    assert both[0] == [i for i in expected if i != END], "each row has its own history"
    tokens = list(engine.stream(prompt, repetition_penalty=penalty, **options))
    with torch.inference_mode():
        plain = model.score([*prompt, tokens[0].id]).log_softmax(-1)[tokens[1].id]
    assert tokens[1].logprob == pytest.approx(float(plain), abs=1e-5), (
        "measures are the model's own"
    )
    with pytest.raises(ConfigError, match="repetition_penalty=0.5"):
        engine.generate(prompt, max_new_tokens=1, repetition_penalty=0.5)


@pytest.mark.parametrize("cuts", CUTS)
def test_batch_equals_single_runs(cuts: dict[str, Any]) -> None:
    model = HistoryModel()
    engine = Engine(model, TOKENIZER)
    prompts = [[BOS, 1], [BOS, 2, 3, 4], [7], [7]]
    stop_ids = range(0, VOCAB_SIZE, 9)  # rows stop at different steps
    options: dict[str, Any] = dict(max_new_tokens=30, stop_ids=stop_ids, **cuts)
    singles = [
        list(engine.generate(p, seed=seed_row(5, 2 * j + k), **options))
        for j, p in enumerate(prompts)
        for k in (0, 1)
    ]
    expected = [s[:-1] if s[-1] in stop_ids else s for s in singles]
    model.calls.clear()
    assert engine.generate_batch(prompts, num_samples=2, seed=5, **options) == expected
    assert model.calls[:3] == [(1, 2), (1, 4), (1, 1)], "equal neighbours are read once"
    passes = [sum(len(s) > n for s in singles) for n in range(1, max(map(len, singles)))]
    assert [b for b, _ in model.calls[3:]] == passes, "finished rows leave the batch"
    assert len(set(passes)) > 1 or cuts["temperature"] == 0


@pytest.mark.parametrize("folder", ["oct2025/d2", "head/d2", "head_d3/d3"])
def test_greedy_equals_nanochat(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    root = Path(__file__).parents[1] / "fixtures" / "nanochat" / folder.split("/")[0]
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(root))
    engine = Engine(*open_model(f"base/{folder.split('/')[1]}")[:2])
    table = "bf16_rotary" if folder.startswith("oct") else "f32_rotary"
    prompts = json.loads((root / "expected.json").read_text())["prompts"]
    options: dict[str, Any] = dict(max_new_tokens=32, temperature=0)
    for prompt in prompts:
        assert list(engine.generate(prompt["ids"], **options)) == prompt[f"engine32_{table}"]
        assert (
            list(engine.generate(prompt["ids"], stop_ids=(), **options))
            == prompt[f"greedy32_{table}"]
        )
    together = engine.generate_batch([p["ids"] for p in prompts], stop_ids=(), **options)
    assert together == [p[f"greedy32_{table}"] for p in prompts]


def test_samples_differ() -> None:
    engine = Engine(HistoryModel(), TOKENIZER)
    texts = engine.generate_batch([[BOS]], num_samples=6, max_new_tokens=8, stop_ids=())
    assert len({t[0] for t in texts}) > 2, "each row samples its own first token"
    assert texts == engine.generate_batch([[BOS]], num_samples=6, max_new_tokens=8, stop_ids=())
    assert engine.generate_batch([], max_new_tokens=3) == []


def test_stop_ids() -> None:
    engine = script("abc")
    ids = TOKENIZER.render_for_completion({"messages": USER})
    assert list(engine.generate(ids, max_new_tokens=9)) == [*b"abc", END], (
        "the stop token is yielded"
    )
    assert list(engine.generate(ids, max_new_tokens=9, stop_ids=())) == [*b"abc"] + [END] * 6
    assert list(engine.generate(ids, max_new_tokens=9, stop_ids=[98])) == [*b"ab"]
    assert engine.generate_batch([ids], max_new_tokens=9) == [[*b"abc"]], (
        "the stop token is dropped"
    )
    assert list(engine.generate(ids, max_new_tokens=2)) == [*b"ab"]
    assert list(engine.generate(ids, max_new_tokens=0)) == []
    assert list(script().generate([*ids], max_new_tokens=9)) == [END]


def test_context_ends() -> None:
    engine = Engine(HistoryModel(sequence_len=4, max_context=40), TOKENIZER)
    assert len(list(engine.generate([BOS] * 10, max_new_tokens=99, stop_ids=()))) == 30
    assert list(engine.generate([BOS] * 40, max_new_tokens=9)) == []
    rows = engine.generate_batch([[BOS] * 40, [BOS] * 38], max_new_tokens=9, stop_ids=())
    assert [len(r) for r in rows] == [0, 2]
    reply = engine.complete("x" * 20, stop_ids=(), max_new_tokens=99)
    reply.read()
    assert reply.stats.stop_reason == "context" and len(reply.tokens) == 19
    assert reply.stats.context_used == 10
    reply = engine.complete("x" * 20, stop_ids=(), max_new_tokens=19)
    reply.read()
    assert reply.stats.stop_reason == "length"


def test_gpt_reaches_max_context() -> None:
    model = tiny_gpt()
    n = model.max_context - 3
    assert (
        len(list(Engine(model, TOKENIZER).generate([BOS, 1, 2], max_new_tokens=999, stop_ids=())))
        == n
    )


def test_long_prompt_in_pieces() -> None:
    model = HistoryModel(max_context=3 * PREFILL_CHUNK)
    prompt = [i % 200 for i in range(2 * PREFILL_CHUNK + 5)]
    got = list(Engine(model, TOKENIZER).generate(prompt, max_new_tokens=2, stop_ids=()))
    assert model.calls == [(1, PREFILL_CHUNK), (1, PREFILL_CHUNK), (1, 5), (1, 1)]
    assert got == unbatched(model, prompt, 2)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_cancel_within_a_token(n: int) -> None:
    model, cancel = HistoryModel(), threading.Event()
    engine = Engine(model, TOKENIZER)
    if n == 0:
        cancel.set()
    seen = []
    for token in engine.generate([BOS], max_new_tokens=50, stop_ids=(), cancel=cancel):
        seen.append(token)
        if len(seen) == n:
            cancel.set()
    assert len(seen) == n and len(model.calls) == n, "after the event is set nothing is computed"


def test_cancel_from_a_thread_while_computing() -> None:
    model, cancel = HistoryModel(max_context=4 * PREFILL_CHUNK), threading.Event()
    model.on_advance = cancel.set
    engine = Engine(model, TOKENIZER)
    assert list(engine.generate([BOS] * 3 * PREFILL_CHUNK, max_new_tokens=5, cancel=cancel)) == []
    assert len(model.calls) == 1, "the rest of the prompt is not read"
    cancel.clear()
    model.on_advance = lambda: cancel.set() if len(model.calls) == 4 else None
    reply = engine.complete("abc", stop_ids=(), cancel=cancel)
    reply.read()
    assert len(reply.tokens) == 3 and reply.stats.stop_reason == "cancelled" and reply.stats.final


def test_grad_mode_is_the_callers() -> None:
    engine = Engine(tiny_gpt(), TOKENIZER)
    runs: list[Any] = [
        engine.generate([BOS], max_new_tokens=3, stop_ids=()),
        engine.stream([BOS], max_new_tokens=3, stop_ids=()),
        engine.complete("abc", max_new_tokens=3, stop_ids=()),
    ]
    for run in runs:
        for _ in run:
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
            weight = torch.ones(2, requires_grad=True)
            (weight * 2).sum().backward()
            assert weight.grad is not None
        with torch.no_grad():
            next(iter(engine.generate([BOS], max_new_tokens=3)))
            assert not torch.is_grad_enabled()


def test_training_after_sampling() -> None:
    model = tiny_gpt()
    list(Engine(model, TOKENIZER).generate([BOS], max_new_tokens=2))
    ids = torch.tensor([[BOS, 1, 2]])
    model.loss(ids, ids).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_global_seed_untouched() -> None:
    model = tiny_gpt()
    before = torch.random.get_rng_state()
    Engine(HistoryModel(), TOKENIZER).generate_batch([[BOS]], num_samples=2, max_new_tokens=3)
    list(Engine(model, TOKENIZER).generate([BOS], max_new_tokens=3))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_stream_measures() -> None:
    model = HistoryModel()
    engine = Engine(model, TOKENIZER)
    options: dict[str, Any] = dict(
        max_new_tokens=10, temperature=0.7, top_k=30, seed=2, stop_ids=()
    )
    tokens = list(engine.stream([BOS, 9], n_alternatives=3, **options))
    ids = [t.id for t in tokens]
    assert ids == list(engine.generate([BOS, 9], **options))
    for n, token in enumerate(tokens):
        logp = (
            model.score([BOS, 9, *ids[:n]]).double().log_softmax(-1)
        )  # before temperature and top_k
        assert token.logprob == pytest.approx(float(logp[token.id]), abs=1e-5)
        assert token.entropy == pytest.approx(float(-(logp.exp() * logp).sum()), abs=1e-5)
        assert token.alternatives[0][0] == int(logp.argmax()) and len(token.alternatives) == 3


def test_calculator_forces_its_result() -> None:
    marks = [
        TOKENIZER.special(f"<|{name}|>")
        for name in ("python_start", "python_end", "output_start", "output_end")
    ]
    start, end, output_start, output_end = marks
    engine = script("so ", start, "2*21", end, "XXXX", " done")  # the X are overruled
    ids = TOKENIZER.render_for_completion({"messages": USER})
    wanted = [*b"so ", start, *b"2*21", end, output_start, *b"42", output_end, *b" done"]
    assert list(engine.generate(ids, max_new_tokens=99)) == [*wanted, END]
    assert engine.generate_batch([ids, ids], max_new_tokens=99) == [wanted] * 2
    assert list(engine.generate(ids, max_new_tokens=10)) == wanted[:10]
    reply = engine.chat(USER)
    assert "".join(reply) == reply.text == "so [2*21] = [42] done"
    message = reply.message
    kinds = [("text", "so "), ("python", "2*21"), ("python_output", "42"), ("text", " done")]
    assert message["content"] == [{"type": k, "text": t} for k, t in kinds]
    talk = {"messages": [*USER, message]}
    assert TOKENIZER.render_conversation(talk)[0] == [*ids, *wanted, END], (
        "the next turn reads what was written"
    )
    refused = script(start, "2**21", end, "!")
    assert list(refused.generate(ids, max_new_tokens=99)) == [start, *b"2**21", end, *b"!", END]
    assert next(iter(engine.stream(ids, max_new_tokens=99))).id == ord("s")


def test_forced_tokens_are_measured_and_draw_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []

    def draw(seed: int) -> Iterator[float]:
        for u in draw_floats(seed):
            drawn.append(u)
            yield u

    monkeypatch.setattr(engine_module, "draw_floats", draw)
    start, end = TOKENIZER.special("<|python_start|>"), TOKENIZER.special("<|python_end|>")
    engine = script(start, "7*7", end)
    ids = TOKENIZER.render_for_completion({"messages": USER})
    tokens = list(engine.stream(ids, max_new_tokens=9))
    assert [t.id for t in tokens[6:8]] == [*b"49"] and all(t.rank > 0 for t in tokens[6:8])
    assert len(tokens) == 9 and len(drawn) == 9 - 4, (
        "`<|output_start|>49<|output_end|>` is not drawn"
    )


def test_a_reply_cut_in_a_result_goes_on_with_it() -> None:
    """Wherever a reply was stopped, what the calculator answers is whole."""
    names = ("<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>")
    start, end, begin, done = (TOKENIZER.special(name) for name in names)
    whole = [start, *b"7*7", end, begin, *b"49", done]
    ids = TOKENIZER.render_for_completion({"messages": USER})
    for cut in range(5, len(whole)):
        reply = script(start, "7*7", end).reply(ids, whole[:cut], max_new_tokens=len(whole) - cut)
        reply.read()
        assert [*whole[:cut], *reply.tokens] == whole, cut


def test_reply_whole_code_points() -> None:
    text = "é🙂ü漢 a"
    for split in (1, 2, 3):
        reply = script(text, split).chat(USER)
        pieces = list(reply)
        assert "".join(pieces) == reply.text == text + chr(split)
        assert len(pieces) == len(text) + 1, "each piece is one code point of this byte tokenizer"


@pytest.mark.parametrize(
    "data", [b"\xf0\x9f\x99a", b"\xff\xfe", b"a\xc3", b"\xe6\xbc", b"\x80\xf0\x9f\x99\x82\xf0"]
)
def test_reply_invalid_bytes(data: bytes) -> None:
    reply = script(*data).chat(USER)
    pieces = list(reply)
    assert "".join(pieces) == reply.text == data.decode("utf-8", "replace")
    assert all(pieces)


def test_reply_cut_in_a_code_point() -> None:
    reply = script("a🙂").chat(USER, max_new_tokens=3)
    assert list(reply) == ["a", "\ufffd"] and reply.text == "a\ufffd"


def test_reply_special_tokens_split_nothing() -> None:
    user = TOKENIZER.special("<|user_start|>")
    reply = script("a", 0xC3, user, 0xA9, "b").chat(USER)
    assert reply.read() == "a\ufffd\ufffdb" and user in reply.tokens
    assert reply.message == {"role": "assistant", "content": "a\ufffd\ufffdb"}


def test_reply_stats(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    engine = script("abcd")
    model: Any = engine.model
    model.on_advance = lambda: now.__setitem__(0, now[0] + (2.0 if not model.calls else 0.5))
    reply = engine.chat(USER)
    n = reply.stats.prompt_tokens
    assert n == len(TOKENIZER.render_for_completion({"messages": USER})) and not reply.stats.final
    now[0] += 100  # before the first piece is asked for, nothing runs
    for i, _ in enumerate(reply, 1):
        now[0] += 50  # the reader's own time
        stats = reply.stats
        assert (stats.new_tokens, stats.final, stats.stop_reason) == (i, False, "")
        assert stats.ttft_s == 2 and stats.prefill_tok_s == n / 2
        assert stats.decode_tok_s == (0 if i == 1 else 2)
    stats = reply.stats
    assert (
        stats.final and stats.stop_reason == "stop" and stats.new_tokens == 5 == len(reply.tokens)
    )
    assert stats.decode_tok_s == 2 and stats.total_s == 2 + 4 * 0.5 + 4 * 50
    assert stats.context_used == (n + 5) / 200


def test_reply_left_early() -> None:
    reply = script("abcd").chat(USER)
    for piece in reply:
        if piece == "b":
            break
    assert reply.text == "ab" and reply.tokens == [*b"ab"]
    assert reply.stats.final and reply.stats.stop_reason == "cancelled"
    assert reply.message == {"role": "assistant", "content": "ab"}
    with pytest.raises(RuntimeError, match="once"):
        list(reply)


def test_reply_error_is_final() -> None:
    engine = script("abcd")
    reply = engine.chat(USER)
    engine.model.on_advance = lambda: (_ for _ in ()).throw(OSError("gone"))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="gone"):
        reply.read()
    assert reply.stats.final and reply.text == ""


def test_chat_limits() -> None:
    engine = script("x" * 400)
    reply = engine.chat(USER)
    reply.read()
    assert len(reply.tokens) == 256 and reply.stats.stop_reason == "length"
    with pytest.raises(ConfigError, match="where 2000 is the most"):
        engine.chat([{"role": "user", "content": "y" * 2000}])
    last = engine.chat([*USER, {"role": "assistant", "content": "dropped"}])
    assert last.stats.prompt_tokens == reply.stats.prompt_tokens


def test_complete_continues_text() -> None:
    model = ScriptModel([*b"def", BOS], ord("c"))
    reply = Engine(model, TOKENIZER).complete("abc")
    assert reply.read() == "def" and reply.stats.prompt_tokens == 4 and reply.tokens[-1] == BOS


class ForeignTokenizer:
    """A tokenizer with one special token of its own."""

    vocab_size, bos_id, stop_ids = VOCAB_SIZE, BOS, (END,)
    encode, decode, token_bytes = TOKENIZER.encode, TOKENIZER.decode, TOKENIZER.token_bytes

    def special(self, name: str) -> int:
        raise KeyError(name)

    def render_for_completion(self, conversation: dict[str, Any]) -> list[int]:
        return [BOS, CUE]


def test_foreign_tokenizer() -> None:
    start, end = TOKENIZER.special("<|python_start|>"), TOKENIZER.special("<|python_end|>")
    model = ScriptModel([*b"ok", start, *b"1+1", end, *b"!", END], CUE)
    reply = Engine(model, ForeignTokenizer()).chat(USER)
    assert reply.read() == "ok<|python_start|>1+1<|python_end|>!" and reply.tokens[-1] == END


def test_broken_weights_are_named() -> None:
    model = HistoryModel()
    model.score = lambda row: torch.full((VOCAB_SIZE,), math.nan)  # type: ignore[method-assign]
    engine = Engine(model, TOKENIZER)
    for options in (
        {},
        {"temperature": 0},
        {"top_k": 5},
        {"top_p": 0.9},
        {"top_k": 5, "top_p": 0.9},
    ):
        with pytest.raises(CheckpointError, match="not numbers"):
            list(engine.generate([BOS], max_new_tokens=2, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "options", "said"),
    [
        ([], {}, "prompt is empty"),
        ([VOCAB_SIZE], {}, f"Token id {VOCAB_SIZE} must be below"),
        ([3, -1], {}, "Token id -1"),
        ([3] * 161, {}, "161 tokens where 160"),
        ([3], {"max_new_tokens": -1}, "max_new_tokens=-1"),
        ([3], {"max_new_tokens": 2.0}, "max_new_tokens=2.0"),
        ([3], {"temperature": -1}, "temperature=-1"),
        ([3], {"top_k": 0}, "top_k=0"),
        ([3], {"top_p": 2}, "top_p=2"),
    ],
)
def test_refusals_come_at_once(ids: list[int], options: dict[str, Any], said: str) -> None:
    engine = Engine(HistoryModel(), TOKENIZER)
    options = {"max_new_tokens": 3, **options}
    for call in (engine.generate, engine.stream):
        with pytest.raises(ConfigError, match=said):
            call(ids, **options)
    with pytest.raises(ConfigError, match=said):
        engine.generate_batch([[1], ids], **options)
    with pytest.raises(ConfigError, match="num_samples=0"):
        engine.generate_batch([[1]], num_samples=0, max_new_tokens=1)


def test_threads_do_not_disturb_each_other() -> None:
    engine = Engine(tiny_gpt(), TOKENIZER)
    options: dict[str, Any] = dict(max_new_tokens=30, stop_ids=())
    alone = [list(engine.generate([BOS], seed=i, **options)) for i in range(3)]
    runs = [engine.generate([BOS], seed=i, **options) for i in range(3)]
    woven = [[next(run) for run in runs] for _ in range(30)]
    assert [list(column) for column in zip(*woven, strict=True)] == alone
    together: dict[int, list[int]] = {}

    def work(i: int) -> None:
        together[i] = list(islice(engine.generate([BOS], seed=i, **options), 30))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(3)] == alone


def test_freed_memory_is_kept_where_the_libc_can(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    def mallopt(name: int, value: int) -> int:
        calls.append((name, value))
        return 1

    for library, kept in ((SimpleNamespace(mallopt=mallopt), True), (SimpleNamespace(), False)):
        monkeypatch.setattr(ctypes, "CDLL", {None: library}.get)
        assert keep_freed_memory.__wrapped__() is kept
    assert calls == [(-1, 256 << 20), (-3, 32 << 20)]


def test_threads_measured() -> None:
    """Of one thread and all, one is kept; another device is left alone."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert settle_threads(HistoryModel(), rows=3) in (1, 2)
        assert torch.get_num_threads() in (1, 2)
        torch.set_num_threads(2)
        elsewhere = HistoryModel()
        elsewhere.device = torch.device("cuda")
        assert settle_threads(elsewhere) == 2
        assert elsewhere.calls == []
    finally:
        torch.set_num_threads(before)
