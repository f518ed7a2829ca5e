"""What labs 06 to 08 stand on: the shelf of dialogue sets, replies side by side, and what is drawn of runs.

Hides: that nothing has run yet when a lab opens: each view then says so, or shows what can be known already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from primechat.checkpoint import registry
from primechat.config import GPTConfig, LoRAConfig
from primechat.config.model import SHARES, STUDENTS, shrink_model
from primechat.errors import DataError
from primechat.events import TrainResult, pair_bpb
from primechat.labkit.instruments.series import SeriesConfig as SeriesConfig
from primechat.labkit.instruments.series import compare_ranks as compare_ranks
from primechat.labkit.instruments.series import compare_sets as compare_sets
from primechat.labkit.instruments.series import compare_sizes as compare_sizes
from primechat.labkit.instruments.series import sum_rows
from primechat.labkit.instruments.spectra import find_spectra as find_spectra
from primechat.labkit.lab import borrow_model
from primechat.metrics.diversity import measure_distinct, split_words
from primechat.metrics.intervals import estimate_mean
from primechat.seeds import derive_seed
from primechat.text.corpora import read_chats
from primechat.text.dialogues import SETS, DialogueOptions, set_folder, stream_dialogues
from primechat.views.widgets.controls import Live
from primechat.views.widgets.posttrain.dial import DialDesk
from primechat.views.widgets.posttrain.heat import HeatText
from primechat.views.widgets.posttrain.mix import MixDesk

SHELF = ("chitchat", "topic:music", "topic:food", "style:pirate", "style:polite", "faq")
ABOUT = {
    "chitchat": "chats of students with strangers, typed by people: those of 7,168 kept for training",
    "topic:music": "the talks of chitchat that are about music",
    "topic:food": "the talks of chitchat that are about food",
    "style:pirate": "the talks of chitchat, answered as a pirate of the films would",
    "style:polite": "the talks of chitchat, answered by a butler",
    "faq": "twenty questions about models like this one in four wordings; a fifth is held out",
}
PROMPTS = (
    "Hi! How are you?",
    "What do you like to do?",
    "Do you like music?",
    "Tell me about your day.",
    "What is a token?",
    "Where are you from?",
)
SAMPLE, SHOWN_TOKENS, REPLY_TOKENS = 120, 360, 40


# The shelf


def open_desk(tokenizer: Any, weights: dict[str, float] | None = None) -> MixDesk:
    """Return the shelf: recipes and embedded chats, and the public sets, fetched or not."""
    options = DialogueOptions(base_dir=registry.base_dir())
    sets = [
        {
            **survey_set(name, tokenizer, options),
            "about": ABOUT[name],
            "licence": "MIT",
            "here": True,
        }
        for name in SHELF
    ]
    for name, known in SETS.items():
        here = any(set_folder(name, options).rglob("*.*"))
        facts = survey_set(name, tokenizer, options) if here else {"name": name}
        sets.append(
            {
                **facts,
                "about": known.about,
                "licence": known.licence,
                "warning": known.warning,
                "here": here,
                "megabytes": known.megabytes,
            }
        )
    return MixDesk(
        sets, Reader(tokenizer, options).read, weights or {"chitchat": 1.0, "topic:music": 1.0}
    )


def survey_set(name: str, tokenizer: Any, options: DialogueOptions) -> dict[str, Any]:
    """Return how large a set is, from its first conversations where it is long."""
    counts: dict[str, Counter[str]] = {}
    found = list(islice(stream_dialogues(name, "train", options, counts=counts), SAMPLE))
    texts = ["\n".join(str(m["content"]) for m in c["messages"]) for c in found]
    kept, tokens = len(found), sum(map(len, tokenizer.encode_batch(texts)))
    scale = 1.0
    if kept == SAMPLE and (name == "chitchat" or name.startswith("style:")):
        gone = sum(counts[name][why] for why in ("conversations left empty", "duplicates"))
        scale = len(read_chats("train")) / (kept + gone)
    elif kept == SAMPLE:
        scale = sum(1 for _ in stream_dialogues(name, "train", options)) / kept
    messages = sum(len(c["messages"]) for c in found)
    sizes = {"conversations": kept, "messages": messages, "tokens": tokens}
    return {"name": name, **{key: round(scale * value) for key, value in sizes.items()}}


class Reader:
    """Ten conversations of each set, drawn from its beginning, with what is learned from."""

    def __init__(self, tokenizer: Any, options: DialogueOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.shown: dict[str, list[Any]] = {}

    def read(self, name: str, number: int) -> dict[str, Any]:
        """Return one conversation as the page draws it."""
        if name not in self.shown:
            first = list(islice(stream_dialogues(name, "train", self.options), SAMPLE))
            order = np.random.default_rng(0).permutation(len(first))[:10]
            self.shown[name] = [first[i] for i in order]
        talks = self.shown[name]
        ids, mask = self.tokenizer.render_conversation(
            talks[number % len(talks)], max_tokens=SHOWN_TOKENS
        )
        return {
            "parts": light_tokens(ids, mask, self.tokenizer),
            "of": len(talks),
            "learned": sum(mask),
            "tokens": len(mask),
        }


def light_tokens(ids: Sequence[int], mask: Sequence[int], tokenizer: Any) -> list[dict[str, Any]]:
    """Return a rendered conversation as parts of one role, each of pieces [text, learned]."""
    starts = {tokenizer.special(f"<|{role}_start|>"): role for role in ("user", "assistant")}
    parts: list[dict[str, Any]] = []
    run: list[int] = []
    for i, (token, on) in enumerate(zip(ids, mask, strict=True)):
        if token in starts or not parts:
            parts.append({"role": starts.get(token, "start of the text"), "pieces": []})
        run.append(token)
        last = i + 1 == len(ids)
        if last or mask[i + 1] != on or ids[i + 1] in starts:
            parts[-1]["pieces"].append([tokenizer.decode(run), bool(on)])
            run = []
    return parts


# Replies


def write_reply(identifier: str, prompt: str, seed: int = 0) -> str:
    """Return what a model answers to one message."""
    from primechat.infer.engine import Engine

    model, tokenizer, _ = borrow_model(identifier)
    return answer(Engine(model, tokenizer), prompt, seed)


def answer(engine: Any, prompt: str, seed: int = 0) -> str:
    """Return an engine's reply, cut to a few lines.

    It depends on the seed and the prompt, so that models are compared by the same numbers and the replies of
    one model to several prompts are independent.
    """
    from primechat.infer.samples import write_reply as write

    own = derive_seed(seed, "reply", prompt)
    return write(engine, prompt, own, max_new_tokens=REPLY_TOKENS, temperature=0.7)


def compare_replies(
    before: str, after: str, prompts: Sequence[str] = PROMPTS[:4]
) -> list[dict[str, str]]:
    """Return two models' answers to the same prompts."""
    return [
        {
            "you say": p,
            f"before ({before})": write_reply(before, p),
            f"after ({after})": write_reply(after, p),
        }
        for p in prompts
    ]


