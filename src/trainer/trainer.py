"""``Trainer``: the façade. It assembles the parts and delegates; public methods may be overridden."""

import inspect
import logging
import math
import random
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import trainstep as ts
from trainer import evaluation, modeling, saving, session
from trainer.arguments import TrainingArguments
from trainer.callbacks import (
    DEFAULT_CALLBACKS,
    CallbackHandler,
    PrinterCallback,
    TrainerControl,
    TrainerState,
    default_progress_callback,
    export_callback_states,
)
from trainer.checkpoint import BackgroundWriter, CheckpointError
from trainer.data.collators import DataCollatorWithPadding, default_data_collator
from trainer.data.columns import FilteringCollator, keep_columns
from trainer.data.loader import is_iterable, make_loader, train_order
from trainer.data.order import Sequential
from trainer.losses import count_label_items, loss_from_outputs
from trainer.metrics import format_metrics, speed_metrics, table, write_results
from trainer.optimization import check_choices
from trainer.optimizers import (
    Adopted,
    adopt,
    decay_parameter_names,
    make_scheduler,
    optimizer_class_and_kwargs,
    parameter_groups,
)
from trainer.outputs import EvalLoopOutput, PredictionOutput, TrainOutput
from trainer.plan import num_examples
from trainer.support import own_arguments, refuse_unsupported, refuse_unused_hooks

logger = logging.getLogger(__name__)


