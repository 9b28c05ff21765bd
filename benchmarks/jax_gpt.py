"""The model of ``gpt.py`` under ``jax.jit``, with AdamW and clipping written out: the JAX contender."""

from collections.abc import Callable
from functools import partial
from typing import Any

import gpt

LR, DECAY, CLIP, BETAS, EPS = 3e-4, 0.1, 1.0, (0.9, 0.999), 1e-8


def run(size: gpt.Size, make_gate: Callable[[Any], Any], accumulation: int = 1) -> None:
    """Train for ever on one batch, calling the gate after every step.

    Args:
        size: of the model and the batch.
        make_gate: makes the gate, given a function that waits for the device.
        accumulation: micro-batches to an update.
    """
    import os

    # Other contenders are on the same GPU.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp

    width, heads, half = size.width, size.heads, jnp.bfloat16
    keys = iter(jax.random.split(jax.random.key(0), 6 * size.layers + 2))

    def normal(*shape: int) -> Any:
        return 0.02 * jax.random.normal(next(keys), shape)

    def norm_weights() -> dict[str, Any]:
        return {"scale": jnp.ones(width), "shift": jnp.zeros(width)}

    def dense(inputs: int, outputs: int) -> dict[str, Any]:
        return {"weight": normal(inputs, outputs), "bias": jnp.zeros(outputs)}

    params = {
        "tokens": normal(size.vocabulary, width),
        "places": normal(size.length, width),
        "norm": norm_weights(),
        "blocks": [
            {
                "first": norm_weights(),
                "qkv": dense(width, 3 * width),
                "out": dense(width, width),
                "second": norm_weights(),
                "up": dense(width, 4 * width),
                "down": dense(4 * width, width),
            }
            for _ in range(size.layers)
        ],
    }

    def norm(x: Any, p: Any) -> Any:
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
        return (scaled * p["scale"] + p["shift"]).astype(half)

    def linear(x: Any, p: Any) -> Any:
        return x @ p["weight"].astype(half) + p["bias"].astype(half)

    def block(x: Any, p: Any) -> Any:
        parts = jnp.split(linear(norm(x, p["first"]), p["qkv"]), 3, -1)
        q, k, v = (part.reshape(*part.shape[:2], heads, width // heads) for part in parts)
        implementation = "cudnn" if jax.default_backend() == "gpu" else None
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
        x = x + linear(mixed.reshape(x.shape), p["out"])
        return x + linear(jax.nn.gelu(linear(norm(x, p["second"]), p["up"])), p["down"])

    def loss_fn(params: Any, ids: Any, labels: Any) -> Any:
        x = params["tokens"].astype(half)[ids] + params["places"].astype(half)[: ids.shape[1]]
        for p in params["blocks"]:
            x = block(x, p)
        logits = (norm(x, params["norm"]) @ params["tokens"].astype(half).T).astype(jnp.float32)
        chosen = jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
        return (jax.nn.logsumexp(logits, -1) - chosen).mean()

    @partial(jax.jit, donate_argnums=0)
    def step(state: Any, ids: Any, labels: Any) -> Any:
        params, first, second, count = state
        count = count + 1
        grads = jax.tree.map(jnp.zeros_like, params)
        for part in range(accumulation):
            new = jax.grad(loss_fn)(params, ids[part], labels[part])
            grads = jax.tree.map(lambda a, b: a + b / accumulation, grads, new)
        size = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        factor = jnp.minimum(1.0, CLIP / (size + 1e-6))
        grads = jax.tree.map(lambda g: g * factor, grads)
        a, b = BETAS
        first = jax.tree.map(lambda m, g: a * m + (1 - a) * g, first, grads)
        second = jax.tree.map(lambda v, g: b * v + (1 - b) * g * g, second, grads)

        def update(p: Any, m: Any, v: Any) -> Any:
            root = jnp.sqrt(v / (1 - b**count)) + EPS
            return p * (1 - LR * DECAY) - LR * (m / (1 - a**count)) / root

        return jax.tree.map(update, params, first, second), first, second, count

    batch = gpt.batch(size)
    shape = (accumulation, size.batch, size.length)
    ids, labels = (
        jnp.broadcast_to(jnp.asarray(batch[name].numpy()), shape)
        for name in ("input_ids", "labels")
    )
    state = (params, *(jax.tree.map(jnp.zeros_like, params) for _ in range(2)), jnp.zeros(()))
    gate = make_gate(lambda: jax.block_until_ready(state))
    while True:
        state = step(state, ids, labels)
        gate()
