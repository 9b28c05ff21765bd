"""Saving and restoring a distributed train state: in parts, or brought together on process 0."""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve
from torch import Tensor

import trainstep as ts
from trainer import modeling
from trainer.checkpoint import BackgroundWriter, CheckpointError, Contents, Loaded, open_lazily
from trainer.checkpoint.pieces import take_apart
from trainer.checkpoint.resharding import read_into
from trainer.checkpoint.sharded import ShardedBackgroundWriter, save
from trainer.checkpoint.source import Source
from trainer.distributed import agree
from trainer.distributed.fsdp import settle
from trainer.distributed.fsdp_plan import in_parts
from trainer.distributed.groups import beside
from trainer.distributed.ranks import Ranks
from trainer.optimizers import Adopted
from trainstep import sharded
from trainstep.serialize import from_flat, to_flat

logger = logging.getLogger(__name__)


def make_writer(trainer: Any) -> BackgroundWriter:
    """Return what saves parts in threads, one on every process."""
    # In a group of their own, so that their messages do not mix with those of training.
    return ShardedBackgroundWriter(beside("saving", trainer._ranks.timeout))


def distributed_contents(trainer: Any, contents: Contents) -> Contents:
    """Return what a checkpoint holds, in parts or together as ``state_dict_type`` says; all must call."""
    settle(trainer.model)
    state = contents.state
    if state is not None and in_parts(trainer.args):
        names = _model_names(trainer.model, to_flat(state)[0])
        parts, layout = take_apart(state, names)
        return evolve(
            contents,
            state=parts,
            layout=layout,
            write_model=trainer._write_beside_weights,
            model_tensors=None,
        )
    tensors = gathered_model(trainer)
    if state is not None:
        leaves, metadata = to_flat(state)
        # Weights that the model's file holds are there already.
        have = {} if trainer._two_sets_of_weights else _model_names(trainer.model, leaves)
        rest = {path: leaf for path, leaf in leaves.items() if path not in have.values()}
        whole = gathered(rest, trainer._ranks)
        whole |= {leaf: tensors[name] for name, leaf in have.items() if name in tensors}
        state = from_flat(whole, metadata) if trainer._ranks.first else None
    return evolve(
        contents, state=state, write_model=trainer._save_tensors, model_tensors=tensors or None
    )


def write(
    trainer: Any, root: Path, step: int, contents: Contents, tidy: Callable[[Path], None]
) -> None:
    """Save parts together, now or in threads; ``tidy`` is called on process 0 when they are safe.

    Raises:
        CheckpointError: on every process, if one of them fails.
    """
    ranks = trainer._ranks

    def done(path: Path) -> None:
        if ranks.first:
            tidy(path)

    if trainer._writer is not None:
        trainer._writer.submit(root, step, contents, on_done=done)
    else:
        done(save(root, step, contents, agree.host_group(ranks)))


def gathered(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Return whole tensors on process 0's host, made one after the other; nothing on the others."""
    found = {}
    for name, tensor in tensors.items():
        whole = sharded.whole(tensor.detach())
        if ranks.first:
            found[name] = whole.cpu()
    return found


def gathered_model(trainer: Any) -> dict[str, Tensor]:
    """Return the model's whole tensors on process 0's host, tied ones once; nothing on the others."""
    settle(trainer.model)
    tensors, first = trainer._model_tensors(), _first_names(trainer.model)
    ties = {name: first[name] for name in tensors if first.get(name, name) != name}
    found = gathered({n: t for n, t in tensors.items() if n not in ties}, trainer._ranks)
    return {name: found[ties.get(name, name)] for name in tensors} if found else {}


def _first_names(model: Any) -> dict[str, str]:
    """Return name -> first name of the same tensor."""
    model = modeling.unwrap(model)
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def read_weights(trainer: Any, folder: Path) -> None:
    """Read the weights of a checkpoint into the distributed model, in place; all must call.

    Raises:
        CheckpointError: if the checkpoint is damaged, or another model's.
    """
    ranks: Ranks = trainer._ranks
    settle(trainer.model)
    found = agree.together(ranks, f"reading {folder}", lambda: open_lazily(folder), CheckpointError)
    if found.source is None:
        raise CheckpointError(
            f"{folder} was saved with save_only_model, which distributed training (fsdp) cannot resume: "
            "build the model from it (from_pretrained) and start anew"
        )
    state = trainer.train_state
    targets, _ = to_flat(state.evolve(opt_state=(), extras={}))
    _fill(found.source, targets, ranks)


def take_up(mine: ts.TrainState, found: Loaded, adopted: Adopted, ranks: Ranks) -> ts.TrainState:
    """Return the state of a checkpoint in the tensors of ``mine``, which the module shares.

    Raises:
        CheckpointError: if the checkpoint is damaged.
        ValueError: listing the leaves that do not fit this model or optimizer.
    """
    source = found.source
    assert source is not None
    own, _ = to_flat(mine)
    if not adopted.translated:  # an optimizer that runs itself fills its state when it first steps
        own = {path: leaf for path, leaf in own.items() if not path.startswith("opt_state/")}
        own |= _rooms(source, mine)
    _fill(source, own, ranks, exactly=True)
    theirs = from_flat(own, source.metadata)
    return mine.evolve(
        step=theirs.step,
        key=theirs.key,
        opt_state=adopted.attach(theirs.opt_state),
        extras=theirs.extras,
    )


def _rooms(source: Source, mine: ts.TrainState) -> dict[str, Tensor]:
    """Make tensors for an optimizer's state: those shaped like their parameter distributed like it."""
    rooms: dict[str, Tensor] = {}
    for path, (dtype, shape) in source.whole.items():
        if path.startswith("opt_state/"):
            names = (name for name in path.split("/") if name in mine.params)
            like = next((mine.params[name] for name in names), None)
            if like is not None and tuple(like.shape) == shape:
                rooms[path] = torch.zeros_like(like, dtype=dtype)
            else:
                rooms[path] = torch.zeros(shape, dtype=dtype)
    return rooms


def _fill(
    source: Source, targets: dict[str, Tensor], ranks: Ranks, *, exactly: bool = False
) -> None:
    problems = list(_misfits(source, targets, exactly))
    if problems:
        raise ValueError(
            f"{source.folder} does not fit this model or optimizer:\n  " + "\n  ".join(problems)
        )
    read_into(source, targets, agree.host_group(ranks))


def _misfits(source: Source, targets: dict[str, Tensor], exactly: bool) -> Iterable[str]:
    for path, tensor in targets.items():
        form = tensor.dtype, tuple(tensor.shape)
        if path not in source.whole:
            yield f"missing: {path}"
        elif source.whole[path] != form:
            dtype, shape = source.whole[path]
            yield f"differs: {path} is {dtype} {shape}, expected {form[0]} {form[1]}"
    if exactly:
        yield from (f"unexpected: {path}" for path in source.whole if path not in targets)


def _model_names(model: Any, leaves: Mapping[str, Tensor]) -> dict[str, str]:
    """Return name in the model's file -> leaf; tied weights once, under their first name."""
    names: dict[str, str] = {}
    for name in modeling.unwrap(model).state_dict():
        for leaf in (f"params/{name}", f"buffers/{name}"):
            if leaf in leaves:
                names[name] = leaf
    return names
