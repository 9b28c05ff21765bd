"""What ``fsdp`` and ``fsdp_config`` ask for, and what of it is refused; no process is started."""

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from support.ranks.sharded import Block, Stack
from trainer import TrainingArguments
from trainer.arguments.enums import FSDPOption
from trainer.distributed.fsdp import _by_size, _parts, _precision
from trainer.distributed.fsdp_environment import from_environment
from trainer.distributed.fsdp_plan import Sharding, check, sharding_of, wanted

NOTHING = (None, None)


def arguments(
    fsdp: Any = "full_shard", config: Any = None, *, size: int = 2, **changes: Any
) -> Any:
    """Arguments as if ``size`` processes had them."""
    args = TrainingArguments("", fsdp=fsdp, fsdp_config=config, use_cpu=True, report_to="none")
    names: tuple[str, ...] = (
        "gradient_checkpointing",
        "exact_reduction",
        "save_only_model",
        "save_on_each_node",
    )
    names += (
        "save_on_each_node",
        "load_best_model_at_end",
        "checkpoint_format",
        "bf16_full_eval",
        "fp16_full_eval",
    )
    names += ("optim", "log_digest_steps", "deepspeed", "fsdp", "fsdp_config")
    values = {name: getattr(args, name) for name in names}
    return SimpleNamespace(**{**values, "world_size": size, **changes})


@pytest.mark.row(148, 150, 151, 152)
@pytest.mark.parametrize(
    ("fsdp", "config", "expected"),
    [
        ("full_shard", None, {}),
        (True, None, {}),
        ("shard_grad_op", None, {"reshard": False, "kind": FSDPOption.SHARD_GRAD_OP}),
        ("no_shard", None, {"reshard": False, "kind": FSDPOption.NO_SHARD}),
        ("hybrid_shard", None, {"kind": FSDPOption.HYBRID_SHARD}),
        (
            "hybrid_shard_zero2",
            None,
            {"kind": FSDPOption.HYBRID_SHARD_ZERO2, "reshard": False},
        ),
        ("full_shard offload", None, {"offload": True}),
        ("full_shard auto_wrap", None, {"wraps": True}),
        ("full_shard", {"fsdp_min_num_params": 9}, {"wraps": True, "least": 9}),
        (
            "full_shard auto_wrap",
            '{"transformer_layer_cls_to_wrap": "Block"}',
            {"wraps": True, "layers": ("Block",)},
        ),
        (
            "full_shard",
            {"fsdp_transformer_layer_cls_to_wrap": ["A", "B"]},
            {"wraps": True, "layers": ("A", "B")},
        ),
        ("full_shard", {"reshard_after_forward": False}, {"reshard": False}),
        ("shard_grad_op", {"reshard_after_forward": "true"}, {
            "reshard": True,
            "kind": FSDPOption.SHARD_GRAD_OP,
        }),
        ("full_shard", {"fsdp_activation_checkpointing": "True"}, {"checkpointing": True}),
        ("full_shard", {"forward_prefetch": True, "backward_prefetch": "backward_pre"}, {
            "prefetch": True
        }),
        ("full_shard", {"state_dict_type": "full_state_dict"}, {"state_dict": "FULL_STATE_DICT"}),
        ("full_shard", {"version": 2, "sync_module_states": True}, {}),
        ("full_shard", {"version": "1", "use_orig_params": "true"}, {}),
    ],
)  # fmt: skip
def test_what_arguments_ask_for(fsdp: Any, config: Any, expected: dict[str, Any]) -> None:
    args = arguments(fsdp, config)
    assert sharding_of(args) == Sharding(**expected)
    assert wanted(args)
    check(args, NOTHING)


def test_without_the_argument_nothing_is_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert sharding_of(arguments(None)) is None
    assert not wanted(arguments(None))
    assert not wanted(arguments(size=1))
    check(arguments(None), NOTHING)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"shard": 1}, "unknown shard; known: activation_checkpointing, backward_prefetch"),
        ({"version": 3}, "version must be 1 or 2, got 3"),
        ({"use_orig_params": False}, "use_orig_params=False flattens"),
        ({"limit_all_gathers": "false"}, "limit_all_gathers=False is not possible"),
        ({"backward_prefetch": "backward_post"}, "backward_prefetch=backward_post is not possible"),
        (
            {"state_dict_type": "LOCAL_STATE_DICT"},
            "state_dict_type must be one of FULL_STATE_DICT, SHARDED_STATE_DICT, got LOCAL_STATE_DICT",
        ),
    ],
)
def test_keys_that_cannot_be_honoured_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="fsdp_config: ") as caught:
        check(arguments(config=config), NOTHING)
    assert message in str(caught.value)


@pytest.mark.parametrize("key", ["xla", "xla_fsdp_v2", "xla_fsdp_grad_ckpt"])
def test_the_fsdp_of_torch_xla_is_asked_for(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    for size in (1, 2):  # on a TPU one process is enough
        args = arguments(config={f"fsdp_{key}": "true"}, size=size)
        with pytest.raises(
            ValueError, match=f"{key} asks for the FSDP of torch_xla, .*not installed"
        ):
            check(args, NOTHING)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ValueError, match="of torch_xla and training on TPUs is not available"):
        check(arguments(config={key: True}), NOTHING)
    with pytest.raises(ValueError, match="xla_fsdp_settings has no effect without xla"):
        check(arguments(config={"xla_fsdp_settings": {"compute_dtype": "bfloat16"}}), NOTHING)


