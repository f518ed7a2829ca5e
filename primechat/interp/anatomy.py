"""The parts of a model that probes need, behind the same interface for a GPT and for foreign models.

Hides: where a model keeps its parts. Every body has `trace` (the model's own forward pass with a hook),
`read_stream`, `readout` and `head_map`. Reference: nostalgebraist 2020 (the logit lens).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from primechat.config.model import NORM_EPS
from primechat.errors import ConfigError
from primechat.model.gpt import GPT, Block, norm
from primechat.model.huggingface import ForeignModel
from primechat.model.losses import cap_logits
from primechat.protocols import Hook


class GPTBody:
    """The body of a GPT.

    The input of layer i is keep[i] * x + again[i] * embed; after the last layer, backout times the output of
    layer `middle` is subtracted.
    """

    layer_points = (
        "attn.q_raw",
        "attn.k_raw",
        "attn.q",
        "attn.k",
        "attn.v",
        "attn.weights",
        "attn.heads",
        "attn.out",
        "mlp.pre",
        "mlp.out",
        "resid",
    )

    def __init__(self, model: GPT) -> None:
        c = model.config
        self.model, self.device, self.vocab_size = model, model.device, c.vocab_size
        self.sequence_len, self.max_context = model.sequence_len, model.max_context
        self.n_layer, self.n_head, self.n_kv_head = c.n_layer, c.n_head, c.n_kv_head
        self.head_dim, self.n_params = c.head_dim, c.n_params
        # Factor from the dot product of a query and a key to their score.
        self.scale = c.qk_gain**2 / c.head_dim**0.5
        self.windows = tuple(c.window(i) for i in range(c.n_layer))
        scalars = c.residual_scalars
        self.keep = tuple(model.resid_lambdas.tolist()) if scalars else (1.0,) * c.n_layer
        self.again = tuple(model.x0_lambdas.tolist()) if scalars else (0.0,) * c.n_layer
        self.backout = float(model.backout_lambda) if c.backout else 0.0
        self.middle, self.has_smear, self.softcap = c.n_layer // 2, c.smear, c.logit_softcap

    def trace(self, ids: Tensor, hook: Hook) -> Tensor:
        """Return float32 logits (B, T, V) of ids (B, T), calling the hook at every point."""
        return hook("logits", self.model.logits(self.model.hidden(ids, hook=hook)))

    def read_stream(self, x: Tensor) -> Tensor:
        """Return the float32 logits (..., V) if x (..., C) were the output of the last layer."""
        return self.model.logits(norm(x.to(self.model.compute_dtype)))

    def readout(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """Return the linear map from a part of the stream x (C,) to the logits of tokens before the softcap.

        The map is float64 (len(tokens), C); the scale of the final norm is frozen at x.
        """
        rows = self.model.lm_head.weight[list(tokens)].cpu().double()  # MPS has no float64
        return rows * torch.rsqrt(x.cpu().double().square().mean() + NORM_EPS)

    def head_map(self, layer: int) -> Tensor:
        """Return the map (H, D, C) by which each head's result is written into the stream."""
        weight = cast(Block, self.model.blocks[layer]).attn.c_proj.whole_weight()  # (C, H * D)
        return weight.T.reshape(self.n_head, self.head_dim, -1)


