"""Fields that the Hugging Face arguments do not have."""

import os
from dataclasses import dataclass

from .option import option

CHECKPOINT_FORMATS = ("safe", "hf")
CHECKPOINT_FORMAT_VARIABLE = "TRAINER_CHECKPOINT_FORMAT"


def default_checkpoint_format() -> str:
    """Return the format named by ``TRAINER_CHECKPOINT_FORMAT``, or ``"safe"`` if it is unset.

    Raises:
        ValueError: The variable names no format.
    """
    value = os.environ.get(CHECKPOINT_FORMAT_VARIABLE) or "safe"
    if value not in CHECKPOINT_FORMATS:
        raise ValueError(
            f"The environment variable {CHECKPOINT_FORMAT_VARIABLE} must be one of "
            f"{', '.join(map(repr, CHECKPOINT_FORMATS))}, got {value!r}."
        )
    return value


@dataclass(repr=False)
class ExtensionFields:
    """Execution, reproducibility, checkpoint format and figures."""

    capture: str = option(
        "auto",
        "Record steps in CUDA graphs where the run allows it (auto), or never (off).",
        choices=("auto", "off"),
    )
    exact_reduction: bool = option(
        False, "Sum gradients in a fixed order: the same bits on 1, 2, 4, 8, ... processes."
    )
    on_nonfinite: str = option(
        "ignore",
        "What to do with an update whose loss or gradients are NaN or infinite: make it (ignore), leave it "
        "out (skip), stop (raise). They are counted and warned of in any case.",
        choices=("ignore", "skip", "raise"),
    )
    async_save: bool = option(False, "Write checkpoints in the background while training goes on.")
    checkpoint_format: str = option(
        help="Files of checkpoints: safe (no pickle) or hf (those of Hugging Face, some of them pickles). "
        "Both are verified. "
        "The environment variable TRAINER_CHECKPOINT_FORMAT sets the default.",
        factory=default_checkpoint_format,
        choices=CHECKPOINT_FORMATS,
    )
    log_digest_steps: int = option(
        0,
        "Write a digest of the training state to digests.jsonl every so many steps; 0 writes none.",
    )
    log_figures: bool = option(
        False,
        "Add tokens/s, MFU, peak memory and the time spent waiting for data to every log record.",
    )
    peak_tflops: float | None = option(
        None,
        "Dense operations per second of one device, in units of 1e12 and in the precision that is trained "
        "in: what the MFU of log_figures is a share of. Unset, that of bfloat16 on devices that are known.",
    )
