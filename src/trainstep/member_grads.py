"""Gradients of all members of an ensemble at once.

The forward pass runs under ``torch.func.vmap`` over stacked parameters and buffers; the backward pass is
PyTorch's own, over the graph of the batched operations. ``torch.func.grad`` inside of ``vmap`` would
compute the same, but gives zeros to parameters that the loss does not reach, where a single step leaves
them alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from attrs import define, field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainstep import rng, tree
from trainstep.grads import Order
from trainstep.losses import Loss
from trainstep.member_batches import InAxes, leaf_axes
from trainstep.members import Split
from trainstep.rng import Key
from trainstep.sums import Sums, add_in_tree
from trainstep.types import Buffers, Grads, LossFn, Params

Randomness = Literal["different", "same", "error"]
"""What random operations do under ``torch.func.vmap``."""

_NO_HOOKS = (
    "ensemble: gradient checkpointing and other saved-tensor hooks do not work under torch.func.vmap, "
    "because they run after it ended. Use ensemble(step, exact=True), which runs the members one by one."
)
_NO_GRADIENT = (
    "ensemble: the loss does not depend on any trainable parameter; check that it is computed from the "
    "output of call(...), not of the module itself, and that nothing cuts the graph"
)
_NOTE = (
    "{where}: this was raised under torch.func.vmap. Modules whose operations have no batching rule (GRU "
    "and LSTM, say), whose control flow depends on data, that use gradient checkpointing, or whose "
    "autograd.Function has no setup_context cannot run there. {instead}"
)


@define(eq=False)
class MemberGradients:
    """Sums over micro-batches of all members' losses and gradients, stacked.

    Attributes:
        loss_fn: the pure loss of one member.
        params: stacked parameters.
        buffers: stacked buffers; replaced as micro-batches change them.
        keys: the key of each member's step.
        split: takes the members' parts; what it gave out it stacks again without a copy.
        in_axes: which axis of a batch counts members.
        randomness: ``"different"`` or ``"same"`` draws for members, or ``"error"``.
        scale: the loss scale of each member, shape (members,); None for 1.
    """

    loss_fn: LossFn
    params: Params
    buffers: Buffers
    keys: Sequence[Key]
    split: Split
    in_axes: InAxes = None
    randomness: Randomness = "different"
    scale: Tensor | None = None
    _leaves: Params = field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self._leaves = {n: p.detach().requires_grad_() for n, p in self.params.items()}

    def run(self, microbatches: Iterable[Any], order: Order) -> list[tuple[Loss, Grads]]:
        """Return loss and gradients of every member, as ``trainstep.accumulate`` does for one.

        Raises:
            ValueError: if there is no micro-batch, or the loss depends on no parameter.
        """
        total: Sums | None = None
        if order == "tree":
            batches = list(microbatches)
            if batches:
                total = add_in_tree(range(len(batches)), lambda i: self._sums(batches[i], i, 1.0))
        else:
            for index, batch in enumerate(microbatches):
                part = self._sums(batch, index, None if total is None else total.unit)
                total = part if total is None else total.add_(part)
        if total is None:
            raise ValueError("ensemble: no micro-batches; the batch is empty")
        return [sums.mean() for sums in self._members_of(total)]

    def _sums(self, batch: Any, index: int, unit: float | None) -> Sums:
        """Run one micro-batch forward and backward; ``unit`` None takes the weight of this one."""
        key = member_key(self.keys, self.randomness).fold_in(index)
        devices = {p.device for p in self._leaves.values()}
        with rng.seeded(key, devices):
            out, factor, weight = self._forward(batch, key, devices)
            values = out["value"]
            if not values.requires_grad:
                raise ValueError(_NO_GRADIENT)
            unit = factor if unit is None else unit
            if factor != unit:
                values = values * (factor / unit)
            scaled = values if self.scale is None else values * self.scale.to(values.device)
            scaled.backward(torch.ones_like(scaled), inputs=list(self._leaves.values()))
        grads = self._take_grads()
        if not grads:
            raise ValueError(_NO_GRADIENT)
        weight = out.get("weight", weight)
        self.buffers = {**self.buffers, **out["buffers"]}
        return Sums(
            grads,
            values.detach(),
            weight if unit == 1 else weight / unit,
            self.buffers,
            out["aux"],
            unit,
            self.scale,
        )

    def _forward(
        self, batch: Any, key: Key, devices: set[torch.device]
    ) -> tuple[dict[str, Any], float, Any]:
        """Return stacked outputs, the factor of the loss's root, and its weight if that is a number."""
        leaves, spec = tree.flatten(batch)
        axes = leaf_axes(batch, self.in_axes, len(self.keys))
        moving = [i for i, axis in enumerate(axes) if axis is not None]
        host: list[tuple[float, Any]] = []

        def one(params: Params, buffers: Buffers, given: list[Tensor]) -> dict[str, Any]:
            mine = list(leaves)
            for place, tensor in zip(moving, given, strict=True):
                mine[place] = tensor
            loss = self.loss_fn(params, buffers, tree.unflatten(mine, spec), key)
            value, factor = loss.root
            host.append((factor, loss.weight))
            after = loss.buffers or {}
            out = {"value": value, "aux": loss.aux, "buffers": _changed(after, buffers)}
            return out | ({"weight": loss.weight} if isinstance(loss.weight, Tensor) else {})

        dims = (0, 0, [axes[i] for i in moving])
        vectorized = torch.func.vmap(one, in_dims=dims, randomness=self.randomness)
        instead = "Use ensemble(step, exact=True), which runs the members one by one."
        with explained("ensemble", instead), vectorizable_attention(devices), _without_hooks():
            out = vectorized(self._leaves, self.buffers, [leaves[i] for i in moving])
        detached = {k: tree.map(torch.Tensor.detach, v) for k, v in out.items() if k != "value"}
        factor, weight = host[0]
        return {"value": out["value"], **detached}, factor, weight

    def _take_grads(self) -> Grads:
        grads: Grads = {}
        for name, leaf in self._leaves.items():
            if leaf.grad is not None:
                grads[name] = leaf.grad
                leaf.grad = None
        return grads

    def _members_of(self, total: Sums) -> Iterator[Sums]:
        stacked = {"total": total.total, "aux": total.aux, "scale": total.scale}
        stacked |= {"grads": total.grads, "buffers": total.buffers, "weight": total.weight}
        for own in self.split.views(stacked):
            yield Sums(**own, unit=total.unit)


