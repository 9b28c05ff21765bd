"""``compile(step, whole=True)``: the whole step as one function, with the same arithmetic."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trainstep as ts
from support import models
from support.steps import make
from trainstep.whole import WholeStep

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

GUARDED: list[dict[str, Any]] = [
    {"on_nonfinite": "skip"},
    {"guards": (ts.spike_guard(window=4),)},
    {"loss_scale": ts.DynamicScale(growth_interval=2)},
    {"transforms": (ts.transforms.centralize(), ts.transforms.clip_by_value(0.1))},
    {"schedule": None},
    {"optimizer": ts.optim.ema(ts.optim.adam(weight_decay=0.1, amsgrad=True), 0.9)},
]


def run(
    step: Any, state: ts.TrainState, count: int = 5, device: str = "cpu"
) -> tuple[ts.TrainState, list[dict[str, Tensor]]]:
    seen = []
    for batch in models.batches(count):
        state, metrics = step(state, {name: x.to(device) for name, x in batch.items()})
        seen.append(metrics)
    return state, seen


def recurrent(name: str) -> bool:
    return any(isinstance(part, nn.RNNBase) for part in models.build(name).modules())


@pytest.mark.parametrize(
    "name", [n for n in models.MODELS if n != "checkpointed" and not recurrent(n)]
)
def test_every_model_is_written_down_as_it_is(name: str) -> None:
    # This backend runs the operations as they are: only writing them down could change anything.
    step, state = make(name)
    mine, metrics = run(ts.compile(step, whole=True, backend="eager"), state)
    theirs, expected = run(step, state)
    assert ts.diff(metrics, expected) == []
    assert ts.diff(mine, theirs) == []


@pytest.mark.parametrize("options", GUARDED, ids=lambda options: "-".join(options))
def test_guards_transforms_and_optimizers_are_inside(options: dict[str, Any]) -> None:
    step, state = make(**options)
    mine, metrics = run(ts.compile(step, whole=True, backend="eager"), state)
    theirs, expected = run(step, state)
    assert ts.diff(metrics, expected) == []
    assert ts.diff(mine, theirs) == []


@pytest.mark.parametrize("order", ["sequential", "tree"])
def test_micro_batches_are_inside(order: Any) -> None:
    step, state = make("mlp", microbatches=3, order=order)
    mine, _ = run(ts.compile(step, whole=True, backend="eager"), state)
    assert ts.diff(mine, run(step, state)[0]) == []


def test_it_is_pure_and_donated_it_has_the_same_bits() -> None:
    step, state = make()
    whole = ts.compile(step, whole=True, backend="eager")
    before = ts.digest(state)
    once, again = run(whole, state)[0], run(whole, state)[0]
    assert ts.digest(state) == before
    assert ts.equal(once, again)

    mine = ts.tree.clone(state)
    donated, _ = run(ts.donate(whole), mine)
    assert ts.equal(donated, once)
    with pytest.raises(RuntimeError, match="this state was donated"):
        mine.params  # noqa: B018


def test_dropout_is_a_function_of_key_and_step() -> None:
    step, state = make()
    whole = ts.compile(step, whole=True, backend="eager")
    batch = models.batch()
    torch.manual_seed(1)
    _, first = whole(state, batch)
    drawn = torch.rand(())
    torch.manual_seed(1)
    assert torch.equal(torch.rand(()), drawn)  # the global stream is left alone
    assert torch.equal(whole(state, batch)[1]["loss"], first["loss"])
    for other in (state.evolve(step=1), state.evolve(key=ts.rng.key(9))):
        assert not torch.equal(whole(other, batch)[1]["loss"], first["loss"])


def test_only_new_shapes_are_written_down() -> None:
    step, state = make()
    whole = ts.compile(step, whole=True, backend="eager")
    assert isinstance(whole, WholeStep)
    state, _ = run(whole, state)
    run(ts.donate(whole), state.evolve(key=ts.rng.key(9)))
    assert len(whole._programs) == 1
    whole(ts.tree.clone(make()[1]), models.batch(3))
    assert len(whole._programs) == 2


@pytest.mark.slow
def test_inductor_computes_the_same_function() -> None:
    # Dropout draws other numbers when it is compiled, so there is none.
    step, state = make("mlp", ts.optim.adam(weight_decay=0.1, amsgrad=True))
    whole = ts.compile(step, whole=True)
    once, again, plain = run(whole, state)[0], run(whole, state)[0], run(step, state)[0]

    assert ts.digest(once) == ts.digest(again)
    for name, tensor in plain.params.items():
        torch.testing.assert_close(once.params[name], tensor, rtol=1e-3, atol=1e-5)


def test_updates_written_out_are_those_of_the_fused_kernel() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    from trainstep.decompositions import ADAM

    for make_optimizer in (ts.optim.adam, ts.optim.adamw):
        for options in ({}, {"amsgrad": True}, {"maximize": True, "weight_decay": 0.3}):
            optimizer = make_optimizer(**options)  # type: ignore[operator]
            params = {"a": torch.randn(3, 4, generator=torch.Generator().manual_seed(0))}
            mine, theirs = ts.tree.clone(params), ts.tree.clone(params)
            my_state, their_state = optimizer.init(params), optimizer.init(params)
            lr = torch.tensor(0.01, dtype=torch.float64)

            def update(p: Any, g: Any, s: Any, lr: Any) -> Any:
                return optimizer.apply(p, g, s, {"lr": lr}, donate=True)  # noqa: B023

            for seed in range(3):
                grads = {"a": torch.randn(3, 4, generator=torch.Generator().manual_seed(seed + 1))}
                written = make_fx(update, ADAM)(mine, grads, my_state, lr)
                if seed == 0:  # writing down has run it already
                    assert "fused" not in written.code
                optimizer.apply(theirs, grads, their_state, {"lr": 0.01}, donate=True)
                torch.testing.assert_close(mine["a"], theirs["a"], rtol=1e-5, atol=1e-7)
            assert ts.equal(my_state["step"], their_state["step"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": ts.optim.sgd()}, r"optim\.sgd asks the host in every update"),
        ({"on_nonfinite": "raise"}, 'on_nonfinite="raise" asks the host'),
        ({"microbatches": "iter"}, 'microbatches="iter" takes any number'),
        (
            {"transforms": ts.transforms.accumulate_every(2)},
            r"transforms\.accumulate_every does something else from step to step",
        ),
    ],
    ids=["optimizer", "nonfinite", "iter", "transform"],
)
def test_what_needs_the_host_is_refused(options: dict[str, Any], message: str) -> None:
    step, _ = make(**options)
    with pytest.raises(ValueError, match=message):
        ts.compile(step, whole=True)


def test_recomputing_with_dropout_is_refused() -> None:
    step, state = make("checkpointed")
    with pytest.raises(ts.CaptureError, match="as gradient checkpointing does"):
        ts.compile(step, whole=True, backend="eager")(state, models.batch())


def test_recomputing_without_dropout_is_inside() -> None:
    module = models.build("checkpointed")
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    step = ts.make_step(ts.module_loss(module, models.mean_loss), ts.optim.adamw())
    state = step.init(module)
    mine, _ = run(ts.compile(step, whole=True, backend="eager"), state)
    assert ts.diff(mine, run(step, state)[0]) == []


def test_recurrent_modules_are_refused() -> None:
    step, _ = make("lstm")
    with pytest.raises(
        ValueError, match=r"PyTorch cannot write down the backward pass of nn\.LSTM"
    ):
        ts.compile(step, whole=True)


def test_other_backends_and_modes_are_refused() -> None:
    step, _ = make()
    with pytest.raises(
        ValueError, match=r"mode='max-autotune' belongs.*backend='aot_eager' cannot"
    ):
        ts.compile(step, whole=True, backend="aot_eager", mode="max-autotune")


@pytest.mark.parametrize("wrap", [ts.compile, ts.data_parallel, ts.vmap.ensemble])
def test_what_wants_its_parts_refuses_it(wrap: Any) -> None:
    step, _ = make()
    with pytest.raises(TypeError, match=f"{wrap.__name__}: the step was compiled as a whole"):
        wrap(ts.compile(step, whole=True))


def test_hyperparameters_other_than_rates_are_refused() -> None:
    step, state = make(schedule=lambda step: {"lr": 0.1, "weight_decay": 0.1 * step})
    with pytest.raises(
        ValueError, match="takes learning rates from the schedule, not weight_decay"
    ):
        ts.compile(step, whole=True, backend="eager")(state, models.batch())


def test_arrays_are_refused_and_settings_may_vary() -> None:
    step, state = make()
    whole = ts.compile(step, whole=True, backend="eager")
    batch = models.batch()
    with pytest.raises(ts.CaptureError, match=r"NumPy array of shape \(3,\).*Make it a tensor"):
        whole(state, {**batch, "more": np.arange(3)})
    for name in ("a", "b", "a"):  # part of what is written down
        whole(state, {**batch, "name": name})
    assert isinstance(whole, WholeStep)
    assert len(whole._programs) == 2


def test_where_random_numbers_are_drawn_is_known() -> None:
    for name, expected in (("mlp", False), ("dropout", True)):
        step, state = make(name)
        whole = ts.compile(step, whole=True, backend="eager")
        assert isinstance(whole, WholeStep)
        whole(state, models.batch())
        assert whole.draws_on_host == expected  # the module is on the CPU


def test_keys_that_are_read_are_refused() -> None:
    def loss(params: Any, buffers: Any, batch: Any, key: Any) -> ts.Loss:
        noise = torch.rand((), generator=ts.rng.generator(key))
        return ts.Loss((params["w"] * noise).sum())

    step = ts.make_step(loss, ts.optim.adamw())
    state = step.init({"w": torch.ones(2)})
    with pytest.raises(ts.CaptureError, match="a key is read on the host"):
        ts.compile(step, whole=True, backend="eager")(state, {"x": torch.ones(2)})
    step(state, {"x": torch.ones(2)})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnTheGPU:
    @pytest.mark.parametrize("backend", ["eager", "inductor"])
    @pytest.mark.parametrize("name", ["mlp", "dropout", "batch_norm"])
    def test_captured_it_has_the_same_bits(self, name: str, backend: str) -> None:
        step, state = make(name, device="cuda")
        whole = ts.compile(step, whole=True, backend=backend)
        captured = ts.capture(whole)
        mine, metrics = run(captured, ts.tree.clone(state), 10, "cuda")
        theirs, expected = run(ts.donate(whole), ts.tree.clone(state), 10, "cuda")
        assert captured._gradients is not None
        assert captured._gradients.recorded
        assert ts.diff(metrics, expected) == []
        assert ts.diff(mine, theirs) == []

    def test_draws_on_the_host_are_refused_before_anything_is_done(self) -> None:
        def loss(params: Any, buffers: Any, batch: Any, key: Any) -> ts.Loss:
            return ts.Loss((params["w"] * batch["x"]).sum() * torch.rand(()).to("cuda"))

        step = ts.make_step(loss, ts.optim.adamw())
        state = step.init({"w": torch.ones(2, device="cuda")})
        captured = ts.capture(ts.compile(step, whole=True, backend="eager"))
        batch = {"x": torch.ones(2, device="cuda")}
        state, _ = captured(state, batch)
        before = ts.digest(state)
        with pytest.raises(ts.CaptureError, match="drawn on the CPU"):
            captured(state, batch)
        assert ts.digest(state) == before

    def test_a_state_that_was_kept_goes_on_in_the_graph(self) -> None:
        step, state = make(device="cuda")
        captured = ts.capture(ts.compile(step, whole=True, backend="eager"))
        middle, _ = run(captured, ts.tree.clone(state), 4, "cuda")
        kept = ts.tree.clone(middle)
        ended, _ = run(captured, middle, 4, "cuda")
        ended = ts.tree.clone(ended)
        assert ts.diff(run(captured, kept, 4, "cuda")[0], ended) == []
