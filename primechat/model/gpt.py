"""The GPT: integers to logits and losses, both generations of nanochat behind named switches.

Read it from `GPT.hidden` downwards: embed the tokens, run the blocks (attention, then MLP, each adding to
the residual stream), norm; `logits` and `loss` follow. These are the plain formulas; model/fast_cpu.py has
some of them in faster forms, and the few places that use those say so. Reference: nanochat (October 2025
and 2026), whose state_dict keys are kept; Vaswani et al. 2017; Su et al. 2021 (rotary positions); Henry et
al. 2020 (norm on queries and keys).
"""

# Numerics        parameters   compute    rotary table   loss      cache
# CPU fp32        float32      float32    rope_dtype     float32   float32
# CPU bf16 units  float32      bfloat16   rope_dtype     float32   float32
# MPS             float32      float32    rope_dtype     float32   float32
# CUDA            float32      bfloat16   rope_dtype     float32   bfloat16
# A model loaded for inference holds its parameters in the compute dtype.

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from primechat.config.model import GATE_CHANNELS, NORM_EPS, SMEAR_CHANNELS, GPTConfig, InitConfig
from primechat.model import fast_cpu
from primechat.model.attention import Documents, Rows, attend, attention_weights
from primechat.model.init import draw_weights
from primechat.model.kv_cache import KVCache
from primechat.model.losses import cap_logits, sum_cross_entropy, token_cross_entropy
from primechat.protocols import Hook

if TYPE_CHECKING:
    from primechat.model.lora import Adapter

TABLE_FACTOR = 10  # nanochat: the rotary table reaches 10 x sequence_len
Rotary = tuple[Tensor, Tensor]  # cos and sin, (T, 1, D) or (B, T, 1, D)


class NoHook:
    """Nobody listens: every tensor passes as it is."""

    def wants(self, point: str) -> bool:
        """Return whether a point that costs extra work is wanted."""
        return False

    def __call__(self, point: str, x: Tensor) -> Tensor:
        """Return what the pass goes on with."""
        return x


NO_HOOK = NoHook()


@dataclass(frozen=True)
class Context:
    """Where the tokens of one forward pass stand, and what each of them may read besides itself.

    Attributes:
        rotary: the rotary tables at the tokens' positions.
        n_before: tokens that the cache held before this pass.
        cache: keys and values of the tokens before; None where the text begins with this pass.
        documents: in packed rows, which document each token belongs to; None where a row is one text.
    """

    rotary: Rotary
    n_before: Rows = 0
    cache: KVCache | None = None
    documents: Documents | None = None


def norm(x: Tensor) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) over the last dimension (Zhang & Sennrich 2019; no learned gain)."""
    if x.is_cpu:
        return fast_cpu.norm(x)
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Return x (B, T, H, D) with each pair of channels (j, j + D/2) turned by minus its position's angle.

    The tables hold cos twice, and sin followed by -sin.
    """
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin)


