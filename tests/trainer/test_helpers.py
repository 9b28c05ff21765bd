"""What scripts import beside the Trainer, compared with the peer's where that is the same."""

import functools
import importlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import trainer
from support.shell import Normed, make_trainer
from trainer import helpers
from trainer.trainer_pt_utils import LengthGroupedSampler, get_parameter_names, nested_concat

# What scripts import from upstream's modules, by module; "" is the package itself.
NAMES = {
    "": "DataCollator DataCollatorForLanguageModeling DataCollatorForPermutationLanguageModeling "
    "DataCollatorForSOP DataCollatorForSeq2Seq DataCollatorForTokenClassification "
    "DataCollatorForMultipleChoice DataCollatorForWholeWordMask DataCollatorWithFlattening "
    "DataCollatorWithPadding DefaultDataCollator default_data_collator set_seed "
    "enable_full_determinism EvalPrediction IntervalStrategy SchedulerType HfArgumentParser "
    "Trainer TrainerCallback TrainerControl TrainerState TrainingArguments "
    "Seq2SeqTrainer Seq2SeqTrainingArguments DefaultFlowCallback EarlyStoppingCallback "
    "PrinterCallback ProgressCallback get_scheduler torch_distributed_zero_first",
    "trainer": "Trainer TRAINER_STATE_NAME TRAINING_ARGS_NAME OPTIMIZER_NAME SAFE_WEIGHTS_NAME",
    "trainer_utils": "EvalLoopOutput EvalPrediction FSDPOption HPSearchBackend HubStrategy "
    "IntervalStrategy PREFIX_CHECKPOINT_DIR PredictionOutput SaveStrategy SchedulerType "
    "TrainOutput denumpify_detensorize enable_full_determinism get_last_checkpoint has_length "
    "number_of_arguments seed_worker set_seed speed_metrics",
    "trainer_callback": "CallbackHandler DefaultFlowCallback EarlyStoppingCallback ExportableState "
    "PrinterCallback ProgressCallback TrainerCallback TrainerControl TrainerState",
    "trainer_pt_utils": "AcceleratorConfig LabelSmoother LengthGroupedSampler "
    "get_model_param_count get_parameter_names nested_concat nested_detach nested_numpify "
    "torch_distributed_zero_first",
    "training_args": "OptimizerNames ParallelMode TrainingArguments",
    "training_args_seq2seq": "Seq2SeqTrainingArguments",
    "trainer_seq2seq": "Seq2SeqTrainer",
    "hf_argparser": "HfArg HfArgumentParser",
    "debug_utils": "DebugOption DebugUnderflowOverflow",
    "data.data_collator": "DataCollatorMixin DataCollatorForLanguageModeling default_data_collator",
    "optimization": "get_scheduler get_linear_schedule_with_warmup GreedyLR",
}


@pytest.mark.parametrize("module", NAMES, ids=lambda name: name or "package")
def test_an_import_works_with_another_first_word(module: str) -> None:
    pytest.importorskip("transformers")
    path = f".{module}" if module else ""
    ours, theirs = (
        importlib.import_module(f"{first}{path}") for first in ("trainer", "transformers")
    )
    for name in NAMES[module].split():
        assert hasattr(theirs, name), f"{name} is not upstream's"
        assert getattr(ours, name) is not None


@pytest.mark.parametrize(
    "name",
    ["get_parameter_names", "get_model_param_count", "nested_concat", "LengthGroupedSampler"],
)
def test_parameters_are_upstreams(name: str) -> None:
    utils = pytest.importorskip("transformers.trainer_pt_utils")
    mine, given = (
        list(inspect.signature(getattr(module, name)).parameters) for module in (helpers, utils)
    )
    assert mine == given


def test_the_last_checkpoint_is_the_newest_that_is_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert trainer.get_last_checkpoint(tmp_path / "none") is None
    make_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=4).train()
    assert trainer.get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "model.safetensors").write_bytes(b"cut off")
    (tmp_path / "checkpoint-99").mkdir()
    assert trainer.get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-99 is passed over" in caplog.text