FULL = {"state_dict_type": "FULL_STATE_DICT"}


@pytest.mark.row(153, 156)
@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"activation_checkpointing": True}, {"gradient_checkpointing": True}, "do the same"),
        ({}, {"exact_reduction": True}, "exact_reduction adds up whole gradients"),
        ({}, {"save_only_model": True}, "set state_dict_type to FULL_STATE_DICT"),
        (
            FULL,
            {"save_only_model": True, "load_best_model_at_end": True},
            "save_only_model does not go with load_best_model_at_end",
        ),
        ({}, {"checkpoint_format": "hf"}, 'checkpoint_format="hf" holds no distributed state'),
        ({}, {"save_on_each_node": True}, "save_on_each_node would leave a part"),
        ({}, {"bf16_full_eval": True}, "bf16_full_eval and fp16_full_eval replace whole weights"),
        ({}, {"log_digest_steps": 5}, "log_digest_steps needs the whole state"),
        ({}, {"optim": "adafactor"}, "optim=adafactor needs whole rows or matrices"),
        ({}, {"optim": "schedule_free_adamw"}, "evaluates with other weights than it trains"),
    ],
)
def test_what_does_not_go_together(config: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="fsdp: ") as caught:
        check(arguments(config=config, **changes), NOTHING)
    assert message in str(caught.value)
    for name in changes:
        assert name in str(caught.value)


def test_a_whole_model_may_be_saved_alone() -> None:
    check(arguments(config=FULL, save_only_model=True), NOTHING)


def test_optimizers_and_single_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    for given in ((made, None), (None, object())):
        with pytest.raises(RuntimeError, match="Leave optimizers out"):
            check(arguments(), given)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"this is the only one\. Launch with torchrun"):
        check(arguments(size=1), NOTHING)
    monkeypatch.setenv("WORLD_SIZE", "1")
    check(arguments(size=1), NOTHING)  # launched, with one


@pytest.mark.row(158)
def test_fsdp_and_deepspeed_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="fsdp and deepspeed both distribute the model"):
        check(arguments(deepspeed={"zero_optimization": {}}), NOTHING)


@pytest.mark.row(179)
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"FSDP_RESHARD_AFTER_FORWARD": "true"}, Sharding()),
        ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, Sharding(reshard=False)),
        (
            {"FSDP_SHARDING_STRATEGY": "2", "FSDP_VERSION": "1"},
            Sharding(kind=FSDPOption.SHARD_GRAD_OP, reshard=False),
        ),
        ({"FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, Sharding(kind=FSDPOption.HYBRID_SHARD)),
        (
            {"FSDP_RESHARD_AFTER_FORWARD": "shard_grad_op"},
            Sharding(kind=FSDPOption.SHARD_GRAD_OP, reshard=False),
        ),
        (
            {
                "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
                "FSDP_TRANSFORMER_CLS_TO_WRAP": "A, B",
                "FSDP_MIN_NUM_PARAMS": "100000000",
            },
            Sharding(wraps=True, layers=("A", "B")),
        ),
        (
            {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "7"},
            Sharding(wraps=True, least=7),
        ),
        ({"FSDP_MIN_NUM_PARAMS": "7", "FSDP_OFFLOAD_PARAMS": "true"}, Sharding(offload=True)),
        (
            {"FSDP_ACTIVATION_CHECKPOINTING": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
            Sharding(checkpointing=True, state_dict="FULL_STATE_DICT"),
        ),
    ],
)
def test_accelerates_variables(
    variables: dict[str, str], expected: Sharding, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("FSDP_")]:
        monkeypatch.delenv(name)
    for name, value in {"ACCELERATE_USE_FSDP": "true", **variables}.items():
        monkeypatch.setenv(name, value)
    assert sharding_of(arguments(None)) == expected
    assert sharding_of(arguments("full_shard")) == Sharding()  # the argument goes before


def test_what_accelerate_has_and_fully_shard_has_not() -> None:
    assert from_environment({"FSDP_VERSION": "2"}) is None
    used = {"ACCELERATE_USE_FSDP": "1", "FSDP_IGNORED_MODULES": "a.*"}
    found = from_environment({**used, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "false"})
    assert found == ([FSDPOption.FULL_SHARD], {"ignored_modules": "a.*"})


@pytest.mark.row(150)
def test_what_is_wrapped() -> None:
    model = Stack()
    blocks = list(model.blocks)
    by_name = _parts(model, Sharding(wraps=True, layers=("Block",)))
    assert by_name == _parts(model, Sharding(wraps=True)) == blocks[::-1]
    assert _parts(model, Sharding()) == []
    inner = [block.inner for block in blocks]
    assert _by_size(model, 42) == inner[::-1]  # a Linear(6, 6) has 42 numbers
    assert _by_size(model, 43) == blocks[::-1]  # with the norm's 12
    assert _by_size(model, 55) == []  # a list of blocks is never gathered alone
    with pytest.raises(ValueError, match=r"has no such layer; it has .*Block.*LayerNorm"):
        _parts(model, Sharding(wraps=True, layers=("Layer",)))
    with pytest.raises(ValueError, match="Linear does not say which of its layers to wrap"):
        _parts(nn.Linear(2, 2), Sharding(wraps=True))
    assert isinstance(blocks[0], Block)


def test_types_in_which_parts_travel() -> None:
    assert _precision("no").param_dtype is None
    half = _precision("bf16")
    assert (half.param_dtype, half.reduce_dtype) == (torch.bfloat16, torch.float32)
    assert _precision("fp16").param_dtype == torch.float16
