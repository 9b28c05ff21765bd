"""``make_step``: one training step as a function, ``state, metrics = step(state, batch)``."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from attrs import field, frozen
from torch import Tensor, nn

from trainstep import guards, tree
from trainstep.grads import accumulate
from trainstep.losses import Loss
from trainstep.model import Functional
from trainstep.optim.base import Optimizer
from trainstep.rng import Key
from trainstep.rng import key as make_key
from trainstep.state import TrainState, consume
from trainstep.transforms import Context, Transform
from trainstep.types import Grads, LossFn, Metrics, Params, Schedule

OnNonfinite = Literal["ignore", "skip", "raise"]

# Branches of a step's key, so that transforms never draw what the loss drew.
_LOSS, _TRANSFORMS, _EVAL = 0, 1, 2


@frozen(eq=False)
class Step:
    """A pure training step; what ``make_step`` returns."""

    loss_fn: LossFn
    optimizer: Optimizer
    schedule: Schedule | None = None
    transforms: tuple[Transform, ...] = ()
    microbatches: int | Literal["iter"] = 1
    on_nonfinite: OnNonfinite = "ignore"
    donates: bool = field(default=False, kw_only=True)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Return the state after one update, and metrics that stay on the device."""
        batches = split_batch(batch, self.microbatches)
        loss, grads = accumulate(
            self.loss_fn,
            state.params,
            state.buffers,
            batches,
            self.loss_key(state),
            donate_buffers=self.donates and self.on_nonfinite != "skip",
        )
        return self.update(state, loss, grads)

    def loss_key(self, state: TrainState) -> Key:
        """Return the key of this step's loss; micro-batch ``i`` uses its ``fold_in(i)``."""
        return state.key.fold_in(state.step, _LOSS)

    def update(self, state: TrainState, loss: Loss, grads: Grads) -> tuple[TrainState, Metrics]:
        """Finish a step whose gradients are known: transforms, optimizer, guards, metrics."""
        hyper = {} if self.schedule is None else {"lr": self.schedule(state.step)}
        context = Context(state.step, state.key.fold_in(state.step, _TRANSFORMS), owned=True)
        norm = context.global_norm(grads)
        if self.on_nonfinite == "raise":
            guards.require_finite(state.step, loss, norm)
        grads, extras = self._transform(state, grads, context)
        in_place = self.donates and self.on_nonfinite != "skip"
        params, opt_state = self.optimizer.apply(
            state.params, grads, state.opt_state, hyper, donate=in_place
        )
        buffers = state.buffers if loss.buffers is None else loss.buffers
        result = TrainState(state.step + 1, params, buffers, opt_state, state.key, extras)
        if self.on_nonfinite == "skip":
            ok = guards.finite(loss, norm)
            result = guards.skip_unless(ok, result, state, in_place=self.donates)
        if self.donates:
            consume(state)
        return result, self._metrics(loss, norm, hyper)

    def _transform(
        self, state: TrainState, grads: Grads, context: Context
    ) -> tuple[Grads, dict[str, Any]]:
        if not self.transforms:
            return grads, state.extras
        kept = state.extras.get("transforms") or self.init_transforms(state.params)
        after = []
        for transform, memory in zip(self.transforms, kept, strict=True):
            grads, memory = transform.update(grads, memory, state.params, context)
            after.append(memory)
        return grads, {**state.extras, "transforms": tuple(after)}

    def init(self, model: nn.Module | Params, seed: int = 0, *, copy: bool = True) -> TrainState:
        """Return the state at step 0, with everything that this step keeps; see ``init``."""
        state = init(model, self.optimizer, seed, copy=copy)
        extras: dict[str, Any] = {}
        if self.transforms:
            extras["transforms"] = self.init_transforms(state.params)
        if self.on_nonfinite == "skip":
            extras["skipped"] = torch.zeros((), dtype=torch.int64)
        return state.evolve(extras=extras)

    def init_transforms(self, params: Params) -> tuple[Any, ...]:
        """Return the initial states of the transforms, in their order."""
        return tuple(transform.init(params) for transform in self.transforms)

    def _metrics(self, loss: Loss, norm: Tensor, hyper: dict[str, float]) -> Metrics:
        metrics = {"loss": loss.value, "grad_norm": norm, "weight": torch.as_tensor(loss.weight)}
        lr = hyper.get("lr", self.optimizer.hyper.get("lr"))
        if lr is not None:
            metrics["lr"] = torch.as_tensor(lr, dtype=torch.float64)
        return metrics | {name: extra / loss.weight for name, extra in loss.aux.items()}


