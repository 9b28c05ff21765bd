"""Other ways to run the same step: same arguments, same bits, other costs."""

from typing import Any, overload

from attrs import evolve

from trainstep.captured import CapturedStep
from trainstep.captured_eval import CapturedEval
from trainstep.captured_whole import CapturedWhole
from trainstep.compiling import check_graphs, compiled_loss
from trainstep.evaluate import EvalStep
from trainstep.parallel import DataParallel
from trainstep.step import Step
from trainstep.vmap import Ensemble
from trainstep.whole import WholeStep, check_open, whole_step


@overload
def donate(step: Step) -> Step: ...
@overload
def donate(step: Ensemble) -> Ensemble: ...
def donate(step: Step | Ensemble) -> Step | Ensemble:
    """Return the step that reuses the buffers of the state it is given.

    As ``jax.jit(donate_argnums=0)``: parameters and moments are updated in place, which saves a copy
    of both in memory and time. The old state is consumed: using it raises RuntimeError. The result has
    the same bits as without.

    States that share tensors with the consumed one (made by ``evolve``, say) see the new values.

    Raises:
        TypeError: if ``step`` was made by neither ``make_step`` nor ``vmap.ensemble``.
    """
    if isinstance(step, Ensemble):
        return step.donated()
    if not isinstance(step, Step):
        raise TypeError(f"donate: expected what make_step returned, got {_kind(step)}")
    return evolve(step, donates=True)


@overload
def compile(
    step: Step,
    *,
    backend: str = ...,
    mode: str | None = ...,
    fullgraph: bool = ...,
    whole: bool = ...,
) -> Step: ...
@overload
def compile(
    step: EvalStep,
    *,
    backend: str = ...,
    mode: str | None = ...,
    fullgraph: bool = ...,
    whole: bool = ...,
) -> EvalStep: ...
def compile(
    step: Step | EvalStep,
    *,
    backend: str = "inductor",
    mode: str | None = None,
    fullgraph: bool = False,
    whole: bool = False,
) -> Step | EvalStep:
    """Return the step with its loss, or all of it, compiled by PyTorch's compiler.

    By default the loss is compiled, forward and backward, by ``torch.compile``; the rest of a step are a
    few fused kernels as it is. With ``whole=True`` forward, backward, transforms and update are one
    function without Python in between, and the compiler fuses across them: the clipping and the update
    of a parameter, for instance. What is compiled then is the step's list of operations, written down
    when it first runs with a shape of batch; so all that Python decides in the loss is decided there and
    then, and must not change from step to step.

    Learning rates, seeds and step numbers never compile anything again; new shapes of batches do, once
    each. Compiled kernels round and draw differently, so the bits are not those of the step itself; they
    are the same from run to run. Best captured: ``capture(compile(step))``.

    Args:
        step: what ``make_step`` returned, donated or not, or what ``make_eval_step`` returned.
        backend, mode, fullgraph: see ``torch.compile``. Where the loss breaks up into several graphs, a
            warning gives the lines and the reasons; with ``fullgraph`` that is an error. With
            ``whole``, which is always one graph, the backend is ``"inductor"``, or ``"eager"`` to run
            the list of operations as it is.
        whole: compile all of the step. It needs an optimizer that asks the host nothing (fused Adam and
            AdamW and what is made of them), transforms that do the same in every step, and a loss that
            draws random numbers from PyTorch's global generators only. Micro-batches draw from one stream.

    Raises:
        TypeError: if ``step`` was made by neither ``make_step`` nor ``make_eval_step``.
        ValueError: if ``whole`` is not possible; says what stands in the way.
    """
    if isinstance(step, Step):
        check_open("compile", step)
        if whole:
            return whole_step(step, backend, mode)
    elif not isinstance(step, EvalStep):
        raise TypeError(
            f"compile: expected what make_step or make_eval_step returned, got {_kind(step)}"
        )
    elif whole:
        raise ValueError("compile: an evaluation is nothing but its loss; leave whole=True out")
    loss_fn = compiled_loss(step.loss_fn, backend=backend, mode=mode, fullgraph=fullgraph)
    return evolve(step, loss_fn=loss_fn)


@overload
def capture(step: Step | DataParallel, *, limit: int = ...) -> CapturedStep: ...
@overload
def capture(step: EvalStep, *, limit: int = ...) -> CapturedEval: ...
def capture(step: Step | DataParallel | EvalStep, *, limit: int = 8) -> CapturedStep | CapturedEval:
    """Return the donated step whose work on the GPU is recorded in CUDA graphs and replayed.

    Python, which bounds small models, then only copies the batch and the learning rate, seeds the
    generators and launches two graphs. The bits are those of the step uncaptured, dropout and schedules
    included. The first two calls with a shape of batch run as ever, and the third is recorded. Batches
    may be on the host; they are copied to the GPU. On the CPU this is ``donate``.

    What the loss does on the host (prints, counters, lists that it appends to) happens while recording and
    not again. Two recordings take part in a step: the gradients, and the update. The update is done
    as ever for optimizers that need the host (not ``capturable``: all but fused Adam and AdamW and
    what is made of them), for transforms whose ``period`` is not 1, and for ``on_nonfinite="raise"``.

    Of a ``data_parallel`` step, the exchange of gradients is part of the first recording; it must go
    through NCCL. Let go of the captured step before ``destroy_process_group``: NCCL waits there until no
    graph is left that uses the group.

    An evaluation is recorded with the parameters and buffers of the state that it is given. They stay
    where they are in steps that are donated or captured, so that it is recorded once; for a state whose
    tensors are others it is recorded anew, and it keeps the tensors of the latest. On the CPU it is the
    evaluation itself.

    Args:
        step: what ``make_step`` returned, donated or not, or ``compile`` or ``data_parallel`` of it; or
            what ``make_eval_step`` returned, or ``compile`` of it.
        limit: how many shapes of batches are recorded; others run without a graph, after one warning.

    Raises:
        TypeError: if ``step`` was made by neither ``make_step`` nor ``make_eval_step``.
        ValueError: if ``limit`` is less than 1, or if the loss is compiled in a mode that makes CUDA graphs
            of its own.
        CaptureError: from the second or third call, if the step waits for the GPU, draws random numbers on
            the host, or does something else that a graph cannot hold; names the operation and the line.
            The state is as it was then, and can go into the step uncaptured. From the first call on a
            GPU, if ranks exchange through another backend than NCCL, and with
            ``find_unused_parameters=True``.
    """
    if limit < 1:
        raise ValueError(f"capture: limit must be at least 1, got {limit}")
    if isinstance(step, EvalStep):
        check_graphs(step.loss_fn)
        return CapturedEval(step, limit)
    if isinstance(step, DataParallel):
        check_graphs(step.step.loss_fn)
        parallel = evolve(step, step=donate(step.step))
        return CapturedStep(parallel.step, limit, parallel)
    if not isinstance(step, Step):
        raise TypeError(
            f"capture: expected what make_step or make_eval_step returned, got {_kind(step)}"
        )
    check_graphs(step.loss_fn)
    donated = donate(step)
    if isinstance(donated, WholeStep):
        return CapturedWhole(donated, limit)
    return CapturedStep(donated, limit)


def _kind(value: Any) -> str:
    return getattr(value, "__name__", type(value).__name__)
