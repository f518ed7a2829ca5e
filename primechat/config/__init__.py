"""All settings of primechat as frozen dataclasses; nothing here imports torch."""

from primechat.config.autochat import AutochatConfig
from primechat.config.codec import decode_config, encode_config, find_difference
from primechat.config.model import GPTConfig, InitConfig
from primechat.config.optim import OptimConfig
from primechat.config.runtime import EvalConfig, RuntimeConfig
from primechat.config.stages import (
    DistillConfig,
    EvaluateConfig,
    FinetuneConfig,
    LoRAConfig,
    PretrainConfig,
    QuickstartConfig,
    SpeedrunConfig,
    TokenizerConfig,
)

__all__ = [
    "DistillConfig",
    "AutochatConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "GPTConfig",
    "InitConfig",
    "LoRAConfig",
    "EvalConfig",
    "OptimConfig",
    "PretrainConfig",
    "QuickstartConfig",
    "RuntimeConfig",
    "SpeedrunConfig",
    "TokenizerConfig",
    "decode_config",
    "encode_config",
    "find_difference",
]
