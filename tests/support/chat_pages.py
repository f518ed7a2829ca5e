"""A chat page whose model answers with what it was asked, for tests: slow, endless or hostile on demand."""

from __future__ import annotations

import time
from typing import Any

import torch
from tiny import HistoryModel, byte_tokenizer

from primechat.chat.session import ChatSettings, open_chat

TOKENIZER = byte_tokenizer()
START, END = TOKENIZER.special("<|user_start|>"), TOKENIZER.special("<|user_end|>")
CUE, STOP = TOKENIZER.special("<|assistant_start|>"), TOKENIZER.special("<|assistant_end|>")
TOOL = {
    mark: TOKENIZER.special(f"<|{name}|>")
    for mark, name in {"{": "python_start", "}": "python_end"}.items()
}


class EchoModel(HistoryModel):
    """Answers with the last message; after `endless:` it never ends; `{1+2}` calls the calculator.

    In upper case if it is the other of the two, so that their answers differ; the second likeliest token is
    always `x`.
    """

    def __init__(self, loud: bool = False, delay_s: float = 0.0) -> None:
        super().__init__(sequence_len=4000, max_context=400_000)
        self.loud, self.delay_s, self.steps = loud, delay_s, 0

    def score(self, row: list[int]) -> torch.Tensor:
        self.steps += 1
        time.sleep(self.delay_s)
        if CUE not in row:  # timed, not asked
            return torch.zeros(self.vocab_size)
        cue = len(row) - 1 - row[::-1].index(CUE)
        start, end = (
            len(row) - 1 - row[:cue][::-1].index(i) - (len(row) - cue) for i in (START, END)
        )
        asked = bytes(row[start + 1 : end]).decode().removeprefix("Be brief.\n\n")
        text = asked.upper() if self.loud else asked
        script = [TOOL.get(mark, mark) for mark in text] if "{" in text else list(text.encode())
        script = [i if isinstance(i, int) else ord(i) for i in script]
        place = len(row) - 1 - cue
        logits = torch.zeros(self.vocab_size)
        logits[ord("x")] = 6.0
        if asked.startswith("endless:"):
            script = list(b"on and ") * (place // 7 + 1)
        if "{" in text:  # the calculator's answer stands between the call and the rest
            done = row[cue + 1 :]
            place = len(strip_result(done))
        logits[script[place] if place < len(script) else STOP] = 9.0
        return logits


def strip_result(written: list[int]) -> list[int]:
    """Return what the model wrote itself."""
    first, last = (TOKENIZER.special(f"<|output_{name}|>") for name in ("start", "end"))
    own, inside = [], False
    for i in written:
        inside = inside or i == first
        if not inside:
            own.append(i)
        inside = inside and i != last
    return own


MODELS = {
    "shipped/sft": EchoModel(),
    "shipped/base": EchoModel(loud=True),
    "slow": EchoModel(delay_s=0.005),
}


def open_echo(identifier: str) -> tuple[Any, Any, dict[str, Any]]:
    """Open one of MODELS; all of them chat."""
    return MODELS[identifier], TOKENIZER, {"identifier": "sft/echo"}


def open_page(model: str = "shipped/sft") -> Any:
    """Return a chat page over the echo models."""
    settings = ChatSettings(temperature=0.0, max_new_tokens=100_000)
    return open_chat(model, settings=settings, opener=open_echo)