def test_lengths_and_parameters_of_functions() -> None:
    assert helpers.has_length([1])
    assert not helpers.has_length(iter([1]))
    assert helpers.number_of_arguments(lambda a, b: 0) == 2
    assert helpers.number_of_arguments(functools.partial(lambda a, b, c: 0, 1, c=2)) == 1


def test_parameters_outside_of_layers() -> None:
    theirs = pytest.importorskip("transformers.trainer_pt_utils").get_parameter_names
    model = nn.Sequential(Normed(), nn.ModuleDict({"norm": Normed()}))
    for types, patterns in (([nn.LayerNorm], [r"bias"]), ([nn.Linear], None), ([], [r"norm\."])):
        names = get_parameter_names(model, types, patterns)
        assert names == theirs(model, types, patterns)
        assert 0 < len(names) < len(list(model.parameters()))
    model[0].first.requires_grad_(False)
    total = sum(p.numel() for p in model.parameters())
    assert helpers.get_model_param_count(model) == total
    assert helpers.get_model_param_count(model, trainable_only=True) == total - 4 * 6 - 6
    whole = model[0].first.weight
    whole.ds_numel, whole.data = whole.numel(), torch.empty(0)  # as ZeRO-3 leaves it
    assert helpers.get_model_param_count(model) == total


def test_nested_values_are_joined() -> None:
    theirs = pytest.importorskip("transformers.trainer_pt_utils").nested_concat
    first: Any = {"a": (torch.ones(2, 3), torch.zeros(2)), "b": torch.ones(2, 1, dtype=torch.int64)}
    second = {"a": (torch.ones(1, 5), torch.zeros(1)), "b": torch.ones(4, 2, dtype=torch.int64)}
    mine, given = nested_concat(first, second), theirs(first, second)
    for one, other in ((mine["a"][0], given["a"][0]), (mine["b"], given["b"])):
        assert torch.equal(one, other)
    assert isinstance(mine["a"], tuple)
    arrays = nested_concat(np.ones((1, 2)), np.ones((1, 3)), padding_index=7)
    assert arrays.tolist() == [[1, 1, 7], [1, 1, 1]]
    narrow, wide = torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.bfloat16)
    for one, other in ((wide, wide), (narrow, wide), (narrow, wide.float())):
        mine, given = nested_concat(one, other), theirs(one, other)
        assert mine.dtype == torch.promote_types(one.dtype, other.dtype)
        assert torch.equal(mine.float(), given.float())
    # Where they are: on the host there would be no such tensors.
    assert nested_concat(narrow.to("meta"), wide.to("meta")).device.type == "meta"
    with pytest.raises(ValueError, match=r"has the shape \(2, 2\) and batch 0 \(2,\)"):
        nested_concat(torch.ones(2), wide)
    with pytest.raises(TypeError, match="a tuple of 1 where batch 0 has a tuple of 2"):
        nested_concat((torch.ones(1), torch.ones(1)), (torch.ones(1),))


def test_a_sampler_that_groups_by_length() -> None:
    lengths = [3, 9, 1, 7, 5, 2, 8, 4] * 4
    sampler = LengthGroupedSampler(2, lengths=lengths, generator=torch.Generator().manual_seed(1))
    order = list(sampler)
    assert sorted(order) == list(range(32))
    assert lengths[order[0]] == 9
    assert list(sampler) != order
    again = LengthGroupedSampler(2, lengths=lengths, generator=torch.Generator().manual_seed(1))
    assert list(again) == order
    rows = [{"input_ids": [0] * n} for n in lengths]
    assert len(LengthGroupedSampler(2, rows)) == 32
    with pytest.raises(ValueError, match="needs a dataset or lengths"):
        LengthGroupedSampler(2)


def test_the_first_process_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: said.append("barrier"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (0, 1, -1):
        with trainer.torch_distributed_zero_first(rank):
            said.append(f"block {rank}")
    assert said == ["block 0", "barrier", "barrier", "block 1", "block -1"]
