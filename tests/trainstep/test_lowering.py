"""``donate``: the same bits in the buffers of the state that it was given."""

from typing import Any

import pytest
import torch

import trainstep as ts
from support import models
from support.snapshots import untouched

OPTIMIZERS = {
    "adamw": lambda: ts.optim.adamw(lr=0.02),
    "adamw-foreach": lambda: ts.optim.adamw(lr=0.02, fused=False),
    "sgd": lambda: ts.optim.sgd(lr=0.1, momentum=0.9),
    "wrapped": lambda: ts.optim.from_torch(torch.optim.RMSprop),
    "partition": lambda: ts.optim.partition(
        {"bias": "b", ".*": "w"}, {"b": ts.optim.sgd(lr=0.1), "w": ts.optim.adamw()}
    ),
}


def make(name: str, optimizer: str = "adamw", **options: Any) -> tuple[Any, Any]:
    module = models.build(name)
    step = ts.make_step(
        ts.module_loss(module, models.mean_loss),
        OPTIMIZERS[optimizer](),
        transforms=(ts.transforms.clip_by_global_norm(0.5),),
        **options,
    )
    return step, step.init(module)


def storage(tree: Any) -> dict[str, int]:
    return {
        path: leaf.data_ptr()
        for path, leaf in ts.tree.leaves_with_paths(tree)
        if isinstance(leaf, torch.Tensor)
    }


@pytest.mark.parametrize("on_nonfinite", ["ignore", "skip", "raise"])
@pytest.mark.parametrize("name", models.MODELS)
def test_donation_has_the_same_bits(name: str, on_nonfinite: Any) -> None:
    step, state = make(name, on_nonfinite=on_nonfinite, microbatches=2)
    pure, donated = state, ts.tree.clone(state)
    module = step.loss_fn.apply.module
    for batch in models.batches(4):
        pure, expected = step(pure, batch)
        with untouched(module, batch):
            donated, metrics = ts.donate(step)(donated, batch)
        assert ts.digest(donated) == ts.digest(pure)
        assert ts.equal(metrics, expected)


@pytest.mark.parametrize("on_nonfinite", ["ignore", "skip"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_result_lives_in_the_given_buffers(optimizer: str, on_nonfinite: Any) -> None:
    step, state = make("batch_norm", optimizer, on_nonfinite=on_nonfinite)
    state, _ = step(state, models.batch())
    before = storage((state.params, state.buffers, state.opt_state))
    after, _ = ts.donate(step)(state, models.batch())
    assert storage((after.params, after.buffers, after.opt_state)) == before


def test_a_consumed_state_names_its_step_whatever_is_done_with_it() -> None:
    step, state = make("mlp")
    first, _ = step(state, models.batch())
    donated = ts.donate(step)
    second, _ = donated(first, models.batch())
    uses = (
        lambda: first.params,
        lambda: first.step,
        lambda: first.evolve(step=0),
        lambda: ts.digest(first),
        lambda: step(first, models.batch()),
        lambda: donated(first, models.batch()),
        lambda: ts.make_eval_step(step.loss_fn)(first, models.batch()),
    )
    for use in uses:
        with pytest.raises(RuntimeError, match="was donated at step 1, its buffers now belong"):
            use()
    assert second.step == 2


def test_a_pure_step_keeps_the_old_state() -> None:
    step, state = make("mlp")
    before = ts.digest(state)
    donated = ts.donate(step)
    step(state, models.batch())
    assert ts.digest(state) == before
    assert not step.donates, "donate makes another step, it does not change this one"
    assert donated.donates


def test_a_failing_loss_does_not_consume() -> None:
    module = models.build("mlp")
    step = ts.make_step(ts.module_loss(module, lambda call, b: b["missing"]), ts.optim.sgd())
    state = step.init(module)
    with untouched(state), pytest.raises(KeyError, match="missing"):
        ts.donate(step)(state, models.batch())


def test_states_that_share_the_modules_tensors_train_the_module() -> None:
    module = models.build("batch_norm")
    step = ts.donate(ts.make_step(ts.module_loss(module, models.mean_loss), ts.optim.adamw()))
    state = ts.init(module, step.optimizer, copy=False)
    state, _ = step(state, models.batch())
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    assert all(torch.equal(own[n], t) for n, t in {**state.params, **state.buffers}.items())
    assert own["1.num_batches_tracked"] == 1


def test_what_is_no_step_is_refused() -> None:
    with pytest.raises(TypeError, match=r"donate: expected what make_step returned, got make"):
        ts.donate(make)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got dict"):
        ts.donate({})  # type: ignore[arg-type]
