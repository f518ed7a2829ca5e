"""All stages in a row: in minutes on the text that ships with primechat, or a full run on rented GPUs.

Decides how a time budget becomes the settings of each stage, and which stage a resumed run continues with.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace

from primechat.checkpoint import registry
from primechat.checkpoint.run_dir import read_frozen
from primechat.config import (
    EvalConfig,
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    QuickstartConfig,
    SpeedrunConfig,
    TokenizerConfig,
    recipes,
)
from primechat.errors import ConfigError
from primechat.events import OnEvent, QuickstartResult, SpeedrunResult
from primechat.infer.cpu import settle_threads
from primechat.infer.engine import Engine
from primechat.seeds import derive_seed
from primechat.stages.evaluate import evaluate
from primechat.stages.finetune import finetune
from primechat.stages.pretrain import pretrain
from primechat.stages.tokenizer import train_tokenizer

QUESTIONS = ("Hi! How are you today?", "What do you like to do?", "Nice. Do you have any pets?")
REPLY_TOKENS = 48
FAST_SECONDS = 22.0  # of pretraining; with all the rest, a minute on a 2-core laptop
FAST_EVAL = EvalConfig(
    every=10**6, tokens=4096, last_tokens=20_480
)  # only at the start and the end
CHAT_EVAL = EvalConfig()  # a tenth of the training time during the run, a quarter at its end
CHAT_SHARE = 0.25  # finetuning time as a share of the pretraining time


def quickstart(
    config: QuickstartConfig,
    *,
    on_event: OnEvent | None = None,
    stop: threading.Event | None = None,
) -> QuickstartResult:
    """Train a tokenizer, a base model and a chat model of one tag, and return their results with a dialogue.

    Pretraining takes `seconds`, finetuning a quarter of that. A run that is stopped has no dialogue.

    Raises:
        ConfigError: the tag is taken, or there is nothing to resume.
    """
    t_start = time.perf_counter()
    tag = choose_run_tag(config)
    stop = stop or threading.Event()
    seconds = FAST_SECONDS if config.fast else config.seconds
    folder = registry.run_dir("base", tag)

    # Tokenizer.
    tokenizer = train_tokenizer(
        TokenizerConfig(tag=tag, resume=config.resume, vocab_size=config.vocab_size),
        on_event=on_event,
        stop=stop,
    )

    # Base model.
    base_config = make_base_config(config, tag, seconds)
    resume = config.resume and (folder / "config.json").exists()
    base = pretrain(replace(base_config, resume=resume), on_event=on_event, stop=stop)
    if base.stopped:
        spent_s = time.perf_counter() - t_start
        return QuickstartResult(
            tokenizer=tokenizer, base=base, chat=base, dialogue=(), total_s=spent_s
        )

    # Chat model, with the runtime settings measured for the base model.
    measured = replace(read_frozen(folder, PretrainConfig).runtime, compile=config.runtime.compile)
    chat_config = FinetuneConfig(
        tag=tag,
        seconds=seconds * CHAT_SHARE,
        seed=config.seed,
        runtime=measured,
        batch_tokens=base_config.batch_tokens,
        eval=replace(FAST_EVAL if config.fast else CHAT_EVAL, snapshots=False),
    )
    resume = config.resume and (registry.run_dir("sft", tag) / "config.json").exists()
    chat = finetune(replace(chat_config, resume=resume), on_event=on_event, stop=stop)
    dialogue = () if chat.stopped else hold_dialogue(chat.identifier, config.seed)
    return QuickstartResult(
        tokenizer=tokenizer,
        base=base,
        chat=chat,
        dialogue=dialogue,
        total_s=time.perf_counter() - t_start,
    )


def make_base_config(config: QuickstartConfig, tag: str, seconds: float) -> PretrainConfig:
    """Return the settings of a quickstart's base model."""
    depth = config.depth or (2 if config.fast else 4)
    return replace(
        recipes.quickstart(depth, vocab_size=config.vocab_size, seconds=seconds),
        tag=tag,
        seed=config.seed,
        runtime=config.runtime,
        eval=FAST_EVAL if config.fast else recipes.FIRST_EVAL,
    )


def speedrun(
    config: SpeedrunConfig, *, on_event: OnEvent | None = None, stop: threading.Event | None = None
) -> SpeedrunResult:
    """Train a tokenizer, a base model and a chat model, evaluate the base model, and return the results.

    A resumed run does not repeat finished stages.

    Raises:
        ConfigError: a run of this tag exists and `resume` is not set.
    """
    tag, stop = config.pretrain.tag, stop or threading.Event()

    def goes_on(family: str) -> bool:
        return config.resume and (registry.run_dir(family, tag) / "config.json").exists()

    # Base model.
    base = pretrain(replace(config.pretrain, resume=goes_on("base")), on_event=on_event, stop=stop)
    if base.stopped:
        return SpeedrunResult(base=base, chat=None, evaluation=None)

    # Chat model.
    talks = replace(config.finetune, tag=tag, base=f"base/{tag}", resume=goes_on("sft"))
    chat = finetune(talks, on_event=on_event, stop=stop)
    if chat.stopped or os.environ.get("RANK", "0") != "0":
        return SpeedrunResult(base=base, chat=chat, evaluation=None)

    # Evaluation of the base model, on rank 0 only.
    measured = EvaluateConfig(
        model=f"base/{tag}",
        corpus=config.pretrain.corpus,
        corpus_separator=config.pretrain.corpus_separator,
        max_tokens=config.eval_tokens,
        runtime=replace(config.pretrain.runtime, checkpoint_blocks=False),
    )
    return SpeedrunResult(
        base=base, chat=chat, evaluation=evaluate(measured, on_event=on_event, stop=stop)
    )


def choose_run_tag(config: QuickstartConfig) -> str:
    """Return the config's tag, or the next free quickstart-N, or the latest one to resume.

    Raises:
        ConfigError: there is no quickstart run to resume.
    """
    if config.tag:
        return config.tag
    names = ["quickstart", *(f"quickstart-{n}" for n in range(2, 1000))]
    free = next(i for i, name in enumerate(names) if not registry.run_dir("base", name).exists())
    if not config.resume:
        return names[free]
    if free == 0:
        raise ConfigError(
            "resume=True finds no quickstart to go on with; leave it out to start one."
        )
    return names[free - 1]


def hold_dialogue(identifier: str, seed: int) -> tuple[dict[str, str], ...]:
    """Return a dialogue: a few questions, each answered by the model in the context of those before."""
    model, tokenizer, _ = registry.open_model(identifier)
    settle_threads(model)
    engine, messages = Engine(model, tokenizer), []
    for i, question in enumerate(QUESTIONS):
        messages.append({"role": "user", "content": question})
        reply = engine.chat(
            messages,
            max_new_tokens=REPLY_TOKENS,
            temperature=0.7,
            top_k=40,
            seed=derive_seed(seed, "reply", i),
        )
        messages.append({"role": "assistant", "content": reply.read().strip()})
    return tuple(messages)
