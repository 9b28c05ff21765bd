"""``accelerate launch``, and one ``torchrun`` for each machine, start a training as ``torchrun`` does."""

import re
from pathlib import Path

import pytest
import torch

import trainstep as ts
from support.ranks.launch import free_port, launch, start, wait
from support.shell import make_trainer, samples, scored
from trainer.checkpoint import verify

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


@pytest.mark.row(135)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the configuration is for a CPU")
def test_a_configuration_file_of_accelerate(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    config.write_text(text)
    launcher = ("-m", "accelerate.commands.launch", f"--config_file={config}")
    port = f"--main_process_port={free_port()}"
    result = launch(
        2, "launched", tmp_path, launcher=(*launcher, port), processes="--num_processes"
    )
    for rank, found in enumerate(result.found):
        assert found.pop("digest") == ts.digest(alone(tmp_path))
        assert found == placed(rank, local=rank, saves=rank == 0)


@pytest.mark.row(92, 175)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the machines have one CPU each")
def test_two_launchers_as_on_two_machines(tmp_path: Path) -> None:
    address = ("--master_addr=127.0.0.1", f"--master_port={free_port()}", "--nnodes=2")
    started = [
        start(
            1,
            "launched",
            tmp_path / str(node),
            "each node",
            launcher=("-m", "torch.distributed.run", *address, f"--node_rank={node}"),
        )
        for node in range(2)
    ]
    ended = [wait(one, 2, tmp_path / str(node), 150) for node, one in enumerate(started)]
    for node, result in enumerate(ended):
        assert result.status == 0, result.output[-3000:]
        found = result.found[node]
        assert found.pop("digest") == ts.digest(alone(tmp_path))
        assert found == placed(node, local=0, saves=True)
        checkpoints = list((tmp_path / str(node) / "out").glob("checkpoint-*"))
        assert len(checkpoints) == 1
        assert verify(checkpoints[0]) == []


def alone(folder: Path) -> ts.TrainState:
    """Return the state after the same training in one process."""
    trainer = make_trainer(
        folder / "alone",
        scored("dropout"),
        train=samples(15),
        exact_reduction=True,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    state: ts.TrainState = trainer.train_state
    return state


def placed(rank: int, *, local: int, saves: bool) -> dict[str, object]:
    """Return what one of two processes says of itself."""
    where = {"world": 2, "rank": rank, "local": local, "saves": saves}
    return {**where, "device": "cpu", "env": str(rank)}
