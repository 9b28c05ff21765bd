"""Live figures (``log_figures=True``): how fast a run is, and where its time goes.

They are taken from shapes and from the host's clock when a log is due, after the loss was read, which
waits for the device anyway; nothing else is waited for. So the clock is right for what lies between two
logs; how it is shared out to the phases is as seen from the host, which may hand work to a GPU in one
phase that is done in the next.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from trainer.distributed import agree
from trainer.evaluation.nested import batch_length
from trainer.tokens import main_input_name

logger = logging.getLogger(__name__)

# Dense bfloat16 operations per second, sums in float32, from the vendors' data sheets (figures with
# sparsity halved). A device is the first whose words are all in its name.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800 PCIe", 756e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A30", 165e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 6000 Ada", 364.2e12),
    ("RTX A6000", 154.8e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090 Ti", 80e12),
    ("RTX 3090", 71e12),
    ("MI325X", 1307.4e12),
    ("MI300X", 1307.4e12),
    ("MI250X", 191.5e12),  # each of the two dies, half of what the data sheet says, is a device
)
# Words of devices that are slower than their namesakes: slices, notebooks' chips, the RTX 4090 D.
_LESSER = frozenset({"MIG", "Laptop", "D"})


def peak_operations(device_name: str) -> float | None:
    """Return a device's peak of dense bfloat16 operations per second; None if it is not in the table.

    Args:
        device_name: what ``torch.cuda.get_device_name`` returns. A slice of a device (MIG) has no peak
            of its own, nor has a notebook's chip that of the card whose name it bears.
    """
    words = set(device_name.replace("-", " ").split())
    if words & _LESSER:
        return None
    return next((peak for name, peak in _PEAKS if words.issuperset(name.split())), None)


class Figures:
    """Counts what passes between two logs of a run.

    Args:
        trainer: whose run it is.
        clock: seconds, from anywhere.
    """

    def __init__(self, trainer: Any, clock: Callable[[], float] = perf_counter) -> None:
        self._trainer, self._clock = trainer, clock
        self._main_input = main_input_name(trainer.model)
        self._device = trainer.args.device
        cuda = self._device.type == "cuda"
        self._memory = cuda and torch.cuda.is_available()
        self._peak = self._find_peak()
        self._counted = True
        self.start()

    def start(self) -> None:
        """Begin to count, where the run stands: what came before a resumption is not of this session."""
        run = self._trainer._run
        self._began = self._clock()
        self._step = 0 if run is None else run.state.step
        self._operations = self._trainer.state.total_flos
        self._samples = self._tokens = 0
        self._apart = {"evaluate": 0.0, "save": 0.0}
        self._reset_memory()

    def watching(
        self, observe: Callable[[Iterator[Any]], Iterable[Any]]
    ) -> Callable[[Iterator[Any]], Iterator[Any]]:
        """Return ``observe``, which wraps an epoch's batches, with these counts added."""

        def watch(batches: Iterator[Any]) -> Iterator[Any]:
            for batch in observe(batches):
                self._samples += batch_length(batch)
                main = batch.get(self._main_input) if isinstance(batch, Mapping) else None
                if isinstance(main, Tensor):
                    self._tokens += main.numel()
                yield batch

        return watch

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside as that of ``evaluate`` or ``save``, and not of the steps."""
        began = self._clock()
        try:
            yield
        finally:
            self._apart[name] += self._clock() - began

    def take(self) -> dict[str, float]:
        """Return the figures since the last call, and start anew; see ``log_figures`` in the guide.

        The operations must be in ``state.total_flos`` already. With several processes all must call this:
        samples and tokens are summed over them, the others are this process's.
        """
        trainer = self._trainer
        now, step = self._clock(), trainer._run.state.step
        spent = max(now - self._began - sum(self._apart.values()), 1e-9)
        counts = agree.total(trainer._ranks, [self._samples, self._tokens])
        samples, tokens = (float(count) for count in counts)
        rates = {
            "samples_per_second": samples / spent,
            "steps_per_second": (step - self._step) / spent,
            "tokens_per_second": tokens / spent,
        }
        figures = {name: round(rate, 3) for name, rate in rates.items() if rate}
        operations = trainer.state.total_flos - self._operations
        if self._peak is not None:
            if operations > 0:
                peak = self._peak * trainer._ranks.size
                figures["mfu"] = round(operations / spent / peak, 4)
            elif step > self._step:
                self._miss_operations()
        if self._memory:
            most = torch.cuda.max_memory_allocated(self._device)
            figures["peak_memory_gib"] = round(most / 2**30, 3)
        figures["data_wait"] = round(trainer._run.batches.wait.take(), 4)
        figures["time_step"] = round(spent, 4)
        figures |= {f"time_{name}": round(seconds, 4) for name, seconds in self._apart.items()}
        self.start()
        self._began = now
        return figures

    def _find_peak(self) -> float | None:
        """Return operations per second of one device; where MFU is expected without, say what to do."""
        device, given = self._device, self._trainer.args.peak_tflops
        if given is not None:
            return float(given) * 1e12
        if device.type == "cpu":  # nobody expects it there
            return None
        cuda = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if cuda else device.type
        peak = peak_operations(name) if cuda else None
        if peak is None:
            self._explain(
                f"the peak of the device {name!r} is not known. Set peak_tflops to its dense operations "
                "per second in units of 1e12, in the precision that is trained in."
            )
        return peak

    def _miss_operations(self) -> None:
        """Say, once, why there is no MFU although the device's peak is known."""
        if self._counted:
            self._counted = False
            self._explain(
                "no operations are counted. Give the model num_parameters(exclude_embeddings=...) and its "
                f"batches the main input {self._main_input!r} (the model's main_input_name), or override "
                "the Trainer's floating_point_ops."
            )

    def _explain(self, reason: str) -> None:
        if self._trainer.is_world_process_zero():
            logger.warning("log_figures: records have no mfu, since %s", reason)

    def _reset_memory(self) -> None:
        # The memory report at the end (skip_memory_metrics=False) is of a peak that only it resets.
        if self._memory and self._trainer.args.skip_memory_metrics:
            torch.cuda.reset_peak_memory_stats(self._device)


def timed(trainer: Any, phase: str) -> AbstractContextManager[None]:
    """Return a context whose time counts as that of ``phase``, if the trainer keeps figures."""
    return nullcontext() if trainer._figures is None else trainer._figures.phase(phase)
