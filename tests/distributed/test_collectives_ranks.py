"""Collectives and data-parallel steps among two and four processes, and the bytes that they send."""

import json
import sys
from typing import Any

import pytest
import torch

import trainstep as ts
from support.processes import ROOT
from support.ranks import collected
from support.ranks.launch import launch

sys.path.insert(0, str(ROOT / "benchmarks"))
import traffic

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of the processes found."""
    folder = tmp_path_factory.mktemp("collected")
    return launch(request.param, "collected", folder).found


@pytest.fixture(scope="module")
def alone() -> Any:
    """What one process finds."""
    return json.loads(json.dumps(collected.world_of_one()))


def test_ranks_know_their_place(found: list[Any]) -> None:
    assert [each["place"] for each in found] == [[r, len(found)] for r in range(len(found))]


def test_every_kind_of_tensor_arrives(found: list[Any]) -> None:
    trees = [collected.tree(rank) for rank in range(len(found))]
    kinds = trees[0]["tensors"]
    stacked = {kind: torch.stack([tree["tensors"][kind] for tree in trees]) for kind in kinds}
    flags = torch.stack([tree["flags"] for tree in trees])
    numbers = torch.arange(len(found))
    summed = {
        "tensors": {kind: t.sum(0, dtype=t.dtype) for kind, t in stacked.items()},
        "flags": flags.sum(0),
        "n": numbers.sum(),
        "none": None,
    }
    gathered = {"tensors": stacked, "flags": flags, "n": numbers, "none": None}
    expected = {
        "psum": ts.digest(summed),
        "tree_sum": ts.digest(summed),
        "pmean": ts.digest(stacked["torch.float32"].mean(0)),
        "all_gather": ts.digest(gathered),
        "broadcast": ts.digest(trees[1]["tensors"]),
        "untouched": True,
    }
    for each in found:
        assert each["values"] == expected


def test_meshes_and_groups_of_some_ranks(found: list[Any]) -> None:
    world = len(found)
    for rank, each in enumerate(found):
        seen = each["groups"]
        assert seen["mesh"] == sum(range(world))
        assert seen["inner"] == 2 * (rank - rank % 2) + 1
        assert 'one dimension here, got 2; take one of them: mesh["outer"]' in seen["square"]
        if rank < 2:
            assert seen["pair"] == [rank, 3]
        else:
            assert f"psum: this process, rank {rank}, is not in the group" in seen["outside"]
        assert (
            f"w is float32 (2,) on rank 0 and float32 (3,) on rank {world - 1}" in seen["structure"]
        )
        if world > 3 and rank < 3:
            assert "power of two, so that each holds a subtree; got 3" in seen["three"]


def test_collectives_can_be_compiled(found: list[Any]) -> None:
    assert [each["compiled"] for each in found] == [[]] * len(found)


def test_exact_training_has_the_bits_of_one_process(found: list[Any], alone: Any) -> None:
    for each in found:
        assert each["exact"] == alone["exact"]


@pytest.mark.parametrize("kind", ["fast", "statistics"])
def test_all_ranks_end_with_the_same_state(kind: str, found: list[Any], alone: Any) -> None:
    assert len({each[kind]["digest"] for each in found}) == 1
    if kind == "fast":
        assert found[0][kind]["weights"] == pytest.approx(alone[kind]["weights"], rel=1e-5)
        assert found[0][kind]["loss"] == pytest.approx(alone[kind]["loss"], rel=1e-5)


def test_bytes_on_the_wire_are_those_of_the_formulas(found: list[Any]) -> None:
    grads, world = collected.WIDE**2 * 4, len(found)
    whole = collected.BLOCKS * grads
    expected = {
        "ddp": traffic.ddp_sent(grads, world),
        "ddp, 2 micro-batches": traffic.ddp_sent(grads, world),
        "pure": traffic.ddp_sent(grads, world),
        "exact": traffic.exact_sent(grads, world),
        "fsdp": traffic.fsdp_sent(whole, world, scatter=traffic.all_reduce),
        "fsdp, 2 micro-batches": traffic.fsdp_sent(whole, world, 2, scatter=traffic.all_reduce),
    }
    for each in found:
        # Besides: headers of the backend, barriers, the loss and the weight.
        for name, size in expected.items():
            assert size <= each["traffic"][name] <= 1.005 * size + 12_000, name


def test_the_page_has_the_tables_of_the_formulas(capsys: pytest.CaptureFixture[str]) -> None:
    traffic.main()
    page = (ROOT / "docs" / "scaling.md").read_text()
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in page
