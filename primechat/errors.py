"""Errors that a user can fix.

Every message is one sentence of three parts: the value, the rule and the remedy. The command line prints it
without a traceback.
"""


class PrimechatError(Exception):
    """Base class of all errors that a user can fix."""


class ConfigError(PrimechatError, ValueError):
    """A setting breaks a rule."""


class CheckpointError(PrimechatError):
    """A checkpoint is missing, incomplete, unsafe or of the wrong kind."""


class DataError(PrimechatError):
    """A text, a corpus or a tokenizer file cannot be used."""


class HubError(PrimechatError):
    """The Hugging Face Hub cannot be reached or refuses a request."""


class StoppedError(PrimechatError):
    """A stage was stopped before there was anything to save."""


def explain_error(error: BaseException) -> str:
    """Return the text of an error for a page: the message of ours, type and message of any other."""
    return str(error) if isinstance(error, PrimechatError) else f"{type(error).__name__}: {error}"
