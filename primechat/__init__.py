"""primechat: a lab for learning how a small ChatGPT is made.

Hides: which module a public name comes from. Each is imported at its first use, so that `import primechat`
is fast. Reference: PEP 562.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from primechat.checkpoint.registry import (
        list_models,
        load_model,
        load_run,
        load_tokenizer,
        open_model,
    )
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
    from primechat.interp.hooks import capture
    from primechat.model.gpt import GPT
    from primechat.stages.autochat import autochat
    from primechat.stages.distill import distill
    from primechat.stages.evaluate import evaluate
    from primechat.stages.finetune import finetune
    from primechat.stages.lora import train_lora
    from primechat.stages.pretrain import pretrain
    from primechat.stages.quickstart import quickstart, speedrun
    from primechat.stages.tokenizer import train_tokenizer
    from primechat.text.tokenizer import Tokenizer

_OFFERS = {  # module: its public names
    "config": "AutochatConfig DistillConfig EvaluateConfig FinetuneConfig GPTConfig LoRAConfig "
    "PretrainConfig QuickstartConfig SpeedrunConfig TokenizerConfig",
    "infer.engine": "Engine",
    "interp.hooks": "capture",
    "model.gpt": "GPT",
    "stages.autochat": "autochat",
    "stages.distill": "distill",
    "stages.evaluate": "evaluate",
    "stages.finetune": "finetune",
    "stages.lora": "train_lora",
    "stages.pretrain": "pretrain",
    "stages.quickstart": "quickstart speedrun",
    "stages.tokenizer": "train_tokenizer",
    "checkpoint.registry": "list_models load_model load_run load_tokenizer open_model",
    "text.tokenizer": "Tokenizer",
}
_ROOMS = {name: room for room, names in _OFFERS.items() for name in names.split()}

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
    globals()[name] = value  # so that the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
