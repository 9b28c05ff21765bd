"""Collectives and data-parallel steps among real processes; each reports what it found.

``world_of_one`` gives what a single process finds, for comparison.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import trainstep as ts
from support import models
from support.ranks.launch import report
from trainstep import collectives

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import wire

MICROBATCHES, STEPS = 8, 4
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8)
BLOCKS = 4
WIDE = 512
"""The layer whose gradients are counted on the wire has so many inputs, and as many outputs."""


def tree(rank: int) -> dict[str, Any]:
    """Return one tensor of each kind, so small that all sums are exact, and other leaves."""
    tensors = {str(dtype): (torch.arange(5) + rank).to(dtype) for dtype in DTYPES}
    return {"tensors": tensors, "flags": torch.tensor([rank == 0, True]), "n": rank, "none": None}


def parts(step: int) -> list[dict[str, Tensor]]:
    return [models.batch(2 + i % 3, seed=50 * step + i) for i in range(MICROBATCHES)]


def train(name: str, first: int, world: int, **options: Any) -> dict[str, Any]:
    """Train on a share of the micro-batches; returns the digest, the loss and the parameters."""
    model = models.build(name)
    loss = ts.module_loss(model, models.mean_loss)
    clip = ts.transforms.clip_by_global_norm(1.0)
    step = ts.make_step(loss, ts.optim.adamw(1e-2), transforms=clip, microbatches="iter")
    parallel = ts.data_parallel(ts.donate(step), **options)
    state = parallel.init(model, seed=3)
    for number in range(STEPS):
        state, metrics = parallel(state, parts(number)[first::world])
    weights = torch.cat([p.flatten() for p in state.params.values()]).tolist()
    return {"digest": ts.digest(state), "loss": metrics["loss"].item(), "weights": weights}


def world_of_one() -> dict[str, Any]:
    """Return what one process finds of what ``train`` should."""
    return {
        "exact": train("dropout", 0, 1, exact=True),
        "fast": train("dropout", 0, 1),
        "statistics": train("batch_norm", 0, 1),
    }


def values(rank: int, world: int) -> dict[str, Any]:
    """Return what collectives give, and whether they left their arguments alone."""
    given = tree(rank)
    before = ts.digest(given)
    found = {
        "psum": ts.digest(collectives.psum(given)),
        "tree_sum": ts.digest(collectives.tree_sum(given)),
        "pmean": ts.digest(collectives.pmean(given["tensors"]["torch.float32"])),
        "all_gather": ts.digest(collectives.all_gather(given)),
        "broadcast": ts.digest(collectives.broadcast(given["tensors"], src=1)),
    }
    collectives.same_structure(given)
    return found | {"untouched": ts.digest(given) == before}


def groups(rank: int, world: int) -> dict[str, Any]:
    """Return what happens in meshes and in groups of some of the ranks."""
    line = dist.init_device_mesh("cpu", (world,))
    found: dict[str, Any] = {"mesh": collectives.psum(rank, line).item()}
    square = dist.init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("outer", "inner"))
    found["inner"] = collectives.psum(rank, square["inner"]).item()
    found["square"] = message(lambda: collectives.psum(rank, square))
    pair = dist.new_group([0, 1])
    found["outside"] = message(lambda: collectives.psum(rank, pair)) if rank > 1 else None
    if rank < 2:
        found["pair"] = [collectives.rank(pair), collectives.psum(rank + 1, pair).item()]
    shape = torch.ones(2 + (rank == world - 1))
    found["structure"] = message(lambda: collectives.same_structure({"w": shape}))
    if world > 3:
        three = dist.new_group([0, 1, 2])
        found["three"] = message(lambda: collectives.tree_sum(1, three)) if rank < 3 else None
    return found


def message(call: Callable[[], Any]) -> str:
    """Return the text of the error that a call raises."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def compiled(rank: int, world: int) -> list[str]:
    """Return the names of collectives that a whole graph of ``torch.compile`` gave other bits for."""
    wrong = []
    for function in (collectives.psum, collectives.tree_sum, collectives.all_gather):
        torch._dynamo.reset()

        def doubled(x: Tensor, function: Any = function) -> Any:
            return function({"x": x * 2, "n": rank})

        x = torch.arange(5.0) + rank
        found = torch.compile(doubled, backend="aot_eager", fullgraph=True)(x)
        if not ts.equal(found, doubled(x)):
            wrong.append(function.__name__)
    return wrong


def sent(action: Callable[[], Any]) -> int:
    """Return the bytes that this process sends while ``action`` runs."""
    dist.barrier()
    before = wire.sent()
    action()
    dist.barrier()
    time.sleep(0.2)  # what was handed over may still wait in a thread of the backend
    return wire.sent() - before


def traffic() -> dict[str, int]:
    """Return the bytes that one update sends: DDP, with and without accumulation, and ours."""
    torch.manual_seed(0)
    model = nn.Linear(WIDE, WIDE, bias=False)
    wrapped = nn.parallel.DistributedDataParallel(model)
    batches = [torch.randn(2, WIDE) for _ in range(2)]

    def ddp(count: int) -> None:
        with wrapped.no_sync():
            for batch in batches[: count - 1]:
                wrapped(batch).square().mean().backward()
        wrapped(batches[-1]).square().mean().backward()

    ddp(1)  # buckets are built again after the first
    loss = ts.module_loss(model, lambda call, x: call(x).square().mean())
    step = ts.make_step(loss, ts.optim.sgd(0.1), microbatches="iter")
    steps = {exact: ts.data_parallel(step, exact=exact) for exact in (False, True)}
    state = step.init(model)
    return {
        "ddp": sent(lambda: ddp(1)),
        "ddp, 2 micro-batches": sent(lambda: ddp(2)),
        "pure": sent(lambda: steps[False](state, batches)),
        "exact": sent(lambda: steps[True](state, batches)),
    }


def sharded_traffic(world: int) -> dict[str, int]:
    """Return the bytes that an update sends with FSDP2, of one and of two micro-batches."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDE, WIDE, bias=False) for _ in range(BLOCKS)])
    mesh = dist.init_device_mesh("cpu", (world,))
    for block in model:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    sharded = fully_shard(model, mesh=mesh)
    x = torch.randn(2, WIDE)

    def update(count: int) -> None:
        for number in range(count):
            sharded.set_requires_gradient_sync(number == count - 1)
            model(x).square().mean().backward()

    update(1)
    return {
        "fsdp": sent(lambda: update(1)),
        "fsdp, 2 micro-batches": sent(lambda: update(2)),
    }


def main() -> None:
    """Run everything as one of several processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = collectives.rank(), collectives.size()
    found = {
        "place": [rank, world],
        "values": values(rank, world),
        "groups": groups(rank, world),
        "compiled": compiled(rank, world),
        "exact": train("dropout", rank, world, exact=True),
        "fast": train("dropout", rank, world),
        "statistics": train("batch_norm", rank, world),
        "traffic": traffic() | sharded_traffic(world),
    }
    report(Path(sys.argv[1]), found)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
