"""``compile``: the loss as one compiled function, the same bits every time, compiled once."""

import warnings
from typing import Any

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import nn

import trainstep as ts
from support import models
from trainstep.compiling import Compiled

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


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


class BrokenLater(Broken):
    """Goes back to Python for other reasons with other batches, and in evaluation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        if len(x) == 5:
            torch._dynamo.graph_break("for five")
        if not self.training:
            torch._dynamo.graph_break("in evaluation")
        return y * 2


class Branching(Broken):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.body(x)
        if y.sum() > 1e9:
            return y
        return y * 2


class Looping(Broken):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = x + 1
            torch._dynamo.graph_break("in a loop")
        y: torch.Tensor = self.body(x)
        return y


def broken(module: nn.Module | None = None) -> tuple[ts.Step, ts.TrainState]:
    module = module or Broken()
    step = ts.make_step(ts.module_loss(module, models.mean_loss), ts.optim.sgd())
    return step, step.init(module)


def told(caught: Any) -> list[str]:
    return [str(w.message) for w in caught if "several parts" in str(w.message)]


reading_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not")


@reading_grad
def test_breaks_in_the_graph_are_told_once() -> None:
    step, state = broken()
    with pytest.warns(UserWarning, match=r"compiled in several parts[\s\S]*graph_break") as caught:
        run(ts.compile(step, backend="eager"), state, 3)
    (message,) = told(caught)
    line = Broken.forward.__code__.co_firstlineno + 2
    assert f"{__file__}:{line} (torch._dynamo.graph_break()): " in message


@reading_grad
def test_breaks_of_later_compilations_are_told_too() -> None:
    step, state = broken(BrokenLater())
    compiled = ts.compile(step, backend="eager")
    evaluate = ts.make_eval_step(compiled.loss_fn)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        state, _ = compiled(state, models.batch(6))
    with pytest.warns(UserWarning, match="for five") as first:
        compiled(state, models.batch(5))
    with pytest.warns(UserWarning, match="in evaluation") as second:
        evaluate(state, models.batch(6))
    assert len(told(first)) == len(told(second)) == 1
    assert "for five" not in told(second)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing new: it is compiled anew all the same
        evaluate(ts.tree.map(lambda t: t.double(), state), models.batch(4, dtype=torch.float64))


@reading_grad
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Branching, r"\(if y.sum\(\) > 1e9:\): what comes next depends on the value of a tensor"),
        (Looping, r"\(forward, none of which is compiled, for a break in a loop\): .*graph_break"),
    ],
)
def test_branches_and_loops_are_named(kind: type[nn.Module], reason: str) -> None:
    step, state = broken(kind())
    with pytest.warns(UserWarning, match=reason) as caught:
        run(ts.compile(step, backend="eager"), state, 3)
    assert len(told(caught)) == 1


@reading_grad
def test_breaks_of_other_functions_are_not_told() -> None:
    step, state = make()
    compiled = ts.compile(step, backend="eager")
    state = run(compiled, state, 1)
    torch.compile(Broken(), backend="eager")(models.batch()["x"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(compiled, state, 1)
        compiled(state, models.batch(5))  # compiled anew


@pytest.fixture
def _alone() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_alone")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "places"), [(Broken, 1), (nn.Identity, 0)])
def test_what_wrappers_for_several_processes_break_is_not_told(kind: Any, places: int) -> None:
    module = nn.Sequential(kind(), nn.Linear(models.OUT if places else models.IN, 2))
    met: list[str] = []
    wrapped = nn.parallel.DistributedDataParallel(module)
    compiled = Compiled(torch.compile(wrapped, backend="eager"), tell=met.extend)
    compiled(models.batch()["x"])
    assert [text.split(":")[0] for text in met] == [__file__] * places
    assert torch._dynamo.utils.graph_break_reasons  # there are some even without


def test_a_full_graph_can_be_demanded() -> None:
    step, state = broken()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="graph_break"):
        run(ts.compile(step, backend="eager", fullgraph=True), state, 1)


def test_what_is_no_step_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"compile: expected what make_step or .* returned, got int"
    ):
        ts.compile(3)  # type: ignore[arg-type]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``torch.compile`` is given, which returns the function as it is."""
    calls: list[dict[str, Any]] = []

    def stand_in(fn: Any, **options: Any) -> Any:
        calls.append(options)
        return fn

    monkeypatch.setattr(torch, "compile", stand_in)
    return calls


def test_the_options_are_those_of_torch_compile(given: list[dict[str, Any]]) -> None:
    step, _ = make()
    ts.compile(step, mode="max-autotune", backend="inductor", fullgraph=True)
    assert given == [{"mode": "max-autotune", "backend": "inductor", "fullgraph": True}]


def test_a_mode_is_known_to_inductor() -> None:
    step, state = make()
    with pytest.raises(RuntimeError, match="Unrecognized mode=slow"):
        run(ts.compile(step, mode="slow"), state, 1)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
@pytest.mark.parametrize("pure", [True, False])
def test_modes_with_graphs_of_their_own_are_not_captured(
    mode: str, pure: bool, given: list[dict[str, Any]]
) -> None:
    step, _ = make()
    if pure:
        step = attrs.evolve(step, loss_fn=lambda params, buffers, batch, key: ts.Loss(batch["x"]))
    compiled = ts.compile(step, mode=mode)
    for each in (compiled, ts.data_parallel(compiled)):
        with pytest.raises(ValueError, match=f"capture: compile.mode='{mode}'. makes CUDA graphs"):
            ts.capture(each)
    ts.capture(ts.compile(step, mode="max-autotune-no-cudagraphs"))
    assert [options["mode"] for options in given] == [mode, "max-autotune-no-cudagraphs"]


def doubled(params: Any, buffers: Any, batch: Any, key: Any, *, train: bool = True) -> ts.Loss:
    loss = (params["w"] * batch).sum() * (1.0 if train else 2.0)
    return ts.Loss(loss, 2, aux={"tensor": batch.sum(), "number": 3.0})


@pytest.mark.parametrize("pure", [True, False])
def test_a_loss_made_in_the_compiled_function_is_in_its_graph(pure: bool) -> None:
    step, state = make()
    batch: Any = models.batch()
    if pure:
        step = ts.make_step(doubled, ts.optim.sgd())
        state, batch = ts.init({"w": torch.ones(3)}, step.optimizer), torch.ones(3)
    else:

        def loss(call: Any, batch: Any) -> ts.Loss:
            return ts.Loss((call(batch["x"]) ** 2).sum(), weight=len(batch["x"]))

        step = attrs.evolve(step, loss_fn=ts.module_loss(models.build("mlp"), loss))
    compiled = ts.compile(step, backend="eager", fullgraph=True)
    assert ts.diff(compiled(state, batch), step(state, batch)) == []


def test_a_compiled_loss_is_evaluated_in_evaluation_mode() -> None:
    step = ts.make_step(doubled, ts.optim.sgd())
    state = ts.init({"w": torch.ones(3)}, step.optimizer)
    compiled = ts.compile(step, backend="eager")
    assert ts.make_eval_step(compiled.loss_fn)(state, torch.ones(3))["loss"] == 3.0
