"""``capture(compile(step, whole=True))``: the one function of a whole step in one CUDA graph."""

from typing import Any

from attrs import define

from trainstep.captured import CapturedStep
from trainstep.errors import CaptureError
from trainstep.homes import on_device, pack, unpack
from trainstep.rehearsal import DRAWN_ON_HOST
from trainstep.stages import Inputs, as_input
from trainstep.state import TrainState, consume
from trainstep.types import Metrics
from trainstep.whole import WholeStep, check_rates


@define(eq=False)
class CapturedWhole(CapturedStep):
    """A whole step in a CUDA graph. Called as the step is."""

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Return the state after one update, and metrics that stay on the device."""
        device = next(iter(state.params.values())).device
        if device.type != "cuda":
            return self.step(state, batch)
        assert isinstance(self.step, WholeStep)
        if self.step.draws_on_host:  # said before anything is done
            raise CaptureError(DRAWN_ON_HOST)
        step, home = self.step, self.at_home(state)
        complete = home.evolve(extras=step.memory(home))
        hyper = step.hyper(home.step)
        check_rates(hyper)
        if self._gradients is None:
            self._gradients = Inputs(device, self.pool, self.limit)
        rates = self._place(hyper, device)
        batch = as_input(batch)
        packed = self._gradients(
            lambda inputs, key: pack(step.work(complete, on_device(inputs[0], device), rates, key)),
            (batch, tuple(hyper)),  # a recording reads the rates that there were, and no others
            step.loss_key(home),
        )
        self._home = complete.evolve(step=home.step + 1)
        consume(home)
        return self._home, step.with_rate(unpack(packed), hyper)
