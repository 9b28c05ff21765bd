"""The core alone: a training step as a function, composed by hand. Runs in a few seconds."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import trainstep as ts

images, classes = load_digits(return_X_y=True)
shuffled = torch.randperm(len(images), generator=ts.rng.generator(ts.rng.key(0)))
images = torch.tensor(images / 16, dtype=torch.float32)[shuffled]
classes = torch.tensor(classes)[shuffled]

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
before = ts.digest(dict(model.state_dict()))
generator_before = torch.get_rng_state()


# A loss is a sum and a weight; whatever is summed beside it comes back as a metric.
def summed_loss(call, batch):
    logits = call(batch["x"])
    correct = (logits.argmax(-1) == batch["y"]).sum()
    total = F.cross_entropy(logits, batch["y"], reduction="sum")
    return ts.Loss(total, weight=len(batch["y"]), aux={"accuracy": correct})


loss_fn = ts.module_loss(model, summed_loss)
step = ts.make_step(
    loss_fn,
    ts.optim.adamw(weight_decay=0.01),
    schedule=ts.schedules.cosine(3e-3, total_steps=300, warmup_steps=20),
    transforms=(ts.transforms.clip_by_global_norm(1.0),),
    microbatches=2,
)
evaluate = ts.make_eval_step(loss_fn)


def batch_at(position: int) -> dict[str, torch.Tensor]:
    """Data order as a function of the position: no sampler, no state."""
    rows = torch.randperm(1500, generator=ts.rng.generator(ts.rng.key(1).fold_in(position)))[:64]
    return {"x": images[rows], "y": classes[rows]}


state = step.init(model, seed=0)
for position in range(300):
    if position == 150:
        halfway = state  # a state is a value: keep it, and nothing will change it
    state, metrics = step(state, batch_at(position))
    if position % 100 == 99:
        print(f"step {state.step}: loss {metrics['loss']:.4f}, accuracy {metrics['accuracy']:.3f}")

held_out = evaluate(state, {"x": images[1500:], "y": classes[1500:]})
print(f"held-out digits: loss {held_out['loss']:.4f}, accuracy {held_out['accuracy']:.3f}")

# Replay: the second half again, from the state kept at step 150, gives the same bits.
replayed = halfway
for position in range(150, 300):
    replayed, _ = step(replayed, batch_at(position))
print("replayed from step 150, same digest:", ts.digest(replayed) == ts.digest(state))

# Purity: neither the module nor PyTorch's global generator noticed anything.
print("module untouched:", ts.digest(dict(model.state_dict())) == before)
print("global generator untouched:", torch.equal(torch.get_rng_state(), generator_before))
