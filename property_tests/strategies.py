"""What a training step can be made of, in tables, and a strategy that draws whole steps from them.

Whatever is entered in a table here gets every property of ``test_step_properties.py``.
"""

from collections.abc import Callable
from typing import Any

import torch
from attrs import evolve, frozen
from hypothesis import strategies as st
from torch import Tensor

import trainstep as ts
from support import models
from trainstep import optim, schedules, transforms

OPTIMIZERS: dict[str, Callable[[], ts.Optimizer]] = {
    "adafactor": optim.adafactor,
    "adagrad": optim.adagrad,
    "adam": lambda: optim.adam(weight_decay=0.01),
    "adamw": optim.adamw,
    "adamw-amsgrad": lambda: optim.adamw(amsgrad=True),
    "adamw-foreach": lambda: optim.adamw(fused=False),
    "lamb": optim.lamb,
    "lion": optim.lion,
    "muon": lambda: optim.partition(
        optim.matrices(), {"matrix": optim.muon(), "rest": optim.adamw()}
    ),
    "nadam": optim.nadam,
    "radam": optim.radam,
    "rmsprop": lambda: optim.rmsprop(momentum=0.5, centered=True),
    "schedule_free_adamw": lambda: optim.schedule_free_adamw(warmup_steps=2),
    "schedule_free_sgd": lambda: optim.schedule_free_sgd(lr=0.1),
    "sgd": optim.sgd,
    "sgd-dampened": lambda: optim.sgd(momentum=0.9, dampening=0.1),
    "sgd-nesterov": lambda: optim.sgd(momentum=0.9, nesterov=True, weight_decay=0.01),
    "from_torch-adamw": lambda: optim.from_torch(torch.optim.AdamW),
    "from_torch-asgd": lambda: optim.from_torch(torch.optim.ASGD),
    "from_torch-rprop": lambda: optim.from_torch(torch.optim.Rprop),
    "chain": lambda: optim.chain(transforms.add_noise(0.1), optim.adamw()),
    "ema": lambda: optim.ema(optim.sgd(), decay=0.9, dtype=torch.float32),
    "ema-warmup": lambda: optim.ema(optim.adamw(), decay=0.9, warmup=True),
    "freeze": lambda: optim.partition(
        {"bias": "none", ".*": "all"}, {"none": optim.freeze(), "all": optim.sgd()}
    ),
    "layerwise_decay": lambda: optim.layerwise_decay(
        optim.adamw(), 0.5, lambda name: len(name) % 3
    ),
    "lookahead": lambda: optim.lookahead(optim.sgd(momentum=0.9), k=2),
    "masked": lambda: optim.masked(optim.adamw(), "weight"),
    "partition": lambda: optim.partition(
        {"bias": "b", ".*": "w"},
        {"b": optim.sgd(momentum=0.9), "w": optim.from_torch(torch.optim.RAdam)},
    ),
    "scaled": lambda: optim.scaled(optim.adamw(), 0.5),
    "scheduled": lambda: optim.scheduled(
        optim.sgd(weight_decay=0.1), schedules.linear(0.1, 5), name="weight_decay"
    ),
}
"""Optimizers by name: that of the factory, and after a dash what is special."""

TRANSFORMS: dict[str, Callable[[], ts.Transform]] = {
    "accumulate_every": lambda: transforms.accumulate_every(2),
    "adaptive_clip": lambda: transforms.adaptive_clip(0.1),
    "add_noise": lambda: transforms.add_noise(0.1),
    "centralize": transforms.centralize,
    "chain": lambda: transforms.chain(
        transforms.centralize(), transforms.accumulate_every(2), transforms.add_noise(0.1)
    ),
    "clip_by_global_norm": lambda: transforms.clip_by_global_norm(0.1),
    "clip_by_parameter_norm": lambda: transforms.clip_by_parameter_norm(0.1),
    "clip_by_value": lambda: transforms.clip_by_value(0.01),
    "identity": transforms.identity,
    "scale_by_trust_ratio": transforms.scale_by_trust_ratio,
    "zero_nonfinite": transforms.zero_nonfinite,
}
"""Gradient transformations by the name of their factory."""

