"""Losses as sums with weights, divided once, after everything was added up."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from numbers import Number
from typing import Any

import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn

from trainstep import rng, tree
from trainstep.model import Functional
from trainstep.rng import Key
from trainstep.types import Buffers, Params


def _as_tensors(aux: Mapping[str, Any]) -> dict[str, Tensor]:
    if not aux or all(isinstance(value, Tensor) for value in aux.values()):
        return dict(aux)
    for name, value in aux.items():
        if not isinstance(value, Tensor | Number):
            raise TypeError(
                f"Loss: aux[{name!r}] must be a tensor or a number, got {type(value).__name__}"
            )
    wide = {
        name: torch.float64 if isinstance(value, float) else None for name, value in aux.items()
    }
    return {name: torch.as_tensor(value, dtype=wide[name]) for name, value in aux.items()}


@frozen(eq=False, init=False)
class Loss:
    """A loss that can be added to others: its value is ``total / weight``.

    Attributes:
        total: sum of the loss over the items of the batch; zero-dimensional, differentiable.
        weight: how many items (samples, tokens) were summed; a number or a zero-dimensional tensor.
        buffers: module buffers after the forward pass; None means unchanged.
        aux: further sums over the same items, by name, tensors or numbers; reported divided by the
            weight, so a name may not be that of another metric.
    """

    _total: Tensor | None
    weight: Tensor | float = 1
    buffers: Buffers | None = None
    aux: dict[str, Tensor] = field(factory=dict)
    _mean: Tensor | None = field(default=None, repr=False, kw_only=True)

    def __init__(
        self,
        total: Tensor | None,
        weight: Tensor | float = 1,
        buffers: Buffers | None = None,
        aux: Mapping[str, Any] | None = None,
        *,
        mean: Tensor | None = None,
    ) -> None:
        # Written out, because torch.compile cannot trace how attrs fills a frozen record.
        object.__setattr__(self, "_total", total)
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "buffers", buffers)
        object.__setattr__(self, "aux", _as_tensors(aux or {}))
        object.__setattr__(self, "_mean", mean)

    @classmethod
    def from_mean(cls, mean: Tensor, items: float, **fields: Any) -> "Loss":
        """Make a loss from a mean over ``items`` items; alone, it is used without any rescaling."""
        return cls(None, items, **fields, mean=mean)

    @property
    def total(self) -> Tensor:
        """The sum of the loss over the items; of a loss made from a mean, computed when it is asked for."""
        if self._total is not None:
            return self._total
        if self._mean is None:
            raise TypeError("Loss: total must be a zero-dimensional tensor, got None")
        return self._mean * self.weight

    @property
    def value(self) -> Tensor:
        """The mean loss, ``total / weight``."""
        if self._mean is not None:
            return self._mean
        if not isinstance(self.weight, Tensor) and self.weight == 1:
            return self.total
        return self.total / self.weight

    @property
    def root(self) -> tuple[Tensor, float]:
        """The tensor to differentiate, and the factor that turns it into ``total``."""
        if self._mean is None:
            return self.total, 1.0
        return self._mean, float(self.weight)


@frozen(eq=False)
class ModuleLoss:
    """A pure loss function over a module; see ``module_loss``.

    Attributes:
        apply: the module as a pure function.
        fn: what ``module_loss`` was given.
        compiled: ``fn`` with the module, as one function of the batch; None runs ``fn`` itself.
    """

    apply: Functional
    fn: Callable[[Callable[..., Any], Any], Tensor | Loss]
    compiled: Callable[[Any], Tensor | Loss] | None = None

    def __call__(
        self,
        params: Params,
        buffers: Buffers,
        batch: Any,
        key: Key,
        *,
        train: bool = True,
        donate_buffers: bool = False,
    ) -> Loss:
        """Return the loss of ``batch``; randomness in the module is a function of ``key``."""
        current = buffers

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal current
            output, current = self.apply(
                params, current, *args, train=train, donate_buffers=donate_buffers, **kwargs
            )
            return output

        with rng.seeded(key, {p.device for p in params.values()}):
            if self.compiled is None:
                result = self.fn(call, batch)
            else:
                whole = partial(self.compiled, batch)
                result, current = self.apply.run(
                    whole, params, buffers, train=train, donate_buffers=donate_buffers
                )
        return _as_loss(result, batch, current)


def module_loss(
    module: nn.Module, fn: Callable[[Callable[..., Any], Any], Tensor | Loss]
) -> ModuleLoss:
    """Make a pure loss function ``loss_fn(params, buffers, batch, key) -> Loss`` from a module.

    Args:
        module: the model; it stays as it is.
        fn: ``fn(call, batch)`` computes the loss, running the module through ``call(...)`` as often
            as it likes. It returns a scalar, taken as the mean over the batch's leading axis, or a
            ``Loss``.

    Returns:
        The loss function. It accepts ``train=False`` for evaluation.
    """
    return ModuleLoss(Functional(module), fn)


def check_aux(where: str, aux: Mapping[str, Tensor], taken: Collection[str]) -> None:
    """Raise ValueError if a name of ``aux`` is that of a metric which ``where`` reports itself."""
    both = [name for name in aux if name in taken]
    if both:
        raise ValueError(
            f"{where}: the loss's aux has {', '.join(both)}, which {where} reports itself; give it another "
            f"name than {', '.join(taken)}"
        )


def _as_loss(result: Any, batch: Any, buffers: Buffers) -> Loss:
    if isinstance(result, Loss):
        loss = result if result.buffers is not None else evolve(result, buffers=buffers)
        if loss.root[0].ndim:
            raise ValueError(_not_scalar(loss.root[0]))
        return loss
    if not isinstance(result, Tensor):
        raise TypeError(
            "module_loss: the loss must be a zero-dimensional tensor or a trainstep.Loss, got "
            f"{type(result).__name__}. If the model returns a record, pick its loss: "
            'lambda call, batch: call(**batch)["loss"].'
        )
    if result.ndim:
        raise ValueError(_not_scalar(result))
    return Loss.from_mean(result, max(tree.batch_size(batch), 1), buffers=buffers)


def _not_scalar(tensor: Tensor) -> str:
    return (
        f"module_loss: the loss must be zero-dimensional, got shape {tuple(tensor.shape)}. "
        "Reduce it with .mean(), or return trainstep.Loss(total=loss.sum(), weight=count)."
    )
