"""Settings of models that talk to themselves or to each other.

The string below a field is its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from primechat.config.runtime import RuntimeConfig, check_drawing, check_number
from primechat.config.stages import check_tag
from primechat.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class AutochatConfig:
    """Let a model talk to itself, or to another one, and keep every token's entropy."""

    tag: str = "talk"
    """Name of the folder in autochat that keeps the conversations."""
    resume: bool = False
    """Go on with the conversations of this tag."""
    model: str = ""
    """Model that speaks first and every other turn; empty is the default model."""
    partner: str = ""
    """Model that speaks in between; empty is the same one."""
    personas: tuple[str, str] = ("", "")
    """System prompts of the two speakers."""
    openings: str = "chitchat"
    """First turns: chitchat (those of its held-out human conversations), or a .txt file, one a line."""
    n_conversations: int = 32
    """Conversations."""
    turns: int = 20
    """Turns of each, the opening included."""
    max_new_tokens: int = 48
    """Tokens of a turn at most."""
    temperature: float = 0.8
    """0 always takes the likeliest token; higher is more varied."""
    top_k: int = 50
    """Sample from this many of the likeliest tokens; 0 from all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that reach this probability together."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that a speaker has in view become less likely (Keskar et al. 2019); 1 is off."""
    seed: int = 0
    """Seed of all conversations; each has its own numbers."""
    batch_rows: int = 32
    """Conversations that are written at once."""
    human_every: int = 0
    """Each so many turns a human sentence takes the place of the model's; 0 is never."""
    generations: int = 0
    """Times to fine-tune the model on its own conversations and let it talk again."""
    human_share: float = 0.0
    """Share of human conversations among those that a generation learns from."""
    tune_steps: int = 30
    """Optimizer steps of a generation."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Device, precision, threads."""

    def __post_init__(self) -> None:
        check_tag(self.tag)
        check_drawing(self)
        for name in ("n_conversations", "batch_rows", "tune_steps"):
            check_number(name, getattr(self, name), low=1, whole=True)
        check_number("turns", self.turns, low=2, whole=True)
        for name in ("human_every", "generations"):
            check_number(name, getattr(self, name), low=0, whole=True)
        check_number("human_share", self.human_share, low=0, high=0.95)
        if self.generations and self.n_conversations < 2:  # one to train on, one held out
            raise ConfigError(
                "n_conversations=1 must be 2 or more where generations learn from them; try 32."
            )
        if len(self.personas) != 2:
            raise ConfigError(
                f"personas={self.personas!r} must be two texts; give an empty one for none."
            )
