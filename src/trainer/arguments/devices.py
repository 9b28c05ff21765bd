"""Devices and processes of a run, set up when one of them is first asked for."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

from .device_setup import DeviceSetup, set_up
from .enums import ParallelMode
from .fields.logs import LOG_LEVELS

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from .base import TrainingArguments

_CACHE = "_device_cache"
_HERE = (_CACHE, "hf_deepspeed_config")


class DevicesMixin:
    """Properties that need a device or a process group.

    The first one that is read joins the process group that a launcher has announced in the
    environment, chooses the device and checks that it can do what the arguments ask for. Copies and
    pickles do not carry the set-up along: each sets itself up, on its own machine.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in _HERE}

    # What transformers knows of DeepSpeed; it forgets that when this object is gone.
    hf_deepspeed_config: Any = None

    @property
    def _device_setup(self) -> DeviceSetup:
        if _CACHE not in vars(self):
            setattr(self, _CACHE, set_up(cast("TrainingArguments", self)))
        cached: DeviceSetup = vars(self)[_CACHE]
        return cached

    @property
    def distributed_state(self) -> "PartialState":
        """accelerate's record of the processes of this run."""
        return self._device_setup.state

    @property
    def device(self) -> "torch.device":
        """Device of this process.

        Raises:
            ValueError: The device cannot do what ``bf16``, ``fp16`` or ``tf32`` asks for.
        """
        return self._device_setup.device

    @property
    def _setup_devices(self) -> "torch.device":
        return self.device

    @property
    def n_gpu(self) -> int:
        """Devices that this one process drives: above 1 without a launcher only, 0 on the CPU."""
        return self._device_setup.n_gpu

    @property
    def _n_gpu(self) -> int:
        return self._device_setup.n_gpu

    @_n_gpu.setter
    def _n_gpu(self, value: int) -> None:
        self._device_setup.n_gpu = value

    @property
    def parallel_mode(self) -> ParallelMode:
        """How processes and devices work together."""
        kind = self.distributed_state.distributed_type.value
        if kind == "XLA":
            return ParallelMode.TPU
        if kind != "NO":
            return ParallelMode.DISTRIBUTED
        return ParallelMode.NOT_DISTRIBUTED if self.n_gpu > 1 else ParallelMode.NOT_PARALLEL

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.distributed_state.num_processes

    @property
    def process_index(self) -> int:
        """Rank of this process among all."""
        return self.distributed_state.process_index

    @property
    def local_process_index(self) -> int:
        """Rank of this process among those of its machine."""
        return self.distributed_state.local_process_index

    @property
    def train_batch_size(self) -> int:
        """Rows of a training batch in this process."""
        return cast("TrainingArguments", self).per_device_train_batch_size * max(1, self.n_gpu)

    @property
    def eval_batch_size(self) -> int:
        """Rows of an evaluation batch in this process."""
        return cast("TrainingArguments", self).per_device_eval_batch_size * max(1, self.n_gpu)

    @property
    def should_log(self) -> bool:
        """Whether this process logs at ``log_level``."""
        return self._is_main(local=cast("TrainingArguments", self).log_on_each_node)

    @property
    def should_save(self) -> bool:
        """Whether this process writes files."""
        return self._is_main(local=cast("TrainingArguments", self).save_on_each_node)

    def _is_main(self, local: bool) -> bool:
        return (self.local_process_index if local else self.process_index) == 0

    @property
    def place_model_on_device(self) -> bool | None:
        """Override with True or False to decide whether the Trainer moves the model; None: it decides."""
        return None

    @property
    def framework(self) -> str:
        """Always ``"pt"``."""
        return "pt"

    @property
    def ddp_timeout_delta(self) -> timedelta:
        """``ddp_timeout`` as a time span."""
        return timedelta(seconds=cast("TrainingArguments", self).ddp_timeout)

    @property
    def mixed_precision(self) -> str:
        """``"no"``, ``"fp16"``, ``"bf16"`` or ``"fp8"``.

        The flags win over the variable ``ACCELERATE_MIXED_PRECISION``, which accelerate's launcher sets.
        """
        import os

        args = cast("TrainingArguments", self)
        if args.bf16:
            return "bf16"
        return "fp16" if args.fp16 else os.environ.get("ACCELERATE_MIXED_PRECISION", "no")

    def get_process_log_level(self) -> int:
        """Return the number of this process's log level; ``"passive"`` is the present level."""
        import logging

        args = cast("TrainingArguments", self)
        level = LOG_LEVELS[args.log_level if self.should_log else args.log_level_replica]
        return (
            logging.getLogger(__name__.partition(".")[0]).getEffectiveLevel()
            if level < 0
            else level
        )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the number of warm-up updates out of ``num_training_steps``."""
        warmup = cast("TrainingArguments", self).warmup_steps
        return int(warmup) if warmup >= 1 else math.ceil(num_training_steps * warmup)

    @contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Run a block on the main process first, and on the others once that is done.

        Args:
            local: The main process of each machine goes first, rather than that of the whole run.
                Use it when machines share no file system.
            desc: What the block does, for the log.
        """
        if self.world_size == 1:
            yield
            return
        import logging

        main = self._is_main(local)
        logger = logging.getLogger(__name__)
        try:
            if not main:
                logger.debug("Process %d waits for %s.", self.process_index, desc)
                self.distributed_state.wait_for_everyone()
            yield
        finally:
            if main:
                logger.debug("Process %d is done with %s.", self.process_index, desc)
                self.distributed_state.wait_for_everyone()
