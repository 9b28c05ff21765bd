"""Fields on logging and trackers."""

# ruff: noqa: RUF009 (``option`` returns a ``dataclasses.field``)

from dataclasses import dataclass
from typing import Literal

from ..enums import IntervalStrategy
from ..reporting import TRACKERS
from .option import option

LOG_LEVELS: dict[str, int] = {
    "detail": 10,
    "debug": 10,
    "info": 20,
    "warning": 30,
    "error": 40,
    "critical": 50,
    "passive": -1,
}
"""Names of ``log_level`` and the numbers of ``logging``; -1 leaves the present level alone."""

TOKEN_COUNTS = ("all", "non_padding", "no")
"""Valid values of ``include_num_input_tokens_seen`` once True and False are translated."""


@dataclass(repr=False)
class LoggingFields:
    """What is logged, how often, and where it goes."""

    logging_strategy: IntervalStrategy | str = option("steps", "When the training loss is logged.")
    logging_steps: float = option(
        500, "Updates between two logs; below 1 a fraction of all updates, rounded up."
    )
    logging_first_step: bool = option(False, "Log the first step as well.")
    log_on_each_node: bool = option(
        True, "Let the first process of every node use log_level, not only that of the first node."
    )
    logging_nan_inf_filter: bool = option(
        True, "Leave NaN and infinite losses out of the logged average. Gradients are not touched."
    )
    include_num_input_tokens_seen: str | bool = option(
        "no",
        "Count input tokens in the state and the logs: all, non_padding or no. True means all.",
        choices=(*TOKEN_COUNTS, True, False),
    )
    log_level: str = option(
        "passive",
        "Verbosity of the main process; passive keeps the level that is set.",
        choices=LOG_LEVELS,
    )
    log_level_replica: str = option(
        "warning", "Verbosity of all other processes.", choices=LOG_LEVELS
    )
    disable_tqdm: bool | None = option(
        None, "Print lines instead of a progress bar. None: only if the log level is above warning."
    )
    report_to: str | list[str] | None = option(
        "none",
        f"Trackers that receive the logs: {', '.join(TRACKERS)}; or all (that are installed) or none. "
        "The Trainer of this version refuses all but none.",
    )
    run_name: str | None = option(None, "Label of the run in trackers.")
    project: str = option("huggingface", "Name of the project in Trackio.")
    trackio_space_id: str | None = option(
        None, "Hub Space that shows live Trackio charts. None keeps the data on this machine."
    )
    trackio_bucket_id: str | None = option(
        None, "Hub bucket that stores Trackio data. None derives a name."
    )
    trackio_static_space_id: str | Literal[False] | None = option(
        None,
        "Static Space made after training. False makes none; None makes one if the model is pushed.",
    )
    logging_dir: str | None = option(
        None, "Former setting of TensorBoard's folder; set TENSORBOARD_LOGGING_DIR instead."
    )
