"""``capture(make_eval_step(...))``: the loss of a batch from CUDA graphs, one for every shape of batch.

A recording reads the tensors of the state that it was made with. Steps that are donated or captured leave
parameters where they are, so that one recording serves all of a training; a state elsewhere is recorded
anew.
"""

from typing import Any

import torch
from attrs import define, field, frozen
from torch import Tensor

from trainstep.evaluate import EvalStep
from trainstep.homes import on_device, pack, unpack
from trainstep.stages import Inputs, as_input
from trainstep.state import TrainState
from trainstep.types import Metrics


@frozen(eq=False)
class Place:
    """Where a recording finds a tensor; while this is kept, nothing else can come to be there."""

    tensor: Tensor
    alias: Tensor  # keeps the memory if somebody gives the tensor another (``tensor.data = ...``)
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Place":
        return cls(tensor, tensor.detach(), tensor.data_ptr())

    def holds(self, other: Tensor) -> bool:
        """Whether a recording that reads this place reads ``other``."""
        if other.data_ptr() != self.address:
            return False
        mine = self.alias
        return other is self.tensor or (
            (other.shape, other.dtype, other.device) == (mine.shape, mine.dtype, mine.device)
            and other.stride() == mine.stride()
        )


@define(eq=False)
class CapturedEval:
    """An evaluation in CUDA graphs; what ``capture`` returns of it. Called as the evaluation is.

    It keeps the parameters and buffers of the latest state, which its recordings read.
    """

    step: EvalStep
    limit: int = 8
    _graphs: Inputs | None = field(default=None, init=False)
    _names: tuple[Any, ...] = field(default=(), init=False)
    _places: list[Place] = field(factory=list, init=False)

    def __call__(self, state: TrainState, batch: Any) -> Metrics:
        """Return the metrics of one batch; they stay on the device."""
        device = next(iter(state.params.values())).device
        if device.type != "cuda":
            return self.step(state, batch)
        return self.recorded(state, batch, device)

    def recorded(self, state: TrainState, batch: Any, device: torch.device) -> Metrics:
        """Return the metrics from a recording, once there is one for these tensors and this shape."""
        graphs = self._graphs
        if graphs is None or not self._reads(state):
            graphs = self._begin(state, device)
        batch = as_input(batch)
        packed = graphs(
            lambda inputs, key: pack(self.step.metrics(state, on_device(inputs, device), key)),
            batch,
            self.step.loss_key(state),
        )
        return unpack(packed)

    def _reads(self, state: TrainState) -> bool:
        if (tuple(state.params), tuple(state.buffers)) != self._names:
            return False
        return all(map(Place.holds, self._places, _tensors(state)))

    def _begin(self, state: TrainState, device: torch.device) -> Inputs:
        """Let go of all recordings, and start anew with the tensors of ``state``."""
        self._names = tuple(state.params), tuple(state.buffers)
        self._places = [Place.of(tensor) for tensor in _tensors(state)]
        # A pool that graphs were in, and none is any more, cannot be used again.
        self._graphs = Inputs(device, torch.cuda.graph_pool_handle(), self.limit)
        return self._graphs


def _tensors(state: TrainState) -> list[Tensor]:
    return [*state.params.values(), *state.buffers.values()]