def make_step(
    loss_fn: LossFn,
    optimizer: Optimizer,
    schedule: Schedule | None = None,
    transforms: Sequence[Transform] = (),
    microbatches: int | Literal["iter"] = 1,
    on_nonfinite: OnNonfinite = "ignore",
) -> Step:
    """Compose a pure training step, ``state, metrics = step(state, batch)``.

    Args:
        loss_fn: ``loss_fn(params, buffers, batch, key) -> Loss``; see ``module_loss``.
        optimizer: see ``trainstep.optim``.
        schedule: step -> learning rate; None uses the optimizer's own.
        transforms: applied to the gradients in order, between the loss and the optimizer.
        microbatches: how many parts of (nearly) equal size the leading axis of every tensor in the
            batch is split into; ``"iter"`` takes the batch as an iterable of micro-batches.
        on_nonfinite: what happens if loss or gradient norm is not finite: ``"ignore"`` updates all
            the same, ``"skip"`` keeps parameters, buffers and moments and counts it in
            ``extras["skipped"]`` without a host sync, ``"raise"`` (which syncs) raises
            FloatingPointError and leaves the state as it was.

    Returns:
        The step. Its metrics are ``loss`` (mean), ``grad_norm`` (before transforms), ``weight`` (items
        in the batch), ``lr``, and the loss's ``aux`` divided by the weight.

    Raises:
        ValueError: for choices that do not exist; from the step, for a batch that cannot be split.
    """
    if not (microbatches == "iter" or (isinstance(microbatches, int) and microbatches >= 1)):
        raise ValueError(
            f'make_step: microbatches must be an int of at least 1, or "iter"; got {microbatches!r}'
        )
    if on_nonfinite not in ("ignore", "skip", "raise"):
        raise ValueError(
            f'make_step: on_nonfinite must be "ignore", "skip" or "raise"; got {on_nonfinite!r}'
        )
    return Step(loss_fn, optimizer, schedule, tuple(transforms), microbatches, on_nonfinite)


def make_eval_step(loss_fn: LossFn) -> Callable[[TrainState, Any], Metrics]:
    """Make ``evaluate(state, batch) -> metrics``: the loss in evaluation mode, without gradients.

    A loss function that takes ``train`` (as those of ``module_loss`` do) is called with False.
    Metrics are ``loss``, ``weight`` and the loss's ``aux`` divided by the weight.
    """
    takes_train = "train" in inspect.signature(loss_fn).parameters
    options: dict[str, Any] = {"train": False} if takes_train else {}

    def evaluate(state: TrainState, batch: Any) -> Metrics:
        with torch.no_grad():
            loss = loss_fn(state.params, state.buffers, batch, state.key.fold_in(_EVAL), **options)
        metrics = {"loss": loss.value, "weight": torch.as_tensor(loss.weight)}
        return metrics | {name: extra / loss.weight for name, extra in loss.aux.items()}

    return evaluate


def init(
    model: nn.Module | Params, optimizer: Optimizer, seed: int = 0, *, copy: bool = True
) -> TrainState:
    """Return the state at step 0.

    Args:
        model: a module, or a dict of tensors to train.
        optimizer: the one that the step will use.
        seed: root of all randomness in training; the parameters are taken as they are.
        copy: copy the tensors; with False the state shares them with the module.

    Raises:
        ValueError: if there is nothing to train.
    """
    if isinstance(model, nn.Module):
        call = Functional(model)
        params, buffers = call.params(copy=copy), call.buffers(copy=copy)
    else:
        params = {n: p.detach().clone() if copy else p.detach() for n, p in model.items()}
        buffers = {}
    if not params:
        raise ValueError("init: the model has no parameter with requires_grad=True to train")
    return TrainState(0, params, buffers, optimizer.init(params), make_key(seed))


def split_batch(batch: Any, n: int | Literal["iter"]) -> Iterable[Any]:
    """Split a batch into micro-batches: views along the leading axis of every tensor.

    The first parts are one longer where ``n`` does not divide the length. Leaves without a leading
    axis go to every part.

    Raises:
        ValueError: if leading axes differ, or are shorter than ``n``.
    """
    if n == "iter":
        return batch
    if n == 1:
        return [batch]
    leaves, spec = tree.flatten(batch)
    sizes = {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim}
    if len(sizes) != 1 or min(sizes) < n:
        shapes = ", ".join(
            f"{path}: {tuple(leaf.shape)}"
            for path, leaf in tree.leaves_with_paths(batch)
            if isinstance(leaf, Tensor)
        )
        raise ValueError(
            f"make_step(microbatches={n}): every tensor of the batch needs the same leading axis, "
            f"at least {n} long; got {shapes or 'no tensors'}"
        )
    parts = [
        leaf.tensor_split(n) if isinstance(leaf, Tensor) and leaf.ndim else [leaf] * n
        for leaf in leaves
    ]
    return [tree.unflatten(part, spec) for part in zip(*parts, strict=True)]
