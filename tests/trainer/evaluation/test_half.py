"""Evaluation with weights in half precision, and without a trace of it afterwards."""

from collections import UserDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainstep as ts
from support.peer import both, texts, tiny
from support.shell import At, Scored, make_trainer, samples, scored
from trainer.evaluation import cast_inputs, half_weights

TYPES = {"bf16_full_eval": torch.bfloat16, "fp16_full_eval": torch.float16}


class Typed(Scored):
    """Notes in which type it computes, and returns labels and counts as well."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.types: list[tuple[bool, torch.dtype]] = []
        self.register_buffer("scale", torch.full((2,), 1.1))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        self.calls += 1  # type: ignore[operator]
        output = super().forward(x, labels)
        output["logits"] = output["logits"] * self.scale
        self.types.append((self.training, output["logits"].dtype))
        return output


def memory(trainer: Any) -> dict[str, tuple[int, int]]:
    """Where the tensors of a trainer's model are, and who they are."""
    return {name: (id(t), t.data_ptr()) for name, t in tensors(trainer.model).items()}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.row(45, 204)
@pytest.mark.parametrize("flag", TYPES)
def test_weights_are_cast_for_the_evaluation_and_put_back(flag: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scored("mlp", Typed), **{flag: True})
    state, place = trainer.train_state, memory(trainer)
    before = {name: t.detach().clone() for name, t in tensors(trainer.model).items()}
    output = trainer.predict(samples(5))

    assert trainer.model.types == [(False, TYPES[flag])] * 2
    assert output.predictions.dtype.name == ("float32" if "bf16" in flag else "float16")
    assert output.label_ids.dtype.name == "float32"
    assert memory(trainer) == place
    for name, tensor in tensors(trainer.model).items():
        if name == "calls":
            assert int(tensor) == 2
        else:
            assert torch.equal(tensor, before[name])
    for name, parameter in trainer.model.named_parameters():
        assert state.params[name].data_ptr() == parameter.data_ptr()


def test_results_are_those_of_a_model_in_half_precision(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scored("mlp"), bf16_full_eval=True)
    output = trainer.predict(samples(4))
    x = torch.stack([row["x"] for row in samples(4)]).bfloat16()
    model = scored("mlp").bfloat16()
    with torch.no_grad():
        wanted = model(x)["logits"]
    assert torch.equal(torch.from_numpy(output.predictions), wanted.float())
    assert (wanted.float() != scored("mlp")(x.float())["logits"]).any()


@pytest.mark.row(204)
def test_training_before_and_after_is_not_changed(tmp_path: Path) -> None:
    digests = []
    for changes in ({}, {"bf16_full_eval": True}):
        trainer = make_trainer(tmp_path, scored("mlp", Typed), **changes)
        if changes:
            trainer.evaluate()
        trainer.train()
        if changes:
            trainer.evaluate()
        trainer.train()
        digests.append(ts.digest(trainer.train_state.evolve(buffers={})))
    assert digests[0] == digests[1]


@pytest.mark.row(45)
def test_evaluations_during_training_keep_their_type(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, scored("mlp", Typed), bf16_full_eval=True, eval_strategy="epoch"
    )
    trainer.train()
    assert {dtype for training, dtype in trainer.model.types if not training} == {torch.float32}
    trainer.evaluate()
    assert trainer.model.types[-1] == (False, torch.bfloat16)


def test_weights_are_put_back_after_a_failure(tmp_path: Path) -> None:
    def fail(control: Any) -> None:
        raise KeyError("stop")

    trainer = make_trainer(
        tmp_path, bf16_full_eval=True, callbacks=[At("prediction_step", 0, fail)]
    )
    place = memory(trainer)
    with pytest.raises(KeyError, match="stop"):
        trainer.evaluate()
    assert memory(trainer) == place
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    loss, _, _ = trainer.prediction_step(trainer.model, {"x": torch.ones(1, 4)}, False)
    assert loss is None  # computed with its own weights again: a half input would be refused


@pytest.mark.parametrize("name", ["tied", "gru"])
def test_tied_weights_and_recurrent_modules(name: str) -> None:
    model = scored(name).eval()
    x = samples(2)[0]["x"][None]
    before = model(x)["logits"]
    place = {n: t.data_ptr() for n, t in tensors(model).items()}
    with half_weights(model, torch.bfloat16), torch.no_grad():
        inside = model(x.bfloat16())["logits"]
    assert inside.dtype is torch.bfloat16
    assert torch.equal(model(x)["logits"], before)
    assert {n: t.data_ptr() for n, t in tensors(model).items()} == place


def test_gradients_and_their_hooks_survive() -> None:
    model = nn.Linear(2, 1)
    fired: list[str] = []
    model.weight.register_hook(lambda grad: fired.append("before"))
    model.weight.register_post_accumulate_grad_hook(lambda p: fired.append("after"))
    model(torch.ones(1, 2)).sum().backward()
    grad = model.weight.grad
    with half_weights(model, torch.float16), torch.no_grad():
        model(torch.ones(1, 2).half())
    assert model.weight.grad is grad
    model(torch.ones(1, 2)).sum().backward()
    assert fired == ["before", "after"] * 2
    assert model.weight.grad is not None
    assert model.weight.grad.tolist() == [[2, 2]]


def test_language_models_are_evaluated_in_half_precision(tmp_path: Path) -> None:
    results = {}
    for dtype in (None, torch.bfloat16):
        trainer = make_trainer(
            tmp_path,
            tiny("llama"),
            evaluation=texts(4),
            bf16_full_eval=dtype is not None,
        )
        results[dtype] = trainer.evaluate()["eval_loss"]
        assert all(p.dtype is torch.float32 for p in trainer.model.parameters())
    assert results[None] != results[torch.bfloat16]
    assert results[None] == pytest.approx(results[torch.bfloat16], rel=0.02)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_predictions_are_those_of_the_hugging_face_trainer(name: str, tmp_path: Path) -> None:
    ours, other = both(
        tmp_path, tiny(name), lambda t: t.predict(texts(6, ignored=2)), bf16_full_eval=True
    )
    assert (ours.result.predictions == other.result.predictions).all()
    assert ours.result.metrics["test_loss"] == other.result.metrics["test_loss"]
    types = [{p.dtype for p in side.trainer.model.parameters()} for side in (ours, other)]
    assert types == [{torch.float32}, {torch.bfloat16}]  # theirs stays so


def test_inputs_are_cast_at_any_depth_and_labels_spared() -> None:
    one = torch.ones(1)
    pair = namedtuple("Pair", "x labels")
    batch = {
        "x": one,
        "ids": torch.ones(1, dtype=torch.int64),
        "labels": one,
        "more": [one, {"x": one, "labels": [one]}, (one, "text")],
        "pair": pair(one, None),
    }
    cast = cast_inputs(UserDict(batch), torch.bfloat16, ["labels"])
    assert type(cast) is UserDict
    half = torch.bfloat16
    assert [cast["x"].dtype, cast["ids"].dtype] == [half, torch.int64]
    assert cast["labels"].dtype == torch.float32
    first, inner, (second, text) = cast["more"]
    assert [first.dtype, inner["x"].dtype, second.dtype, text] == [half, half, half, "text"]
    assert inner["labels"][0].dtype == torch.float32
    assert type(cast["pair"]) is pair
    assert cast["pair"].x.dtype == half
    assert cast_inputs(one, half, ()).dtype == half
