"""``capture``: the bits of the step uncaptured, from CUDA graphs; on the CPU, ``donate``."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainstep as ts
from support import models, steps
from trainstep.captured import CapturedStep

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on(device: str, value: Any) -> Any:
    return ts.tree.map(lambda x: x.to(device) if isinstance(x, Tensor) else x, value)


make = partial(steps.make, device="cuda")


def run(
    step: Any, state: ts.TrainState, batches: list[Any]
) -> tuple[ts.TrainState, list[dict[str, Tensor]]]:
    seen = []
    for batch in batches:
        state, metrics = step(state, batch)
        seen.append(metrics)
    return state, seen


def graphs(step: CapturedStep) -> tuple[int, int]:
    """Return how many graphs of gradients and of updates there are."""
    gradients = step._gradients
    return (
        0
        if gradients is None
        else sum(s.recording is not None for s in gradients._stages.values()),
        sum(s.recording is not None for _, s in step._updates.values()),
    )


def same(step: ts.Step, state: ts.TrainState, count: int = 10) -> CapturedStep:
    """Check that captured and uncaptured steps agree in everything; returns the captured one."""
    batches = [on("cuda", b) for b in models.batches(count)]
    captured = ts.capture(step)
    mine, metrics = run(captured, ts.tree.clone(state), batches)
    theirs, expected = run(ts.donate(step), ts.tree.clone(state), batches)
    for number, (a, b) in enumerate(zip(metrics, expected, strict=True)):
        assert ts.diff(a, b) == [], f"in call {number}"
    assert ts.diff(mine, theirs) == []
    return captured


def test_on_the_cpu_it_is_the_donated_step() -> None:
    step, state = make(device="cpu")
    batches = models.batches(3)
    mine, metrics = run(ts.capture(step), ts.tree.clone(state), batches)
    theirs, expected = run(ts.donate(step), ts.tree.clone(state), batches)
    assert ts.equal(mine, theirs)
    assert ts.equal(metrics, expected)
    ts.capture(step)(mine, batches[0])
    with pytest.raises(RuntimeError, match="this state was donated"):
        mine.params  # noqa: B018


def test_what_is_no_step_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"capture: expected what make_step or .* returned, got int"
    ):
        ts.capture(3)  # type: ignore[arg-type]


def test_it_shows_the_parts_of_the_step() -> None:
    step, state = make(device="cpu")
    captured = ts.capture(step)
    assert captured.loss_key(state) == step.loss_key(state)
    assert captured.on_nonfinite == "ignore"
    with pytest.raises(AttributeError):
        captured.nothing  # noqa: B018


class TestOnTheGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("name", [name for name in models.MODELS if name != "checkpointed"])
    def test_every_model_has_the_same_bits(self, name: str) -> None:
        assert graphs(same(*make(name))) == (1, 1)

    def test_recomputing_with_dropout_cannot_be_recorded(self) -> None:
        step, state = make("checkpointed")
        captured = ts.capture(step)
        state, _ = captured(state, models.batch())
        with pytest.raises(ts.CaptureError, match="as gradient checkpointing does"):
            captured(state, models.batch())
        ts.donate(step)(state, on("cuda", models.batch()))

    def test_recomputing_without_dropout_is_inside(self) -> None:
        module = models.build("checkpointed").cuda()
        for part in module.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        step = ts.make_step(ts.module_loss(module, models.mean_loss), ts.optim.adamw())
        assert graphs(same(step, step.init(module))) == (1, 1)

    def test_rates_that_are_whole_numbers_at_first_are_read_anew(self) -> None:
        same(*make(schedule=lambda step: 1 if step < 6 else 0.1))

    def test_rates_of_groups_that_part_and_meet_again(self) -> None:
        def rates(step: int) -> dict[str, float]:
            return {"lr": 0.1, **({"b/lr": 0.01 * step} if 4 <= step < 8 else {})}

        parts = {"b": ts.optim.adam(), "w": ts.optim.adamw()}
        optimizer = ts.optim.partition({"bias": "b", ".*": "w"}, parts)
        same(*make(optimizer=optimizer, schedule=rates), count=14)

    @pytest.mark.parametrize("microbatches", [2, 3])
    @pytest.mark.parametrize("order", ["sequential", "tree"])
    def test_micro_batches_are_inside(self, microbatches: int, order: Any) -> None:
        assert graphs(same(*make(microbatches=microbatches, order=order))) == (1, 1)

    @pytest.mark.parametrize(
        "options",
        [
            {"on_nonfinite": "skip"},
            {"guards": (ts.spike_guard(window=4),)},
            {"loss_scale": ts.DynamicScale(growth_interval=2)},
            {"transforms": (ts.transforms.centralize(), ts.transforms.clip_by_value(0.1))},
            {"schedule": None},
            {"optimizer": ts.optim.ema(ts.optim.adam(), 0.9)},
            {
                "optimizer": ts.optim.partition(
                    {"bias": "b", ".*": "w"}, {"b": ts.optim.adam(), "w": ts.optim.adamw()}
                )
            },
        ],
        ids=lambda options: "-".join(options),
    )
    def test_guards_transforms_and_schedules_are_inside(self, options: dict[str, Any]) -> None:
        assert graphs(same(*make(**options))) == (1, 1)

    @pytest.mark.parametrize(
        "options",
        [
            {"optimizer": ts.optim.sgd(momentum=0.9)},
            {"optimizer": ts.optim.adamw(fused=False)},
            {"optimizer": ts.optim.lion()},
            {"optimizer": ts.optim.from_torch(torch.optim.RMSprop)},
            {"transforms": (ts.transforms.accumulate_every(2),)},
            {"transforms": (ts.transforms.add_noise(0.1),)},
            {"schedule": lambda step: {"lr": 0.1 / (step + 1), "weight_decay": 0.01 * step}},
            {"on_nonfinite": "raise"},
        ],
        ids=lambda options: "-".join(options),
    )
    def test_other_updates_are_done_beside_the_graph(self, options: dict[str, Any]) -> None:
        assert graphs(same(*make(**options))) == (1, 0)

    def test_autocast_is_inside(self) -> None:
        module = models.build("dropout").cuda()

        def loss(call: Any, batch: Any) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16):
                return models.mean_loss(call, batch)

        step = ts.make_step(ts.module_loss(module, loss), ts.optim.adamw())
        assert graphs(same(step, step.init(module))) == (1, 1)

    def test_keys_drawn_from_in_the_loss_are_fresh_every_time(self) -> None:
        params = {"w": torch.zeros(4, device="cuda")}
        drawn = []

        def loss(params: Any, buffers: Any, batch: Any, key: Any) -> ts.Loss:
            noise = torch.randn(
                4, device="cuda", generator=ts.rng.generator(key.fold_in(5), "cuda")
            )
            drawn.append(noise)
            return ts.Loss(((params["w"] - noise - batch["x"]) ** 2).sum())

        step = ts.make_step(loss, ts.optim.adamw(lr=0.1), microbatches=2)
        same(step, ts.init(params, step.optimizer))

    def test_an_update_that_is_not_finite_is_skipped_in_the_graph(self) -> None:
        step, state = make("batch_norm", on_nonfinite="skip")
        batches = [on("cuda", b) for b in models.batches(10)]
        batches[7]["x"][:] = float("nan")
        mine, metrics = run(ts.capture(step), ts.tree.clone(state), batches)
        theirs, _ = run(ts.donate(step), ts.tree.clone(state), batches)
        assert ts.diff(mine, theirs) == []
        assert [int(m["skipped"]) for m in metrics] == [0] * 7 + [1, 0, 0]

    def test_every_shape_is_recorded_up_to_the_limit(self) -> None:
        step, state = make()
        batches = [on("cuda", models.batch(n, seed=i)) for i in range(6) for n in (2, 3, 4)]
        captured = ts.capture(step, limit=2)
        with pytest.warns(UserWarning, match="another shape than the 2 that are recorded") as told:
            mine, _ = run(captured, ts.tree.clone(state), batches)
        theirs, _ = run(ts.donate(step), ts.tree.clone(state), batches)
        assert ts.diff(mine, theirs) == []
        assert graphs(captured)[0] == 2
        assert len(told) == 1

    def test_batches_may_be_on_the_host(self) -> None:
        step, state = make()
        host = models.batches(8)
        mine, _ = run(ts.capture(step), ts.tree.clone(state), host)
        theirs, _ = run(ts.donate(step), ts.tree.clone(state), [on("cuda", b) for b in host])
        assert ts.diff(mine, theirs) == []

    def test_another_state_goes_on_in_the_same_graphs(self) -> None:
        step, state = make()
        batches = [on("cuda", b) for b in models.batches(16)]
        captured = ts.capture(step)
        run(captured, ts.tree.clone(state), batches[:8])
        other = ts.tree.clone(state).evolve(key=ts.rng.key(77), step=5)
        count = graphs(captured)
        mine, _ = run(captured, ts.tree.clone(other), batches[8:])
        theirs, _ = run(ts.donate(step), ts.tree.clone(other), batches[8:])
        assert ts.diff(mine, theirs) == []
        assert graphs(captured) == count

    def test_the_state_before_is_consumed_and_metrics_stay(self) -> None:
        step, state = make()
        captured = ts.capture(step)
        batches = [on("cuda", b) for b in models.batches(9)]
        state, metrics = run(captured, state, batches)
        losses = [m["loss"].item() for m in metrics]
        after, _ = captured(state, batches[0])
        assert [m["loss"].item() for m in metrics] == losses
        assert len(set(losses)) == len(losses)
        with pytest.raises(RuntimeError, match="this state was donated"):
            state.params  # noqa: B018
        assert after.step == 10

    def test_generators_outside_are_left_alone(self) -> None:
        step, state = make()
        torch.cuda.manual_seed(5)
        torch.manual_seed(5)
        before = torch.cuda.get_rng_state(), torch.get_rng_state()
        run(ts.capture(step), state, models.batches(6))
        after = torch.cuda.get_rng_state(), torch.get_rng_state()
        assert all(map(torch.equal, before, after))
        torch.rand(3, device="cuda")

    def failing(self, forward: Any) -> tuple[ts.Step, ts.TrainState]:
        class Failing(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = models.build("batch_norm")

            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = forward(self.body(x))
                return result

        module = Failing().cuda()
        step = ts.make_step(ts.module_loss(module, models.mean_loss), ts.optim.adamw())
        return step, step.init(module)

    @pytest.mark.parametrize(
        ("forward", "operation"),
        [
            (lambda y: y * (2 if y.sum().item() > 0 else 1), r"aten\._local_scalar_dense"),
            (lambda y: y[y.isfinite().all(1)] + 0 * y, r"aten\.(nonzero|index)"),
            (lambda y: y + torch.tensor(1.0, device="cuda"), "an operation"),
        ],
        ids=["item", "mask", "copy"],
    )
    def test_what_waits_for_the_device_is_named(self, forward: Any, operation: str) -> None:
        step, state = self.failing(forward)
        batches = [on("cuda", b) for b in models.batches(4)]
        captured = ts.capture(step)
        state, _ = captured(state, batches[0])
        before = ts.tree.clone(state)
        with pytest.raises(
            ts.CaptureError, match=rf"{operation}.* waits for the GPU at .*test_capture.py:\d+ \("
        ):
            captured(state, batches[1])
        assert ts.diff(state, before) == []
        mine, _ = run(ts.donate(step), state, batches[1:])
        theirs, _ = run(ts.donate(step), before, batches[1:])
        assert ts.diff(mine, theirs) == []

    def test_randomness_on_the_host_is_refused(self) -> None:
        step, state = self.failing(lambda y: y * (1 + torch.rand(()).item()))
        state, _ = (captured := ts.capture(step))(state, models.batch())
        with pytest.raises(ts.CaptureError, match="random numbers are drawn on the CPU"):
            captured(state, models.batch())

    def test_a_recording_that_fails_leaves_the_device_usable(self) -> None:
        seen = []

        def forward(y: Tensor) -> Tensor:
            seen.append(1)
            if len(seen) == 3:  # neither run nor rehearsed, but recorded
                y.sum().item()
            return nn.functional.dropout(y)

        step, state = self.failing(forward)
        captured = ts.capture(step)
        for batch in models.batches(2):
            state, _ = captured(state, batch)
        with pytest.raises(ts.CaptureError, match=r"the step cannot be recorded at .*test_capture"):
            captured(state, models.batch())
        torch.rand(3, device="cuda").sum().item()
        run(ts.donate(step), state, [on("cuda", b) for b in models.batches(2)])

    @pytest.mark.filterwarnings("ignore")
    def test_the_compiled_step_has_its_own_bits_captured(self) -> None:
        step, state = make()
        assert graphs(same(ts.compile(step), state)) == (1, 1)

    @pytest.mark.parametrize("exact", [False, True])
    def test_a_data_parallel_step_of_one_rank(self, exact: bool) -> None:
        step, state = make(microbatches=2, order="tree")
        batches = [on("cuda", b) for b in models.batches(8)]
        parallel = ts.data_parallel(step, exact=exact)
        captured = ts.capture(parallel)
        mine, metrics = run(captured, ts.tree.clone(state), batches)
        theirs, expected = run(parallel, ts.tree.clone(state), batches)
        assert graphs(captured) == (1, 1)
        assert ts.diff(mine, theirs) == []
        assert ts.diff(metrics, expected) == []
