"""``compile``: the loss as one compiled function, the same bits every time, compiled once."""

from typing import Any

import pytest
import torch
from torch import nn

import trainstep as ts
from support import models

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(name: str = "mlp", **options: Any) -> tuple[ts.Step, ts.TrainState]:
    module = models.build(name)
    step = ts.make_step(
        ts.module_loss(module, models.mean_loss),
        ts.optim.adamw(),
        schedule=ts.schedules.cosine(0.1, total_steps=10, warmup_steps=2),
        transforms=(ts.transforms.clip_by_global_norm(0.5),),
        **options,
    )
    return step, step.init(module, seed=3)


def run(step: Any, state: ts.TrainState, count: int = 4) -> ts.TrainState:
    for batch in models.batches(count):
        state, _ = step(state, batch)
    return state


@pytest.mark.parametrize("name", ["mlp", "dropout", "batch_norm"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_traced_step_has_the_bits_of_the_step(name: str, microbatches: int) -> None:
    # This backend runs what was traced as it is: only tracing itself could change anything.
    step, state = make(name, microbatches=microbatches)
    traced = run(ts.compile(step, backend="eager"), state)
    assert ts.digest(traced) == ts.digest(run(step, state))


def test_inductor_computes_the_same_function() -> None:
    step, state = make()
    compiled = ts.compile(step)
    once, again, plain = run(compiled, state), run(compiled, state), run(step, state)

    assert ts.digest(once) == ts.digest(again)
    for name, tensor in plain.params.items():
        torch.testing.assert_close(once.params[name], tensor, rtol=1e-4, atol=1e-5)


def test_rates_seeds_and_steps_do_not_compile_again() -> None:
    step, state = make("dropout", microbatches=2)
    compiled = ts.compile(step, backend="aot_eager")
    state = run(compiled, state, 2)
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(ts.donate(compiled), ts.tree.clone(state).evolve(key=ts.rng.key(9)), 4)


def test_the_module_is_left_as_it_was() -> None:
    step, state = make("batch_norm")
    module = step.loss_fn.apply.module  # type: ignore[attr-defined]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    run(ts.compile(step, backend="eager"), state)
    assert ts.equal(before, dict(module.state_dict()))
    assert all(isinstance(p, nn.Parameter) for p in module.parameters())


def test_evaluation_takes_the_compiled_loss() -> None:
    step, state = make("dropout")
    compiled = ts.compile(step, backend="eager")
    batch = models.batch()
    assert ts.equal(
        ts.make_eval_step(compiled.loss_fn)(state, batch),
        ts.make_eval_step(step.loss_fn)(state, batch),
    )


class Broken(nn.Module):
    """Goes back to Python on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.body = models.build("mlp")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        torch._dynamo.graph_break()
        return y * 2


def broken() -> tuple[ts.Step, ts.TrainState]:
    module = Broken()
    step = ts.make_step(ts.module_loss(module, models.mean_loss), ts.optim.sgd())
    return step, step.init(module)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_breaks_in_the_graph_are_told_once() -> None:
    step, state = broken()
    with pytest.warns(UserWarning, match=r"compiled in several parts[\s\S]*graph_break") as told:
        run(ts.compile(step, backend="eager"), state, 3)
    assert len([w for w in told if "several parts" in str(w.message)]) == 1


def test_a_full_graph_can_be_demanded() -> None:
    step, state = broken()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        run(ts.compile(step, backend="eager", fullgraph=True), state, 1)


def test_what_is_no_step_is_refused() -> None:
    with pytest.raises(TypeError, match="compile: expected what make_step returned, got int"):
        ts.compile(3)  # type: ignore[arg-type]
