"""The nine ``set_*`` methods."""

import dataclasses
import inspect

import pytest

from trainer.arguments import IntervalStrategy, OptimizerNames, TrainingArguments

# setter -> ({parameter: field}, {parameter: value to set}, fields it sets besides)
SETTERS = {
    "set_training": (
        {
            "learning_rate": "learning_rate",
            "batch_size": "per_device_train_batch_size",
            "weight_decay": "weight_decay",
            "num_epochs": "num_train_epochs",
            "max_steps": "max_steps",
            "gradient_accumulation_steps": "gradient_accumulation_steps",
            "seed": "seed",
            "gradient_checkpointing": "gradient_checkpointing",
        },
        [1e-3, 2, 0.5, 7.0, 9, 3, 1, True],
        {"do_train": True},
    ),
    "set_evaluate": (
        {
            "strategy": "eval_strategy",
            "steps": "eval_steps",
            "batch_size": "per_device_eval_batch_size",
            "accumulation_steps": "eval_accumulation_steps",
            "delay": "eval_delay",
            "loss_only": "prediction_loss_only",
        },
        ["epoch", 7, 2, 3, 4.0, True],
        {"do_eval": True},
    ),
    "set_testing": (
        {"batch_size": "per_device_eval_batch_size", "loss_only": "prediction_loss_only"},
        [2, True],
        {"do_predict": True},
    ),
    "set_save": (
        {
            "strategy": "save_strategy",
            "steps": "save_steps",
            "total_limit": "save_total_limit",
            "on_each_node": "save_on_each_node",
        },
        ["epoch", 7, 2, True],
        {},
    ),
    "set_logging": (
        {
            "strategy": "logging_strategy",
            "steps": "logging_steps",
            "report_to": "report_to",
            "level": "log_level",
            "first_step": "logging_first_step",
            "nan_inf_filter": "logging_nan_inf_filter",
            "on_each_node": "log_on_each_node",
            "replica_level": "log_level_replica",
        },
        ["epoch", 7, ["wandb"], "info", True, False, False, "error"],
        {},
    ),
    "set_push_to_hub": (
        {
            "model_id": "hub_model_id",
            "strategy": "hub_strategy",
            "token": "hub_token",
            "private_repo": "hub_private_repo",
            "always_push": "hub_always_push",
            "revision": "hub_revision",
        },
        ["me/it", "end", "secret", True, True, "dev"],
        {"push_to_hub": True},
    ),
    "set_optimizer": (
        {
            "name": "optim",
            "learning_rate": "learning_rate",
            "weight_decay": "weight_decay",
            "beta1": "adam_beta1",
            "beta2": "adam_beta2",
            "epsilon": "adam_epsilon",
            "args": "optim_args",
        },
        ["sgd", 1e-3, 0.5, 0.8, 0.9, 1e-6, "momentum=0.9"],
        {},
    ),
    "set_lr_scheduler": (
        {
            "name": "lr_scheduler_type",
            "num_epochs": "num_train_epochs",
            "max_steps": "max_steps",
            "warmup_steps": "warmup_steps",
        },
        ["cosine", 7.0, 9, 3],
        {},
    ),
    "set_dataloader": (
        {
            "train_batch_size": "per_device_train_batch_size",
            "eval_batch_size": "per_device_eval_batch_size",
            "drop_last": "dataloader_drop_last",
            "num_workers": "dataloader_num_workers",
            "pin_memory": "dataloader_pin_memory",
            "persistent_workers": "dataloader_persistent_workers",
            "prefetch_factor": "dataloader_prefetch_factor",
            "auto_find_batch_size": "auto_find_batch_size",
            "ignore_data_skip": "ignore_data_skip",
            "sampler_seed": "data_seed",
        },
        [2, 3, True, 4, False, True, 5, True, True, 6],
        {},
    ),
}


def values(args):
    return {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}


@pytest.mark.row(26)
@pytest.mark.parametrize("name", SETTERS)
def test_sets_exactly_its_fields_and_returns_self(name):
    fields, given, besides = SETTERS[name]
    args = TrainingArguments()
    before = values(args)
    returned = getattr(args, name)(**dict(zip(fields, given, strict=True)))
    assert returned is args
    expected = dict(zip(fields.values(), given, strict=True)) | besides
    assert values(args) == before | expected


@pytest.mark.row(26)
@pytest.mark.parametrize("name", [name for name in SETTERS if name != "set_push_to_hub"])
def test_left_out_parameters_are_the_defaults_of_the_fields(name):
    fields, _, besides = SETTERS[name]
    args = TrainingArguments()
    before = values(args)
    getattr(args, name)()
    changed = {key: value for key, value in values(args).items() if value != before[key]}
    # Evaluation is off by default, so that its number of steps has no effect.
    steps = {"eval_steps": 500} if name == "set_evaluate" else {}
    assert changed == steps | {key: value for key, value in besides.items() if key != "do_eval"}
    assert fields


@pytest.mark.parametrize("name", SETTERS)
def test_parameters_are_those_of_the_peer(name):
    peer = pytest.importorskip("transformers").TrainingArguments
    theirs = inspect.signature(getattr(peer, name)).parameters
    assert list(inspect.signature(getattr(TrainingArguments, name)).parameters) == list(theirs)


def test_evaluate_without_delay_can_be_compared_with_a_step():
    args = TrainingArguments().set_evaluate("epoch", delay=None)
    assert args.eval_delay == 0
    assert args.do_eval is True
    assert args.set_evaluate("no").do_eval is False


def test_names_become_enum_members():
    args = TrainingArguments().set_evaluate("steps").set_optimizer("sgd")
    assert args.eval_strategy is IntervalStrategy.STEPS
    assert args.optim is OptimizerNames.SGD


@pytest.mark.row(209)
@pytest.mark.parametrize("report_to", [None, "none", [], ["none"]])
def test_logging_normalises_trackers(report_to):
    assert TrainingArguments().set_logging(report_to=report_to).report_to == []


@pytest.mark.parametrize("name", ["set_evaluate", "set_save", "set_logging"])
def test_steps_must_not_be_zero(name):
    with pytest.raises(ValueError, match=f"{name}: strategy 'steps' needs a non-zero steps, got 0"):
        getattr(TrainingArguments(), name)(strategy="steps", steps=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda args: args.set_logging(level="loud"), "log_level: 'loud' is not valid"),
        (lambda args: args.set_dataloader(prefetch_factor=2), "set dataloader_num_workers > 0"),
        (lambda args: args.set_training(gradient_accumulation_steps=0), "must be at least 1"),
        (lambda args: args.set_lr_scheduler("greedy"), "set an eval strategy"),
        (lambda args: args.set_save("often"), "'often' is not a valid SaveStrategy"),
    ],
)
def test_a_failing_check_changes_nothing(call, message):
    args = TrainingArguments()
    before = values(args)
    with pytest.raises(ValueError, match=message):
        call(args)
    assert values(args) == before


def test_former_warmup_ratio_wins(caplog):
    args = TrainingArguments().set_lr_scheduler(warmup_steps=5, warmup_ratio=0.2)
    assert args.warmup_steps == 0.2
    assert "warmup_ratio is deprecated" in caplog.text


def test_the_cpu_needs_no_pinned_memory():
    assert TrainingArguments(use_cpu=True).set_dataloader().dataloader_pin_memory is False
