"""``compile(step, whole=True)``: forward, backward, transforms and update as one compiled function.

The step runs once with stand-ins for its tensors (no memory, no arithmetic), and every operation that it
asks for is written down; the compiler gets that list, with the gradients, the clipping and the update in
it, and can fuse across them. What Python decides on the way is decided then, for every step; so all that
varies from step to step is an input: tensors of the state and of the batch, learning rates, seeds.
"""

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import attrs
import torch
from attrs import evolve, field, frozen
from torch import Tensor, nn

from trainstep import rng, tree
from trainstep.batches import split_batch
from trainstep.decompositions import ADAM
from trainstep.errors import CaptureError
from trainstep.grads import accumulate
from trainstep.losses import ModuleLoss
from trainstep.rehearsal import generators_watched
from trainstep.rng import TracedKey
from trainstep.stages import signature
from trainstep.state import TrainState, consume, parts, refuse_state
from trainstep.step import Step
from trainstep.types import Hyper, Metrics

# Fusing in another order breaks what inductor generates for the gradients of a whole step in
# torch 2.11 on CUDA.
_OPTIONS = {"loop_ordering_after_fusion": False}


@frozen(eq=False)
class WholeStep(Step):
    """A step whose work is one compiled function of tensors; what ``compile(step, whole=True)`` returns.

    Attributes:
        backend: ``"inductor"``, or ``"eager"`` to run the list of operations as it is.
    """

    backend: str = field(default="inductor", kw_only=True)
    _programs: dict[Hashable, "Program"] = field(factory=dict, kw_only=True, repr=False)

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Return the state after one update, and metrics that stay on the device."""
        if not isinstance(state, TrainState):
            refuse_state("step(state, batch)", state, batch)
        complete = state.evolve(extras=self.memory(state))
        mine = complete if self.donates else tree.clone(complete)
        hyper = self.hyper(state.step)
        device = next(iter(state.params.values())).device
        metrics = self.work(mine, batch, _rates(hyper, device), self.loss_key(state))
        after = mine.evolve(step=state.step + 1)
        if self.donates:
            consume(state)
        return after, self.with_rate(metrics, hyper)

    def work(self, state: TrainState, batch: Any, rates: Hyper, key: Any) -> Metrics:
        """Make one update in the tensors of ``state``.

        Args:
            state: with the memory of transforms and guards in it.
            batch: a pytree of tensors on the state's device.
            rates: hyperparameters as tensors on that device.
            key: of the loss.
        """
        leaves, spec = tree.flatten((parts(state), batch, rates))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        shapes = tuple((t.shape, t.dtype, t.device, t.stride()) for t in tensors)
        which = (spec, signature(batch, []), shapes)
        program = self._programs.get(which)
        if program is None:
            program = self._programs[which] = Program.trace(self, state, leaves, spec)
        with torch.no_grad(), rng.seeded(key.fold_in(0), {t.device for t in tensors}):
            return program(tensors)

    @property
    def draws_on_host(self) -> bool:
        """Whether it is known of any shape of batch that random numbers are drawn on the CPU."""
        return any(program.draws_on_host for program in self._programs.values())

    def with_rate(self, metrics: Metrics, hyper: Hyper) -> Metrics:
        """Return the metrics with the rate as the host knows it, in float64."""
        if "lr" in hyper:
            metrics["lr"] = torch.as_tensor(hyper["lr"], dtype=torch.float64)
        return metrics


def whole_step(step: Step, backend: str, mode: str | None = None) -> WholeStep:
    """Return ``step`` as one compiled function.

    Raises:
        ValueError: if something in it needs the host between its operations; says what.
    """
    reasons = list(_against(step, backend, mode))
    if reasons:
        raise ValueError(
            f"compile: whole=True puts everything into one function, but {'; '.join(reasons)}. Leave "
            "whole=True out: then the loss is compiled, and the rest runs as ever."
        )
    parts = {part.name: getattr(step, part.name) for part in attrs.fields(Step)}
    return WholeStep(**parts, backend=backend)


def check_open(where: str, step: Step) -> None:
    """Raise TypeError if a step is one function, where its gradients and its update are wanted apart."""
    if isinstance(step, WholeStep):
        raise TypeError(
            f"{where}: the step was compiled as a whole, so its gradients and its update cannot be had "
            f"apart. Give {where} the step that is not compiled, or compile(step) without whole=True."
        )


def _against(step: Step, backend: str, mode: str | None) -> Iterator[str]:
    if mode is not None:
        yield f"mode={mode!r} belongs to torch.compile"
    if backend not in ("inductor", "eager"):
        yield f'backend={backend!r} cannot be used with it (only "inductor" and "eager")'
    if not step.optimizer.capturable:
        yield (
            f"optim.{step.optimizer.name} asks the host in every update (fused adam and adamw do not)"
        )
    if step.on_nonfinite == "raise":
        yield 'on_nonfinite="raise" asks the host in every step'
    if step.microbatches == "iter":
        yield 'microbatches="iter" takes any number of micro-batches'
    if isinstance(step.loss_fn, ModuleLoss):
        for part in step.loss_fn.apply.module.modules():
            if isinstance(part, nn.RNNBase):
                yield f"PyTorch cannot write down the backward pass of nn.{type(part).__name__}"
    for transform in step.transforms:
        if transform.period != 1:
            yield f"transforms.{transform.name} does something else from step to step"


@frozen(eq=False)
class Program:
    """What a step does to tensors of certain shapes.

    Attributes:
        run: takes the tensors as a list, changes those of the state, and returns those of the metrics.
        names: of the metrics.
        draws_on_host: whether random numbers are drawn on the CPU.
    """

    run: Callable[..., Any]
    names: tuple[str, ...]
    draws_on_host: bool

    def __call__(self, tensors: list[Tensor]) -> Metrics:
        return dict(zip(self.names, self.run(*tensors), strict=True))

    @classmethod
    def trace(cls, step: WholeStep, state: TrainState, leaves: list[Any], spec: Any) -> "Program":
        """Write down and compile what ``step`` does to ``leaves``: state, batch and rates by ``spec``."""
        from torch.fx.experimental.proxy_tensor import make_fx

        names: list[str] = []

        def body(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            own, batch, rates = tree.unflatten(filled, spec)
            metrics = _update(step, _with_parts(state, own), batch, rates)
            names[:] = metrics
            return tuple(metrics.values())

        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        table = ADAM if step.backend == "inductor" else {}
        options: dict[str, Any] = {"tracing_mode": "fake", "_allow_non_fake_inputs": True}
        seeded = rng.seeded(rng.key(0), {t.device for t in tensors})
        with torch.enable_grad(), seeded, generators_watched(torch) as copied:
            traced = make_fx(body, table, **options)(*tensors)
        draws = [node for node in traced.graph.nodes if _draws(node)]
        if copied() and draws:
            raise CaptureError(
                "compile: the state of a generator is copied and put back, as gradient checkpointing does "
                "to draw the same dropout twice; a whole step that is compiled would draw another one. Use "
                "no dropout where layers run again, or leave whole=True out."
            )
        on_host = any(_device(node) == "cpu" for node in draws)
        if step.backend == "eager":
            return cls(traced, tuple(names), on_host)
        from torch import _inductor

        with torch.no_grad():
            compiled = _inductor.compile(traced, [*tensors], options=_OPTIONS)
        return cls(compiled, tuple(names), on_host)


def _draws(node: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _device(node: Any) -> str:
    """Return the type of the device that an operation's first result is on."""
    made = node.meta["val"]
    made = made[0] if isinstance(made, list | tuple) else made
    return str(made.device.type)