class Linear(nn.Linear):
    """A map without bias that computes in the dtype of its input."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias=False)
        self.adapter: Adapter | None = None  # what model.lora hangs beside it

    def reset_parameters(self) -> None:
        """Draw nothing on the meta device: there it makes torch import SymPy, 75 MB and seconds."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return self.adapt(F.linear(x, self.weight.to(x.dtype)), x)

    def adapt(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y = W x with what adapters make of x."""
        return y if self.adapter is None else self.adapter.add_to(y, x)

    def whole_weight(self) -> Tensor:
        """Return the weight with what its adapters add."""
        return self.weight if self.adapter is None else self.adapter.make_whole(self.weight)


class Embedding(nn.Embedding):
    """A table of vectors; on the meta device nothing is drawn either."""

    def reset_parameters(self) -> None:  # noqa: D102
        if not self.weight.is_meta:
            super().reset_parameters()


class Attention(nn.Module):
    """Causal self-attention with rotary positions and normed queries and keys."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.name = f"layer.{layer}.attn"
        self.window = config.window(layer)
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.head_dim
        # Queries and keys carry a gain each.
        self.scale = config.qk_gain**2 / config.head_dim**0.5
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.kv_dim)
        self.c_v = Linear(config.n_embd, config.kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        if config.has_value_embedding(layer):
            self.ve_gate = Linear(GATE_CHANNELS, config.n_kv_head)

    def forward(self, u: Tensor, ve: Tensor | None, context: Context, hook: Hook) -> Tensor:
        """Return what attention adds to the residual stream, (B, T, C).

        Args:
            u: the normed residual stream, (B, T, C).
            ve: the tokens' value embeddings in this layer, (B, T, K * D), or None.
            context: positions, and what may be read.
            hook: called with each named tensor; what it returns is used in its place.
        """
        B, T, _ = u.shape

        # Each head's queries, keys and values.
        q, k, v = self.project(u)
        q = q.view(B, T, self.n_head, self.head_dim)  # (B, T, H, D)
        k = k.view(B, T, self.n_kv_head, self.head_dim)  # (B, T, K, D)
        v = v.view(B, T, self.n_kv_head, self.head_dim)  # (B, T, K, D)
        q, k = hook(f"{self.name}.q_raw", q), hook(f"{self.name}.k_raw", k)

        # A gated embedding of the token joins its values; the gate reads a few channels, from 0 to 3.
        if ve is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(u[..., :GATE_CHANNELS]))  # (B, T, K)
            v = torch.addcmul(v, gate.unsqueeze(-1), ve.view_as(v))

        # Positions enter as a rotation; normed afterwards, a query meets a key by their angle alone.
        q = hook(f"{self.name}.q", norm(rotate(q, context.rotary)))
        k = hook(f"{self.name}.k", norm(rotate(k, context.rotary)))
        v = hook(f"{self.name}.v", v)

        # Every token reads itself and the ones before it.
        out = self.read(q, k, v, context, hook)  # (B, T, H, D)

        # The heads are laid side by side and mixed.
        out = hook(f"{self.name}.heads", out)
        return hook(f"{self.name}.out", self.c_proj(out.reshape(B, T, -1)))

    def project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, T, H * D), keys and values (B, T, K * D)."""
        if not u.is_cpu:
            return self.c_q(u), self.c_k(u), self.c_v(u)
        q, k, v = fast_cpu.project(u, (self.c_q.weight, self.c_k.weight, self.c_v.weight))
        return self.c_q.adapt(q, u), self.c_k.adapt(k, u), self.c_v.adapt(v, u)

    def read(self, q: Tensor, k: Tensor, v: Tensor, context: Context, hook: Hook) -> Tensor:
        """Return for each query the weighed sum of the values that it may read, (B, T, H, D)."""
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)  # (B, S, K, D): all that was read so far
        documents = None if context.documents is None else context.documents.ids
        if hook.wants(f"{self.name}.weights"):
            weights = attention_weights(
                q,
                k,
                scale=self.scale,
                window=self.window,
                n_before=context.n_before,
                document_ids=documents,
            )
            hook(f"{self.name}.weights", weights)  # (B, H, T, S)
        return attend(
            q,
            k,
            v,
            scale=self.scale,
            window=self.window,
            n_before=context.n_before,
            document_ids=documents,
        )


class MLP(nn.Module):
    """Two maps with relu(x)^2 between (So et al. 2021)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.name = f"layer.{layer}.mlp"
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, u: Tensor, hook: Hook) -> Tensor:
        """Return what the MLP adds to the residual stream, (B, T, C), given that stream normed."""
        hidden = hook(f"{self.name}.pre", self.c_fc(u))  # (B, T, 4C)
        return hook(f"{self.name}.out", self.c_proj(F.relu(hidden).square()))


