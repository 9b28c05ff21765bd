"""Which layers GaLore and APOLLO train in a low rank, and with which settings."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from support import libraries
from support.shell import make_args, make_trainer, scored
from trainer.optimizers import optimizer_class_and_kwargs
from trainer.optimizers.lowrank import target_names


class Nested(nn.Module):
    """Two blocks of linear layers, and a convolution with a telling name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        block = {"attn": nn.Linear(4, 4), "mlp_up": nn.Linear(4, 8), "norm": nn.LayerNorm(4)}
        self.blocks = nn.ModuleList([nn.ModuleDict(block)])
        self.attn_conv = nn.Conv1d(4, 4, 1)
        self.head = nn.Linear(8, 2)


ALL = ["blocks.0.attn.weight", "blocks.0.mlp_up.weight", "head.weight"]
CASES = [
    ("all-linear", ALL),
    ("all_linear", ALL),
    (r".*\.attn", ALL[:1]),
    ("attn", None),  # an expression matches whole names
    ("head", ALL[2:]),
    (["attn"], ALL[:1]),
    (["attn", "head"], [ALL[0], ALL[2]]),
    ([r"blocks\.\d\..*"], ALL[:2]),
    (["embed", "norm"], None),
]


@pytest.mark.parametrize(("targets", "names"), CASES)
def test_linear_layers_are_found(targets: Any, names: list[str] | None) -> None:
    if names is None:
        with pytest.raises(
            ValueError,
            match=r"optim_target_modules=.* matches no linear layer of Nested; it has blo",
        ):
            target_names(Nested(), targets, "galore_adamw")
    else:
        assert target_names(Nested(), targets, "galore_adamw") == names


@pytest.mark.parametrize(("targets", "names"), CASES)
def test_upstream_finds_the_same(targets: Any, names: list[str] | None) -> None:
    utils = pytest.importorskip("transformers.trainer_utils")
    everything = targets in ("all-linear", "all_linear")
    found = [
        f"{name}.weight"
        for name, module in Nested().named_modules()
        if isinstance(module, nn.Linear)
        and (everything or utils.check_target_module_exists(targets, name))
    ]
    assert found == (names or [])


def test_a_model_that_is_a_linear_layer_is_its_own_target() -> None:
    assert target_names(nn.Linear(2, 2), "all-linear", "galore_adamw") == ["weight"]


def test_other_layers_that_are_named_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    target_names(Nested(), ["attn"], "galore_adamw")
    assert caplog.messages == [
        "optim_target_modules: attn_conv is a Conv1d, and galore_adamw projects linear layers only: "
        "it is left out"
    ]
    caplog.clear()
    target_names(Nested(), ".*attn.*", "galore_adamw")  # an expression may catch more than is meant
    assert caplog.messages == []


def test_a_malformed_expression_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"optim_target_modules: '\*attn' is not a regular expression"
    ):
        target_names(Nested(), "*attn", "galore_adamw")


@pytest.mark.row(31)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, ValueError, r"optim='galore_adamw' needs optim_target_modules: the linear layers"),
        ({"optim_target_modules": 3}, TypeError, "must be a list of strings, a regular .* got 3"),
        (
            {"optim_target_modules": "x", "optim_args": "rnk=1"},
            ValueError,
            r"does not take rnk; its options are: rank, update_proj_gap, scale, proj_type",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_said_at_construction(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    libraries.pretend(monkeypatch)
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, optim="galore_adamw", **changes)


def test_targets_that_match_nothing_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries.pretend(monkeypatch)
    trainer = make_trainer(tmp_path, optim="apollo_adamw", optim_target_modules=["lm_head"])
    with pytest.raises(
        ValueError, match=r"optim_target_modules=\['lm_head'\] matches no linear layer"
    ):
        trainer.train()


@pytest.mark.row(31)
def test_targets_are_a_group_with_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    libraries.pretend(monkeypatch)
    model = scored("mlp")
    args = make_args(
        tmp_path,
        optim="galore_adamw",
        optim_target_modules="all-linear",
        optim_args="rank=4, scale=2, proj_type=right",
        weight_decay=0.5,
    )
    _, kwargs = optimizer_class_and_kwargs(args, model)
    others, targets = kwargs["params"]

    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    assert {*map(id, targets.pop("params"))} == linear
    assert targets == {"rank": 4, "update_proj_gap": 200, "scale": 2.0, "proj_type": "right"}
    assert not linear & {*map(id, others.pop("params"))}
    assert others == {}
    assert "weight_decay is not applied" in caplog.text


@pytest.mark.row(32)
@pytest.mark.parametrize("name", ["galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_layerwise_updates_need_every_gradient_to_be_the_update_s(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries.pretend(monkeypatch)
    choice = {"optim": name, "optim_target_modules": "all-linear"}
    with pytest.raises(ValueError, match="set gradient_accumulation_steps=1, not 2"):
        make_trainer(tmp_path, gradient_accumulation_steps=2, **choice)
    with pytest.raises(ValueError, match=r'on_nonfinite="skip" cannot work'):
        make_trainer(tmp_path, on_nonfinite="skip", **choice)
    with pytest.raises(ValueError, match=r"fp16=True cannot work. Use bf16=True"):
        make_trainer(tmp_path, fp16=True, **choice)
    args = SimpleNamespace(parallel_mode="distributed", learning_rate=1, optim_args=None)
    vars(args).update(choice, adam_beta1=0.9, adam_beta2=0.9, adam_epsilon=1e-8)
    with pytest.raises(
        NotImplementedError, match=f"Use '{name.removesuffix('_layerwise')}', or one"
    ):
        optimizer_class_and_kwargs(args, scored("mlp"))


@pytest.mark.parametrize("works", [True, False])
def test_a_pair_of_libraries_that_moves_no_weight_is_refused(
    works: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_clipping(self: Any, params: Any, percentile_clipping: int = 100) -> None: ...

    def without(self: Any, params: Any, max_unorm: float = 0.0) -> None: ...

    init = with_clipping if works else without
    base = type("Optimizer2State", (libraries.LowRank,), {"__init__": init})
    libraries.put(monkeypatch, "galore_torch", GaLoreAdamW8bit=type("AdamW8bit", (base,), {}))
    args = make_args(tmp_path, optim="galore_adamw_8bit", optim_target_modules="all-linear")
    if works:
        optimizer_class_and_kwargs(args, scored("mlp"))
    else:
        with pytest.raises(ImportError, match=r"would not be updated.*'bitsandbytes<0\.50'"):
            optimizer_class_and_kwargs(args, scored("mlp"))
