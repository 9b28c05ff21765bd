"""Errors and warnings of construction."""

import dataclasses
import json

import pytest

from trainer.arguments import AcceleratorConfig, TrainingArguments

BEST = {"load_best_model_at_end": True, "eval_strategy": "steps"}

ERRORS = [
    (
        {"torch_empty_cache_steps": 0},
        "torch_empty_cache_steps must be a positive whole number, got 0",
    ),
    ({"torch_empty_cache_steps": 1.5}, "torch_empty_cache_steps: expected a whole number, got 1.5"),
    ({"logging_steps": 0}, "logging_strategy 'steps' needs a non-zero logging_steps, got 0"),
    (
        {"eval_strategy": "steps", "logging_strategy": "no", "logging_steps": 0},
        "eval_strategy 'steps' needs eval_steps or logging_steps",
    ),
    ({"logging_steps": 10.5}, "logging_steps must be an integer if bigger than 1"),
    ({"save_steps": 10.5}, "save_steps must be an integer if bigger than 1"),
    ({"save_steps": float("inf")}, "save_steps must be an integer if bigger than 1"),
    ({"save_steps": None}, "save_strategy 'steps' needs save_steps, got None"),
    (
        {"eval_strategy": "steps", "eval_steps": 1.5},
        "eval_steps must be an integer if bigger than 1",
    ),
    (BEST | {"save_strategy": "epoch"}, "to be the same .*got 'steps' and 'epoch'"),
    (BEST | {"eval_steps": 200}, "500 is not a multiple of 200"),
    (BEST | {"eval_steps": 0.2, "save_steps": 0.3}, "0.3 is not a multiple of 0.2"),
    (BEST | {"eval_steps": 0.1}, "a fraction and a number of updates: save_steps=500"),
    ({"fp16": True, "bf16": True}, "fp16 and bf16 exclude each other"),
    ({"fp16_full_eval": True, "bf16_full_eval": True}, "fp16_full_eval and bf16_full_eval exclude"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "'reduce_lr_on_plateau' follows an evaluation"),
    ({"lr_scheduler_type": "greedy"}, "set an eval strategy"),
    ({"warmup_steps": -1}, "warmup_steps must be a number of updates.*got -1"),
    ({"warmup_steps": float("nan")}, "warmup_steps must be a number of updates.*got nan"),
    ({"dataloader_prefetch_factor": 2}, "set dataloader_num_workers > 0"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers must be at least 0, got -1"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
    ({"eval_accumulation_steps": 0}, "eval_accumulation_steps must be at least 1, got 0"),
    ({"eval_strategy": "often"}, "eval_strategy: 'often' is not a valid .*'no', 'steps', 'epoch'"),
    ({"logging_strategy": "best"}, "logging_strategy: 'best' is not a valid IntervalStrategy"),
    ({"save_strategy": "x"}, "save_strategy: 'x' is not a valid .*'no', 'steps', 'epoch', 'best'"),
    ({"hub_strategy": "x"}, "hub_strategy: 'x' is not a valid .*'end', 'every_save'"),
    ({"lr_scheduler_type": "x"}, "lr_scheduler_type: 'x' is not a valid .*'linear', 'cosine'"),
    ({"optim": "adamw"}, "optim: 'adamw' is not a valid .*'adamw_torch'"),
    ({"debug": "everything"}, "debug: 'everything' is not a valid .*'underflow_overflow'"),
    ({"fsdp": "full shard"}, "'full' is not a valid FSDPOption"),
    ({"train_sampling_strategy": "x"}, "one of 'random', 'sequential', 'group_by_length'"),
    ({"log_level": "loud"}, "log_level: 'loud' is not valid; choose one of 'detail', 'debug'"),
    ({"log_level_replica": "loud"}, "log_level_replica: 'loud' is not valid"),
    ({"ddp_backend": "smoke"}, "ddp_backend: 'smoke' is not valid; choose one of 'nccl', 'gloo'"),
    ({"include_num_input_tokens_seen": "x"}, "one of 'all', 'non_padding', 'no'"),
    ({"include_for_metrics": ["inputs", "x"]}, "include_for_metrics: 'x' .*'inputs', 'loss'"),
    ({"report_to": "foo"}, "report_to: 'foo' is not a tracker.*'azure_ml'.*'all', 'none'"),
    ({"capture": "x"}, "capture: 'x' is not valid; choose one of 'auto', 'off'"),
    ({"on_nonfinite": "x"}, "one of 'ignore', 'skip', 'raise'"),
    ({"checkpoint_format": "x"}, "one of 'safe', 'hf'"),
    ({"log_digest_steps": -1}, "log_digest_steps must be at least 0"),
    ({"peak_tflops": 0}, "peak_tflops must be above 0: .* got 0"),
    ({"peak_tflops": -989.0}, "peak_tflops must be above 0: .* got -989.0"),
    ({"peak_tflops": float("nan")}, "peak_tflops must be above 0: .* got nan"),
    ({"peak_tflops": float("inf")}, "peak_tflops must be above 0: .* got inf"),
    ({"peak_tflops": "fast"}, "peak_tflops: expected a number, got 'fast'"),
    ({"fsdp": "offload"}, "'offload' does not work alone"),
    ({"fsdp": "full_shard shard_grad_op"}, "exclude each other"),
    (
        {
            "fsdp": "full_shard",
            "fsdp_config": {"min_num_params": 1, "transformer_layer_cls_to_wrap": "Block"},
        },
        "min_num_params and transformer_layer_cls_to_wrap exclude each other",
    ),
    (
        {
            "fsdp": "full_shard",
            "fsdp_config": {"cpu_ram_efficient_loading": "true", "sync_module_states": "false"},
        },
        "needs sync_module_states",
    ),
    ({"fsdp_config": "missing.json"}, "fsdp_config: expected a dict, JSON text or the path"),
    ({"lr_scheduler_kwargs": "power=2"}, "lr_scheduler_kwargs: expected a dict, JSON text"),
    ({"deepspeed": '{"zero'}, "deepspeed: expected a JSON object"),
]


@pytest.mark.row(24, 41, 46, 57, 87, 207)
@pytest.mark.parametrize(("given", "message"), ERRORS, ids=lambda value: str(value)[:60])
def test_error(given, message):
    with pytest.raises(ValueError, match=message):
        TrainingArguments(**given)


@pytest.mark.parametrize(
    "given",
    [
        BEST | {"eval_steps": 100},
        BEST | {"eval_steps": 0.1, "save_steps": 0.3},
        BEST | {"eval_steps": 0.1, "save_strategy": "best"},
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
        {"save_steps": 0},
        {"logging_strategy": "no", "logging_steps": 0},
        {"logging_strategy": "epoch", "logging_steps": 10.5},
        {"dataloader_prefetch_factor": 2, "dataloader_num_workers": 1},
        {"warmup_steps": 0.3},
        {"bf16": True},
        {"tf32": True},
    ],
    ids=str,
)
def test_these_are_fine(given):
    TrainingArguments(**given)


@pytest.mark.row(59)
def test_class_as_accelerator_config():
    with pytest.raises(NotImplementedError, match=r"got the class AcceleratorConfig; pass Accel"):
        TrainingArguments(accelerator_config=AcceleratorConfig)


def test_unknown_key_in_accelerator_config(tmp_path):
    message = r"unknown keys \['bogus'\]; valid keys are split_batches, dispatch_batches"
    with pytest.raises(TypeError, match=message):
        TrainingArguments(accelerator_config={"bogus": 1})
    path = tmp_path / "accelerator.json"
    path.write_text(json.dumps({"bogus": 1}))
    with pytest.raises(ValueError, match=message):
        TrainingArguments(accelerator_config=str(path))
    path.write_text(json.dumps({"split_batches": True}))
    args = TrainingArguments(accelerator_config=str(path))
    assert args.accelerator_config == AcceleratorConfig(split_batches=True)
    with pytest.raises(TypeError, match="got int"):
        TrainingArguments(accelerator_config=3)


def test_fsdp_config_without_fsdp_warns():
    with pytest.warns(UserWarning, match="min_num_params has no effect without fsdp"):
        TrainingArguments(fsdp_config={"min_num_params": 3})


def test_gradient_checkpointing_with_full_shard_warns(caplog):
    TrainingArguments(fsdp="full_shard", gradient_checkpointing=True)
    assert "set activation_checkpointing in fsdp_config" in caplog.text


def test_non_blocking_without_pinned_memory_warns(caplog):
    config = {"non_blocking": True}
    TrainingArguments(accelerator_config=config)
    assert not caplog.text
    TrainingArguments(accelerator_config=config, dataloader_pin_memory=False)
    assert "non_blocking has no effect" in caplog.text


def test_choices_of_a_subclass_are_checked_too():
    @dataclasses.dataclass
    class Mine(TrainingArguments):
        mode: str = dataclasses.field(default="a", metadata={"choices": ["a", "b"]})

    assert Mine(mode="b").mode == "b"
    with pytest.raises(ValueError, match="mode: 'c' is not valid; choose one of 'a', 'b'"):
        Mine(mode="c")
