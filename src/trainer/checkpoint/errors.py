"""The errors of this package."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or what lies on disk is not what was written.

    The message says which file, what was expected, what was got, and what to do.
    """


class NoCheckpoint(CheckpointError, ValueError):
    """There is no checkpoint where one was to be read: no such folder, or one with other things in it.

    A ValueError as well, which is what the Hugging Face Trainer raises.
    """
