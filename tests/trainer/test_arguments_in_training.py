"""Arguments take effect in a training: names, clipping, seeds, levels, intervals, setters, collators."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import trainstep as ts
from support.shell import (
    Scored,
    Stream,
    Watching,
    flat,
    logged,
    make_args,
    make_trainer,
    options,
    samples,
    scored,
    weights,
)
from trainer import (
    PrinterCallback,
    ProgressCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    default_data_collator,
)
from trainer.data.collators import DataCollatorWithPadding

# ---- the model


class Tuples(Scored):
    """Returns ``(loss, logits)``, or ``(logits,)`` without labels."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        return tuple(super().forward(x, labels).values())


@pytest.mark.row(8, 91)
@pytest.mark.parametrize("kind", [Scored, Tuples])
def test_a_plain_module_trains_evaluates_predicts_and_is_saved(kind: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scored("mlp", kind))
    before = weights(trainer)
    trainer.train()
    metrics = trainer.evaluate()
    output = trainer.predict(samples(3))
    trainer.save_model(str(tmp_path / "saved"))

    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(trainer).items())
    assert 0 < metrics["eval_loss"] < math.inf
    assert output.predictions.shape == (3, 2)
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    assert ts.equal(stored, weights(trainer))
    assert json.loads((tmp_path / "saved" / "training_args.json").read_text())["seed"] == 42


@pytest.mark.row(23)
@pytest.mark.parametrize("use", [False, True])
def test_the_cache_flag_reaches_the_model_at_construction(use: bool, tmp_path: Path) -> None:
    class Config:
        use_cache = not use

    model = scored("mlp")
    model.config = Config()  # type: ignore[assignment]
    make_trainer(tmp_path, model, use_cache=use)
    assert model.config.use_cache is use


WEIGHTS = torch.tensor([1.0, 2.0, 0.5])


class Classes(nn.Module):
    """Three classes; no loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(x)}


class Older(Trainer):
    """A weighted loss as the reference's documentation has it."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:  # type: ignore[override]
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs["logits"], labels, weight=WEIGHTS)
        return (loss, outputs) if return_outputs else loss


