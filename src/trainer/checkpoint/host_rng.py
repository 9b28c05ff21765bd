"""The random state of this process's libraries, as JSON values.

Training itself draws nothing from it: its randomness is a function of seed and step. It is kept for
user code that draws from ``random``, ``numpy.random`` or torch's default generators.
"""

import base64
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def capture() -> dict[str, Any]:
    """Return the states of Python, NumPy (legacy), torch's CPU and, if in use, CUDA generators.

    Keys: ``python``, ``numpy``, ``torch``, ``cuda`` (a list with one entry a device). ``restore`` brings
    back exactly these, also after a way through JSON.
    """
    objects: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        objects["cuda"] = torch.cuda.get_rng_state_all()
    return as_json(objects)


def restore(state: dict[str, Any]) -> None:
    """Put back what ``capture`` returned; generators that it does not name are left alone.

    States of CUDA devices that this process does not have are ignored.
    """
    objects = as_objects(state)
    if "python" in objects:
        random.setstate(objects["python"])
    if "numpy" in objects:
        np.random.set_state(objects["numpy"])  # noqa: NPY002
    if "torch" in objects:
        torch.set_rng_state(objects["torch"])
    if torch.cuda.is_available():
        for index, one in enumerate(objects.get("cuda", [])[: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(one, index)


def as_json(objects: dict[str, Any]) -> dict[str, Any]:
    """Return states as the libraries give them (tuples, tensors) as JSON values."""
    version, words, gauss = objects["python"]
    name, key, position, has_gauss, cached = objects["numpy"]
    state: dict[str, Any] = {
        "python": [version, list(words), None if gauss is None else gauss.hex()],
        "numpy": [
            str(name),
            [int(word) for word in key],
            int(position),
            int(has_gauss),
            float(cached).hex(),
        ],
        "torch": _text(objects["torch"]),
    }
    if "cuda" in objects:
        state["cuda"] = [_text(one) for one in objects["cuda"]]
    return state


def as_objects(state: dict[str, Any]) -> dict[str, Any]:
    """Return what the libraries take for what ``as_json`` made of it; keys may be missing."""
    objects: dict[str, Any] = {}
    if "python" in state:
        version, words, gauss = state["python"]
        objects["python"] = (version, tuple(words), gauss and float.fromhex(gauss))
    if "numpy" in state:
        name, key, position, has_gauss, cached = state["numpy"]
        words = np.array(key, dtype=np.uint32)
        objects["numpy"] = (name, words, position, has_gauss, float.fromhex(cached))
    if "torch" in state:
        objects["torch"] = _tensor(state["torch"])
    if "cuda" in state:
        objects["cuda"] = [_tensor(text) for text in state["cuda"]]
    return objects


def _text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
