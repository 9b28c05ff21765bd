"""``Trainer``: the façade. It assembles the parts and delegates; public methods may be overridden."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trainstep as ts
from trainer import replaying, saving, session
from trainer.arguments import TrainingArguments
from trainer.callbacks import TRAINER_STATE_NAME as TRAINER_STATE_NAME
from trainer.callbacks import TrainerControl, TrainerState
from trainer.checkpoint import BackgroundWriter, CheckpointError
from trainer.checkpoint.layout import ARGUMENTS as TRAINING_ARGS_NAME
from trainer.checkpoint.layout import OPTIMIZER as OPTIMIZER_NAME
from trainer.checks import (
    check_arguments,
    check_batch_metrics,
    check_master_weights,
    check_trainable,
    prepare_folder,
    takes,
)
from trainer.determinism import enable_full_determinism, set_seed
from trainer.facade.accelerator import AcceleratorMixin
from trainer.facade.adoption import AdoptionMixin
from trainer.facade.callbacks import CallbackMixin
from trainer.facade.data import DataMixin
from trainer.facade.evaluation import EvaluationMixin
from trainer.facade.losses import LossMixin
from trainer.facade.model import ModelMixin
from trainer.facade.optimizers import OptimizerMixin
from trainer.facade.output import OutputMixin
from trainer.memory import MemoryTracker
from trainer.modeling import WEIGHTS_NAME as SAFE_WEIGHTS_NAME
from trainer.optimizers import Adopted
from trainer.outputs import TrainOutput
from trainer.preparation import prepare_model, token_counter
from trainer.smoothing import make_smoother
from trainer.support import own_arguments


class Trainer(
    ModelMixin,
    AcceleratorMixin,
    LossMixin,
    OptimizerMixin,
    AdoptionMixin,
    DataMixin,
    EvaluationMixin,
    OutputMixin,
    CallbackMixin,
):
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
        lowering: how the steps of the last training are carried out, and why; None before there is one.

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
        replaying.redirect(self.args)
        check_arguments(self.args, model, model_init, data_collator, train_dataset, eval_dataset)
        if self.args.batch_eval_metrics and compute_metrics is not None:
            check_batch_metrics(compute_metrics)
        self._plan_distribution(optimizers, optimizer_cls_and_kwargs, model_init)
        logging.getLogger("trainer").setLevel(self.args.get_process_log_level())
        self._memory = MemoryTracker(self.args.skip_memory_metrics, self.args.device)
        memory = self._memory.start("init")
        if self.args.full_determinism:
            enable_full_determinism(self.args.seed)
        else:
            set_seed(self.args.seed)
        self.model_init = model_init
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.processing_class = processing_class
        self.compute_loss_func = compute_loss_func
        self.compute_metrics = compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.model: nn.Module = model if model is not None else self.call_model_init()
        check_trainable(self, required=train_dataset is not None)
        self._place_model()
        self.data_collator = data_collator or self._default_collator()
        self.optimizer, self.lr_scheduler = optimizers
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self._train_batch_size = self.args.train_batch_size
        self._adopted: Adopted | None = None
        self._made: tuple[Any, Any] = (None, None)
        self.label_smoother = make_smoother(self.args.label_smoothing_factor, self.model)
        self._loss_takes_items = takes(self.compute_loss, "num_items_in_batch")
        self._forget_runs()
        self.state = TrainerState()
        self.control = TrainerControl()
        self.callback_handler = self._make_handler(callbacks or [])
        if self.args.should_save:
            prepare_folder(Path(self.args.output_dir or "trainer_output"))
        self.state.init_training_references(self, 0, 0, None)
        self.control = self.callback_handler.on_init_end(self.args, self.state, self.control)
        memory.stop()

    def _forget_runs(self) -> None:
        """Begin with no run, and nothing counted."""
        self.current_flos = 0.0
        self._tokens = token_counter(self)
        self._tokens_before = 0
        self.is_in_train = False
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        self._train_state: ts.TrainState | None = None
        self.lowering: str | None = None
        self._run: Any = None
        self._meter: Any = None
        self._records: Any = None
        self._rates: Any = None
        self._writer: BackgroundWriter | None = None
        self._interruption: Any = None

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
            ValueError: if there is nothing to resume from (of a path, the CheckpointError that is one as
                well), or the checkpoint is another model's.
            CheckpointError: if the checkpoint given is damaged, or the last save fails.
            TrainingInterrupted: with ``enable_jit_checkpoint``, after a signal and a save.
        """
        if trial is not None:
            raise NotImplementedError(
                "train(trial=...): hyperparameter search is not available yet"
            )
        resume_from_checkpoint = replaying.start(self, resume_from_checkpoint)
        if self.model_init is not None:
            set_seed(self.args.seed)
            self._drop_engine()
            self.model = self.call_model_init()
            self._place_model()
            self._train_state = self._adopted = None
            self.optimizer = self.lr_scheduler = None
        if self._own_scheduler:
            self.lr_scheduler = None  # a run has a schedule of its own length
        check_trainable(self, required=True)
        if self._zero is None:  # which keeps master weights itself
            check_master_weights(self.args, self.model)
        self.is_in_train = True
        try:
            with ExitStack() as stack:
                prepare_model(self, stack)
                found = saving.find_checkpoint(self, resume_from_checkpoint)
                return session.start(self, found, ignore_keys_for_eval)
        except BaseException:
            self._memory.abandon()
            self._close_callbacks()
            if self._writer is not None:
                saving.finish(self._writer)
            raise
        finally:
            self.is_in_train = False
            run, self._run = self._run, None
            self._records = None  # which has the run, its graphs and their memory
            try:
                if run is not None:
                    self._train_state = run.state
                self._sync_buffers()
                # Gradients that were recorded would keep their graph's memory.
                for parameter in self.model.parameters():
                    parameter.grad = None
            finally:
                if run is not None:
                    run.close()

    @property
    def train_state(self) -> ts.TrainState:
        """The ``TrainState`` before, during and after training; its parameters are the model's."""
        if self._run is not None:
            return self._run.state
        if self._train_state is None:
            self._train_state = self._fresh_state(None)
        return self._train_state


__all__ = [
    "OPTIMIZER_NAME",
    "SAFE_WEIGHTS_NAME",
    "TRAINER_STATE_NAME",
    "TRAINING_ARGS_NAME",
    "CheckpointError",
    "Trainer",
    "prepare_folder",
    "set_seed",
]
