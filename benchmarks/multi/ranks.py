"""Ranks of a measurement: processes of this machine, one for each GPU, or on the CPU in a dry run."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence

SCRIPT = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "multi_gpu.py")

_QUIET = {
    # Multicast over NVLink stays off, unless the environment says otherwise: a program that uses it can put
    # GPUs out of service that others share.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_PR_SET_PDEATHSIG = 1
_PARENT = "MULTI_GPU_PARENT"


def quieten() -> None:
    """Complete the environment of all processes; what it says already is kept."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def die_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends, whatever it is doing.

    On Linux. Every process of a run calls it at once; the first, which none of them started, goes on.
    """
    parent = os.environ.get(_PARENT)
    os.environ[_PARENT] = str(os.getpid())
    if parent is None:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if int(parent) != os.getppid():  # it has ended before the kernel knew
        os._exit(1)


def spread(arguments: Sequence[str], world: int, *, grouped: bool) -> None:
    """Become rank 0 of ``world``, and start the other ranks with the same arguments.

    Args:
        arguments: of ``multi_gpu.py``.
        world: number of ranks.
        grouped: announce them as a launcher does; otherwise there is one process, which sees one GPU.
    """
    if "RANK" in os.environ:
        return
    if not grouped:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[0]
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= shared | {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    for rank in range(1, world):
        subprocess.Popen(
            [sys.executable, SCRIPT, *arguments],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}


def place(device: str) -> None:
    """Choose this rank's device, before anything is put there."""
    import torch

    torch.set_float32_matmul_precision("high")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        torch.set_num_threads(1)


def join(device: str) -> None:
    """Join the group that was announced, if one was, as a script written by hand does."""
    import torch
    import torch.distributed as dist

    if "RANK" not in os.environ:
        return
    if device == "cuda":
        dist.init_process_group("nccl", device_id=torch.device("cuda", torch.cuda.current_device()))
    else:
        dist.init_process_group("gloo")


def leave() -> None:
    """End this rank once all have come here, without taking NCCL down, which graphs could hold up."""
    import torch.distributed as dist

    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        dist.barrier()
    os._exit(0)


class Job:
    """Ranks at work on something that is not timed against others."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        self._name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the job
        self._process = subprocess.Popen(
            [sys.executable, SCRIPT, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def wait(self, limit: float) -> None:
        """Wait for its end.

        Raises:
            RuntimeError: with the end of its output, if it fails or takes longer than ``limit`` seconds.
        """
        try:
            code = self._process.wait(limit)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the other ranks end with it
            self._process.wait()
            code = None
        with self._log as log:
            log.seek(0)
            said = "\n".join(log.read().strip().splitlines()[-15:])
        if code != 0:
            how = f"took longer than {limit:.0f} s" if code is None else f"ended with {code}"
            raise RuntimeError(f"{self._name} {how}:\n{said}")
