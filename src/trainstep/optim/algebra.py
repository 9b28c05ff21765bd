"""Optimizers made of optimizers: different rules for different parameters."""

import re
from collections.abc import Callable, Mapping

from trainstep.optim.base import Optimizer
from trainstep.types import Grads, Hyper, OptState, Params

Labels = Callable[[str], str] | Mapping[str, str]
"""Parameter name -> label: a function, or a mapping from regular expressions (first match wins)."""


def partition(labels: Labels, optimizers: Mapping[str, Optimizer]) -> Optimizer:
    """Give each group of parameters its own optimizer.

    Args:
        labels: a function from a parameter's name to its label, or a mapping from regular expressions
            (``re.search``; the first that matches wins) to labels.
        optimizers: the optimizer of each label.

    Returns:
        An ``Optimizer`` whose state maps labels to states. Hyperparameters given to ``apply``, such as
        the schedule's learning rate, go to every group that has them; those that only one
        optimizer was built with (weight decay, say) stay its own.

    Raises:
        ValueError: from ``init``, for a parameter whose label has no optimizer.
    """
    label_of = _labeller(labels, optimizers)

    def split(names: Params | Grads) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {label: [] for label in optimizers}
        for name in names:
            groups[label_of(name)].append(name)
        return groups

    def init(params: Params) -> OptState:
        return {
            label: optimizers[label].init({n: params[n] for n in names})
            for label, names in split(params).items()
        }

    def kernel(params: Params, grads: Grads, state: OptState, hyper: Hyper) -> None:
        for label, names in split(grads).items():
            if names:
                optimizer = optimizers[label]
                own = {k: v for k, v in hyper.items() if k in optimizer.accepts}
                optimizer.kernel(
                    {n: params[n] for n in names},
                    {n: grads[n] for n in names},
                    state[label],
                    {**optimizer.hyper, **own},
                )

    accepts = frozenset().union(*(optimizer.accepts for optimizer in optimizers.values()))
    return Optimizer("partition", init, kernel, accepts=accepts)


def _labeller(labels: Labels, optimizers: Mapping[str, Optimizer]) -> Callable[[str], str]:
    cache: dict[str, str] = {}
    patterns = (
        [(re.compile(pattern), label) for pattern, label in labels.items()]
        if isinstance(labels, Mapping)
        else []
    )

    def find(name: str) -> str:
        if callable(labels):
            label = labels(name)
        else:
            label = next((lab for pattern, lab in patterns if pattern.search(name)), "")
            if not label:
                raise ValueError(
                    f"optim.partition: no pattern matches parameter {name}; patterns: "
                    f'{", ".join(labels)}. Add a last one, ".*".'
                )
        if label not in optimizers:
            raise ValueError(
                f"optim.partition: parameter {name} has label {label!r}, which has no optimizer; "
                f"labels: {', '.join(map(repr, optimizers))}"
            )
        return label

    def label_of(name: str) -> str:
        if name not in cache:
            cache[name] = find(name)
        return cache[name]

    return label_of
