"""Every field of the arguments can be set from the command line."""

import contextlib
import dataclasses
import importlib.metadata
import io
import json

import pytest

from trainer.arguments import AcceleratorConfig, HfArgumentParser, Seq2SeqTrainingArguments

# field -> (words after the option, value after construction)
SAMPLES = {
    "output_dir": ("runs", "runs"),
    "per_device_train_batch_size": ("3", 3),
    "num_train_epochs": ("1.5", 1.5),
    "max_steps": ("7", 7),
    "learning_rate": ("1e-3", 1e-3),
    "lr_scheduler_type": ("cosine", "cosine"),
    "lr_scheduler_kwargs": ('{"num_cycles":2}', {"num_cycles": 2}),
    "warmup_steps": ("0.25", 0.25),
    "optim": ("sgd", "sgd"),
    "optim_args": ("momentum=0.9", "momentum=0.9"),
    "weight_decay": ("0.1", 0.1),
    "adam_beta1": ("0.8", 0.8),
    "adam_beta2": ("0.95", 0.95),
    "adam_epsilon": ("1e-6", 1e-6),
    "optim_target_modules": ("attn mlp", ["attn", "mlp"]),
    "gradient_accumulation_steps": ("4", 4),
    "average_tokens_across_devices": ("no", False),
    "max_grad_norm": ("0.5", 0.5),
    "label_smoothing_factor": ("0.1", 0.1),
    "bf16": ("", True),
    "fp16": ("", True),
    "bf16_full_eval": ("", True),
    "fp16_full_eval": ("true", True),
    "tf32": ("", True),
    "gradient_checkpointing": ("", True),
    "gradient_checkpointing_kwargs": ('{"use_reentrant":false}', {"use_reentrant": False}),
    "torch_compile": ("", True),
    "torch_compile_backend": ("eager", "eager"),
    "torch_compile_mode": ("default", "default"),
    "use_liger_kernel": ("", True),
    "liger_kernel_config": ('{"rope":true}', {"rope": True}),
    "use_cache": ("", True),
    "neftune_noise_alpha": ("5", 5.0),
    "torch_empty_cache_steps": ("3", 3),
    "auto_find_batch_size": ("", True),
    "logging_strategy": ("epoch", "epoch"),
    "logging_steps": ("0.1", 0.1),
    "logging_first_step": ("", True),
    "log_on_each_node": ("false", False),
    "logging_nan_inf_filter": ("0", False),
    "include_num_input_tokens_seen": ("non_padding", "non_padding"),
    "log_level": ("info", "info"),
    "log_level_replica": ("error", "error"),
    "disable_tqdm": ("true", True),
    "report_to": ("wandb tensorboard", ["wandb", "tensorboard"]),
    "run_name": ("mine", "mine"),
    "project": ("mine", "mine"),
    "trackio_space_id": ("me/space", "me/space"),
    "trackio_bucket_id": ("me/bucket", "me/bucket"),
    "trackio_static_space_id": ("False", False),
    "eval_strategy": ("epoch", "epoch"),
    "eval_steps": ("50", 50),
    "eval_delay": ("2", 2.0),
    "per_device_eval_batch_size": ("3", 3),
    "prediction_loss_only": ("", True),
    "eval_on_start": ("", True),
    "eval_do_concat_batches": ("n", False),
    "eval_use_gather_object": ("", True),
    "eval_accumulation_steps": ("4", 4),
    "include_for_metrics": ("inputs loss", ["inputs", "loss"]),
    "batch_eval_metrics": ("", True),
    "save_only_model": ("", True),
    "save_strategy": ("best", "best"),
    "save_steps": ("20", 20),
    "save_on_each_node": ("", True),
    "save_total_limit": ("2", 2),
    "enable_jit_checkpoint": ("", True),
    "push_to_hub": ("", True),
    "hub_token": ("secret", "secret"),
    "hub_private_repo": ("", True),
    "hub_model_id": ("me/it", "me/it"),
    "hub_strategy": ("end", "end"),
    "hub_always_push": ("", True),
    "hub_revision": ("dev", "dev"),
    "load_best_model_at_end": ("--save_strategy best", True),
    "metric_for_best_model": ("f1", "f1"),
    "greater_is_better": ("", True),
    "ignore_data_skip": ("", True),
    "restore_callback_states_from_checkpoint": ("", True),
    "full_determinism": ("", True),
    "seed": ("1", 1),
    "data_seed": ("2", 2),
    "use_cpu": ("", True),
    "accelerator_config": ('{"split_batches":true}', AcceleratorConfig(split_batches=True)),
    "parallelism_config": ('{"tp_size":2}', {"tp_size": 2}),
    "dataloader_drop_last": ("", True),
    "dataloader_num_workers": ("2", 2),
    "dataloader_pin_memory": ("false", False),
    "dataloader_persistent_workers": ("", True),
    "dataloader_prefetch_factor": ("2 --dataloader_num_workers 1", 2),
    "remove_unused_columns": ("false", False),
    "label_names": ("a b", ["a", "b"]),
    "train_sampling_strategy": ("sequential", "sequential"),
    "length_column_name": ("size", "size"),
    "ddp_find_unused_parameters": ("false", False),
    "ddp_bucket_cap_mb": ("10", 10),
    "ddp_broadcast_buffers": ("true", True),
    "ddp_static_graph": ("", True),
    "ddp_backend": ("gloo", "gloo"),
    "ddp_timeout": ("60", 60),
    "fsdp": ("full_shard auto_wrap", ["full_shard", "auto_wrap"]),
    "fsdp_config": (
        '{"version":2,"xla":false}',
        {
            "version": 2,
            "xla": False,
            "min_num_params": 0,
            "xla_fsdp_v2": False,
            "xla_fsdp_grad_ckpt": False,
        },
    ),
    "deepspeed": ('{"train_batch_size":"auto"}', {"train_batch_size": "auto"}),
    "debug": ("underflow_overflow tpu_metrics_debug", ["underflow_overflow", "tpu_metrics_debug"]),
    "skip_memory_metrics": ("false", False),
    "do_train": ("", True),
    "do_eval": ("", True),
    "do_predict": ("", True),
    "resume_from_checkpoint": ("runs/checkpoint-5", "runs/checkpoint-5"),
    "warmup_ratio": ("0.1", None),
    "logging_dir": ("logs", "logs"),
    "local_rank": ("0", 0),
    "sortish_sampler": ("", True),
    "predict_with_generate": ("", True),
    "generation_max_length": ("9", 9),
    "generation_num_beams": ("2", 2),
    "generation_config": ("folder", "folder"),
    "capture": ("off", "off"),
    "exact_reduction": ("", True),
    "on_nonfinite": ("skip", "skip"),
    "async_save": ("", True),
    "checkpoint_format": ("hf", "hf"),
    "log_digest_steps": ("100", 100),
    "log_figures": ("", True),
    "peak_tflops": ("989.5", 989.5),
}

