"""Label smoothing: the formula, shifting, and sums that do not depend on how a window is split."""

import math
import sys
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.peer import tiny
from trainer.smoothing import LabelSmoother, shifts_labels

CLASSES = 7


def data(rows: int = 8, length: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and labels, of which row i ignores the first i % length."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, CLASSES, generator=generator)
    labels = torch.randint(0, CLASSES, (rows, length), generator=generator)
    for i in range(rows):
        labels[i, : i % length] = -100
    return logits, labels


def by_hand(logits: Tensor, labels: Tensor, epsilon: float, shift: bool) -> float:
    """The mean over kept positions of (1 - e) * -log p[label] + e * mean(-log p), one by one."""
    costs = []
    length = labels.shape[1]
    for row in range(labels.shape[0]):
        for at in range(length - shift):
            label = int(labels[row, at + shift])
            if label == -100:
                continue
            scores = [math.exp(v) for v in logits[row, at].tolist()]
            minus_logs = [-math.log(score / sum(scores)) for score in scores]
            costs.append((1 - epsilon) * minus_logs[label] + epsilon * sum(minus_logs) / CLASSES)
    return sum(costs) / len(costs)


@pytest.mark.row(13)
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 1.0])
def test_the_formula(epsilon: float, shift: bool) -> None:
    logits, labels = data()
    loss = LabelSmoother(epsilon)({"logits": logits}, labels, shift_labels=shift)
    assert loss.item() == pytest.approx(by_hand(logits, labels, epsilon, shift), rel=1e-6)


def test_without_smoothing_it_is_cross_entropy() -> None:
    logits, labels = data()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(LabelSmoother(0.0)(logits, labels), expected)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("epsilon", [0.1, 0.37])
def test_the_plain_case_has_the_bits_of_transformers(epsilon: float, shift: bool) -> None:
    theirs = pytest.importorskip("transformers.trainer_pt_utils").LabelSmoother(epsilon)
    results = []
    for smoother in (LabelSmoother(epsilon), theirs):
        logits, labels = data()
        logits.requires_grad_()
        loss = smoother({"logits": logits}, labels, shift)
        loss.backward()
        results.append((loss, logits.grad))
    (mine, my_grad), (other, other_grad) = results
    assert torch.equal(mine, other)
    assert torch.equal(my_grad, other_grad)


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_micro_batches_add_up_to_the_loss_of_the_window(parts: int, shift: bool) -> None:
    """Parts keep different numbers of labels, so a mean of means would be another number."""
    smoother = LabelSmoother(0.2)
    logits, labels = data()
    window = [{"labels": part} for part in labels.chunk(parts)]
    items = smoother.count(window, shift)
    logits.requires_grad_()
    whole = smoother(logits, labels, shift)
    (expected,) = torch.autograd.grad(whole, logits)

    pairs = zip(logits.chunk(parts), labels.chunk(parts), strict=True)
    total = sum(smoother(part, kept, shift, num_items_in_batch=items) for part, kept in pairs)
    assert isinstance(total, Tensor)
    total.backward()

    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits.grad, expected, rtol=1e-5, atol=1e-8)
    if parts > 1:
        means = [
            smoother(part, kept, shift)
            for part, kept in zip(logits.chunk(parts), labels.chunk(parts), strict=True)
        ]
        assert abs(sum(means) / parts - whole) > 1e-3


def test_items_may_be_a_number_or_a_tensor() -> None:
    logits, labels = data()
    smoother = LabelSmoother()
    total = smoother(logits, labels, num_items_in_batch=10)
    assert torch.equal(smoother(logits, labels, num_items_in_batch=torch.tensor(10)), total)
    torch.testing.assert_close(smoother(logits, labels, num_items_in_batch=20) * 2, total)


def test_counting() -> None:
    labels = torch.tensor([[1, 2, -100], [-100, 3, 4]])
    window = [{"labels": labels}, {"labels": labels[:1]}]
    assert LabelSmoother().count(window) == 6
    assert LabelSmoother().count(window, shift_labels=True) == 4
    assert LabelSmoother(ignore_index=3).count(window) == 8
    for nothing in ([], [{"x": labels}], [labels], [{"labels": [1, 2]}], [window[0], {}]):
        assert LabelSmoother().count(nothing) is None


def test_a_part_without_labels_adds_nothing_and_a_whole_is_nan() -> None:
    logits, labels = data()
    nothing = torch.full_like(labels, -100)
    assert LabelSmoother()(logits, nothing, num_items_in_batch=4) == 0
    assert LabelSmoother()(logits, nothing).isnan()


def test_where_logits_are_found_and_which_forms_labels_have() -> None:
    logits, labels = data()
    smoother = LabelSmoother()
    expected = smoother(logits, labels)
    for outputs in (OrderedDict(hidden=0, logits=logits), (logits, 0), [logits]):
        assert torch.equal(smoother(outputs, labels), expected)
    assert torch.equal(smoother(logits, labels.unsqueeze(-1)), expected)
    assert torch.equal(smoother(logits, labels.int()), expected)
    other = LabelSmoother(ignore_index=250)
    assert torch.equal(other(logits, labels.masked_fill(labels == -100, 250)), expected)


def test_half_logits_are_summed_in_float32() -> None:
    logits, labels = data(rows=400)
    half = logits.bfloat16()
    loss = LabelSmoother()(half, labels)
    assert loss.dtype is torch.float32
    assert torch.equal(loss, LabelSmoother()(half.float(), labels))
    assert LabelSmoother()(logits.double(), labels).dtype is torch.float64


def test_errors() -> None:
    logits, labels = data()
    smoother = LabelSmoother()
    with pytest.raises(ValueError, match=r"needs the model's logits.*keys hidden, x.*factor=0"):
        smoother({"hidden": logits, "x": logits}, labels)
    with pytest.raises(ValueError, match="it returned a tuple without any"):
        smoother((), labels)
    with pytest.raises(ValueError, match=r"labels \(8,\) of torch.int64 and logits \(8, 5, 7\)"):
        smoother(logits, labels[:, 0])
    with pytest.raises(ValueError, match=r"whole numbers.*torch.float32.*factor=0"):
        smoother(logits, labels.float())
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            LabelSmoother(wrong)


class MyForCausalLM(nn.Module):
    """A causal language model by its name."""


class Adapted(nn.Module):
    """Has its model inside, as PEFT does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def get_base_model(self) -> nn.Module:
        return self.inner


@pytest.mark.row(13)
def test_causal_language_models() -> None:
    assert shifts_labels(MyForCausalLM())
    assert shifts_labels(nn.DataParallel(MyForCausalLM()))
    assert shifts_labels(Adapted(MyForCausalLM()))
    assert not shifts_labels(nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_causal_language_models_of_transformers(name: str) -> None:
    model: Any = tiny(name)
    assert shifts_labels(model)
    derived = type("MyModel", (type(model),), {})
    assert shifts_labels(derived(model.config))
    assert not shifts_labels(model.base_model)


def test_a_masked_language_model_is_not_shifted() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.BertConfig(vocab_size=9, intermediate_size=8, **small)
    assert not shifts_labels(transformers.BertForMaskedLM(config))
    assert "transformers" in sys.modules
