"""A warmed step asks nothing of the operating system: no file, no socket, no process."""

import json

import pytest

from support.processes import python

CODE = """
import json, os, socket, sys
import torch, trainstep as ts
from support import models

torch.set_num_threads(1)
module, batch = models.build("dropout"), models.batch()
deed = None  # what a loss does besides

def loss(call, data):
    if deed is not None:
        deed()
    return models.mean_loss(call, data)

schedule = ts.schedules.cosine(0.1, total_steps=9)
clip = ts.transforms.clip_by_global_norm(1.0)
optimizers = (ts.optim.adamw(), ts.optim.adamw(fused=False), ts.optim.sgd(momentum=0.9),
              ts.optim.from_torch(torch.optim.RMSprop))
steps = [ts.make_step(ts.module_loss(module, loss), o, schedule, (clip,), 2, "skip") for o in optimizers]
states = [step.init(module) for step in steps]

def once():
    for step, state in zip(steps, states):
        after, _ = step(state, batch)
        after, _ = ts.donate(step)(after, batch)

events, watching = set(), False
sys.addaudithook(lambda event, args: watching and events.add(event))
found = {}
for name, deed in (
    ("warm-up", None),
    ("nothing", None),
    ("file", lambda: open(os.devnull).close()),
    ("socket", lambda: socket.socket().close()),
):
    events.clear()
    watching = True
    once()
    watching = False
    found[name] = sorted(events)
print(json.dumps(found))
"""
OUTSIDE = ("open", "socket", "os.", "subprocess", "shutil", "pathlib", "urllib", "import", "exec")


@pytest.fixture(scope="module")
def events() -> dict[str, list[str]]:
    """What audit events of the world outside each kind of loss raised, by name of the deed."""
    found = json.loads(python(CODE))
    return {name: [e for e in seen if e.startswith(OUTSIDE)] for name, seen in found.items()}


def test_a_warmed_step_raises_no_audit_event_of_the_world_outside(
    events: dict[str, list[str]],
) -> None:
    assert events["nothing"] == []


def test_the_check_can_fail(events: dict[str, list[str]]) -> None:
    assert events["file"] == ["open"]
    assert events["socket"] == ["socket.__new__"]
