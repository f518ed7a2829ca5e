"""primechat: a lab for learning how a small ChatGPT is made.

Hides: which room a public name lives in; each is imported at its first use, so `import primechat` stays fast.
Reference: PEP 562.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from primechat.config import (
        AutochatConfig,
        DistillConfig,
        EvaluateConfig,
        FinetuneConfig,
        GPTConfig,
        LoRAConfig,
        PretrainConfig,
        QuickstartConfig,
        SpeedrunConfig,
        TokenizerConfig,
    )
    from primechat.infer.engine import Engine
    from primechat.metrics.probes import capture
    from primechat.model.gpt import GPT
    from primechat.stages.autochat import autochat
    from primechat.stages.distill import distill
    from primechat.stages.evaluate import evaluate
    from primechat.stages.finetune import finetune
    from primechat.stages.lora import train_lora
    from primechat.stages.pretrain import pretrain
    from primechat.stages.quickstart import quickstart, speedrun
    from primechat.stages.tokenizer import train_tokenizer
    from primechat.store import list_models, load_model, load_run, load_tokenizer, open_model
    from primechat.text.tokenizer import Tokenizer

_ROOMS = {
    "train_tokenizer": "stages.tokenizer",
    "pretrain": "stages.pretrain",
    "finetune": "stages.finetune",
    "train_lora": "stages.lora",
    "distill": "stages.distill",
    "evaluate": "stages.evaluate",
    "autochat": "stages.autochat",
    "quickstart": "stages.quickstart",
    "speedrun": "stages.quickstart",
    "TokenizerConfig": "config",
    "AutochatConfig": "config",
    "PretrainConfig": "config",
    "FinetuneConfig": "config",
    "LoRAConfig": "config",
    "DistillConfig": "config",
    "EvaluateConfig": "config",
    "QuickstartConfig": "config",
    "SpeedrunConfig": "config",
    "GPTConfig": "config",
    "Tokenizer": "text.tokenizer",
    "GPT": "model.gpt",
    "capture": "metrics.probes",
    "Engine": "infer.engine",
    "load_model": "store",
    "load_tokenizer": "store",
    "open_model": "store",
    "list_models": "store",
    "load_run": "store",
}

__all__ = [
    "DistillConfig",
    "AutochatConfig",
    "EvaluateConfig",
    "Engine",
    "FinetuneConfig",
    "GPT",
    "GPTConfig",
    "LoRAConfig",
    "PretrainConfig",
    "QuickstartConfig",
    "SpeedrunConfig",
    "Tokenizer",
    "TokenizerConfig",
    "autochat",
    "capture",
    "distill",
    "evaluate",
    "finetune",
    "list_models",
    "load_model",
    "load_run",
    "load_tokenizer",
    "open_model",
    "pretrain",
    "quickstart",
    "speedrun",
    "train_lora",
    "train_tokenizer",
]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'primechat' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"primechat.{_ROOMS[name]}"), name)
    globals()[name] = value  # the next look-up is a plain one
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