def _update(step: Step, state: TrainState, batch: Any, rates: Hyper) -> Metrics:
    """Do to stand-ins what a donated step does to tensors, and write the results into the state's."""
    loss, grads = accumulate(
        step.loss_fn,
        state.params,
        state.buffers,
        split_batch(batch, step.microbatches),
        TracedKey(),  # type: ignore[arg-type]
        order=step.order,
        scale=step.loss_scale(state),
    )
    donated = evolve(step, donates=True)
    before, key = state.evolve(), TracedKey()
    result, metrics = Step.update(donated, state, loss, grads, rates, key)  # type: ignore[arg-type]
    old, spec = tree.flatten(parts(before))
    new, new_spec = tree.flatten(parts(result))
    if spec != new_spec:
        raise ValueError(
            "compile: whole=True needs a state that holds all its parts from the beginning: make it with "
            "step.init(model)"
        )
    metrics = {name: value.clone() for name, value in metrics.items()}  # some are of the state
    with torch.no_grad():
        for target, source in zip(old, new, strict=True):
            if isinstance(target, Tensor) and target is not source:
                target.copy_(source)
    return metrics


def check_rates(hyper: Hyper) -> None:
    """Raise ValueError if a schedule gives more than rates: the rest kernels take from the host."""
    others = [name for name in hyper if name != "lr" and not name.endswith("/lr")]
    if others:
        raise ValueError(
            f"compile: whole=True takes learning rates from the schedule, not {', '.join(others)}, "
            "which would compile the step again whenever they change. Leave whole=True out."
        )


def _rates(hyper: Hyper, device: torch.device) -> dict[str, Tensor]:
    """Return learning rates where compiled kernels read them: float32 on a GPU, float64 on the CPU."""
    check_rates(hyper)
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    return {n: torch.full((), float(v), dtype=dtype, device=device) for n, v in hyper.items()}


def _with_parts(state: TrainState, given: tuple[Any, ...]) -> TrainState:
    params, buffers, opt_state, extras = given
    return state.evolve(params=params, buffers=buffers, opt_state=opt_state, extras=extras)
