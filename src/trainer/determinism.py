"""Seeds of the process's generators, and switches that make kernels deterministic."""

import logging
import os
import random
from collections.abc import Callable

import numpy as np
import torch

from trainer.data.seeding import WorkerInit, mix, seed_host

logger = logging.getLogger(__name__)

seeded_worker = WorkerInit
"""``worker_init_fn`` by which workers of all ranks and epochs have seeds of their own."""

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
_CUBLAS_VALUES = (":16:8", ":4096:8")  # both are deterministic; the second is faster and larger
_VARIABLES = {
    _CUBLAS: _CUBLAS_VALUES[0],
    "CUDA_LAUNCH_BLOCKING": "1",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
    "ASCEND_LAUNCH_BLOCKING": "1",
    "HCCL_DETERMINISTIC": "1",
}


def set_seed(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and PyTorch on all devices.

    Args:
        seed: any integer that ``torch.manual_seed`` takes; NumPy gets its lowest 32 bits.
        deterministic: also let PyTorch use deterministic kernels only.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - what users' code draws from
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)


def enable_full_determinism(seed: int, warn_only: bool = False) -> Callable[[], None]:
    """Seed everything and use deterministic kernels only, so that two runs have the same bits.

    Sets PyTorch's and cuDNN's switches, and variables that libraries read when they are first used:
    call this before anything runs on the device. Kernels get slower.

    Args:
        seed: see ``set_seed``.
        warn_only: an operation without a deterministic kernel warns instead of raising RuntimeError.
            Attention's backward pass then stays non-deterministic on CUDA.

    Returns:
        A function that puts switches and variables back as they were. The generators are left alone.
    """
    cudnn = torch.backends.cudnn
    variables = {name: os.environ.get(name) for name in _VARIABLES}
    strict = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    flags = (cudnn.deterministic, cudnn.benchmark)

    _set_variables()
    set_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    cudnn.deterministic, cudnn.benchmark = True, False

    def undo() -> None:
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        torch.use_deterministic_algorithms(strict, warn_only=warned)
        cudnn.deterministic, cudnn.benchmark = flags

    return undo


def seed_worker(worker_id: int, num_workers: int, rank: int) -> None:
    """Seed the generators of a loader's worker, for loaders of one's own.

    ``worker_init_fn=partial(seed_worker, num_workers=..., rank=...)`` gives workers of different ranks
    different seeds even though every rank's base seed is the same.
    """
    # In a worker the initial seed is the loader's base seed plus the worker's number.
    seed_host(mix(torch.initial_seed() + num_workers * rank))


def _set_variables() -> None:
    late = torch.cuda.is_initialized() and os.environ.get(_CUBLAS) not in _CUBLAS_VALUES
    for name, value in _VARIABLES.items():
        if name != _CUBLAS or os.environ.get(name) not in _CUBLAS_VALUES:
            os.environ[name] = value
    if late:
        logger.warning(
            "full_determinism: CUDA is in use already and may not see %s=%s. Set it in the "
            "environment before the program starts.",
            _CUBLAS,
            _VARIABLES[_CUBLAS],
        )
