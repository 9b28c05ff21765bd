"""Optimizers that make their updates inside the backward pass, and leave no gradients behind."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from trainer.optimizers.layerwise import LayerwiseOptimizer
from trainstep.types import Grads


@define(eq=False)
class FusedUpdates:
    """The updates of one optimizer object, made while ``active``.

    What remains of a gradient is its norm: ``collect`` returns norms where others return gradients, so
    that the joint norm of what it returns is the norm of the gradients.

    Attributes:
        optimizer: a ``LayerwiseOptimizer``, or an object with ``fused_backward(loss, lr)`` (LOMO).
        names: the trainable parameters' names.
    """

    optimizer: Any
    names: dict[Tensor, str]
    _norms: dict[str, Tensor] = field(factory=dict, init=False)

    @property
    def layerwise(self) -> bool:
        """Whether each parameter has an optimizer of its own."""
        return isinstance(self.optimizer, LayerwiseOptimizer)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let backward passes update the parameters, until the end of the block."""
        with ExitStack() as stack:
            for parameter in self.names:
                if not self.layerwise:
                    hook = self.optimizer.grad_func
                    stack.callback(parameter.register_hook(hook).remove)
                after = parameter.register_post_accumulate_grad_hook(self._after)
                stack.callback(after.remove)
            yield

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a micro-batch, at the learning rate that the groups have now."""
        if self.layerwise:
            loss.backward()
        else:
            self.optimizer.fused_backward(loss, float(self.optimizer.param_groups[0]["lr"]))

    def collect(self) -> Grads:
        """Return the norm of each gradient since the last call, as a scalar on its device.

        Raises:
            ValueError: if a gradient was left, so that the pass was not this optimizer's.
        """
        if any(parameter.grad is not None for parameter in self.names):
            raise ValueError(
                f"{type(self.optimizer).__name__} updates inside its own backward pass, and there are "
                "gradients that it did not use. In training_step, call "
                "self.accelerator.backward(loss) rather than loss.backward()."
            )
        norms, self._norms = self._norms, {}
        return norms

    def _after(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is None:
            return
        wide = torch.float32 if grad.dtype in (torch.float16, torch.bfloat16) else None
        scale = getattr(self.optimizer, "loss_scale", None) or 1  # AdaLomo's, a constant
        self._norms[self.names[parameter]] = torch.linalg.vector_norm(grad, dtype=wide) / scale
        if self.layerwise:
            given = parameter.data
            self.optimizer.update(parameter)
            settle(parameter, given)
            parameter.grad = None


def fused_updates(optimizer: Any, names: dict[Tensor, str]) -> FusedUpdates | None:
    """Return the updates that an optimizer makes inside the backward pass; None for others.

    LOMO's objects hook themselves into the model when they are built. They are unhooked here, so that
    a backward pass outside of training changes nothing.
    """
    if isinstance(optimizer, LayerwiseOptimizer):
        return FusedUpdates(optimizer, names)
    if not callable(getattr(optimizer, "fused_backward", None)):
        return None
    for parameter in names:
        _unhook(parameter, optimizer.grad_func)
    return FusedUpdates(optimizer, names)


def refuse_scaling(args: Any, what: str) -> None:
    """Raise ValueError for arguments that need to see all gradients before an update."""
    reasons = {
        "fp16=True": args.fp16,
        'on_nonfinite="skip"': getattr(args, "on_nonfinite", "ignore") == "skip",
    }
    wrong = [name for name, given in reasons.items() if given]
    if wrong:
        raise ValueError(
            f"{what} updates inside the backward pass, so that no gradient can be unscaled or judged "
            f"before it: {' and '.join(wrong)} cannot work. Use bf16=True, or another optimizer."
        )


def settle(parameter: Tensor, given: Tensor) -> None:
    """Put values back into the memory that a parameter had, if an optimizer gave it another."""
    if parameter.data_ptr() != given.data_ptr():
        with torch.no_grad():
            given.copy_(parameter)
        parameter.data = given


def _unhook(parameter: Tensor, hook: Callable[..., Any]) -> None:
    hooks = parameter._backward_hooks or {}
    for key in [key for key, value in hooks.items() if value is hook]:
        del hooks[key]