def member_key(keys: Sequence[Key], randomness: Randomness) -> Key:
    """Return the key that seeds a vectorized computation for members with these keys.

    A function of all of them; with ``"same"`` draws, the first member's key.
    """
    first, *rest = keys
    return first if randomness == "same" else first.fold_in(*(key.bits for key in rest))


def check_randomness(where: str, randomness: str) -> None:
    """Raise ValueError unless ``randomness`` is one that ``torch.func.vmap`` knows."""
    if randomness not in ("different", "same", "error"):
        raise ValueError(
            f'{where}: randomness must be "different", "same" or "error"; got {randomness!r}'
        )


@contextmanager
def explained(where: str, instead: str) -> Iterator[None]:
    """Add to errors that they were raised under ``vmap``, and what to do ``instead``."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        error.add_note(_NOTE.format(where=where, instead=instead))
        raise


def vectorizable_attention(devices: set[torch.device]) -> AbstractContextManager[None]:
    """Keep ``scaled_dot_product_attention`` to what ``vmap`` can run below an outer backward pass.

    That is FlashAttention on CUDA in half precision, and plain matrix products. The CPU's flash kernel
    has no batching rule, so vmap would run it once per member and warn; CUDA's memory-efficient kernel
    has one that fails in the backward pass (PyTorch 2.11).
    """
    if any(device.type == "cuda" for device in devices):
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    return sdpa_kernel(SDPBackend.MATH)


def _without_hooks() -> AbstractContextManager[None]:
    disable: Callable[[str], AbstractContextManager[None]]
    disable = torch.autograd.graph.disable_saved_tensors_hooks
    return disable(_NO_HOOKS)


def _changed(after: Buffers, before: Buffers) -> Buffers:
    return {name: buffer for name, buffer in after.items() if buffer is not before.get(name)}
