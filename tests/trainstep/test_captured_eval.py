"""``capture`` of an evaluation: the bits of the evaluation, whatever happens to the state in between."""

import pickle
from typing import Any

import pytest
import torch
from attrs import define, field
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import trainstep as ts
from support import models, steps
from trainstep.captured_eval import CapturedEval
from trainstep.graphs import Recording
from trainstep.rng import SlotKey

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def noisy(params: Any, buffers: Any, batch: Any, key: Any) -> ts.Loss:
    """Draw from a key of its own; sums of several shapes and types go along."""
    device = batch["x"].device
    noise = torch.rand(4, device=device, generator=ts.rng.generator(key.fold_in(5), device))
    error = ((params["w"] - noise) * batch["x"].mean()) ** 2
    aux = {"worst": error.max(), "each": error, "count": (error > 1).sum(), "number": 2.0}
    return ts.Loss(error.sum(), weight=len(batch["x"]), aux=aux)


def weights(device: str = "cpu", seed: int = 0) -> ts.TrainState:
    return ts.init({"w": torch.arange(4.0, device=device) + seed}, ts.optim.adamw())


def recordings(captured: CapturedEval) -> int:
    graphs = captured._graphs
    return 0 if graphs is None else sum(s.recording is not None for s in graphs._stages.values())


def test_on_the_cpu_it_is_the_evaluation() -> None:
    step, state = steps.make()
    evaluate = ts.make_eval_step(step.loss_fn)
    captured = ts.capture(evaluate)
    for batch in models.batches(4):
        assert ts.diff(captured(state, batch), evaluate(state, batch)) == []
    assert recordings(captured) == 0


def test_an_evaluation_can_be_pickled() -> None:
    evaluate = pickle.loads(pickle.dumps(ts.make_eval_step(noisy)))
    state, batch = weights(), models.batch()
    assert ts.diff(evaluate(state, batch), ts.make_eval_step(noisy)(state, batch)) == []


def test_it_can_be_compiled() -> None:
    torch._dynamo.reset()
    step, state = steps.make()  # with dropout, which evaluation does not do
    evaluate = ts.make_eval_step(step.loss_fn)
    compiled = ts.compile(evaluate, backend="eager", fullgraph=True)
    assert compiled.loss_fn is not evaluate.loss_fn
    for each in (compiled, ts.capture(compiled)):
        assert ts.diff(each(state, models.batch()), evaluate(state, models.batch())) == []


def test_what_belongs_to_steps_is_refused() -> None:
    evaluate = ts.make_eval_step(noisy)
    with pytest.raises(ValueError, match="an evaluation is nothing but its loss; leave whole=True"):
        ts.compile(evaluate, whole=True)
    with pytest.raises(TypeError, match="donate: expected what make_step returned, got EvalStep"):
        ts.donate(evaluate)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="makes CUDA graphs of its own"):
        ts.capture(ts.compile(evaluate, mode="reduce-overhead"))


@define
class Tape(TorchDispatchMode):
    """Stands in for a CUDA graph: what was done to tensors is done again, in the same memory."""

    done: list[Any] = field(factory=list)

    def __attrs_pre_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, made))
        return made

    def replay(self) -> None:
        for func, args, kwargs, made in self.done:
            again = func(*args, **kwargs)
            for old, new in zip(ts.tree.leaves(made), ts.tree.leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def rehearse(fn: Any, root: Any, device: Any) -> Any:
    paths: list[Any] = []

    def take(path: tuple[int, ...]) -> torch.Generator:
        paths.append(path)
        return torch.Generator().manual_seed(root.fold_in(*path).bits)

    return fn(SlotKey(take)), paths


def record(fn: Any, paths: Any, device: Any, pool: Any = None) -> Recording:
    slots = [(path, torch.Generator()) for path in paths]
    waiting = iter(slots)
    with Tape() as tape:
        outputs = fn(SlotKey(lambda path: next(waiting)[1]))
    return Recording(tape, outputs, slots, fresh=False)


@pytest.fixture
def _taped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainstep.stages.rehearse", rehearse)
    monkeypatch.setattr("trainstep.stages.record", record)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", object)
    made = ts.rng.generator
    monkeypatch.setattr(
        "trainstep.rng.generator",
        lambda key, device: key.slot() if isinstance(key, SlotKey) else made(key, device),
    )
    here = torch.device("cpu")
    monkeypatch.setattr(CapturedEval, "__call__", lambda c, s, b: c.recorded(s, b, here))
    # As if they were on the GPU: stacked, and taken out of what is overwritten.
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)


