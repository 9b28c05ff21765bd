"""Share a training step among processes, by hand: the core and `ts.collectives`, nothing else.

    python examples/data_parallel.py
    torchrun --nproc_per_node=2 examples/data_parallel.py [--exact]

With --exact the digest of the final state is the same on 1, 2, 4 or 8 processes. Needs scikit-learn for its
1,797 scanned digits of 8 x 8 pixels; runs in a few seconds on a CPU.
"""

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import trainstep as ts

MICROBATCHES, SIZE, TRAINING = 8, 16, 1500
"""Micro-batches in an update, samples in each, and samples to train on."""


def digits() -> tuple[Tensor, Tensor]:
    """Return shuffled images (1797, 64) between 0 and 1, and their classes."""
    pixels, classes = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels), generator=ts.rng.generator(ts.rng.key(0)))
    return torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(classes)[order]


def network() -> nn.Module:
    """Return the model; its dropout draws from the state's key, not from a generator of the process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))


def summed(call: Any, batch: dict[str, Tensor]) -> ts.Loss:
    """A loss is a sum and a weight: sums of several processes can be added, and are divided once."""
    logits = call(batch["x"])
    total = F.cross_entropy(logits, batch["y"], reduction="sum")
    correct = (logits.argmax(-1) == batch["y"]).sum()
    return ts.Loss(total, weight=len(batch["y"]), aux={"accuracy": correct})


def global_batch(step: int, images: Tensor, classes: Tensor) -> list[dict[str, Tensor]]:
    """Return the micro-batches of an update: a function of the step, the same for any process."""
    draws = ts.rng.generator(ts.rng.key(1).fold_in(step))
    rows = torch.randperm(TRAINING, generator=draws)[: MICROBATCHES * SIZE]
    return [{"x": images[some], "y": classes[some]} for some in rows.split(SIZE)]


def by_hand(step: ts.Step, exact: bool) -> Any:
    """Return the step that shares its micro-batches among the processes.

    These lines are what `ts.data_parallel(step, exact=exact)` does for modules without running statistics.
    """
    rank, world = ts.collectives.rank(), ts.collectives.size()
    add = ts.collectives.tree_sum if exact else ts.collectives.psum

    def parallel(state: ts.TrainState, batch: list[Any]) -> tuple[ts.TrainState, dict[str, Tensor]]:
        # This process's share: micro-batches rank, rank + world, ... They keep the numbers that they have
        # in the whole batch, because random numbers are a function of the number.
        sums = ts.sum_gradients(
            step.loss_fn,
            state.params,
            state.buffers,
            batch[rank::world],
            step.loss_key(state),
            order="tree",
            positions=range(rank, len(batch), world),
        )
        # One exchange; then every process divides by the same weight and does the same update.
        loss, grads = add(sums).mean()
        return step.update(state, loss, grads)

    return parallel


def held_out(
    loss_fn: Any, state: ts.TrainState, images: Tensor, classes: Tensor
) -> dict[str, float]:
    """Judge the rest of the digits, each by one process: sums and weights travel, not means."""
    rank, world = ts.collectives.rank(), ts.collectives.size()
    mine = {"x": images[TRAINING + rank :: world], "y": classes[TRAINING + rank :: world]}
    with torch.no_grad():
        loss = loss_fn(state.params, state.buffers, mine, state.key, train=False)
    sums = {"loss": loss.total, "accuracy": loss.aux["accuracy"], "weight": loss.weight}
    totals = ts.collectives.psum(sums)
    return {name: float(totals[name] / totals["weight"]) for name in ("loss", "accuracy")}


def main() -> None:
    """Train, evaluate, and print the state's digest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="updates")
    parser.add_argument(
        "--exact", action="store_true", help="the same bits on 1, 2, 4, 8 processes"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)  # as torchrun does; other numbers of threads may round differently
    if "RANK" in os.environ:  # started by torchrun; a plain process needs no process group
        dist.init_process_group("gloo")

    images, classes = digits()
    model = network()
    loss_fn = ts.module_loss(model, summed)
    step = ts.make_step(
        loss_fn,
        ts.optim.adamw(weight_decay=0.01),
        schedule=ts.schedules.cosine(3e-3, options.steps, warmup_steps=options.steps // 10),
        transforms=(ts.transforms.clip_by_global_norm(1.0),),
    )
    # Every process begins with process 0's state. Here it would anyway, as they all seed alike.
    state = ts.collectives.broadcast(step.init(model, seed=0))
    parallel = by_hand(ts.donate(step), options.exact)

    speaker = ts.collectives.rank() == 0
    for number in range(options.steps):
        state, metrics = parallel(state, global_batch(number, images, classes))
        if speaker and state.step % 50 == 0:
            print(
                f"step {state.step}: loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.3f}"
            )
    judged = held_out(loss_fn, state, images, classes)
    # All processes must have arrived at the same state; compare the digests of all of them.
    own = ts.digest(state)
    bits = torch.tensor(list(bytes.fromhex(own)), dtype=torch.uint8)
    agree = bool((ts.collectives.all_gather(bits) == bits).all())
    if speaker:
        print(f"held-out digits: loss {judged['loss']:.4f}, accuracy {judged['accuracy']:.3f}")
        print(f"processes: {ts.collectives.size()}, all with the same state: {agree}")
        print(f"digest of the final state: {own}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
