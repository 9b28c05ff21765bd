"""``accelerate launch`` with its configuration file starts a training as ``torchrun`` does."""

from pathlib import Path

import pytest
import torch

import trainstep as ts
from support.ranks.launch import free_port, launch
from support.shell import make_trainer, samples, scored

CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
machine_rank: 0
main_process_ip: 127.0.0.1
mixed_precision: 'no'
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
use_cpu: false
"""


@pytest.mark.row(135)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the configuration is for a CPU")
def test_a_configuration_file_of_accelerate(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    launcher = ("-m", "accelerate.commands.launch", f"--config_file={config}")
    port = f"--main_process_port={free_port()}"
    result = launch(
        2, "launched", tmp_path, launcher=(*launcher, port), processes="--num_processes"
    )
    trainer = make_trainer(
        tmp_path / "alone",
        scored("dropout"),
        train=samples(15),
        exact_reduction=True,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    for rank, found in enumerate(result.found):
        assert found.pop("digest") == ts.digest(trainer.train_state)
        assert found == {"world": 2, "rank": rank, "device": "cpu", "env": str(rank)}
