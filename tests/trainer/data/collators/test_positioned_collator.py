"""Where random collators draw from."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from trainer.data.collators import (
    DataCollatorForLanguageModeling,
    DataCollatorForPermutationLanguageModeling,
    DataCollatorWithPadding,
    PositionedCollator,
    RandomCollatorMixin,
)
from trainer.data.seeding import mix


class Draw(RandomCollatorMixin):
    """Two numbers a batch."""

    def __init__(self, seed=None):
        self.seed = seed

    def __call__(self, features):
        return torch.rand(2, generator=self._generator())


@pytest.mark.parametrize("seed", [None, 5])
def test_the_generator_is_that_of_the_documented_seed(seed):
    draw = Draw(seed)
    draw.set_position(3, 8)
    words = (3, 8) if seed is None else (3, 8, 5)
    expected = torch.rand(2, generator=torch.Generator().manual_seed(mix(*words)))
    assert torch.equal(draw([0]), expected)


def test_a_position_takes_the_place_of_any_stream():
    draw = Draw(seed=5)
    draw.set_position(3, 8)
    first = draw([0])
    draw([0])
    draw.set_position(3, 9)
    second = draw([0])
    draw.set_position(3, 8)
    assert torch.equal(draw([0]), first)
    assert not torch.equal(second, first)


def test_copies_do_not_move_each_other():
    draw = Draw()
    draw.set_position(0, 0)
    twin = copy.copy(draw)
    draw.set_position(0, 1)
    expected = draw([0])
    draw.set_position(0, 1)
    twin.set_position(0, 2)
    twin([0])
    assert torch.equal(draw([0]), expected)


def test_a_positioned_collator_survives_pickling():
    draw = Draw()
    draw.set_position(1, 2)
    twin = pickle.loads(pickle.dumps(draw))
    assert torch.equal(twin([0]), draw([0]))


def test_unplaced_and_unseeded_it_draws_from_pytorchs_default_generator():
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    assert torch.equal(Draw()([0]), expected)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_gives_a_stream_of_its_own(seed):
    expected = torch.rand(4, generator=torch.Generator().manual_seed(seed))
    draw, state = Draw(seed), torch.get_rng_state()
    assert torch.equal(torch.cat([draw([0]), draw([0])]), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_from_outside_is_used():
    draw = Draw(seed=3)
    draw.generator = torch.Generator().manual_seed(9)
    assert torch.equal(draw([0]), torch.rand(2, generator=torch.Generator().manual_seed(9)))


@pytest.mark.parametrize("used_before", [False, True])
def test_worker_processes_draw_from_seed_plus_their_id(used_before):
    draw = Draw(seed=7)
    if used_before:
        draw([0])
    batches = list(DataLoader(range(4), batch_size=1, num_workers=2, collate_fn=draw))
    for worker in range(2):
        expected = torch.rand(4, generator=torch.Generator().manual_seed(7 + worker))
        assert torch.equal(torch.cat([batches[worker], batches[worker + 2]]), expected)


def test_which_collators_are_positioned(make_tokenizer):
    tokenizer = make_tokenizer()
    assert isinstance(DataCollatorForLanguageModeling(tokenizer), PositionedCollator)
    assert isinstance(DataCollatorForPermutationLanguageModeling(tokenizer), PositionedCollator)
    assert not isinstance(DataCollatorWithPadding(tokenizer), PositionedCollator)


@pytest.mark.parametrize(("place", "name"), [((0.5, 1), "seed"), ((1, "2"), "position")])
def test_places_are_integers(place, name):
    with pytest.raises(
        TypeError, match=rf"set_position: {name} must be an integer, got (float|str)"
    ):
        Draw().set_position(*place)
