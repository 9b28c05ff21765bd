"""``from_torch``: any optimizer class, as a pure function, with the bits of the class."""

from typing import Any

import pytest
import torch
from torch import Tensor

import trainstep as ts
from support.reference import SHAPES, assert_equal_bits, make_grads, make_params
from support.snapshots import untouched

CLASSES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}),
    "SGD-plain": (torch.optim.SGD, {"lr": 0.1}),
    "Adam": (torch.optim.Adam, {}),
    "Adam-amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {}),
    "AdamW-fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW-foreach": (torch.optim.AdamW, {"foreach": True}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {}),
    "Adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.5, "lr_decay": 0.1}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Adamax": (torch.optim.Adamax, {}),
    "RMSprop": (torch.optim.RMSprop, {"momentum": 0.5, "centered": True}),
    "Rprop": (torch.optim.Rprop, {}),
    "ASGD": (torch.optim.ASGD, {"t0": 3.0}),
    "Adafactor": (torch.optim.Adafactor, {}),
    "Muon": (torch.optim.Muon, {}),
}
KNOWN = {name.split("-")[0] for name in CLASSES} | {"LBFGS", "SparseAdam", "Optimizer"}


def start(name: str) -> dict[str, Tensor]:
    params = make_params()
    return {n: p for n, p in params.items() if p.ndim == 2} if name == "Muon" else params


def wrapped(name: str) -> ts.Optimizer:
    cls, options = CLASSES[name]
    return ts.optim.from_torch(cls, **options)


@pytest.mark.parametrize("donate", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_bits_of_the_class(name: str, donate: bool) -> None:
    cls, options = CLASSES[name]
    assert_equal_bits(wrapped(name), lambda p: cls(p, **options), params=start(name), donate=donate)


@pytest.mark.parametrize("name", [n for n in CLASSES if n != "Muon"])
def test_bits_of_the_class_with_a_schedule_and_missing_gradients(name: str) -> None:
    cls, options = CLASSES[name]
    assert_equal_bits(
        wrapped(name), lambda p: cls(p, **options), rates=lambda i: 0.1 / (i + 1), missing=True
    )


def test_every_class_of_torch_is_covered() -> None:
    classes = {
        name
        for name, cls in vars(torch.optim).items()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    }
    assert classes <= KNOWN, "new in PyTorch: add them to CLASSES"


@pytest.mark.parametrize("name", CLASSES)
def test_apply_is_pure_and_the_state_has_its_shape_from_the_start(name: str) -> None:
    optimizer, params = wrapped(name), start(name)
    state = optimizer.init(params)
    grads = {n: g for n, g in make_grads(make_params(), 0).items() if n in params}
    with untouched(params, grads, state):
        first = optimizer.apply(params, grads, state)
        second = optimizer.apply(params, grads, state)
    assert ts.equal(first, second)
    shapes = [
        [(path, getattr(leaf, "shape", None)) for path, leaf in ts.tree.leaves_with_paths(s)]
        for s in (state, first[1])
    ]
    assert shapes[0] == shapes[1]


def test_a_function_that_makes_an_optimizer() -> None:
    def factory(params: Any, decay: float = 0.0) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=0.1, weight_decay=decay)

    optimizer = ts.optim.from_torch(factory, decay=0.3)
    assert optimizer.name == "from_torch(factory)"
    assert optimizer.hyper == {"lr": 0.1}
    assert_equal_bits(optimizer, lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.3))


def test_an_integer_learning_rate_can_still_be_scheduled() -> None:
    optimizer = ts.optim.from_torch(torch.optim.SGD, lr=1)
    assert_equal_bits(optimizer, lambda p: torch.optim.SGD(p, lr=1), rates=lambda i: 0.5**i)


def test_other_floats_can_be_overridden() -> None:
    optimizer, params = (
        ts.optim.from_torch(torch.optim.SGD, lr=0.1, weight_decay=0.5),
        make_params(),
    )
    grads, state = make_grads(params, 0), optimizer.init(params)
    assert optimizer.accepts == {"lr", "momentum", "dampening", "weight_decay"}
    ours, _ = optimizer.apply(params, grads, state, {"weight_decay": 0.0})
    plain = ts.optim.sgd(lr=0.1)
    assert ts.equal(ours, plain.apply(params, grads, plain.init(params))[0])
    with pytest.raises(
        ValueError, match=r"from_torch\(SGD\): unknown hyperparameter betas; known:"
    ):
        optimizer.apply(params, grads, state, {"betas": (0.9, 0.9)})


def test_optimizers_that_need_a_closure_are_refused() -> None:
    optimizer = ts.optim.from_torch(torch.optim.LBFGS)
    with pytest.raises(TypeError, match=r"from_torch\(LBFGS\): its step\(\) needs a closure"):
        optimizer.init(make_params())


def test_other_type_errors_are_not_mistaken_for_a_closure() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise TypeError("unsupported operand")

    with pytest.raises(TypeError, match="unsupported operand"):
        ts.optim.from_torch(Broken).init(make_params())


def test_what_makes_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"from_torch\(list\): made a list, no Optimizer"):
        ts.optim.from_torch(list)  # type: ignore[arg-type]


def test_no_parameters_and_no_gradients_are_no_steps() -> None:
    optimizer, params = wrapped("Adam"), make_params()
    assert optimizer.apply({}, {}, optimizer.init({}))[0] == {}
    state = optimizer.init(params)
    after = optimizer.apply(params, {}, state)
    assert ts.equal(after, (params, state))


def test_gradients_are_not_written_to_by_classes_that_do() -> None:
    class Writes(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad.mul_(group["lr"]))

    params = make_params()
    grads, optimizer = make_grads(params, 0), ts.optim.from_torch(Writes, lr=0.5)
    with untouched(params, grads):
        after, _ = optimizer.apply(params, grads, optimizer.init(params))
    assert all(torch.equal(after[n], params[n] - grads[n] * 0.5) for n in SHAPES)
