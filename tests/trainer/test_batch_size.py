"""Finding a batch size: which sizes are tried, what counts as lack of memory, what is put back."""

import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainstep as ts
from support import models
from support.shell import Scored, make_trainer, scored
from trainer.batch_size import find_executable_batch_size, is_out_of_memory, remember


def nothing() -> Callable[[], None]:
    return lambda: None


def fits(most: int, tried: list[int]) -> Callable[[int], str]:
    """An attempt for which a batch may have at most ``most`` samples."""

    def run(size: int) -> str:
        tried.append(size)
        if size > most:
            raise torch.OutOfMemoryError(f"CUDA out of memory.\nTried {size}")
        return f"done with {size}"

    return run


@pytest.mark.row(18)
@pytest.mark.parametrize(
    ("start", "most", "sizes"),
    [(8, 6, [8, 7, 6]), (8, 8, [8]), (100, 73, [100, 90, 81, 72]), (3, 1, [3, 2, 1])],
)
def test_nine_tenths_each_time(start: int, most: int, sizes: list[int]) -> None:
    tried: list[int] = []
    result = find_executable_batch_size(fits(most, tried), start, snapshot=nothing)
    assert tried == sizes
    assert result == f"done with {sizes[-1]}"


def test_each_retry_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trainer"):
        find_executable_batch_size(fits(7, []), 8, snapshot=nothing)
    (message,) = caplog.messages
    assert message.startswith("A batch of 8 does not fit into memory (CUDA out of memory.).")
    assert message.endswith("with batches of 7.")


def test_not_even_one_fits() -> None:
    tried: list[int] = []
    with pytest.raises(RuntimeError, match=r"no batch size fits.*from 3.*gradient_check") as caught:
        find_executable_batch_size(fits(0, tried), 3, snapshot=nothing)
    assert tried == [3, 2, 1]
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_pass_and_nothing_is_retried() -> None:
    calls: list[str] = []

    def run(size: int) -> None:
        calls.append("run")
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        find_executable_batch_size(run, 8, snapshot=lambda: lambda: calls.append("restore"))
    assert calls == ["run"]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        find_executable_batch_size(run, 0, snapshot=nothing)


def test_the_snapshot_is_taken_once_and_put_back_before_each_further_attempt() -> None:
    calls: list[Any] = []

    def snapshot() -> Callable[[], None]:
        calls.append("snapshot")
        return lambda: calls.append("restore")

    find_executable_batch_size(fits(6, calls), 8, snapshot=snapshot)
    assert calls == ["snapshot", 8, "restore", 7, "restore", 6]


def test_what_a_failed_attempt_held_is_gone_before_the_next() -> None:
    """The error's traceback holds the frames, and these the activations."""
    held: list[weakref.ref[Any]] = []

    def run(size: int) -> int:
        if held:
            assert held[0]() is None
            return size
        activations = nn.Linear(2, 2)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert find_executable_batch_size(run, 4, snapshot=nothing) == 3


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("whatever"),
        torch.cuda.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
    ],
)
def test_lack_of_memory_is_recognised(error: Exception) -> None:
    error.add_note("while training")
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: device-side assert"), ValueError("out of memory"), KeyError()],
)
def test_other_errors_are_no_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_the_allocator_of_the_cpu_says_so() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_parameters_and_buffers_are_put_back_in_place() -> None:
    model = models.build("batch_norm")
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    restore = remember(model)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        for part in model.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = buffer + 1  # replaced, not changed
        restore()
        now = model.state_dict()
        assert all(torch.equal(now[name], value) for name, value in before.items())
        assert all(dict(model.named_parameters())[n] is p for n, p in parameters.items())
        assert all(dict(model.named_buffers())[n] is b for n, b in buffers.items())


def test_tied_weights_stay_tied() -> None:
    model: Any = models.build("tied")
    restore = remember(model)
    with torch.no_grad():
        model.embedding.weight.zero_()
    restore()
    assert model.embedding.weight is model.head.weight
    assert bool(model.embedding.weight.any())


@pytest.mark.parametrize(
    "optimizer",
    [ts.optim.adamw(), ts.optim.sgd(momentum=0.9), ts.optim.from_torch(torch.optim.NAdam)],
    ids=["adamw", "sgd", "from_torch"],
)
def test_a_donated_training_starts_again_from_weights_and_moments(optimizer: Any) -> None:
    model = models.build("mlp")
    step = ts.donate(
        ts.make_step(
            ts.module_loss(model, lambda call, b: (call(b["x"]) - b["y"]).square().mean()),
            optimizer,
            schedule=ts.schedules.constant(0.05),
        )
    )
    first = ts.init(model, optimizer, seed=0, copy=False)
    earlier = step(first, models.batch(4))[0].opt_state  # moments of a training before this one
    restore = remember(model, earlier)

    def run() -> str:
        state = ts.init(model, optimizer, seed=0, copy=False).evolve(opt_state=earlier)
        for seed in range(3):
            state, _ = step(state, models.batch(4, seed=seed))
        return ts.digest(state)

    once = run()
    moved = run()
    restore()
    assert run() == once != moved


class Tight(Scored):
    """Lacks memory for more than 3 samples, as it turns out in the second step."""

    seen = 0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        self.seen += len(x) > 3
        if len(x) > 3 and self.seen == 2:
            raise torch.OutOfMemoryError("none left")
        return super().forward(x, labels)


@pytest.mark.parametrize("given", [False, True], ids=["made", "given"])
def test_a_trainer_starts_again_with_the_optimizer_as_it_was(given: bool, tmp_path: Path) -> None:
    def train(size: int, **options: Any) -> str:
        model = scored("mlp", kind=Tight)
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()  # so that there are moments to be put back
        more = {"optimizers": (optimizer, None)} if given else {}
        options |= {"per_device_train_batch_size": size, "save_strategy": "no"}
        trainer = make_trainer(tmp_path, model, more=more, **options)
        trainer.train()
        assert trainer.state.train_batch_size == 3
        return ts.digest(trainer.train_state)

    assert train(4, auto_find_batch_size=True) == train(3)


def test_parameters_that_were_unfrozen_since_the_training_before(tmp_path: Path) -> None:
    class Large(Scored):
        full = False

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            if self.full and len(x) > 3:
                raise torch.OutOfMemoryError("none left")
            return super().forward(x, labels)

    trainer = make_trainer(
        tmp_path,
        scored("mlp", kind=Large),
        per_device_train_batch_size=4,
        auto_find_batch_size=True,
        optim="adamw_torch",
    )
    first = next(trainer.model.parameters()).requires_grad_(False)
    trainer.train()
    first.requires_grad_(True)
    trainer.model.full = True
    before = first.detach().clone()
    trainer.train()
    assert trainer.state.train_batch_size == 3
    assert not torch.equal(first, before)
