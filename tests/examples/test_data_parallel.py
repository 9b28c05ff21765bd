"""The data-parallel example: as a plain process and through torchrun, exact and not."""

import os
import re
import subprocess
import sys

import pytest

import trainstep as ts
from support.processes import ROOT

TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]

pytestmark = pytest.mark.slow


def run(processes: int, *options: str, plain: bool = False) -> str:
    """Run the example; return what it printed."""
    pytest.importorskip("sklearn", reason="data_parallel.py needs sklearn")
    launcher = [] if plain else [*TORCHRUN, f"--nproc_per_node={processes}"]
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / "data_parallel.py"), *options],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"processes: {processes}, all with the same state: True" in done.stdout
    return done.stdout


def digest(text: str) -> str:
    found = re.search(r"digest of the final state: ([0-9a-f]{64})\n", text)
    assert found, text
    return found[1]


def test_exact_training_has_one_digest_on_any_number_of_processes() -> None:
    options = ("--exact", "--steps", "60")
    outputs = [run(1, *options, plain=True), run(2, *options), run(4, *options)]
    assert len({digest(text) for text in outputs}) == 1


def test_without_exact_processes_agree_with_each_other_and_nearly_with_one() -> None:
    alone, two = run(1, plain=True), run(2)
    assert re.search(r"\nheld-out digits: loss 0\.\d+, accuracy 0\.9\d\d\n", alone)
    pattern = r"step 50: loss (\d+\.\d+), accuracy (\d+\.\d+)"
    first, second = (re.search(pattern, text) for text in (alone, two))
    assert first
    assert second
    assert float(first[1]) == pytest.approx(float(second[1]), abs=1e-3)


def test_by_hand_is_data_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="data_parallel.py needs sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import data_parallel as example

    images, classes = example.digits()
    model = example.network()
    step = ts.make_step(
        ts.module_loss(model, example.summed), ts.optim.adamw(), microbatches="iter", order="tree"
    )
    start = step.init(model)
    batch = example.global_batch(0, images, classes)
    mine, _ = example.by_hand(step, True)(start, batch)
    theirs, _ = ts.data_parallel(step, exact=True)(start, batch)
    assert ts.digest(mine) == ts.digest(theirs)
