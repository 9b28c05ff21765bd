"""DeepSpeed's ZeRO stages with 2 processes: what data parallelism does, saved and resumed to the bit."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file

from support.processes import ROOT, python
from support.ranks.launch import TORCHRUN, free_port, launch
from support.shell import scored
from trainer import checkpoint
from trainer.cli.reading import glance

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed; docs/distributed.md says how",
)

FULL_PRECISION = ("stage 1", "stage 2", "stage 3", "their optimizer", "offload")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two processes work."""
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[Any]:
    """What two processes find, in one launch."""
    return launch(2, "zero", folder, "trained,again,broken,saves,disk,parts").found


@pytest.mark.row(163, 167, 169)
def test_every_stage_trains_as_data_parallelism_does(two: list[Any]) -> None:
    for found in two:
        plain = found["trained"]["plain"]
        for name in FULL_PRECISION:
            ours = found["trained"][name]
            assert ours["rate"] == plain["rate"]
            for what in ("loss", "norm", "eval"):
                assert_allclose(ours[what], plain[what], rtol=2e-6, err_msg=f"{name}, {what}")
    weights = {name: case["weights"] for name, case in two[0]["trained"].items()}
    for name in FULL_PRECISION:
        assert_allclose(weights[name], weights["plain"], rtol=0, atol=1e-6, err_msg=name)
    # Their schedule: its first two updates are warm-up from 0, then the full rate.
    for name in ("their scheduler", "both theirs"):
        assert two[0]["trained"][name]["rate"] == [0.0, 0.0, 0.05, 0.05]
    assert_allclose(weights["both theirs"], weights["their scheduler"], rtol=0, atol=1e-6)
    # Stage 3 holds half of each parameter, the others the whole.
    held = {name: case["held"] for name, case in two[0]["trained"].items()}
    assert held["stage 3"] == [-(-size // 2) for size in held["stage 2"]]


@pytest.mark.row(170)
def test_precision(two: list[Any]) -> None:
    cases = two[0]["trained"]
    assert cases["stage 2"]["dtype"] == "torch.float32"
    for name in ("bf16 stage 2", "bf16 stage 3"):
        assert cases[name]["dtype"] == "torch.bfloat16"
        assert_allclose(cases[name]["loss"], cases["plain bf16"]["loss"], rtol=1e-2)
        assert_allclose(cases[name]["norm"], cases["plain bf16"]["norm"], rtol=1e-2)
    assert cases["bf16 stage 2"]["loss"] != cases["stage 2"]["loss"]


def test_a_second_training_goes_on_with_the_engine(two: list[Any]) -> None:
    for found in two:
        again = found["again"]
        assert again["kept"]
        assert again["steps"] == 8
        assert again["loss"] != found["trained"]["stage 2"]["loss"]
        assert "is at its end after the first training" in again["schedule"]


def test_no_gradient_of_an_interrupted_update_is_left(two: list[Any]) -> None:
    for found in two:
        for kind in ("2", "3", "theirs"):
            assert found["broken"][f"{kind} engine"] == "None"
            for what in (kind, f"{kind} weights"):
                again, fresh = found["broken"][what]
                assert again == fresh
    for kind in ("2", "3", "theirs"):  # weights are on process 0
        assert two[0]["broken"][f"{kind} moved"]


@pytest.mark.row(172)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(two: list[Any]) -> None:
    for found in two:
        for kind in ("2", "3", "bf16", "theirs"):
            whole, rest, losses, theirs = found["saves"][kind]
            assert rest == whole
            assert theirs == losses
        assert two[0]["saves"]["2"][0] == two[1]["saves"]["2"][0]  # stage 2: the same weights


@pytest.mark.row(172)
def test_damage_is_found_and_another_stage_refused(two: list[Any]) -> None:
    for found in two:
        told, count, last = found["saves"]["newest"]
        assert "optim_states.pt is damaged" in told
        assert "Resume from another checkpoint" in told
        assert count == 4  # logs of three updates were in the checkpoint
        assert last == found["saves"]["2"][2][-1]
        assert "stage: 2 then, 3 now" in found["saves"]["other stage"]
        assert "whose state only DeepSpeed can read" in found["saves"]["without"]
        best, worst, loaded = found["saves"]["best"]
        assert worst > best
        assert loaded == pytest.approx(best, rel=1e-6)


@pytest.mark.row(171, 172)
def test_what_is_on_the_disk(two: list[Any], folder: Path) -> None:
    gathered, parts = (folder / "saves" / kind / "checkpoint-3" for kind in ("2", "3"))
    for path in (gathered, parts):
        assert checkpoint.verify(path) == []
        manifest = json.loads((path / "manifest.json").read_text())
        files = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
        assert set(manifest["files"]) == files - {"manifest.json"}
        assert sum(name.endswith("optim_states.pt") for name in files) == 2
        assert {"latest", "zero_to_fp32.py", "train_state.json"} <= files
    assert (gathered / "model.safetensors").is_file()
    assert not (parts / "model.safetensors").exists()
    assert (glance(parts).format, glance(parts).digest) == ("deepspeed", None)
    # ``save_model`` with stage 3: one file if it may gather, else DeepSpeed's files and its script.
    model = scored("dropout")
    for kind in ("2", "theirs"):
        saved = load_file(folder / "saves" / kind / "model" / "model.safetensors")
        expected = two[0]["saves"][f"{kind} weights"]
        flat = torch.cat([saved[name].flatten() for name, _ in model.named_parameters()])
        assert flat.tolist() == expected
    left = folder / "saves" / "3" / "model"
    assert not (left / "model.safetensors").exists()
    flat = torch.cat([tensor.flatten() for tensor in _consolidated(left, model)])
    assert flat.tolist() == two[0]["saves"]["3 weights"]


def _consolidated(folder: Path, model: torch.nn.Module) -> list[torch.Tensor]:
    """Run the script that DeepSpeed leaves beside its files, as its documentation says."""
    command = [sys.executable, str(folder / "zero_to_fp32.py"), str(folder), str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    state = torch.load(folder / "out" / "pytorch_model.bin", weights_only=True)
    return [state[name] for name, _ in model.named_parameters()]


def test_a_disk_that_refuses_one_process_stops_none(two: list[Any]) -> None:
    for found in two:
        assert found["disk"]["left"] == ["checkpoint-4"]
        assert "No space left on device" in found["disk"]["last"]
        assert found["disk"]["last"].startswith("CheckpointError")


@pytest.mark.row(166, 168)
def test_models_are_in_parts_from_their_creation(two: list[Any]) -> None:
    for found in two:
        parts = found["parts"]
        assert parts["before"] == pytest.approx(parts["expected"], rel=1e-6)
        assert_allclose(parts["after"], found["trained"]["plain"]["loss"], rtol=2e-6)
        assert parts["made"]
        assert parts["enabled"]
        assert parts["bert"]
        assert parts["buckets"] == [64, 57, 80]
        assert parts["numbers"] > 1000
        assert parts["losses"][0] != parts["losses"][1]


@pytest.mark.row(173)
def test_one_process_without_a_launcher(two: list[Any], folder: Path, tmp_path: Path) -> None:
    other = folder / "saves" / "2" / "checkpoint-3"
    found = _alone(tmp_path, str(other))
    for name in ("zero", "parts"):
        assert_allclose(found[name], found["plain"], rtol=2e-6)
    assert found["again"] == found["zero"]
    assert found["environment"] == []
    assert "world_size: 2 then, 1 now" in found["two"]


def _alone(folder: Path, *arguments: str) -> Any:
    script = ROOT / "tests" / "support" / "ranks" / "zero.py"
    run = f"import runpy, sys; sys.argv = {[str(script), str(folder), 'alone', *arguments]!r}; "
    python(run + f"runpy.run_path({str(script)!r}, run_name='__main__')", OMP_NUM_THREADS="1")
    return json.loads((folder / "found-0.json").read_text())["alone"]


@pytest.mark.row(177)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the configuration is for a CPU")
def test_accelerates_configuration(two: list[Any], tmp_path: Path) -> None:
    settings = tmp_path / "zero.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 2}, **_AUTO}))
    config = tmp_path / "config.yaml"
    config.write_text(_CONFIG.format(settings=settings))
    launcher = ("-m", "accelerate.commands.launch", f"--config_file={config}")
    launcher += (f"--main_process_port={free_port()}",)
    result = launch(2, "zero", tmp_path, "launched", launcher=launcher, processes="--num_processes")
    for found in result.found:
        assert found["launched"]["stage"] == 2
        assert found["launched"]["loss"] == two[0]["trained"]["stage 2"]["loss"]
        assert found["launched"]["unwrapped"]


def test_the_script_of_the_page(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "distributed.md").read_text()
    (script,) = re.findall(r"```python\n(# zero.py\n.*?)```", page, flags=re.DOTALL)
    blocks = re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)
    assert "torchrun --nproc_per_node=2 zero.py\npython zero.py\n" in blocks
    (tmp_path / "zero.py").write_text(script)
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    losses = {}
    for size, launcher in ((2, [*TORCHRUN, "--nproc_per_node=2"]), (1, [])):
        command = [sys.executable, *launcher, "zero.py"]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (line,) = (one for one in done.stdout.splitlines() if " processes: " in one)
        assert line.startswith(f"{size} processes: ")
        losses[size] = float(line.split()[-1])
    assert 0 < losses[2] < 1.4  # below the logarithm of 4 classes
    assert 0 < losses[1] < 1.4


_AUTO = dict.fromkeys(
    ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)

_CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  deepspeed_config_file: {settings}
  zero3_init_flag: false
machine_rank: 0
main_process_ip: 127.0.0.1
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
use_cpu: false
"""
