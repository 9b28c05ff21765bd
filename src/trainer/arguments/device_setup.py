"""Join the process group, choose the device, and check what it can do."""

import dataclasses
import logging
import os
from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from .base import TrainingArguments

logger = logging.getLogger(__name__)


@attrs.define(eq=False)
class DeviceSetup:
    """What :func:`set_up` found.

    Attributes:
        state: accelerate's record of the processes.
        device: Device of this process.
        n_gpu: Devices that this process drives; a model that is spread over several sets it to 1.
    """

    state: "PartialState"
    device: "torch.device"
    n_gpu: int


def set_up(args: "TrainingArguments") -> DeviceSetup:
    """Join the process group that the environment announces, if any, and choose the device.

    Raises:
        ValueError: The device cannot do what the arguments ask for, or ``use_configured_state`` is set
            and there is no state.
    """
    _build_parallelism(args)
    state = _process_state(args)
    device, n_gpu = _device(args, state)
    check_hardware(args, device)
    apply_tf32(args, device)
    return DeviceSetup(state, device, n_gpu)


def _process_state(args: "TrainingArguments") -> "PartialState":
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    exists = bool(PartialState._shared_state)
    if getattr(args.accelerator_config, "use_configured_state", False):
        if not exists:
            raise ValueError(
                "accelerator_config: use_configured_state is set, but there is no state; build "
                "accelerate's PartialState or Accelerator first, or set it to False."
            )
        return PartialState(cpu=args.use_cpu)
    launched = _launched()
    cpu = args.use_cpu or (launched and not _has_accelerator())
    if launched and not cpu:
        _check_not_shared()
    if exists and not _fits(PartialState(), cpu):
        AcceleratorState._reset_state(reset_partial_state=True)
    options: dict[str, Any] = {"timeout": args.ddp_timeout_delta}
    if args.ddp_backend is not None and launched:
        # Without a launcher there is no process group, and naming its backend fails.
        options["backend"] = args.ddp_backend
    return PartialState(cpu=cpu, **options)


def _check_not_shared() -> None:
    """Raise ValueError if a launcher started several processes for an Apple GPU.

    There is one, and no backend that joins processes over it: each of them would train alone.
    """
    import torch
    from accelerate.utils import get_cpu_distributed_information

    started = get_cpu_distributed_information().world_size
    if started > 1 and torch.backends.mps.is_available():
        raise ValueError(
            f"the launcher started {started} processes, but an Apple GPU (mps) cannot be shared: neither "
            "gloo nor nccl joins processes over it. Start one process, or set use_cpu=True."
        )


def _launched() -> bool:
    """Tell whether a launcher (torchrun, accelerate, MPI) started this process."""
    from accelerate.utils import get_cpu_distributed_information

    return "LOCAL_RANK" in os.environ or get_cpu_distributed_information().world_size > 1


def _has_accelerator() -> bool:
    """Tell whether there is a device but the CPU.

    Where there is none, accelerate joins the processes of a launcher only if it is told to use the CPU:
    otherwise each of them would train alone.
    """
    import torch
    from accelerate.utils import is_torch_xla_available

    return torch.accelerator.is_available() or is_torch_xla_available()


def _fits(state: "PartialState", cpu: bool) -> bool:
    """Tell whether a state that is already there has the kind of device that is asked for.

    Such a state is kept, because earlier Accelerators share it.
    """
    return state.device.type == "cpu" if cpu else not state._cpu


def _device(args: "TrainingArguments", state: "PartialState") -> tuple["torch.device", int]:
    import torch

    kind = state.distributed_type.value
    device = state.device
    if kind == "XLA":
        return device, 0
    if kind != "NO":
        return device, 1
    if device.type == "cpu":
        return device, 0
    if device.type != "cuda":
        return device, 1
    if device.index is None:
        device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device, torch.cuda.device_count()


def check_hardware(args: "TrainingArguments", device: "torch.device") -> None:
    """Check the precisions that were asked for against the device.

    Raises:
        ValueError: ``bf16`` or ``tf32`` is not supported.
    """
    asked = [name for name in ("bf16", "bf16_full_eval") if getattr(args, name)]
    if asked and not args.use_cpu and not _supports_bf16(device):
        raise ValueError(
            f"{asked[0]}: the device {device} does not support bfloat16 (CUDA needs an Ampere GPU or "
            "newer). Set use_cpu=True to train on the CPU, or leave it out."
        )
    if args.tf32 and not _supports_tf32(device):
        raise ValueError(
            f"tf32: the device {device} does not support TensorFloat-32, which needs an Ampere GPU or "
            "newer and CUDA 11 or newer; leave tf32 out or set it to False."
        )
    if args.torch_compile and device.type == "cuda" and not _supports_tf32(device):
        logger.warning("torch_compile gains most on Ampere GPUs and newer; this one is older.")


def apply_tf32(args: "TrainingArguments", device: "torch.device") -> None:
    """Switch TensorFloat-32 as asked; compiled models use it where nothing is asked, but not with fp16."""
    import torch

    wanted = args.tf32
    if wanted is None and args.torch_compile and not args.fp16 and _supports_tf32(device):
        wanted = True
    if wanted is not None:
        torch.backends.cuda.matmul.allow_tf32 = wanted
        torch.backends.cudnn.allow_tf32 = wanted


def _supports_bf16(device: "torch.device") -> bool:
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type != "cpu"


def _supports_tf32(device: "torch.device") -> bool:
    import torch

    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device)[0] >= 8


def _build_parallelism(args: "TrainingArguments") -> None:
    """Turn a dict in ``parallelism_config``, or accelerate's configuration, into accelerate's object."""
    launched = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() in ("true", "1")
    if args.parallelism_config is None and launched:
        args.parallelism_config = {}  # sizes that are left out are read from the environment
    if not isinstance(args.parallelism_config, dict):
        return
    from accelerate import ParallelismConfig

    valid = [field.name for field in dataclasses.fields(ParallelismConfig)]
    unknown = sorted(set(args.parallelism_config) - set(valid))
    if unknown:
        raise ValueError(
            f"parallelism_config has unknown keys {unknown}; valid keys are {', '.join(valid)}."
        )
    args.parallelism_config = ParallelismConfig(**args.parallelism_config)
