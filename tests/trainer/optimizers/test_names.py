"""What each name of ``args.optim`` stands for, with the Hugging Face Trainer's answer beside ours."""

import importlib.metadata
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from support import libraries
from support.shell import make_args, make_trainer, scored
from trainer import Trainer
from trainer.arguments import OptimizerNames
from trainer.optimizers import LayerwiseOptimizer, check_optimizer, optimizer_class_and_kwargs

NAMES = [name.value for name in OptimizerNames]
LOW_RANK = [name for name in NAMES if name.startswith(("galore", "apollo"))]
NATIVE = ["adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop"]
AVAILABLE = ("apollo_torch", "bitsandbytes", "galore_torch", "grokadamw", "lomo")
# Upstream forgets them here, and the class then refuses to be built.
FORGOTTEN = {"galore_adafactor_layerwise": {"scale_parameter": False, "relative_step": False}}


def settings(name: str) -> dict[str, Any]:
    return {"optim": name} | ({"optim_target_modules": "all-linear"} if name in LOW_RANK else {})


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The peer's answer, with stand-ins for the libraries, which shall seem to be there to it as well."""
    transformers = pytest.importorskip("transformers")
    ask = (
        transformers.Trainer.get_optimizer_cls_and_kwargs
    )  # all imports are made before the stand-ins
    module = pytest.importorskip("transformers.trainer_optimizer")
    for package in (*AVAILABLE, "schedulefree", "torch_optimi", "torchao"):
        monkeypatch.setattr(module, f"is_{package}_available", lambda *_: True)
    versions = {"torchao": "0.18.0", "torch": torch.__version__}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    libraries.pretend(monkeypatch)
    return ask


