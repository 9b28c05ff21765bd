"""Optimizers made of optimizers: different rules for different parameters."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from trainstep.optim.base import Optimizer
from trainstep.optim.labels import Labels, Where, check_used, labeller, selector, within
from trainstep.types import Grads, Hyper, OptState, Params


def partition(labels: Labels, optimizers: Mapping[str, Optimizer]) -> Optimizer:
    """Give each group of parameters its own optimizer.

    Args:
        labels: parameter -> label: a function of the name, or of the name and the tensor; a mapping from
            full names or regular expressions; or a nested dict of labels. See ``labels.Labels``.
        optimizers: the optimizer of each label.

    Returns:
        An ``Optimizer`` whose state maps labels to states. Hyperparameters given to ``apply``, such as
        the schedule's learning rate, go to every group that has them; ``{"label/lr": 3e-4}`` goes to
        one group and wins. What is not given stays what each optimizer was built with.

    Raises:
        ValueError: from ``init``, for a parameter that has no label or whose label has no optimizer, and
            for a full name that no parameter has. A label may have no parameters.
    """
    label_of = _checked(labeller("partition", labels), optimizers)

    def init(params: Params) -> OptState:
        groups = split(params, params, label_of, optimizers)
        check_used("partition", labels, params)
        return {
            label: init_subset(optimizers[label], params, names) for label, names in groups.items()
        }

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        for label, names in split(grads, params, label_of, optimizers).items():
            own = hyper_of(optimizers[label], hyper, label)
            update_subset(optimizers[label], names, params, grads, state[label], own)

    accepts = frozenset(
        name
        for label, optimizer in optimizers.items()
        for known in optimizer.accepts
        for name in (known, f"{label}/{known}")
    )
    capturable = all(optimizer.capturable for optimizer in optimizers.values())
    return Optimizer("partition", init, kernel, accepts=accepts, capturable=capturable)


def masked(optimizer: Optimizer, where: Where) -> Optimizer:
    """Update only the parameters that ``where`` selects; the others are frozen and keep no state.

    Args:
        optimizer: for the selected parameters; its hyperparameters are those of the result.
        where: a function of a parameter's name (or of its name and the tensor), a regular expression, a
            collection of full names, or a mapping to bools as ``partition`` takes to labels.

    Raises:
        ValueError: from ``init``, for a name or pattern that no parameter matches.
    """
    selected = selector("masked", where)

    def init(params: Params) -> OptState:
        check_used("masked", where, params)
        return init_subset(optimizer, params, [n for n, p in params.items() if selected(n, p)])

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        names = [n for n in grads if selected(n, params[n])]
        update_subset(optimizer, names, params, grads, state, hyper)

    name = f"masked({optimizer.name})"
    capturable = optimizer.capturable
    return Optimizer(name, init, kernel, optimizer.hyper, optimizer.accepts, capturable=capturable)


def freeze() -> Optimizer:
    """Return the optimizer that changes nothing and keeps nothing: for a frozen group in a ``partition``.

    It takes a learning rate, so that it can stand wherever an optimizer does, and ignores it.
    """

    def init(params: Params) -> OptState:
        return {}

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        return None

    return Optimizer("freeze", init, kernel, accepts=frozenset({"lr"}), capturable=True)


def split(
    names: Iterable[str],
    params: Params,
    label_of: Callable[[str, Tensor], Any],
    labels: Iterable[Any] = (),
) -> dict[Any, list[str]]:
    """Group parameter names by label: those of ``labels`` first and even if empty, then as they come."""
    groups: dict[Any, list[str]] = {label: [] for label in labels}
    for name in names:
        groups.setdefault(label_of(name, params[name]), []).append(name)
    return groups


def init_subset(optimizer: Optimizer, params: Params, names: list[str]) -> OptState:
    """Return the optimizer's state for some parameters; empty for none, which some classes refuse."""
    if not names:
        return {}
    with within(params):
        return optimizer.init({n: params[n] for n in names})


def update_subset(
    optimizer: Optimizer,
    names: list[str],
    params: Params,
    grads: Grads,
    state: OptState,
    hyper: Hyper,
) -> None:
    """Run an optimizer's kernel on some parameters; not at all on none, so that nothing counts."""
    if names:
        optimizer.kernel({n: params[n] for n in names}, {n: grads[n] for n in names}, state, hyper)


def hyper_of(optimizer: Optimizer, hyper: Hyper, label: str | None = None) -> dict[str, Any]:
    """Return a part's defaults with what of ``hyper`` is for it: names it accepts, ``label/name`` last."""
    own = {**optimizer.hyper, **{k: v for k, v in hyper.items() if k in optimizer.accepts}}
    if label is not None:
        prefix = f"{label}/"
        own |= {k.removeprefix(prefix): v for k, v in hyper.items() if k.startswith(prefix)}
    return own


def _checked(
    label_of: Callable[[str, Tensor], Any], optimizers: Mapping[str, Optimizer]
) -> Callable[[str, Tensor], str]:
    # Looking labels up costs more than a small model's update, and they only depend on name and shape.
    cache: dict[tuple[str, tuple[int, ...]], str] = {}

    def checked(name: str, param: Tensor) -> str:
        key = (name, tuple(param.shape))
        if key not in cache:
            label = label_of(name, param)
            if label not in optimizers:
                raise ValueError(
                    f"optim.partition: parameter {name} has label {label!r}, which has no optimizer; "
                    f"labels: {', '.join(map(repr, optimizers))}"
                )
            cache[key] = label
        return cache[key]

    return checked
