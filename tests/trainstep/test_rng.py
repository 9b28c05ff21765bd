"""Keys are values, and seeding the global generators is undone."""

import threading

import pytest
import torch

from support.snapshots import host_rng
from trainstep import rng


def test_known_values_stay_known() -> None:
    # Checkpoints hold keys, so these may never change. The first is SplitMix64's published output.
    assert rng.mix(0) == 0xE220A8397B1DCDAF
    assert rng.key(0).bits == 0xE220A8397B1DCDAF
    assert rng.key(0).fold_in(1, 2).bits == 0x03C7120DCCC4E66E
    assert [k.bits for k in rng.key(7).split(2)] == [0x9303F77451EF8D22, 0xE1C0647868252E90]


def test_keys_are_equal_and_hashable_by_value() -> None:
    assert rng.key(3) == rng.key(3)
    assert len({rng.key(3), rng.key(3), rng.key(4)}) == 2
    with pytest.raises(AttributeError):
        rng.key(3).bits = 1  # type: ignore[misc]


def test_any_integer_seeds() -> None:
    seeds = [0, 1, -1, 2**63, 2**64 - 2, -(2**40)]
    assert len({rng.key(seed) for seed in seeds}) == len(seeds)
    assert rng.key(-1) == rng.key(2**64 - 1)


def test_folding_is_sequential_and_ordered() -> None:
    key = rng.key(0)
    assert key.fold_in(1, 2) == key.fold_in(1).fold_in(2)
    assert key.fold_in(1, 2) != key.fold_in(2, 1)
    assert key.fold_in() == key
    assert key.fold_in(0) != key


def test_derived_keys_differ() -> None:
    key = rng.key(0)
    derived = [key, *key.split(50), *key.split(3)[2].split(5), *(key.fold_in(i) for i in range(50))]
    assert len(set(derived)) == len(derived)
    assert key.split(3)[:2] == key.split(2)


def test_seeds_and_steps_do_not_trade_places() -> None:
    keys = [rng.key(seed).fold_in(step) for seed in range(30) for step in range(30)]
    raw = [rng.Key(bits).fold_in(step) for bits in range(30) for step in range(30)]
    assert len(set(keys + raw)) == 1800


def test_split_into_none_is_refused() -> None:
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        rng.key(0).split(0)


def test_generators_are_fresh_and_equal() -> None:
    key = rng.key(11)
    draws = [torch.rand(4, generator=rng.generator(key)) for _ in range(2)]
    assert torch.equal(*draws)
    assert not torch.equal(draws[0], torch.rand(4, generator=rng.generator(rng.key(12))))


def test_seeded_gives_the_draws_of_the_key_and_restores_the_generators() -> None:
    before = host_rng()
    with rng.seeded(rng.key(1)):
        first = torch.rand(3)
        with rng.seeded(rng.key(2)):
            inner = torch.rand(3)
        rest = torch.rand(3)
    assert host_rng() == before
    with rng.seeded(rng.key(1)):
        assert torch.equal(torch.rand(3), first)
        assert torch.equal(torch.rand(3), rest)
    assert torch.equal(first, torch.rand(3, generator=rng.generator(rng.key(1))))
    assert not torch.equal(first, inner)


def test_seeded_restores_after_an_exception() -> None:
    def fail() -> None:
        with rng.seeded(rng.key(1)):
            torch.rand(3)
            raise KeyError

    before = host_rng()
    with pytest.raises(KeyError):
        fail()
    assert host_rng() == before


def test_seeded_blocks_of_threads_do_not_mix() -> None:
    expected = {}
    for i in range(4):
        with rng.seeded(rng.key(i)):
            expected[i] = torch.stack([torch.rand(2) for _ in range(5)])
    before, wrong = host_rng(), []

    def work(i: int) -> None:
        for _ in range(50):
            with rng.seeded(rng.key(i)):
                if not torch.equal(torch.stack([torch.rand(2) for _ in range(5)]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not wrong
    assert host_rng() == before


def test_the_generator_of_the_cpu_is_always_lent() -> None:
    assert rng.default_generators() == [torch.default_generator]
    assert rng.default_generators([torch.device("cpu")]) == [torch.default_generator]
