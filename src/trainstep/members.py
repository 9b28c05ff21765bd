"""Several states as one: every tensor gets a leading axis that counts members.

The members of a stacked state share ``step``; each has a key of its own. What is not a tensor (options
that a wrapped ``torch.optim`` class keeps, say) stays one value where members agree, and is kept as
``Members`` where they do not.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from attrs import define, field, frozen
from torch import Tensor

from trainstep import tree
from trainstep.rng import Key
from trainstep.state import TrainState

_PARTS = ("params", "buffers", "opt_state", "extras")


@frozen
class Keys:
    """The keys of a stacked state's members; static, as the key of a single state is.

    Attributes:
        bits: the bits of each member's key.
    """

    bits: tuple[int, ...]

    @property
    def members(self) -> tuple[Key, ...]:
        """One key per member."""
        return tuple(Key(bits) for bits in self.bits)

    def fold_in(self, *data: int) -> NoReturn:
        """Refuse: only a single state has a key to derive from."""
        self._refuse("fold_in")

    def split(self, n: int = 2) -> NoReturn:
        """Refuse: only a single state has a key to derive from."""
        self._refuse("split")

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(
            f"Key.{what}: this state is a stack of {len(self.bits)} members, and a step for one state was "
            "called with it. Call trainstep.vmap.ensemble(step) instead, or take the members out with "
            "trainstep.vmap.unstack(state)."
        )


@frozen
class Members:
    """A leaf of a stacked state that is no tensor and differs between members.

    Attributes:
        values: one value per member.
    """

    values: tuple[Any, ...]


def stack(states: Iterable[TrainState]) -> TrainState:
    """Make one state of several: tensors of shape ``s`` become tensors of shape ``(members, *s)``.

    Every tensor is copied. Strides within a member stay as they are.

    Raises:
        ValueError: if there is no state; if steps or structures differ; or naming the first leaf whose
            shape, dtype or device differs between members.
        TypeError: for a state that is a stack already.
    """
    members = list(states)
    if not members:
        raise ValueError("vmap.stack: expected at least one state, got none")
    if any(isinstance(member.key, Keys) for member in members):
        raise TypeError(
            "vmap.stack: one of the states is a stack already; stack its members instead"
        )
    return Split(len(members)).join(members)


def unstack(state: TrainState, *, copy: bool = True) -> list[TrainState]:
    """Return the members of a stacked state; the inverse of ``stack``.

    Args:
        state: what ``stack`` or an ensemble step returned.
        copy: copy the tensors; with False, members are views of the stack, and donating one of them
            writes to it.

    Raises:
        TypeError: if ``state`` is not a stack.
    """
    members = Split(len(keys_of("vmap.unstack", state))).members(state)
    return [tree.clone(member) for member in members] if copy else members


def keys_of(where: str, state: TrainState) -> tuple[Key, ...]:
    """Return the keys of a stacked state's members.

    Raises:
        TypeError: if ``state`` is not a stack.
    """
    if not isinstance(state, TrainState):
        raise TypeError(
            f"{where}: expected a stacked state, got a {type(state).__name__}; make one of several states: "
            "trainstep.vmap.stack(states)"
        )
    key: Any = state.key
    if not isinstance(key, Keys):
        raise TypeError(
            f"{where}: expected a stacked state, got one with a single key. Make one of several: "
            "trainstep.vmap.stack([step.init(model, seed=0), step.init(other, seed=1)])"
        )
    return key.members


@define(eq=False)
class Split:
    """Views of stacked tensors, one per member, and the way back that needs no copies.

    Attributes:
        count: how many members.
    """

    count: int
    # By id of a view: the stack, the place in it, and the view, which must live as long as its id counts.
    _origin: dict[int, tuple[Tensor, int, Tensor]] = field(factory=dict, init=False)

    def views(self, stacked: Any) -> list[Any]:
        """Return one tree per member; tensors are views, ``Members`` are opened, the rest is shared."""
        leaves, spec = tree.flatten(stacked)
        columns = [self._column(leaf) for leaf in leaves]
        return [tree.unflatten([c[i] for c in columns], spec) for i in range(self.count)]

    def members(self, state: TrainState) -> list[TrainState]:
        """Return one state per member, of views."""
        parts = self.views({name: getattr(state, name) for name in _PARTS})
        keys = keys_of("members", state)
        return [TrainState(step=state.step, key=k, **p) for k, p in zip(keys, parts, strict=True)]

    def stacked(self, trees: Sequence[Any]) -> Any:
        """Stack trees of equal structure; views of one stack give back that stack.

        Raises:
            ValueError: naming the leaves that some trees lack, or the first that cannot be stacked.
        """
        flat = [tree.flatten(t) for t in trees]
        spec = flat[0][1]
        for index, (_, other) in enumerate(flat):
            if other != spec:
                raise ValueError(_describe_structures(trees[0], trees[index], index))
        joined: list[Any] = []
        for place, column in enumerate(zip(*(leaves for leaves, _ in flat), strict=True)):
            whole = self._whole(column)
            if whole is None:
                problem = _mismatch(column)
                if problem:
                    path = tree.leaves_with_paths(trees[0])[place][0]
                    raise ValueError(f"vmap.stack: {path} differs between members: {problem}")
                whole = _stack_leaves(column)
            joined.append(whole)
        return tree.unflatten(joined, spec)

    def join(self, states: Sequence[TrainState]) -> TrainState:
        """Stack states; the inverse of ``members``."""
        steps = [state.step for state in states]
        if len(set(steps)) > 1:
            raise ValueError(f"vmap.stack: members must be at the same step, got steps {steps}")
        parts = self.stacked([{name: getattr(s, name) for name in _PARTS} for s in states])
        keys: Any = Keys(tuple(state.key.bits for state in states))
        return TrainState(step=steps[0], key=keys, **parts)

    def _column(self, leaf: Any) -> Sequence[Any]:
        if isinstance(leaf, Members):
            return leaf.values
        if not isinstance(leaf, Tensor):
            return [leaf] * self.count
        with torch.no_grad():
            # Not unbind: PyTorch refuses in-place kernels on what one call returned several of.
            views = [leaf.select(0, i) for i in range(self.count)]
        self._origin |= {id(view): (leaf, i, view) for i, view in enumerate(views)}
        return views

    def _whole(self, column: tuple[Any, ...]) -> Tensor | None:
        """Return the stack that these leaves are all the views of, in order; None if they are not."""
        origin = self._origin.get(id(column[0]))
        if origin is None:
            return None
        for place, leaf in enumerate(column):
            found = self._origin.get(id(leaf))
            if found is None or found[0] is not origin[0] or found[1] != place:
                return None
        return origin[0]


def _stack_leaves(column: tuple[Any, ...]) -> Any:
    first = column[0]
    if isinstance(first, Tensor):
        return _stack_tensors(column)
    return first if all(_same(first, other) for other in column) else Members(column)


def _stack_tensors(tensors: tuple[Tensor, ...]) -> Tensor:
    """Stack tensors, keeping the strides of the first within each member."""
    first = torch.empty_like(tensors[0], memory_format=torch.preserve_format)
    if first.is_contiguous():
        return torch.stack([t.detach() for t in tensors])
    shape, strides = (len(tensors), *first.shape), (first.numel(), *first.stride())
    out = torch.empty_strided(shape, strides, dtype=first.dtype, device=first.device)
    for place, tensor in zip(out, tensors, strict=True):
        place.copy_(tensor.detach())
    return out


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and bool(a == b))


def _mismatch(column: tuple[Any, ...]) -> str:
    """Say why leaves cannot be stacked; empty if they can."""
    if not any(isinstance(leaf, Tensor) for leaf in column):
        return ""
    forms = [_form(leaf) for leaf in column]
    for index, form in enumerate(forms):
        if form != forms[0]:
            return f"{forms[0]} in member 0, {form} in {index}"
    return ""


def _form(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    return f"{leaf.dtype} {tuple(leaf.shape)} on {leaf.device}"


def _describe_structures(a: Any, b: Any, index: int) -> str:
    left = [path for path, _ in tree.leaves_with_paths(a)]
    right = [path for path, _ in tree.leaves_with_paths(b)]
    only = [f"only in member 0: {path}" for path in left if path not in right]
    only += [f"only in member {index}: {path}" for path in right if path not in left]
    what = "\n  ".join(only[:8]) or "the same leaves in another order or in other containers"
    return f"vmap.stack: members 0 and {index} differ in structure:\n  {what}"