def comparable(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Parameters by identity, since tensors do not compare as one value."""
    if "params" in kwargs:
        groups = [{**group, "params": [*map(id, group["params"])]} for group in kwargs["params"]]
        kwargs = {**kwargs, "params": groups}
    return kwargs


@pytest.mark.row(29)
@pytest.mark.parametrize("name", NAMES)
def test_every_name_resolves_as_upstream(name: str, tmp_path: Path, theirs: Any) -> None:
    model = scored()
    args = make_args(tmp_path, **settings(name), adam_beta1=0.7, warmup_steps=3, weight_decay=0.1)
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    their_cls, expected = theirs(args, model)

    if name.endswith("_layerwise"):
        assert cls is LayerwiseOptimizer
        assert {kwargs.pop("optimizer_cls")} == {
            type(p) for p in expected["optimizer_dict"].values()
        }
        del expected["optimizer_dict"]
    else:
        assert cls is their_cls
    if name == "grokadamw":  # upstream leaves these at the class's defaults
        expected |= {"betas": (0.7, 0.999), "eps": 1e-8}
    assert comparable(kwargs) == comparable(expected) | FORGOTTEN.get(name, {})


@pytest.mark.row(29)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in NATIVE])
def test_a_missing_package_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries.lack(monkeypatch, *libraries.PACKAGES)
    if name == "adafactor":
        monkeypatch.setitem(sys.modules, "transformers.optimization", None)
    with pytest.raises(ImportError, match=rf"optim='{name}' needs the package .*To install it: "):
        make_trainer(tmp_path, **settings(name))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("galore_adamw", r"galore-torch, .*pip install 'trainstep\[galore\]'"),
        ("apollo_adamw", r"apollo-torch, .*pip install 'trainstep\[apollo\]'"),
        ("lomo", r"lomo-optim, .*pip install 'trainstep\[lomo\]'"),
        ("paged_lion_8bit", r"bitsandbytes, .*pip install 'trainstep\[bitsandbytes\]'"),
        ("adamw_torch_4bit", r"torchao, .*pip install 'trainstep\[torchao\]'"),
        ("grokadamw", r"grokadamw, .*pip install 'trainstep\[grokadamw\]'"),
        ("schedule_free_sgd", r"schedulefree, .*pip install 'trainstep\[schedulefree\]'"),
        ("stable_adamw", r"torch-optimi, .*pip install 'trainstep\[optimi\]'"),
        ("adamw_apex_fused", r"apex \(NVIDIA's\), .*see that project's own page"),
        ("adamw_anyprecision", r"torchdistx, .*see that project's own page"),
    ],
)
def test_it_is_said_how_to_install_it(
    name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries.lack(monkeypatch, *libraries.PACKAGES)
    with pytest.raises(ImportError, match=how):
        check_optimizer(make_args(tmp_path, **settings(name)))


def test_the_extras_that_messages_name_exist() -> None:
    root = Path(__file__).parents[3]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = {"galore", "apollo", "lomo", "bitsandbytes", "torchao", "grokadamw", "schedulefree"}
    assert {*named, "optimi", "liger", "hf"} <= extras.keys()


@pytest.mark.row(30)
@pytest.mark.parametrize(
    ("name", "text", "options"),
    [
        ("sgd", " momentum = 0.9, nesterov=yes ", {"momentum": 0.9, "nesterov": True}),
        ("adagrad", "lr_decay=0.1,eps=1e-3", {"lr_decay": 0.1, "eps": 1e-3}),
        ("rmsprop", "alpha=0.5,centered=False", {"alpha": 0.5, "centered": False}),
        ("rmsprop_bnb", "alpha=0.5,min_8bit_size=16", {"alpha": 0.5, "min_8bit_size": 16}),
        ("ademamix", "beta1=0.1,beta3=0.5,t_alpha=7", {"betas": (0.1, 0.999, 0.5), "t_alpha": 7}),
        ("stable_adamw", "decouple_lr=False,max_lr=0.1", {"decouple_lr": False, "max_lr": 0.1}),
        ("grokadamw", "lamb=5", {"lamb": 5.0, "gamma": 0.1}),
        ("adamw_torch_8bit", "block_size=64", {"block_size": 64}),
        ("adamw_anyprecision", "momentum_dtype=bfloat16", {"momentum_dtype": torch.bfloat16}),
        ("schedule_free_radam", "r=0.5", {"r": 0.5}),
    ],
)
def test_options_reach_the_class(
    name: str, text: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries.pretend(monkeypatch)
    _, kwargs = check_optimizer(make_args(tmp_path, optim=name, optim_args=text))
    assert {key: kwargs[key] for key in options} == options


@pytest.mark.row(30)
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sgd", "a", r"expected key=value, got 'a' in 'a'"),
        ("sgd", "nesterov=ja", "optim_args: nesterov: expected True or False, got 'ja'"),
        ("sgd", "momentum=x", "optim_args: momentum: could not convert string to float: 'x'"),
        (
            "sgd",
            "bogus=1",
            "sgd does not take bogus; its options are: momentum, dampening, weight_d",
        ),
        ("adamw_torch", "beta=1", "adamw_torch does not take beta; its options are: none"),
        ("adamw_anyprecision", "momentum_dtype=Tensor", "the name of a torch dtype, got 'Tensor'"),
    ],
)
def test_bad_options_are_refused(
    name: str, text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries.pretend(monkeypatch)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, optim=name, optim_args=text)


def test_unknown_names_are_refused_with_the_valid_ones(tmp_path: Path) -> None:
    args = make_args(tmp_path)
    object.__setattr__(args, "optim", "adam")
    with pytest.raises(ValueError, match="optim='adam' is not known; choose one of adamw_torch, "):
        optimizer_class_and_kwargs(args)


@pytest.mark.parametrize("name", [*LOW_RANK, "lomo", "adalomo"])
def test_those_built_over_the_model_need_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libraries.pretend(monkeypatch)
    with pytest.raises(ValueError, match=f"optim='{name}' is built over the model"):
        Trainer.get_optimizer_cls_and_kwargs(make_args(tmp_path, **settings(name)))


class Factory:
    """What upstream treats as a factory: a class that is no optimizer."""

    def __call__(self, model: Any, lr: float, momentum: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def test_a_factory_is_given_the_model(tmp_path: Path) -> None:
    chosen = (Factory, {"lr": 0.25, "momentum": 0.5})
    trainer = make_trainer(tmp_path, more={"optimizer_cls_and_kwargs": chosen})
    assert trainer.create_optimizer().param_groups[0]["momentum"] == 0.5


def test_options_may_bring_their_own_groups(tmp_path: Path) -> None:
    model = scored("mlp")
    own = [{"params": [*model.parameters()], "lr": 0.5}]
    chosen = (torch.optim.SGD, {"lr": 0.25, "params": own})
    trainer = make_trainer(tmp_path, model, more={"optimizer_cls_and_kwargs": chosen})

    assert [group["lr"] for group in trainer.create_optimizer().param_groups] == [0.5]
    assert set(chosen[1]) == {"lr", "params"}


def test_a_share_of_warmup_is_of_the_run(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    trainer = make_trainer(
        tmp_path, optim="schedule_free_adamw", warmup_steps=0.4, lr_scheduler_type="constant"
    )
    trainer.train()  # of 5 updates
    assert [group["warmup_steps"] for group in trainer.optimizer.param_groups] == [2, 2]
