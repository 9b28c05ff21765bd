"""``Seq2SeqTrainer``: evaluation and prediction by generating."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer import modeling
from trainer.arguments import Seq2SeqTrainingArguments, TrainingArguments
from trainer.distributed import fsdp_plan
from trainer.generation import (
    check_prompt,
    generation_inputs,
    length_limit,
    read_generation_config,
)
from trainer.outputs import PredictionOutput
from trainer.support import own_arguments
from trainer.trainer import Trainer


class Seq2SeqTrainer(Trainer):
    """A Trainer that can evaluate and predict by generating (``predict_with_generate``).

    Its arguments are those of ``Trainer`` without ``optimizer_cls_and_kwargs``; ``args`` are
    ``Seq2SeqTrainingArguments``. ``args.generation_config`` replaces the model's own generation settings.

    Predictions are then token ids, as wide as the labels: of a batch, both are filled up with the pad
    token to the wider of the two and at least to the limit on the length, which is ``max_length`` or
    ``max_new_tokens`` + 1 (20 if neither is set); narrower batches likewise when all are joined.
    With ``num_return_sequences`` there are that many rows of predictions to a sample.

    Raises:
        TypeError: if ``args`` lack the generation fields, or the model has no ``generate``.
        ValueError: if the generation settings are invalid.
        OSError: if they cannot be found or read.
    """

    _gen_kwargs: dict[str, Any] | None = None
    _generation_config: Any = None

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[[], nn.Module] | None = None,
        compute_loss_func: Callable[..., Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        args = _generation_arguments(args)
        chosen = args.generation_config  # type: ignore[attr-defined]
        if chosen is not None:
            self._generation_config = self.load_generation_config(chosen)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )

    @staticmethod
    def load_generation_config(gen_config_arg: Any) -> Any:
        """Return a ``transformers.GenerationConfig``, checked strictly.

        Args:
            gen_config_arg: such an object, which is copied; a dict of its settings; or the path of a
                file, of a folder with ``generation_config.json``, or the name of a repository.

        Raises:
            TypeError: if it is something else.
            OSError: if there is nothing under that name, or it cannot be read.
            ValueError: if settings contradict each other.
        """
        config = read_generation_config(gen_config_arg)
        try:
            # What passes only with warnings could not be saved along with the model.
            config.validate(strict=True)
        except ValueError as error:
            raise ValueError(
                f"generation_config: {error}\n\nFix these issues to train your model: saving it writes "
                "its generation settings, and invalid ones are refused then."
            ) from error
        return config

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Evaluate as ``Trainer.evaluate`` does; ``gen_kwargs`` go to ``generate``.

        Where the call gives none, ``num_beams`` is ``args.generation_num_beams``, and ``max_length`` is
        ``args.generation_max_length`` unless the call gives ``max_new_tokens``.
        """
        with self._generating(gen_kwargs):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """Predict as ``Trainer.predict`` does; ``gen_kwargs`` go to ``generate``, see ``evaluate``."""
        with self._generating(gen_kwargs):
            return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return ``(loss, tokens, labels)`` of one batch, tokens and labels of one width.

        Without ``predict_with_generate``, or if only the loss is asked for, this is ``Trainer``'s.
        Without ``gen_kwargs``, those of the ``evaluate`` or ``predict`` that is running are used.
        """
        if prediction_loss_only or not self._generates:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._evaluation_inputs(inputs)
        module: Any = modeling.unwrap(model)
        check_prompt(module, inputs)
        options = self._with_defaults(gen_kwargs or self._gen_kwargs or {})
        with torch.no_grad(), self.compute_loss_context_manager():
            in_parts = self._zero is not None and self._zero.partitions
            if in_parts or fsdp_plan.wanted(self.args):  # gathered by all processes at once
                options.setdefault("synced_gpus", True)
            output = module.generate(**generation_inputs(inputs), **options)
        tokens: Tensor = getattr(output, "sequences", output)
        labels, loss = inputs.get("labels"), None
        if labels is not None:
            loss, _, _ = super().prediction_step(model, inputs, True, ignore_keys)
        limit = length_limit(options, getattr(module, "generation_config", None))
        given = [t for t in (tokens, labels) if t is not None]
        width = max(limit, *(t.shape[-1] for t in given))
        tokens, *rest = (self._pad_tensors_to_max_len(t, width) for t in given)
        return loss, tokens, rest[0] if rest else None

    @property
    def _generates(self) -> bool:
        return bool(self.args.predict_with_generate)  # type: ignore[attr-defined]

    @contextmanager
    def _generating(self, options: dict[str, Any]) -> Iterator[None]:
        """Generate with these options; inside another call, on top of its options."""
        before = self._gen_kwargs
        self._gen_kwargs = {**(before or {}), **options}
        try:
            yield
        finally:
            self._gen_kwargs = before

    def _with_defaults(self, options: dict[str, Any]) -> dict[str, Any]:
        """Fill in what the arguments say where a call says nothing."""
        args: Any = self.args
        filled = dict(options)
        if filled.get("max_length") is None:
            filled.pop("max_length", None)
            if filled.get("max_new_tokens") is None and args.generation_max_length is not None:
                filled["max_length"] = args.generation_max_length
        if filled.get("num_beams") is None:
            filled.pop("num_beams", None)
            if args.generation_num_beams is not None:
                filled["num_beams"] = args.generation_num_beams
        return filled

    def _pad_tensors_to_max_len(self, tensor: Tensor, max_length: int) -> Tensor:
        """Fill rows of token ids (n, w) up to (n, max_length) with the pad token, on the right.

        Raises:
            ValueError: if something is missing and there is no pad token.
        """
        missing = max_length - tensor.shape[-1]
        if missing <= 0:
            return tensor
        pad = self._pad_token()
        if pad is None:
            raise ValueError(
                "there is no token to pad generated sequences with: the processing_class has neither "
                "pad_token_id nor eos_token_id, and the model's config has no pad_token_id. Set one, "
                "such as model.config.pad_token_id = 0."
            )
        return nn.functional.pad(tensor, (0, missing), value=pad)

    def _pad_token(self) -> int | None:
        """Return the first there is: pad or end token of the processor, pad token of the model."""
        module: Any = modeling.unwrap(self.model)
        named = (
            (self.processing_class, "pad_token_id"),
            (self.processing_class, "eos_token_id"),
            (getattr(module, "config", None), "pad_token_id"),
            (getattr(module, "generation_config", None), "pad_token_id"),
        )
        found = (getattr(owner, name, None) for owner, name in named)
        return next((token for token in found if token is not None), None)

    def _output_padding(self) -> int:
        pad = self._pad_token() if self._generates else None
        return super()._output_padding() if pad is None else pad

    def _place_model(self) -> None:
        super()._place_model()
        module: Any = modeling.unwrap(self.model)
        if self._generates and not callable(getattr(module, "generate", None)):
            raise TypeError(
                f"predict_with_generate=True needs a model that can generate, such as "
                f"T5ForConditionalGeneration; {type(module).__name__} has no method generate. Pass "
                "another model, or set predict_with_generate=False."
            )
        if self._generation_config is not None:  # each model of a model_init gets its own
            module.generation_config = copy.deepcopy(self._generation_config)


def _generation_arguments(args: Any) -> TrainingArguments:
    """Return the arguments to use, or raise TypeError if they have no generation fields."""
    args = Seq2SeqTrainingArguments("tmp_trainer") if args is None else own_arguments(args)
    needed = ("predict_with_generate", "generation_max_length", "generation_num_beams")
    if not all(hasattr(args, name) for name in (*needed, "generation_config")):
        raise TypeError(
            "Seq2SeqTrainer takes trainer.Seq2SeqTrainingArguments, which say how to generate; got "
            f"{type(args).__name__}"
        )
    return args
