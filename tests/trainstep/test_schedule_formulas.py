"""Schedules against the functions that they are to equal, at every step."""

import json
import math
import random
import warnings
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR, ReduceLROnPlateau

from trainstep import schedules
from trainstep.types import Schedule

PEAK = 3e-4
TOTAL = 40

CASES: list[tuple[str, str, dict[str, Any], Callable[..., Schedule], dict[str, Any]]] = [
    ("get_constant_schedule", "none", {}, schedules.constant, {}),
    ("get_constant_schedule_with_warmup", "warmup", {}, schedules.constant, {}),
    ("get_linear_schedule_with_warmup", "total", {}, schedules.linear, {}),
    ("get_cosine_schedule_with_warmup", "total", {}, schedules.cosine, {}),
    (
        "get_cosine_schedule_with_warmup",
        "total",
        {"num_cycles": 1.75},
        schedules.cosine,
        {"num_cycles": 1.75},
    ),
    (
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        "total",
        {},
        schedules.cosine_with_restarts,
        {},
    ),
    (
        "get_cosine_with_hard_restarts_schedule_with_warmup",
        "total",
        {"num_cycles": 3},
        schedules.cosine_with_restarts,
        {"num_cycles": 3},
    ),
    ("get_polynomial_decay_schedule_with_warmup", "total", {}, schedules.polynomial, {}),
    (
        "get_polynomial_decay_schedule_with_warmup",
        "total",
        {"lr_end": 1e-5, "power": 2.5},
        schedules.polynomial,
        {"lr_end": 1e-5, "power": 2.5},
    ),
    ("get_inverse_sqrt_schedule", "warmup", {}, schedules.inverse_sqrt, {}),
    (
        "get_inverse_sqrt_schedule",
        "warmup",
        {"timescale": 13},
        schedules.inverse_sqrt,
        {"timescale": 13},
    ),
    (
        "get_cosine_with_min_lr_schedule_with_warmup",
        "total",
        {"min_lr": 2e-5},
        schedules.cosine_with_min_lr,
        {"min_lr": 2e-5},
    ),
    (
        "get_cosine_with_min_lr_schedule_with_warmup",
        "total",
        {"min_lr_rate": 0.3, "num_cycles": 1.5},
        schedules.cosine_with_min_lr,
        {"min_lr_rate": 0.3, "num_cycles": 1.5},
    ),
    (
        "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
        "total",
        {"min_lr": 2e-5},
        schedules.cosine_warmup_with_min_lr,
        {"min_lr": 2e-5},
    ),
    (
        "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
        "total",
        {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
        schedules.cosine_warmup_with_min_lr,
        {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    ),
    (
        "get_wsd_schedule",
        "total",
        {"num_decay_steps": 9},
        schedules.warmup_stable_decay,
        {"decay_steps": 9},
    ),
    (
        "get_wsd_schedule",
        "total",
        {"num_decay_steps": 9, "decay_type": "linear"},
        schedules.trapezoidal,
        {"decay_steps": 9},
    ),
    *(
        (
            "get_wsd_schedule",
            "warmup",
            {
                "num_decay_steps": 9,
                "num_stable_steps": 6,
                "warmup_type": rise,
                "decay_type": fall,
                "min_lr_ratio": 0.15,
                "num_cycles": 0.7,
            },
            lambda peak, warmup_steps, **kw: schedules.warmup_stable_decay(
                peak, None, warmup_steps, **kw
            ),
            {
                "decay_steps": 9,
                "stable_steps": 6,
                "warmup_type": rise,
                "decay_type": fall,
                "min_lr_ratio": 0.15,
                "num_cycles": 0.7,
            },
        )
        for rise in ("linear", "cosine", "1-sqrt")
        for fall in ("linear", "cosine", "1-sqrt")
    ),
]


def rates(
    make: Callable[[torch.optim.Optimizer], LRScheduler], lr: float, steps: int
) -> list[float]:
    """Return the rate of each of ``steps`` updates under a scheduler object."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    found = []
    for index in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if index + 1 < steps:
            scheduler.step()
    return found


@pytest.mark.row(38)
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[2]}")
def test_floats_are_those_of_the_reference(case: Any, warmup: int) -> None:
    peers = pytest.importorskip("transformers.optimization")
    name, needs, peer_options, maker, options = case
    arguments: dict[str, Any] = {} if needs == "none" else {"num_warmup_steps": warmup}
    own: dict[str, Any] = {} if needs == "none" else {"warmup_steps": warmup}
    if needs == "total":
        arguments["num_training_steps"] = TOTAL
        own["total_steps"] = TOTAL
    schedule = maker(PEAK, **own, **options)
    peer = getattr(peers, name)
    expected = rates(lambda opt: peer(opt, **arguments, **peer_options), PEAK, TOTAL + 5)
    assert [schedule(step) for step in range(TOTAL + 5)] == expected


def test_every_scheduler_of_the_reference_has_a_counterpart() -> None:
    trainer_utils = pytest.importorskip("transformers.trainer_utils")
    renamed = {"reduce_lr_on_plateau": "reduce_on_plateau", "constant_with_warmup": "constant"}
    for kind in trainer_utils.SchedulerType:
        assert callable(getattr(schedules, renamed.get(kind.value, kind.value)))


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize(
    ("three_phase", "pct_start"),
    [(False, 0.01), (False, 0.25), (False, 0.3), (True, 0.25), (True, 0.3), (True, 0.5)],
)
def test_one_cycle_is_that_of_torch(three_phase: bool, strategy: str, pct_start: float) -> None:
    options: dict[str, Any] = {
        "pct_start": pct_start,
        "anneal_strategy": strategy,
        "div_factor": 10.0,
        "final_div_factor": 100.0,
        "three_phase": three_phase,
    }
    schedule = schedules.one_cycle(0.5, TOTAL, **options)

    def make(optimizer: torch.optim.Optimizer) -> OneCycleLR:
        return OneCycleLR(optimizer, 0.5, TOTAL, cycle_momentum=False, **options)

    expected = rates(make, 0.1, TOTAL)
    found = [schedule(step) for step in range(TOTAL)]
    assert found == pytest.approx(expected, rel=0, abs=1e-12)
    assert schedule(TOTAL + 3) == pytest.approx(found[-1], abs=1e-12)


def test_piecewise_is_multi_step() -> None:
    schedule = schedules.piecewise(0.1, {5: 0.5, 11: 0.5})
    expected = rates(lambda opt: MultiStepLR(opt, [5, 11], gamma=0.5), 0.1, 15)
    assert [schedule(step) for step in range(15)] == expected


def test_join_restarts_each_part_at_its_own_zero() -> None:
    parts = [lambda step: float(step), lambda step: 100.0 + step, lambda step: 200.0 + step]
    schedule = schedules.join(parts, [2, 5])
    assert [schedule(step) for step in range(7)] == [0, 1, 100, 101, 102, 200, 201]


def test_warmup_delays_what_follows() -> None:
    after = schedules.linear(1.0, total_steps=4)
    schedule = schedules.warmup(after, 4, start=0.2)
    assert [schedule(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [schedule(step) for step in range(4, 9)] == [after(step) for step in range(5)]
    flat = schedules.warmup(0.5, 2)
    assert [flat(step) for step in range(4)] == [0.0, 0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.linear(-1.0, 5), "schedules.linear: peak must be at least 0"),
        (lambda: schedules.cosine(1.0, 0), "total_steps must be at least 1, got 0"),
        (lambda: schedules.constant(1.0, -2), "warmup_steps must be at least 0, got -2"),
        (lambda: schedules.polynomial(1e-8, 5), "peak must be above lr_end (1e-07), got 1e-08"),
        (lambda: schedules.cosine_with_min_lr(1.0, 5), "exactly one of min_lr"),
        (lambda: schedules.cosine_with_min_lr(1.0, 5), "got neither"),
        (
            lambda: schedules.cosine_warmup_with_min_lr(1.0, 5, min_lr=0.1, min_lr_rate=0.1),
            "got both",
        ),
        (lambda: schedules.cosine_with_min_lr(0.0, 5, min_lr=0.1), "use min_lr_rate"),
        (
            lambda: schedules.warmup_stable_decay(1.0, decay_steps=3),
            "give total_steps or stable_steps, got neither",
        ),
        (
            lambda: schedules.warmup_stable_decay(1.0, 9, decay_steps=3, warmup_type="square"),
            "warmup_type must be one of 'linear', 'cosine', '1-sqrt'; got 'square'",
        ),
        (
            lambda: schedules.warmup_stable_decay(1.0, 9, decay_steps=3, decay_type="exp"),
            "decay_type must be one of 'linear', 'cosine', '1-sqrt'; got 'exp'",
        ),
        (lambda: schedules.trapezoidal(1.0, 9, 4, decay_steps=6), "must fit into total_steps (9)"),
        (lambda: schedules.one_cycle(1.0, 9, anneal_strategy="x"), "one of 'cos', 'linear'"),
        (lambda: schedules.one_cycle(1.0, 9, pct_start=2), "pct_start must be in [0, 1], got 2"),
        (lambda: schedules.one_cycle(1.0, 9, div_factor=0), "div_factor must be above 0"),
        (lambda: schedules.inverse_sqrt(1.0, timescale=0), "timescale must be above 0"),
        (lambda: schedules.join([abs, abs], [3, 4]), "2 schedules need 1 boundaries, got 2"),
        (lambda: schedules.join([abs, abs, abs], [3, 3]), "boundaries must rise"),
        (lambda: schedules.piecewise(1.0, {-1: 0.1}), "steps and factors must be at least 0"),
        (lambda: schedules.reduce_on_plateau(1.0, factor=1.0), "above 0 and below 1, got 1.0"),
        (lambda: schedules.reduce_on_plateau(1.0, mode="up"), "one of 'min', 'max'; got 'up'"),
        (lambda: schedules.reduce_on_plateau(1e-4, min_lr=1e-3), "could never be reduced"),
        (lambda: schedules.greedy(1.0, threshold_mode="x"), "one of 'rel', 'abs'; got 'x'"),
        (lambda: schedules.greedy(1.0, window_size=0), "window_size must be at least 1"),
    ],
)
def test_mistakes_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)


def test_stable_steps_win_over_total_steps_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="stable_steps is used"):
        both = schedules.warmup_stable_decay(1.0, 100, 2, decay_steps=3, stable_steps=4)
    alone = schedules.warmup_stable_decay(1.0, None, 2, decay_steps=3, stable_steps=4)
    assert [both(step) for step in range(12)] == [alone(step) for step in range(12)]


def metrics(seed: int, n: int) -> list[float]:
    """Return a noisy curve with falls, rises, plateaus and non-finite values."""
    generator = random.Random(seed)
    level, found = 5.0, []
    for index in range(n):
        level += generator.choice([-0.3, -0.1, 0.0, 0.0, 0.2])
        found.append(level)
        if index % 37 == 36:
            found.append(generator.choice([math.nan, math.inf]))
    return found


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize("cooldown", [0, 3])
def test_plateau_is_that_of_torch(mode: Any, threshold_mode: Any, cooldown: int) -> None:
    options: dict[str, Any] = {
        "mode": mode,
        "factor": 0.3,
        "patience": 2,
        "threshold": 0.05,
        "threshold_mode": threshold_mode,
        "cooldown": cooldown,
        "min_lr": 1e-3,
    }
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    peer = ReduceLROnPlateau(optimizer, **options)
    plateau = schedules.reduce_on_plateau(0.5, **options)
    state = plateau.init()
    seen = set()
    for metric in metrics(3, 120):
        peer.step(metric)
        before = attrs.asdict(state)
        after = plateau.update(state, torch.tensor(metric, dtype=torch.float64))
        assert attrs.asdict(state) == before
        assert after.lr == optimizer.param_groups[0]["lr"]
        assert (after.bad, after.cooldown) == (peer.num_bad_epochs, peer.cooldown_counter)
        state = after
        seen.add(state.lr)
    assert len(seen) > 3


@pytest.mark.parametrize(
    "options",
    [
        {"patience": 1, "factor": 0.5},
        {"patience": 0, "factor": 0.7, "mode": "max", "cooldown": 2, "warmup": 3},
        {"patience": 1, "threshold_mode": "rel", "threshold": 0.01, "factor": 0.5},
        {"patience": 0, "factor": 0.5, "smooth": True, "window_size": 4},
        {"patience": 0, "factor": 0.5, "min_lr": 0.05, "reset_start": 3, "smooth": True},
        {"patience": 0, "factor": 0.5, "max_lr": 0.2, "cooldown": 1, "reset_start": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_is_that_of_the_reference(options: dict[str, Any], seed: int) -> None:
    peers = pytest.importorskip("transformers.optimization")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    peer = peers.GreedyLR(optimizer, **options)
    greedy = schedules.greedy(0.1, **options)
    state = greedy.init()
    seen = set()
    for metric in metrics(seed, 300):
        if not math.isfinite(metric) and options.get("smooth"):
            continue  # a running sum never recovers from it, here as there
        peer.step(metric)
        state = greedy.update(state, metric)
        assert state.lr == optimizer.param_groups[0]["lr"]
        assert (state.good, state.bad) == (peer.num_good_epochs, peer.num_bad_epochs)
        assert (state.cooldown, state.warmup) == (peer.cooldown_counter, peer.warmup_counter)
        seen.add(state.lr)
    assert len(seen) > 3


@pytest.mark.row(212)
@pytest.mark.parametrize("lr", [1e-3, 5e-5, 1e-7])
def test_greedy_lowers_small_rates(lr: float) -> None:
    greedy = schedules.greedy(lr, patience=0)
    state = greedy.update(greedy.init(), 1.0)
    for _ in range(200):
        state = greedy.update(state, 2.0)
    assert state.lr == pytest.approx(lr / 100)


def test_metric_states_survive_json() -> None:
    greedy = schedules.greedy(0.1, patience=0, smooth=True)
    plateau = schedules.reduce_on_plateau(0.1, patience=0)
    for reducer, kind in ((greedy, schedules.GreedyState), (plateau, schedules.PlateauState)):
        state: Any = reducer.init()
        for metric in (3.0, 2.0, 4.0, 5.0):
            text = json.dumps(attrs.asdict(state), allow_nan=False)
            again = kind(**json.loads(text))
            assert again == state
            state = reducer.update(state, metric)
            assert reducer.update(again, metric) == state


def test_no_schedule_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        schedules.warmup_stable_decay(1.0, 10, decay_steps=3)(4)
