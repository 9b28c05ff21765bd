"""Counting input tokens and operations."""

import logging
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.peer import tiny
from trainer import tokens
from trainer.tokens import TokenCounter, floating_point_ops

IDS = torch.tensor([[5, 6, 0, 0], [7, 0, 8, 9]])
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])


def counted(how: str, *batches: Any, **options: Any) -> int:
    counter = TokenCounter(how, **options)
    for batch in batches:
        counter.add(batch)
    return counter.total


@pytest.mark.row(61)
@pytest.mark.parametrize(
    ("how", "batch", "expected"),
    [
        ("all", {"input_ids": IDS, "attention_mask": MASK}, 8),
        ("non_padding", {"input_ids": IDS, "attention_mask": MASK}, 6),
        ("non_padding", {"input_ids": IDS, "attention_mask": MASK.bool()}, 6),
        ("non_padding", UserDict(input_ids=IDS), 5),
        ("non_padding", {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 4, 4)}, 5),
        ("no", {"input_ids": IDS}, 0),
        ("no", None, 0),
    ],
)
def test_one_batch(how: str, batch: Any, expected: int) -> None:
    assert counted(how, batch, pad_token_id=0) == expected


def test_batches_add_up_and_the_total_can_be_set() -> None:
    counter = TokenCounter("all")
    counter.total = 100
    for _ in range(3):
        counter.add({"input_ids": IDS})
    assert counter.total == 124
    assert isinstance(counter.total, int)


def test_another_main_input() -> None:
    batch = {"input_values": torch.zeros(2, 10), "input_ids": IDS}
    assert counted("all", batch, main_input_name="input_values") == 20


def test_a_missing_main_input_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    wrong: list[Any] = [{"x": IDS}, (IDS,), {"input_ids": [1, 2]}]
    with caplog.at_level(logging.WARNING, "trainer"):
        assert counted("all", *wrong, {"input_ids": IDS}) == 8
    (message,) = caplog.messages
    assert "no tensor 'input_ids'" in message


def test_without_mask_and_padding_all_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trainer"):
        assert counted("non_padding", {"input_ids": IDS}, {"input_ids": IDS}) == 16
    (message,) = caplog.messages
    assert "no attention_mask" in message
    assert "All tokens are counted" in message


def test_unknown_ways_to_count() -> None:
    with pytest.raises(ValueError, match="'some' is not valid; choose all, non_padding, no"):
        TokenCounter("some")


@pytest.mark.parametrize("how", ["all", "non_padding"])
def test_nothing_is_read_from_a_device_while_counting(how: str) -> None:
    """Reading a number from a meta tensor raises."""
    there = IDS.to("meta")
    counter = TokenCounter(how, pad_token_id=0)
    counter.add({"input_ids": there})
    counter.add({"input_ids": there})
    if how == "all":
        assert counter.total == 16
    else:
        with pytest.raises(RuntimeError, match="meta"):
            _ = counter.total


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_batches_on_a_gpu_are_read_only_when_asked() -> None:
    batch = {"input_ids": IDS.cuda(), "attention_mask": MASK.cuda()}
    counter = TokenCounter("non_padding")
    torch.cuda.set_sync_debug_mode("error")
    try:
        counter.add(batch)
        counter.add(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counter.total == 12


class Counting(nn.Module):
    """Says how many parameters it has, and counts how often it is asked."""

    def __init__(self, parameters: int = 10) -> None:
        super().__init__()
        self.parameters_told, self.asked = parameters, 0

    def num_parameters(self, exclude_embeddings: bool = False) -> int:
        assert exclude_embeddings
        self.asked += 1
        return self.parameters_told


def test_operations_are_estimated_and_parameters_counted_once() -> None:
    model = Counting()
    wrapped = nn.DataParallel(model)
    assert [floating_point_ops(m, {"input_ids": IDS}) for m in (model, model, wrapped)] == [480] * 3
    assert model.asked == 1
    assert floating_point_ops(Counting(3), {"input_ids": IDS}) == 144
    model.parameters_told = 20
    tokens.recount_parameters(wrapped)
    assert floating_point_ops(model, {"input_ids": IDS}) == 960
    assert model.asked == 2


def test_models_are_not_kept_alive() -> None:
    model = Counting()
    floating_point_ops(model, {"input_ids": IDS})
    assert model in tokens._parameters
    held = len(tokens._parameters)
    del model
    assert len(tokens._parameters) == held - 1


class Own(nn.Module):
    """Counts parameters in a way of its own."""

    def num_parameters(self) -> int:
        return 5


def test_what_cannot_be_estimated_is_zero() -> None:
    batch: dict[str, Tensor] = {"input_ids": IDS}
    assert floating_point_ops(nn.Linear(2, 2), batch) == 0
    assert floating_point_ops(Own(), batch) == 0
    assert floating_point_ops(Counting(), {"x": IDS}) == 0
    assert floating_point_ops(Counting(), IDS) == 0


@pytest.mark.row(113)
def test_a_model_of_transformers() -> None:
    model: Any = tiny("gpt2")
    embedded = model.transformer.wte.weight.numel() + model.transformer.wpe.weight.numel()
    others = sum(p.numel() for p in model.parameters()) - embedded
    assert floating_point_ops(model, {"input_ids": IDS}) == 6 * 8 * others
