"""What does the model write now? Short samples for the log of a training, a check and the labs.

A sample depends on the seed alone, so that two models are compared by the same random numbers. It is drawn
at temperature 0.8 from the 50 most likely tokens, unless options of `Engine.generate` say otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from primechat.infer.engine import Engine, Options

if TYPE_CHECKING:
    from typing_extensions import Unpack

SAMPLE: Options = {"max_new_tokens": 48, "temperature": 0.8, "top_k": 50}


def write_continuation(
    engine: Engine, prompt: str, seed: int = 0, /, **options: Unpack[Options]
) -> str:
    """Return the model's continuation of a text, as a base model is asked.

    Args:
        engine: the model.
        prompt: the text to continue.
        seed: of the random numbers.
        options: of `Engine.generate`, in place of the usual ones.
    """
    chosen: Options = {**SAMPLE, "seed": seed, **options}
    return engine.complete(prompt, **chosen).read()


def write_reply(engine: Engine, message: str, seed: int = 0, /, **options: Unpack[Options]) -> str:
    """Return the model's reply to a message, as a chat model is asked.

    Args:
        engine: the model.
        message: what the user says, as the first turn of a conversation.
        seed: of the random numbers.
        options: of `Engine.generate`, in place of the usual ones.
    """
    messages = [{"role": "user", "content": message}]
    chosen: Options = {**SAMPLE, "seed": seed, **options}
    return engine.chat(messages, **chosen).read()
