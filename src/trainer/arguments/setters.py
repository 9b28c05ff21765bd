"""Set the fields of one topic together: ``args.set_training(...).set_evaluate(...)``.

Each setter sets all fields of its topic. What a call leaves out gets the field's own default. The
values are checked as at construction; if the check fails, nothing is changed.
"""

from typing import TYPE_CHECKING, Any, Self, cast

from .enums import HubStrategy, IntervalStrategy, OptimizerNames, SaveStrategy, SchedulerType

if TYPE_CHECKING:
    from .base import TrainingArguments


def _require_steps(setter: str, strategy: Any, steps: float | None) -> None:
    if strategy == IntervalStrategy.STEPS and not steps:
        raise ValueError(f"{setter}: strategy 'steps' needs a non-zero steps, got {steps!r}.")


class SettersMixin:
    """The nine ``set_*`` methods."""

    def _assign(self, **changes: Any) -> Self:
        """Set fields and check all of them; a failing check leaves everything as it was."""
        before = dict(vars(self))
        for name, value in changes.items():
            setattr(self, name, value)
        try:
            cast("TrainingArguments", self).normalize()
        except Exception:
            vars(self).clear()
            vars(self).update(before)
            raise
        return self

    def set_training(
        self,
        learning_rate: float = 5e-5,
        batch_size: int = 8,
        weight_decay: float = 0,
        num_epochs: float = 3,
        max_steps: int = -1,
        gradient_accumulation_steps: int = 1,
        seed: int = 42,
        gradient_checkpointing: bool = False,
    ) -> Self:
        """Set the basics of training; ``do_train`` becomes True."""
        return self._assign(
            do_train=True,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            weight_decay=weight_decay,
            num_train_epochs=num_epochs,
            max_steps=max_steps,
            gradient_accumulation_steps=gradient_accumulation_steps,
            seed=seed,
            gradient_checkpointing=gradient_checkpointing,
        )

    def set_evaluate(
        self,
        strategy: str | IntervalStrategy = "no",
        steps: int = 500,
        batch_size: int = 8,
        accumulation_steps: int | None = None,
        delay: float | None = None,
        loss_only: bool = False,
    ) -> Self:
        """Set evaluation; ``do_eval`` follows the strategy, and no delay is a delay of 0.

        Raises:
            ValueError: The strategy is ``"steps"`` and ``steps`` is 0.
        """
        strategy = IntervalStrategy(strategy)
        _require_steps("set_evaluate", strategy, steps)
        return self._assign(
            eval_strategy=strategy,
            do_eval=strategy != IntervalStrategy.NO,
            eval_steps=steps,
            per_device_eval_batch_size=batch_size,
            eval_accumulation_steps=accumulation_steps,
            eval_delay=delay,
            prediction_loss_only=loss_only,
        )

    def set_testing(self, batch_size: int = 8, loss_only: bool = False) -> Self:
        """Set prediction; ``do_predict`` becomes True."""
        return self._assign(
            do_predict=True, per_device_eval_batch_size=batch_size, prediction_loss_only=loss_only
        )

    def set_save(
        self,
        strategy: str | SaveStrategy | IntervalStrategy = "steps",
        steps: int = 500,
        total_limit: int | None = None,
        on_each_node: bool = False,
    ) -> Self:
        """Set checkpoints.

        Raises:
            ValueError: The strategy is ``"steps"`` and ``steps`` is 0.
        """
        strategy = SaveStrategy(strategy)
        _require_steps("set_save", strategy, steps)
        return self._assign(
            save_strategy=strategy,
            save_steps=steps,
            save_total_limit=total_limit,
            save_on_each_node=on_each_node,
        )

    def set_logging(
        self,
        strategy: str | IntervalStrategy = "steps",
        steps: int = 500,
        report_to: str | list[str] | None = "none",
        level: str = "passive",
        first_step: bool = False,
        nan_inf_filter: bool = True,
        on_each_node: bool = True,
        replica_level: str = "warning",
    ) -> Self:
        """Set logging.

        Raises:
            ValueError: The strategy is ``"steps"`` and ``steps`` is 0, or a name is unknown.
        """
        strategy = IntervalStrategy(strategy)
        _require_steps("set_logging", strategy, steps)
        return self._assign(
            logging_strategy=strategy,
            logging_steps=steps,
            report_to=report_to,
            log_level=level,
            logging_first_step=first_step,
            logging_nan_inf_filter=nan_inf_filter,
            log_on_each_node=on_each_node,
            log_level_replica=replica_level,
        )

    def set_push_to_hub(
        self,
        model_id: str,
        strategy: str | HubStrategy = "every_save",
        token: str | None = None,
        private_repo: bool | None = None,
        always_push: bool = False,
        revision: str | None = None,
    ) -> Self:
        """Set uploads; ``push_to_hub`` becomes True."""
        return self._assign(
            push_to_hub=True,
            hub_model_id=model_id,
            hub_strategy=strategy,
            hub_token=token,
            hub_private_repo=private_repo,
            hub_always_push=always_push,
            hub_revision=revision,
        )

    def set_optimizer(
        self,
        name: str | OptimizerNames = "adamw_torch_fused",
        learning_rate: float = 5e-5,
        weight_decay: float = 0,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        args: str | None = None,
    ) -> Self:
        """Set the optimizer; ``args`` goes to ``optim_args``."""
        return self._assign(
            optim=name,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            adam_beta1=beta1,
            adam_beta2=beta2,
            adam_epsilon=epsilon,
            optim_args=args,
        )

    def set_lr_scheduler(
        self,
        name: str | SchedulerType = "linear",
        num_epochs: float = 3.0,
        max_steps: int = -1,
        warmup_steps: float = 0,
        warmup_ratio: float | None = None,
    ) -> Self:
        """Set the schedule and its length; ``warmup_ratio`` is a former name and wins if given."""
        return self._assign(
            lr_scheduler_type=name,
            num_train_epochs=num_epochs,
            max_steps=max_steps,
            warmup_steps=warmup_steps,
            warmup_ratio=warmup_ratio,
        )

    def set_dataloader(
        self,
        train_batch_size: int = 8,
        eval_batch_size: int = 8,
        drop_last: bool = False,
        num_workers: int = 0,
        pin_memory: bool = True,
        persistent_workers: bool = False,
        prefetch_factor: int | None = None,
        auto_find_batch_size: bool = False,
        ignore_data_skip: bool = False,
        sampler_seed: int | None = None,
    ) -> Self:
        """Set batch sizes and loaders; ``sampler_seed`` goes to ``data_seed``."""
        return self._assign(
            per_device_train_batch_size=train_batch_size,
            per_device_eval_batch_size=eval_batch_size,
            dataloader_drop_last=drop_last,
            dataloader_num_workers=num_workers,
            dataloader_pin_memory=pin_memory,
            dataloader_persistent_workers=persistent_workers,
            dataloader_prefetch_factor=prefetch_factor,
            auto_find_batch_size=auto_find_batch_size,
            ignore_data_skip=ignore_data_skip,
            data_seed=sampler_seed,
        )
