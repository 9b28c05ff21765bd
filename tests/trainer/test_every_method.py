"""Every method that the reference lists can be overridden, in a subclass or on the object, with effect."""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import frozen
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR

from support.shell import (
    Recorder,
    Scored,
    Watching,
    flat,
    logged,
    make_args,
    make_trainer,
    samples,
    scored,
)
from trainer import Trainer
from trainer.outputs import EvalLoopOutput

USED_BY_THE_USER = (
    "add_callback",
    "get_learning_rates",
    "get_optimizer_group",
    "log_metrics",
    "pop_callback",
    "predict",
    "remove_callback",
    "save_metrics",
    "save_state",
    "train",
)
"""Nothing inside calls these; who overrides them has what is called."""

NOT_OFFERED = {
    "create_model_card": "the Hub is not supported yet",
    "hyperparameter_search": "search is not supported yet",
    "init_hf_repo": "the Hub is not supported yet",
    "push_to_hub": "the Hub is not supported yet",
}
"""Methods of the reference that are missing, and why; a subclass may have its own."""


class Typed(Scored):
    """Notes the type that its outputs have."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = super().forward(x, labels)
        self.type = out["logits"].dtype
        return out


def trained(make: Any, *arguments: Any, **changes: Any) -> Any:
    trainer = make(*arguments, **changes)
    trainer.result = trainer.train()
    return trainer


def banner(make: Any) -> list[str]:
    """Return what is logged when training starts."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("trainer.session")
    logger.addHandler(handler)
    try:
        trained(make, log_level="info")
    finally:
        logger.removeHandler(handler)
    return lines


def batches_evaluated(make: Any) -> int:
    recorder = Recorder()
    make(callbacks=[recorder]).evaluate()
    return recorder.events.count("prediction_step")


def state_is_saved(make: Any) -> bool:
    trainer = make()
    trainer.save_state()
    return (Path(trainer.args.output_dir) / "trainer_state.json").exists()


def printed(make: Any) -> str:
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as out:
        make().log_metrics("train", {"loss": 0.5})
    return out.getvalue().splitlines()[-1]


def of_four_processes(make: Any) -> int:
    args = SimpleNamespace(gradient_accumulation_steps=1, world_size=4, accelerator_config=None)
    return make().get_total_train_batch_size(args)


def bfloat16(*given: Any, **options: Any) -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def stack_of_bfloat16(self: Any) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(bfloat16())
    return stack


def doubled(self: Any, *given: Any, return_outputs: bool = False, **options: Any) -> Any:
    loss, outputs = Trainer.compute_loss(self, *given, return_outputs=True, **options)
    return (2 * loss, outputs) if return_outputs else 2 * loss


def own_accelerator(self: Any) -> None:
    self.accelerator = "mine"


def sgd(self: Any, model: Any = None) -> Any:
    self.optimizer = SGD(self.model.parameters(), lr=0.5)
    return self.optimizer


