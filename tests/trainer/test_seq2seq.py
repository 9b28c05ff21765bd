"""``Seq2SeqTrainer``: evaluation and prediction by generating."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import trainstep as ts
from support.generation import bart, padded, pairs, t5
from support.peer import texts, tiny
from support.shell import logged, options, scored
from trainer import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments

transformers = pytest.importorskip("transformers")

# What generate says where nothing limits the length.
pytestmark = pytest.mark.filterwarnings("ignore:Using the model-agnostic default")


def make(folder: Path, model: Any = None, more: Any = None, **changes: Any) -> Seq2SeqTrainer:
    settings = {"predict_with_generate": True, "per_device_eval_batch_size": 2} | changes
    args = Seq2SeqTrainingArguments(**options(folder, **settings))
    given = {"train_dataset": pairs(6), "eval_dataset": pairs(5, seed=1)} | (more or {})
    return Seq2SeqTrainer(t5() if model is None else model, args, **given)


def generated(model: Any, rows: list[Any], **settings: Any) -> list[list[int]]:
    """Generate for samples one by one, without what follows the end."""
    end, pad = model.config.eos_token_id, model.config.pad_token_id
    model.eval()
    return [trim(model.generate(r["input_ids"][None], **settings)[0], end, pad) for r in rows]


def trim(row: Any, end: int, pad: int) -> list[int]:
    ids = [int(i) for i in row]
    while ids and ids[-1] == pad:
        ids.pop()
    return ids


def trimmed(predictions: Any, model: Any) -> list[list[int]]:
    return [trim(row, model.config.eos_token_id, model.config.pad_token_id) for row in predictions]


@pytest.mark.row(130)
@pytest.mark.parametrize("build", [t5, bart])
def test_every_sample_is_generated_once_and_in_order(build: Any, tmp_path: Path) -> None:
    data = pairs(5, seed=1)
    trainer = make(tmp_path, build())
    output = trainer.predict(data)

    wanted = generated(trainer.model, data)
    assert trimmed(output.predictions, trainer.model) == wanted
    assert len({len(row) for row in wanted}) > 1  # else widths would not be tested
    assert output.predictions.shape == output.label_ids.shape
    pad = trainer.model.config.pad_token_id
    for row, sample in zip(output.label_ids, data, strict=True):
        assert row.tolist() == [*sample["labels"].tolist(), *[pad] * (len(row) - 5)]


def test_the_loss_is_that_of_an_evaluation_without_generating(tmp_path: Path) -> None:
    data = [{**row, "decoder_input_ids": row["labels"].roll(1)} for row in pairs(5)]
    losses = set()
    for changes in ({}, {"label_smoothing_factor": 0.3}):
        seen: list[Any] = []

        def note(prediction: Any, seen: list[Any] = seen) -> dict[str, Any]:
            seen.append(prediction)
            return {}

        by_generating = make(tmp_path, more={"compute_metrics": note}, **changes).evaluate(data)
        plain = make(tmp_path, predict_with_generate=False, **changes).evaluate(data)

        assert by_generating["eval_loss"] == plain["eval_loss"]
        assert seen[0].predictions.dtype == np.int64
        losses.add(plain["eval_loss"])
    assert len(losses) == 2


def test_without_metrics_there_is_nothing_to_generate_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(tmp_path)
    monkeypatch.setattr(trainer.model, "generate", None)
    assert trainer.evaluate()["eval_loss"] > 0


def widths(output: Any) -> tuple[int, int]:
    return output.predictions.shape[1], output.label_ids.shape[1]


@pytest.mark.row(130, 131)
@pytest.mark.parametrize(
    ("args", "call", "labels", "width"),
    [
        ({"generation_max_length": 7}, {}, 5, 7),
        ({"generation_max_length": 7}, {"max_length": 9}, 5, 9),
        ({"generation_max_length": 7}, {"max_new_tokens": 9}, 5, 10),
        ({"generation_max_length": 7}, {"max_length": None, "num_beams": None}, 5, 7),
        ({}, {"max_new_tokens": 3}, 5, 5),
        ({}, {"max_new_tokens": 3}, 40, 40),
    ],
)
def test_widths_follow_the_limit_and_the_labels(
    args: Any, call: Any, labels: int, width: int, tmp_path: Path
) -> None:
    output = make(tmp_path, **args).predict(pairs(5, labels=labels), **call)
    assert widths(output) == (width, width)


def test_sequences_that_end_early_are_filled_up_to_the_limit(tmp_path: Path) -> None:
    short = pairs(6)[:2]
    trainer = make(tmp_path, bart())
    assert max(map(len, generated(trainer.model, short))) < 20
    for call, width in (({}, 20), ({"max_length": 30}, 30), ({"max_new_tokens": 30}, 31)):
        assert widths(trainer.predict(short, **call)) == (width, width)  # type: ignore[arg-type]


def test_widths_follow_generation_settings(tmp_path: Path) -> None:
    config = transformers.GenerationConfig(
        max_new_tokens=6, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0
    )
    assert widths(make(tmp_path, generation_config=config).predict(pairs(5))) == (7, 7)
    call = {"generation_config": copy.deepcopy(config)}
    call["generation_config"].max_new_tokens = 8
    assert widths(make(tmp_path).predict(pairs(5), **call)) == (9, 9)


def test_batches_of_different_widths_are_filled_with_the_pad_token(tmp_path: Path) -> None:
    data = [pairs(1, length=3 + i, labels=2 + 4 * i, seed=i)[0] for i in range(4)]
    trainer = make(tmp_path, bart(), {"data_collator": padded}, generation_max_length=6)
    output = trainer.predict(data)

    assert widths(output) == (14, 14)
    assert not (output.predictions == -100).any()
    assert output.label_ids[0].tolist()[2:] == [-100] * 4 + [1] * 8  # the collator's, then ours
    assert output.label_ids[3].tolist() == data[3]["labels"].tolist()


@pytest.mark.row(131, 132)
def test_beams_and_other_options_reach_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []
    trainer = make(
        tmp_path,
        generation_num_beams=3,
        generation_max_length=8,
        more={"compute_metrics": lambda p: {}},
    )
    generate = trainer.model.generate

    def note(input_ids: Tensor, **given: Any) -> Tensor:
        calls.append(given)
        return generate(input_ids, **given)

    monkeypatch.setattr(trainer.model, "generate", note)
    trainer.evaluate()
    trainer.evaluate(num_beams=2, max_new_tokens=4)
    trainer.predict(pairs(1), max_length=5, repetition_penalty=1.5)
    trainer.evaluate({"a": pairs(1), "b": pairs(1)}, num_beams=2)
    trainer.prediction_step(trainer.model, padded(pairs(2)), False, num_beams=5)  # type: ignore[arg-type]

    usual = {"num_beams": 3, "max_length": 8}
    assert calls[:3] == [usual] * 3
    assert calls[3:6] == [{"num_beams": 2, "max_new_tokens": 4}] * 3
    assert calls[6] == {"max_length": 5, "repetition_penalty": 1.5, "num_beams": 3}
    assert calls[7:9] == [{"num_beams": 2, "max_length": 8}] * 2  # in both datasets
    assert {k: calls[9][k] for k in usual} == {"num_beams": 5, "max_length": 8}
    assert len(calls) == 10


def test_several_sequences_of_a_sample_are_all_kept(tmp_path: Path) -> None:
    output = make(tmp_path).predict(pairs(5), num_beams=4, num_return_sequences=3)
    assert (len(output.predictions), len(output.label_ids)) == (15, 5)


def test_decoder_inputs_made_from_labels_are_no_beginning(tmp_path: Path) -> None:
    data = pairs(4, seed=1)
    shifted = [{**row, "decoder_input_ids": row["labels"].roll(1)} for row in data]
    begun = [{**row, "decoder_input_ids": torch.tensor([0, 7])} for row in data]
    trainer = make(tmp_path)

    plain = trainer.predict(data).predictions
    np.testing.assert_array_equal(trainer.predict(shifted).predictions, plain)
    blind = [{k: v for k, v in row.items() if k != "labels"} for row in begun]
    output = trainer.predict(blind)
    assert (output.predictions[:, :2] == [0, 7]).all()
    assert output.label_ids is None
    assert "test_loss" not in output.metrics


def test_generating_in_half_precision_leaves_the_weights_alone(tmp_path: Path) -> None:
    trainer = make(tmp_path, bart(), bf16_full_eval=True)
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    tokens = trainer.predict(pairs(3)).predictions
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    half = bart().bfloat16()
    assert trimmed(tokens, half) == generated(half, pairs(3))


def test_a_dict_of_outputs_is_understood(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    plain = trainer.predict(pairs(3)).predictions
    output = trainer.predict(pairs(3), return_dict_in_generate=True)
    np.testing.assert_array_equal(output.predictions, plain)


class Halved(Seq2SeqTrainer):
    """Overrides what one batch gives, and asks for something of its own."""

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss, tokens, labels = super().prediction_step(
            model, inputs, *args, max_new_tokens=2, **kwargs
        )
        return loss / 2, tokens + 1, labels  # type: ignore[operator]


def test_an_overridden_prediction_step_is_used(tmp_path: Path) -> None:
    usual = make(tmp_path).predict(pairs(4))
    args = Seq2SeqTrainingArguments(**options(tmp_path, predict_with_generate=True))
    output = Halved(t5(), args).predict(pairs(4))

    assert output.metrics["test_loss"] == pytest.approx(usual.metrics["test_loss"] / 2)
    np.testing.assert_array_equal(output.predictions[:, :3], usual.predictions[:, :3] + 1)


def test_generating_during_training_changes_nothing_in_it(tmp_path: Path) -> None:
    def accuracy(prediction: Any) -> dict[str, float]:
        predictions, labels = prediction
        return {"accuracy": float((predictions == labels)[labels != 0].mean())}

    trained = {}
    for strategy in ("no", "steps"):
        trainer = make(
            tmp_path / strategy,
            t5(dropout_rate=0.2),
            {"compute_metrics": accuracy},
            eval_strategy=strategy,
            eval_steps=1,
            num_train_epochs=2,
        )
        trainer.train()
        trained[strategy] = trainer
    assert len(logged(trained["steps"], "eval_accuracy")) == 6
    assert ts.digest(trained["no"].train_state) == ts.digest(trained["steps"].train_state)
    before = logged(trained["steps"], "eval_accuracy")[-1]
    assert trained["steps"].evaluate()["eval_accuracy"] == before


class Tokenizer:
    def __init__(self, pad: int | None, end: int | None = None) -> None:
        self.pad_token_id, self.eos_token_id = pad, end


def test_where_the_pad_token_comes_from(tmp_path: Path) -> None:
    row = torch.tensor([[5, 6]])
    for processor, pad in (
        (None, 0),
        (Tokenizer(9), 9),
        (Tokenizer(None, 8), 8),
        (Tokenizer(None), 0),
        (object(), 0),
    ):
        trainer = make(tmp_path, more={"processing_class": processor, "data_collator": padded})
        padded_row = trainer._pad_tensors_to_max_len(row, 4)
        assert padded_row.tolist() == [[5, 6, pad, pad]]
        assert trainer._pad_tensors_to_max_len(row, 2) is row
        assert padded_row.dtype == row.dtype


def test_without_a_pad_token_nothing_can_be_padded(tmp_path: Path) -> None:
    model = t5()
    trainer = make(tmp_path, model)
    model.config.pad_token_id = model.generation_config.pad_token_id = None  # type: ignore[union-attr]
    with pytest.raises(
        ValueError, match=r"no token to pad generated sequences.*model.config.pad_token_id = 0"
    ):
        trainer._pad_tensors_to_max_len(torch.tensor([[5]]), 2)


@pytest.mark.row(133)
def test_generation_settings_come_from_an_object_a_dict_a_folder_or_a_file(tmp_path: Path) -> None:
    config = transformers.GenerationConfig(max_length=9, num_beams=2, pad_token_id=0)
    config.save_pretrained(tmp_path / "settings")
    file = tmp_path / "other.json"
    file.write_text((tmp_path / "settings" / "generation_config.json").read_text())
    sources = (config, config.to_dict(), str(tmp_path / "settings"), tmp_path / "settings", file)
    for source in sources:
        trainer = make(tmp_path, generation_config=source)
        chosen: Any = trainer.model.generation_config
        assert (chosen.max_length, chosen.num_beams) == (9, 2)
        assert chosen is not config
    theirs = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, generation_config=config
    )
    model: Any = Seq2SeqTrainer(t5(), theirs).model  # type: ignore[arg-type]
    assert model.generation_config.max_length == 9


def test_every_model_of_a_model_init_gets_the_settings_and_they_are_saved(tmp_path: Path) -> None:
    config = transformers.GenerationConfig(max_length=9, pad_token_id=0)
    args = Seq2SeqTrainingArguments(**options(tmp_path, generation_config=config))
    trainer = Seq2SeqTrainer(args=args, model_init=lambda: t5(), train_dataset=pairs(4))
    first: Any = trainer.model
    trainer.train()
    second: Any = trainer.model

    assert second is not first
    assert second.generation_config.max_length == 9
    assert second.generation_config is not first.generation_config
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["max_length"] == 9


def test_generating_leaves_the_models_settings_alone(tmp_path: Path) -> None:
    trainer = make(tmp_path, generation_max_length=7)
    model: Any = trainer.model
    before = model.generation_config.to_dict()
    trainer.predict(pairs(3))
    assert model.generation_config.to_dict() == before


@pytest.mark.row(133)
@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        (
            ValueError,
            transformers.GenerationConfig(do_sample=False, top_p=0.9),
            r"(?s)generation_config: .*top_p.*Fix these issues to train your model",
        ),
        (OSError, "no/such/place", r"generation_config='no/such/place' is neither a file"),
        (TypeError, 3, r"a path or the name of a repository, got int"),
    ],
)
def test_invalid_settings_are_refused_at_construction(
    kind: type[Exception], source: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        make(tmp_path / "out", generation_config=source)
    assert not (tmp_path / "out").exists()


def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(OSError, match=r"broken.json' is neither a file with generation settings"):
        make(tmp_path, generation_config=tmp_path / "broken.json")


def test_a_plain_module_cannot_generate(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model that can generate.*Scored has no method generate"):
        make(tmp_path, scored())
    assert make(tmp_path, scored(), predict_with_generate=False)


def test_a_decoder_is_not_prompted_with_the_answer(tmp_path: Path) -> None:
    trainer = make(tmp_path, tiny("gpt2"))
    with pytest.raises(ValueError, match="GPT2LMHeadModel is decoder-only, and its input_ids hold"):
        trainer.predict(texts(2))
    prompts = [{"input_ids": row["input_ids"][:4]} for row in texts(2)]
    output = trainer.predict(prompts, max_new_tokens=3, pad_token_id=0)
    np.testing.assert_array_equal(
        output.predictions[:, :4], np.stack([row["input_ids"] for row in prompts])
    )


def test_arguments_without_generation_fields_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"takes trainer.Seq2SeqTrainingArguments.*got TrainingArg"):
        Seq2SeqTrainer(t5(), TrainingArguments(**options(tmp_path)))


def test_no_arguments_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = Seq2SeqTrainer(t5())
    assert isinstance(trainer.args, Seq2SeqTrainingArguments)
    assert trainer.args.output_dir == "tmp_trainer"
