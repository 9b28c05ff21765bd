"""The trainer's side of Hugging Face's checkpoint files: what goes in, and how theirs are taken up."""

import dataclasses
import json
import logging
from typing import Any

import torch
from torch import Tensor, nn

from trainer import modeling
from trainer.arguments import Seq2SeqTrainingArguments, TrainingArguments
from trainer.callbacks import TrainerState
from trainer.checkpoint import Loaded
from trainer.checkpoint.hf_format import Foreign, HfParts
from trainer.checkpoint.hf_reader import weight_files
from trainer.loop import Run
from trainer.meter import Meter
from trainer.optimizers.state_dicts import from_state_dict, to_state_dict
from trainstep.state import TrainState

logger = logging.getLogger(__name__)

_SCALE = "loss_scale"


def parts_of(trainer: Any, run: Run) -> HfParts:
    """Return what the files of the Hugging Face Trainer hold at this point of a run."""
    arguments = _arguments(trainer.args)
    if trainer.args.save_only_model:
        return HfParts(arguments)
    scheduler = trainer.lr_scheduler
    return HfParts(
        arguments,
        to_state_dict(trainer._adopted, run.state.opt_state, run.state.step),
        # The rates are computed, not stepped to: the count that PyTorch would have is put in.
        None if scheduler is None else _counted(scheduler.state_dict(), run.state.step),
        _scaler(run.state),
    )


def take_up(trainer: Any, run: Run, meter: Meter, found: Loaded) -> dict[str, Any] | None:
    """Put a run where the Hugging Face Trainer saved ``found``; return the scheduler's state.

    ``trainer.state`` is that of the checkpoint already. Moments are taken over parameter by parameter,
    by their place in the groups, which are the same here. The mean loss of the run so far is estimated
    from the log.

    Raises:
        ValueError: if model, optimizer or batch size are others.
    """
    foreign, step = found.foreign, found.manifest.step
    assert foreign is not None
    logger.warning(
        "%s was written by the Hugging Face Trainer. It has no manifest: only headers, checksums of "
        "archives and the presence of files were checked. training_args.bin is a pickle and is not "
        "opened: the arguments are those given now. Random numbers inside the model come from the "
        "seed and the step, not from a stream that goes on.",
        found.path,
    )
    if trainer._overrides("_load_from_checkpoint"):
        trainer._load_from_checkpoint(str(found.path))
    else:
        _load_weights(trainer.model, found)
    if foreign.optimizer is None:
        logger.warning(
            "%s was saved with save_only_model: optimizer moments are not restored.", found.path
        )
        run.state = run.state.evolve(step=step)
    else:
        run.state = _with_optimizer(trainer, run.state, foreign, step)
    _seek(trainer, run, found)
    meter.total = _mean_loss(trainer.state) * step
    return foreign.scheduler


def _arguments(args: Any) -> TrainingArguments:
    """Return arguments of a class of this package, whoever's they are, without secrets."""
    sequence = isinstance(args, Seq2SeqTrainingArguments)
    kind = Seq2SeqTrainingArguments if sequence else TrainingArguments
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    return kind(**{name: value for name, value in args.to_dict().items() if name in known})


def _counted(state: dict[str, Any], step: int) -> dict[str, Any]:
    return {**state, "_step_count": step + 1} if "_step_count" in state else state


def _scaler(state: TrainState) -> dict[str, Any] | None:
    """Return what ``torch.amp.GradScaler`` would keep; None if losses are not scaled."""
    kept = state.extras.get(_SCALE)
    if kept is None:
        return None
    like = torch.amp.GradScaler("cpu", enabled=True).state_dict()
    return {**like, "scale": float(kept["scale"]), "_growth_tracker": int(kept["growth"])}


def _with_optimizer(trainer: Any, mine: TrainState, foreign: Foreign, step: int) -> TrainState:
    assert foreign.optimizer is not None
    opt_state = from_state_dict(trainer._adopted, foreign.optimizer, mine.opt_state, step)
    extras = dict(mine.extras)
    if foreign.scaler and _SCALE in extras:
        kept = {"scale": foreign.scaler["scale"], "growth": foreign.scaler["_growth_tracker"]}
        extras[_SCALE] = {
            name: torch.full_like(tensor, kept[name]) for name, tensor in extras[_SCALE].items()
        }
    return mine.evolve(step=step, opt_state=trainer._adopted.attach(opt_state), extras=extras)


def _load_weights(model: nn.Module, found: Loaded) -> None:
    """Copy weights into the model's own tensors, one file after the other.

    Raises:
        ValueError: naming tensors that are missing, unexpected or of another shape.
    """
    from safetensors.torch import load_file

    own = modeling.unwrap(model).state_dict()
    seen: set[str] = set()
    problems: list[str] = []
    for file in weight_files(found.path):
        for name, tensor in load_file(file).items():
            seen.add(name)
            if name not in own:
                problems.append(f"unexpected: {name}")
            elif own[name].shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
                problems.append(f"differs: {name} has the shape {shapes}")
            else:
                own[name].copy_(tensor)
    shared = {_memory(own[name]) for name in seen & own.keys()}  # tied weights are saved once
    problems += [
        f"missing: {name}"
        for name, tensor in own.items()
        if name not in seen and _memory(tensor) not in shared
    ]
    if problems:
        raise ValueError(
            f"{found.path} does not fit {type(modeling.unwrap(model)).__name__}:\n  "
            + "\n  ".join(problems)
        )


def _memory(tensor: Tensor) -> Any:
    return (tensor.data_ptr(), tensor.numel())


def _seek(trainer: Any, run: Run, found: Loaded) -> None:
    saved = json.loads(found.trainer_state).get("train_batch_size")
    now = trainer._train_batch_size
    epoch, done = divmod(found.manifest.step, run.plan.updates_per_epoch)
    run.epoch, run.in_epoch = epoch, done > 0
    if trainer.args.ignore_data_skip:
        return
    if saved not in (None, now):
        raise ValueError(
            f"{found.path} was written with batches of {saved} on each device; with {now} the place in "
            "the data is not known. Use the same batch size, or ignore_data_skip=True to begin the "
            "epoch again."
        )
    run.batch = done * run.accumulation


def _mean_loss(state: TrainerState) -> float:
    """Return the mean over the updates whose losses are in the log."""
    total, last = 0.0, 0
    for record in state.log_history:
        if "loss" in record:
            total += record["loss"] * (record["step"] - last)
            last = record["step"]
    return total / last if last else 0.0
