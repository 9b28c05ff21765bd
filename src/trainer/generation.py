"""What ``Seq2SeqTrainer`` needs to know about generating: settings, inputs, lengths."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_DEFAULT_LENGTH = 20
"""New tokens after which ``generate`` of transformers stops if nothing says otherwise."""


def read_generation_config(source: Any) -> Any:
    """Return a ``GenerationConfig`` from an object, a dict, a path or a name; not checked.

    Raises:
        ImportError: if transformers is not installed.
        TypeError: if ``source`` is none of these.
        OSError: if there is nothing under that name, or it cannot be read.
    """
    try:
        from transformers import GenerationConfig
    except ImportError as error:
        raise ImportError(
            "generation_config needs transformers: pip install 'trainstep[hf]'"
        ) from error
    if isinstance(source, GenerationConfig):
        return copy.deepcopy(source)
    if isinstance(source, Mapping):
        return GenerationConfig.from_dict(dict(source))
    if not isinstance(source, str | Path):
        raise TypeError(
            "generation_config must be a transformers.GenerationConfig, a dict of its settings, a path "
            f"or the name of a repository, got {type(source).__name__}"
        )
    path = Path(source)
    try:
        if path.is_file():
            return GenerationConfig.from_pretrained(path.parent, path.name)
        return GenerationConfig.from_pretrained(source)
    except OSError as error:
        raise OSError(
            f"generation_config={str(source)!r} is neither a file with generation settings, nor a "
            f"folder with generation_config.json, nor a repository that can be read: {error}"
        ) from error


def check_prompt(module: Any, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError if a decoder-only model would be prompted with the answer."""
    config = getattr(module, "config", None)
    prompt, labels = inputs.get("input_ids"), inputs.get("labels")
    if getattr(config, "is_encoder_decoder", True) or prompt is None or labels is None:
        return
    if prompt.shape == labels.shape:
        raise ValueError(
            f"predict_with_generate: {type(module).__name__} is decoder-only, and its input_ids hold the "
            "text of the labels, so that it would go on behind the answer. Use an encoder-decoder "
            "model, or evaluate on prompts without labels, or set predict_with_generate=False."
        )


def generation_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a batch goes to ``generate``.

    Decoder inputs as wide as the labels are the labels, shifted: not a beginning to go on from.
    """
    labels, begun = inputs.get("labels"), inputs.get("decoder_input_ids")
    left_out = {"labels"}
    if labels is not None and begun is not None and labels.shape == begun.shape:
        left_out |= {"decoder_input_ids", "decoder_attention_mask"}
    return {name: value for name, value in inputs.items() if name not in left_out}


def length_limit(options: Mapping[str, Any], config: Any) -> int:
    """Return the length that generated sequences are at most to have, the start token included.

    As in ``generate``, a setting comes from its options, else from the configuration among them, else
    from that of the model; and ``max_new_tokens`` goes before ``max_length``.
    """
    configs = [vars(c) for c in (options.get("generation_config"), config) if c is not None]

    def setting(name: str) -> Any:
        found = (source.get(name) for source in (options, *configs))
        return next((value for value in found if value is not None), None)

    new = setting("max_new_tokens")
    return setting("max_length") or _DEFAULT_LENGTH if new is None else new + 1
