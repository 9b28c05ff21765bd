"""What is logged about training, added up on the device and read when a log is due."""

import logging
import time
from typing import Any

import torch
from attrs import define, field

from trainstep.types import Metrics

logger = logging.getLogger(__name__)


@define(eq=False)
class Meter:
    """Sums of the loss since the last log and over the whole run, resumed parts included.

    Nothing here reads a tensor until ``read``: adding costs a few scalar operations on the device and
    no host sync.

    Attributes:
        filter_nonfinite: leave non-finite losses out of the logged mean (they are counted apart).
        started: time at which training began, seconds since the epoch.
        total: sum of the losses that were read.
    """

    filter_nonfinite: bool
    started: float = field(factory=time.time)
    total: float = 0.0
    _sum: Any = field(default=None, init=False)
    _bad: Any = field(default=None, init=False)
    _last: int = field(default=0, init=False)

    def add(self, metrics: Metrics, step: int) -> None:
        """Add the metrics of update number ``step`` (from 1)."""
        loss, norm = metrics["loss"], metrics["grad_norm"]
        bad = (~torch.isfinite(norm)).to(norm.device) | ~torch.isfinite(loss).to(norm.device)
        self._bad = bad.long() if self._bad is None else self._bad + bad
        if self.filter_nonfinite:
            # As the Hugging Face Trainer does: the mean so far stands in for the value.
            mean = 0.0 if self._sum is None else self._sum / (step - self._last)
            loss = torch.where(torch.isfinite(loss), loss, mean)
        self._sum = loss if self._sum is None else self._sum + loss

    @property
    def pending(self) -> bool:
        """Whether there were updates since the last ``read``."""
        return self._sum is not None

    def read(self, step: int) -> float:
        """Return the mean loss since the last ``read`` and start anew; warns of non-finite steps."""
        count = max(step - self._last, 1)
        value = float(self._sum.item())
        bad = int(self._bad.item())
        if bad:
            logger.warning(
                "%d of the last %d updates (to step %d) had a loss or gradient that is not finite. "
                'on_nonfinite="skip" leaves such updates out, "raise" stops at the first.',
                bad,
                count,
                step,
            )
        self.total += value
        self._sum, self._bad, self._last = None, None, step
        return value / count

    def mean(self, step: int) -> float:
        """Return the mean loss over all updates of the run, up to ``step``."""
        rest = float(self._sum.item()) if self._sum is not None else 0.0
        return (self.total + rest) / max(step, 0.001)

    def state(self) -> dict[str, Any]:
        """Return the running sums, to be stored: a resumed run then logs what it would have."""
        return {
            "dtype": None if self._sum is None else str(self._sum.dtype).removeprefix("torch."),
            "sum": None if self._sum is None else float(self._sum.double().item()).hex(),
            "bad": None if self._bad is None else int(self._bad.item()),
            "last": self._last,
            "total": self.total.hex(),
        }

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Take up the sums that ``state`` returned."""
        if state["sum"] is not None:
            value = float.fromhex(state["sum"])
            dtype = getattr(torch, state["dtype"])
            self._sum = torch.tensor(value, dtype=dtype, device=device)
            self._bad = torch.tensor(state["bad"], dtype=torch.int64, device=device)
        self._last = state["last"]
        self.total = float.fromhex(state["total"])
