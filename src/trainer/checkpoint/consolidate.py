"""One ``model.safetensors`` from a checkpoint in pieces, with one tensor in memory at a time."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from trainer.checkpoint import io
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.layout import (
    ARGUMENTS,
    DEEPSPEED,
    MANIFEST,
    OPTIMIZER,
    TRAIN_STATE,
    TRAINER_STATE,
    WEIGHTS,
    host_rng_rank,
)
from trainer.checkpoint.pieces import is_state_file
from trainer.checkpoint.reader import Loaded, open_lazily
from trainer.checkpoint.source import Source
from trainer.checkpoint.tensors import Spec, storable, write_stream

MODEL = "model.safetensors"

# What DeepSpeed's engine writes beside the folder that its tag names.
_OF_DEEPSPEED = frozenset({"latest", "zero_to_fp32.py", "zero_to_torch.py"})

# What belongs to the training rather than to the model.
_OF_TRAINING = frozenset({ARGUMENTS, MANIFEST, OPTIMIZER, TRAIN_STATE, TRAINER_STATE, WEIGHTS})


def consolidate(
    checkpoint: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> Path:
    """Write the model of a checkpoint as one file; return its path.

    Every piece is checked against its digest when it is read. The file gets its name when all of it is on
    the disk; one that is there already is replaced. The checkpoint stays what it was.

    Args:
        checkpoint: the checkpoint's folder.
        out: where to; the model's other files (configuration, processor) are copied there. None writes into
            the checkpoint, whose folder ``from_pretrained`` then takes.

    Raises:
        CheckpointError: if the checkpoint is damaged, or neither in pieces nor with a model's file (then
            nothing is written); or if the disk refuses.
    """
    folder = Path(checkpoint)
    target = folder if out is None else Path(out)
    found = open_lazily(folder)
    in_pieces = found.source is not None and bool(found.source.model)
    if not in_pieces and MODEL not in found.manifest.files:
        raise CheckpointError(f"{folder}: {_nothing(found)}")
    try:
        target.mkdir(parents=True, exist_ok=True)
        if target.resolve() != folder.resolve():
            _copy_beside(found, target)
        if in_pieces:
            assert found.source is not None
            _write_model(found.source, target / MODEL)
    except OSError as error:
        raise CheckpointError(f"{target}: {MODEL} could not be written: {error}") from error
    return target / MODEL


def _nothing(found: Loaded) -> str:
    """Say why there is nothing to put together."""
    if DEEPSPEED in found.position:
        return "the weights are in DeepSpeed's own files. Run the zero_to_fp32.py in it to make model files"
    return (
        f"its tensors are not in pieces, and it has no {MODEL}: there is nothing to put together. Copy the "
        "files that its model wrote"
    )


def _write_model(source: Source, path: Path) -> None:
    specs: dict[str, Spec] = {name: source.whole[leaf] for name, leaf in source.model.items()}
    strange = [name for name, (dtype, _) in specs.items() if not storable(dtype)]
    if strange:
        raise CheckpointError(
            f"{source.folder}: {', '.join(strange[:4])}: the safetensors format has no name for "
            f"{specs[strange[0]][0]}"
        )

    def value(name: str) -> Tensor:
        return source.assemble(source.model[name])

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        io.remove_tree(temporary)
        write_stream(temporary, specs, value)
        io.sync_file(temporary)
        os.replace(temporary, path)
        io.sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            io.remove_tree(temporary)
        raise


def _copy_beside(found: Loaded, target: Path) -> None:
    engine = found.position.get(DEEPSPEED)
    for name in found.manifest.files:
        of_training = name in _OF_TRAINING or is_state_file(name) or host_rng_rank(name) is not None
        of_engine = engine and (name in _OF_DEEPSPEED or name.startswith(f"{engine['tag']}/"))
        if not (of_training or of_engine):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.path / name, target / name)
