"""DeepSpeed's weights: brought together on process 0, and written as model files where that is allowed."""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer import modeling
from trainer.distributed.deepspeed_plan import Zero, library

logger = logging.getLogger(__name__)


def gathered_model(trainer: Any) -> dict[str, Tensor]:
    """Return the model's whole tensors on process 0's host; nothing on the others, which must call too.

    Parameters are gathered one after the other; tied ones once.
    """
    ranks = trainer._ranks
    module = modeling.unwrap(trainer.model)
    tensors = trainer._model_tensors()
    if not trainer._zero.partitions:
        return tensors if ranks.first else {}
    parameters = dict(module.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    whole: dict[int, Tensor] = {}
    gather = library(trainer.args).zero.GatheredParameters
    for name, tensor in tensors.items():
        parameter = parameters.get(name)
        if parameter is None:
            found[name] = tensor.detach().cpu()
            continue
        if id(parameter) not in whole:
            with gather([parameter]):
                whole[id(parameter)] = parameter.detach().cpu().clone() if ranks.first else tensor
        found[name] = whole[id(parameter)]
    return found if ranks.first else {}


def save_model(trainer: Any, folder: Path) -> None:
    """Write the model into ``folder``; all processes must call.

    With stage 3 and without leave to gather the weights, the engine's own checkpoint is written there, with
    ``zero_to_fp32.py``, which makes one file of it later.
    """
    zero: Zero = trainer._zero
    first = trainer.args.should_save
    if first:
        folder.mkdir(parents=True, exist_ok=True)
    if zero.gathers or zero.engine is None:
        tensors = gathered_model(trainer)
        if first:
            trainer._save(str(folder), state_dict=tensors)
        return
    logger.warning(
        "save_model: with ZeRO stage 3 the weights lie in parts. %s gets DeepSpeed's checkpoint; run the "
        "zero_to_fp32.py in it to make model files, or set stage3_gather_16bit_weights_on_model_save.",
        folder,
    )
    write_engine(trainer, folder, trainer.train_state.step)
    if first:
        trainer._write_beside_weights(folder)


def write_engine(trainer: Any, folder: Path, step: int) -> None:
    """Let all processes write the engine's files into ``folder``."""
    trainer._zero.engine.save_checkpoint(str(folder), tag=tag_of(step))


def tag_of(step: int) -> str:
    """Return what DeepSpeed calls its checkpoint of a step."""
    return f"global_step{step}"