def open_dial(
    rows: Sequence[str], base: str, prompt: str = "Hi! What did you do today?"
) -> DialDesk:
    """Return the dial of adapters on a base."""
    names = [identifier.partition("+")[0].removeprefix("lora:") for identifier in rows]

    opened: dict[str, Any] = {}  # of its own, as its dial is turned

    def write(prompt: str, dial: float, adapter: str) -> str:
        from primechat.infer.engine import Engine
        from primechat.model.lora import set_adapter_scale

        if adapter not in opened:
            opened.clear()  # each holds a whole model of its own
            opened[adapter] = registry.open_model(f"lora:{adapter}+{base}")[:2]
        model, tokenizer = opened[adapter]
        set_adapter_scale(model, adapter, dial)
        return answer(Engine(model, tokenizer), prompt)

    waiting = "No adapter yet: Start above trains one in about a minute."
    return DialDesk(write, names, prompt, waiting)


def open_heat(student: str, teacher: str, prompt: str = "Hi! What did you do today?") -> Any:
    """Return the teacher's reply with the student's distance at each token."""
    if not student:
        return Live(lambda: "No student yet: it comes when the run above is done.")
    import torch

    def measure(prompt: str) -> dict[str, Any]:
        (pupil, tokenizer, _), (master, _, _) = borrow_model(student), borrow_model(teacher)
        if "base" in teacher.partition("@")[0]:  # it goes on with a chat as its text has them
            asked = [tokenizer.bos_id, *tokenizer.encode(f"A: {prompt}\nB:")]
        else:
            asked = tokenizer.render_for_completion(
                {"messages": [{"role": "user", "content": prompt}]}
            )
        from primechat.infer.engine import Engine

        options: Any = dict(max_new_tokens=60, temperature=0.7, top_k=50, seed=0)
        written = Engine(master, tokenizer).generate(asked, **options)
        said = [i for i in written if i not in tokenizer.stop_ids]
        if not said:
            raise DataError("the teacher has nothing to say to this; try other words.")
        ids = torch.tensor([[*asked, *said]])
        with torch.no_grad():
            log_q, log_p = (
                torch.log_softmax(m(ids)[0, len(asked) - 1 : -1], -1) for m in (pupil, master)
            )
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).tolist()
        guess = [[tokenizer.decode([i]) for i in log.argmax(-1).tolist()] for log in (log_p, log_q)]
        return {
            "tokens": [
                {
                    "text": tokenizer.decode([i]),
                    "kl": round(k, 3),
                    "teacher": t.strip(),
                    "student": s.strip(),
                }
                for i, k, t, s in zip(said, kl, *guess, strict=True)
            ]
        }

    return HeatText(measure, prompt)