class ForeignBody:
    """The body of a transformers network with the usual names of parts; torch's hooks call the given hook."""

    layer_points = ("attn.weights", "attn.heads", "attn.out", "mlp.out", "resid")

    def __init__(self, model: ForeignModel) -> None:
        self.model, self.device, self.vocab_size = model, model.device, model.vocab_size
        self.sequence_len, self.max_context = model.sequence_len, model.max_context
        base = model.network.base_model
        self.embed, self.head = (
            model.network.get_input_embeddings(),
            model.network.get_output_embeddings(),
        )
        self.layers = list(find_part(base, "layers", "h"))
        self.norm = find_part(base, "norm", "ln_f", "final_layernorm", "final_layer_norm")
        self.attn = [find_part(layer, "self_attn", "attn", "attention") for layer in self.layers]
        self.proj = [find_part(attn, "o_proj", "c_proj", "out_proj", "dense") for attn in self.attn]
        self.mlp = [find_part(layer, "mlp", "feed_forward") for layer in self.layers]
        c, self.n_params = model.settings, sum(p.numel() for p in model.network.parameters())
        self.n_layer, self.n_head = len(self.layers), int(c.num_attention_heads)
        self.n_kv_head = int(getattr(c, "num_key_value_heads", None) or self.n_head)
        self.head_dim = int(getattr(c, "head_dim", None) or c.hidden_size // self.n_head)
        self.softcap = float(getattr(c, "final_logit_softcapping", None) or 0.0)
        # The residual stream is a plain sum.
        self.keep, self.again = (1.0,) * self.n_layer, (0.0,) * self.n_layer
        self.backout, self.middle, self.has_smear = 0.0, 0, False

    def trace(self, ids: Tensor, hook: Hook) -> Tensor:
        """Return float32 logits (B, T, V) of ids (B, T), calling the hook at every point."""

        def behind(name: str) -> Callable[..., Any]:
            return lambda _, __, out: (
                (hook(name, out[0]), *out[1:]) if type(out) is tuple else hook(name, out)
            )

        def before(name: str) -> Callable[..., Any]:
            return lambda _, args: (hook(name, args[0]), *args[1:])

        def split(name: str) -> Callable[..., Any]:
            shape = (*ids.shape, self.n_head, self.head_dim)
            return lambda _, args: (hook(name, args[0].reshape(shape)).flatten(2), *args[1:])

        def look(name: str) -> Callable[..., None]:
            def show_weights(_: Any, __: Any, out: tuple[Any, ...]) -> None:
                hook(name, out[1])  # read-only: the pass has used them already

            return show_weights

        # Register a torch hook at every point.
        handles = [self.embed.register_forward_hook(behind("token"))]
        handles.append(self.layers[0].register_forward_pre_hook(before("embed")))
        for i, layer in enumerate(self.layers):
            here = f"layer.{i}"
            handles.append(self.proj[i].register_forward_pre_hook(split(f"{here}.attn.heads")))
            if hook.wants(f"{here}.attn.weights"):
                handles.append(self.attn[i].register_forward_hook(look(f"{here}.attn.weights")))
            handles.append(self.attn[i].register_forward_hook(behind(f"{here}.attn.out")))
            handles.append(self.mlp[i].register_forward_hook(behind(f"{here}.mlp.out")))
            handles.append(layer.register_forward_hook(behind(f"{here}.resid")))
        handles.append(self.norm.register_forward_pre_hook(before("last")))
        handles.append(self.norm.register_forward_hook(behind("final")))

        # Run the pass, and leave the network as it was.
        network, usual = self.model.network, self.model.network.config._attn_implementation
        try:
            if any(hook.wants(f"layer.{i}.attn.weights") for i in range(self.n_layer)):
                # The only implementation that returns the attention weights.
                network.set_attn_implementation("eager")
            return hook("logits", network(ids, use_cache=False).logits.float())
        finally:
            network.set_attn_implementation(usual)
            for handle in handles:
                handle.remove()

    def read_stream(self, x: Tensor) -> Tensor:
        """Return the float32 logits (..., V) if x (..., C) were the output of the last layer."""
        return cap_logits(self.head(self.norm(x.to(self.head.weight.dtype))), self.softcap)

    def readout(self, x: Tensor, tokens: Sequence[int]) -> Tensor:
        """Return the linear map to the logits, as `GPTBody.readout`.

        Raises:
            ConfigError: a logit of this model is not a sum over the outputs of its parts.
        """
        centred = (
            isinstance(self.norm, torch.nn.LayerNorm)
            or getattr(self.head, "bias", None) is not None
        )
        biased = any(getattr(part, "bias", None) is not None for part in self.proj)
        if centred or biased or hasattr(self.layers[0], "post_feedforward_layernorm"):
            kind = type(self.model.network).__name__
            raise ConfigError(
                f"A logit of a {kind} is no plain sum over its parts; use a Llama-like model."
            )

        # The factor by which the RMS norm multiplies each channel at x.
        ones = torch.ones_like(x)
        x = torch.where(x == 0, 1e-9 * ones, x).to(self.device, self.head.weight.dtype)
        gain = self.norm(x).cpu().double() / x.cpu().double()
        return self.head.weight[list(tokens)].cpu().double() * gain

    def head_map(self, layer: int) -> Tensor:
        """Return the map (H, D, C) by which each head's result is written into the stream."""
        weight = self.proj[layer].weight
        # GPT-2's Conv1D stores (H * D, C) already.
        flat = weight.T if isinstance(self.proj[layer], torch.nn.Linear) else weight
        return flat.reshape(self.n_head, self.head_dim, -1)


def find_part(module: Any, *names: str) -> Any:
    """Return a part of a network by the first of its usual names.

    Raises:
        ConfigError: the network has none of them.
    """
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    kind = type(module).__name__
    raise ConfigError(
        f"A {kind} has none of {', '.join(names)}, so no probe finds its parts; use another."
    )


def dissect(model: Any) -> Any:
    """Return the body of a model, a GPTBody or a ForeignBody.

    Raises:
        ConfigError: the type of the model is not supported.
    """
    if isinstance(model, GPT):
        return GPTBody(model)
    if isinstance(model, ForeignModel):
        return ForeignBody(model)
    raise ConfigError(
        f"{type(model).__name__} cannot be looked into; open a model with open_model."
    )
