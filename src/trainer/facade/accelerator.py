"""``trainer.accelerator``: accelerate's object, for scripts and hooks that use it."""

from typing import Any

from torch import Tensor

from trainer.distributed import fsdp_plan
from trainer.facade.base import TrainerBase


class AcceleratorMixin(TrainerBase):
    """Accelerate's object for overridden hooks: ``backward``, ``gather``, ``unwrap_model`` and the rest.

    It is built when it is first used, from ``_build_accelerator_args``.
    """

    _accelerator: Any = None

    @property
    def accelerator(self) -> Any:
        """The ``accelerate.Accelerator`` with this trainer's settings."""
        if self._accelerator is None:
            self.create_accelerator_and_postprocess()
        return self._accelerator

    @accelerator.setter
    def accelerator(self, value: Any) -> None:
        self._accelerator = value

    @property
    def gather_function(self) -> Any:
        """``accelerator.gather_for_metrics``: joins what all processes have, without repeated samples."""
        return self.accelerator.gather_for_metrics

    @property
    def is_fsdp_enabled(self) -> bool:
        """Whether the model's parameters are distributed over the processes."""
        return fsdp_plan.wanted(self.args)

    def create_accelerator_and_postprocess(self) -> None:
        """Build ``self.accelerator``, whose ``backward`` is this trainer's."""
        from accelerate import Accelerator

        self._accelerator = Accelerator(**self._build_accelerator_args())
        # Loss scaling is part of the train state here, so accelerate's scaler must not be used.
        self._accelerator.backward = self._backward

    def _build_accelerator_args(self, **overrides: Any) -> dict[str, Any]:
        """Return the options of the ``Accelerator``."""
        from accelerate.utils import (
            DataLoaderConfiguration,
            DistributedDataParallelKwargs,
            GradientAccumulationPlugin,
        )

        args = self.args
        config: Any = args.accelerator_config
        accumulation = dict(config.gradient_accumulation_kwargs or {})
        # The trainer accumulates itself; accelerate would divide the loss once more.
        accumulation["num_steps"] = 1
        accumulation.setdefault("sync_with_dataloader", False)
        precision = args.mixed_precision
        on_cpu = args.device.type == "cpu"
        return {
            "mixed_precision": "no" if precision == "fp16" and on_cpu else precision,
            "cpu": on_cpu,
            "dataloader_config": DataLoaderConfiguration(
                split_batches=config.split_batches,
                dispatch_batches=config.dispatch_batches,
                even_batches=config.even_batches,
                use_seedable_sampler=config.use_seedable_sampler,
                non_blocking=config.non_blocking,
                data_seed=args.data_seed,
            ),
            "gradient_accumulation_plugin": GradientAccumulationPlugin(**accumulation),
            "kwargs_handlers": [
                DistributedDataParallelKwargs(
                    find_unused_parameters=bool(args.ddp_find_unused_parameters),
                    bucket_cap_mb=args.ddp_bucket_cap_mb or 25,
                    broadcast_buffers=bool(args.ddp_broadcast_buffers),
                    static_graph=bool(args.ddp_static_graph),
                )
            ],
            **overrides,
        }

    def _backward(self, loss: Tensor, **options: Any) -> None:
        """Run the backward pass; what ``accelerator.backward`` does in an overridden hook."""
        if self._adopted is not None and self._adopted.fused is not None:
            self._adopted.fused.backward(loss)
            return
        if self._gradient_weight != 1:
            loss = loss * self._gradient_weight
            self._gradient_weight = 1
        if self._zero is not None and self._zero.trains:
            self._zero.engine.backward(loss, scale_wrt_gas=False)
            return
        scale = None if self._run is None else self._run.step.loss_scale(self._run.state)
        (loss if scale is None else loss * scale).backward(**options)
