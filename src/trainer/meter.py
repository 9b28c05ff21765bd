"""What is logged about training: kept as device scalars, read in one go when a log is due."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from attrs import define, field
from torch import Tensor

from trainstep.types import Metrics

logger = logging.getLogger(__name__)

# So many losses are kept before they are folded into the sums, so that a run without logs stays small.
_FOLD = 1024


@define(eq=False)
class Meter:
    """Sums of the loss since the last log and over the whole run, resumed parts included.

    Adding keeps references to a few scalars and does nothing else: no operation, no host sync.

    Attributes:
        filter_nonfinite: leave non-finite losses out of the logged mean (they are counted apart).
        started: time at which training began, seconds since the epoch.
        total: sum of the losses that were read.
        join: with several processes, adds up float64 numbers over them: each one's shares of the losses.
    """

    filter_nonfinite: bool
    started: float = field(factory=time.time)
    total: float = 0.0
    join: Callable[[Any], Any] | None = None
    _waiting: list[tuple[Sequence[Tensor], Tensor]] = field(factory=list, init=False)
    _held: int = field(default=0, init=False)
    _sent: list["_Sent"] = field(factory=list, init=False)
    _sum: Any = field(default=None, init=False)  # NumPy scalar in the loss's dtype
    _count: int = field(default=0, init=False)
    _bad: int = field(default=0, init=False)
    _latest: tuple[Any, Any] | None = field(default=None, init=False)

    def add(self, metrics: Metrics, losses: Sequence[Tensor] = ()) -> None:
        """Add the metrics of an update.

        Args:
            metrics: what the step returned.
            losses: the shares of its micro-batches in the loss, in order. A running sum of them has other
                bits than one of their sums; without them, the metrics' loss is added.
        """
        self._waiting.append((losses or (metrics["loss"],), metrics["grad_norm"]))
        self._held += len(losses) or 1
        self._latest = (metrics["grad_norm"], metrics["lr"])
        if self._held >= _FOLD:
            self._fold()

    def send(self) -> None:
        """Start to copy what was added to the host, without waiting; ``read`` then waits for the copy."""
        if self._waiting:
            self._sent.append(_Sent(self._waiting))
            self._waiting, self._held = [], 0

    @property
    def pending(self) -> bool:
        """Whether there were updates since the last ``read``."""
        return bool(self._waiting or self._sent) or self._count > 0

    @property
    def joins(self) -> bool:
        """Whether the next ``read`` calls ``join``."""
        return self.join is not None and bool(self._waiting or self._sent)

    @property
    def latest(self) -> dict[str, float]:
        """Gradient norm and learning rate of the last update, by the names that they are logged under."""
        if self._latest is None:
            return {}
        norm, rate = map(float, self._latest)
        return {"grad_norm": norm, "learning_rate": rate}

    def read(self, step: int) -> float:
        """Return the mean loss since the last ``read`` and start anew; warns of non-finite steps."""
        self._fold()
        value, count, bad = float(self._sum), self._count, self._bad
        if bad:
            logger.warning(
                "%d of the last %d updates (to step %d) had a loss or gradient that is not finite. "
                'on_nonfinite="skip" leaves such updates out, "raise" stops at the first.',
                bad,
                count,
                step,
            )
        self.total += value
        self._sum, self._count, self._bad = None, 0, 0
        return value / count

    def mean(self, step: int) -> float:
        """Return the mean loss over all updates of the run, up to ``step``."""
        self._fold()
        rest = 0.0 if self._sum is None else float(self._sum)
        return (self.total + rest) / max(step, 0.001)

    def state(self) -> dict[str, Any]:
        """Return the running sums, to be stored: a resumed run then logs what it would have."""
        self._fold()
        return {
            "dtype": None if self._sum is None else self._sum.dtype.name,
            "sum": None if self._sum is None else float(self._sum).hex(),
            "count": self._count,
            "bad": self._bad,
            "total": self.total.hex(),
            "latest": None if self._latest is None else [float(x).hex() for x in self._latest],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the sums that ``state`` returned."""
        if state["sum"] is not None:
            self._sum = np.dtype(state["dtype"]).type(float.fromhex(state["sum"]))
        self._count, self._bad = state["count"], state["bad"]
        self.total = float.fromhex(state["total"])
        if state["latest"] is not None:
            norm, rate = map(float.fromhex, state["latest"])
            self._latest = (norm, rate)

    def _fold(self) -> None:
        self.send()
        sent, self._sent = self._sent, []
        for columns in sent:
            self._add_up(*columns.arrived())

    def _add_up(self, losses: Any, norms: Any, counts: list[int]) -> None:
        if self.join is not None:
            losses = self.join(losses.astype(np.float64)).astype(losses.dtype)
        # One after the other in the loss's own precision, as a running sum on the device would.
        shares = iter(losses)
        for count, norm in zip(counts, norms, strict=True):
            finite = [self._add_share(share) for share in islice(shares, count)]
            self._bad += not (all(finite) and math.isfinite(norm))
            self._count += 1
        if self._latest is not None:  # spares reading it from the device once more
            self._latest = (norms[-1], self._latest[1])

    def _add_share(self, loss: Any) -> bool:
        """Add a loss to the sum; returns whether it was finite."""
        finite = math.isfinite(loss)
        if self.filter_nonfinite and not finite:
            # As the Hugging Face Trainer does: the mean so far stands in for the value.
            loss = loss.dtype.type(0 if self._sum is None else self._sum / (self._count + 1))
        self._sum = loss if self._sum is None else self._sum + loss
        return finite


class _Sent:
    """Scalars of some updates on their way from the device to the host."""

    def __init__(self, updates: list[tuple[Sequence[Tensor], Tensor]]) -> None:
        losses, norms = zip(*updates, strict=True)
        self._counts = list(map(len, losses))
        stacked = [torch.stack(list(chain.from_iterable(losses))), torch.stack(norms)]
        # Copies into pageable memory would wait for the device.
        self._columns = [_on_host(column) for column in stacked]
        devices = {column.device for column in stacked if column.is_cuda}
        self._copied = [torch.cuda.current_stream(device).record_event() for device in devices]

    def arrived(self) -> tuple[Any, Any, list[int]]:
        """Wait for the copies; returns losses, norms, and how many of the losses each update has."""
        for event in self._copied:
            event.synchronize()
        losses, norms = (column.numpy() for column in self._columns)
        return losses, norms, self._counts


def _on_host(column: Tensor) -> Tensor:
    column = column.float() if column.dtype is torch.bfloat16 else column
    if not column.is_cuda:
        return column.cpu()
    host = torch.empty_like(column, device="cpu", pin_memory=True)
    return host.copy_(column, non_blocking=True)
