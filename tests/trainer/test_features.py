"""Options of training that change the model or count something, end to end."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import trainstep as ts
from support.shell import make_args, make_trainer
from trainer import EarlyStoppingCallback, Trainer

transformers = pytest.importorskip("transformers")


def tiny() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        attention_dropout=0.1,
    )
    return transformers.LlamaForCausalLM(config)


def texts(n: int = 12) -> list[dict[str, Any]]:
    draws = torch.Generator().manual_seed(0)
    rows = torch.randint(17, (n, 6), generator=draws)
    masks = torch.ones_like(rows)
    masks[:, 4:] = 0
    return [
        {"input_ids": row, "attention_mask": mask, "labels": row}
        for row, mask in zip(rows, masks, strict=True)
    ]


def train(folder: Path, model: Any = None, make: Any = Trainer, **changes: Any) -> Any:
    options: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 3, **changes}
    trainer = make_trainer(
        folder, model or tiny(), train=texts(), evaluation=texts(4), make=make, **options
    )
    trainer.result = trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


@pytest.mark.row(13, 181)
@pytest.mark.parametrize("micro", [2, 4])
def test_smoothed_losses_do_not_depend_on_accumulation(micro: int, tmp_path: Path) -> None:
    def run(parts: int) -> Any:
        model = tiny()
        model.config.attention_dropout = 0.0
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        return train(
            tmp_path / str(parts),
            model,
            label_smoothing_factor=0.1,
            per_device_train_batch_size=12 // parts,
            gradient_accumulation_steps=parts,
            train_sampling_strategy="sequential",
        )

    whole, parts = run(1), run(micro)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)  # upstream: micro times as large
    plain = train(tmp_path / "plain", train_sampling_strategy="sequential")
    assert losses(plain)[0] != losses(whole)[0]


@pytest.mark.row(19)
def test_gradient_checkpointing_has_the_same_bits(tmp_path: Path) -> None:
    plain = train(tmp_path / "a")
    model = tiny()
    saving = train(tmp_path / "b", model, gradient_checkpointing=True)

    assert model.is_gradient_checkpointing
    assert losses(saving) == losses(plain)
    assert ts.digest(saving.train_state) == ts.digest(plain.train_state)


@pytest.mark.row(20)
def test_noise_is_on_the_embeddings_while_training_only(tmp_path: Path) -> None:
    noisy, plain = train(tmp_path / "a", neftune_noise_alpha=5.0), train(tmp_path / "b")
    assert losses(noisy) != losses(plain)
    assert not noisy.model.get_input_embeddings()._forward_hooks
    again = train(tmp_path / "c", neftune_noise_alpha=5.0)
    assert ts.digest(noisy.train_state) == ts.digest(again.train_state)


@pytest.mark.row(61)
@pytest.mark.parametrize(("how", "per_step"), [("all", 18), (True, 18), ("non_padding", 12)])
def test_tokens_are_counted(how: Any, per_step: int, tmp_path: Path) -> None:
    options = {"include_num_input_tokens_seen": how, "save_strategy": "steps", "save_steps": 2}
    trainer = train(tmp_path, **options)
    records = [r for r in trainer.state.log_history if "loss" in r]
    assert [r["num_input_tokens_seen"] for r in records] == [per_step * n for n in (1, 2, 3, 4)]
    assert all("train_tokens_per_second" in r for r in records)
    args = make_args(tmp_path, max_steps=4, per_device_train_batch_size=3, **options)
    again = Trainer(tiny(), args, train_dataset=texts())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.num_input_tokens_seen == 4 * per_step


@pytest.mark.row(113)
def test_operations_are_estimated_as_upstream_does(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    expected = 6 * 4 * 18 * tiny().num_parameters(exclude_embeddings=True)
    assert trainer.state.total_flos == trainer.result.metrics["total_flos"] == expected


@pytest.mark.row(108)
def test_memory_is_reported_when_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("psutil")
    trainer = train(tmp_path, skip_memory_metrics=False)
    keys = {"init_mem_cpu_alloc_delta", "before_init_mem_cpu", "train_mem_cpu_peaked_delta"}
    assert keys <= trainer.result.metrics.keys()
    assert "eval_mem_cpu_alloc_delta" in trainer.evaluate()
    assert "train_mem_cpu_alloc_delta" not in train(tmp_path / "b").result.metrics


def test_special_tokens_of_the_tokenizer_reach_the_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = 1, 7, 9
        model_input_names = ("input_ids",)

    model = tiny()
    with caplog.at_level(logging.WARNING):
        trainer = Trainer(
            model,
            make_args(tmp_path, max_steps=1),
            train_dataset=texts(),
            processing_class=Tokenizer(),
        )
        assert model.config.pad_token_id is None
        trainer.train()
    assert (model.config.pad_token_id, model.config.eos_token_id) == (9, 7)
    assert not model.config.use_cache


@pytest.mark.row(96)
def test_full_determinism_switches_kernels(tmp_path: Path) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    try:
        one, two = (train(tmp_path / name, full_determinism=True) for name in "ab")
        assert torch.are_deterministic_algorithms_enabled()
        assert ts.digest(one.train_state) == ts.digest(two.train_state)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.row(24)
def test_the_cache_is_emptied_at_the_multiples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.facade import losses as module

    calls: list[Any] = []
    monkeypatch.setattr(module, "empty_cache", calls.append)
    train(tmp_path, torch_empty_cache_steps=2, gradient_accumulation_steps=2)
    assert len(calls) == 4  # both micro-batches of steps 0 and 2


@pytest.mark.row(18, 205)
@pytest.mark.parametrize("own", [None, "AdamW", "Adagrad"])
def test_batches_that_do_not_fit_shrink_and_training_starts_anew(
    own: str | None, tmp_path: Path
) -> None:
    class Small(Trainer):
        sizes: list[int] = []  # noqa: RUF012 - filled by the test

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            size = len(inputs["input_ids"])
            self.sizes.append(size)
            if size > 6 and self.state.global_step == 2:
                raise torch.OutOfMemoryError("out of memory")
            return super().training_step(model, inputs, num_items_in_batch)

    def build(folder: Path, make: Any, size: int) -> Any:
        model, more = tiny(), {}
        if own:
            more["optimizers"] = (getattr(torch.optim, own)(model.parameters(), lr=0.01), None)
        return make_trainer(
            folder,
            model,
            train=texts(48),
            evaluation=texts(4),
            make=make,
            more=more,
            max_steps=4,
            per_device_train_batch_size=size,
            auto_find_batch_size=make is Small,
            save_strategy="steps",
            save_steps=4,
        )

    Small.sizes.clear()
    found, straight = build(tmp_path / "a", Small, 8), build(tmp_path / "b", Trainer, 6)
    found.train()
    straight.train()
    assert Small.sizes == [8, 8, 8, 7, 7, 7, 6, 6, 6, 6]
    assert found.args.per_device_train_batch_size == 8
    assert found.state.train_batch_size == 6
    assert ts.diff(found.train_state, straight.train_state) == []
    again = build(tmp_path / "a", Small, 8)
    again.train(resume_from_checkpoint=True)
    assert again.state.train_batch_size == 6


def test_a_run_that_early_stopping_ended_stays_ended_when_it_is_resumed(tmp_path: Path) -> None:
    def build() -> Any:
        return make_trainer(
            tmp_path,
            num_train_epochs=9,
            eval_strategy="epoch",
            save_strategy="epoch",
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
            restore_callback_states_from_checkpoint=True,
            callbacks=[EarlyStoppingCallback(2)],
            more={"compute_metrics": lambda prediction: {"score": 1.0}},
        )

    first, again = build(), build()
    stopped = first.train().global_step
    assert again.train(resume_from_checkpoint=True).global_step == stopped == 15
    assert ts.digest(again.train_state.opt_state) == ts.digest(first.train_state.opt_state)
