"""The collators for language modelling: causal (labels are the inputs) and masked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trainer.data.collators.base import DataCollatorMixin, require_kind, require_mask_token
from trainer.data.collators.positioned import RandomCollatorMixin
from trainer.data.collators.rows import column, pad_features, require_mappings, stack_token_rows
from trainer.data.collators.whole_words import spread_over_words, stack_offsets, word_starts

IGNORED = -100
"""The label that PyTorch's losses leave out."""


@dataclass
class DataCollatorForLanguageModeling(RandomCollatorMixin, DataCollatorMixin):
    """Pads rows and adds ``labels`` for causal or masked language modelling.

    Rows are mappings with ``input_ids``, or sequences of token ids. Causal labels are the inputs
    with the pad token as -100. Masked: each token that is not special is chosen with probability
    ``mlm_probability``; of the chosen, a share ``mask_replace_prob`` becomes the mask token, a
    share ``random_replace_prob`` any token of the vocabulary, and the rest stays; labels are -100
    except at the chosen tokens (Devlin et al., BERT, 2019, section 3.1).

    Special tokens are those of the rows' ``special_tokens_mask``, else what the tokenizer says.

    Args:
        tokenizer: pads, and knows its mask, pad and special tokens.
        mlm: masked (True) or causal (False).
        whole_word_mask: chooses words instead of tokens; rows need ``offset_mapping``. Chosen
            words are then always replaced by mask tokens.
        mlm_probability, mask_replace_prob, random_replace_prob: probabilities, as above.
        pad_to_multiple_of: rounds the padded length up.
        return_tensors: "pt" or "np"; the random choices are the same for both.
        seed: without a position (see RandomCollatorMixin), draws from a generator of this seed, in
            worker processes of seed + worker id; with a position, is mixed into it.

    Raises ValueError if the tokenizer has no mask token that ``mlm`` needs, on probabilities
    outside [0, 1] or, the last two, of a sum above 1, and on whole words without ``mlm``.
    """

    tokenizer: Any
    mlm: bool = True
    whole_word_mask: bool = False
    mlm_probability: float | None = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    seed: int | None = None

    def __post_init__(self) -> None:
        where = type(self).__name__
        require_kind(where, self.return_tensors)
        if self.mlm:
            advice = "Add one, or pass mlm=False for causal language modelling."
            require_mask_token(where, self.tokenizer, advice)
            self.mlm_probability = _probability(where, "mlm_probability", self.mlm_probability)
        elif self.whole_word_mask:
            raise ValueError(f"{where}: whole_word_mask=True masks, so it needs mlm=True.")
        for name in ("mask_replace_prob", "random_replace_prob"):
            setattr(self, name, _probability(where, name, getattr(self, name)))
        if self.mask_replace_prob + self.random_replace_prob > 1:
            raise ValueError(
                f"{where}: the sum of mask_replace_prob ({self.mask_replace_prob}) and "
                f"random_replace_prob ({self.random_replace_prob}) should not exceed 1; they are "
                f"shares of the chosen tokens."
            )
        if self.whole_word_mask:
            self._settle_whole_words(where)

    def _settle_whole_words(self, where: str) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            warnings.warn(
                f"{where}: whole_word_mask=True needs an offset_mapping in each row, which only "
                f"fast tokenizers make.",
                stacklevel=4,
            )
        if self.mask_replace_prob < 1:
            warnings.warn(
                f"{where}: whole_word_mask=True replaces all chosen words by mask tokens; "
                f"mask_replace_prob is set to 1 and random_replace_prob to 0.",
                stacklevel=4,
            )
            self.mask_replace_prob, self.random_replace_prob = 1.0, 0.0

    def torch_call(self, features: list[Any]) -> Any:
        """The batch as tensors: the padded rows and ``labels``, each [batch, length]."""
        return self._collate(features, "pt")

    def numpy_call(self, features: list[Any]) -> Any:
        """The batch as arrays, otherwise as torch_call."""
        return self._collate(features, "np")

    def _collate(self, features: list[Any], kind: str) -> Any:
        batch, offsets = self._pad(features, kind)
        special = batch.pop("special_tokens_mask", None)
        inputs = batch["input_ids"]
        if self.mlm:
            mask = self.torch_mask_tokens if kind == "pt" else self.numpy_mask_tokens
            batch["input_ids"], batch["labels"] = mask(inputs, special, offsets)
            return batch
        labels = inputs.clone() if kind == "pt" else inputs.copy()
        if self.tokenizer.pad_token_id is not None:
            labels[labels == self.tokenizer.pad_token_id] = IGNORED
        batch["labels"] = labels
        return batch

    def _pad(self, features: list[Any], kind: str) -> tuple[Any, torch.Tensor | None]:
        """The padded rows, and their offsets [batch, length, 2] if they are there and needed."""
        where = type(self).__name__
        if not isinstance(features[0], Mapping):
            ids = stack_token_rows(where, features, self.tokenizer, self.pad_to_multiple_of)
            return {"input_ids": ids if kind == "pt" else ids.numpy()}, None
        require_mappings(where, features)
        # Tokenizers do not pad offsets: they are taken out, and padded here if they are used.
        rows = [{k: v for k, v in row.items() if k != "offset_mapping"} for row in features]
        batch = pad_features(
            self.tokenizer, rows, pad_to_multiple_of=self.pad_to_multiple_of, return_tensors=kind
        )
        if not self.whole_word_mask or "offset_mapping" not in features[0]:
            return batch, None
        pairs = column(where, features, "offset_mapping")
        length, side = batch["input_ids"].shape[1], self.tokenizer.padding_side
        return batch, stack_offsets(pairs, length, side)

    def torch_mask_tokens(
        self, inputs: Any, special_tokens_mask: Any = None, offset_mapping: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks ``inputs`` [batch, length]: (new inputs, labels), both new tensors of its dtype.

        Args:
            inputs: token ids.
            special_tokens_mask: [batch, length], true where nothing may be chosen; None asks the
                tokenizer.
            offset_mapping: [batch, length, 2], needed for whole words.
        """
        generator = self._generator()
        special = self._special_tokens(inputs, special_tokens_mask)
        chosen = self._choose(special, offset_mapping, generator)
        labels = inputs.masked_fill(~chosen, IGNORED)
        masked = _flip(self.mask_replace_prob, chosen.shape, generator) & chosen
        outputs = inputs.masked_fill(masked, self.tokenizer.mask_token_id)
        if self.mask_replace_prob == 1 or self.random_replace_prob == 0:
            return outputs, labels
        # The share of the tokens that the mask token left over.
        share = self.random_replace_prob / (1 - self.mask_replace_prob)
        replaced = _flip(share, chosen.shape, generator) & chosen & ~masked
        words = torch.randint(len(self.tokenizer), chosen.shape, generator=generator)
        return torch.where(replaced, words.to(outputs.dtype), outputs), labels

    def numpy_mask_tokens(
        self, inputs: Any, special_tokens_mask: Any = None, offset_mapping: Any = None
    ) -> tuple[Any, Any]:
        """torch_mask_tokens for arrays: the same choices, as arrays."""
        outputs, labels = self.torch_mask_tokens(
            torch.tensor(inputs), special_tokens_mask, offset_mapping
        )
        return outputs.numpy(), labels.numpy()

    def _special_tokens(self, inputs: torch.Tensor, mask: Any) -> torch.Tensor:
        if mask is None:
            ask = self.tokenizer.get_special_tokens_mask
            mask = [ask(row, already_has_special_tokens=True) for row in inputs.tolist()]
        return torch.as_tensor(mask).bool()

    def _choose(
        self, special: torch.Tensor, offsets: Any, generator: torch.Generator | None
    ) -> torch.Tensor:
        """The tokens to predict, bool [batch, length]."""
        where = type(self).__name__
        chance = _probability(where, "mlm_probability", self.mlm_probability)
        if not self.whole_word_mask:
            return _flip(chance, special.shape, generator, never=special)
        if offsets is None:
            raise ValueError(
                f"{where}: whole_word_mask=True needs 'offset_mapping' in each row, "
                f"to tell words. Tokenize with return_offsets_mapping=True and keep the column "
                f"(remove_unused_columns=False)."
            )
        starts = word_starts(torch.as_tensor(offsets), special)
        chosen = _flip(chance, special.shape, generator, never=~starts)
        return spread_over_words(chosen, starts, special)


@dataclass
class DataCollatorForWholeWordMask(DataCollatorForLanguageModeling):
    """The deprecated name for masking whole words; it takes the same arguments.

    It forces ``mlm`` and ``whole_word_mask``. Unlike
    ``DataCollatorForLanguageModeling(whole_word_mask=True)`` it keeps the shares
    ``mask_replace_prob`` and ``random_replace_prob``, drawn for each token of a chosen word.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        warnings.warn(
            "DataCollatorForWholeWordMask is deprecated; use DataCollatorForLanguageModeling with "
            "whole_word_mask=True.",
            FutureWarning,
            stacklevel=2,
        )
        super().__init__(*args, **kwargs)
        require_mask_token(type(self).__name__, self.tokenizer, "Add one to mask words.")
        self.mlm = True
        self.whole_word_mask = True


def _probability(where: str, name: str, value: Any) -> float:
    if value is None or not 0 <= value <= 1:
        raise ValueError(f"{where}: {name} should be between 0 and 1, got {value!r}.")
    return float(value)


def _flip(
    probability: float,
    shape: torch.Size,
    generator: torch.Generator | None,
    never: torch.Tensor | None = None,
) -> torch.Tensor:
    """Independent coins, bool of ``shape``; where ``never``, the probability is 0."""
    chances = torch.full(shape, probability)
    if never is not None:
        chances.masked_fill_(never, 0.0)
    return torch.bernoulli(chances, generator=generator).bool()
