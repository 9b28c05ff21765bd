"""Where the model comes from, where it is, and what wraps it."""

import inspect
import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import modeling
from trainer.distributed import ddp, fsdp_plan
from trainer.facade.base import TrainerBase
from trainer.support import refuse_tensor_parallel
from trainstep.compiling import OWN_GRAPHS, Compiled

logger = logging.getLogger(__name__)


def _tell_breaks(breaks: list[str]) -> None:
    logger.warning(
        "torch_compile: the model is compiled in several parts, with Python between, because of:\n  %s\n"
        "It is as fast as it can be when it is one part: rewrite these lines, or leave torch_compile out. "
        "TORCH_LOGS=graph_breaks shows how they are reached.",
        "\n  ".join(breaks),
    )


class ModelMixin(TrainerBase):
    """Where the model comes from, where it is, and what wraps it."""

    _compiled: Any = None

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Build a model with ``model_init``, which takes nothing or the trial of a search.

        Raises:
            RuntimeError: if it takes more than that, or returns None.
        """
        make = self.model_init
        assert make is not None
        count = len(inspect.signature(make).parameters)
        if count > 1:
            raise RuntimeError(f"model_init must take no argument or the trial; it takes {count}")
        with self._models_in_parts():
            model = make(trial) if count else make()
        if model is None:
            raise RuntimeError("model_init returned None; it must return the model")
        return model

    @property
    def is_model_parallel(self) -> bool:
        """Whether a device map spreads the model's layers over several devices."""
        places = set((getattr(self.model, "hf_device_map", None) or {}).values())
        places -= {"cpu", "disk"}
        if len(places) == 1:
            return torch.device(next(iter(places))) != self.args.device
        return len(places) > 1

    @property
    def place_model_on_device(self) -> bool:
        """Whether the model is moved to ``args.device``: not one that has a place of its own."""
        chosen = getattr(self.args, "place_model_on_device", None)
        if chosen is not None:
            return bool(chosen)
        if fsdp_plan.wanted(self.args):  # moved part by part, when it is distributed
            return False
        if self._zero is not None and self._zero.partitions:
            return False
        quantized = getattr(self.model, "quantization_method", None) is not None
        mapped = getattr(self.model, "hf_device_map", None) is not None
        return not (quantized or mapped)

    def get_tp_size(self) -> int:
        """Return the number of processes that share each layer (tensor parallelism)."""
        return int(getattr(self.model, "tp_size", None) or 1)

    def get_cp_size(self) -> int:
        """Return the number of processes that share each sequence (context parallelism)."""
        return 1

    def get_sp_size(self) -> int:
        """Return the number of processes that share each sequence (sequence parallelism)."""
        return 1

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> Any:
        """Return what ``training_step``, or ``prediction_step``, is given as the model.

        With several processes it is in DistributedDataParallel, unless ``exact_reduction`` adds up
        gradients or ``fsdp`` distributes the model itself; with ``torch_compile`` it is compiled. With
        ``deepspeed`` it is DeepSpeed's engine.
        """
        args = self.args
        if self._zero is not None:  # before there is an engine, every process evaluates by itself
            return self._zero.engine or model
        sharded = fsdp_plan.wanted(args)
        if training and args.world_size > 1 and not (args.exact_reduction or sharded):
            model = ddp.wrap(model, args)
        if not args.torch_compile:
            return model
        if not training and args.torch_compile_mode in OWN_GRAPHS:
            return model  # outputs that are kept would be overwritten by the next batch's
        if getattr(self._compiled, "_orig_mod", None) is not model:
            mode = args.torch_compile_mode
            compiled: Any = torch.compile(model, backend=str(args.torch_compile_backend), mode=mode)
            if args.should_log:  # the other processes' breaks are the same
                compiled.forward = Compiled(compiled.forward, mode, _tell_breaks)
            self._compiled = compiled
        return self._compiled

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Move the model; an override may leave it where it is."""
        model.to(device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load the weights in a checkpoint's folder into the model.

        A run that is resumed has its weights, bit for bit, from the checkpoint's train state; an override
        is called in place of that, but for ``fsdp`` and ``deepspeed``, which refuse it: there every
        process reads its parts.
        """
        modeling.load_weights(self.model if model is None else model, Path(resume_from_checkpoint))

    def _take_one_device(self) -> None:
        """Count one device for this process, whose batches are made for as many as there are."""
        args = self.args
        if args.n_gpu > 1 and not self.is_model_parallel:
            logger.warning(
                "There are %d GPUs, and this process trains on one of them, %s. To use all, start one "
                "process for each: torchrun --nproc_per_node=%d.",
                args.n_gpu,
                args.device,
                args.n_gpu,
            )
        if args.n_gpu > 1:
            args._n_gpu = 1

    @property
    def is_deepspeed_enabled(self) -> bool:
        """Whether DeepSpeed trains."""
        return self._zero is not None

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's engine; None before training and without DeepSpeed."""
        return None if self._zero is None else self._zero.engine

    def _models_in_parts(self) -> AbstractContextManager[None]:
        if self._zero is None:
            return nullcontext()
        from trainer.distributed import deepspeed_contexts

        return deepspeed_contexts.models_in_parts(self)

    def _drop_engine(self) -> None:
        if self._zero is not None and self._zero.engine is not None:
            from trainer.distributed import deepspeed_contexts

            deepspeed_contexts.drop(self._zero)

    def _place_model(self) -> None:
        refuse_tensor_parallel(self.model)
        if self.place_model_on_device:
            self._move_model_to_device(self.model, self.args.device)
        self._take_one_device()
        model = modeling.unwrap(self.model)
        self.label_names = self.args.label_names or modeling.label_names(model)
        self.can_return_loss = modeling.can_return_loss(model)
        self.model_accepts_loss_kwargs = modeling.accepts_loss_kwargs(model)
        self.model_wrapped, self._compiled = self.model, None
        config = getattr(model, "config", None)
        if config is not None and hasattr(config, "use_cache"):
            config.use_cache = self.args.use_cache
