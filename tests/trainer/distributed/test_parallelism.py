"""``parallelism_config``: how many processes share a model, and what that comes to."""

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import ParallelismConfig

from support.shell import make_args, make_trainer, scored
from trainer import Trainer
from trainer.arguments.enums import FSDPOption
from trainer.distributed.fsdp_plan import Sharding, sharding_of
from trainer.distributed.parallelism import Parallelism, parallelism_of


def arguments(config: Any, *fsdp: FSDPOption, world: int = 8) -> Any:
    values = {"parallelism_config": config, "fsdp": list(fsdp), "fsdp_config": None}
    return SimpleNamespace(**values, world_size=world)


@pytest.mark.row(147)
@pytest.mark.parametrize(
    ("config", "fsdp", "expected", "plan"),
    [
        (None, (), None, None),
        ({}, (), None, None),
        ({"tp_size": 1, "dp_shard_size": None}, (), None, None),
        ({"dp_replicate_size": 8}, (), Parallelism(8, 1), None),
        ({"dp_shard_size": 8}, (), Parallelism(1, 8), Sharding(together=8)),
        (
            {"dp_replicate_size": 2, "dp_shard_size": 4},
            (FSDPOption.FULL_SHARD, FSDPOption.AUTO_WRAP),
            Parallelism(2, 4),
            Sharding(together=4, wraps=True),
        ),
        (
            {"dp_replicate_size": 4, "dp_shard_size": 2},
            (FSDPOption.HYBRID_SHARD_ZERO2,),
            Parallelism(4, 2),
            Sharding(together=2, kind=FSDPOption.HYBRID_SHARD_ZERO2, reshard=False),
        ),
        (
            {"dp_replicate_size": 8},
            (FSDPOption.NO_SHARD,),
            Parallelism(8, 1),
            Sharding(together=1, kind=FSDPOption.NO_SHARD, reshard=False),
        ),
    ],
)
def test_sizes_arrange_the_processes(
    config: Any,
    fsdp: Any,
    expected: Any,
    plan: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    given = [config] if config is None else [config, ParallelismConfig(**config)]
    for form in given:
        args = arguments(form, *fsdp)
        assert parallelism_of(args) == expected
        assert sharding_of(args) == plan


@pytest.mark.row(147)
@pytest.mark.parametrize(
    ("config", "fsdp", "kind", "message"),
    [
        ({"tp_size": 2}, (), NotImplementedError, r"tp_size=2 is not available .*\(tensor para"),
        ({"cp_size": 4}, (), NotImplementedError, r"cp_size=4 is not .*\(context parallelism\)"),
        ({"sp_size": 4}, (), NotImplementedError, r"sp_size=4 is not .*\(sequence parallelism\)"),
        ({"dp_shard_size": 3}, (), ValueError, r"number of processes, 8\. Launch 3 processes"),
        (
            {"dp_replicate_size": 8},
            (FSDPOption.FULL_SHARD,),
            ValueError,
            "distributes nothing, but fsdp=full_shard does",
        ),
        (
            {"dp_shard_size": 8},
            (FSDPOption.NO_SHARD,),
            ValueError,
            "but fsdp=no_shard does not",
        ),
        (
            {"dp_shard_size": 8},
            (FSDPOption.HYBRID_SHARD,),
            ValueError,
            "has no copies, which fsdp=hybrid_shard asks for",
        ),
    ],
)
def test_what_cannot_be_is_said(config: Any, fsdp: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        parallelism_of(arguments(config, *fsdp))


@pytest.mark.row(147)
def test_a_trainer_says_so_at_construction(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotImplementedError, match="tp_size=2 is not available"):
        make_trainer(tmp_path, parallelism_config={"tp_size": 2})
    with pytest.raises(ValueError, match="is not the number of processes, 1"):
        make_trainer(tmp_path, parallelism_config={"dp_shard_size": 2})
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(NotImplementedError, match="cp_size=2 is not available"):
        make_trainer(tmp_path)


@pytest.mark.row(147)
def test_a_model_in_which_processes_share_layers_is_refused(tmp_path: Any) -> None:
    model: Any = scored("mlp")
    model.tp_size = 2
    with pytest.raises(NotImplementedError, match="tensor parallelism among 2 processes"):
        Trainer(model, make_args(tmp_path))