def break_down(student: str, teacher: str, tokens: int = 8192) -> Any:
    """Return retention of a student by frequency, position and kind of token, on held-out chats."""
    from primechat.metrics.retention import measure_retention, name_kind
    from primechat.stages.pretrain import cache_text
    from primechat.text.batches import validation_windows

    (pupil, tokenizer, _), (master, _, _) = borrow_model(student), borrow_model(teacher)
    cache = cache_text("chitchat", "val", tokenizer, 1, None)
    windows = validation_windows(cache, master.sequence_len, max_tokens=tokens, rows=4)
    lengths = tokenizer.byte_lengths()
    return measure_retention(
        pupil, master, windows, lengths, name_kind=lambda i: name_kind(tokenizer.decode([i]))
    )


# What is drawn of runs


def guess_share(name: str) -> str:
    """Return which share of a set's tokens is learned from, in words."""
    _, tokenizer, _ = borrow_model("shipped/base")
    learned = total = 0
    for talk in islice(stream_dialogues(name, "train"), 60):
        _, mask = tokenizer.render_conversation(talk, max_tokens=2048)
        learned, total = learned + sum(mask), total + len(mask)
    share = learned / total
    return "a tenth" if share < 0.25 else "about half" if share < 0.75 else "nearly all"


def list_curves(result: TrainResult | None) -> dict[str, list[tuple[float, float]]]:
    """Return bits per byte along a run, on its own talks and on general text."""
    return trace_losses(result, {"its own talks": "val_bpb", "general text": "general_bpb"})


def list_retention(result: TrainResult | None) -> dict[str, list[tuple[float, float]]]:
    """Return retention and agreement along a student's run."""
    return trace_losses(result, {"retention": "retention", "agreement": "agreement"})


def trace_losses(
    result: TrainResult | None, names: dict[str, str]
) -> dict[str, list[tuple[float, float]]]:
    """Return fields of a run's validations over its steps, under other names."""
    events = [e for e in (result.events if result else ()) if e.get("kind") == "loss"]
    losses = [e | {"val_bpb": pair_bpb(e)} for e in events]  # of the same tokens at each step
    return {
        name: [(e["step"], e[key]) for e in losses if e.get(key) is not None]
        for name, key in names.items()
    }


