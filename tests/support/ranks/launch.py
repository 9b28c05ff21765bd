"""Starting the processes of a distributed test, and reading what each of them found."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from attrs import frozen

TESTS = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


@frozen
class Launched:
    """What a launch left.

    Attributes:
        status: what the launcher ended with.
        output: standard output and error of all processes.
        seconds: how long it took.
        found: what each process wrote, by rank; None for one that did not come to its end.
    """

    status: int
    output: str
    seconds: float
    found: list[Any]


def start(
    count: int,
    script: str,
    folder: Path,
    *arguments: str,
    launcher: tuple[str, ...] = TORCHRUN,
    processes: str = "--nproc_per_node",
) -> subprocess.Popen[bytes]:
    """Start ``support/ranks/<script>.py`` in ``count`` processes; output goes to ``folder/output.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    command = [sys.executable, *launcher, f"{processes}={count}"]
    command += [str(TESTS / "support" / "ranks" / f"{script}.py"), str(folder), *arguments]
    with open(folder / "output.txt", "wb") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, start_new_session=True
        )


def wait(process: subprocess.Popen[bytes], count: int, folder: Path, limit: float) -> Launched:
    """Wait for what ``start`` started; after ``limit`` seconds it is killed, and the test fails."""
    began = time.monotonic()
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise AssertionError(
            f"not over within {limit} s:\n{(folder / 'output.txt').read_text()[-4000:]}"
        ) from None
    seconds = time.monotonic() - began
    files = [folder / f"found-{rank}.json" for rank in range(count)]
    found = [json.loads(file.read_text()) if file.exists() else None for file in files]
    return Launched(status, (folder / "output.txt").read_text(), seconds, found)


def launch(
    count: int, script: str, folder: Path, *arguments: str, limit: float = 150, **options: Any
) -> Launched:
    """Start a script, wait for it, and see that it ended well."""
    result = wait(start(count, script, folder, *arguments, **options), count, folder, limit)
    assert result.status == 0, result.output[-6000:]
    return result


def report(folder: Path, found: Any) -> None:
    """Write what this process found."""
    rank = os.environ.get("RANK", "0")
    (folder / f"found-{rank}.json").write_text(json.dumps(found))


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
