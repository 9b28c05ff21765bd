"""Devices and processes: lazy, and right on one process and on several."""

import logging
import os
import subprocess
import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from trainer.arguments import ParallelMode, TrainingArguments
from trainer.arguments.device_setup import DeviceSetup, apply_tf32, check_hardware

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_state():
    """Leave no state of accelerate behind, nor find one."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


def pretend(args, *, kind="NO", processes=1, rank=0, local=0, n_gpu=0, device=CPU):
    """Give ``args`` the set-up of another machine."""
    state = SimpleNamespace(
        distributed_type=SimpleNamespace(value=kind),
        num_processes=processes,
        process_index=rank,
        local_process_index=local,
        device=device,
        waits=[],
    )
    state.wait_for_everyone = lambda: state.waits.append("wait")
    args._device_cache = DeviceSetup(state, device, n_gpu)
    return args


@pytest.mark.row(141, 146)
def test_one_process_on_the_cpu():
    args = TrainingArguments(use_cpu=True, per_device_train_batch_size=3)
    assert "_device_cache" not in vars(args)
    assert args.device == args._setup_devices == CPU
    assert args.n_gpu == 0
    assert args.parallel_mode is ParallelMode.NOT_PARALLEL
    assert (args.world_size, args.process_index, args.local_process_index) == (1, 0, 0)
    assert (args.train_batch_size, args.eval_batch_size) == (3, 8)
    assert args.should_log
    assert args.should_save
    assert args.place_model_on_device is None
    assert args.framework == "pt"
    assert args.ddp_timeout_delta == timedelta(seconds=1800)
    assert args.distributed_state is args.distributed_state


def test_backend_without_a_launcher_is_of_no_effect():
    args = TrainingArguments(use_cpu=True, ddp_backend="gloo")
    assert args.world_size == 1
    assert not torch.distributed.is_initialized()


@pytest.fixture
def present(monkeypatch):
    """Let accelerate find a device that is not there."""

    def claim(name):
        monkeypatch.setattr(f"accelerate.state.is_{name}_available", lambda *_, **__: True)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: name == "mps")
        for variable in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "PYTORCH_ENABLE_MPS_FALLBACK"):
            monkeypatch.delenv(variable, raising=False)

    return claim


@pytest.mark.row(142, 143)
@pytest.mark.parametrize("name", ["mps", "xpu", "hpu"])
def test_another_accelerator_is_used_when_there_is_one(name, present, monkeypatch):
    present(name)
    if name != "mps":  # their own packages would choose the device
        monkeypatch.setattr(torch, name, SimpleNamespace(set_device=lambda _: None), raising=False)
    args = TrainingArguments(per_device_train_batch_size=3)
    assert args.device.type == name
    assert (args.n_gpu, args.world_size, args.train_batch_size) == (1, 1, 3)
    assert args.parallel_mode is ParallelMode.NOT_PARALLEL
    assert TrainingArguments(use_cpu=True).device == CPU


@pytest.mark.row(142)
def test_processes_that_cannot_join_each_other_are_refused(present, monkeypatch):
    present("mps")
    for variable in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(variable, "2")
    for variable in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(variable, "0")
    for backend in (None, "gloo", "nccl"):
        with pytest.raises(ValueError, match=r"started 2 processes, but an Apple GPU \(mps\)"):
            _ = TrainingArguments(ddp_backend=backend).device
        assert not torch.distributed.is_initialized()


def test_several_devices_in_one_process():
    args = pretend(TrainingArguments(), n_gpu=4)
    assert args.parallel_mode is ParallelMode.NOT_DISTRIBUTED
    assert args.train_batch_size == 32
    args._n_gpu = 1
    assert args.n_gpu == args._n_gpu == 1
    assert args.eval_batch_size == 8


@pytest.mark.parametrize(
    ("kind", "mode"), [("MULTI_GPU", ParallelMode.DISTRIBUTED), ("XLA", ParallelMode.TPU)]
)
def test_parallel_mode_of_a_launcher(kind, mode):
    assert pretend(TrainingArguments(), kind=kind, n_gpu=1).parallel_mode is mode


@pytest.mark.row(92, 103)
@pytest.mark.parametrize(
    ("rank", "local", "on_each_node", "expected"),
    [(0, 0, True, True), (2, 0, True, True), (2, 0, False, False), (1, 1, True, False)],
)
def test_who_logs_and_saves(rank, local, on_each_node, expected):
    args = TrainingArguments(log_on_each_node=on_each_node, save_on_each_node=on_each_node)
    pretend(args, kind="MULTI_CPU", processes=4, rank=rank, local=local)
    assert args.should_log is expected
    assert args.should_save is expected


@pytest.mark.row(102, 104)
def test_log_level_of_main_and_other_processes():
    args = TrainingArguments(log_level="info", log_level_replica="error")
    assert pretend(args, rank=0).get_process_log_level() == logging.INFO
    assert pretend(args, rank=1, local=1).get_process_log_level() == logging.ERROR
    assert pretend(TrainingArguments(log_level="detail")).get_process_log_level() == logging.DEBUG


@pytest.mark.row(101)
def test_passive_keeps_the_level_of_the_library():
    args = pretend(TrainingArguments())
    logger = logging.getLogger("trainer")
    try:
        logger.setLevel(logging.CRITICAL)
        assert args.get_process_log_level() == logging.CRITICAL
    finally:
        logger.setLevel(logging.NOTSET)


@pytest.mark.row(40)
@pytest.mark.parametrize(
    ("warmup", "steps"), [(0, 0), (3, 3), (3.7, 3), (0.25, 3), (0.3, 3), (1, 1)]
)
def test_warmup_steps(warmup, steps):
    assert TrainingArguments(warmup_steps=warmup).get_warmup_steps(10) == steps


@pytest.mark.row(178)
@pytest.mark.parametrize(
    ("given", "variable", "expected"),
    [
        ({}, None, "no"),
        ({}, "bf16", "bf16"),
        ({"fp16": True}, "bf16", "fp16"),
        ({"bf16": True}, "fp16", "bf16"),
    ],
)
def test_mixed_precision(given, variable, expected, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if variable is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", variable)
    assert TrainingArguments(**given).mixed_precision == expected


# ---- what the device can do ----------------------------------------------------------------------


@pytest.mark.row(43, 47)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bf16": True}, "bf16: the device cpu does not support bfloat16 .*Ampere"),
        ({"bf16_full_eval": True}, "bf16_full_eval: the device cpu .*Set use_cpu=True"),
        ({"tf32": True}, "tf32: the device cpu does not support TensorFloat-32.*CUDA 11"),
    ],
)
def test_what_the_cpu_cannot_do(given, message):
    args = TrainingArguments(**given)
    with pytest.raises(ValueError, match=message):
        check_hardware(args, CPU)


@pytest.mark.row(43)
def test_the_check_runs_when_the_device_is_asked_for():
    args = TrainingArguments(use_cpu=True, tf32=True)
    for _ in range(2):
        with pytest.raises(ValueError, match="tf32: the device cpu"):
            _ = args.device


def test_bfloat16_on_the_cpu_when_asked_for():
    assert TrainingArguments(use_cpu=True, bf16=True, bf16_full_eval=True).device == CPU


@pytest.fixture
def tf32_settings():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield lambda: (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.row(47)
@pytest.mark.parametrize("compiled", [False, True])
def test_tf32(tf32_settings, compiled):
    before = tf32_settings()
    apply_tf32(TrainingArguments(torch_compile=compiled), CPU)
    assert tf32_settings() == before
    for wanted in (True, False):
        apply_tf32(TrainingArguments(tf32=wanted, torch_compile=compiled), CPU)
        assert tf32_settings() == (wanted, wanted)


# ---- accelerate's state --------------------------------------------------------------------------


def test_a_state_that_fits_is_kept():
    from accelerate import PartialState

    first = TrainingArguments(use_cpu=True).distributed_state
    first.marker = "kept"
    assert TrainingArguments(use_cpu=True).distributed_state.marker == "kept"
    assert PartialState().marker == "kept"


def test_a_state_of_another_device_is_replaced():
    from accelerate import PartialState

    PartialState(cpu=True).marker = "old"
    assert not hasattr(TrainingArguments().distributed_state, "marker")


def test_configured_state_must_exist():
    from accelerate import PartialState

    args = TrainingArguments(accelerator_config={"use_configured_state": True}, use_cpu=True)
    with pytest.raises(ValueError, match=r"use_configured_state is set, but there is no state"):
        _ = args.device
    PartialState(cpu=True).marker = "mine"
    assert args.distributed_state.marker == "mine"
    assert args.to_dict()["accelerator_config"]["use_configured_state"] is True


def test_parallelism_is_built_with_the_device():
    from accelerate import ParallelismConfig

    args = TrainingArguments(parallelism_config={"tp_size": 1}, use_cpu=True)
    assert args.device == CPU
    assert isinstance(args.parallelism_config, ParallelismConfig)
    assert args.to_dict()["parallelism_config"]["tp_size"] == 1
    again = TrainingArguments(**args.to_dict())
    assert again.device == CPU
    with pytest.raises(
        ValueError, match=r"unknown keys \['bogus'\]; valid keys are dp_replicate_size"
    ):
        _ = TrainingArguments(parallelism_config={"bogus": 1}, use_cpu=True).device


# ---- main process first --------------------------------------------------------------------------


@pytest.mark.row(145)
@pytest.mark.parametrize(
    ("rank", "local_rank", "local", "order"),
    [
        (0, 0, True, ["body", "wait"]),
        (1, 1, True, ["wait", "body"]),
        (2, 0, True, ["body", "wait"]),
        (2, 0, False, ["wait", "body"]),
    ],
)
def test_main_process_first(rank, local_rank, local, order):
    args = pretend(TrainingArguments(), kind="MULTI_CPU", processes=4, rank=rank, local=local_rank)
    events = args.distributed_state.waits
    with args.main_process_first(local=local, desc="tokenizing"):
        events.append("body")
    assert events == order


def test_main_process_first_lets_the_others_go_after_an_error():
    args = pretend(TrainingArguments(), kind="MULTI_CPU", processes=2)
    with pytest.raises(KeyError), args.main_process_first():
        raise KeyError
    assert args.distributed_state.waits == ["wait"]


def test_main_process_first_alone_does_not_wait():
    args = pretend(TrainingArguments())
    with args.main_process_first():
        pass
    assert args.distributed_state.waits == []


TWO_PROCESSES = """
import os, sys, time, torch
from trainer.arguments import ParallelMode, TrainingArguments
args = TrainingArguments(use_cpu=sys.argv[2] == "cpu", ddp_backend="gloo", ddp_timeout=60)
assert not torch.distributed.is_initialized()
assert args.world_size == 2 and args.parallel_mode is ParallelMode.DISTRIBUTED and args.n_gpu == 1
assert args.process_index == int(os.environ["RANK"])
assert args.should_save is (args.process_index == 0)
assert torch.distributed.get_backend() == "gloo"
with args.main_process_first():
    if args.process_index == 0:
        time.sleep(0.5)
        open(sys.argv[1], "w").close()
    assert os.path.exists(sys.argv[1])
