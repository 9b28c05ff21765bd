"""Callbacks, and who is the main process."""

from typing import Any

from trainer.callbacks import (
    DEFAULT_CALLBACKS,
    CallbackHandler,
    PrinterCallback,
    default_progress_callback,
    export_callback_states,
)
from trainer.distributed.ranks import Ranks, ranks_of
from trainer.facade.base import TrainerBase


class CallbackMixin(TrainerBase):
    """Callbacks, and who is the main process."""

    def add_callback(self, callback: Any) -> None:
        """Append a callback, a class or an instance."""
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        """Remove a callback, by class or instance, and return it; None if it is not there."""
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        """Remove a callback, by class or instance."""
        self.callback_handler.remove_callback(callback)

    def is_local_process_zero(self) -> bool:
        """Tell whether this is the main process of its machine."""
        return self.args.local_process_index == 0

    def is_world_process_zero(self) -> bool:
        """Tell whether this is the main process of all."""
        return self.args.process_index == 0

    @property
    def _ranks(self) -> Ranks:
        return ranks_of(self.args)

    def _make_handler(self, callbacks: list[Any]) -> CallbackHandler:
        quiet = self.args.disable_tqdm
        last = PrinterCallback if quiet else default_progress_callback()
        chosen = [*DEFAULT_CALLBACKS, *callbacks, last]
        return CallbackHandler(chosen, self.model, self.processing_class, None, None)

    def _exported_callbacks(self) -> dict[str, Any]:
        return export_callback_states(self.callback_handler.callbacks, self.control)

    def _close_callbacks(self) -> None:
        for callback in list(self.callback_handler.callbacks):  # one may remove itself
            close = getattr(callback, "close", None)
            if callable(close):
                close()
