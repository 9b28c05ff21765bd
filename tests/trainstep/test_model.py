"""``functionalize``: the module's own output, from given tensors, with the module left as it was."""

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trainstep as ts
from support import models
from support.snapshots import untouched
from trainstep.model import held

KEY = ts.rng.key(5)


def shifted(tensors: dict[str, Tensor], by: float = 0.125) -> dict[str, Tensor]:
    return {n: t + by if t.is_floating_point() else t.clone() for n, t in tensors.items()}


def load(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", models.MODELS)
def test_output_and_buffers_are_the_modules_own_bit_for_bit(name: str, train: bool) -> None:
    module, plain, x = models.build(name), models.build(name), models.batch()["x"]
    apply, params, buffers = ts.functionalize(module)
    params = shifted(params)
    load(plain, params)
    plain.requires_grad_(False)  # as the given tensors: some kernels depend on it
    with ts.rng.seeded(KEY):
        expected = plain.train(train)(x)
    with untouched(module, params, buffers):
        for _ in range(2):
            with ts.rng.seeded(KEY):
                out, after = apply(params, buffers, x, train=train)
            assert torch.equal(out, expected)
            assert after.keys() == buffers.keys()
            own = dict(plain.named_buffers()) | dict(plain.named_parameters())
            assert all(torch.equal(tensor, own[n]) for n, tensor in after.items())


@pytest.mark.parametrize("name", models.MODELS)
def test_gradients_are_the_modules_own_bit_for_bit(name: str) -> None:
    module, plain, data = models.build(name), models.build(name), models.batch()
    params, buffers = ts.functionalize(module)[1:]
    loss_fn = ts.module_loss(module, models.mean_loss)
    with untouched(module, params, buffers, data):
        _, grads = ts.value_and_grad(loss_fn)(params, buffers, data, KEY)
    with ts.rng.seeded(KEY.fold_in(0)):
        models.mean_loss(plain, data).backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys()
    assert all(torch.equal(grads[n], expected[n]) for n in grads)


def test_split_of_tensors_into_params_and_buffers() -> None:
    _, params, buffers = ts.functionalize(models.build("tied"))
    assert set(params) == {"embedding.weight", "mixer.weight", "mixer.bias"}
    assert not buffers
    _, params, buffers = ts.functionalize(models.build("frozen"))
    assert (set(params), set(buffers)) == ({"2.weight"}, {"0.weight", "0.bias", "2.bias"})
    _, params, buffers = ts.functionalize(models.build("counting"))
    assert set(buffers) == {"average", "calls", "last"}


def test_tied_weights_stay_tied_and_get_the_sum_of_both_gradients() -> None:
    module = models.build("tied")
    apply, params, buffers = ts.functionalize(module)
    zero = {**params, "embedding.weight": torch.zeros_like(params["embedding.weight"])}
    assert not apply(zero, buffers, models.batch()["x"])[0].any()


def test_copies_are_detached_and_private_and_views_are_shared() -> None:
    module = models.build("batch_norm")
    _, params, buffers = ts.functionalize(module)
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, tensor in {**params, **buffers}.items():
        assert not tensor.requires_grad
        assert tensor.data_ptr() != own[name].data_ptr()
    _, params, buffers = ts.functionalize(module, copy=False)
    for name, tensor in {**params, **buffers}.items():
        assert not tensor.requires_grad
        assert tensor.data_ptr() == own[name].data_ptr()


@pytest.mark.parametrize("name", models.STATEFUL)
def test_evaluation_changes_no_buffer_and_training_does(name: str) -> None:
    apply, params, buffers = ts.functionalize(models.build(name))
    x = models.batch()["x"]
    assert ts.equal(apply(params, buffers, x, train=False)[1], buffers)
    assert ts.diff(apply(params, buffers, x)[1], buffers)


@pytest.mark.parametrize("name", models.STATEFUL)
def test_donated_buffers_have_the_same_bits(name: str) -> None:
    apply, params, buffers = ts.functionalize(models.build(name))
    x, own = models.batch()["x"], ts.tree.clone(buffers)
    pure, donated = buffers, own
    for _ in range(3):
        _, pure = apply(params, pure, x)
        _, donated = apply(params, donated, x, donate_buffers=True)
    assert ts.equal(pure, donated)


def test_mode_of_a_submodule_that_its_owner_keeps_apart() -> None:
    module = models.build("batch_norm")
    module[1].eval()  # as for a frozen backbone: statistics must not move in training
    apply, params, buffers = ts.functionalize(module)
    with untouched(module):
        assert ts.equal(apply(params, buffers, models.batch()["x"])[1], buffers)
        apply(params, buffers, models.batch()["x"], train=False)


class Failing(nn.Module):
    """Fails after its buffers and mode were used."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = models.build("counting")
        self.second = models.build("lstm")

    def forward(self, x: Tensor) -> Tensor:
        self.second(self.inner(x).repeat(1, 2))
        raise ArithmeticError("from inside forward")


@pytest.mark.parametrize("train", [True, False])
def test_exception_inside_forward_leaves_the_module_untouched(train: bool) -> None:
    module = Failing()
    apply, params, buffers = ts.functionalize(module)
    loss_fn = ts.module_loss(module, lambda call, batch: call(batch["x"]).mean())
    data = models.batch()
    with untouched(module, params, buffers, data):
        with pytest.raises(ArithmeticError, match="from inside forward"):
            apply(params, buffers, data["x"], train=train)
        with pytest.raises(ArithmeticError, match="from inside forward"):
            ts.value_and_grad(loss_fn)(params, buffers, data, KEY)


def test_exception_in_backward_leaves_the_module_untouched() -> None:
    module = models.build("mlp")
    params, buffers = ts.functionalize(module)[1:]

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            raise ArithmeticError("from inside backward")

    loss_fn = ts.module_loss(module, lambda call, batch: Explode.apply(call(batch["x"])).mean())
    with untouched(module, params), pytest.raises(ArithmeticError, match="inside backward"):
        ts.value_and_grad(loss_fn)(params, buffers, models.batch(), KEY)


def test_wrong_names_are_listed() -> None:
    module = models.build("batch_norm")
    apply, params, buffers = ts.functionalize(module)
    x = models.batch()["x"]
    renamed = {n.replace("0.weight", "zero.weight"): p for n, p in params.items()}
    with untouched(module):
        with pytest.raises(ValueError, match=r"params missing: 0\.weight\. .*zero\.weight"):
            apply(renamed, buffers, x)
        with pytest.raises(ValueError, match=r"do not fit Sequential.*params missing: 0\.bias"):
            apply({n: p for n, p in params.items() if n != "0.bias"}, buffers, x)
        with pytest.raises(ValueError, match=r"buffers missing: 1\.running_mean"):
            apply(params, {}, x)
        with pytest.raises(ValueError, match=r"buffers unexpected: extra"):
            apply(params, {**buffers, "extra": x}, x)
        with pytest.raises(ValueError, match="the same names"):
            apply(buffers, params, x)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got function"):
        ts.functionalize(test_wrong_names_are_listed)  # type: ignore[arg-type]


def test_nested_calls_see_their_own_tensors() -> None:
    inner = models.build("mlp")
    apply_inner, params_inner, none = ts.functionalize(inner)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            before = self.inner(x)
            between = apply_inner(shifted(params_inner, 1.0), none, x)[0]
            assert torch.equal(self.inner(x), before)
            return before + between

    outer = Outer()
    apply, params, buffers = ts.functionalize(outer)
    x = models.batch()["x"]
    expected = [apply_inner(shifted(params_inner, by), none, x)[0] for by in (2.0, 1.0)]
    with untouched(outer):
        out, _ = apply(shifted(params, 2.0), buffers, x)
        assert torch.equal(out, expected[0] + expected[1])
        with held():
            assert torch.equal(apply(shifted(params, 2.0), buffers, x)[0], out)


def test_the_same_module_twice_in_one_loss() -> None:
    module = models.build("batch_norm")
    _, params, buffers = ts.functionalize(module)
    loss_fn = ts.module_loss(module, lambda call, b: (call(b["x"]) * call(b["x"] + 1)).mean())
    data, plain = models.batch(), models.build("batch_norm")
    with untouched(module):
        loss, grads = ts.value_and_grad(loss_fn)(params, buffers, data, KEY)
    (plain(data["x"]) * plain(data["x"] + 1)).mean().backward()
    assert all(torch.equal(grads[n], p.grad) for n, p in plain.named_parameters())
    assert loss.buffers is not None
    assert all(torch.equal(loss.buffers[n], b) for n, b in plain.named_buffers())
    assert loss.buffers["1.num_batches_tracked"] == 2


@pytest.mark.parametrize("norm", [True, False])
def test_checkpointing_inside_gives_the_bits_of_no_checkpointing(norm: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = models.Checkpointed(recompute=True, norm=norm)
    _, params, buffers = ts.functionalize(module)
    params = shifted(params)  # not the module's own: recomputation must find these
    grad_fn = ts.value_and_grad(ts.module_loss(module, models.mean_loss))
    data = models.batch()
    with untouched(module, params):
        module.recompute = False
        _, plain = grad_fn(params, buffers, data, KEY)
        module.recompute = True
        _, first = grad_fn(params, buffers, data, KEY)
        _, second = grad_fn(params, buffers, data, KEY)
    assert ts.equal(plain, first)
    assert ts.equal(first, second)


def test_checkpointing_of_the_whole_call() -> None:
    module = models.build("dropout")
    _, params, buffers = ts.functionalize(module)

    def recomputed(call: nn.Module, data: dict[str, Tensor]) -> Tensor:
        out = checkpoint(call, data["x"], use_reentrant=False)
        return torch.nn.functional.mse_loss(out, data["y"])

    plain, whole = (
        ts.value_and_grad(ts.module_loss(module, fn))(params, buffers, models.batch(), KEY)[1]
        for fn in (models.mean_loss, recomputed)
    )
    assert ts.equal(plain, whole)


def run_threads(works: list[threading.Thread]) -> None:
    for work in works:
        work.start()
    for work in works:
        work.join(timeout=60)
        assert not work.is_alive(), "deadlock"


@pytest.mark.parametrize("name", ["mlp", "batch_norm", "lstm"])
def test_threads_with_different_params_get_their_own_results(name: str) -> None:
    module, x = models.build(name), models.batch()["x"]
    apply, params, buffers = ts.functionalize(module)
    members = [shifted(params, 0.1 * i) for i in range(4)]
    expected = [apply(member, buffers, x) for member in members]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(25):
            if not ts.equal(apply(members[i], buffers, x), expected[i]):
                wrong.append(i)

    with untouched(module):
        run_threads([threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)])
    assert not wrong


def test_threads_with_dropout_get_the_bits_of_one_thread() -> None:
    module, data = models.build("dropout"), models.batch()
    step = ts.make_step(ts.module_loss(module, models.mean_loss), ts.optim.sgd(lr=0.1))
    states = [ts.init(module, step.optimizer, seed=i) for i in range(4)]
    expected = [ts.digest(step(state, data)[0]) for state in states]
    wrong: list[int] = []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(25) if ts.digest(step(states[i], data)[0]) != expected[i])

    with untouched(module):
        run_threads([threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)])
    assert not wrong


def test_the_module_is_not_kept_alive() -> None:
    module = models.build("mlp")
    apply, params, buffers = ts.functionalize(module)
    apply(params, buffers, models.batch()["x"])
    reference = weakref.ref(module)
    del module, apply
    gc.collect()
    assert reference() is None
