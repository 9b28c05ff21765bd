"""Errors that callers may want to catch by name."""


class CaptureError(RuntimeError):
    """A step cannot be recorded in a CUDA graph; says what stands in the way, and where."""
