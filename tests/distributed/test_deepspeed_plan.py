"""What ``deepspeed`` asks for, filled from the arguments, and what is refused; without DeepSpeed."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.shell import make_args, make_trainer
from trainer.arguments import deepspeed as configuration
from trainer.arguments.deepspeed import filled, finished, raw_config
from trainer.distributed import deepspeed_plan
from trainer.distributed.deepspeed_plan import Zero

AUTO = "auto"

EVERYTHING: dict[str, Any] = {
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
    "gradient_accumulation_steps": AUTO,
    "gradient_clipping": AUTO,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": AUTO,
            "warmup_max_lr": AUTO,
            "warmup_num_steps": AUTO,
            "total_num_steps": AUTO,
        },
    },
    "fp16": {"enabled": AUTO},
    "bf16": {"enabled": AUTO},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": AUTO,
        "stage3_prefetch_bucket_size": AUTO,
        "stage3_param_persistence_threshold": AUTO,
        "overlap_comm": AUTO,
    },
}


def arguments(folder: Path, config: Any = None, **changes: Any) -> Any:
    """Arguments that differ from every default that they fill in."""
    options: dict[str, Any] = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 5,
        "max_grad_norm": 0.7,
        "learning_rate": 0.01,
        "adam_beta1": 0.8,
        "adam_beta2": 0.9,
        "adam_epsilon": 1e-6,
        "weight_decay": 0.2,
        "warmup_steps": 0.1,
        "bf16": True,
        **changes,
    }
    return make_args(folder, deepspeed=EVERYTHING if config is None else config, **options)


def model(**config: Any) -> Any:
    """Something with a configuration."""
    return SimpleNamespace(config=SimpleNamespace(**config))


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # as without DeepSpeed


@pytest.mark.row(164)
def test_auto_values_are_those_of_the_arguments(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    before = json.dumps(args.deepspeed)
    config = finished(args, filled(args, raw_config(args), 2), model(hidden_size=16), 200)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 5
    assert config["train_batch_size"] == 30
    assert config["gradient_clipping"] == 0.7
    adam = {"lr": 0.01, "betas": [0.8, 0.9], "eps": 1e-6, "weight_decay": 0.2}
    assert config["optimizer"]["params"] == adam
    assert config["scheduler"]["params"] == {
        "warmup_min_lr": 0,
        "warmup_max_lr": 0.01,
        "warmup_num_steps": 20,
        "total_num_steps": 200,
    }
    assert config["bf16"] == {"enabled": True}
    assert config["fp16"] == {"enabled": False}
    assert json.dumps(args.deepspeed) == before  # the user's own is left alone


@pytest.mark.row(164, 170)
def test_what_is_left_out_is_filled_in_too(tmp_path: Path) -> None:
    config = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}
    args = arguments(tmp_path, {**config, "scheduler": {"type": "WarmupLR", "params": {}}})
    found = finished(args, filled(args, raw_config(args), 4), model(), 200)
    assert found["train_batch_size"] == 60
    assert found["gradient_clipping"] == 0.7
    assert found["optimizer"]["params"]["lr"] == 0.01
    assert found["optimizer"]["params"]["betas"] == [0.8, 0.9]
    assert found["scheduler"]["params"] == {"warmup_max_lr": 0.01, "warmup_num_steps": 20}
    assert Zero(found).half == "bfloat16"
    assert "fp16" not in found
    plain = arguments(tmp_path, {"zero_optimization": {"stage": 1}}, bf16=False)
    found = filled(plain, raw_config(plain), 1)
    assert Zero(found).half is None
    assert found["zero_allow_untested_optimizer"]  # ours


@pytest.mark.row(163)
def test_a_file_and_text(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    for given in (str(path), path.read_text()):
        assert raw_config(arguments(tmp_path, given)) == {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match="deepspeed: expected a dict, JSON text or the path"):
        raw_config(arguments(tmp_path, "nothing.json"))
    with pytest.raises(ValueError, match=r"stage must be 1, 2 or 3, got 0.*leave deepspeed out"):
        raw_config(arguments(tmp_path, {"zero_optimization": {"stage": 0}}))


@pytest.mark.row(165)
def test_all_values_that_disagree_are_named(tmp_path: Path) -> None:
    config = {
        "train_batch_size": 7,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.5, "betas": [0.8, 0.9]}},
        "bf16": {"enabled": False},
        "zero_optimization": {"stage": 1},
    }
    args = arguments(tmp_path, config)
    with pytest.raises(ValueError, match="values disagree with the arguments") as raised:
        filled(args, raw_config(args), 2)
    text = str(raised.value)
    assert "train_batch_size=7 in the configuration" in text
    assert "2 processes=30" in text
    assert "gradient_clipping=1.0 in the configuration, max_grad_norm=0.7" in text
    assert "optimizer.params.lr=0.5 in the configuration, learning_rate=0.01" in text
    assert "bf16.enabled=False in the configuration, bf16=True" in text
    assert "betas" not in text
    assert '"auto"' in text
    steps = {"type": "WarmupLR", "params": {"warmup_num_steps": 3}}
    args = arguments(tmp_path, {"zero_optimization": {"stage": 1}, "scheduler": steps})
    with pytest.raises(
        ValueError, match="warmup_num_steps=3 in the configuration, warmup_steps=20"
    ):
        finished(args, filled(args, raw_config(args), 2), model(), 200)


@pytest.mark.row(166)
@pytest.mark.parametrize(
    "given",
    [
        {"hidden_size": 16},
        {"hidden_sizes": [8, 16, 4]},
        {"text_config": SimpleNamespace(hidden_size=16)},
    ],
)
def test_sizes_of_buckets(given: dict[str, Any], tmp_path: Path) -> None:
    args = arguments(tmp_path)
    config = finished(args, filled(args, raw_config(args), 2), model(**given), 9)
    assert config["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 256,
        "stage3_prefetch_bucket_size": 230,
        "stage3_param_persistence_threshold": 160,
    }


@pytest.mark.row(166)
def test_sizes_that_cannot_be_told(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    config = filled(args, raw_config(args), 2)
    with pytest.raises(ValueError, match=r'reduce_bucket_size, .*cannot be "auto".*hidden_size'):
        finished(args, config, SimpleNamespace(), 9)
    odd = {"zero_optimization": {"stage": 2}, "prescale_gradients": AUTO}
    args = arguments(tmp_path, odd)
    with pytest.raises(ValueError, match='nothing says what "auto" is for prescale_gradients'):
        finished(args, filled(args, raw_config(args), 2), SimpleNamespace(), 9)


@pytest.mark.row(167, 169)
def test_offload_takes_our_optimizer(tmp_path: Path) -> None:
    offload = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}}
    for section, expected in ((offload, False), ({"stage": 3}, None)):
        args = arguments(tmp_path, {"zero_optimization": section})
        config = filled(args, raw_config(args), 2)
        assert config.get("zero_force_ds_cpu_optimizer") is expected
    assert Zero(config).partitions
    assert not Zero(config).gathers


@pytest.mark.row(177)
def test_what_accelerate_put_into_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = make_args(tmp_path)
    assert not configuration.asked(args)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "true")
    config = filled(args, raw_config(args), 2)
    assert configuration.asked(args)
    assert configuration.offloads(config)
    assert Zero(config).partitions
    assert Zero(config).gathers
    assert config["gradient_clipping"] == args.max_grad_norm
    # The argument goes first.
    args = make_args(tmp_path, deepspeed={"zero_optimization": {"stage": 1}})
    assert Zero(raw_config(args)).stage == 1


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"auto_find_batch_size": True}, "auto_find_batch_size would need another engine"),
    ({"exact_reduction": True}, "exact_reduction adds up whole gradients"),
    ({"on_nonfinite": "skip"}, "on_nonfinite='skip' judges gradients"),
    ({"async_save": True}, "async_save: DeepSpeed saves its state itself"),
    ({"checkpoint_format": "hf"}, "checkpoint_format"),
    ({"log_digest_steps": 1}, "log_digest_steps needs the whole state"),
    ({"save_on_each_node": True}, "save_on_each_node would leave a part"),
    ({"torch_compile": True}, "torch_compile does not reach"),
    ({"bf16_full_eval": True}, "bf16_full_eval and fp16_full_eval"),
    ({"save_only_model": True}, "stage3_gather_16bit_weights_on_model_save: true"),
    ({"optim": "adafactor"}, "optim=adafactor needs whole rows or matrices"),
    ({"optim": "schedule_free_adamw"}, "optim=schedule_free_adamw evaluates with other weights"),
]


@pytest.mark.row(167)
@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_does_not_go_together(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, deepspeed={"zero_optimization": {"stage": 3}}, **changes)


@pytest.mark.row(169)
def test_two_optimizers_or_schedules_are_one_too_many(tmp_path: Path) -> None:
    both = {"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR", "params": {}}}
    args = make_args(tmp_path, deepspeed={"zero_optimization": {"stage": 1}, **both})
    with pytest.raises(ValueError, match="has an optimizer, and Trainer was given one") as raised:
        deepspeed_plan.plan(args, (object(), object()), None)
    assert "has a scheduler, and Trainer was given one" in str(raised.value)


@pytest.mark.parametrize(
    "asked", [{"fsdp": ["full_shard"]}, {"parallelism_config": {"dp_shard_size": 2}}]
)
def test_one_of_two_ways_to_distribute_the_model(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = {"deepspeed": None, "fsdp": None, "fsdp_config": None, "world_size": 2}
    args = SimpleNamespace(**(nothing | asked))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="fsdp and deepspeed both distribute the model"):
        deepspeed_plan.plan(args, (None, None), None)


def test_a_missing_library_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"DS_BUILD_OPS=0 pip install .*trainstep\[deepspeed\]"):
        make_trainer(tmp_path, deepspeed={"zero_optimization": {"stage": 1}})
