"""Tensors in parts, with a process group of one: made whole, measured, digested."""

import json

import pytest
import torch
from torch import nn

from support.processes import python
from trainstep import sharded, tree

CODE = """
import json, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
import trainstep as ts
from trainstep import sharded, tree
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
plain = torch.arange(6, dtype=torch.float16).reshape(3, 2) * 100
parts = DTensor.from_local(plain, mesh, (Replicate(), Shard(0)))
try:
    tree.global_norm([DTensor.from_local(plain, mesh, (Replicate(), Partial()))])
except ValueError as error:
    told = str(error)
found = {
    "sharded": [sharded.is_sharded(one) for one in (parts, plain, 1.0)],
    "whole": type(sharded.whole(parts)).__name__,
    "shares": sharded.local(parts).data_ptr() == plain.data_ptr(),
    "norm": [float(tree.global_norm([one, torch.ones(2).half()])) for one in (parts, plain)],
    "digest": ts.digest({"a": parts}) == ts.digest({"a": plain}),
    "diff": [len(ts.diff({"a": parts}, {"a": other})) for other in (plain, plain + 1)],
    "told": told,
}
print(json.dumps(found))
dist.destroy_process_group()
"""


def test_parts_are_measured_digested_and_compared_as_the_whole() -> None:
    found = json.loads(python(CODE).splitlines()[-1])
    assert found["sharded"] == [True, False, False]
    assert found["whole"] == "Tensor"
    assert found["shares"]
    # The squares of these numbers are too large for float16; the norm is not.
    assert found["norm"][0] == pytest.approx(found["norm"][1], rel=1e-3)
    assert found["digest"]
    assert found["diff"] == [0, 1]
    assert "holds sums that are still to be added up over processes" in found["told"]


def test_other_leaves_are_left_alone() -> None:
    for leaf in (torch.ones(2), nn.Parameter(torch.ones(2)), 1.0, None):
        assert sharded.whole(leaf) is leaf
        assert sharded.local(leaf) is leaf
        assert not sharded.is_sharded(leaf)
    assert float(tree.global_norm([torch.tensor([3.0, 4.0])])) == 5.0
