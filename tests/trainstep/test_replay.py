"""Replaying runs, and finding where two of them part."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainstep as ts


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))


def loss_fn(call: Any, batch: Any) -> Tensor:
    return call(batch["x"]).square().mean()


def batch_of(index: int) -> dict[str, Tensor]:
    return {"x": torch.randn(6, 3, generator=torch.Generator().manual_seed(index))}


MODEL = net()
STEP = ts.make_step(ts.module_loss(MODEL, loss_fn), ts.optim.adamw(lr=0.1))
BATCHES = [batch_of(index) for index in range(8)]


def start(seed: int = 0) -> ts.TrainState:
    return STEP.init(MODEL, seed)


def states(batches: list[Any] = BATCHES, step: Any = STEP) -> list[ts.TrainState]:
    first = start()
    return [first, *(state for state, _ in ts.replay(first, batches, step))]


def other_batches(index: int) -> list[Any]:
    """Return the batches with one number of one of them changed."""
    changed = [{"x": batch["x"].clone()} for batch in BATCHES]
    changed[index]["x"][2, 1] += 1
    return changed


def test_replay_gives_the_same_bits_and_is_lazy() -> None:
    taken: list[int] = []

    def feed() -> Any:
        for index, batch in enumerate(BATCHES):
            taken.append(index)
            yield batch

    state = start()
    run = ts.replay(state, feed(), STEP)
    assert taken == []
    for wanted in range(3):
        again, metrics = next(run)
        state, expected = STEP(state, BATCHES[wanted])
        assert ts.equal(again, state)
        assert ts.equal(metrics, expected)
    assert taken == [0, 1, 2]
    assert len(list(run)) == 5


def test_a_donated_replay_ends_in_the_same_state() -> None:
    last = list(ts.replay(start(), BATCHES, STEP))[-1][0]
    for state, _ in ts.replay(start(), BATCHES, ts.donate(STEP)):
        end = state
    assert ts.equal(end, last)


def test_leaf_digests_make_up_the_digest() -> None:
    state = start()
    leaves = ts.leaf_digests(state)
    assert "params/0.weight" in leaves
    assert {"step", "key"} < leaves.keys()
    changed = state.evolve(params={**state.params, "0.bias": state.params["0.bias"] + 1})
    differing = {path for path, value in ts.leaf_digests(changed).items() if leaves[path] != value}
    assert differing == {"params/0.bias"}


def test_equal_runs_have_no_divergence() -> None:
    live = (start(), BATCHES, STEP)
    leaves = [ts.leaf_digests(state) for state in states()]
    digests = [ts.digest(state) for state in states()]
    forms = (live, leaves, digests, dict(enumerate(digests)), {4: leaves[4], 8: digests[8]})
    for a in forms:
        for b in forms:
            assert ts.bisect(a, b) is None


def test_replayed_runs_name_the_batch_first() -> None:
    found = ts.bisect((start(), BATCHES, STEP), (start(), other_batches(4), STEP))
    assert found is not None
    assert (found.step, found.last_equal, found.path) == (5, 4, "batch/x")
    assert "first at (2, 1)" in found.differences[0].what
    paths = [difference.path for difference in found.differences]
    assert "params/0.weight" in paths
    assert paths[-1].startswith("metrics/")
    assert str(found).startswith("first difference at step 5, equal at step 4\n  batch/x: 1 of 18")


def test_a_step_that_computes_otherwise_is_found() -> None:
    def other(state: Any, batch: Any) -> Any:
        after, metrics = STEP(state, batch)
        if state.step == 2:
            bias = after.params["2.bias"].clone()
            bias.view(torch.int32)[0] += 1
            after = after.evolve(params={**after.params, "2.bias": bias})
        return after, metrics

    found = ts.bisect((start(), BATCHES, STEP), (start(), BATCHES, other))
    assert found is not None
    assert (found.step, found.path) == (3, "params/2.bias")
    assert [d.max_ulp for d in found.differences] == [1]


def test_recorded_leaves_against_a_replay() -> None:
    recorded = [ts.leaf_digests(state) for state in states(other_batches(3))]
    found = ts.bisect(recorded, (start(), BATCHES, STEP))
    assert found is not None
    assert (found.step, found.last_equal) == (4, 3)
    assert {"params/0.weight", "params/2.bias"} < {d.path for d in found.differences}
    assert {d.what for d in found.differences} == {"digests differ"}


def test_digests_of_whole_states_give_the_step_only() -> None:
    recorded = [ts.digest(state) for state in states(other_batches(3))]
    found = ts.bisect((start(), BATCHES, STEP), recorded)
    assert found is not None
    assert (found.step, found.path, found.differences) == (4, None, ())


def test_checkpoints_bracket_the_first_difference() -> None:
    one, two = states(), states(other_batches(3))
    found = ts.bisect(
        {step: ts.leaf_digests(one[step]) for step in (0, 3, 5, 7)},
        {step: ts.leaf_digests(two[step]) for step in (0, 1, 3, 7)},
    )
    assert found is not None
    assert (found.step, found.last_equal) == (7, 3)


def test_runs_that_meet_again_are_still_told_apart() -> None:
    found = ts.bisect(["a", "b", "x", "d"], ["a", "b", "c", "d"])
    assert found is not None
    assert found.step == 2


def test_a_difference_at_the_start_has_nothing_before_it() -> None:
    found = ts.bisect((start(0), BATCHES, STEP), (start(1), BATCHES, STEP))
    assert found is not None
    assert (found.step, found.last_equal, found.path) == (0, None, "key")
    assert str(found).startswith("first difference at step 0\n  key:")


def test_leaves_that_only_one_run_has_are_named() -> None:
    found = ts.bisect([{"a": "00", "b": "11"}], [{"a": "00", "c": "22"}])
    assert found is not None
    assert [(d.path, d.what) for d in found.differences] == [
        ("b", "only in the first"),
        ("c", "only in the second"),
    ]


def test_only_common_steps_count_but_there_must_be_one() -> None:
    assert ts.bisect(["a", "b"], ["a", "b", "c"]) is None
    with pytest.raises(ValueError, match="no step in common"):
        ts.bisect({1: "a"}, {2: "a"})


@pytest.mark.parametrize(
    "run", [states(BATCHES[:1]), {0: start()}, (start(), start(), start()), [start()]]
)
def test_states_instead_of_digests_are_explained(run: Any) -> None:
    text = r"entry of step 0 is a TrainState; give states as digests.*\(state, batches, step\)"
    with pytest.raises(TypeError, match=text):
        ts.bisect(run, run)
