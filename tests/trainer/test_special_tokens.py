"""Special tokens go from the tokenizer into the model's configurations."""

import copy
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from support.peer import tiny
from trainer.special_tokens import align_special_tokens


def tokenizer(eos: Any = 2, bos: Any = 1, pad: Any = 0) -> Any:
    return SimpleNamespace(eos_token_id=eos, bos_token_id=bos, pad_token_id=pad)


class Configured(nn.Module):
    """A module with configurations."""

    def __init__(self, config: Any = None, generation: Any = None) -> None:
        super().__init__()
        self.config, self.generation_config = config, generation


def ids(holder: Any) -> tuple[Any, Any, Any]:
    return holder.eos_token_id, holder.bos_token_id, holder.pad_token_id


def test_differences_are_copied_and_told(caplog: pytest.LogCaptureFixture) -> None:
    model = Configured(tokenizer(5, 1, None), tokenizer(5, 1, None))
    with caplog.at_level(logging.WARNING, "trainer"):
        changes = align_special_tokens(model, tokenizer())
    assert changes == {"eos_token_id": 2, "pad_token_id": 0}
    assert ids(model.config) == (2, 1, 0)
    assert ids(model.generation_config) == ([2, 5], 1, 0)
    (message,) = caplog.messages
    assert message.endswith("now have the tokenizer's: eos_token_id=2, pad_token_id=0")


def test_nothing_is_done_or_told_where_all_agree(caplog: pytest.LogCaptureFixture) -> None:
    for eos in (2, [7, 2]):
        model = Configured(tokenizer(), tokenizer(eos))
        with caplog.at_level(logging.WARNING, "trainer"):
            assert align_special_tokens(model, tokenizer()) == {}
        assert model.generation_config.eos_token_id == eos
    assert not caplog.messages


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, [2]), (7, [2, 7]), ([7, 8], [2, 7, 8]), ([7, 2], [2, 7]), (2, [2])],
)
def test_the_ends_that_generation_had_are_kept(before: Any, after: list[int]) -> None:
    model = Configured(tokenizer(9), tokenizer(before))
    assert align_special_tokens(model, tokenizer()) == {"eos_token_id": 2}
    assert model.config.eos_token_id == 2
    assert model.generation_config.eos_token_id == after


def test_one_configuration_that_differs_is_enough() -> None:
    model = Configured(tokenizer(), tokenizer(bos=8))
    assert align_special_tokens(model, tokenizer()) == {"bos_token_id": 1}
    assert model.generation_config.bos_token_id == 1
    model = Configured(SimpleNamespace())
    assert align_special_tokens(model, tokenizer(None, 1, None)) == {"bos_token_id": 1}


def test_processors_wrappers_and_those_without_a_say() -> None:
    model = Configured(tokenizer(5))
    processor = SimpleNamespace(tokenizer=tokenizer())
    assert align_special_tokens(nn.DataParallel(model), processor) == {"eos_token_id": 2}
    for silent in (None, SimpleNamespace(), SimpleNamespace(size=224)):
        assert align_special_tokens(model, silent) == {}
    assert align_special_tokens(model, SimpleNamespace(eos_token_id=3)) == {"eos_token_id": 3}
    assert ids(model.config) == (3, 1, 0)
    for bare in (nn.Linear(1, 1), Configured(None), Configured({"eos_token_id": 1})):
        assert align_special_tokens(bare, tokenizer()) == {}


@pytest.mark.parametrize("eos", [0, 3, [0], [3, 0]])
@pytest.mark.parametrize("given", [(0, 0, None), (3, 0, 1), (5, None, 5), (None, 4, 1)])
def test_as_transformers_does(eos: Any, given: tuple[Any, Any, Any]) -> None:
    """But for an end that stays the only one: there ours keeps the number that there was."""
    align = pytest.importorskip("transformers.trainer_utils").align_special_tokens
    ours: Any = tiny("gpt2")
    ours.generation_config.eos_token_id = eos
    theirs = copy.deepcopy(ours)
    align_special_tokens(ours, tokenizer(*given))
    align(theirs, tokenizer(*given))

    assert ids(ours.config) == ids(theirs.config)
    mine, other = ids(ours.generation_config), ids(theirs.generation_config)
    assert mine[1:] == other[1:]
    ends = mine[0] if isinstance(mine[0], list) else [mine[0]]
    assert ends == list(dict.fromkeys(other[0]))
