"""What the trainer needs to know about a model, whoever wrote it."""

import inspect
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WEIGHTS_NAME = "model.safetensors"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"


def forward_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters that ``forward`` takes."""
    return list(inspect.signature(without_adapters(model).forward).parameters)


def accepts_loss_kwargs(model: nn.Module) -> bool:
    """Tell whether the model divides its loss by ``num_items_in_batch`` itself.

    An attribute ``accepts_loss_kwargs`` decides, else whether ``forward`` has a ``**kwargs``.
    """
    declared = getattr(without_adapters(model), "accepts_loss_kwargs", None)
    return takes_any(model) if declared is None else bool(declared)


def takes_any(model: nn.Module) -> bool:
    """Tell whether ``forward`` has a ``**kwargs``."""
    parameters = inspect.signature(without_adapters(model).forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def label_names(model: nn.Module) -> list[str]:
    """Return the ``forward`` parameters that are labels, judged by their names."""
    model = without_adapters(model)
    question = "QuestionAnswering" in type(model).__name__
    spans = ("start_positions", "end_positions") if question else ()
    return [name for name in forward_names(model) if "label" in name or name in spans]


def can_return_loss(model: nn.Module) -> bool:
    """Tell whether ``forward`` has a ``return_loss`` that is True by default."""
    parameter = inspect.signature(without_adapters(model).forward).parameters.get("return_loss")
    return parameter is not None and parameter.default is True


def unwrap(model: Any) -> Any:
    """Return the module inside wrappers: DDP, DataParallel, ``torch.compile``, DeepSpeed's engine."""
    wrappers: tuple[Any, ...] = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    if (library := sys.modules.get("deepspeed")) is not None:
        wrappers += (library.DeepSpeedEngine,)
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, wrappers):
            inner = model.module
        if inner is None:
            return model
        model = inner


def without_adapters(model: Any) -> Any:
    """Return the model that adapters of the library peft are put into; any other one, unwrapped.

    What a model takes and returns is told by its own ``forward``; that of the wrapper takes anything.
    """
    model = unwrap(model)
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def has_adapters(model: Any) -> bool:
    """Tell whether a model is one of peft's, which saves and loads the weights of its adapters only."""
    model = unwrap(model)
    return hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None))


def numel(parameter: Any) -> int:
    """Return the numbers in a parameter, all of them where this process holds a part only."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def save_weights(
    model: nn.Module, folder: Path, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write the weights, and the configuration of a library model, into ``folder``.

    Models with ``save_pretrained`` write themselves; others get ``model.safetensors`` with the names
    of their ``state_dict``, tied weights once.

    Args:
        model: whose weights they are.
        folder: where to.
        tensors: a ``state_dict`` to write instead of the model's own, which may be changing.
    """
    model = unwrap(model)
    tensors = model.state_dict() if tensors is None else tensors
    save_pretrained = getattr(model, "save_pretrained", None)
    if callable(save_pretrained):
        save_pretrained(folder, state_dict=dict(tensors))
        return
    from safetensors.torch import save_file

    save_file(_distinct(tensors), str(folder / WEIGHTS_NAME), metadata={"format": "pt"})


def save_configuration(model: nn.Module, folder: Path) -> None:
    """Write the configuration of a library model into ``folder``, without weights; others have none."""
    model = unwrap(model)
    config: Any = getattr(model, "config", None)
    if not callable(getattr(config, "save_pretrained", None)):
        return
    # As ``save_pretrained`` of the model notes it; sharding has put a word before the class's name.
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(folder)


def put_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the parameters and buffers of the same names, in place."""
    model = unwrap(model)
    own = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return each tensor once, under its first name, contiguous."""
    kept: dict[str, Tensor] = {}
    seen: set[Any] = set()
    storages: set[int] = set()
    for name, tensor in tensors.items():
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and view in seen:
            continue
        seen.add(view)
        storage = tensor.untyped_storage().data_ptr()
        whole = tensor.contiguous()
        # The file format has no views: a part of another tensor's memory is written as its own.
        shared = whole.untyped_storage().data_ptr() in storages
        kept[name] = whole.clone() if shared else whole
        storages.add(storage)
    return kept


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies; names that share a tensor share its copy."""
    made: dict[Any, Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        return made.setdefault(view, tensor.detach().clone())

    return {name: copy(tensor) for name, tensor in tensors.items()}


def load_weights(model: nn.Module, folder: Path) -> None:
    """Read ``model.safetensors`` from ``folder`` into the model, in place; of a model of peft its adapter.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming keys that are missing, unexpected or of another shape.
    """
    from safetensors.torch import load_model

    model = unwrap(model)
    if has_adapters(model):
        _load_adapters(model, folder)
        return
    path = folder / WEIGHTS_NAME
    if not path.exists():
        raise FileNotFoundError(f"no {WEIGHTS_NAME} in {folder}")
    try:
        load_model(model, str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {error}") from error


def _load_adapters(model: Any, folder: Path) -> None:
    """Read every adapter of the model: ``default`` lies in the folder itself, others in their own."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    for name in model.peft_config:
        path = (folder if name == "default" else folder / name) / ADAPTER_WEIGHTS_NAME
        if not path.exists():
            raise FileNotFoundError(f"no {ADAPTER_WEIGHTS_NAME} in {path.parent}")
        set_peft_model_state_dict(model, load_file(str(path)), adapter_name=name)


def move(value: Any, device: torch.device, *, non_blocking: bool = False) -> Any:
    """Return a nested value with its tensors on ``device``; mappings, lists and tuples keep their type."""

    def place(tensor: Tensor) -> Tensor:
        return tensor if tensor.device == device else tensor.to(device, non_blocking=non_blocking)

    return with_tensors(value, place)


def with_tensors(value: Any, change: Callable[[Tensor], Tensor], kept: Collection[str] = ()) -> Any:
    """Return a nested value with other tensors; mappings, lists and tuples keep their type.

    Args:
        value: what holds tensors.
        change: returns what takes a tensor's place.
        kept: keys, at any depth, under which nothing is changed.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        changed = {k: v if k in kept else with_tensors(v, change, kept) for k, v in value.items()}
        return changed if type(value) is dict else type(value)(changed)  # type: ignore[call-arg]
    if isinstance(value, list | tuple):
        parts = [with_tensors(v, change, kept) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