torch.distributed.destroy_process_group()
"""


@pytest.mark.row(145, 146)
@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "whatever-there-is"])
def test_two_processes(tmp_path, device):
    if device != "cpu" and torch.accelerator.is_available():
        pytest.skip("shows that processes without an accelerator join each other too")
    pytest.importorskip("psutil", reason="accelerate needs it for several processes on a CPU")
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(tmp_path / "made"), device],
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tf32_settings):
    args = TrainingArguments(bf16=True, tf32=True)
    assert args.device == torch.device("cuda", 0)
    assert args.n_gpu == torch.cuda.device_count()
    assert tf32_settings() == (True, True)
    assert TrainingArguments(fp16=True, tf32=False).device.type == "cuda"
    assert tf32_settings() == (False, False)
    assert TrainingArguments(torch_compile=True).device.type == "cuda"
    assert tf32_settings() == (True, True)
    assert TrainingArguments(use_cpu=True).device == CPU
    assert TrainingArguments().device.type == "cuda"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_construction_does_not_start_cuda():
    code = (
        "import torch; from trainer.arguments import TrainingArguments as T\n"
        "args = T(bf16=True, tf32=True); args.set_training(); assert not torch.cuda.is_initialized()\n"
        "assert args.device.type == 'cuda'; assert torch.cuda.is_initialized()"
    )
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
