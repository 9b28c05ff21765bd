"""Enums: members, look-up, and how they get along with those of the peer."""

import importlib
import json

import pytest

from trainer.arguments import TrainingArguments, enums

HOMES = {
    "IntervalStrategy": "transformers.trainer_utils",
    "SaveStrategy": "transformers.trainer_utils",
    "HubStrategy": "transformers.trainer_utils",
    "SchedulerType": "transformers.trainer_utils",
    "FSDPOption": "transformers.trainer_utils",
    "HPSearchBackend": "transformers.trainer_utils",
    "OptimizerNames": "transformers.training_args",
    "ParallelMode": "transformers.training_args",
    "DebugOption": "transformers.debug_utils",
}


@pytest.mark.parametrize("name", HOMES)
def test_members_are_those_of_the_peer(name):
    pytest.importorskip("transformers")
    theirs = getattr(importlib.import_module(HOMES[name]), name)
    ours = getattr(enums, name)
    assert {m.name: m.value for m in ours} == {m.name: m.value for m in theirs}


def test_a_member_of_the_peer_is_accepted():
    theirs = pytest.importorskip("transformers.trainer_utils").IntervalStrategy
    found = enums.IntervalStrategy(theirs.STEPS)
    assert found is enums.IntervalStrategy.STEPS
    assert found == theirs.STEPS


def test_arguments_take_members_of_the_peer():
    utils = pytest.importorskip("transformers.trainer_utils")
    debug = pytest.importorskip("transformers.debug_utils").DebugOption
    args = TrainingArguments(
        eval_strategy=utils.IntervalStrategy.EPOCH,
        fsdp=[utils.FSDPOption.FULL_SHARD],
        debug=[debug.UNDERFLOW_OVERFLOW],
    )
    assert args.eval_strategy is enums.IntervalStrategy.EPOCH
    assert args.fsdp == [enums.FSDPOption.FULL_SHARD]
    assert args.debug == [enums.DebugOption.UNDERFLOW_OVERFLOW]


def test_a_member_is_its_value():
    member = enums.OptimizerNames.ADAMW_TORCH_FUSED
    assert member == "adamw_torch_fused"
    assert f"{member} {member!s}" == "adamw_torch_fused adamw_torch_fused"
    assert json.dumps(member) == '"adamw_torch_fused"'


def test_unknown_value_lists_the_valid_ones():
    with pytest.raises(ValueError, match="'often' is not a valid IntervalStrategy") as error:
        enums.IntervalStrategy("often")
    assert str(error.value).endswith("choose one of 'no', 'steps', 'epoch'.")


def test_false_is_no_for_strategies_only():
    assert enums.SaveStrategy(False) is enums.SaveStrategy.NO
    with pytest.raises(ValueError, match="False is not a valid HubStrategy"):
        enums.HubStrategy(False)


def test_schedules_that_follow_a_metric():
    assert [m.value for m in enums.SchedulerType if m.needs_metric] == [
        "reduce_lr_on_plateau",
        "greedy",
    ]
