"""``capture``: the step's work on the device as CUDA graphs, replayed without Python in between.

A step has two parts, each a graph of its own: gradients (one for every shape of batch) and the update. What
cannot be in a graph is done as ever beside it: an update by an optimizer that asks the host, say.

The graphs read and write one set of tensors, those of the state at the time of recording. Other states
are copied into them, so a resumed or loaded state goes on in the same graphs.
"""

from typing import Any
from weakref import WeakValueDictionary

import torch
from attrs import define, field
from torch import Tensor

from trainstep import tree
from trainstep.batches import split_batch
from trainstep.errors import CaptureError
from trainstep.grads import accumulate
from trainstep.homes import Packed, copy, fits, on_device, pack, settled, unpack
from trainstep.losses import Loss
from trainstep.optim.multi import is_rate
from trainstep.parallel import DataParallel
from trainstep.stages import Inputs, Stages, as_input
from trainstep.state import TrainState, consume, parts
from trainstep.step import Step
from trainstep.types import Grads, Hyper, Metrics


@define(eq=False)
class CapturedStep:
    """A donated step in CUDA graphs; what ``capture`` returns. Called as the step is.

    With ``parallel``, whose step this is, gradients are those of all ranks, added up inside the graph.
    """

    step: Step
    limit: int = 8
    parallel: DataParallel | None = None
    _pool: Any = field(default=None, init=False)
    _gradients: Inputs | None = field(default=None, init=False)
    _updates: dict[Any, tuple[tuple[Any, ...], Stages]] = field(factory=dict, init=False)
    _home: TrainState | None = field(default=None, init=False)
    _rates: dict[str, Tensor] = field(factory=dict, init=False)
    _shown: dict[str, float] = field(factory=dict, init=False)
    _met: WeakValueDictionary[int, Tensor] = field(factory=WeakValueDictionary, init=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("step", "parallel"):
            raise AttributeError(name)
        if name == "init" and self.parallel is not None:
            return self.parallel.init
        return getattr(self.step, name)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Return the state after one update, and metrics that stay on the device."""
        device = next(iter(state.params.values())).device
        if device.type != "cuda":
            return (self.parallel or self.step)(state, batch)
        state = self.at_home(state)
        batch = as_input(batch)
        if self._gradients is None:
            if self.parallel is not None:
                self.parallel.check_recordable()
            self._gradients = Inputs(device, self.pool, self.limit)
        loss, grads = self._gradients(
            lambda inputs, key: self._accumulate(state, on_device(inputs, device), key),
            batch,
            self.step.loss_key(state),
        )
        return self.update(state, loss, grads)

    @property
    def pool(self) -> Any:
        """The memory that all graphs of this step share."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def forget(self) -> None:
        """Let go of everything recorded; what comes next is recorded anew."""
        self._gradients = None
        self._updates.clear()
        self._met.clear()
        self._pool = None  # PyTorch does not take a pool up again that no graph uses

    def at_home(self, state: TrainState) -> TrainState:
        """Return ``state`` in the tensors that the graphs use; consumes it if it is in others.

        Raises:
            CaptureError: if its tensors do not fit those of the state that was recorded.
        """
        if state is self._home or not self._recorded:
            self._home = state
            return state
        assert self._home is not None
        mine, spec = tree.flatten(parts(self._home))
        theirs, their_spec = tree.flatten(parts(state))
        if spec != their_spec or any(not fits(a, b) for a, b in zip(mine, theirs, strict=True)):
            raise CaptureError(
                "capture: this state has other tensors than the one that was recorded. Capture the step "
                "anew for it: trainstep.capture(step)."
            )
        copy(mine, theirs)
        home = self._home.evolve(step=state.step, key=state.key)
        consume(state)
        self._home = home
        return home

    def prepare(self, state: TrainState, loss: Loss, grads: Grads) -> tuple[Loss, Grads]:
        """Return what ``finish`` takes: a graph of the update does not stop in the middle."""
        return loss, grads

    def finish(self, state: TrainState, pending: tuple[Loss, Grads]) -> tuple[TrainState, Metrics]:
        """Make the update, see ``update``."""
        return self.update(state, *pending)

    def update(self, state: TrainState, loss: Loss, grads: Grads) -> tuple[TrainState, Metrics]:
        """Finish a step whose gradients are known.

        In a graph, if the same tensors are given time after time, as a graph of the gradients does.
        """
        state = self.at_home(state)
        hyper = self.step.hyper(state.step)
        stages = self._stages(state, loss, grads, hyper)
        key = self.step.transform_key(state)

        def body(given: Hyper, key: Any) -> tuple[TrainState | None, Packed]:
            result, metrics = self.step.update(state.evolve(), loss, grads, given, key)
            if "lr" in hyper:
                del metrics["lr"]  # the host knows it: one copy less in every step
            packed = pack(metrics)  # before the tensors are overwritten that some of them are
            return (None if settled(state, result) else result), packed

        if stages is None:
            elsewhere, packed = body(hyper, key)
        elif not stages.static:
            elsewhere, packed = stages(lambda key: body(hyper, key), key)
        else:
            placed = self._place(hyper, stages.device)
            elsewhere, packed = stages(lambda key: body(placed, key), key)
        metrics = unpack(packed)
        if "lr" in hyper:
            metrics["lr"] = torch.as_tensor(hyper["lr"], dtype=torch.float64)
        after = state if elsewhere is None else elsewhere
        self._home = after.evolve(step=state.step + 1, key=state.key)
        consume(state)
        return self._home, metrics

    def _stages(self, state: TrainState, loss: Loss, grads: Grads, hyper: Hyper) -> Stages | None:
        """Return where the update of these tensors stands; None if it cannot be in a graph."""
        device = next(iter(state.params.values())).device
        # Kernels read rates from the device, other hyperparameters from the host.
        rates_only = all(map(is_rate, hyper))
        if device.type != "cuda" or not grads or not self._recordable or not rates_only:
            return None
        first = next(iter(grads.values()))
        if self._met.get(id(first)) is not first:  # not a tensor that comes again and again
            self._met[id(first)] = first
            return None
        read = (first, loss.root[0], loss.weight, *(loss.buffers or {}).values())
        which = (id(first), *hyper)  # a recording reads the rates that there were, and no others
        known = self._updates.get(which)
        if known is None:
            while len(self._updates) > self.limit:
                self._updates.pop(next(iter(self._updates)))
            known = self._updates[which] = (read, Stages(device, self.pool))
        before, stages = known
        if len(before) == len(read) and all(a is b for a, b in zip(before, read, strict=True)):
            return stages
        return None

    @property
    def _recordable(self) -> bool:
        step = self.step
        return (
            step.optimizer.capturable
            and step.on_nonfinite != "raise"
            and all(transform.period == 1 for transform in step.transforms)
        )

    @property
    def _recorded(self) -> bool:
        gradients = self._gradients is not None and self._gradients.recorded
        return gradients or any(s.recording is not None for _, s in self._updates.values())

    def _place(self, hyper: Hyper, device: torch.device) -> dict[str, Tensor]:
        """Put the rates where recorded kernels read them."""
        placed: dict[str, Tensor] = {}
        for name, value in hyper.items():
            if name not in self._rates:
                self._rates[name] = torch.zeros((), dtype=torch.float32, device=device)
                self._shown[name] = 0.0
            if self._shown[name] != value:
                self._rates[name].fill_(value)
                self._shown[name] = float(value)
            placed[name] = self._rates[name]
        return placed

    def _accumulate(self, state: TrainState, batch: Any, key: Any) -> tuple[Loss, Grads]:
        step = self.step
        if self.parallel is not None:
            return self.parallel.sums(state, batch, key).mean()
        return accumulate(
            step.loss_fn,
            state.params,
            state.buffers,
            split_batch(batch, step.microbatches),
            key,
            order=step.order,
            scale=step.loss_scale(state),
        )
