"""What two processes do together; every function is called by both, asserts, and leaves nothing behind."""

import contextlib
import io
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

import trainstep as ts
from support.ranks.launch import report
from support.shell import (
    At,
    Scored,
    logged,
    make_args,
    make_trainer,
    samples,
    scored,
    scripted,
    stop,
)
from trainer import Trainer, TrainerCallback, TrainingInterrupted, checkpoint
from trainer.distributed import agree, ranks_of

RANK = int(os.environ["RANK"])


def same(trainer: Any, value: Any) -> bool:
    """Whether both processes have this value."""
    one, other = agree.gather(trainer._ranks, value)
    return bool(one == other)


def digest(trainer: Any) -> str:
    return ts.digest(trainer.train_state)


class Only(TrainerCallback):
    """``At``, on one process."""

    def __init__(self, rank: int, event: str, step: int, action: Callable[[Any], Any]) -> None:
        if rank == RANK:
            setattr(self, f"on_{event}", getattr(At(event, step, action), f"on_{event}"))


def ranks_are_told_apart(folder: Path) -> None:
    trainer = make_trainer(folder, scored("mlp"))
    args = trainer.args
    assert (args.world_size, args.process_index, args.local_process_index) == (2, RANK, RANK)
    assert trainer.is_world_process_zero() == trainer.is_local_process_zero() == (RANK == 0)
    assert args.should_save == args.should_log == (RANK == 0)
    assert args.parallel_mode.name == "DISTRIBUTED"
    assert make_args(folder, log_on_each_node=False, save_on_each_node=True).should_save == (
        RANK == 0
    )


def options_reach_ddp(folder: Path) -> None:
    trainer = make_trainer(
        folder,
        scored("mlp"),
        train=samples(13),  # ends with a batch that one process lacks
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        ddp_find_unused_parameters=False,
        ddp_bucket_cap_mb=7,
        ddp_static_graph=True,
    )
    trainer.train()
    wrapper = trainer.model_wrapped
    assert isinstance(wrapper, DistributedDataParallel)
    assert wrapper.module is trainer.model
    assert not wrapper.find_unused_parameters
    assert wrapper.bucket_bytes_cap == 7 * 2**20
    assert wrapper.static_graph
    assert same(trainer, digest(trainer))
    plain = make_trainer(folder, scored("mlp"), train=samples(13), gradient_accumulation_steps=2)
    assert trainer._wrap_model(plain.model, training=False) is plain.model
    plain.args.num_train_epochs = 2
    plain.train()
    assert plain.model_wrapped.find_unused_parameters
    short = {"train": samples(5), "gradient_accumulation_steps": 2, "ddp_static_graph": True}
    make_trainer(folder, scored("mlp"), num_train_epochs=2, **short).train()
    for name, tensor in plain.train_state.params.items():
        torch.testing.assert_close(tensor, trainer.train_state.params[name], rtol=1e-6, atol=1e-7)


def backend_and_timeout_reach_the_group(folder: Path) -> None:
    make_trainer(folder, scored("mlp"))
    assert dist.get_backend() == "gloo"
    group = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
    assert group.options._timeout.total_seconds() == 45


def a_model_is_that_of_the_first(folder: Path) -> None:
    trainer = make_trainer(folder, scored("mlp", seed=RANK), train=samples(2))
    trainer.train()
    assert same(trainer, digest(trainer))
    other = make_trainer(folder, scored("mlp", seed=0), train=samples(2))
    other.train()
    assert digest(other) == digest(trainer)


def buffers_are_those_of_the_first(folder: Path) -> None:
    kept, sent = (
        make_trainer(folder, scored("batch_norm"), train=samples(12), ddp_broadcast_buffers=send)
        for send in (False, None)
    )
    for trainer, alike in ((kept, False), (sent, True)):
        trainer.train()
        buffers = {n: b.tolist() for n, b in trainer.train_state.buffers.items()}
        assert buffers
        assert same(trainer, buffers) == alike
        assert same(trainer, [p.tolist() for p in trainer.train_state.params.values()])
    with pytest.raises(ValueError, match=r"depend on who sees which batch: .*GroupNorm"):
        make_trainer(folder, scored("batch_norm"), exact_reduction=True).train()


def switches_of_one_process_are_those_of_all(folder: Path) -> None:
    def save(control: Any) -> None:
        control.should_save = True

    callbacks = [Only(1, "step_end", 1, save), Only(1, "step_end", 3, stop)]
    trainer = make_trainer(folder, train=samples(40), callbacks=callbacks)
    trainer.train()
    assert trainer.state.global_step == 3
    assert [path.name for path in checkpoint.list_checkpoints(folder)] == ["checkpoint-1"]
    assert not make_trainer(folder, train=samples(4)).train().metrics.get("nothing")

    def evaluate(control: Any) -> None:
        control.should_evaluate = True

    trainer = make_trainer(folder, train=samples(8), callbacks=[Only(0, "log", 1, evaluate)])
    trainer.train()
    assert len(logged(trainer, "eval_loss")) == 1