# What the peer cannot set, or sets to something else than asked for.
PEER_CANNOT = {
    "include_num_input_tokens_seen",
    "liger_kernel_config",
    "report_to",
    "optim_target_modules",
    "tf32",
    "greater_is_better",
    "hub_private_repo",
    "ddp_static_graph",
    "trackio_static_space_id",
    "parallelism_config",
    "fsdp",
}
# What the peer sets, but looks up in the environment, or keeps in another place.
PEER_DIFFERS = {
    "ddp_backend",
    "warmup_ratio",
    "deepspeed",
    "generation_config",
    "accelerator_config",
    "bf16_full_eval",
}
PEER_KNOWS = [
    name
    for name in list(SAMPLES)[: list(SAMPLES).index("capture")]
    if name not in PEER_CANNOT | PEER_DIFFERS
]


@pytest.fixture(scope="module")
def parser():
    return HfArgumentParser(Seq2SeqTrainingArguments)


@pytest.fixture(scope="module")
def peer():
    transformers = pytest.importorskip("transformers")
    if importlib.metadata.version("transformers") != "5.6.1":
        pytest.skip("the options were compared with version 5.6.1")
    return transformers.HfArgumentParser(transformers.Seq2SeqTrainingArguments)


def test_there_is_a_sample_for_every_field():
    assert set(SAMPLES) == {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)}


