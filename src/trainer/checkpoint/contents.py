"""``Contents``: what goes into a checkpoint, as live references or as a copy on the host."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from trainstep import tree
from trainstep.state import TrainState


@frozen(eq=False)
class Contents:
    """Everything that one checkpoint holds.

    Attributes:
        write_model: writes the model's files (``model.safetensors`` or shards of it, ``config.json``,
            processor) into the folder it is given; called ``write_model(folder)``, or
            ``write_model(folder, model_tensors)`` if those are given. A background save calls it in
            another thread while training goes on: it must then read no live tensor but those.
        state: the state of training; None saves the model only, and such a checkpoint cannot be
            resumed exactly.
        position: where the data stands, for all processes together; JSON values.
        trainer_state: the text of ``trainer_state.json``.
        arguments: the training's arguments without secrets, JSON values; ``training_args.json``.
        host_rng: the random state of each rank's host (``host_rng.capture``), JSON values.
        world_size: how many processes the training has.
        model_tensors: the model's tensors by name, for ``write_model``. They may share memory with the
            state and with each other; a copy shares likewise, so that nothing is copied twice.
    """

    write_model: Callable[..., None]
    state: TrainState | None
    position: dict[str, Any]
    trainer_state: str
    arguments: dict[str, Any]
    host_rng: dict[int, dict[str, Any]] = field(factory=dict)
    world_size: int = 1
    model_tensors: Mapping[str, Tensor] | None = None

    def put_model(self, folder: Path) -> None:
        """Call ``write_model`` with what it takes."""
        if self.model_tensors is None:
            self.write_model(folder)
        else:
            self.write_model(folder, self.model_tensors)

    def frozen_copy(self) -> "Contents":
        """Return a copy on the host that no later step changes, written to the same bytes.

        Tensors on a CUDA device are copied to pinned memory; the call returns when all copies are
        done. Each tensor is copied once, however often it occurs.
        """
        copies = _HostCopies()
        model_tensors = self.model_tensors
        if model_tensors is not None:
            model_tensors = {name: copies.of(tensor) for name, tensor in model_tensors.items()}
        state = None if self.state is None else tree.map(copies.of, self.state)
        copies.finish()
        return evolve(
            self,
            state=state,
            model_tensors=model_tensors,
            position=copy.deepcopy(self.position),
            arguments=copy.deepcopy(self.arguments),
            host_rng=copy.deepcopy(self.host_rng),
        )


class _HostCopies:
    """Copies tensors to the host, the same view of the same memory once."""

    def __init__(self) -> None:
        self._done: dict[Any, Any] = {}
        self._devices: set[torch.device] = set()

    def of(self, leaf: Any) -> Any:
        """Return the copy of a tensor; anything else is returned as it is."""
        if not isinstance(leaf, Tensor):
            return leaf
        tensor = leaf.detach()
        view = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        lazy = (tensor.is_conj(), tensor.is_neg())
        if not tensor.numel() or view + lazy not in self._done:
            self._done[view + lazy] = self._copy(tensor)
        return self._done[view + lazy]

    def finish(self) -> None:
        """Wait for the copies that are under way."""
        for device in self._devices:
            torch.cuda.current_stream(device).synchronize()

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.cpu() if tensor.device.type != "cpu" else tensor.clone()
        target = torch.empty_like(tensor, device="cpu", pin_memory=True)
        target.copy_(tensor, non_blocking=True)
        self._devices.add(tensor.device)
        return target
