"""``Contents``: what goes into a checkpoint, as live references or as a copy on the host."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor

from trainer.checkpoint.hf_format import HfParts
from trainer.checkpoint.pieces import Layout
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
        hf: what the files of the Hugging Face Trainer hold; None writes the format without pickles.
        layout: of which tensors ``state`` holds this process's parts only; None if it is whole.
    """

    write_model: Callable[..., None]
    state: TrainState | None
    position: dict[str, Any]
    trainer_state: str
    arguments: dict[str, Any]
    host_rng: dict[int, dict[str, Any]] = field(factory=dict)
    world_size: int = 1
    model_tensors: Mapping[str, Tensor] | None = None
    hf: HfParts | None = None
    layout: Layout | None = None

    def put_model(self, folder: Path) -> None:
        """Call ``write_model`` with what it takes."""
        if self.model_tensors is None:
            self.write_model(folder)
        else:
            self.write_model(folder, self.model_tensors)

    def frozen_copy(self, buffers: "Buffers | None" = None) -> "Contents":
        """Return a copy on the host that no later step changes, written to the same bytes.

        Tensors on a CUDA device are copied to pinned memory; the call returns when all copies are
        done. Each tensor is copied once, however often it occurs.

        Args:
            buffers: memory to copy into, so that a later copy need not allocate it again.
        """
        copies = _HostCopies(Buffers() if buffers is None else buffers)
        model_tensors = self.model_tensors
        if model_tensors is not None:
            model_tensors = {name: copies.of(tensor) for name, tensor in model_tensors.items()}
        state = None if self.state is None else tree.map(copies.of, self.state)
        hf = None if self.hf is None else self.hf.map(copies.of)
        copies.finish()
        return evolve(
            self,
            state=state,
            hf=hf,
            model_tensors=model_tensors,
            position=copy.deepcopy(self.position),
            arguments=copy.deepcopy(self.arguments),
            host_rng=copy.deepcopy(self.host_rng),
        )


class Buffers:
    """Host tensors that one copy after the other is made into.

    Fresh memory costs the system more time than copying: it is given page by page, each cleared first.
    """

    def __init__(self) -> None:
        self._free: dict[Any, list[Tensor]] = {}
        self._used: list[tuple[Any, Tensor]] = []

    def like(self, tensor: Tensor) -> Tensor:
        """Return a host tensor of that dtype, shape and layout; pinned for one on a CUDA device."""
        key = (tensor.dtype, tensor.shape, tensor.stride(), tensor.is_cuda)
        waiting = self._free.get(key)
        if waiting:
            buffer = waiting.pop()
        else:
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self._used.append((key, buffer))
        return buffer

    def trim(self) -> None:
        """Forget what the last copy had no use for."""
        self._free.clear()

    def recycle(self) -> None:
        """Let everything be used again: whoever had it needs it no more."""
        for key, buffer in self._used:
            self._free.setdefault(key, []).append(buffer)
        self._used.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._free.clear()
        self._used.clear()


class _HostCopies:
    """Copies tensors to the host, the same view of the same memory once."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
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
        self._buffers.trim()

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor.device.type not in ("cpu", "cuda"):
            return tensor.cpu()
        target = self._buffers.like(tensor)
        target.copy_(tensor, non_blocking=tensor.is_cuda)
        if tensor.is_cuda:
            self._devices.add(tensor.device)
        return target
