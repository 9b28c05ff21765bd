"""Settings of the property tests: the same examples on every run, on one thread, without a database.

``HYPOTHESIS_PROFILE=wide`` draws fresh examples, and more of them.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# A first example pays for imports inside torch, which has nothing to do with the property.
slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "fixed",
    deadline=None,
    max_examples=25,
    derandomize=True,
    database=None,
    suppress_health_check=slow,
)
settings.register_profile(
    "wide", deadline=None, max_examples=200, database=None, suppress_health_check=slow
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
