"""Laws of collectives, over numbers of ranks, micro-batches, kinds of tensors and odd values."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import trainstep as ts
from support.fake_ranks import Ranks
from trainstep import collectives
from trainstep.sums import add_in_tree

POWERS = st.sampled_from([1, 2, 4, 8])
SHAPES = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=4)
FLOATS = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
ODD = torch.tensor([0.0, -0.0, float("inf"), 1e-40, -1e30, 1e30, 3.0, 1e-8])


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Return numbers of very different sizes, so that the order of additions shows."""
    draws = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=draws) * 10.0 ** torch.randint(
        -6, 6, shape, generator=draws
    )
    odd = ODD[torch.randint(len(ODD), shape, generator=draws)]
    return torch.where(torch.rand(shape, generator=draws) < 0.2, odd, values).to(dtype)


def make(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> dict[str, Any]:
    tensors = [numbers(shape, dtype, 100 * seed + i) for i, shape in enumerate(shapes)]
    return {"tensors": tensors, "counts": torch.arange(3) * seed, "n": seed, "none": None}


def as_sums(tree: dict[str, Any]) -> ts.Sums:
    grads = {str(i): t.clone() for i, t in enumerate(tree["tensors"])}
    return ts.Sums(grads, torch.zeros(()), tree["n"], {}, {"counts": tree["counts"]})


@given(ranks=POWERS, more=st.integers(0, 9), shapes=SHAPES, dtype=FLOATS, seed=st.integers(0, 99))
def test_tree_sum_has_the_bits_of_one_process(
    ranks: int, more: int, shapes: Any, dtype: torch.dtype, seed: int
) -> None:
    n = ranks + more
    trees = [make(shapes, dtype, seed + i) for i in range(n)]
    whole = add_in_tree(range(n), lambda i: as_sums(trees[i]))

    def share(rank: int) -> ts.Sums:
        own = add_in_tree(range(rank, n, ranks), lambda i: as_sums(trees[i]))
        before = ts.digest(own.grads)
        result: ts.Sums = collectives.tree_sum(own)
        assert ts.digest(own.grads) == before
        return result

    for found in Ranks(ranks).run(share):
        assert ts.equal(found.grads, whole.grads)
        assert ts.equal(found.aux, whole.aux)
        assert int(found.weight) == whole.weight


@given(ranks=st.integers(1, 7), shapes=SHAPES, dtype=FLOATS, seed=st.integers(0, 99))
def test_trees_are_gathered_in_the_order_of_ranks(
    ranks: int, shapes: Any, dtype: torch.dtype, seed: int
) -> None:
    trees = [make(shapes, dtype, seed + rank) for rank in range(ranks)]
    before = ts.digest(trees)
    stacked = [torch.stack([tree["tensors"][i] for tree in trees]) for i in range(len(shapes))]
    for found in Ranks(ranks).run(lambda rank: collectives.all_gather(trees[rank])):
        assert ts.equal(found["tensors"], stacked)
        assert found["n"].tolist() == [seed + rank for rank in range(ranks)]
        assert found["none"] is None
    source = seed % ranks
    for found in Ranks(ranks).run(lambda rank: collectives.broadcast(trees[rank], src=source)):
        assert ts.equal(found["tensors"], trees[source]["tensors"])
    assert ts.digest(trees) == before


@given(ranks=st.integers(1, 7), seed=st.integers(0, 99), axis=st.integers(-2, 1))
def test_tiled_gathers_join_along_an_axis(ranks: int, seed: int, axis: int) -> None:
    parts = [numbers((2, 3), torch.float32, seed + rank) for rank in range(ranks)]
    for found in Ranks(ranks).run(
        lambda rank: collectives.all_gather(parts[rank], axis=axis, tiled=True)
    ):
        assert ts.equal(found, torch.cat(parts, dim=axis))
    for found in Ranks(ranks).run(lambda rank: collectives.all_gather(parts[rank], axis=axis)):
        assert ts.equal(found, torch.stack(parts, dim=axis))


@given(
    ranks=st.integers(1, 7), values=st.lists(st.integers(-(2**40), 2**40), min_size=7, max_size=7)
)
def test_sums_of_integers_are_exact_and_means_are_theirs(ranks: int, values: list[int]) -> None:
    def both(rank: int) -> tuple[Any, Any]:
        tree = {"i": values[rank], "b": rank % 2 == 0, "t": torch.tensor([values[rank], rank])}
        return collectives.psum(tree), collectives.pmean(float(values[rank]))

    for sums, mean in Ranks(ranks).run(both):
        assert sums["i"].item() == sums["t"][0].item() == sum(values[:ranks])
        assert sums["b"].item() == (ranks + 1) // 2
        assert mean.item() == float(sum(values[:ranks])) / ranks


def masked_loss(params: Any, buffers: Any, x: Tensor, key: ts.Key) -> ts.Loss:
    """A loss with random numbers from a generator of its own: threads share the global one."""
    kept = torch.rand(x.shape, generator=ts.rng.generator(key)) < 0.7
    return ts.Loss((x * kept @ params["w"]).square().sum(), len(x))


@given(power=st.integers(0, 3), each=st.integers(1, 3), seed=st.integers(0, 20))
def test_exact_steps_have_the_same_bits_on_any_number_of_ranks(
    power: int, each: int, seed: int
) -> None:
    ranks = 2**power
    n = ranks * each
    step = ts.make_step(
        masked_loss,
        ts.optim.sgd(lr=0.1, momentum=0.9),
        microbatches="iter",
        order="tree",
    )
    parts = [numbers((1 + i % 3, 3), torch.float32, seed + i).clamp(-9, 9) for i in range(n)]
    start = step.init({"w": numbers((3,), torch.float32, seed).clamp(-9, 9)}, seed)
    alone, metrics = step(start, parts)
    parallel = ts.data_parallel(step, exact=True)
    for state, found in Ranks(ranks).run(lambda rank: parallel(start, parts[rank::ranks])):
        assert ts.digest(state) == ts.digest(alone)
        assert ts.equal(found["loss"], metrics["loss"])