@pytest.mark.row(25, 208)
@pytest.mark.parametrize("dashed", [False, True], ids=["underscores", "dashes"])
@pytest.mark.parametrize("name", SAMPLES)
def test_every_field_can_be_set(parser, name, dashed):
    words, expected = SAMPLES[name]
    option = f"--{name.replace('_', '-') if dashed else name}"
    (args,) = parser.parse_args_into_dataclasses([option, *words.split()], look_for_args_file=False)
    assert getattr(args, name) == expected
    default = getattr(Seq2SeqTrainingArguments(), name)
    assert name == "warmup_ratio" or getattr(args, name) != default


def test_warmup_ratio_arrives_as_warmup_steps(parser):
    (args,) = parser.parse_args_into_dataclasses(
        ["--warmup_ratio", "0.1"], look_for_args_file=False
    )
    assert args.warmup_steps == 0.1


@pytest.mark.parametrize("name", PEER_KNOWS)
def test_what_the_peer_can_set_has_the_same_value(parser, peer, name):
    argv = [f"--{name}", *SAMPLES[name][0].split()]
    if name in ("bf16", "tf32"):
        argv.append("--use_cpu")
    (theirs,) = peer.parse_args_into_dataclasses(argv, look_for_args_file=False)
    (ours,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.row(208)
@pytest.mark.parametrize("name", sorted(PEER_CANNOT))
def test_what_the_peer_cannot_set(peer, name):
    words, expected = SAMPLES[name]
    quiet = contextlib.redirect_stderr(io.StringIO())
    try:
        with quiet:
            (theirs,) = peer.parse_args_into_dataclasses(
                [f"--{name}", *words.split()], look_for_args_file=False
            )
    except (SystemExit, TypeError, ValueError):
        return
    assert getattr(theirs, name) != expected


@pytest.mark.row(25)
def test_every_field_parses_from_dict_and_json(parser, tmp_path):
    path = tmp_path / "arguments.json"
    for name, (_, expected) in SAMPLES.items():
        value = expected.to_dict() if isinstance(expected, AcceleratorConfig) else expected
        extra = {"dataloader_num_workers": 1} if name == "dataloader_prefetch_factor" else {}
        extra |= {"save_strategy": "best"} if name == "load_best_model_at_end" else {}
        values = extra | {name: value}
        path.write_text(json.dumps(values))
        assert getattr(parser.parse_dict(values)[0], name) == expected, name
        assert getattr(parser.parse_json_file(path)[0], name) == expected, name


@pytest.mark.parametrize(
    ("argv", "name", "expected"),
    [
        ("--optim_target_modules all-linear", "optim_target_modules", "all-linear"),
        ("--report_to none", "report_to", []),
        ("--report_to wandb", "report_to", ["wandb"]),
        ("--include_num_input_tokens_seen", "include_num_input_tokens_seen", "all"),
        ("--include_num_input_tokens_seen no", "include_num_input_tokens_seen", "no"),
        ("--trackio_static_space_id me/space", "trackio_static_space_id", "me/space"),
        ("--tf32 no", "tf32", False),
        ("--no_remove_unused_columns", "remove_unused_columns", False),
        ("--no-skip-memory-metrics", "skip_memory_metrics", False),
        ("--eval_str epoch", "eval_strategy", "epoch"),
        ("--fsdp full_shard", "fsdp", ["full_shard"]),
    ],
)
def test_other_spellings(parser, argv, name, expected):
    (args,) = parser.parse_args_into_dataclasses(argv.split(), look_for_args_file=False)
    assert getattr(args, name) == expected


def test_options_in_one_word(parser):
    argv = ["--fsdp", "full_shard auto_wrap", "--debug", "underflow_overflow"]
    (args,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    assert args.fsdp == ["full_shard", "auto_wrap"]
    assert args.debug == ["underflow_overflow"]


@pytest.mark.parametrize(
    "argv", ["--optim x", "--lr_scheduler_type x", "--log_level x", "--ddp_backend x"]
)
def test_unknown_choice_leaves_with_a_list(parser, argv, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(argv.split(), look_for_args_file=False)
    assert "invalid choice: 'x' (choose from" in capsys.readouterr().err


def test_help_can_be_formatted(parser):
    text = parser.format_help()
    assert "--no_remove_unused_columns" in text
    assert "Peak learning rate, which the schedule scales. (default: 5e-05)" in " ".join(
        text.split()
    )
