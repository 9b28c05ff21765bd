"""Evaluation and prediction."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from trainer import evaluation, modeling
from trainer.distributed import fsdp_plan
from trainer.distributed.ranks import rows_of_rank
from trainer.evaluation.collected import PADDING
from trainer.facade.base import TrainerBase
from trainer.metrics import speed_metrics
from trainer.outputs import EvalLoopOutput, PredictionOutput

logger = logging.getLogger(__name__)


class EvaluationMixin(TrainerBase):
    """Evaluation and prediction."""

    _half: torch.dtype | None = None

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate, log and return metrics under ``<prefix>_``; a dict of datasets one by one.

        The loss is the mean over samples, whatever the batch size.
        """
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(chosen, dict):
            merged: dict[str, float] = {}
            for name, part in chosen.items():
                subset = name if eval_dataset is None else part
                merged |= self.evaluate(subset, ignore_keys, f"{metric_key_prefix}_{name}")
            return merged
        with self._memory.start("eval") as memory, self._modules_in_evaluation():
            # Given the dataset also if it is our own: overrides need not look for that.
            loader = self.get_eval_dataloader(chosen)
            start = time.time()
            loss_only = True if self.compute_metrics is None else None
            output = self.evaluation_loop(
                loader, "Evaluation", loss_only, ignore_keys, metric_key_prefix
            )
            metrics = self._with_speed(output, metric_key_prefix, start)
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            metrics |= memory.stop()
        return metrics

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Return predictions, labels and metrics for a dataset; logs nothing."""
        with self._memory.start("test") as memory, self._modules_in_evaluation():
            start = time.time()
            loader = self.get_test_dataloader(test_dataset)
            output = self.evaluation_loop(
                loader, "Prediction", ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix
            )
            metrics = self._with_speed(output, metric_key_prefix, start)
            self.control = self.callback_handler.on_predict(
                self.args, self.state, self.control, metrics
            )
            metrics |= memory.stop()
        return PredictionOutput(output.predictions, output.label_ids, metrics)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the model over a loader in evaluation mode; used by ``evaluate`` and ``predict``.

        Outside ``train``, ``bf16_full_eval`` and ``fp16_full_eval`` let the model compute with copies of
        its weights in that type; afterwards it has its own weights again.
        """
        logger.info("***** Running %s *****", description)
        if prediction_loss_only is None:
            prediction_loss_only = self.args.prediction_loss_only
        self.callback_handler.eval_dataloader = dataloader
        with self._sharded():
            one_pass = evaluation.Evaluation(
                self,
                self._wrap_model(self.model, training=False),
                prediction_loss_only,
                ignore_keys,
                prediction=description == "Prediction",
            )
            with self._evaluation_mode():
                with self._half_weights():
                    one_pass.run(dataloader)
                return one_pass.result(dataloader, metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return ``(loss, logits, labels)`` of one batch; None for what there is not."""
        inputs = self._evaluation_inputs(inputs)
        if ignore_keys is None:
            config = getattr(modeling.unwrap(model), "config", None)
            default = [] if config is None else ["past_key_values"]
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", None) or default
        return evaluation.predict_batch(self, model, inputs, prediction_loss_only, ignore_keys)

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        return self.evaluate(ignore_keys=ignore_keys_for_eval)

    def _sharded(self) -> AbstractContextManager[None]:
        """Distribute the model if that is asked for and not done; afterwards it is in parts again."""
        if self._zero is not None and self._zero.partitions:
            from trainer.distributed import deepspeed_contexts

            return deepspeed_contexts.evaluating(self)
        if not fsdp_plan.wanted(self.args):
            return nullcontext()
        from trainer.distributed import fsdp

        fsdp.shard(self)
        return fsdp.settled(self.model)

    @contextmanager
    def _modules_in_evaluation(self) -> Iterator[None]:
        """Put the model into evaluation mode, and every submodule back afterwards.

        Overridden ``log`` methods and callbacks tell by ``model.training`` what they are called for.
        """
        root = self.deepspeed or self.model  # an engine has a mode of its own
        modes = [(module, module.training) for module in root.modules()]
        root.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Put the model and the optimizer into evaluation mode, and back afterwards."""
        self._sync_buffers()
        with self._modules_in_evaluation(), self._evaluation_weights():
            yield

    @contextmanager
    def _half_weights(self) -> Iterator[None]:
        if not self.is_in_train:
            self._half = torch.bfloat16 if self.args.bf16_full_eval else None
            self._half = torch.float16 if self.args.fp16_full_eval else self._half
        try:
            with evaluation.half_weights(self.model, self._half):
                yield
        finally:
            self._half = None

    def _evaluation_inputs(self, inputs: Any) -> Any:
        """Return a batch on the device, as the weights of the moment take it."""
        inputs = self._prepare_inputs(inputs)
        if self._half is None:
            return inputs
        return evaluation.cast_inputs(inputs, self._half, self.label_names)

    def _output_padding(self) -> int:
        """Return what rows of outputs and labels are filled with up to the widest batch's width."""
        return PADDING

    def _with_speed(self, output: EvalLoopOutput, prefix: str, start: float) -> dict[str, float]:
        samples = output.num_samples or 0
        batch = rows_of_rank(self.args, self.args.eval_batch_size) * self.args.world_size
        steps = math.ceil(samples / batch)
        return {**(output.metrics or {}), **speed_metrics(prefix, start, samples, steps)}
