"""The one error of this package."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or what lies on disk is not what was written.

    The message says which file, what was expected, what was got, and what to do.
    """
