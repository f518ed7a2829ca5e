"""The errors that primechat raises for things a user can mend.

Every message is one sentence of three parts: the value, the rule, the remedy. The command line prints it
without a traceback.
"""


class PrimechatError(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(PrimechatError, ValueError):
    """A setting breaks a rule."""


class CheckpointError(PrimechatError):
    """A checkpoint is missing, incomplete, unsafe or of another kind."""


class DataError(PrimechatError):
    """A text, a corpus or a tokenizer file cannot be used."""


class HubError(PrimechatError):
    """The Hugging Face Hub cannot be reached or refuses."""


class StoppedError(PrimechatError):
    """A stage was stopped before there was anything to save."""


def explain_error(error: BaseException) -> str:
    """Return an error as a page shows it: ours are sentences, others are named."""
    return str(error) if isinstance(error, PrimechatError) else f"{type(error).__name__}: {error}"