def open_answers(before: str, result: TrainResult | None) -> Live:
    """Return a table of two models' answers; a further prompt can be typed."""

    def compare(you_say: str) -> Any:
        if result is None:
            return "Nothing has been trained yet: it comes when the run above is done."
        asked = list(dict.fromkeys([*filter(None, [you_say.strip()]), *PROMPTS[:4]]))
        return compare_replies(before, result.identifier, asked)

    return Live(compare, you_say="", labels={"you_say": "your own words"})


def open_table(
    rows: Sequence[dict[str, Any]] | None, keys: Sequence[str], *, diversity: bool = True
) -> Live:
    """Return the table of a series: means over seeds with their intervals; with distinct-2 of each model's
    replies, the pairs of words that differ among all pairs.
    """
    found = list(rows or ())
    if diversity and found and "retention" not in found[0]:
        replies = [
            [split_words(write_reply(row["identifier"], p)) for p in PROMPTS] for row in found
        ]
        pairs = zip(found, replies, strict=True)
        found = [row | {"distinct-2": measure_distinct(said)} for row, said in pairs]
    return Live(lambda: sum_rows(found, keys))


def compare_with_full(rows: Sequence[dict[str, Any]] | None) -> Live:
    """Return in words what share of full fine-tuning's gain and forgetting the widest adapter has: the means
    of the seeds' own shares with their 95 % intervals; of fewer than three seeds, each share.
    """
    table = {(row["name"], row["seed"]): row for row in rows or ()}
    ranks = [name for name, _ in table if name.isdigit()]
    widest = max(ranks, key=int, default="")
    seeds = [seed for name, seed in table if name == widest and ("full", seed) in table]
    said = []
    for key, words in (("gain", "of the gain"), ("forgotten", "of what it forgot")):
        pairs = [
            (table[widest, seed].get(key), table["full", seed].get(key, 0.0)) for seed in seeds
        ]
        shares = [100 * mine / full for mine, full in pairs if mine is not None and full > 0]
        if not pairs or len(shares) < len(pairs):
            continue  # a share of nothing says nothing
        mean, low, _ = estimate_mean(shares)
        several = " and ".join(f"{share:.0f} %" for share in shares)
        said.append(f"{several if len(shares) < 3 else f'{mean:.0f} % ± {mean - low:.0f}'} {words}")
    text = f"Rank {widest}, as a share of full fine-tuning: {', '.join(said)}." if said else None
    return Live(lambda: text)