class Block(nn.Module):
    """Attention, then MLP; both read the normed stream and add to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attn, self.mlp = Attention(config, layer), MLP(config, layer)

    def forward(self, x: Tensor, ve: Tensor | None, context: Context, hook: Hook) -> Tensor:
        """Map the residual stream (B, T, C) to the next one."""
        x = x + self.attn(norm(x), ve, context, hook)
        x = x + self.mlp(norm(x), hook)
        return hook(f"layer.{self.layer}.resid", x)


class GPT(nn.Module):
    """A language model; its parameters carry the keys of nanochat's checkpoints."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32
        # In training: compute each block again in the backward pass instead of keeping its inside.
        self.checkpoint_blocks = False

        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(config.n_layer))
            self.x0_lambdas = nn.Parameter(torch.zeros(config.n_layer))
        if config.smear:
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))

        rows = config.padded_vocab
        blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.transformer = nn.ModuleDict({"wte": Embedding(rows, config.n_embd), "h": blocks})
        self.lm_head = Linear(config.n_embd, rows)
        if config.smear:
            self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        layers = [i for i in range(config.n_layer) if config.has_value_embedding(i)]
        self.value_embeds = nn.ModuleDict({str(i): Embedding(rows, config.kv_dim) for i in layers})

        self.rotary: Rotary | None = None  # made when first needed
        self.token_weights: list[fast_cpu.LayerWeights] | None = None  # likewise, to decode with

    # ---- the forward pass

    def hidden(
        self,
        ids: Tensor,
        cache: KVCache | None = None,
        hook: Hook = NO_HOOK,
        documents: Documents | None = None,
    ) -> Tensor:
        """Return the normed final states (B, T, C) of ids (B, T).

        Args:
            ids: (B, T) int64.
            cache: what was read before; ids go behind it, and are kept there.
            hook: sees, and may change, what passes the points that `interp.hooks` names.
            documents: in packed rows, what keeps their documents apart.

        Raises:
            ValueError: more tokens than the rotary table or the cache has room for.
        """
        c = self.config
        context = self.open_context(ids, cache, documents)

        # The first residual stream; blocks may mix it in again.
        x = first = middle = hook("embed", self.embed(ids, context, hook))  # (B, T, C)
        if c.residual_scalars:
            keep, again = self.resid_lambdas.to(x.dtype), self.x0_lambdas.to(x.dtype)  # (L,)

        for i, block in enumerate(self.blocks):
            if c.residual_scalars:
                x = torch.addcmul(x * keep[i], first, again[i])
            ve = None
            if c.has_value_embedding(i):
                ve = self.value_embeds[str(i)](ids).to(x.dtype)  # (B, T, K * D)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, x, ve, context, hook, use_reentrant=False)
            else:
                x = block(x, ve, context, hook)
            if i == c.n_layer // 2:
                middle = x

        if c.backout:
            x = x - self.backout_lambda.to(x.dtype) * middle
        if cache is not None:
            cache.lengths = [n + ids.size(1) for n in cache.lengths]
        return hook("final", norm(hook("last", x)))

    def open_context(
        self, ids: Tensor, cache: KVCache | None, documents: Documents | None
    ) -> Context:
        """Return where ids (B, T) stand and what they may read."""
        n_new, room = ids.size(1), self.max_context
        n_held = 0
        if cache is not None:
            n_held, room = max(cache.lengths), min(room, cache.capacity)
        if n_held + n_new > room:
            raise ValueError(
                f"{n_held + n_new} tokens do not fit in {room} places; shorten the text."
            )

        n_before: Rows = n_held
        at: slice | Tensor = slice(n_held, n_held + n_new)
        if documents is not None:
            at = documents.places  # (B, T)
        elif cache is not None and not cache.is_even:
            n_before = torch.tensor(cache.lengths, device=ids.device)  # (B,)
            at = n_before[:, None] + torch.arange(n_new, device=ids.device)  # (B, T)
        cos, sin = self.rotary_table()
        return Context((cos[at], sin[at]), n_before, cache, documents)

    def embed(self, ids: Tensor, context: Context, hook: Hook = NO_HOOK) -> Tensor:
        """Return the first residual stream (B, T, C): normed embeddings, smeared where the switch is on.

        Smearing adds to each embedding a gated share of the one before it in the same text.
        """
        e = hook("token", norm(self.transformer["wte"](ids).to(self.compute_dtype)))
        if not self.config.smear:
            return e

        cache, documents = context.cache, context.documents
        before = torch.zeros_like(e[:, :1])  # the first token has none before it ...
        if cache is not None:
            if cache.last_embed is not None:
                before = cache.last_embed[:, None]  # ... unless the cache has read it
            cache.last_embed = e[:, -1]

        share = torch.sigmoid(self.smear_gate(e[..., :SMEAR_CHANNELS]))  # (B, T, 1)
        share = share * self.smear_lambda.to(e.dtype)
        if documents is not None:
            share = share * (documents.places > 0)[..., None]
        return e + share * torch.cat((before, e[:, :-1]), dim=1)

    def logits(self, h: Tensor) -> Tensor:
        """Return float32 logits (..., V), capped, of normed final states (..., C)."""
        return cap_logits(self.lm_head(h)[..., : self.config.vocab_size], self.config.logit_softcap)

    def forward(self, ids: Tensor) -> Tensor:
        """Return float32 logits (B, T, V) of ids (B, T) int64."""
        return self.logits(self.hidden(ids))

    def loss(
        self, ids: Tensor, targets: Tensor, reduction: str = "mean", bos_id: int = -1
    ) -> Tensor:
        """Return the cross-entropy in nats.

        Args:
            ids: (B, T) int64.
            targets: (B, T) int64; -1 is ignored.
            reduction: mean over the targets that count, sum, or none for (B, T) with 0 where ignored.
            bos_id: what each of these begins is kept apart from its neighbours in the row; -1: nothing is.
        """
        documents = None if bos_id < 0 else Documents.find(ids, bos_id)
        h = self.hidden(ids, documents=documents)
        head = (
            self.lm_head.weight,
            targets,
            self.config.logit_softcap,
            self.config.vocab_size,
        )
        if reduction == "none":
            return token_cross_entropy(h, *head)
        total = sum_cross_entropy(h, *head)
        return total if reduction == "sum" else total / (targets >= 0).sum().clamp(min=1)

    @torch.inference_mode(False)  # a table first needed in decoding must serve training too
    def rotary_table(self) -> Rotary:
        """Return the tables cos and sin, (10 * sequence_len, 1, D), in the compute dtype, made once a
        device.

        Source: nanochat, gpt.py: angle t * base^(-2j/D) in float32, rounded to rope_dtype.
        """
        device, dtype = self.device, self.compute_dtype
        if self.rotary is not None:
            if self.rotary[0].device == device and self.rotary[0].dtype == dtype:
                return self.rotary

        c = self.config
        even = torch.arange(0, c.head_dim, 2, dtype=torch.float32, device=device)
        speed = c.rope_base ** -(even / c.head_dim)  # (D / 2,)
        place = torch.arange(self.max_context, dtype=torch.float32, device=device)
        angle = place[:, None] * speed
        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "compute": dtype}
        cos = angle.cos().to(kinds[c.rope_dtype]).to(dtype)[:, None]
        sin = angle.sin().to(kinds[c.rope_dtype]).to(dtype)[:, None]
        self.rotary = torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)
        return self.rotary

    # ---- reading on, with a cache

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Return an empty cache for `batch_size` rows of up to `capacity` tokens."""
        c = self.config
        # On a CPU, SDPA of one bfloat16 query takes 3 to 4 times as long as of a float32 one.
        dtype = torch.float32 if self.device.type == "cpu" else self.compute_dtype
        shape = (c.n_layer, batch_size, c.n_kv_head, capacity, c.head_dim)
        return KVCache(*shape, dtype=dtype, device=self.device)

    @torch.inference_mode()
    def advance(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Read ids (B, T) into the cache; return the float32 logits (B, V) that follow the last one."""
        room = min(self.max_context, cache.capacity)
        is_frozen = not (self.lm_head.weight.requires_grad or self.training)
        one_more = ids.size(1) == 1 and min(cache.lengths) > 0 and max(cache.lengths) < room
        if is_frozen and one_more:
            return self.logits(self.decode_token(ids, cache))
        return self.logits(self.hidden(ids, cache)[:, -1])

    @torch.inference_mode()
    def read_padded(self, ids: Tensor, counts: list[int], cache: KVCache) -> Tensor:
        """Read of each row of ids (B, T) its first `counts` into an empty cache; return logits (B, V).

        What pads a row stands behind its tokens, which do not see it, and is overwritten by what comes.
        """
        h = self.hidden(ids, cache)
        rows = torch.arange(len(counts), device=ids.device)
        last = torch.tensor(counts, device=ids.device) - 1
        cache.lengths = list(counts)
        if cache.last_embed is not None:
            cache.last_embed = norm(self.transformer["wte"](ids[rows, last]).to(self.compute_dtype))
        return self.logits(h[rows, last])

    def decode_token(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Do what `hidden` does for one token a row, ids (B, 1); return (B, C).

        A small model spends half its time in Python: these are the same formulas in fewer calls.
        """
        if self.token_weights is None:
            self.token_weights = [
                lay_out_weights(self, cast(Block, block)) for block in self.blocks
            ]
        context = self.open_context(ids, cache, None)
        cos, sin = context.rotary  # (1, 1, D) or (B, 1, 1, D)
        rotary = cos.squeeze(-3), sin.squeeze(-3)  # (1, D) or (B, 1, D)
        x = self.embed(ids, context)[:, 0]  # (B, C)
        x, middle = fast_cpu.run_layers(x, ids[:, 0], self.token_weights, rotary, cache)
        if self.config.backout:
            x = x - self.backout_lambda * middle
        cache.lengths = [n + 1 for n in cache.lengths]
        return norm(x)

    def forget_token_weights(self) -> None:
        """Drop what `decode_token` has laid out; whoever changes weights or adapters calls this."""
        self.token_weights = None

    # ---- making one

    @classmethod
    def from_state(
        cls,
        config: GPTConfig,
        state: dict[str, Tensor],
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> GPT:
        """Return a frozen model around tensors by nanochat's keys, in eval mode.

        One tensor is cast at a time, without a second copy of the weights: the dictionary is emptied on the
        way. `dtype` is that of parameters and compute.
        """
        with torch.device("meta"):
            model = cls(config)
        for key in list(state):
            state[key] = state[key].to(device=device, dtype=dtype)
        model.load_state_dict(state, strict=True, assign=True)
        state.clear()
        model.compute_dtype = dtype
        return model.requires_grad_(False).eval()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, init: InitConfig | None = None) -> None:
        """Draw fresh weights; without a config our own."""
        named = self.named_parameters()
        draw_weights(named, self.config.n_embd, init or InitConfig(), generator)

    # ---- what every language model offers (protocols.LanguageModel)

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers."""
        return cast(nn.ModuleList, self.transformer["h"])

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.config.vocab_size

    @property
    def sequence_len(self) -> int:
        """Tokens of context in training."""
        return self.config.sequence_len

    @property
    def max_context(self) -> int:
        """Most tokens that can be read: the length of the rotary table."""
        return TABLE_FACTOR * self.config.sequence_len

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.lm_head.weight.device


@torch.inference_mode(
    False
)  # the weights become views of what is made here, and may be changed later
@torch.no_grad()
def lay_out_weights(model: GPT, block: Block) -> fast_cpu.LayerWeights:
    """Return a frozen block's weights as `fast_cpu.run_layers` wants them; only adapted ones are copied."""
    attn, mlp, c = block.attn, block.mlp, model.config
    layer = block.layer
    has_table = c.has_value_embedding(layer)
    return fast_cpu.LayerWeights(
        layer=layer,
        n_head=attn.n_head,
        n_kv_head=attn.n_kv_head,
        scale=attn.scale,
        window=attn.window,
        qkv=join_weights(attn.c_q, attn.c_k, attn.c_v),
        proj=attn.c_proj.whole_weight().T,
        fc=mlp.c_fc.whole_weight(),
        out=mlp.c_proj.whole_weight().T,
        keep=float(model.resid_lambdas[layer]) if c.residual_scalars else None,
        again=float(model.x0_lambdas[layer]) if c.residual_scalars else 0.0,
        table=cast(Embedding, model.value_embeds[str(layer)]).weight if has_table else None,
        gate=attn.ve_gate.weight if has_table else None,
    )


def join_weights(*maps: Linear) -> Tensor:
    """Return the weights of frozen maps, one above the other, with what adapters add.

    Without adapters the maps become views of the result, so that no weight is held twice.
    """
    joined = torch.cat([f.whole_weight() for f in maps])
    if all(f.adapter is None for f in maps):
        for f, part in zip(maps, joined.split([len(f.weight) for f in maps]), strict=True):
            f.weight = nn.Parameter(part, requires_grad=False)
    return joined
