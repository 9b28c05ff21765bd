"""Collectives without a process group, on ranks that are threads, and their errors."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import trainstep as ts
from support.fake_ranks import Ranks
from trainstep import collectives

EVERY = [
    collectives.psum,
    collectives.pmean,
    collectives.tree_sum,
    collectives.all_gather,
    collectives.broadcast,
]


def tree() -> dict[str, Any]:
    return {
        "weights": torch.arange(6.0).view(2, 3),
        "half": torch.tensor(0.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 2),
        "none": None,
    }


def test_a_process_alone_is_rank_0_of_1() -> None:
    assert (collectives.rank(), collectives.size()) == (0, 1)


@pytest.mark.parametrize("function", EVERY)
def test_a_process_alone_gets_its_own_tree_in_new_tensors(function: Any) -> None:
    given = tree()
    found = function(given)
    expected = {n: t[None] for n, t in tree().items() if t is not None} | {"none": None}
    assert ts.equal(found, expected if function is collectives.all_gather else tree())
    for name in ("weights", "half"):
        found[name].add_(1)
    assert ts.equal(given, tree())


def test_numbers_become_tensors() -> None:
    found = collectives.psum({"i": 3, "f": 0.25, "b": True})
    assert ts.equal(
        found,
        {"i": torch.tensor(3), "f": torch.tensor(0.25, dtype=torch.float64), "b": torch.tensor(1)},
    )
    assert ts.equal(collectives.all_gather(True), torch.tensor([True]))
    assert ts.equal(collectives.psum(torch.tensor([True, False])), torch.tensor([1, 0]))
    assert ts.equal(collectives.pmean(3), torch.tensor(3.0))


def test_tensors_keep_to_addresses_that_kernels_like() -> None:
    found = collectives.psum([torch.ones(1), torch.ones(3), torch.ones(5, dtype=torch.float64)])
    assert [tensor.data_ptr() % 64 for tensor in found] == [0, 0, 0]


def test_one_exchange_for_each_kind_of_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(2)
    calls: list[torch.dtype] = []
    reduce = ranks.all_reduce

    def counted(tensor: Tensor, **options: Any) -> None:
        calls.append(tensor.dtype)
        reduce(tensor, **options)

    monkeypatch.setattr(ranks, "all_reduce", counted)
    given = {"a": torch.ones(3), "b": [torch.ones(2, 2), torch.ones(1).double()], "n": 1, "c": 2.0}
    ranks.run(lambda rank: collectives.psum(given))
    assert sorted(calls, key=str) == sorted(
        [torch.float32, torch.float64, torch.int64] * 2, key=str
    )


def sums(rank: int, **fields: Any) -> ts.Sums:
    grads = {"w": torch.full((3,), 2.0**rank)}
    hits = {"hits": torch.tensor(rank)}
    return ts.Sums(grads, torch.tensor(1.0 + rank), 4, {"seen": torch.tensor(rank)}, hits, **fields)


@pytest.mark.parametrize("function", [collectives.psum, collectives.tree_sum])
def test_sums_are_added_up_but_for_what_is_the_ranks_own(function: Any) -> None:
    scale = torch.tensor(2.0)
    for rank, found in enumerate(Ranks(4).run(lambda r: function(sums(r, scale=scale)))):
        assert ts.equal(found.grads, {"w": torch.full((3,), 15.0)})
        assert (found.total.item(), found.weight.item(), found.unit) == (10.0, 16, 1.0)
        assert found.aux["hits"].item() == 6
        assert found.buffers["seen"].item() == rank
        assert found.scale is scale
        loss, grads = found.mean()
        assert ts.equal(grads, {"w": torch.full((3,), 15.0 / 16 / 2)})
        assert ts.equal(loss.value, torch.tensor(10 / 16))


@pytest.mark.parametrize("weights", [(4, 2), (2**24 + 1, 1), (2**35 + 3, 1), (0.5, 2.25), (0, 0)])
def test_a_weight_travels_with_the_gradients_and_is_exact(weights: tuple[float, float]) -> None:
    ranks, buffers = Ranks(2), []
    reduce = ranks.all_reduce

    def counting(tensor: Any, group: Any, async_op: bool) -> None:
        buffers.append(tensor.dtype)
        reduce(tensor, group, async_op)

    ranks.all_reduce = counting  # type: ignore[method-assign]
    given = [ts.Sums({"w": torch.ones(3)}, torch.ones(()), n, {}, {}) for n in weights]
    for found in ranks.run(lambda rank: collectives.psum(given[rank])):
        assert ts.equal(found.weight, torch.tensor(float(sum(weights))))
        assert found.total.item() == 2.0
    assert buffers == [torch.float32] * 2  # one exchange, seen by two ranks


def test_sums_in_other_units_are_brought_to_one_before() -> None:
    found = Ranks(2).run(lambda rank: collectives.psum(sums(rank, unit=3.0 if rank else 1.0)))
    for total in found:
        assert ts.equal(total.grads, {"w": torch.full((3,), 1.0 + 3 * 2.0)})
        assert (total.total.item(), total.weight.item(), total.unit) == (1.0 + 3 * 2.0, 4 + 12, 1.0)


def test_a_missing_share_of_minus_zero_changes_no_bit() -> None:
    given = torch.tensor([0.0, -0.0, 1e-45, float("inf"), float("nan")])
    trees = [given, torch.full_like(given, -0.0)]
    for found in Ranks(2).run(lambda rank: collectives.tree_sum(trees[rank])):
        assert ts.equal(found, given)


@pytest.mark.parametrize(
    ("leaf", "kind", "text"),
    [
        ("text", TypeError, r"a/0 is a str; leaves must be tensors, numbers or None"),
        (1j, TypeError, "a/0 is a complex"),
        (torch.ones(2, requires_grad=True), ValueError, "a/0 requires a gradient, .* call detach"),
        (
            torch.ones(2, 2).to_sparse(),
            TypeError,
            "a/0 is a Tensor of layout torch.sparse_coo",
        ),
    ],
)
def test_leaves_that_cannot_travel_are_named(leaf: Any, kind: Any, text: str) -> None:
    with pytest.raises(kind, match=f"psum: {text}"):
        collectives.psum({"a": [leaf]})


def test_the_root_can_be_a_leaf_that_cannot_travel() -> None:
    with pytest.raises(TypeError, match="all_gather: the leaf is a str"):
        collectives.all_gather("x")


def test_parameters_can_travel_where_no_gradient_is_asked_for() -> None:
    with torch.no_grad():
        assert not collectives.psum(torch.nn.Parameter(torch.ones(2))).requires_grad


def test_what_is_no_tensor_is_not_broadcast() -> None:
    given = [{"n": rank, "t": torch.tensor(rank), "s": str(rank)} for rank in range(3)]
    for rank, found in enumerate(Ranks(3).run(lambda r: collectives.broadcast(given[r], src=2))):
        assert (found["n"], found["t"].item(), found["s"]) == (rank, 2, str(rank))


def test_a_state_is_broadcast_as_a_whole() -> None:
    def start(rank: int) -> ts.TrainState:
        return ts.init({"w": torch.full((3,), float(rank))}, ts.optim.adamw(), seed=7)

    states = [start(rank) for rank in range(2)]
    for found in Ranks(2).run(lambda rank: collectives.broadcast(states[rank])):
        assert ts.digest(found) == ts.digest(states[0])


def test_different_trees_are_reported_on_every_rank() -> None:
    def report(trees: list[Any]) -> list[str]:
        def check(rank: int) -> str:
            with pytest.raises(ValueError, match="same leaves in the same order") as caught:
                collectives.same_structure(trees[rank])
            return str(caught.value)

        return Ranks(len(trees)).run(check)

    a, b = torch.ones(2), torch.ones(3)
    (text,) = set(report([{"a": a, "b": b}, {"a": a, "b": b}, {"a": a}]))
    assert "ranks 0 and 2 hold different trees: b is float32 (3,) on rank 0 and missing" in text
    (text,) = set(report([{"a": a}, {"a": a.double()}]))
    assert "a is float32 (2,) on rank 0 and float64 (2,) on rank 1" in text
    (text,) = set(report([{"a": a, "b": b}, {"b": b, "a": a}]))
    assert "their leaves are in another order: a, b and b, a" in text
    (text,) = set(report([sums(0), ts.Sums({}, a.sum(), 1, {}, {})]))
    assert "grads/w is float32 (3,) on rank 0 and missing on rank 1" in text
    Ranks(2).run(lambda rank: collectives.same_structure(sums(rank)))
    collectives.same_structure({"alone": a})


@pytest.mark.parametrize("count", [3, 6])
def test_a_tree_needs_a_power_of_two(count: int) -> None:
    def check(rank: int) -> None:
        with pytest.raises(ValueError, match=f"tree_sum: .* power of two, .* got {count}. Start "):
            collectives.tree_sum(1)

    Ranks(count).run(check)


def test_mistakes_are_named() -> None:
    with pytest.raises(TypeError, match=r"pmean: .* use psum\(sums\).mean\(\)"):
        collectives.pmean(sums(0))
    with pytest.raises(ValueError, match=r'tree_sum: .* units of 2.0, .* order="tree"'):
        collectives.tree_sum(sums(0, unit=2.0))
    with pytest.raises(ValueError, match="broadcast: src=1 is no rank of a group of 1"):
        collectives.broadcast(1, src=1)
    with pytest.raises(ValueError, match=r"axis=2, tiled=False\): .* shape \(3,\) .* 2 axes"):
        collectives.all_gather(torch.ones(3), axis=2)
    with pytest.raises(ValueError, match=r"axis=0, tiled=True\): .* shape \(\) .* 0 axes"):
        collectives.all_gather(3, tiled=True)
    with pytest.raises(ValueError, match=r"psum: .* is not initialised"):
        collectives.psum(1, SimpleNamespace())
