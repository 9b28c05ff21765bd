"""Finding the loss in what models return, and counting labels."""

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch

from trainer.losses import count_label_items, loss_from_outputs

LOSS, LOGITS = torch.tensor(1.5), torch.zeros(2, 3)
Named = namedtuple("Named", "loss logits")


@pytest.mark.parametrize(
    "outputs",
    [
        {"loss": LOSS, "logits": LOGITS},
        OrderedDict(logits=LOGITS, loss=LOSS),
        (LOSS, LOGITS),
        [LOSS],
        Named(LOSS, LOGITS),
        LOSS,
    ],
)
def test_the_loss_is_found(outputs: Any) -> None:
    assert loss_from_outputs(outputs, {}) is LOSS


def test_a_missing_loss_lists_what_there_is() -> None:
    inputs = {"input_ids": LOGITS, "mask": LOGITS}
    for outputs in (
        {"logits": LOGITS, "hidden": LOGITS},
        {"logits": LOGITS, "hidden": 0, "loss": None},
    ):
        with pytest.raises(
            ValueError,
            match=r"did not return a loss.*keys logits, hidden.*had input_ids, mask.*labels",
        ):
            loss_from_outputs(outputs, inputs)
    with pytest.raises(ValueError, match="its inputs had Tensor"):
        loss_from_outputs({"logits": LOGITS}, LOGITS)


@pytest.mark.parametrize(
    ("outputs", "form"),
    [({"loss": torch.zeros(2)}, r"\(2,\)"), ((LOGITS, LOSS), r"\(2, 3\)"), ((0.5,), "float")],
)
def test_a_loss_that_is_no_scalar_tensor_is_refused(outputs: Any, form: str) -> None:
    with pytest.raises(ValueError, match=f"must be a zero-dimensional tensor, got {form}.*mean"):
        loss_from_outputs(outputs, {})


def test_labels_are_counted_over_the_window_without_ignored_ones() -> None:
    window = [{"labels": torch.tensor([[1, -100], [2, 3]])}, {"labels": torch.tensor([-100, 0])}]

    assert count_label_items(window) == 4
    assert count_label_items(window[1:]) == 1


@pytest.mark.parametrize(
    "window",
    [[], [torch.zeros(2)], [{"x": torch.zeros(2)}], [{"labels": [1, 2]}], [{"labels": {"a": 1}}]],
)
def test_nothing_is_counted_where_there_is_nothing_to_count(window: list[Any]) -> None:
    assert count_label_items(window) is None
