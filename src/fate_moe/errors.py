"""Every error a user can cause or meet, each with a sentence on what to do.

FateError
├── ConfigError            an option that does not exist or cannot be read
├── BudgetError            the memory budget is too small; names the smallest that works
├── ClosedModelError       a model is used after its engine was closed
├── UnsupportedCallError   a loaded model is asked for what it cannot do; says what to do instead
├── DiskSpaceError         a conversion would not fit on the disk
├── CheckpointError        the source checkpoint is missing, torn or malformed
│   └── UnsupportedModelError   it is whole, but of a kind this engine does not run
└── StoreError             the expert store is missing, of another version, or torn
    └── CorruptExpertError an expert's bytes differ from their checksum
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ClosedModelError",
    "ConfigError",
    "CorruptExpertError",
    "DiskSpaceError",
    "FateError",
    "StoreError",
    "UnsupportedCallError",
    "UnsupportedModelError",
]


class FateError(Exception):
    """Base of all errors of this package. The command line prints it as one line and exits with code 1."""


class ConfigError(FateError):
    """An option that does not exist or a value that cannot be read."""


class BudgetError(FateError):
    """The memory budget cannot hold the model; ``smallest_bytes`` is the smallest budget that works."""

    def __init__(self, message: str, smallest_bytes: int) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes


class ClosedModelError(FateError):
    """The model was closed; load it again."""

    def __init__(self, message: str = "this model has been closed; load it again") -> None:
        super().__init__(message)


class UnsupportedCallError(FateError):
    """A call that a loaded model cannot serve: its experts are in the store, not in its parameters. Says what to do instead."""


class DiskSpaceError(FateError):
    """The disk has no room for what is about to be written."""


class CheckpointError(FateError):
    """A source checkpoint that is missing, torn or malformed."""


class UnsupportedModelError(CheckpointError):
    """A whole checkpoint of a kind that this engine does not run (no routed experts, remote code, foreign quantization)."""


class StoreError(FateError):
    """An expert store that is missing, of another format version, or torn."""


class CorruptExpertError(StoreError):
    """The bytes of one expert differ from their checksum; names file, layer and expert."""


def first_line(error: Exception) -> str:
    """The first line of another library's ``error``, or its type's name if it has no text, to quote in a message.

    Not in ``__all__``, which lists the errors that are public.
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
