"""What construction fills in and converts."""

import dataclasses
import logging

import pytest

from trainer.arguments import (
    AcceleratorConfig,
    FSDPOption,
    IntervalStrategy,
    TrainingArguments,
    reporting,
)


def after(**given):
    """Return the fields that differ from those of arguments without options."""
    args, base = TrainingArguments(**given), TrainingArguments()
    return {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(args)
        if getattr(args, field.name) != getattr(base, field.name)
    }


@pytest.mark.row(21, 57)
@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({"eval_strategy": "epoch"}, {"eval_strategy": IntervalStrategy.EPOCH, "do_eval": True}),
        (
            {"eval_strategy": "steps", "logging_steps": 7},
            {"eval_strategy": "steps", "do_eval": True, "eval_steps": 7, "logging_steps": 7},
        ),
        (
            {"eval_strategy": "steps", "eval_steps": 0},
            {"eval_strategy": "steps", "do_eval": True, "eval_steps": 500},
        ),
        ({"eval_strategy": False}, {}),
        ({"logging_steps": 10.0}, {"logging_steps": 10}),
        ({"save_steps": 0.5}, {"save_steps": 0.5}),
        ({"save_steps": -1}, {"save_steps": -1}),
        (
            {"metric_for_best_model": "f1"},
            {"metric_for_best_model": "f1", "greater_is_better": True},
        ),
        (
            {"metric_for_best_model": "eval_loss"},
            {"metric_for_best_model": "eval_loss", "greater_is_better": False},
        ),
        (
            {"save_strategy": "best", "load_best_model_at_end": True},
            {
                "save_strategy": "best",
                "load_best_model_at_end": True,
                "metric_for_best_model": "loss",
                "greater_is_better": False,
            },
        ),
        ({"include_num_input_tokens_seen": True}, {"include_num_input_tokens_seen": "all"}),
        ({"include_num_input_tokens_seen": False}, {}),
        (
            {"torch_compile_backend": "eager"},
            {"torch_compile": True, "torch_compile_backend": "eager"},
        ),
        ({"torch_compile": True}, {"torch_compile": True, "torch_compile_backend": "inductor"}),
        ({"use_cpu": True}, {"use_cpu": True, "dataloader_pin_memory": False}),
        ({"eval_delay": None}, {}),
        ({"report_to": None}, {}),
        ({"report_to": ["none"]}, {}),
        ({"report_to": "wandb"}, {"report_to": ["wandb"]}),
        ({"fsdp": "full_shard offload"}, {"fsdp": [FSDPOption.FULL_SHARD, FSDPOption.OFFLOAD]}),
        ({"fsdp": False}, {}),
        ({"liger_kernel_config": '{"rope": true}'}, {"liger_kernel_config": {"rope": True}}),
        ({"deepspeed": '{"zero": {"stage": "2"}}'}, {"deepspeed": {"zero": {"stage": 2}}}),
        ({"deepspeed": "ds.json"}, {"deepspeed": "ds.json"}),
        (
            {"accelerator_config": '{"even_batches": "false"}'},
            {"accelerator_config": AcceleratorConfig(even_batches=False)},
        ),
        ({"hub_token": "<HUB_TOKEN>"}, {}),
    ],
    ids=str,
)
def test_changes_of_construction(given, changed):
    assert after(**given) == changed


@pytest.mark.row(88)
def test_plateau_tracks_the_loss():
    args = TrainingArguments(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="epoch")
    assert (args.metric_for_best_model, args.greater_is_better) == ("loss", False)


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert TrainingArguments("~/runs").output_dir == "/home/someone/runs"


def test_output_dir_must_be_a_path():
    with pytest.raises(TypeError, match="output_dir must be a path, got 3"):
        TrainingArguments(output_dir=3)


@pytest.mark.row(40)
def test_former_names_warn_and_are_moved(caplog):
    args = TrainingArguments(warmup_ratio=0.1, warmup_steps=5, logging_dir="logs")
    assert (args.warmup_steps, args.warmup_ratio) == (0.1, None)
    assert "give the fraction as warmup_steps" in caplog.text
    assert "TENSORBOARD_LOGGING_DIR" in caplog.text
    assert dataclasses.replace(args, warmup_steps=7).warmup_steps == 7


def test_progress_bar_depends_on_the_level():
    assert TrainingArguments().disable_tqdm is False
    logger = logging.getLogger("trainer")
    try:
        logger.setLevel(logging.ERROR)
        assert TrainingArguments().disable_tqdm is True
        assert TrainingArguments(disable_tqdm=False).disable_tqdm is False
    finally:
        logger.setLevel(logging.NOTSET)


def test_normalizing_again_changes_nothing():
    args = TrainingArguments(
        "~/x",
        eval_strategy="steps",
        fsdp="full_shard",
        report_to="wandb",
        debug="underflow_overflow",
    )
    before = dict(vars(args))
    args.normalize()
    assert vars(args) == before


def test_all_trackers_are_the_installed_ones(monkeypatch):
    installed = {"wandb", "azureml.core", "mlflow", "flytekit"}
    monkeypatch.setattr(reporting, "_importable", lambda module: module in installed)
    assert TrainingArguments(report_to="all").report_to == ["mlflow", "wandb"]
    installed.remove("mlflow")
    assert TrainingArguments(report_to=["all"]).report_to == ["azure_ml", "wandb"]


def test_a_folder_of_that_name_is_not_a_tracker(tmp_path, monkeypatch):
    (tmp_path / "no_such_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not reporting._importable("no_such_tracker")
    assert not reporting._importable("no_such_parent.child")
    assert reporting._importable("json")


def test_kubeflow_is_added_inside_its_jobs(monkeypatch):
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "http://server")
    assert TrainingArguments(report_to="none").report_to == ["kubeflow"]
    assert TrainingArguments(report_to=["wandb", "kubeflow"]).report_to == ["wandb", "kubeflow"]
    monkeypatch.setenv("DISABLE_KUBEFLOW_INTEGRATION", "true")
    assert TrainingArguments().report_to == []


def test_checkpoint_format_from_the_environment(monkeypatch):
    monkeypatch.setenv("TRAINER_CHECKPOINT_FORMAT", "hf")
    assert TrainingArguments().checkpoint_format == "hf"
    assert TrainingArguments(checkpoint_format="safe").checkpoint_format == "safe"
    monkeypatch.setenv("TRAINER_CHECKPOINT_FORMAT", "zip")
    with pytest.raises(ValueError, match=r"TRAINER_CHECKPOINT_FORMAT must be one of 'safe', 'hf'"):
        TrainingArguments()


def test_fsdp_config_from_a_file(tmp_path):
    path = tmp_path / "fsdp.json"
    path.write_text('{"fsdp_transformer_layer_cls_to_wrap": "Block", "xla": true}')
    args = TrainingArguments(fsdp="full_shard auto_wrap", fsdp_config=str(path))
    assert args.fsdp_config == {
        "transformer_layer_cls_to_wrap": ["Block"],
        "xla": True,
        "min_num_params": 0,
        "xla_fsdp_v2": False,
        "xla_fsdp_grad_ckpt": False,
    }
