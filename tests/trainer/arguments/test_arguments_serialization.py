"""Text, dict, JSON, copies and pickles; secrets stay out of the first three."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path

import pytest

from trainer.arguments import AcceleratorConfig, Seq2SeqTrainingArguments, TrainingArguments

TOKEN = "hf_do_not_show"


@dataclasses.dataclass
class WithSecrets(TrainingArguments):
    """Arguments of a user who adds secrets."""

    other_token: str | None = None
    service_api_key: str | None = None
    tokens: int = 3


RICH = {
    "output_dir": "out",
    "eval_strategy": "steps",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "accelerator_config": {"split_batches": True, "use_configured_state": True},
    "fsdp": "full_shard",
    "fsdp_config": {"version": 2},
    "report_to": ["wandb"],
    "debug": "underflow_overflow",
    "use_cpu": True,
    "warmup_ratio": 0.1,
    "label_names": ["a"],
    "parallelism_config": {"tp_size": 1},
}


@pytest.mark.row(27)
def test_dict_holds_plain_values():
    values = TrainingArguments(**RICH).to_dict()
    assert values["eval_strategy"] == "steps"
    assert type(values["eval_strategy"]) is str
    assert type(values["fsdp"][0]) is str
    assert values["accelerator_config"]["split_batches"] is True
    assert values["hub_token"] == "<HUB_TOKEN>"
    assert list(values) == [field.name for field in dataclasses.fields(TrainingArguments)]
    json.dumps(values)


def test_dict_is_that_of_the_peer():
    peer = pytest.importorskip("transformers").TrainingArguments
    given = {
        key: value
        for key, value in RICH.items()
        if key not in ("warmup_ratio", "parallelism_config")
    }
    given["accelerator_config"] = {"split_batches": True}
    theirs, ours = peer(**given).to_dict(), TrainingArguments(**given).to_dict()
    assert ours["accelerator_config"].pop("use_configured_state") is False
    assert {key: ours[key] for key in theirs} == theirs


@pytest.mark.row(27)
@pytest.mark.parametrize("given", [{}, RICH], ids=["default", "rich"])
def test_round_trip_through_dict_and_json(given):
    args = TrainingArguments(**given)
    assert TrainingArguments(**args.to_dict()) == args
    assert TrainingArguments(**json.loads(args.to_json_string())) == args
    assert args.to_json_string().startswith('{\n  "output_dir"')


def test_a_placeholder_is_no_token():
    args = TrainingArguments(hub_token=TOKEN)
    assert args.hub_token == TOKEN
    assert TrainingArguments(**args.to_dict()).hub_token is None


@pytest.mark.row(206)
def test_no_secret_is_shown():
    args = WithSecrets(
        "out", hub_token=TOKEN, other_token=TOKEN, service_api_key=TOKEN, use_cpu=True
    )
    shown = [str(args), repr(args), args.to_json_string(), str(args.to_sanitized_dict())]
    assert not any(TOKEN in text for text in shown)
    assert args.to_dict()["service_api_key"] == "<SERVICE_API_KEY>"
    assert args.to_dict()["tokens"] == 3
    assert repr(args).startswith("WithSecrets(\naccelerator_config={")
    assert "hub_token='<HUB_TOKEN>',\n" in repr(args)


def test_a_repr_of_the_user_is_kept():
    class Short:
        def __repr__(self):
            return "short"

    class Mine(Short, TrainingArguments):
        pass

    assert repr(Mine()) == "short"


@pytest.mark.row(27)
def test_sanitized_dict_has_scalars_and_text_only():
    values = TrainingArguments(per_device_train_batch_size=4, use_cpu=True).to_sanitized_dict()
    assert values["train_batch_size"] == 4
    assert values["eval_batch_size"] == 8
    assert values["report_to"] == "[]"
    assert values["data_seed"] == "None"
    assert values["fp16"] is False
    assert all(isinstance(value, bool | int | float | str) for value in values.values())


def test_data_types_and_paths_become_text():
    torch = pytest.importorskip("torch")
    args = TrainingArguments(lr_scheduler_kwargs={"a": {"dtype": torch.bfloat16}, "b": (1,)})
    assert args.to_dict()["lr_scheduler_kwargs"] == {"a": {"dtype": "bfloat16"}, "b": (1,)}
    args.optim_args = Path("x")
    assert json.loads(args.to_json_string())["optim_args"] == "x"


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        dataclasses.replace,
        *(lambda args, p=p: pickle.loads(pickle.dumps(args, p)) for p in (0, 2, 5)),
    ],
)
def test_copies_and_pickles(duplicate):
    args = WithSecrets(**RICH, hub_token=TOKEN)
    args.accelerator_config.use_configured_state = False
    args.parallelism_config = None
    assert args.world_size == 1
    other = duplicate(args)
    assert other == args
    assert other.hub_token == TOKEN
    assert "_device_cache" not in vars(other)
    assert other.world_size == 1


def test_replace_checks_again():
    args = TrainingArguments(eval_strategy="steps", logging_steps=5)
    assert dataclasses.replace(args, seed=1).eval_steps == 5
    with pytest.raises(ValueError, match="'x' is not a valid OptimizerNames"):
        dataclasses.replace(args, optim="x")


def test_seq2seq_writes_generation_settings_as_a_dict():
    class Config:
        def to_dict(self):
            return {"num_beams": 2}

    args = Seq2SeqTrainingArguments(generation_config=Config(), predict_with_generate=True)
    assert args.to_dict()["generation_config"] == {"num_beams": 2}
    again = Seq2SeqTrainingArguments(**args.to_dict())
    assert again.generation_config == {"num_beams": 2}
    assert again.predict_with_generate is True
    path = Seq2SeqTrainingArguments(generation_config=Path("folder"))
    assert path.to_dict()["generation_config"] == "folder"


def test_accelerator_config_as_a_dict():
    config = AcceleratorConfig(split_batches=True)
    assert AcceleratorConfig.from_dict(config.to_dict()) == config
    assert config.pop("use_configured_state") is False
    assert config.pop("use_configured_state", "gone") == "gone"
