"""The Hugging Face Trainer beside ours, in one process, on the same model, data and seed."""

import copy
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import frozen
from torch import nn

from support.shell import Recorder, make_trainer, options, samples, timeless, weights
from trainer import Trainer


def tiny(name: str, **changes: Any) -> nn.Module:
    """Make a language model of transformers, a few thousand parameters, without dropout."""
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {"vocab_size": 23, "bos_token_id": 0, "eos_token_id": 0}
    if name == "gpt2":
        small |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12}
        small |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        make, config = transformers.GPT2LMHeadModel, transformers.GPT2Config
    else:
        small |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        small |= {"num_attention_heads": 2, "max_position_embeddings": 12}
        make, config = transformers.LlamaForCausalLM, transformers.LlamaConfig
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(config(**(small | changes)))


def texts(n: int, length: int = 8, seed: int = 0, ignored: int = 0) -> list[dict[str, Any]]:
    """Make ``n`` random token sequences; of sample i, the first ``i % (ignored + 1)`` are no labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        ids = torch.randint(1, 23, (length,), generator=generator)
        labels = ids.clone()
        labels[: i % (ignored + 1)] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


@frozen
class Side:
    """What one of the two trainers did."""

    trainer: Any
    events: list[Any]
    result: Any

    @property
    def history(self) -> list[dict[str, Any]]:
        """The log records without times."""
        return timeless(self.trainer.state.log_history)


def theirs(
    folder: Path,
    model: nn.Module,
    *,
    train: Any = None,
    evaluation: Any = None,
    callbacks: Iterable[Any] = (),
    make: Callable[..., Any] | None = None,
    more: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """Build the Hugging Face Trainer with the arguments of ``make_trainer``."""
    transformers = pytest.importorskip("transformers")
    return (make or transformers.Trainer)(
        model,
        transformers.TrainingArguments(**options(folder, **changes)),
        train_dataset=samples() if train is None else train,
        eval_dataset=samples(5, seed=1) if evaluation is None else evaluation,
        callbacks=list(callbacks),
        **(more or {}),
    )


each = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make_trainer, id="ours"),
        pytest.param(theirs, id="peer", marks=pytest.mark.xfail(strict=True, reason="a defect")),
    ],
)
"""One test of either trainer, which theirs fails. If it passes, that defect is gone, and the test fails."""


def both(
    folder: Path,
    model: nn.Module,
    act: Callable[[Any], Any] = lambda trainer: trainer.train(),
    *,
    overrides: type | None = None,
    callbacks: Iterable[Any] = (),
    **settings: Any,
) -> tuple[Side, Side]:
    """Let both trainers ``act`` on copies of one model; returns ``(ours, theirs)``.

    Args:
        folder: output folder.
        model: what is copied.
        act: what each of them does.
        overrides: a class with methods that take the place of theirs.
        callbacks: more of them.
        settings: what else ``make_trainer`` takes.
    """
    sides = []
    kinds = (Trainer, pytest.importorskip("transformers").Trainer)
    for name, build, kind in zip(("ours", "theirs"), (make_trainer, theirs), kinds, strict=True):
        recorder = Recorder()
        make = kind if overrides is None else type("Own", (overrides, kind), {})
        with warnings.catch_warnings():
            if name == "theirs":
                warnings.simplefilter("ignore")
            trainer = build(
                folder / name,
                copy.deepcopy(model),
                callbacks=[recorder, *copy.deepcopy(list(callbacks))],
                make=make,
                **settings,
            )
            sides.append(Side(trainer, recorder.events, act(trainer)))
    return sides[0], sides[1]


def assert_same_weights(ours: Side, other: Side) -> None:
    """Assert that both models have the same bits."""
    mine, given = weights(ours.trainer), weights(other.trainer)
    assert mine.keys() == given.keys()
    different = [name for name in mine if not torch.equal(mine[name], given[name])]
    assert not different, different