class Trainer:
    """Trains and evaluates a PyTorch model; the names are those of the Hugging Face Trainer.

    Args:
        model: a module whose ``forward`` takes the batch's keys and returns a dict or tuple with the
            loss (``"loss"``, or first).
        args: see ``TrainingArguments``; None uses the output folder ``tmp_trainer``.
        data_collator: makes a batch from a list of samples.
        train_dataset: map-style or iterable.
        eval_dataset: likewise, or a dict of them.
        processing_class: tokenizer or processor, saved along with the model.
        model_init: makes the model, anew at every ``train``; instead of ``model``.
        compute_loss_func: ``(outputs, labels, num_items_in_batch=) -> loss``, instead of the model's own
            loss. It divides by ``num_items_in_batch`` itself where that is not None.
        compute_metrics: ``EvalPrediction`` -> dict of numbers.
        callbacks: instances or classes.
        optimizers: an optimizer and a scheduler to use, either may be None.
        optimizer_cls_and_kwargs: a class and its options, instead of ``args.optim``.
        preprocess_logits_for_metrics: ``(logits, labels) -> logits``, on the device, before collecting.

    Attributes:
        train_state: the immutable ``trainstep.TrainState`` after the last update.
        state: progress and log history (``TrainerState``).

    Raises:
        RuntimeError: without model and ``model_init``.
        ValueError: with both, or for arguments that contradict each other.
        NotImplementedError: for arguments that this version cannot honour.
        OSError: if the output folder cannot be written.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[[], nn.Module] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        args = TrainingArguments(output_dir="tmp_trainer") if args is None else args
        self.args = own_arguments(args)
        _check_arguments(self.args, model, model_init, data_collator, train_dataset, eval_dataset)
        if self.args.batch_eval_metrics and compute_metrics is not None:
            check_batch_metrics(compute_metrics)
        refuse_unsupported(self.args)
        refuse_unused_hooks(self)
        _check_optimizers(optimizers, optimizer_cls_and_kwargs, model_init)
        check_choices(
            self.args,
            optimizer=optimizers[0] is None and optimizer_cls_and_kwargs is None,
            scheduler=optimizers[1] is None,
        )
        logging.getLogger("trainer").setLevel(self.args.get_process_log_level())
        set_seed(self.args.seed)
        self.model_init = model_init
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.processing_class = processing_class
        self.compute_loss_func = compute_loss_func
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.model: nn.Module = model if model is not None else self.call_model_init()
        self._place_model()
        self.data_collator = data_collator or self._default_collator()
        self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self._own_scheduler = self.lr_scheduler is None
        self._adopted: Adopted | None = None
        self._loss_takes_items = takes(self.compute_loss, "num_items_in_batch")
        self.is_in_train = False
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        self._train_state: ts.TrainState | None = None
        self._run: Any = None
        self._meter: Any = None
        self._rates: Any = None
        self._writer: BackgroundWriter | None = None
        self.state = TrainerState()
        self.control = TrainerControl()
        self.callback_handler = self._make_handler(callbacks or [])
        prepare_folder(Path(self.args.output_dir or "trainer_output"))
        self.state.init_training_references(self, 0, 0, None)
        self.control = self.callback_handler.on_init_end(self.args, self.state, self.control)

    # ---- training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: True takes the newest checkpoint in the output folder that is
                complete and undamaged, and says which it passed over; a path takes that one.
            trial: reserved for hyperparameter search.
            ignore_keys_for_eval: outputs to leave out in evaluations during training.

        Returns:
            ``(global_step, training_loss, metrics)``. The loss is the mean over all updates of the
            run, those before an interruption included; speeds are those of this session.

        Raises:
            ValueError: if there is nothing to resume from, or the checkpoint is another model's.
            CheckpointError: if the checkpoint given is damaged, or the last save fails.
        """
        if trial is not None:
            raise NotImplementedError(
                "train(trial=...): hyperparameter search is not available yet"
            )
        if self.model_init is not None:
            set_seed(self.args.seed)
            self.model = self.call_model_init()
            self._place_model()
            self._train_state = self._adopted = None
            self.optimizer = self.lr_scheduler = None
        if self._own_scheduler:
            self.lr_scheduler = None  # a run has a schedule of its own length
        self.is_in_train = True
        try:
            return session.train(self, resume_from_checkpoint or None, ignore_keys_for_eval)
        except BaseException:
            self._close_callbacks()
            if self._writer is not None:
                saving.finish(self._writer)
            raise
        finally:
            self.is_in_train = False
            if self._run is not None:
                self._train_state, self._run = self._run.state, None
            self._sync_buffers()

    @property
    def train_state(self) -> ts.TrainState:
        """The ``TrainState`` before, during and after training; its parameters are the model's."""
        if self._run is not None:
            return self._run.state
        if self._train_state is None:
            self._train_state = self._fresh_state(None)
        return self._train_state

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Run one micro-batch forward and backward, adding to the parameters' ``.grad``.

        Returns:
            This micro-batch's share of the loss, detached.
        """
        if not model.training:
            model.train()
        self._switch_optimizer("train")
        inputs = self._prepare_inputs(inputs)
        if not self._loss_takes_items:
            num_items_in_batch = None  # an override that knows no counts returns plain means
        with self.compute_loss_context_manager():
            loss = self._call_compute_loss(model, inputs, items=num_items_in_batch)
        window = self.current_gradient_accumulation_steps
        if window > 1 and not self._divides_by_items(num_items_in_batch):
            loss = loss / window
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on any trainable parameter, so there is nothing to train. "
                "Check that it is computed from the model's output with gradients enabled, and that "
                "some parameter has requires_grad=True."
            )
        loss.backward()
        return loss.detach()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Run the model and return its loss, or ``(loss, outputs)``.

        An override may leave out ``num_items_in_batch``; its loss is then taken as a mean, and divided
        by the micro-batches of an update.

        Raises:
            ValueError: if the outputs hold no loss, listing what they and the inputs hold.
        """
        labels = None
        if self.compute_loss_func is not None and "labels" in inputs:
            labels = inputs["labels"]
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
        outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
        if self.compute_loss_func is None:
            loss = loss_from_outputs(outputs, inputs)
        else:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def compute_loss_context_manager(self) -> ExitStack:
        """Return the context that losses are computed in: autocast, if a half type is asked for."""
        stack = ExitStack()
        if self.args.mixed_precision == "bf16":
            stack.enter_context(torch.autocast(self.args.device.type, torch.bfloat16))
        return stack

    def count_items(self, window: list[Any]) -> Tensor | int | None:
        """Count the labels in a window that a model with loss kwargs divides its loss by."""
        if self.model_accepts_loss_kwargs or self.compute_loss_func is not None:
            return count_label_items(window)
        return None

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        """Create the optimizer and the scheduler for a run of so many updates."""
        self.create_optimizer()
        self.create_scheduler(num_training_steps, self.optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create ``self.optimizer``, unless there is one, with a decayed and an undecayed group."""
        if self.optimizer is None:
            model = modeling.unwrap(self.model if model is None else model)
            chosen = self.optimizer_cls_and_kwargs
            cls, kwargs = chosen or self.get_optimizer_cls_and_kwargs(self.args, model)
            if not isinstance(cls, type):  # a factory, as upstream calls it
                self.optimizer = cls()(model, **kwargs)
            else:
                decayed = set(self.get_decay_parameter_names(model))
                groups = parameter_groups(model, decayed, self.args.weight_decay)
                self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Create ``self.lr_scheduler``, unless there is one."""
        if self.lr_scheduler is None:
            args = self.args
            self.lr_scheduler = make_scheduler(
                str(args.lr_scheduler_type),
                optimizer or self.create_optimizer(),
                args.get_warmup_steps(num_training_steps),
                num_training_steps,
                dict(args.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]
            )
        return self.lr_scheduler

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: nn.Module | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Return the class that ``args.optim`` names, and its options."""
        return optimizer_class_and_kwargs(args)

    def get_learning_rates(self) -> list[float]:
        """Return the learning rate of every parameter group.

        Raises:
            ValueError: before there is an optimizer.
        """
        return [group["lr"] for group in self._existing_optimizer().param_groups]

    def get_optimizer_group(self, param: str | nn.Parameter | None = None) -> Any:
        """Return the group that holds a parameter (or the one of that name); without one, the
        parameter lists of all groups.

        Raises:
            ValueError: before there is an optimizer.
        """
        groups = self._existing_optimizer().param_groups
        if param is None:
            return [group["params"] for group in groups]
        if isinstance(param, str):
            param = dict(modeling.unwrap(self.model).named_parameters()).get(param)
        return next((g for g in groups if any(p is param for p in g["params"])), None)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names of the parameters that weight decay applies to."""
        return decay_parameter_names(modeling.unwrap(model))

    def get_num_trainable_parameters(self) -> int:
        """Count the numbers in parameters with ``requires_grad``."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return the samples of one update over all processes."""
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Build a model with ``model_init``."""
        assert self.model_init is not None
        model = self.model_init()
        if model is None:
            raise RuntimeError("model_init returned None; it must return the model")
        return model

    # ---- data

    def get_train_dataloader(self) -> Any:
        """Return the training loader: its order is a function of (seed, epoch, position)."""
        if self.train_dataset is None:
            raise ValueError("Trainer: training requires a train_dataset")
        dataset, collate = self._without_unused(self.train_dataset, "training")
        order = None
        if not is_iterable(dataset):
            order = train_order(self.args, dataset, self.processing_class)
        size = self.args.train_batch_size
        return make_loader(dataset, collate, self.args, batch_size=size, order=order)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return an evaluation loader, in the order of the data; a string picks from a dict."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("Trainer: evaluation requires an eval_dataset")
        return self._sequential_loader(dataset, "evaluation")

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return the loader for ``predict``."""
        return self._sequential_loader(test_dataset, "test")

    def num_examples(self, dataloader: Any) -> int:
        """Return the samples behind a loader."""
        return num_examples(dataloader, self.args.per_device_train_batch_size)

    # ---- evaluation

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
        loader = self.get_eval_dataloader(eval_dataset)
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
        return metrics

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """Return predictions, labels and metrics for a dataset; logs nothing."""
        start = time.time()
        loader = self.get_test_dataloader(test_dataset)
        output = self.evaluation_loop(
            loader, "Prediction", ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix
        )
        metrics = self._with_speed(output, metric_key_prefix, start)
        self.control = self.callback_handler.on_predict(
            self.args, self.state, self.control, metrics
        )
        return PredictionOutput(output.predictions, output.label_ids, metrics)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the model over a loader in evaluation mode; used by ``evaluate`` and ``predict``."""
        logger.info("***** Running %s *****", description)
        if prediction_loss_only is None:
            prediction_loss_only = self.args.prediction_loss_only
        self.callback_handler.eval_dataloader = dataloader
        self._sync_buffers()
        was_training = self.model.training
        self.model.eval()
        self._switch_optimizer("eval")
        try:
            return evaluation.run_evaluation(
                self,
                dataloader,
                prediction_loss_only,
                ignore_keys,
                metric_key_prefix,
                keep=description == "Prediction",
            )
        finally:
            self.model.train(was_training)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return ``(loss, logits, labels)`` of one batch; None for what there is not."""
        inputs = self._prepare_inputs(inputs)
        if ignore_keys is None:
            config = getattr(modeling.unwrap(model), "config", None)
            default = [] if config is None else ["past_key_values"]
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", None) or default
        return evaluation.predict_batch(self, model, inputs, prediction_loss_only, ignore_keys)

    # ---- logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the epoch to ``logs``, append them with the step to the history, tell the callbacks."""
        logs["epoch"] = self.state.epoch
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def metrics_format(self, metrics: dict[str, float]) -> dict[str, Any]:
        """Return metrics as they are shown."""
        return format_metrics(metrics)

    def log_metrics(self, split: str, metrics: dict[str, float]) -> None:
        """Print metrics as a table."""
        if self.is_world_process_zero():
            print(table(split, metrics))

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write ``<split>_results.json`` and merge into ``all_results.json``."""
        if self.is_world_process_zero():
            write_results(Path(str(self.args.output_dir)), split, metrics, combined)

    # ---- saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write weights, configuration, processor and ``training_args.json``.

        Checkpoints are written through this method, too, with ``_internal_call=True``.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self._write_model(folder)
        if not _internal_call:  # a checkpoint brings its own
            (folder / "training_args.json").write_text(self.args.to_json_string())

    def save_state(self) -> None:
        """Write ``trainer_state.json`` into the output folder."""
        if self.is_world_process_zero():
            self.state.save_to_json(Path(str(self.args.output_dir)) / "trainer_state.json")

    # ---- callbacks and processes

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

    # ---- parts that other modules and subclasses use

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        return self.evaluate(ignore_keys=ignore_keys_for_eval)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        saving.save_checkpoint(self, self._run, self._meter)

    def _determine_best_metric(self, metrics: dict[str, float]) -> bool:
        return saving.note_best(self.args, self.state, metrics)

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = modeling.move(inputs, self.args.device, non_blocking=True)
        if isinstance(prepared, Mapping) and not prepared:
            raise ValueError(
                "the batch is empty: none of the dataset's keys reached the model, whose forward "
                f"takes {', '.join(modeling.forward_names(self.model))}. Rename the dataset's "
                "columns, or set remove_unused_columns=False."
            )
        return prepared

    def _call_compute_loss(self, model: Any, inputs: Any, *, items: Any, **options: Any) -> Any:
        if self._loss_takes_items:
            options["num_items_in_batch"] = items
        return self.compute_loss(model, inputs, **options)

    def _divides_by_items(self, items: Any) -> bool:
        """Whether the loss of a micro-batch is its share of the update's mean already."""
        if not self._loss_takes_items:
            return False
        return self.compute_loss_func is not None or (
            self.model_accepts_loss_kwargs and items is not None
        )

    def _existing_optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            raise ValueError("the optimizer does not exist yet: call train() or create_optimizer()")
        return self.optimizer

    def _switch_optimizer(self, mode: str) -> None:
        # Schedule-free optimizers keep other weights for evaluation than for training.
        switch = getattr(self.optimizer, mode, None)
        if callable(switch):
            switch()

    def _adopt_optimizer(self) -> Adopted:
        """Return the pure form of ``self.optimizer``, made once per object."""
        optimizer = self.create_optimizer() if self.optimizer is None else self.optimizer
        if self._adopted is None or self._adopted.object is not optimizer:
            named = modeling.unwrap(self.model).named_parameters()
            self._adopted = adopt(optimizer, {p: n for n, p in named if p.requires_grad})
        return self._adopted

    def _fresh_state(self, step: ts.Step | None) -> ts.TrainState:
        model, pure = modeling.unwrap(self.model), self._adopt_optimizer().pure
        if step is None:
            return ts.init(model, pure, self.args.seed, copy=False)
        fresh = step.init(model, self.args.seed, copy=False)
        if self._train_state is None:
            return fresh
        # A second train() goes on with the moments, and starts the schedule anew.
        return fresh.evolve(opt_state=self._train_state.opt_state)

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
        if type(self).save_model is not Trainer.save_model:
            logger.warning(
                "async_save is off: %s overrides save_model, which reads the live model.",
                type(self).__name__,
            )
            return None
        return BackgroundWriter()

    def _model_tensors(self) -> dict[str, Tensor]:
        self._sync_buffers()
        return dict(modeling.unwrap(self.model).state_dict())

    def _write_model(self, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
        tensors = self._model_tensors() if tensors is None else tensors
        modeling.save_weights(self.model, folder, tensors)
        processor = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if processor is not None and hasattr(processor, "save_pretrained"):
            processor.save_pretrained(folder)

    def _load_model(self, folder: Path) -> None:
        modeling.load_weights(self.model, folder)

    def _place_model(self) -> None:
        self.model.to(self.args.device)
        model = modeling.unwrap(self.model)
        self._signature = modeling.forward_names(model)
        self.label_names = self.args.label_names or modeling.label_names(model)
        self.can_return_loss = modeling.can_return_loss(model)
        self.model_accepts_loss_kwargs = modeling.accepts_loss_kwargs(model)
        self.model_wrapped = self.model

    def _default_collator(self) -> Callable[[list[Any]], Any]:
        if hasattr(self.processing_class, "pad"):
            return DataCollatorWithPadding(self.processing_class)
        return default_data_collator

    def _without_unused(self, dataset: Any, what: str) -> tuple[Any, Callable[[list[Any]], Any]]:
        if not self.args.remove_unused_columns:
            return dataset, self.data_collator
        names = [*self._signature, *self.label_names]
        return keep_columns(dataset, names, what), FilteringCollator(self.data_collator, names)

    def _sequential_loader(self, dataset: Any, what: str) -> Any:
        dataset, collate = self._without_unused(dataset, what)
        order = None if is_iterable(dataset) else Sequential(len(dataset))
        size = self.args.eval_batch_size
        return make_loader(dataset, collate, self.args, batch_size=size, order=order)

    def _with_speed(self, output: EvalLoopOutput, prefix: str, start: float) -> dict[str, float]:
        samples = output.num_samples or 0
        steps = math.ceil(samples / self.args.eval_batch_size)
        return {**(output.metrics or {}), **speed_metrics(prefix, start, samples, steps)}

    def _make_handler(self, callbacks: list[Any]) -> CallbackHandler:
        quiet = self.args.disable_tqdm
        last = PrinterCallback if quiet else default_progress_callback()
        chosen = [*DEFAULT_CALLBACKS, *callbacks, last]
        return CallbackHandler(chosen, self.model, self.processing_class, None, None)

    def _exported_callbacks(self) -> dict[str, Any]:
        return export_callback_states(self.callback_handler.callbacks, self.control)

    def _close_callbacks(self) -> None:
        for callback in self.callback_handler.callbacks:
            close = getattr(callback, "close", None)
            if callable(close):
                close()


def takes(function: Callable[..., Any], name: str) -> bool:
    """Tell whether a function has a parameter of that name, or takes any."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and PyTorch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - what users' code draws from
    torch.manual_seed(seed)


def prepare_folder(folder: Path) -> None:
    """Create a folder and see that files can be written there, before any work is lost.

    Raises:
        OSError: saying which folder and why.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write_test"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"output_dir {folder} cannot be written ({error}). Choose another output_dir in "
            "TrainingArguments."
        ) from error


def check_batch_metrics(compute_metrics: Callable[..., Any]) -> None:
    """Raise ValueError if a ``compute_metrics`` cannot be told which batch is the last."""
    parameters = inspect.signature(compute_metrics).parameters
    if "compute_result" not in parameters:
        raise ValueError(
            "batch_eval_metrics=True calls compute_metrics after every batch, with "
            "compute_result=True on the last one; give it a parameter compute_result. It takes "
            f"{', '.join(parameters)}"
        )


def _check_optimizers(optimizers: Any, cls_and_kwargs: Any, model_init: Any) -> None:
    if optimizers[0] is not None and cls_and_kwargs is not None:
        raise RuntimeError(
            "Trainer takes an optimizer object or optimizer_cls_and_kwargs, not both"
        )
    if model_init is not None and any(part is not None for part in optimizers):
        raise RuntimeError(
            "Trainer takes no optimizers with a model_init, whose parameters they cannot know: "
            "override create_optimizer_and_scheduler"
        )


def _check_arguments(
    args: Any, model: Any, model_init: Any, collator: Any, train_dataset: Any, eval_dataset: Any
) -> None:
    if model is None and model_init is None:
        raise RuntimeError("Trainer requires a model, or a model_init that makes one")
    if model is not None and model_init is not None:
        raise ValueError("Trainer takes a model or a model_init, not both")
    if str(args.eval_strategy) != "no" and eval_dataset is None:
        raise ValueError(
            f"eval_strategy={str(args.eval_strategy)!r} needs an eval_dataset; pass one, or set "
            'eval_strategy="no"'
        )
    if collator is not None and not callable(collator):
        raise TypeError(f"data_collator must be callable, got {type(collator).__name__}")
    if train_dataset is not None and args.max_steps <= 0 and is_iterable(train_dataset):
        raise ValueError(
            "train_dataset has no length, so epochs cannot be counted: set max_steps to the number "
            "of updates; the learning-rate schedule needs it in advance"
        )
    if str(args.save_strategy) == "best" and args.metric_for_best_model is None:
        raise ValueError('save_strategy="best" needs metric_for_best_model')


__all__ = ["CheckpointError", "Trainer", "prepare_folder", "set_seed"]