def only_callbacks_of_the_user_cost_a_message(folder: Path) -> None:
    def steps_of(callbacks: list[Any]) -> bool:
        trainer = make_trainer(folder, train=samples(8), callbacks=callbacks)
        trainer.train()
        return bool(trainer._steering._needed)

    own = TrainerCallback()
    assert not steps_of([own])  # of the package

    class Mine(TrainerCallback):
        pass

    assert steps_of([Mine()] if RANK else [])
    Mine.same_on_all_ranks = True  # type: ignore[attr-defined]
    assert not steps_of([Mine()])


def what_is_not_finite_on_one_is_skipped_on_all(folder: Path) -> None:
    data = samples(16)
    trainer = make_trainer(folder, scored("mlp"), train=data, on_nonfinite="skip")
    shuffled = [int(keys[1][1]) for keys in _batches(trainer)]
    data[shuffled[1 if RANK else 0]] = data[shuffled[0]]
    bad = data[_of_rank(trainer, 1)]
    bad["x"] = bad["x"] * float("nan")
    trainer.train()
    skipped = trainer.train_state.extras["skipped"]
    assert int(skipped) == 1
    assert same(trainer, digest(trainer))
    assert all(p.isfinite().all() for p in trainer.train_state.params.values())
    raising = make_trainer(folder, scored("mlp"), train=data, on_nonfinite="raise")
    with pytest.raises(FloatingPointError, match="step 1"):
        raising.train()


def _batches(trainer: Any) -> list[Any]:
    sampler = trainer.get_train_dataloader().batch_sampler
    sampler.set_position(0, 0)
    return list(sampler)


def _of_rank(trainer: Any, rank: int) -> int:
    """Return a sample that this process gets in the second update."""
    mine = _batches(trainer)[1][0][1]
    return int(agree.gather(trainer._ranks, mine)[rank])


