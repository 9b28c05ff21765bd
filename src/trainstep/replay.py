"""Running a step over batches again, and finding where two runs part."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from attrs import field, frozen

from trainstep import compare
from trainstep.compare import Difference
from trainstep.state import TrainState
from trainstep.types import Metrics

StepFn = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
Entry = str | Mapping[str, str]
"""A state after some step as ``digest(state)``, or leaf by leaf as ``leaf_digests(state)``."""
Run = Sequence[Entry] | Mapping[int, Entry] | tuple[TrainState, Iterable[Any], StepFn]


def replay(
    state: TrainState, batches: Iterable[Any], step: StepFn
) -> Iterator[tuple[TrainState, Metrics]]:
    """Yield ``(state, metrics)`` after each batch; lazily, so stopping early costs nothing.

    A pure step gives the same bits as the first time. A donated one consumes ``state``, and each
    state it yields when the next is asked for.
    """
    for batch in batches:
        state, metrics = step(state, batch)
        yield state, metrics


def leaf_digests(state: Any) -> dict[str, str]:
    """Return path -> SHA-256 for every leaf of a state; those that ``digest`` is made of."""
    return {path: compare.leaf_digest(path, leaf).hex() for path, leaf in compare._entries(state)}


@frozen
class Divergence:
    """Where two runs part.

    Attributes:
        step: the first number of updates after which they differ.
        last_equal: the last one before it at which both were known and equal; None if there is none.
        differences: the leaves that differ, as ``diff`` lists them. Of two runs that are replayed, the
            batches (``batch/...``) and metrics (``metrics/...``) that led there are compared as well,
            batches first. Empty if one run is known by digests of whole states only.
    """

    step: int
    last_equal: int | None
    differences: tuple[Difference, ...]

    @property
    def path(self) -> str | None:
        """The first leaf that differs; None if only digests of whole states are known."""
        return self.differences[0].path if self.differences else None

    def __str__(self) -> str:
        since = "" if self.last_equal is None else f", equal at step {self.last_equal}"
        lines = [f"first difference at step {self.step}{since}"]
        lines += [f"  {d.path}: {d.what}" for d in self.differences]
        return "\n".join(lines)


def bisect(a: Run, b: Run) -> Divergence | None:
    """Return the first step at which two runs differ, and in which leaves; None if they agree.

    Args:
        a: one run, in any of these forms: a sequence whose entry ``i`` is the state after ``i`` updates; a
            mapping from the number of updates to the state, which may have gaps; or
            ``(state, batches, step)``, which is replayed as far as needed. States in sequences and
            mappings are given as ``digest(state)`` or ``leaf_digests(state)``.
        b: the other, in the same or another form.

    Only steps that both runs have are compared: a run that ends earlier does not differ for that. Runs
    are followed from the start rather than halved, because two that parted may meet again.

    Raises:
        ValueError: if the runs have no step in common, so nothing could be compared.
        TypeError: for an entry that is no digest, such as a state.
    """
    last_equal: int | None = None
    for left, right in _common(_moments(a), _moments(b)):
        if not left.same_as(right):
            return Divergence(left.step, last_equal, tuple(left.differences(right)))
        last_equal = left.step
    if last_equal is None:
        raise ValueError("bisect: the two runs have no step in common, so nothing was compared")
    return None


@frozen(eq=False)
class _Moment:
    """One run after ``step`` updates: digests, or the live state and what led to it."""

    step: int
    entry: Entry | None = None
    live: dict[str, Any] = field(factory=dict)
    state: TrainState | None = None

    def same_as(self, other: "_Moment") -> bool:
        if self.state is not None and other.state is not None:
            return not list(self.differences(other))
        x, y = self.digests(), other.digests()
        if isinstance(x, str) or isinstance(y, str):
            return _whole(x) == _whole(y)
        return dict(x) == dict(y)

    def digests(self) -> Entry:
        return leaf_digests(self.state) if self.entry is None else self.entry

    def differences(self, other: "_Moment") -> Iterator[Difference]:
        if self.state is not None and other.state is not None:
            yield from compare.diff({"batch": self.live["batch"]}, {"batch": other.live["batch"]})
            yield from compare.diff(self.state, other.state)
            metrics = {"metrics": self.live["metrics"]}, {"metrics": other.live["metrics"]}
            yield from compare.diff(*metrics)
            return
        x, y = self.digests(), other.digests()
        if isinstance(x, str) or isinstance(y, str):
            return
        for path in {**x, **y}:
            if path not in x or path not in y:
                yield Difference(path, f"only in the {'first' if path in x else 'second'}")
            elif x[path] != y[path]:
                yield Difference(path, "digests differ")


def _whole(entry: Entry) -> str:
    """Return the digest of a state from its leaves' digests, or as it is."""
    if isinstance(entry, str):
        return entry
    joined = b"".join(bytes.fromhex(entry[path]) for path in sorted(entry))
    return hashlib.sha256(joined).hexdigest()


def _moments(run: Run) -> Iterator[_Moment]:
    if isinstance(run, Mapping):
        yield from (_Moment(step, _entry(step, run[step])) for step in sorted(run))
    elif isinstance(run, tuple) and len(run) == 3 and callable(run[2]):
        state, batches, step = run
        yield _Moment(state.step, state=state, live={"batch": None, "metrics": {}})
        for batch in batches:
            state, metrics = step(state, batch)
            live = {"batch": batch, "metrics": dict(metrics)}
            yield _Moment(state.step, state=state, live=live)
    else:
        yield from (_Moment(index, _entry(index, entry)) for index, entry in enumerate(run))


def _entry(step: int, entry: Any) -> Entry:
    if not isinstance(entry, str | Mapping):
        raise TypeError(
            f"bisect: the entry of step {step} is a {type(entry).__name__}; give states as digests, "
            "[leaf_digests(state) for state in states], or the run as (state, batches, step)"
        )
    return entry


def _common(a: Iterator[_Moment], b: Iterator[_Moment]) -> Iterator[tuple[_Moment, _Moment]]:
    """Walk two runs with rising steps together, and yield where both are known."""
    left, right = next(a, None), next(b, None)
    while left is not None and right is not None:
        if left.step == right.step:
            yield left, right
            left, right = next(a, None), next(b, None)
        elif left.step < right.step:
            left = next(a, None)
        else:
            right = next(b, None)
