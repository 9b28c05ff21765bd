"""The host's generators: mixing, seeding, and giving them back."""

from __future__ import annotations

import pickle
import random
import timeit
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from trainer.data import seeding
from trainer.data.seeding import WorkerInit, lent_host_rng, mix, preserved_host_rng, seed_host


def draws() -> list[float]:
    """One number of each global generator, and of the normal deviates that NumPy and Python keep."""
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),  # noqa: NPY002
        float(np.random.randn()),  # noqa: NPY002
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def states() -> tuple[Any, ...]:
    numpy_state = pickle.dumps(np.random.get_state(legacy=False))  # noqa: NPY002
    torch_state = torch.get_rng_state().numpy().tobytes()
    return random.getstate(), numpy_state, torch_state, torch.initial_seed()


# --- mixing -------------------------------------------------------------------------------------


def test_splitmix64_gives_the_published_sequence() -> None:
    """The outputs of Vigna's splitmix64.c from state 1234567."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    gamma, state, got = 0x9E3779B97F4A7C15, 1234567, []
    for _ in expected:
        got.append(seeding.splitmix64(state))
        state = (state + gamma) & seeding.MASK64
    assert got == expected


def test_splitmix64_of_arrays_equals_that_of_ints() -> None:
    values = [0, 1, 2**32, 2**63, 2**64 - 1]
    array = seeding.splitmix64(np.array(values, dtype=np.uint64))
    assert array.tolist() == [seeding.splitmix64(value) for value in values]


def test_mix_tells_order_length_and_sign_apart() -> None:
    tuples = [(), (0,), (1,), (-1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**63,), (2**64 - 2,)]
    assert len({mix(*ints) for ints in tuples}) == len(tuples)
    assert mix(-1) == mix(2**64 - 1)
    assert mix(3, 4) == seeding.splitmix64(seeding.splitmix64(3) ^ 4)


def test_the_three_generators_do_not_share_a_stream() -> None:
    def words() -> tuple[set[int], set[int]]:
        of_torch = torch.randint(2**31, (8,)).tolist()
        return set(of_torch), set(np.random.randint(2**31, size=16).tolist())  # noqa: NPY002

    torch.default_generator.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    of_torch, of_numpy = words()
    assert of_torch <= of_numpy  # the trap: equal seeds are equal streams
    for value in (mix(7), mix(8)):
        seed_host(value)
        of_torch, of_numpy = words()
        assert not of_torch & of_numpy


def test_seed_host_takes_any_64_bits() -> None:
    for value in (0, 2**32, 2**63, 2**64 - 1):
        seed_host(value)
        first = draws()
        seed_host(value)
        assert draws() == first


def test_seeding_is_what_the_public_functions_do() -> None:
    """Also after an odd number of normal deviates, of which Python and NumPy keep the second."""
    for value in (0, 5, 2**32, 2**64 - 1):
        draws()
        seed_host(value)
        ours = states()
        draws()
        torch.default_generator.manual_seed(value)
        random.seed(value)
        np.random.seed(value >> 32)  # noqa: NPY002
        assert states() == ours


# --- giving back --------------------------------------------------------------------------------

BLOCKS = [preserved_host_rng, lent_host_rng]
Block = Callable[[], AbstractContextManager[None]]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("deviates", [0, 1, 2])
def test_states_are_put_back_after_an_exception_too(block: Block, deviates: int) -> None:
    seed_host(3)
    for _ in range(deviates):  # one of a pair stays in NumPy's and Python's state
        random.gauss(0, 1), np.random.randn()  # noqa: NPY002
    before = states()
    with pytest.raises(ZeroDivisionError), block():
        seed_host(int(draws()[0]) // 0)
    assert states() == before
    with block():
        seed_host(1)
        draws()
    assert states() == before


@pytest.mark.parametrize("outer", BLOCKS)
@pytest.mark.parametrize("inner", BLOCKS)
def test_an_inner_block_leaves_restoring_to_the_outer_one(outer: Block, inner: Block) -> None:
    before = states()
    with outer():
        with inner():
            seed_host(1)
            draws()
        inside = draws()
        seed_host(1)
        draws()
        assert draws() == inside
    assert states() == before


def test_preserved_generators_go_on_from_where_they_stand() -> None:
    seed_host(4)
    expected = draws()
    seed_host(4)
    with preserved_host_rng():
        assert draws() == expected


def test_what_is_drawn_from_lent_generators_is_what_the_seed_says() -> None:
    seed_host(4)
    expected = draws()
    for _ in range(2):
        with lent_host_rng():
            seed_host(4)
            assert draws() == expected


def test_a_generator_that_was_exchanged_inside_is_put_back() -> None:
    own = np.random.get_bit_generator()
    with lent_host_rng():
        np.random.set_bit_generator(np.random.MT19937(1))
    assert np.random.get_bit_generator() is own


# --- workers ------------------------------------------------------------------------------------


class Stream(IterableDataset[list[float]]):
    def __iter__(self) -> Any:
        yield draws()


def test_each_worker_of_each_rank_and_epoch_has_its_own_seed() -> None:
    seen = set()
    for rank in range(2):
        for epoch in range(2):
            init = WorkerInit(3, rank=rank, epoch=epoch)
            data = DataLoader(Stream(), batch_size=None, num_workers=2, worker_init_fn=init)
            drawn = [tuple(sample) for sample in data]
            assert drawn == [tuple(sample) for sample in data]
            seen.update(drawn)
    assert len(seen) == 8


def test_a_worker_start_survives_pickling() -> None:
    assert pickle.loads(pickle.dumps(WorkerInit(1, 2, 3))) == WorkerInit(1, 2, 3)


# --- cost ---------------------------------------------------------------------------------------


def best(call: Callable[[], Any], number: int = 200) -> float:
    """Return the seconds of the fastest call."""
    return min(timeit.repeat(call, number=number, repeat=30)) / number


def test_seeding_costs_no_more_than_the_three_seed_calls() -> None:
    value = mix(1)

    def bare() -> None:
        torch.default_generator.manual_seed(value)
        random.seed(value)
        np.random.seed(value >> 32)  # noqa: NPY002

    with preserved_host_rng():
        assert best(lambda: seed_host(value)) < 1.1 * best(bare)


def test_lending_the_generators_costs_less_than_copying_their_states() -> None:
    def block(kind: Block) -> Callable[[], None]:
        def enter() -> None:
            with kind():
                pass

        return enter

    assert best(block(lent_host_rng), 50) < 0.5 * best(block(preserved_host_rng), 50)
