"""What is done to the model when training starts, and undone when it ends."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

from trainer import checkpointing, liger, neftune
from trainer.arguments.enums import DebugOption
from trainer.debug import DebugUnderflowOverflow
from trainer.special_tokens import align_special_tokens
from trainer.tokens import TokenCounter, main_input_name, recount_parameters


def prepare_model(trainer: Any, stack: ExitStack) -> None:
    """Apply what the arguments ask of the model; ``stack`` undoes what must not outlast training."""
    args, model = trainer.args, trainer.model
    if args.use_liger_kernel:
        liger.apply(model, args.liger_kernel_config)
    align_special_tokens(model, trainer.processing_class)
    if args.gradient_checkpointing:
        checkpointing.enable(model, args.gradient_checkpointing_kwargs)
    if args.neftune_noise_alpha is not None:
        stack.enter_context(neftune.attach(model, args.neftune_noise_alpha))
    if DebugOption.UNDERFLOW_OVERFLOW in args.debug:
        stack.enter_context(DebugUnderflowOverflow(model))
    recount_parameters(model)


def token_counter(trainer: Any) -> TokenCounter:
    """Return the counter that ``include_num_input_tokens_seen`` asks for."""
    how = trainer.args.include_num_input_tokens_seen
    how = {True: "all", False: "no"}.get(how, how)
    pad = getattr(trainer.processing_class, "pad_token_id", None)
    return TokenCounter(str(how), main_input_name(trainer.model), pad)


def counted(trainer: Any, batches: Iterable[Any]) -> Iterator[Any]:
    """Count tokens and operations of batches on their way, while they are on the host."""
    for batch in batches:
        if batch is None:  # only other processes have one
            yield batch
            continue
        trainer._tokens.add(batch)
        trainer.current_flos += float(trainer.floating_point_ops(batch))
        yield batch