def a_signal_to_one_ends_all(folder: Path) -> None:
    def kill(control: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    options = {"train": samples(40), "enable_jit_checkpoint": True}
    trainer = make_trainer(folder, callbacks=[Only(1, "step_end", 2, kill)], **options)
    with pytest.raises(TrainingInterrupted) as raised:
        trainer.train()
    assert raised.value.step == 2
    assert same(trainer, str(raised.value.checkpoint))
    assert checkpoint.verify(raised.value.checkpoint) == []
    again = make_trainer(folder, **options)
    again.train(resume_from_checkpoint=True)
    whole = make_trainer(folder, **options)
    whole.train()
    assert digest(again) == digest(whole)


def the_main_process_goes_first(folder: Path) -> None:
    args = make_args(folder)
    file = folder / "made"
    with args.main_process_first(desc="making a file"):
        if RANK == 0:
            time.sleep(0.3)
            file.write_text("")
        assert file.exists()
    expected = pytest.raises(KeyError) if RANK == 0 else contextlib.nullcontext()
    with expected, args.main_process_first(local=False):
        if RANK == 0:
            raise KeyError("the others are not kept waiting")


def what_must_be_alike_is_compared(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"argument gradient_accumulation_steps differs .*: 1 on pro"
    ):
        make_trainer(folder, gradient_accumulation_steps=1 + RANK).train()
    model = Scored(nn.Linear(4, 2, bias=RANK == 0))
    with pytest.raises(
        ValueError, match=r"tensor of the model body.bias differs .*, none on process 1"
    ):
        make_trainer(folder, model).train()


class Shards(IterableDataset):
    """Gives each process samples of its own, one more to the first than to the second."""

    shards_ranks = True

    def __init__(self) -> None:
        self.given: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        for sample in samples(9, seed=RANK)[: 9 if RANK == 0 else 5]:
            self.given.append(float(sample["x"][0]))
            yield sample


def processes_may_have_unequal_data(folder: Path) -> None:
    class Watched(Scored):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            seen.extend(x[:, 0].tolist())
            return super().forward(x, labels)

    seen: list[float] = []
    data = Shards()
    trainer = make_trainer(folder, scored("mlp", Watched), train=data, max_steps=5)
    trainer.train()
    assert trainer.state.global_step == 5
    assert seen == data.given
    assert same(trainer, digest(trainer))
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(folder, scored("mlp"), train=Shards(), **options)
    whole.train()
    again = make_trainer(folder, scored("mlp"), train=Shards(), **options)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert digest(again) == digest(whole)
    assert len(make_trainer(folder, scored("mlp")).predict(Shards()).predictions) == 14


def batches_are_asked_for_only_while_some_process_has_one(folder: Path) -> None:
    class Counting(Trainer):
        windows: list[int]

        def get_batch_samples(self, *args: Any) -> Any:
            window, items = super().get_batch_samples(*args)
            self.windows.append(len(window))
            return window, items

    for data in (samples(10), Shards()):
        trainer = make_trainer(
            folder,
            scored("mlp"),
            make=Counting,
            train=data,
            max_steps=6,
            gradient_accumulation_steps=2,
        )
        trainer.windows = []
        trainer.train()
        assert len(trainer.windows) == trainer.state.global_step == 6
        assert min(trainer.windows) == 1
        assert same(trainer, trainer.windows)
        assert same(trainer, digest(trainer))


def a_save_that_fails_fails_on_all(folder: Path) -> None:
    original = checkpoint.save

    def broken(root: Any, step: int, contents: Any) -> Path:
        if step in broken_at:
            raise checkpoint.CheckpointError("no space")
        return original(root, step, contents)

    checkpoint.save = broken
    options = {"train": samples(12), "save_strategy": "steps", "save_steps": 1}
    try:
        broken_at = {1}
        trainer = make_trainer(folder, **options)
        trainer.train()
        assert trainer.state.global_step == 3
        names = [path.name for path in checkpoint.list_checkpoints(folder)]
        assert names == ["checkpoint-2", "checkpoint-3"]
        broken_at = {3}
        with pytest.raises(checkpoint.CheckpointError, match="no space"):
            make_trainer(folder, **options).train()
    finally:
        checkpoint.save = original


def the_best_model_is_loaded_by_all(folder: Path) -> None:
    for more in ({}, {"async_save": True}):
        trainer = make_trainer(
            folder / str(len(more)),
            scored("mlp"),
            train=samples(16),
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=1,
            save_steps=1,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="score",
            greater_is_better=True,
            more={"compute_metrics": scripted([1, 3, 2, 0])},
            **more,
        )
        trainer.train()
        assert trainer.state.best_global_step == 2
        best = checkpoint.checkpoint_dir(trainer.args.output_dir, 2)
        assert trainer.state.best_model_checkpoint == str(best)
        kept = load_file(best / "model.safetensors")
        assert all(torch.equal(kept[name], p) for name, p in trainer.train_state.params.items())
        agree.gather(trainer._ranks, None)
        assert checkpoint.list_checkpoints(trainer.args.output_dir) == [best]


def only_the_first_writes_and_prints(folder: Path) -> None:
    mine = folder / str(RANK)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        trainer = make_trainer(
            mine,
            train=samples(8),
            save_strategy="epoch",
            log_digest_steps=1,
            log_level="info",
            log_level_replica="error",
        )
        trainer.train()
        trainer.save_model()
        trainer.save_state()
        trainer.log_metrics("train", {"a": 1.0})
        trainer.save_metrics("train", {"a": 1.0})
    level = logging.getLogger("trainer").getEffectiveLevel()
    logging.getLogger("trainer").setLevel(logging.WARNING)
    if RANK == 1:
        assert not mine.exists()
        assert printed.getvalue() == ""
        assert level == logging.ERROR
        return
    names = {path.name for path in mine.iterdir()}
    assert names >= {"checkpoint-2", "digests.jsonl", "trainer_state.json", "train_results.json"}
    assert names >= {"model.safetensors", "training_args.json"}
    assert "'loss'" in printed.getvalue()
    assert level == logging.INFO
    lines = [json.loads(line) for line in (mine / "digests.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines[1:]] == logged(trainer, "loss")


def only_the_first_shows_a_bar(folder: Path) -> None:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        trainer = make_trainer(folder, train=samples(8), disable_tqdm=False)
        trainer.train()
        trainer.evaluate()
    assert ("2/2" in shown.getvalue()) == (RANK == 0)
    assert RANK == 0 or shown.getvalue() == ""


def a_log_is_one_message(folder: Path) -> None:
    sent: list[int] = []
    gather = dist.all_gather

    def counting(parts: Any, tensor: Tensor, **options: Any) -> Any:
        sent.append(tensor.numel())
        return gather(parts, tensor, **options)

    options = {"max_steps": 6, "logging_steps": 3, "save_strategy": "no"}
    trainer = make_trainer(folder, scored("mlp"), train=samples(32), **options)
    dist.all_gather = counting
    try:
        trainer.train()
    finally:
        dist.all_gather = gather
    # Losses of three updates with the two counts, twice; the counts again at the end.
    assert [numbers for numbers in sent if numbers >= 2] == [5, 5, 2]
    assert trainer.state.total_flos == agree.from_first(trainer._ranks, trainer.state.total_flos)


def operations_are_those_of_all(folder: Path) -> None:
    trainer = make_trainer(folder, train=samples(15), logging_steps=2)
    # A sample counts 1 on process 0 and 100 on process 1, whose last batch has one sample.
    trainer.floating_point_ops = lambda inputs: len(inputs["x"]) * 100**RANK
    result = trainer.train()
    assert trainer.state.total_flos == result.metrics["total_flos"] == 8 + 7 * 100
    assert trainer.current_flos == 0


def each_has_its_random_state_back(folder: Path) -> None:
    drawn: list[float] = []

    class Draw(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 0:
                random.seed(RANK)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            drawn.append(random.random())

    options = {"train": samples(16), "save_strategy": "steps", "save_steps": 2}
    make_trainer(folder, callbacks=[Draw()], **options).train()
    rest, drawn[:] = drawn[2:], []
    again = make_trainer(folder, callbacks=[Draw()], **options)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert drawn == rest
    assert len(rest) == 2
    assert not same(again, rest)


def a_model_that_is_bypassed_is_noticed(folder: Path) -> None:
    class Bypassing(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(self.model, inputs, *args, **kwargs)

    with pytest.raises(
        RuntimeError, match=r"must call the model that they are given, not self.mod"
    ):
        make_trainer(folder, scored("mlp"), train=samples(8), make=Bypassing).train()


def a_step_of_ones_own_is_shared(folder: Path) -> None:
    class Plain(Trainer):
        def training_step(self, model: Any, inputs: Any, items: Any = None) -> Tensor:
            loss = model(**self._prepare_inputs(inputs))["loss"]
            loss.backward()
            return loss.detach()

    results = []
    for make in (Plain, Trainer):
        trainer = make_trainer(folder, scored("mlp"), train=samples(10), make=make)
        trainer.train()
        results.append((digest(trainer), logged(trainer, "loss")))
        assert same(trainer, results[-1])
    assert results[0] == results[1]


def what_is_not_there_is_refused(folder: Path) -> None:
    for options, words in (
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True with 2 processes"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches=True with 2 pro"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            make_trainer(folder, **options)
    shared = {"accelerator_config": {"split_batches": True}, "per_device_train_batch_size": 3}
    with pytest.raises(
        ValueError, match=r"shares each batch of 3 among 2 processes.*multiple of 2"
    ):
        make_trainer(folder, **shared).train()
    options = {"exact_reduction": True, "average_tokens_across_devices": False}
    with pytest.raises(
        ValueError, match="exact_reduction needs average_tokens_across_devices=True"
    ):
        make_trainer(folder, **options).train()


def nothing_to_resume_from_is_said_by_all(folder: Path) -> None:
    with pytest.raises(ValueError, match="there is no complete checkpoint"):
        make_trainer(folder).train(resume_from_checkpoint=True)
    with pytest.raises(checkpoint.CheckpointError, match="nowhere"):
        make_trainer(folder).train(resume_from_checkpoint=str(folder / "nowhere"))


CHECKS = [
    ranks_are_told_apart,
    backend_and_timeout_reach_the_group,
    options_reach_ddp,
    a_model_is_that_of_the_first,
    buffers_are_those_of_the_first,
    switches_of_one_process_are_those_of_all,
    only_callbacks_of_the_user_cost_a_message,
    what_is_not_finite_on_one_is_skipped_on_all,
    a_signal_to_one_ends_all,
    the_main_process_goes_first,
    what_must_be_alike_is_compared,
    processes_may_have_unequal_data,
    batches_are_asked_for_only_while_some_process_has_one,
    a_save_that_fails_fails_on_all,
    the_best_model_is_loaded_by_all,
    only_the_first_writes_and_prints,
    only_the_first_shows_a_bar,
    a_log_is_one_message,
    operations_are_those_of_all,
    each_has_its_random_state_back,
    a_model_that_is_bypassed_is_noticed,
    a_step_of_ones_own_is_shared,
    what_is_not_there_is_refused,
    nothing_to_resume_from_is_said_by_all,
]


def main(target: Path) -> None:
    """Run all checks; the first that fails ends the process."""
    torch.set_num_threads(1)
    ranks_of(make_args(target, ddp_backend="gloo", ddp_timeout=45))
    done = []
    for check in CHECKS:
        folder = target / check.__name__
        folder.mkdir(exist_ok=True)
        print(f"process {RANK}: {check.__name__}", file=sys.stderr, flush=True)
        check(folder)
        done.append(check.__name__)
        report(target, done)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
