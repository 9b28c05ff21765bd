"""``linear_cross_entropy``: the loss and gradients of the plain head, without its logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import trainstep as ts
from trainstep import chunked
from trainstep.vmap import per_sample_grads

N, D, V = 13, 5, 7
CHUNKS = [1, 4, 13, 100, None]


def head(
    dtype: torch.dtype = torch.float64, rows: int = N, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor]:
    """Make hidden, weight, bias, and labels of which every fifth is ignored."""
    draws = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (rows, D), "weight": (V, D), "bias": (V,)}
    inputs = {
        name: torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }
    labels = torch.randint(V, (rows,), generator=draws)
    labels[::5] = -100
    return inputs, labels


def plain(inputs: dict[str, Tensor], labels: Tensor, **options: Any) -> Tensor:
    logits = F.linear(inputs["hidden"], inputs["weight"], inputs.get("bias"))
    return F.cross_entropy(logits, labels, reduction="sum", **options)


def gradients(loss: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
def test_equal_to_the_plain_head(chunk: int | None, smoothing: float) -> None:
    inputs, labels = head()
    options = {"label_smoothing": smoothing}
    loss = ts.linear_cross_entropy(**inputs, labels=labels, chunk=chunk, **options)
    expected = plain(inputs, labels, **options)

    assert loss.weight == (labels != -100).sum()
    torch.testing.assert_close(loss.total, expected, rtol=1e-14, atol=0)
    # The factor stands for what comes after: division by a count, a loss scale.
    mine, theirs = gradients(loss.total * 3, inputs), gradients(expected * 3, inputs)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    mean = F.cross_entropy(F.linear(*inputs.values()), labels, label_smoothing=smoothing)
    torch.testing.assert_close(loss.value, mean, rtol=1e-14, atol=0)


@pytest.mark.parametrize("names", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")])
def test_gradients_by_finite_differences(names: tuple[str, ...]) -> None:
    inputs, labels = head()
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in names)

    def loss(*values: Tensor) -> Tensor:
        given = inputs | dict(zip(names, values, strict=True))
        return ts.linear_cross_entropy(**given, labels=labels, chunk=4, label_smoothing=0.1).total

    assert torch.autograd.gradcheck(loss, [inputs[name] for name in names])


def test_without_a_bias_and_with_more_axes() -> None:
    inputs, labels = head(rows=12)
    del inputs["bias"]
    shaped = {"hidden": inputs["hidden"].reshape(3, 4, D), "weight": inputs["weight"]}
    loss = ts.linear_cross_entropy(**shaped, labels=labels.reshape(3, 4).int(), chunk=5)
    expected = plain(inputs, labels)
    torch.testing.assert_close(loss.total, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradients(loss.total, inputs), gradients(expected, inputs))


def test_a_tied_weight_gets_both_gradients() -> None:
    ids = torch.tensor([0, 3, 3, 6])
    labels = torch.tensor([1, 2, 0, 3])
    weight = head()[0]["weight"]
    mine = ts.linear_cross_entropy(weight[ids], weight, labels, chunk=3).total
    theirs = plain({"hidden": weight[ids], "weight": weight}, labels)
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight) for loss in (mine, theirs)))


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_in_float32_whatever_the_size_of_the_logits(offset: float) -> None:
    exact, labels = head()
    inputs = {name: t.detach().float().requires_grad_() for name, t in exact.items()}
    shifted = inputs | {"bias": inputs["bias"] + offset}
    loss = ts.linear_cross_entropy(**shifted, labels=labels, chunk=4)
    reference = plain(exact, labels)
    assert loss.total.dtype is torch.float32
    limit = 1e-6 if not offset else 1e-4  # the bias itself is rounded
    torch.testing.assert_close(loss.total.double(), reference, rtol=limit, atol=0)
    expected = {n: g.float() for n, g in gradients(reference, exact).items()}
    found = gradients(loss.total, inputs)
    torch.testing.assert_close(found, expected, rtol=10 * limit, atol=10 * limit)


def test_logits_beyond_the_range_of_exp() -> None:
    inputs, labels = head(torch.float32)
    large = inputs | {"hidden": (inputs["hidden"].detach() * 1e4).requires_grad_()}
    loss = ts.linear_cross_entropy(**large, labels=labels)
    torch.testing.assert_close(loss.total, plain(large, labels))
    assert all(g.isfinite().all() for g in gradients(loss.total, large).values())


@pytest.mark.parametrize("how", ["bfloat16 throughout", "autocast"])
def test_in_bfloat16_about_as_close_as_the_plain_head(how: str) -> None:
    narrow, labels = head(torch.bfloat16, rows=64)
    if how == "autocast":
        narrow = {name: t.detach().float().requires_grad_() for name, t in narrow.items()}
    exact = {name: t.detach().double().requires_grad_() for name, t in narrow.items()}
    reference = gradients(plain(exact, labels), exact)

    def distance(loss: Tensor) -> dict[str, float]:
        found = gradients(loss, narrow)
        assert all(found[n].dtype is narrow[n].dtype for n in found)
        return {n: float((found[n].double() - reference[n]).norm()) for n in found}

    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        loss = ts.linear_cross_entropy(**narrow, labels=labels, chunk=16)
        theirs = plain(narrow, labels)
    assert loss.total.dtype is torch.float32
    torch.testing.assert_close(loss.total.double(), plain(exact, labels), rtol=1e-2, atol=0)
    mine, other = distance(loss.total), distance(theirs)
    for name in mine:
        assert mine[name] <= 2 * other[name] + 1e-3, name


def test_autocast_computes_the_products_in_its_type() -> None:
    inputs, labels = head(torch.float32)
    seen = Allocations()
    with torch.autocast("cpu", torch.bfloat16), seen:
        ts.linear_cross_entropy(**inputs, labels=labels)
    assert torch.bfloat16 in seen.types
    exact, _ = head()
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 alone
        loss = ts.linear_cross_entropy(**exact, labels=labels)
    assert torch.equal(loss.total, ts.linear_cross_entropy(**exact, labels=labels).total)


def test_all_labels_ignored() -> None:
    inputs, labels = head()
    loss = ts.linear_cross_entropy(**inputs, labels=torch.full_like(labels, -100), chunk=4)
    assert (loss.total, loss.weight) == (0, 0)
    assert loss.value.isnan()
    for grad in gradients(loss.total, inputs).values():
        assert torch.equal(grad, torch.zeros_like(grad))


def test_no_rows_and_another_label_to_ignore() -> None:
    inputs, labels = head()
    none = inputs | {"hidden": inputs["hidden"][:0]}
    loss = ts.linear_cross_entropy(**none, labels=labels[:0])
    assert (loss.total, loss.weight) == (0, 0)
    assert torch.equal(gradients(loss.total, inputs)["weight"], torch.zeros(V, D).double())
    kept = labels.clamp(min=0)
    loss = ts.linear_cross_entropy(**inputs, labels=kept, ignore_index=3)
    torch.testing.assert_close(loss.total, plain(inputs, kept, ignore_index=3))
    assert loss.weight == (kept != 3).sum()


def test_the_same_bits_every_time() -> None:
    inputs, labels = head(torch.float32)

    def run() -> list[Tensor]:
        loss = ts.linear_cross_entropy(**inputs, labels=labels, chunk=3).total
        return [loss, *gradients(loss, inputs).values()]

    assert ts.equal(run(), run())


PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "linear")}


class Allocations(TorchDispatchMode):
    """Notes the sizes and types of the tensors that operations return, and reads of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.types: set[torch.dtype] = set()
        self.products = 0
        self.reads: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.products += func in PRODUCTS
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads.append(func)
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.types.add(tensor.dtype)
        return output


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    rows, features, classes, chunk = 256, 8, 512, 32
    hidden = torch.randn(rows, features, requires_grad=True)
    weight = torch.randn(classes, features, requires_grad=True)
    labels = torch.randint(classes, (rows,))
    seen, whole = Allocations(), Allocations()
    with seen:
        ts.linear_cross_entropy(hidden, weight, labels, chunk=chunk).total.backward()
    with whole:
        F.cross_entropy(F.linear(hidden, weight), labels).backward()
    assert seen.largest == chunk * classes
    assert whole.largest == rows * classes
    assert seen.reads == []


