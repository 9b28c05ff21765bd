"""Names that version 4 of the Hugging Face arguments had, and what replaces them."""

import inspect
from typing import Any

REPLACED: dict[str, str] = {
    "evaluation_strategy": "use eval_strategy",
    "no_cuda": "use use_cpu",
    "use_mps_device": "an MPS device is used whenever there is one",
    "group_by_length": 'use train_sampling_strategy="group_by_length"',
    "overwrite_output_dir": "",
    "save_safetensors": "weights are always saved as safetensors",
    "per_gpu_train_batch_size": "use per_device_train_batch_size",
    "per_gpu_eval_batch_size": "use per_device_eval_batch_size",
    "push_to_hub_model_id": "use hub_model_id",
    "push_to_hub_organization": 'use hub_model_id="organization/name"',
    "push_to_hub_token": "use hub_token",
    "include_inputs_for_metrics": 'use include_for_metrics=["inputs"]',
    "include_tokens_per_second": "use include_num_input_tokens_seen",
    "torchdynamo": "use torch_compile_backend",
    "ray_scope": "use the environment variable RAY_SCOPE",
    "fp16_backend": "",
    "half_precision_backend": "",
    "fp16_opt_level": "",
    "past_index": "",
    "mp_parameters": "",
    "jit_mode_eval": "",
    "use_ipex": "",
    "tpu_num_cores": "",
    "tpu_metrics_debug": 'use debug="tpu_metrics_debug"',
    "dispatch_batches": 'use accelerator_config={"dispatch_batches": ...}',
    "split_batches": 'use accelerator_config={"split_batches": ...}',
    "fsdp_min_num_params": 'use fsdp_config={"min_num_params": ...}',
    "fsdp_transformer_layer_cls_to_wrap": (
        'use fsdp_config={"transformer_layer_cls_to_wrap": ...}'
    ),
    "use_legacy_prediction_loop": "",
    "xpu_backend": "use ddp_backend",
    "adafactor": 'use optim="adafactor"',
    "sharded_ddp": "use fsdp",
}
"""Former name, and advice; an empty text means that nothing replaces it."""


def advice(name: str) -> str:
    """Say what to do instead of giving the former argument ``name``."""
    return REPLACED[name] or "it was removed and nothing replaces it"


class LegacyNames:
    """Mixin that names the replacement when a constructor is given a former name.

    It checks in ``__new__``, which dataclasses leave alone, so that subclassing stays as it is. A
    subclass whose ``__init__`` takes such a name (as a field of its own, or by ``**kwargs``) keeps it.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "LegacyNames":
        former = [name for name in kwargs if name in REPLACED]
        if former:
            parameters = inspect.signature(cls.__init__).parameters
            takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            for name in former:
                if name not in parameters and not takes_any:
                    raise TypeError(
                        f"{cls.__name__}() got an unexpected keyword argument {name!r}: "
                        f"{advice(name)}."
                    )
        return super().__new__(cls)
