"""``TrainState``: everything that training changes, in one immutable record."""

from collections.abc import Iterable
from typing import Any, NoReturn

from attrs import evolve, field, frozen
from torch import Tensor

from trainstep import tree
from trainstep.rng import Key
from trainstep.types import Buffers, OptState, Params


@frozen(eq=False, slots=False, repr=False)
class TrainState:
    """The state of training after ``step`` updates.

    Registered as a pytree: tensors are leaves, ``step`` and ``key`` are static. The record is frozen
    and no pure function writes to its tensors or dicts; ``trainstep.donate`` consumes it instead. The dicts
    are ordinary ones all the same: to change a state make another with ``evolve``.

    Attributes:
        step: updates done so far; a Python int, so that schedules and keys need no device read.
        params: trainable tensors by name.
        buffers: module buffers and frozen parameters by name.
        opt_state: the optimizer's tensors, all there from the start.
        key: root of all randomness in training; never changes.
        extras: state of transforms, guards and averages, by name.
    """

    step: int
    params: Params
    buffers: Buffers
    opt_state: OptState
    key: Key
    extras: dict[str, Any] = field(factory=dict)

    def __repr__(self) -> str:
        tensors = [leaf for leaf in tree.leaves(self.params) if isinstance(leaf, Tensor)]
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        size = sum(tensor.numel() for tensor in tensors)
        return (
            f"TrainState(step={self.step}, params=<{len(tensors)} tensors, {size:,} numbers, "
            f"{', '.join(dtypes)}>, key={self.key!r})"
        )

    def evolve(self, **changes: Any) -> "TrainState":
        """Return a copy with some fields replaced; tensors of the others are shared."""
        return evolve(self, **changes)


class ConsumedState(TrainState):
    """What a state turns into once ``trainstep.donate`` took its buffers: every use is an error."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        _refuse(self, name)

    def evolve(self, **changes: Any) -> NoReturn:
        """Refuse: there is nothing left to copy."""
        _refuse(self, "evolve")

    def __repr__(self) -> str:
        return f"<TrainState consumed at step {self.__dict__['_consumed_at']}>"


def _refuse(state: ConsumedState, what: str) -> NoReturn:
    raise RuntimeError(
        f"TrainState.{what}: this state was donated at step {state.__dict__['_consumed_at']}, its "
        "buffers now belong to the state that the donated step returned. Use that one, or call the "
        "step without trainstep.donate() to keep both."
    )


def refuse_state(where: str, state: Any, batch: Any) -> NoReturn:
    """Raise TypeError for what is no state; callers ask ``isinstance(state, TrainState)`` first."""
    hint = "make one with step.init(model)"
    if isinstance(batch, TrainState):
        hint = "the state comes before the batch"
    elif isinstance(state, tuple) and state and isinstance(state[0], TrainState):
        hint = "a step returns two things: state, metrics = step(state, batch)"
    kind = type(state).__name__
    raise TypeError(f"{where}: the state must be a TrainState, got {kind}; {hint}")


def consume(state: TrainState) -> None:
    """Take the tensors out of ``state``; whoever still holds it gets a RuntimeError on use.

    The class is swapped rather than a flag tested, so that live states pay nothing for the check.
    """
    at = state.step
    state.__dict__.clear()
    state.__dict__["_consumed_at"] = at
    object.__setattr__(state, "__class__", ConsumedState)


def parts(state: TrainState) -> tuple[Any, ...]:
    """Return what of a state holds tensors: parameters, buffers, optimizer state, extras."""
    return state.params, state.buffers, state.opt_state, state.extras


def _split(state: TrainState) -> tuple[list[Any], Any]:
    return list(parts(state)), (state.step, state.key)


def _join(children: Iterable[Any], context: Any) -> TrainState:
    params, buffers, opt_state, extras = children
    step, key = context
    return TrainState(step, params, buffers, opt_state, key, extras)


def _split_consumed(state: ConsumedState) -> NoReturn:
    _refuse(state, "leaves")


tree.register(TrainState, ("params", "buffers", "opt_state", "extras"), _split, _join)
tree.register(ConsumedState, (), _split_consumed, _join)