def name_axes(rows: Sequence[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """Return a series' rows under the titles of the picture's axes; what has a common gain is put there."""
    found = []
    for row in rows or ():
        if "forgotten" in row:
            common = "common gain" in row
            gain = f"gain on {'the common' if common else 'its own'} talks, bits per byte"
            named = f"rank {row['name']}" if row["name"].isdigit() else row["name"]
            found.append(
                {
                    "name": named,
                    gain: row["common gain" if common else "gain"],
                    "forgotten of general text, bits per byte": row["forgotten"],
                }
            )
    return found


def list_adapters(result: TrainResult | None) -> list[str]:
    """Return the identifiers of the adapters on this machine, the one just trained first."""
    adapters = [entry for entry in registry.list_models() if entry.family == "lora"]
    mine = [entry.identifier for entry in adapters if not entry.by_product]
    return list(dict.fromkeys([*([result.identifier] if result else []), *mine]))


def measure_share(config: LoRAConfig) -> float:
    """Return an adapter's numbers in percent of its base's."""
    from primechat.model.lora import list_targets

    model, _, _ = borrow_model(config.base)
    maps = list_targets(model, config.targets).values()
    added = sum(config.rank * (m.in_features + m.out_features) for m in maps)
    return round(100 * added / model.config.n_params, 1)


def open_sizes(teacher: str) -> Live:
    """Return the students' exact sizes, for a teacher here or for a d20."""
    own = borrow_model(teacher)[0].config

    def list_sizes(of: str) -> list[dict[str, Any]]:
        big = GPTConfig.classic(20) if of.startswith("d20") else own
        sizes = [*SHARES, *STUDENTS] if of.startswith("d20") else list(SHARES)
        rows = [("the teacher", big), *((size, shrink_model(big, size)) for size in sizes)]
        return [
            {
                "size": name,
                "layers": c.n_layer,
                "width": c.n_embd,
                "heads": c.n_head,
                "parameters": c.n_params,
                "of the teacher": f"{c.n_params / big.n_params:.1%}",
                "of which tables of tokens": f"{2 * c.padded_vocab * c.n_embd / c.n_params:.0%}",
            }
            for name, c in rows
        ]

    return Live(
        list_sizes,
        of=["the model that ships here", "d20, 561 million parameters"],
        labels={"of": "teacher"},
    )


def guess_halved(teacher: str) -> float:
    """Return the percentage of numbers that are left when width and depth are halved."""
    own = borrow_model(teacher)[0].config
    half = replace(
        own,
        n_layer=own.n_layer // 2,
        n_embd=own.n_embd // 2,
        n_head=own.n_head // 2,
        n_kv_head=own.n_kv_head // 2,
    )
    return round(100 * half.n_params / own.n_params, 1)


def pick_student(result: TrainResult | None) -> str:
    """Return the student just trained, or nothing."""
    return result.identifier if result else ""


def open_breakdown(result: TrainResult | None, teacher: str) -> Live:
    """Return retention by frequency, position or kind of token."""
    kept: dict[str, Any] = {}

    def draw(by: str) -> Any:
        if result is None:
            return "No student yet: it comes when the run above is done."
        if not kept:
            kept["found"] = break_down(result.identifier, teacher)
        return [
            {
                by: g.name,
                "tokens": g.tokens,
                "retention": f"{g.retention:.2f}",
                "agreement": f"{g.agreement:.2f}",
                "KL, nats": f"{g.kl_nats:.2f}",
                "student, bits per byte": f"{g.student_bpb:.2f}",
                "teacher": f"{g.teacher_bpb:.2f}",
            }
            for g in kept["found"].groups[by]
        ]

    return Live(draw, by=["frequency", "position", "kind"], labels={"by": "sorted by"})


def list_by_size(rows: Sequence[dict[str, Any]] | None) -> dict[str, list[tuple[float, ...]]]:
    """Return retention by parameters, of students taught and alone: mean, and interval of three seeds up."""
    curves: dict[str, dict[float, list[float]]] = {}
    for row in rows or ():
        kind = row["name"].partition(" ")[2] or "taught"
        curves.setdefault(kind, {}).setdefault(row["parameters"], []).append(row["retention"])
    return {
        kind: sorted(
            (size, *estimate_mean(v)[: 3 if len(v) > 2 else 1]) for size, v in found.items()
        )
        for kind, found in curves.items()
    }


def add_teacher(rows: Sequence[dict[str, Any]] | None, teacher: str) -> list[dict[str, Any]]:
    """Return a series' rows with two more: how the teacher writes, and the text itself."""
    if not rows:
        return []
    from primechat.metrics.retention import judge_writing, write_texts
    from primechat.stages.pretrain import cache_text
    from primechat.text.batches import validation_windows

    master, tokenizer, _ = borrow_model(teacher)
    cache = cache_text("chitchat", "val", tokenizer, 1, None)
    windows = list(validation_windows(cache, master.sequence_len, max_tokens=8192))
    more = []
    for name, model in (("the teacher", master), ("the text itself", None)):
        found = judge_writing(write_texts(model, tokenizer, windows))
        more.append(
            {"name": name, "distinct-2": found["distinct_2"], "repetition": found["repetition"]}
        )
    return [*rows, *more]
