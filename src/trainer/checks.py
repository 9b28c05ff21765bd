"""What is wrong with a Trainer's arguments is said at construction, before any work is lost."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from trainer import liger, modeling
from trainer.data.loader import is_iterable
from trainer.facade.losses import LossMixin


def takes(function: Callable[..., Any], name: str) -> bool:
    """Tell whether a function has a parameter of that name, or takes any."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


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


def check_trainable(trainer: Any, *, required: bool) -> None:
    """Raise ValueError if the model cannot give a loss: a library's bare encoder without a head.

    Args:
        trainer: the trainer; a loss of its own makes any model trainable.
        required: whether there is something to train on.
    """
    model: Any = modeling.unwrap(trainer.model)
    own_loss = trainer.compute_loss_func is not None or any(
        getattr(type(trainer), name) is not getattr(LossMixin, name)
        for name in ("compute_loss", "training_step")
    )
    headless = getattr(model, "base_model", None) is model
    if own_loss or not required or not headless:
        return
    names = modeling.forward_names(model)
    if not any("label" in name for name in names) and not modeling.can_return_loss(model):
        raise ValueError(
            f"{type(model).__name__} computes hidden states and no loss, so it cannot be trained as it "
            "is. Pick a class with a head, such as AutoModelForSequenceClassification, or pass "
            "compute_loss_func."
        )


def check_master_weights(args: Any, model: Any) -> None:
    """Raise ValueError if a loss scale is asked for with weights that would be float16 themselves."""
    halves = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.float16}
    if args.fp16 and halves:
        raise ValueError(
            "fp16=True keeps float32 weights and computes in float16, but the model's are float16. Load "
            "it in float32 (dtype=torch.float32), or train it as it is with bf16 weights and no fp16."
        )


def check_optimizers(optimizers: Any, cls_and_kwargs: Any, model_init: Any) -> None:
    if optimizers[0] is not None and cls_and_kwargs is not None:
        raise RuntimeError(
            "Trainer takes an optimizer object or optimizer_cls_and_kwargs, not both"
        )
    if model_init is not None and any(part is not None for part in optimizers):
        raise RuntimeError(
            "Trainer takes no optimizers with a model_init, whose parameters they cannot know: "
            "override create_optimizer_and_scheduler"
        )


def check_arguments(
    args: Any, model: Any, model_init: Any, collator: Any, train_dataset: Any, eval_dataset: Any
) -> None:
    if model is None and model_init is None:
        raise RuntimeError("Trainer requires a model, or a model_init that makes one")
    if isinstance(model, type):
        raise TypeError(
            f"Trainer: model must be an instance, got the class {model.__name__}. Pass one that is made, "
            f"as {model.__name__}(...), or a function that makes one as model_init="
        )
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
    if args.use_liger_kernel:
        liger.check_installed()
    if str(args.save_strategy) == "best" and args.metric_for_best_model is None:
        raise ValueError('save_strategy="best" needs metric_for_best_model')
