"""Show progress and log records on the terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping
from typing import Any

from .base import TrainerCallback
from .control import TrainerControl
from .jsonable import to_jsonable
from .state import TrainerState


def display_record(logs: Mapping[str, Any], max_str_len: int | None = None) -> dict[str, Any]:
    """Return a copy of a log record that is fit for reading.

    Floats are shortened to four significant digits, ``total_flos`` is left out, and strings of
    more than `max_str_len` characters (None: no limit) give way to a note of their length.
    """
    shown: dict[str, Any] = {}
    for name, raw in logs.items():
        if name == "total_flos":
            continue
        value = to_jsonable(raw, name)
        if isinstance(value, float):
            value = f"{value:.4g}"
        elif isinstance(value, str) and max_str_len is not None and len(value) > max_str_len:
            value = (
                f"[text of {len(value)} characters, more than max_str_len={max_str_len}; "
                "raise max_str_len to see it]"
            )
        shown[name] = value
    return shown


def sized_length(loader: Any) -> int | None:
    """Return ``len(loader)``, or None where a loader has no length."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _is_in_a_file(bar: Any) -> bool:
    """Tell whether a bar is drawn into a file or a pipe, not on a terminal or in a notebook."""
    stream = sys.stderr
    return hasattr(bar, "fp") and isinstance(stream, io.TextIOWrapper) and not stream.isatty()


class ProgressCallback(TrainerCallback):
    """Show a tqdm bar over steps, one over evaluation batches, and each log record.

    Only the main process shows anything.

    Args:
        max_str_len: Longer strings in log records are not shown.
    """

    def __init__(self, max_str_len: int = 100) -> None:
        self.max_str_len = max_str_len
        self.training_bar: Any = None
        self.prediction_bar: Any = None
        self.current_step = 0
        self._ended: float | None = None

    def make_bar(self, total: int | None, initial: int = 0, leave: bool = True) -> Any:
        """Return a new bar with the methods ``update(n)``, ``write(text)`` and ``close()``."""
        from tqdm import tqdm

        return tqdm(total=total, initial=initial, leave=leave, dynamic_ncols=True)

    def show_record(self, record: dict[str, Any], step: int) -> None:
        """Show a log record, made readable, that belongs to `step`."""
        bar = self.training_bar
        if not _is_in_a_file(bar):
            bar.write(str(record))
            return
        # Nothing moves out of the way there: what was drawn of the bar ends its line.
        if bar.last_print_t != self._ended:
            bar.fp.write("\n")
            self._ended = bar.last_print_t
        print(record, flush=True)

    def close(self) -> None:
        """Close the bars that are open. Safe to call at any time."""
        self._close_prediction_bar()
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def _close_prediction_bar(self) -> None:
        if self.prediction_bar is not None:
            self.prediction_bar.close()
            self.prediction_bar = None

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, at the step from which a resumed training goes on."""
        self.close()  # a training that failed or started again leaves its bars open
        self.current_step = state.global_step
        if state.is_world_process_zero:
            self.training_bar = self.make_bar(state.max_steps, initial=state.global_step)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar on."""
        if self.training_bar is not None:
            self.training_bar.update(state.global_step - self.current_step)
            self.current_step = state.global_step

    def on_prediction_step(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Open the evaluation bar at the first batch and move it on."""
        if not state.is_world_process_zero:
            return
        if self.prediction_bar is None:
            self.prediction_bar = self.make_bar(
                sized_length(eval_dataloader), leave=self.training_bar is None
            )
        self.prediction_bar.update(1)

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the evaluation bar."""
        self._close_prediction_bar()

    def on_predict(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the evaluation bar."""
        self._close_prediction_bar()

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the record: above the bar, or, in a file, on a line of its own."""
        if self.training_bar is not None and logs is not None:
            self.show_record(display_record(logs, self.max_str_len), state.global_step)

    def on_train_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bars."""
        self.close()


class PrinterCallback(TrainerCallback):
    """Print each log record, on the main process of each node. The record is left as it is."""

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the record."""
        if state.is_local_process_zero and logs is not None:
            print(display_record(logs))
