"""Model identifiers, parsed and formatted.

`base/d4` is the newest step of a run, `base/d4@600` one step, `base/d4@snap:64` a snapshot of its weights; a
family alone (`sft`) is its default tag. The prefix `shipped/` means the model that ships with primechat.
`hf:smollm2` and `hf:owner/name` are models of other projects. `lora:pirate*0.5+sft/d4` is a model with an
adapter at half strength; several adapters may precede the model. The registry also accepts `lora:pirate`
alone, and reads from the adapter which model it was trained on. A by-product is one of many small runs that a
lab trains for a comparison: its folder carries a mark (`registry.mark_by_product`), and older ones are
recognised by their names. Reference: primechat.checkpoint.registry, which knows where each model is stored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from primechat.config.stages import check_tag
from primechat.errors import ConfigError

FAMILIES = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
FORMS = "base/d4, base/d4@600, base/d4@snap:64, sft, shipped/sft, hf:smollm2, lora:pirate, lora:pirate+sft/d4"
ADAPTER = re.compile(r"lora:([A-Za-z0-9][A-Za-z0-9_-]{0,99})(?:\*(\d{1,3}(?:\.\d+)?))?")
FOLDERS = {**FAMILIES, "lora": "lora_checkpoints"}
IDENTIFIER = re.compile(r"(shipped/)?(base|mid|sft|rl)(?:/([^/@]+)(?:@(snap:)?(\d{1,9}))?)?")
FOREIGN = re.compile(
    r"hf:(smollm2|[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@[A-Za-z0-9][\w.-]*)?)", re.ASCII
)
BY_PRODUCT = re.compile(  # tags of by-products made before the mark existed
    r"lab0[678]-.+-\d+-[0-9a-f]{6}"  # labs 06 to 08: what is compared, seed, hash of the settings
    r"|.+-(?:everything-on|without-[\w-]+)-\d+-[0-9a-f]{6}"  # lab 05: an ablation
    r"|small-\d+-\d{5,10}-\d+"  # lab 04: layers, tokens, seed
    r"|lab09-.+-g\d+"  # lab 09: a generation trained on its own conversations
)


@dataclass(frozen=True, kw_only=True)
class ModelName:
    """A parsed identifier; an empty tag is the default one, a step of None the newest.

    For a model of another project, the family is `hf` and the tag is its name.
    """

    family: str
    tag: str = ""
    step: int | None = None
    snapshot: bool = False
    shipped: bool = False
    adapters: tuple[tuple[str, float], ...] = ()  # (tag, strength)

    def __str__(self) -> str:
        if self.family == "hf":
            return f"hf:{self.tag}"
        at = "" if self.step is None else f"@snap:{self.step}" if self.snapshot else f"@{self.step}"
        name = f"{self.family}/{self.tag}{at}" if self.tag else self.family
        beside = "".join(
            f"lora:{a}{'' if scale == 1 else f'*{scale:g}'}+" for a, scale in self.adapters
        )
        return f"{beside}shipped/{name}" if self.shipped else f"{beside}{name}"


def parse_identifier(text: str) -> ModelName:
    """Return the parts of an identifier.

    >>> parse_identifier("base/d4@snap:64").step
    64
    >>> parse_identifier("lora:pirate*0.5+lora:music+sft/d4").adapters
    (('pirate', 0.5), ('music', 1.0))

    Raises:
        ConfigError: it is not a valid identifier.
    """
    # A model of another project.
    if foreign := FOREIGN.fullmatch(text):
        return ModelName(family="hf", tag=foreign[1])

    # Adapters before the last +, then the model.
    *beside, plain = text.split("+")
    adapters = [ADAPTER.fullmatch(part) for part in beside]
    match = IDENTIFIER.fullmatch(plain)
    if not match or not all(adapters):
        raise ConfigError(
            f"model={text[:80]!r} must be like {FORMS}; `primechat models` lists what is here."
        )
    if match[3]:
        check_tag(match[3])
    step = int(match[5]) if match[5] else None
    return ModelName(
        family=match[2],
        tag=match[3] or "",
        step=step,
        snapshot=bool(match[4]),
        shipped=bool(match[1]),
        adapters=tuple((a[1], float(a[2] or 1)) for a in adapters if a),
    )


def parse_plain(text: str) -> ModelName:
    """Return the parts of the identifier of a model without adapters.

    Raises:
        ConfigError: it is not a valid identifier, or it has adapters.
    """
    name = parse_identifier(text)
    if name.adapters:
        own = replace(name, adapters=())
        raise ConfigError(f"model={text[:80]!r} must be a model without adapters here; try {own}.")
    return name