GUARDS: dict[str, dict[str, Any]] = {
    "none": {},
    "raise": {"on_nonfinite": "raise"},
    "skip": {"on_nonfinite": "skip"},
    "spike-skip": {"guards": (ts.spike_guard(window=2, sigma=0.5),)},
    "spike-clip": {"guards": (ts.spike_guard(window=2, sigma=0.5, action="clip"),)},
    "loss_scale": {"loss_scale": ts.DynamicScale(init_scale=4.0, growth_interval=2)},
}
"""Arguments of ``make_step`` that decide whether an update happens."""

MODELS = (
    "mlp",
    "dropout",
    "batch_norm",
    "frozen",
    "tied",
    "checkpointed",
    "custom_function",
    "counting",
)
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def token_loss(call: Callable[..., Tensor], data: dict[str, Tensor]) -> ts.Loss:
    """Squared errors summed with a weight per sample, as the tokens of ragged sequences are."""
    errors = ((call(data["x"]) - data["y"]) ** 2).sum(dim=1)
    return ts.Loss((errors * data["w"]).sum(), data["w"].sum(), aux={"errors": errors.sum()})


LOSSES = (models.mean_loss, token_loss)


@frozen
class Setup:
    """A training run in names: everything that ``build`` needs."""

    model: str
    dtype: torch.dtype
    optimizer: str
    transforms: tuple[str, ...]
    guard: str
    loss: Callable[..., Any]
    parts: int
    order: str
    scheduled: bool
    sizes: tuple[int, ...]
    seed: int


@frozen
class Run:
    """A step, the module inside it, a state at step 0 and the batches to come."""

    module: torch.nn.Module
    step: ts.Step
    state: ts.TrainState
    batches: list[dict[str, Tensor]]

    def train(self, state: ts.TrainState, since: int = 0, *, donate: bool = False) -> ts.TrainState:
        """Return the state after the batches from ``since`` on."""
        step = ts.donate(self.step) if donate else self.step
        for batch in self.batches[since:]:
            state, _ = step(state, batch)
        return state


def build(setup: Setup) -> Run:
    """Make the run that ``setup`` names; equal setups give equal bits."""
    module = models.build(setup.model, setup.dtype, setup.seed)
    step = ts.make_step(
        ts.module_loss(module, setup.loss),
        OPTIMIZERS[setup.optimizer](),
        schedules.cosine(0.05, total_steps=6, warmup_steps=1) if setup.scheduled else None,
        tuple(TRANSFORMS[name]() for name in setup.transforms),
        setup.parts,
        order=setup.order,
        **GUARDS[setup.guard],
    )
    batches = [models.batch(n, setup.seed + i, setup.dtype) for i, n in enumerate(setup.sizes)]
    for batch in batches:
        batch["w"] = batch["w"] + 1
    return Run(module, step, step.init(module, setup.seed), batches)


@st.composite
def setups(draw: st.DrawFn, shift: int = 0, steps: int = 3) -> Setup:
    """Draw a run.

    Args:
        draw: given by Hypothesis.
        shift: rotates the tables, so that tests that fix one part each see other examples, although all
            draw the same numbers.
        steps: how many batches.
    """

    def choose(table: Any) -> Any:
        names = list(table)
        at = shift % len(names)
        return draw(st.sampled_from(names[at:] + names[:at]))

    parts = choose((1, 2, 3))
    # Two samples per micro-batch at least: batch norm refuses to train on one.
    sizes = st.integers(2 * parts, 2 * parts + 4)
    return Setup(
        model=choose(MODELS),
        dtype=choose(DTYPES),
        optimizer=choose(OPTIMIZERS),
        transforms=tuple(choose(TRANSFORMS) for _ in range(draw(st.integers(0, 2)))),
        guard=choose(GUARDS),
        loss=choose(LOSSES),
        parts=parts,
        order=choose(("sequential", "tree")),
        scheduled=choose((True, False)),
        sizes=tuple(draw(sizes) for _ in range(steps)),
        seed=draw(st.integers(0, 2**16)),
    )


SUBJECTS = (
    [("optimizer", name) for name in OPTIMIZERS]
    + [("transforms", name) for name in TRANSFORMS]
    + [("guard", name) for name in GUARDS]
)
"""Every entry of the tables, as (part of a ``Setup``, name)."""


def about(subject: tuple[str, str]) -> st.SearchStrategy[Setup]:
    """Draw runs that have ``subject``, an entry of ``SUBJECTS``, as one of their parts."""
    part, name = subject
    value = (name,) if part == "transforms" else name
    return setups(SUBJECTS.index(subject)).map(lambda setup: evolve(setup, **{part: value}))
