"""NEFTune: the noise's size, where it comes from, and that it goes away."""

import math

import pytest
import torch
from torch import Tensor, nn

from support.peer import tiny
from trainer import neftune

VOCABULARY, LENGTH, WIDTH = 11, 6, 10


class Embedding(nn.Module):
    """Nothing but input embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids)


def ids(rows: int = 400) -> Tensor:
    return torch.arange(rows * LENGTH).reshape(rows, LENGTH) % VOCABULARY


def test_the_noise_is_uniform_between_bounds_that_shrink_with_the_size() -> None:
    model, alpha = Embedding(), 5.0
    plain = model(ids())
    neftune.attach(model, alpha)
    noise = (model(ids()) - plain).detach()

    bound = alpha / math.sqrt(LENGTH * WIDTH)
    assert 0.999 * bound < noise.abs().max() <= bound * (1 + 1e-6)
    assert abs(noise.mean()) < 0.02 * bound
    assert noise.var().item() == pytest.approx(bound**2 / 3, rel=0.02)
    assert noise.flatten().unique().numel() > 0.9 * noise.numel()


def test_the_draws_are_those_of_the_default_generator() -> None:
    model = Embedding()
    plain = model(ids())
    neftune.attach(model, 3.0)
    bound = 3.0 / math.sqrt(LENGTH * WIDTH)
    torch.manual_seed(5)
    noisy = model(ids())
    torch.manual_seed(5)
    expected = plain + torch.empty_like(plain).uniform_(-bound, bound)
    assert torch.equal(noisy, expected)
    assert not torch.equal(model(ids()), noisy)


def test_the_hook_of_transformers_gives_the_same() -> None:
    hooks = pytest.importorskip("transformers.integrations.neftune")
    model = Embedding()
    plain = model(ids())
    model.words.neftune_noise_alpha = 5.0
    torch.manual_seed(1)
    theirs = hooks.neftune_post_forward_hook(model.words, (), plain)
    neftune.attach(model, 5.0)
    torch.manual_seed(1)
    torch.testing.assert_close(model(ids()), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.row(20)
def test_evaluation_is_left_alone_and_draws_nothing() -> None:
    model = Embedding()
    plain = model(ids())
    neftune.attach(model, 5.0)
    model.eval()
    state = torch.get_rng_state()
    assert torch.equal(model(ids()), plain)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.row(20)
def test_detaching() -> None:
    model = Embedding()
    plain = model(ids())
    handle = neftune.attach(model, 5.0)
    handle.detach()
    handle.detach()
    assert torch.equal(model(ids()), plain)

    def fail() -> None:
        with neftune.attach(model, 5.0):
            assert not torch.equal(model(ids()), plain)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(model(ids()), plain)
    assert not model.words._forward_hooks


def test_gradients_pass_through_and_dtypes_stay() -> None:
    model = Embedding().bfloat16()
    with neftune.attach(model, 5.0):
        out = model(ids(2))
    assert out.dtype is torch.bfloat16
    out.sum().backward()
    counts = torch.bincount(ids(2).flatten(), minlength=VOCABULARY)
    assert model.words.weight.grad is not None
    assert torch.equal(model.words.weight.grad[:, 0].long(), counts)


def test_a_wrapped_model_of_transformers() -> None:
    model = tiny("llama")
    wrapped = nn.DataParallel(model)
    batch = ids(2)
    plain = model(input_ids=batch).logits
    with neftune.attach(wrapped, 5.0):
        assert not torch.equal(model(input_ids=batch).logits, plain)
    assert torch.equal(model(input_ids=batch).logits, plain)


class Silent(nn.Module):
    """Inherits the method without an answer."""

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


class Empty(nn.Module):
    def get_input_embeddings(self) -> None:
        return None


@pytest.mark.parametrize("model", [nn.Linear(1, 1), Silent(), Empty()])
def test_a_model_that_does_not_tell_its_embeddings(model: nn.Module) -> None:
    name = type(model).__name__
    with pytest.raises(ValueError, match=f"{name} does not tell.*get_input_embeddings.*None"):
        neftune.attach(model, 5.0)


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf")])
def test_strengths_that_make_no_sense(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"neftune_noise_alpha must be a finite number.*5, 10"):
        neftune.attach(Embedding(), alpha)
