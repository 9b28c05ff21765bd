"""From training arguments to optimizer, schedule and transforms."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support.reference import SHAPES, assert_equal_bits
from support.shell import Normed, Scored, make_args, make_trainer
from trainer.optimization import (
    decay_parameter_names,
    make_optimizer,
    make_schedule,
    make_transforms,
    parse_options,
)


class Kinds(nn.Module):
    """Parameters of every kind that decides about weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.bare = nn.Parameter(torch.zeros(2))
        self.inner = nn.ModuleDict({"norm": nn.Linear(2, 2, bias=False), "ln_f": nn.LayerNorm(2)})
        self.q_norm, self.bn, self.normal = nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)
        self.MyRMSNorm = nn.Linear(2, 2, bias=False)
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)


def test_biases_and_norms_are_not_decayed() -> None:
    assert decay_parameter_names(Kinds()) == [
        "bare",
        "frozen",
        "embed.weight",
        "bn.weight",
        "normal.weight",
    ]
    assert decay_parameter_names(nn.LayerNorm(2)) == []


@pytest.mark.parametrize("decayed", [set(), {"embed", "b.weight"}, set(SHAPES)])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw_torch", lambda groups: torch.optim.AdamW(groups, **ADAM)),
        ("adamw_torch_fused", lambda groups: torch.optim.AdamW(groups, fused=True, **ADAM)),
        ("sgd", lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)),
    ],
)
def test_optimizers_have_the_bits_of_torch_with_two_groups(
    name: str, make: Any, decayed: set[str], tmp_path: Path
) -> None:
    args = make_args(
        tmp_path,
        optim=name,
        learning_rate=0.01,
        weight_decay=0.3,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        optim_args="momentum=0.9, nesterov=True" if name == "sgd" else None,
    )
    groups = [
        {"of": lambda n: n in decayed, "weight_decay": 0.3},
        {"of": lambda n: n not in decayed, "weight_decay": 0.0},
    ]
    assert_equal_bits(
        make_optimizer(args, decayed),
        make,
        groups=groups,
        rates=lambda step: 0.01 / (step + 1),
        donate=True,
    )


ADAM: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}


@pytest.mark.parametrize(
    ("kind", "options", "rates"),
    [
        ("linear", {}, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("constant", {}, [1.0] * 7),
        ("constant_with_warmup", {}, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", {}, [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447, 0.0]),
        ("cosine", {"num_cycles": 1}, [0.0, 0.5, 1.0, 0.5, 0.0, 0.5, 1.0]),
    ],
)
def test_schedules(kind: str, options: dict[str, Any], rates: list[float], tmp_path: Path) -> None:
    args = make_args(
        tmp_path,
        learning_rate=1.0,
        warmup_steps=2,
        lr_scheduler_type=kind,
        lr_scheduler_kwargs=options or None,
    )
    schedule = make_schedule(args, 6)

    assert [schedule(step) for step in range(7)] == pytest.approx(rates, abs=1e-6)


def test_a_share_of_the_steps_warms_up(tmp_path: Path) -> None:
    schedule = make_schedule(make_args(tmp_path, learning_rate=1.0, warmup_steps=0.25), 10)

    assert [schedule(step) for step in range(4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_the_one_update_of_a_run_of_no_steps_has_rate_zero(tmp_path: Path) -> None:
    assert make_schedule(make_args(tmp_path, learning_rate=1.0), 0)(0) == 0.0


@pytest.mark.parametrize(("norm", "count"), [(1.0, 1), (0.0, 0), (None, 0), (-1.0, 0)])
def test_clipping_can_be_switched_off(norm: Any, count: int, tmp_path: Path) -> None:
    assert len(make_transforms(make_args(tmp_path, max_grad_norm=norm))) == count


@pytest.mark.parametrize(
    ("text", "options"),
    [(None, {}), ("", {}), ("a=1, b = x=y ,", {"a": "1", "b": "x=y"}), ("a=", {"a": ""})],
)
def test_option_texts(text: str | None, options: dict[str, str]) -> None:
    assert parse_options(text) == options


def test_an_option_text_without_a_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optim_args: expected key=value, got 'b' in 'a=1,b'"):
        parse_options("a=1,b")


@pytest.mark.parametrize(
    ("optim", "text", "message"),
    [
        ("sgd", "momentun=0.9", "sgd does not take momentun; it takes momentum, dampening"),
        ("adamw_torch", "beta=0.9", "adamw does not take beta; it takes nothing"),
    ],
)
def test_unknown_options_are_refused(optim: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"optim_args: {message}"):
        make_optimizer(make_args(tmp_path, optim=optim, optim_args=text), set())


def test_unknown_names_are_refused_with_the_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"optim: 'adamw' is not a valid .*; choose one of 'adamw_torch'"
    ):
        make_args(tmp_path, optim="adamw")
    with pytest.raises(ValueError, match=r"lr_scheduler_type: 'sine' is not a valid .*'cosine'"):
        make_args(tmp_path, lr_scheduler_type="sine")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "lomo"}, "optim='lomo' is not available yet; choose one of adamw_torch_fused, "),
        (
            {"lr_scheduler_type": "greedy"},
            "lr_scheduler_type='greedy' is not available.*linear, cos",
        ),
        ({"optim": "sgd", "optim_args": "x=1"}, "sgd does not take x"),
        ({"lr_scheduler_kwargs": {"waves": 2}}, "unexpected keyword argument 'waves'"),
    ],
)
def test_what_cannot_be_built_is_refused_when_the_trainer_is_built(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((NotImplementedError, ValueError, TypeError), match=message):
        make_trainer(tmp_path, eval_strategy="epoch", **changes)


def test_the_groups_of_a_trainer_decay_what_they_should(tmp_path: Path) -> None:
    class Still(Normed):
        """Its outputs, and so all gradients, are zero: only decay moves its weights."""

        def forward(self, x: Any) -> Any:
            return super().forward(x) * 0.0

    model = Scored(Still())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    make_trainer(
        tmp_path,
        model,
        optim="sgd",
        weight_decay=0.5,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_steps=1,
    ).train()

    moved = {name: float(p.detach().flatten()[0]) for name, p in model.named_parameters()}
    assert moved == {
        name: pytest.approx(0.95 if name in ("body.first.weight", "body.last.weight") else 1.0)
        for name in moved
    }