def test_the_default_chunk_depends_on_the_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainstep.chunked._LOGITS", 3 * V)
    inputs, labels = head()
    seen = Allocations()
    with torch.no_grad(), seen:
        ts.linear_cross_entropy(**inputs, labels=labels)
    assert seen.products == 5  # of 3 rows each, for 13


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_loss_is_computed(context: Any) -> None:
    inputs, labels = head()
    seen = Allocations()
    with context(), seen:
        loss = ts.linear_cross_entropy(**inputs, labels=labels, chunk=N)
    assert seen.products == 1
    assert not loss.total.requires_grad
    torch.testing.assert_close(loss.total, plain(inputs, labels).detach())


def test_the_backward_pass_can_run_twice_but_not_be_differentiated() -> None:
    inputs, labels = head()
    total = ts.linear_cross_entropy(**inputs, labels=labels).total
    first, *_ = torch.autograd.grad(total, list(inputs.values()), retain_graph=True)
    again, *_ = torch.autograd.grad(total, list(inputs.values()), retain_graph=True)
    assert torch.equal(first, again)
    by_hidden, *_ = torch.autograd.grad(total, list(inputs.values()), create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        by_hidden.sum().backward()


class Model(nn.Module):
    """Tokens to hidden states, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Embedding(V, D), nn.Tanh(), nn.Linear(D, D))
        self.head = nn.Linear(D, V)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.body(ids)
        return hidden


class Chunked(Model):
    def forward(self, ids: Tensor, labels: Tensor) -> ts.Loss:  # type: ignore[override]
        return ts.linear_cross_entropy(
            self.body(ids), self.head.weight, labels, bias=self.head.bias, chunk=4
        )


class Whole(Model):
    def forward(self, ids: Tensor, labels: Tensor) -> ts.Loss:  # type: ignore[override]
        logits = self.head(self.body(ids)).flatten(0, -2)
        total = F.cross_entropy(logits, labels.flatten(), reduction="sum")
        return ts.Loss(total, (labels != -100).sum())


def make(kind: type[Model], dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    model = kind().to(dtype)
    loss = ts.module_loss(model, lambda call, batch: call(**batch))
    step = ts.make_step(loss, ts.optim.adamw(1e-2), **options)
    return step, step.init(model)


def tokens(rows: int = 6, length: int = 5) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(V, (rows, length), generator=draws)
    labels = ids.roll(-1, dims=1).clone()
    labels[0] = -100
    labels[2, 2:] = -100
    return {"ids": ids, "labels": labels}


@pytest.mark.parametrize("microbatches", [1, 3, 6])
def test_in_a_step_any_split_gives_the_same_update(microbatches: int) -> None:
    step, state = make(Chunked, microbatches=microbatches)
    whole, theirs = make(Whole)
    for _ in range(3):
        state, metrics = step(state, tokens())
        theirs, expected = whole(theirs, tokens())
        assert metrics["weight"] == expected["weight"] == 5 * 5 - 3
        torch.testing.assert_close(metrics["loss"], expected["loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(dict(state.params), dict(theirs.params), rtol=1e-9, atol=1e-12)


def test_micro_batches_whose_labels_are_all_ignored() -> None:
    step, state = make(Chunked, microbatches=6)  # the first is
    state, metrics = step(state, tokens())
    assert metrics["loss"].isfinite()
    assert all(p.isfinite().all() for p in state.params.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_in_one_graph() -> None:
    torch._dynamo.reset()
    inputs, labels = head()
    settings = chunked._Settings(4, -100, 0.1, torch.float64)
    compiled = torch.compile(chunked._total, backend="aot_eager", fullgraph=True)
    total = compiled(*inputs.values(), labels, settings)
    expected = plain(inputs, labels, label_smoothing=0.1)
    torch.testing.assert_close(total, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradients(total, inputs), gradients(expected, inputs))


def test_under_functional_transforms() -> None:
    inputs, labels = head()
    values = tuple(t.detach() for t in inputs.values())

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ts.linear_cross_entropy(hidden, weight, labels, bias=bias, chunk=4).total

    found = torch.func.grad(loss, argnums=(0, 1, 2))(*values)
    expected = gradients(plain(inputs, labels), inputs)
    torch.testing.assert_close(dict(zip(inputs, found, strict=True)), expected)


def test_per_sample_gradients() -> None:
    model = Chunked().double()
    _, params, buffers = ts.functionalize(model)
    loss_fn = ts.module_loss(model, lambda call, batch: call(**batch))
    batch = {name: t[1:] for name, t in tokens().items()}
    key = ts.rng.key(0)
    found = per_sample_grads(loss_fn)(params, buffers, batch, key)
    for row in range(5):
        one = {name: t[row : row + 1] for name, t in batch.items()}
        _, grads = ts.value_and_grad(loss_fn)(params, buffers, one, key)
        torch.testing.assert_close({n: g[row] for n, g in found.items()}, grads)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"weight": torch.zeros(D, V)}, ValueError, r"hidden \(13, 5\) and weight \(5, 7\)"),
        ({"labels": torch.zeros(N, 1).long()}, ValueError, r"shape \(13,\), got \(13, 1\)"),
        ({"labels": torch.zeros(N)}, TypeError, "class indices, got torch.float32"),
        ({"bias": torch.zeros(1)}, ValueError, r"bias must be \(7,\).* got \(1,\)"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1 row, got 0"),
        ({"label_smoothing": 1.5}, ValueError, r"between 0 and 1, got 1\.5"),
        ({"bias": torch.zeros(V)}, TypeError, "outside autocast, got float32, float64"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    inputs, labels = head()
    with pytest.raises(error, match=text):
        ts.linear_cross_entropy(**{**inputs, "labels": labels, **changes})


def test_a_label_out_of_range_is_refused() -> None:
    inputs, labels = head()
    labels[1] = V
    with pytest.raises(RuntimeError, match="out of bounds"):
        ts.linear_cross_entropy(**inputs, labels=labels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("strict", [False, True], ids=["", "deterministic"])
def test_captured_it_has_the_same_bits(strict: bool) -> None:
    def run(lower: Any) -> ts.TrainState:
        model = Chunked().cuda()
        loss = ts.module_loss(model, lambda call, batch: call(**batch))
        step = ts.make_step(loss, ts.optim.adamw(1e-2), microbatches=2)
        state = step.init(model)
        lowered = lower(step)
        batch = {name: t.cuda() for name, t in tokens().items()}
        for _ in range(6):
            state, _ = lowered(state, batch)
        return state

    torch.use_deterministic_algorithms(strict)
    try:
        assert ts.diff(run(ts.capture), run(ts.donate)) == []
    finally:
        torch.use_deterministic_algorithms(False)
