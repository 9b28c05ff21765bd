"""What leaves the trainer: logs, metrics, models, checkpoints."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from trainer import checkpoint, modeling, saving
from trainer.callbacks import restore_callback_states
from trainer.checkpoint import BackgroundWriter
from trainer.checkpoint.layout import ARGUMENTS as TRAINING_ARGS_NAME
from trainer.distributed import agree, fsdp_plan
from trainer.facade.base import TrainerBase
from trainer.figures import Figures
from trainer.metrics import format_metrics, table, write_results

logger = logging.getLogger(__name__)


class OutputMixin(TrainerBase):
    """What leaves the trainer: logs, metrics, models, checkpoints."""

    hub_model_id: str | None = None  # scripts that write model cards ask for it
    _figures: Figures | None = None
    _tokens_shared: int = 0  # of the tokens counted, those that all processes know of
    _counts_are_in: bool = False  # shared with the losses of the log that is being written

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the epoch to ``logs``, append them with the step to the history, tell the callbacks."""
        logs["epoch"] = self.state.epoch
        if self._tokens.how != "no":
            seen = logs["num_input_tokens_seen"] = self._tokens.total
            self.state.num_input_tokens_seen = seen
            if start_time is not None:
                runtime = time.time() - start_time
                logs["train_runtime"] = round(runtime, 4)
                if runtime > 0:
                    speed = (seen - self._tokens_before) / runtime
                    logs["train_tokens_per_second"] = round(speed, 3)
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def profile(self, steps: int = 10, wait: int = 10, folder: str | Path | None = None) -> None:
        """Let the next ``train`` record ``steps`` steps after ``wait`` steps with ``torch.profiler``.

        Training goes on afterwards as ever; see ``ProfilerCallback`` for what is written, and where.

        Raises:
            ValueError: if ``steps`` is less than 1 or ``wait`` less than 0.
        """
        from trainer.profiling import ProfilerCallback

        callback = ProfilerCallback(steps, wait, folder)
        callback.once(self.callback_handler)

    def metrics_format(self, metrics: dict[str, float]) -> dict[str, Any]:
        """Return metrics as they are shown."""
        return format_metrics(metrics)

    def log_metrics(self, split: str, metrics: dict[str, float]) -> None:
        """Print metrics as a table."""
        if self.is_world_process_zero():
            print(table(split, self.metrics_format(metrics)))

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write ``<split>_results.json`` and merge into ``all_results.json``."""
        if self.is_world_process_zero():
            write_results(Path(str(self.args.output_dir)), split, metrics, combined)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write weights, configuration, processor and ``training_args.json``.

        Checkpoints are written through this method, too, with ``_internal_call=True``, except with
        ``fsdp`` and ``deepspeed``, which refuse an override of it if there are checkpoints. Of several
        processes only those write that ``args.should_save`` names; all may call it, and with ``fsdp`` or
        ``deepspeed`` all must: process 0 gathers the weights on its host and writes them, whatever
        ``state_dict_type`` says. With ZeRO stage 3 that takes
        ``stage3_gather_16bit_weights_on_model_save``; without it DeepSpeed's own checkpoint is written.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        tensors = self._gathered_model() if fsdp_plan.wanted(self.args) else None
        if self._zero is not None:
            from trainer.distributed import deepspeed_model

            deepspeed_model.save_model(self, folder)
        elif self.args.should_save:
            self._save(str(folder), state_dict=tensors)
        if self.args.should_save and not _internal_call:  # a checkpoint brings its own
            (folder / TRAINING_ARGS_NAME).write_text(self.args.to_json_string())

    def _save(
        self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write weights, configuration and processor; ``state_dict`` stands in for the model's own.

        ``save_model`` and checkpoints write through this method wherever they hold whole weights. Where
        they hold parts, an override is refused at construction.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self._write_model(folder, state_dict)

    def store_flos(self) -> None:
        """Add the operations counted since the last call to ``state.total_flos``.

        With several processes all must call it: they are added up, and so are the input tokens seen.
        """
        if not self._counts_are_in:
            self._share_counts([])

    def _share_counts(self, numbers: Sequence[float]) -> Any:
        """Do what ``store_flos`` does, and in the same message add up ``numbers`` over the processes."""
        if self._ranks.many:
            counts = [self.current_flos, self._tokens.total - self._tokens_shared]
            operations, tokens, *numbers = agree.total(self._ranks, [*counts, *numbers])
            self._tokens.total = self._tokens_shared = self._tokens_shared + int(tokens)
        else:
            operations = self.current_flos
        self.state.total_flos += float(operations)
        self.current_flos = 0.0
        return np.asarray(numbers)

    def save_state(self) -> None:
        """Write ``trainer_state.json`` into the output folder."""
        if self.is_world_process_zero():
            self.state.save_to_json(Path(str(self.args.output_dir)) / "trainer_state.json")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        saving.save_checkpoint(self, self._run, self._meter)

    def _get_output_dir(self, trial: Any = None) -> str:
        """Return the folder that checkpoints are in."""
        return str(self.args.output_dir)

    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights; called at the end with ``load_best_model_at_end``."""
        saving.load_best(self)

    def _load_callback_state(self) -> None:
        """Give the callbacks and the control the states that ``self.state.stateful_callbacks`` holds."""
        self.control = restore_callback_states(
            self.callback_handler.callbacks, self.control, self.state.stateful_callbacks
        )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any = None) -> bool:
        return saving.note_best(self.args, self.state, metrics)

    def _sync_buffers(self) -> None:
        """Copy buffers that a module replaced rather than changed in place back into the module."""
        state = self._run.state if self._run is not None else self._train_state
        if state is not None:
            for name, buffer in modeling.unwrap(self.model).named_buffers():
                kept = state.buffers.get(name)
                if kept is not None and kept.data_ptr() != buffer.data_ptr():
                    kept.copy_(buffer)

    def _make_writer(self) -> BackgroundWriter | None:
        if not self.args.async_save:
            return None
        if fsdp_plan.wanted(self.args) and fsdp_plan.in_parts(self.args):
            from trainer.distributed import fsdp_state

            return fsdp_state.make_writer(self)
        if not self.args.should_save:
            return None
        for name in ("save_model", "_save"):
            if self._overrides(name):
                logger.warning(
                    "async_save is off: %s overrides %s, which reads the live model.",
                    type(self).__name__,
                    name,
                )
                return None
        return BackgroundWriter()

    def _model_tensors(self) -> dict[str, Tensor]:
        self._sync_buffers()
        with self._evaluation_weights():
            tensors = dict(modeling.unwrap(self.model).state_dict())
            return modeling.copies(tensors) if self._two_sets_of_weights else tensors

    def _write_model(self, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
        tensors = self._model_tensors() if tensors is None else tensors
        modeling.save_weights(self.model, folder, tensors)
        self._write_processor(folder)

    def _save_tensors(self, folder: Path, tensors: Mapping[str, Tensor]) -> None:
        """Let ``_save`` write whole weights that several processes have brought together."""
        self._save(str(folder), state_dict=tensors)

    def _write_beside_weights(self, folder: Path) -> None:
        """Write what a model's folder holds besides its weights, which are saved in parts."""
        modeling.save_configuration(self.model, folder)
        self._write_processor(folder)

    def _gathered_model(self) -> dict[str, Tensor]:
        from trainer.distributed import fsdp, fsdp_state

        fsdp.shard(self)
        return fsdp_state.gathered_model(self)

    def _write_processor(self, folder: Path) -> None:
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None and hasattr(processor, "save_pretrained"):
            processor.save_pretrained(folder)

    def _load_model(self, folder: Path) -> None:
        if not (folder / modeling.WEIGHTS_NAME).exists() and checkpoint.is_in_pieces(folder):
            state = checkpoint.load(folder).state
            assert state is not None
            modeling.put_weights(self.model, {**state.params, **state.buffers})
            return
        modeling.load_weights(self.model, folder)