def halving(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
    self.lr_scheduler = StepLR(optimizer or self.optimizer, 1, gamma=0.5)
    return self.lr_scheduler


def both(self: Any, num_training_steps: int) -> None:
    sgd(self)
    halving(self, num_training_steps)


def sevens(self: Any, *given: Any, **options: Any) -> EvalLoopOutput:
    return EvalLoopOutput("predictions", None, {"test_loss": 7.0}, 1)


def twice(self: Any, iterator: Any, count: int, device: Any = None) -> Any:
    window, items = Trainer.get_batch_samples(self, iterator, count, device)
    return window * 2, items


def on_four(self: Any) -> Any:
    self.train_dataset = samples(4)
    return Trainer.get_train_dataloader(self)


def two_steps(self: Any, args: Any, dataloader: Any) -> Any:
    *values, _ = Trainer.set_initial_training_values(self, args, dataloader)
    return (*values, 2)


def no_logits(self: Any, *given: Any, **options: Any) -> Any:
    loss, _, labels = Trainer.prediction_step(self, *given, **options)
    return loss, None, labels


def with_note(self: Any, output_dir: Any = None, _internal_call: bool = False) -> None:
    Trainer.save_model(self, output_dir, _internal_call)
    (Path(output_dir) / "note.txt").write_text("mine")


def sevens_stored(self: Any) -> None:
    self.state.total_flos = 7.0


def without_loss(self: Any, *given: Any) -> Tensor:
    return 0 * Trainer.training_step(self, *given)


@frozen
class Case:
    """An override, and where its effect shows.

    Attributes:
        override: the method, or function if it is static.
        observe: gets a function that makes trainers; returns what is observed.
        expected: what that is with the override; a function of what it is without.
    """

    override: Callable[..., Any]
    observe: Callable[[Any], Any]
    expected: Any


def types_seen(make: Any) -> Any:
    return trained(make, scored("mlp", Typed)).model.type


def rates(make: Any) -> list[float]:
    return logged(trained(make, max_steps=3), "learning_rate")


CASES = {
    "autocast_smart_context_manager": Case(bfloat16, types_seen, torch.bfloat16),
    "call_model_init": Case(
        lambda self, trial=None: scored(lambda: torch.nn.Linear(4, 2, bias=False)),
        lambda make: len(list(trained(make, None, init=lambda: scored()).model.parameters())),
        1,
    ),
    "compute_loss": Case(
        doubled, lambda make: make().evaluate()["eval_loss"], lambda plain: 2 * plain
    ),
    "compute_loss_context_manager": Case(stack_of_bfloat16, types_seen, torch.bfloat16),
    "create_accelerator_and_postprocess": Case(
        own_accelerator, lambda make: make().accelerator, "mine"
    ),
    "create_optimizer": Case(sgd, lambda make: type(trained(make).optimizer), SGD),
    "create_optimizer_and_scheduler": Case(both, rates, [0.5, 0.25, 0.125]),
    "create_scheduler": Case(halving, rates, [0.05, 0.025, 0.0125]),
    "evaluate": Case(
        lambda self, *given, **options: {"eval_loss": 7.0},
        lambda make: (
            trained(make, eval_strategy="epoch", metric_for_best_model="loss").state.best_metric
        ),
        7.0,
    ),
    "evaluation_loop": Case(
        sevens, lambda make: str(make().predict(samples(2)).predictions), "predictions"
    ),
    "floating_point_ops": Case(
        lambda self, inputs: 7, lambda make: trained(make).result.metrics["total_flos"], 35.0
    ),
    "get_batch_samples": Case(
        twice, lambda make: len(trained(make, scored("mlp", Watching)).model.seen), 10
    ),
    "get_cp_size": Case(lambda self: 2, of_four_processes, 4),
    "get_decay_parameter_names": Case(
        lambda self, model: [],
        lambda make: len(trained(make).optimizer.param_groups[0]["params"]),
        0,
    ),
    "get_eval_dataloader": Case(
        lambda self, eval_dataset=None: Trainer.get_eval_dataloader(self, samples(3)),
        batches_evaluated,
        1,
    ),
    "get_num_trainable_parameters": Case(
        lambda self: 12345, lambda make: banner(make)[-2], "  Trainable parameters = 12,345"
    ),
    "get_optimizer_cls_and_kwargs": Case(
        lambda args, model=None: (SGD, {"lr": 0.25}),
        lambda make: type(trained(make).optimizer),
        SGD,
    ),
    "get_sp_size": Case(lambda self: 4, of_four_processes, 2),
    "get_test_dataloader": Case(
        lambda self, test_dataset: Trainer.get_test_dataloader(self, samples(3)),
        lambda make: len(make().predict(samples(6)).predictions),
        3,
    ),
    "get_total_train_batch_size": Case(
        lambda self, args: 77,
        lambda make: banner(make)[4],
        "  Total batch size (devices, accumulation) = 77",
    ),
    "get_tp_size": Case(lambda self: 2, of_four_processes, 4),
    "get_train_dataloader": Case(on_four, lambda make: trained(make).state.global_step, 2),
    "is_local_process_zero": Case(
        lambda self: False, lambda make: trained(make).state.is_local_process_zero, False
    ),
    "is_world_process_zero": Case(lambda self: False, state_is_saved, False),
    "log": Case(
        lambda self, logs, start_time=None: None,
        lambda make: trained(make).state.log_history,
        [],
    ),
    "metrics_format": Case(lambda self, metrics: {"mine": 1}, printed, "  mine = 1"),
    "num_examples": Case(
        lambda self, dataloader: 99, lambda make: banner(make)[1], "  Num examples = 99"
    ),
    "prediction_step": Case(
        no_logits, lambda make: str(make().predict(samples(2)).predictions), "None"
    ),
    "save_model": Case(
        with_note,
        lambda make: (
            Path(trained(make, save_strategy="epoch").args.output_dir) / "checkpoint-5" / "note.txt"
        ).exists(),
        True,
    ),
    "set_initial_training_values": Case(two_steps, lambda make: trained(make).state.global_step, 2),
    "store_flos": Case(sevens_stored, lambda make: trained(make).state.total_flos, 7.0),
    "training_step": Case(without_loss, lambda make: logged(trained(make), "loss"), [0.0] * 5),
}


def maker(folder: Path, name: str = "", override: Any = None, way: str = "") -> Callable[..., Any]:
    """Return a function that makes trainers, with a method overridden in a subclass or on the object."""
    static = isinstance(vars(Trainer).get(name), staticmethod) or name.endswith("cls_and_kwargs")
    kind: Any = Trainer
    if way == "subclass":
        kind = type("Own", (Trainer,), {name: staticmethod(override) if static else override})

    def make(model: Any = None, *, init: Any = None, **changes: Any) -> Any:
        if init is None:
            trainer = make_trainer(folder, model, make=kind, **changes)
        else:
            trainer = kind(
                args=make_args(folder, **changes), model_init=init, train_dataset=samples()
            )
        if way == "object":
            setattr(trainer, name, override if static else MethodType(override, trainer))
        return trainer

    return make


@pytest.mark.row(10, 11, 37, 48, 49, 69, 98)
@pytest.mark.parametrize("way", ["subclass", "object"])
@pytest.mark.parametrize("name", CASES)
def test_an_override_takes_effect(name: str, way: str, tmp_path: Path) -> None:
    case = CASES[name]
    plain = case.observe(maker(tmp_path / "plain"))
    own = case.observe(maker(tmp_path / "own", name, case.override, way))
    expected = case.expected(plain) if name == "compute_loss" else case.expected

    assert own == expected
    assert own != plain


@pytest.mark.parametrize("name", USED_BY_THE_USER)
def test_what_only_the_user_calls_is_there(name: str) -> None:
    assert callable(getattr(Trainer, name))


@pytest.mark.parametrize("name", NOT_OFFERED)
def test_what_is_not_offered_may_be_defined(name: str, tmp_path: Path) -> None:
    """Upstream calls these only to upload or to search, both of which are refused."""
    assert not hasattr(Trainer, name)
    own = type("Own", (Trainer,), {name: lambda self, *given, **options: "mine"})
    assert getattr(make_trainer(tmp_path, make=own), name)() == "mine"


def test_no_method_of_the_reference_is_forgotten() -> None:
    transformers = pytest.importorskip("transformers")
    known = {*CASES, *USED_BY_THE_USER, *NOT_OFFERED}
    public = {
        name
        for name, value in vars(transformers.Trainer).items()
        if not name.startswith("_") and (callable(value) or isinstance(value, staticmethod))
    }
    assert public <= known | {"tokenizer"}, public - known
    assert known <= public | {"log_metrics", "metrics_format", "save_metrics", "save_state"}


def test_samples_are_those_that_an_overridden_loader_gives(tmp_path: Path) -> None:
    model = scored("mlp", Watching)
    trained(maker(tmp_path, "get_train_dataloader", on_four, "subclass"), model)
    assert sorted(flat(model.seen)) == sorted(float(row["x"][0]) for row in samples(4))