class Newer(Trainer):
    """The same with the parameter that newer scripts have."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return Older.compute_loss(self, model, inputs, return_outputs)  # type: ignore[arg-type]


@pytest.mark.row(11)
@pytest.mark.parametrize("make", [Older, Newer])
def test_a_weighted_loss_trains_with_either_signature(make: Any, tmp_path: Path) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    rows = [{"x": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(x)]
    trainer = make_trainer(
        tmp_path,
        Classes(),
        train=rows,
        make=make,
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
        label_names=["labels"],
    )
    expected = cross_entropy(Classes().head(x), torch.arange(8) % 3, weight=WEIGHTS).item()
    trainer.train()
    assert logged(trainer, "loss") == [pytest.approx(expected)]
    assert "eval_loss" in trainer.evaluate(rows)


# ---- updates


@pytest.mark.row(28)
def test_the_default_optimizer_is_fused_adamw(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert str(trainer.args.optim) == "adamw_torch_fused"
    trainer.train()
    assert type(trainer.optimizer) is torch.optim.AdamW
    assert all(group["fused"] for group in trainer.optimizer.param_groups)


@pytest.mark.row(35)
def test_own_optimizer_and_scheduler_are_used_as_they_are(tmp_path: Path) -> None:
    """Plain descent at rates that only this scheduler gives."""
    model, reference = scored("mlp"), scored("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    trainer = make_trainer(
        tmp_path, model, more={"optimizers": (optimizer, scheduler)}, max_grad_norm=0, max_steps=3
    )
    batches = list(trainer.get_train_dataloader())[:3]
    trainer.train()

    assert trainer.optimizer is optimizer
    assert trainer.lr_scheduler is scheduler
    assert logged(trainer, "learning_rate") == [0.25, 0.125, 0.0625]
    plain = torch.optim.SGD(reference.parameters(), lr=0.25)
    for batch in batches:
        plain.zero_grad()
        reference(**batch)["loss"].backward()
        plain.step()
        plain.param_groups[0]["lr"] /= 2
    assert ts.equal(weights(trainer), {n: t.detach() for n, t in reference.state_dict().items()})


@pytest.mark.row(16)
@pytest.mark.parametrize("limit", [0.25, 0.0, 1e9])
def test_gradients_are_clipped_and_the_norm_before_is_logged(limit: float, tmp_path: Path) -> None:
    """One step of plain descent at rate 1 moves the weights by the gradient that was applied."""
    trainer = make_trainer(
        tmp_path,
        scored("mlp"),
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=limit,
        max_steps=1,
    )
    before = weights(trainer)
    trainer.train()
    moved = math.sqrt(
        sum(float((before[n] - t).double().square().sum()) for n, t in weights(trainer).items())
    )
    (norm,) = logged(trainer, "grad_norm")
    assert norm > 0.3
    assert moved == pytest.approx(limit if limit == 0.25 else norm, rel=1e-5)


class Overflowing(Scored):
    """Its first loss is infinite."""

    calls = 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = super().forward(x, labels)
        self.calls += 1
        return {**out, "loss": out["loss"] * (math.inf if self.calls == 1 else 1)}


@pytest.mark.row(44)
def test_the_rate_goes_on_when_an_update_overflows(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, scored("mlp", Overflowing), fp16=True)
    trainer.train()
    assert int(trainer.train_state.extras["skipped"]) == 1
    assert logged(trainer, "learning_rate") == pytest.approx([0.05, 0.04, 0.03, 0.02, 0.01])


@pytest.mark.row(41)
@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_a_metric_step_once_an_evaluation_but_not_at_the_start(
    name: str, tmp_path: Path
) -> None:
    settings = {"patience": 0, "factor": 0.5}
    settings |= {"mode": "max"} if name == "reduce_lr_on_plateau" else {"min_lr": 1e-6}

    def rates(**changes: Any) -> list[float]:
        trainer = make_trainer(
            tmp_path,
            more={"compute_metrics": lambda prediction: {"score": 1.0}},
            metric_for_best_model="score",
            greater_is_better=True,
            eval_strategy="steps",
            eval_steps=2,
            max_steps=8,
            lr_scheduler_type=name,
            lr_scheduler_kwargs=settings,
            **changes,
        )
        trainer.train()
        return logged(trainer, "learning_rate")

    plain = rates()
    assert rates(eval_on_start=True) == plain
    changed = [step for step in range(1, 8) if plain[step] != plain[step - 1]]
    assert changed  # the metric never improves after the first evaluation
    assert all(step % 2 == 0 for step in changed), plain


@pytest.mark.row(212)
def test_the_greedy_schedule_lowers_small_rates(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        more={"compute_metrics": lambda prediction: {"score": 1.0}},
        metric_for_best_model="score",
        greater_is_better=True,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=6,
        learning_rate=5e-5,
        lr_scheduler_type="greedy",
        lr_scheduler_kwargs={"patience": 0},
    )
    trainer.train()
    rates = logged(trainer, "learning_rate")
    assert rates[0] == 5e-5
    assert rates[-1] < rates[0]


# ---- data and seeds


@pytest.mark.row(94)
def test_the_data_seed_changes_the_order_and_not_the_weights(tmp_path: Path) -> None:
    seen, first = [], []
    for data_seed in (None, 1, 2):
        trainer = Trainer(
            args=make_args(tmp_path, data_seed=data_seed),
            model_init=lambda: Watching(nn.Linear(4, 2)),
            train_dataset=samples(),
        )
        first.append(ts.digest(trainer.train_state.params))
        trainer.train()
        seen.append(tuple(flat(trainer.model.seen)))
    assert len(set(first)) == 1
    assert len(set(seen)) == 3
    assert len({tuple(sorted(values)) for values in seen}) == 1


class Tokens:
    """A tokenizer: it pads, and knows on which side."""

    padding_side = "right"

    def pad(self, rows: Any, **options: Any) -> Any: ...


class Images:
    """An image processor: it pads pictures."""

    def pad(self, image: Any, **options: Any) -> Any: ...


@pytest.mark.row(55)
def test_the_default_collator_pads_for_tokenizers_only(tmp_path: Path) -> None:
    for processor, expected in (
        (Tokens(), DataCollatorWithPadding),
        (Images(), None),
        (None, None),
    ):
        trainer = make_trainer(tmp_path, more={"processing_class": processor})
        if expected is None:
            assert trainer.data_collator is default_data_collator
        else:
            assert isinstance(trainer.data_collator, expected)
            assert trainer.data_collator.tokenizer is processor


@pytest.mark.row(55)
def test_the_default_collator_is_that_of_the_peer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[PAD]": 1}, unk_token="a"))
    processors = [
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]"),
        transformers.Wav2Vec2FeatureExtractor(),
        transformers.image_processing_base.ImageProcessingMixin(),
    ]
    for processor in processors:
        ours = make_trainer(tmp_path, more={"processing_class": processor}).data_collator
        theirs = transformers.Trainer(
            nn.Linear(1, 1),
            transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
            processing_class=processor,
        ).data_collator
        assert getattr(ours, "__name__", type(ours).__name__) == getattr(
            theirs, "__name__", type(theirs).__name__
        )


@pytest.mark.row(198)
def test_loader_settings_reach_streams(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        scored("mlp", Watching),
        train=Stream(samples(5)),
        max_steps=4,
        dataloader_drop_last=True,
        dataloader_num_workers=1,
        dataloader_prefetch_factor=3,
    )
    assert trainer.get_train_dataloader().prefetch_factor == 3
    trainer.train()
    assert [len(batch) for batch in trainer.model.seen] == [2] * 4


@pytest.mark.row(51)
def test_streams_keep_their_own_order(tmp_path: Path) -> None:
    seen = []
    for strategy in ("random", "sequential", "group_by_length"):
        model = scored("mlp", Watching)
        stream = Stream(samples(6))
        make_trainer(
            tmp_path, model, train=stream, max_steps=3, train_sampling_strategy=strategy
        ).train()
        seen.append(flat(model.seen))
    assert seen == [[float(row["x"][0]) for row in samples(6)]] * 3


@pytest.mark.row(59)
@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize(
    "name",
    ["split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler", "non_blocking"],
)
def test_data_options_reach_the_accelerator(name: str, value: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, accelerator_config={name: value})
    assert getattr(trainer.accelerator.dataloader_config, name) is value


@pytest.mark.row(134)
def test_sortish_sampling_is_accepted_and_changes_nothing(tmp_path: Path) -> None:
    seen = []
    for sortish in (True, False):
        args = Seq2SeqTrainingArguments(**options(tmp_path, sortish_sampler=sortish))
        trainer = Seq2SeqTrainer(scored("mlp", Watching), args, train_dataset=samples())
        trainer.train()
        seen.append(trainer.model.seen)
    assert seen[0] == seen[1]


# ---- logs and intervals


@pytest.mark.row(99)
@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"logging_steps": 3}, [3, 6, 9]),
        ({"logging_steps": 0.25}, [3, 6, 9]),
        ({"logging_steps": 4, "logging_first_step": True}, [1, 4, 8]),
        ({"logging_strategy": "epoch"}, [5, 10]),
        ({"logging_strategy": "no"}, []),
        ({"logging_strategy": "no", "logging_first_step": True}, [1]),
    ],
)
def test_logs_are_when_they_should(
    changes: dict[str, Any], steps: list[int], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, num_train_epochs=2, **changes)
    trainer.train()
    assert [record["step"] for record in trainer.state.log_history if "loss" in record] == steps


@pytest.mark.row(101)
@pytest.mark.parametrize(("level", "shown"), [("info", True), ("error", False)])
def test_the_level_is_set_when_the_trainer_is_built(
    level: str, shown: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("trainer")
    before = logger.level
    try:
        trainer = make_trainer(tmp_path, log_level=level)
        assert logger.level == getattr(logging, level.upper())
        trainer.train()
        assert ("Running training" in caplog.text) is shown
    finally:
        logger.setLevel(before)


@pytest.mark.row(105)
@pytest.mark.parametrize("quiet", [True, False])
def test_a_bar_or_printed_lines(quiet: bool, tmp_path: Path, capsys: Any) -> None:
    trainer = make_trainer(tmp_path, disable_tqdm=quiet)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert (PrinterCallback in kinds) is quiet
    assert any(issubclass(kind, ProgressCallback) for kind in kinds) is not quiet
    trainer.train()
    shown = capsys.readouterr()
    assert ("5/5" in shown.err) is not quiet
    assert shown.out.count("'loss'") == 5


@pytest.mark.row(209)
def test_no_tracker_at_all_is_none(tmp_path: Path) -> None:
    for report_to in (None, "none", []):
        trainer = make_trainer(tmp_path, report_to=report_to)
        assert trainer.args.report_to == []
        assert len(trainer.callback_handler.callbacks) == 2
        assert trainer.train().global_step == 5


@pytest.mark.row(26)
@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_evaluation_set_by_the_grouped_setter_trains(strategy: str, tmp_path: Path) -> None:
    args = make_args(tmp_path).set_evaluate(strategy, steps=2, batch_size=4)
    args = args.set_logging(strategy="epoch", report_to=None).set_save("no")
    args = args.set_dataloader(train_batch_size=2).set_optimizer("sgd")
    args = args.set_lr_scheduler("constant", num_epochs=1)
    trainer = Trainer(scored(), args, train_dataset=samples(), eval_dataset=samples(5))
    trainer.train()
    evaluated = [record["step"] for record in trainer.state.log_history if "eval_loss" in record]
    assert evaluated == ([2, 4, 5] if strategy == "steps" else [5])


@pytest.mark.row(88)
@pytest.mark.parametrize(
    ("name", "greater", "best"),
    [
        *(("loss", None, 2), ("eval_loss", None, 2), ("cost_loss", None, 1)),
        *(("score", None, 3), ("score", False, 1)),
    ],
)
def test_names_that_end_in_loss_are_better_when_lower(
    name: str, greater: bool | None, best: int, tmp_path: Path
) -> None:
    values = {"cost_loss": [1.0, 2.0, 3.0], "score": [1.0, 2.0, 3.0], "loss": [2.0, 1.0, 3.0]}
    steps = iter(range(3))

    class Scripted(Trainer):
        def evaluate(self, *given: Any, **options: Any) -> dict[str, float]:
            metrics, step = super().evaluate(*given, **options), next(steps)
            return metrics | {f"eval_{key}": series[step] for key, series in values.items()}

    trainer = make_trainer(
        tmp_path,
        make=Scripted,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=3,
        metric_for_best_model=name,
        greater_is_better=greater,
    )
    trainer.train()
    assert trainer.state.best_global_step == best


# ---- secrets


@pytest.mark.row(206)
def test_the_token_is_in_no_file(tmp_path: Path) -> None:
    token = "hf_" + "s3cret" * 4
    trainer = make_trainer(
        tmp_path,
        hub_token=token,
        eval_strategy="epoch",
        save_strategy="epoch",
        log_digest_steps=1,
    )
    metrics = trainer.train().metrics
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", metrics)
    make_trainer(tmp_path, hub_token=token + "2").train(resume_from_checkpoint=True)
    assert trainer.args.hub_token == token

    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"training_args.json", "trainer_state.json"} <= {path.name for path in files}
    assert [path for path in files if token.encode() in path.read_bytes()] == []