class Recorded:
    """What is recorded, kept and let go of."""

    device: str

    def place(self, value: Any) -> Any:
        return ts.to_device(value, self.device)

    def batches(self, count: int, seed: int = 0) -> list[Any]:
        """Batches of two shapes in turn."""
        return [self.place(models.batch(6 - i % 2, seed=seed + i)) for i in range(count)]

    def same(self, captured: Any, evaluate: Any, state: Any, batches: list[Any]) -> None:
        mine = [captured(state, batch) for batch in batches]
        for number, (metrics, batch) in enumerate(zip(mine, batches, strict=True)):
            assert ts.diff(metrics, evaluate(state, batch)) == [], f"in call {number}"

    @pytest.mark.parametrize("name", ["dropout", "batch_norm", "mlp"])
    @pytest.mark.parametrize("lower", [ts.donate, ts.capture])
    def test_one_recording_serves_all_of_a_training(self, name: str, lower: Any) -> None:
        step, state = steps.make(name, device=self.device)
        evaluate = ts.make_eval_step(step.loss_fn)
        captured, fast = ts.capture(evaluate), lower(step)
        for batch in self.batches(6):  # a captured step settles in its tensors
            state, _ = fast(state, batch)
        self.same(captured, evaluate, state, self.batches(8))
        assert recordings(captured) == 2
        graphs = captured._graphs
        for batch in self.batches(5):
            state, _ = fast(state, batch)
            self.same(captured, evaluate, state, self.batches(4, seed=20))
        assert captured._graphs is graphs

    def test_a_loss_draws_anew_for_every_state(self) -> None:
        evaluate, state = ts.make_eval_step(noisy), weights(self.device)
        captured = ts.capture(evaluate)
        self.same(captured, evaluate, state, self.batches(8))
        graphs = captured._graphs
        self.same(captured, evaluate, state.evolve(key=ts.rng.key(9)), self.batches(8))
        assert captured._graphs is graphs

    def test_another_state_is_recorded_anew(self) -> None:
        evaluate, captured = ts.make_eval_step(noisy), ts.capture(ts.make_eval_step(noisy))
        for seed in range(3):
            self.same(captured, evaluate, weights(self.device, seed), self.batches(8))
            assert recordings(captured) == 2

    def test_a_pure_step_in_between_makes_other_tensors(self) -> None:
        step, state = steps.make("batch_norm", device=self.device)
        evaluate = ts.make_eval_step(step.loss_fn)
        captured = ts.capture(evaluate)
        for batch in self.batches(3):
            self.same(captured, evaluate, state, self.batches(8))
            state, _ = step(state, batch)

    def test_the_same_memory_under_other_objects_is_read(self) -> None:
        evaluate, state = ts.make_eval_step(noisy), weights(self.device)
        captured = ts.capture(evaluate)
        self.same(captured, evaluate, state, self.batches(8))
        graphs = captured._graphs
        alias = state.evolve(params={"w": state.params["w"].detach()})
        self.same(captured, evaluate, alias, self.batches(8))
        assert captured._graphs is graphs

    @pytest.mark.parametrize(
        "change",
        [
            lambda w: {"w": w["w"].flip(0)},
            lambda w: {"w": w["v"], "v": w["w"]},
            lambda w: {"v": w["w"], "w": w["v"]},
            lambda w: {"w": w["w"].T, "v": w["v"]},
            lambda w: {"w": w["w"].view(torch.int32).float(), "v": w["v"]},
        ],
        ids=["fewer", "exchanged", "renamed", "transposed", "other numbers"],
    )
    def test_other_tensors_are_noticed(self, change: Any) -> None:
        def loss(params: Any, buffers: Any, batch: Any, key: Any) -> ts.Loss:
            powers = torch.arange(4.0, device=self.device).view(2, 2)
            return ts.Loss((params["w"] * powers).sum() * batch["x"].sum())

        params = {n: torch.randn(2, 2, device=self.device) for n in ("w", "v")}
        state = ts.init(params, ts.optim.sgd())
        evaluate = ts.make_eval_step(loss)
        captured = ts.capture(evaluate)
        self.same(captured, evaluate, state, self.batches(8))
        other = state.evolve(params=change(state.params))
        self.same(captured, evaluate, other, self.batches(8))

    def test_tensors_that_were_given_other_memory_are_noticed(self) -> None:
        evaluate, state = ts.make_eval_step(noisy), weights(self.device)
        captured = ts.capture(evaluate)
        self.same(captured, evaluate, state, self.batches(8))
        state.params["w"].data = torch.full((4,), 7.0, device=self.device)
        self.same(captured, evaluate, state, self.batches(8))

    def test_metrics_stay_as_they_were(self) -> None:
        captured, state = ts.capture(ts.make_eval_step(noisy)), weights(self.device)
        seen = [captured(state, batch) for batch in self.batches(10)]
        before = [{n: v.clone() for n, v in metrics.items()} for metrics in seen]
        for batch in self.batches(4, seed=30):
            captured(state, batch)
        assert ts.diff(seen, before) == []

    def test_shapes_over_the_limit_are_not_recorded(self) -> None:
        evaluate, state = ts.make_eval_step(noisy), weights(self.device)
        captured = ts.capture(evaluate, limit=1)
        with pytest.warns(UserWarning, match="another shape than the 1 that are recorded"):
            self.same(captured, evaluate, state, self.batches(8))
        assert recordings(captured) == 1


@pytest.mark.usefixtures("_taped")
class TestOnTapes(Recorded):
    device = "cpu"


class TestOnTheGPU(Recorded):
    pytestmark = gpu
    device = "cuda"
