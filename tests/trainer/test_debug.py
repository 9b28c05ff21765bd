"""The first infinity or NaN of a forward pass is found, with the modules that led to it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainstep as ts
from support.shell import Scored, make_trainer, scored
from trainer.debug import DebugUnderflowOverflow


class Scale(nn.Module):
    """Multiplies by a number that is no parameter."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def net(factor: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), Scale(factor), nn.Linear(3, 2))


@pytest.mark.row(111)
@pytest.mark.parametrize(("factor", "x"), [(1e39, 1.0), (float("nan"), 1.0), (1.0, float("inf"))])
def test_the_module_where_it_begins_is_named(factor: float, x: float) -> None:
    model = net(factor)
    watch = DebugUnderflowOverflow(model)
    place = "0 (Linear): input 0, output" if x == float("inf") else "2 (Scale): output"
    with pytest.raises(
        ValueError, match=re.escape(f"infinity or NaN in forward pass 0, in {place}.")
    ):
        model(torch.full((2, 4), x))
    names = [frame.module for frame in watch.frames]
    assert names == ["0 (Linear)", "1 (Tanh)", "2 (Scale)"][: 1 if x == float("inf") else 3]


def test_frames_hold_the_ranges_of_weights_inputs_and_outputs() -> None:
    model = net()
    with DebugUnderflowOverflow(model) as watch:
        x = torch.tensor([[-3.0, 1.0, 2.0, 0.5]])
        output = model(x)
    first, *_, last = watch.frames
    weight = model[0].weight.abs()
    found = {part.name: (part.low, part.high) for part in first.ranges}
    assert found["weight"] == (weight.min().item(), weight.max().item())
    assert found["input 0"] == (0.5, 3.0)
    assert list(found) == ["weight", "bias", "input 0", "output"]
    assert last.module == "the model (Sequential)"
    assert last.ranges[-1].high == output.abs().max().item()
    assert len(watch.frames) == 5
    model(x * 1e39)  # nobody watches any more
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    watch.detach()


def test_weights_that_are_not_finite_are_found_and_old_frames_go() -> None:
    model = net()
    watch = DebugUnderflowOverflow(model, max_frames_to_save=2)
    model(torch.ones(1, 4))
    with torch.no_grad():
        model[3].bias[0] = float("nan")
    with pytest.raises(
        ValueError, match=r"forward pass 1, in 3 \(Linear\): bias, output\.\nThe last 2 "
    ):
        model(torch.ones(1, 4))
    assert [frame.module for frame in watch.frames] == ["2 (Scale)", "3 (Linear)"]


class Nested(nn.Module):
    """Takes options and returns more than tensors."""

    def forward(self, x: Tensor, mask: Any = None, ids: Any = None) -> Any:
        return {"pair": (x, [x / 0]), "ids": ids, "none": None, "empty": x[:0]}


def test_nested_values_are_looked_into() -> None:
    model = Nested()
    watch = DebugUnderflowOverflow(model)
    with pytest.raises(ValueError, match=r"in the model \(Nested\): output\.pair\[1\]\[0\]\."):
        model(torch.ones(2), mask={"a": torch.zeros(2)}, ids=torch.ones(2, dtype=torch.int64))
    assert [part.name for part in watch.frames[0].ranges] == [
        *("input 0", "input mask.a", "output.pair[0]", "output.pair[1][0]"),
    ]


def test_forward_passes_can_be_printed_and_stopped_after(capsys: Any) -> None:
    model = net()
    DebugUnderflowOverflow(model, trace_batch_nums=[1], abort_after_batch_num=2)
    for _ in range(2):
        model(torch.ones(1, 4))
    shown = capsys.readouterr().out
    assert shown.count("forward pass 1\n") == 5
    assert re.search(r"  1 \(Tanh\)\n    \d\.\d\de[+-]\d\d \d\.\d\de[+-]\d\d  input 0\n", shown)
    with pytest.raises(ValueError, match="stopped after forward pass 2"):
        model(torch.ones(1, 4))


class Growing(Scored):
    """Overflows in its third forward pass."""

    calls = 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.calls += 1
        return super().forward(x * (1e39 if self.calls == 3 else 1), labels)


@pytest.mark.row(111)
def test_training_stops_with_the_frames_and_the_hooks_go(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scored("mlp", Growing), debug="underflow_overflow")
    with pytest.raises(
        ValueError, match=r"in forward pass 2, in body\.0 \(Linear\): input 0"
    ) as raised:
        trainer.train()
    assert "at step 2" in raised.value.__notes__[0]
    assert "the model (Growing)" in str(raised.value)  # of the forward pass before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())
    assert not trainer.is_in_train


def test_watching_changes_nothing(tmp_path: Path) -> None:
    digests = set()
    for debug in ("", "underflow_overflow"):
        trainer = make_trainer(tmp_path, debug=debug)
        trainer.train()
        digests.add(ts.digest(trainer.train_state))
    assert len(digests) == 1
