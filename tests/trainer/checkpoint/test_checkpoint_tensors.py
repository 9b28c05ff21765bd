"""The tensor files are those of the safetensors package, and damage is no crash."""

import hashlib
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.checkpoint.hashing import CHUNK, Workers, bytes_of, same_bytes
from trainer.checkpoint.tensors import holds, read_index, write_tensors
from trainer.checkpoint.trees import TensorFile, leaf_sha, node_path
from trainstep.compare import leaf_digest


def tensors() -> dict[str, torch.Tensor]:
    """Return tensors that the package can store too."""
    return {
        "a": torch.randn(3, 4),
        "b": torch.arange(5, dtype=torch.int64),
        "c": torch.tensor(True),
        "d": torch.zeros(0, 2, dtype=torch.bfloat16),
        "ü/slash": torch.randn(7).to(torch.float16),
        "e": torch.randn(2, dtype=torch.complex64),
    }


def write(path, given) -> None:
    write_tensors(path, given, lambda name, host: None, lambda: None)


def read(path) -> dict[str, torch.Tensor]:
    """Read all tensors of a file, one run after the other."""
    tree = TensorFile.open(path)
    found = {e.name: torch.empty(e.shape, dtype=e.dtype) for e in tree.entries if e.dtype}
    for run in tree.runs():
        tree.read(run, {entry.name: entry.name for entry in run}, found)
    return found


def digest(path) -> str:
    tree = TensorFile.open(path)
    for run in tree.runs():
        tree.read(run, {entry.name: entry.name for entry in run}, {})
    return tree.digest()


def test_the_package_reads_what_is_written(tmp_path):
    given = tensors()
    write(tmp_path / "x.safetensors", given)
    back = load_file(tmp_path / "x.safetensors")
    assert set(back) == set(given)
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in given.items())


def test_what_the_package_writes_is_read(tmp_path):
    given = tensors()
    save_file(given, tmp_path / "x.safetensors", metadata={"format": "pt"})
    back = read(tmp_path / "x.safetensors")
    assert set(back) == set(given)
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in given.items())


def test_the_package_writes_the_same_bytes(tmp_path):
    given = {"w": torch.randn(3, 4), "a": torch.zeros(2, dtype=torch.int64), "b": torch.ones(3)}
    write(tmp_path / "ours", given)
    save_file(given, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_larger_than_a_piece(tmp_path):
    given = {"big": torch.randint(0, 256, (2 * CHUNK + 13,), dtype=torch.uint8)}
    write(tmp_path / "x", given)
    assert torch.equal(read(tmp_path / "x")["big"], given["big"])


def test_what_is_called_for_each_tensor_and_when(tmp_path):
    given = {"whole": torch.randn(3, 4), "turned": torch.randn(3, 4).T}
    events: list[Any] = []
    write_tensors(
        tmp_path / "x",
        given,
        lambda name, host: events.append((name, torch.equal(host, given[name]))),
        lambda: events.append((tmp_path / "x").stat().st_size > 96),
    )
    # Copies are handed over at once, the others once the file is written.
    assert events == [("turned", True), True, ("whole", True)]


# ---- digests of files


def test_the_digest_of_a_file_is_that_of_its_header_and_its_tensors(tmp_path):
    given = tensors()
    write(tmp_path / "x", given)
    data = (tmp_path / "x").read_bytes()
    header = data[: 8 + int.from_bytes(data[:8], "little")]
    entries, _ = read_index(tmp_path / "x")
    nodes = b"".join(leaf_digest(entry.name, given[entry.name]) for entry in entries)
    assert digest(tmp_path / "x") == hashlib.sha256(header + nodes).hexdigest()


def test_every_byte_of_a_file_counts(tmp_path):
    write(tmp_path / "x", tensors())
    good, data = digest(tmp_path / "x"), (tmp_path / "x").read_bytes()
    for place in range(len(data)):
        (tmp_path / "x").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            assert digest(tmp_path / "x") != good, place
        except ValueError:  # the header makes no sense any more
            assert place < len(data) - 100


def test_digests_of_leaves_are_those_of_the_core(make):
    for name, tensor in make.state().opt_state["dtypes"].items():
        sha = leaf_sha(name, tensor.dtype, tensor.shape)
        sha.update(bytes_of(tensor))
        assert sha.digest() == leaf_digest(name, tensor)


@pytest.mark.parametrize(
    ("name", "path"),
    [("w", "params/w"), ("count", "buffers/count"), ("params/w", "params/w"), ("x", "x")],
)
def test_a_tensor_is_digested_as_the_leaf_that_it_is(name, path):
    assert node_path(name, {"params/w", "buffers/w", "buffers/count"}) == path


def test_neighbours_are_read_together(tmp_path):
    given = {f"s{i}": torch.zeros(10) for i in range(5)}
    given["large"] = torch.zeros(3 << 20)
    write(tmp_path / "x", given)
    runs = TensorFile.open(tmp_path / "x").runs()
    assert [[entry.name for entry in run] for run in runs] == [
        ["large"],
        ["s0", "s1", "s2", "s3", "s4"],
    ]


# ---- damage


def test_a_dtype_of_the_future_is_only_hashed(tmp_path):
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    assert read(tmp_path / "x") == {}
    assert (
        digest(tmp_path / "x")
        == hashlib.sha256(
            (tmp_path / "x").read_bytes()[:-2] + hashlib.sha256(b"x:F4:(4,)ab").digest()
        ).hexdigest()
    )


def entry(**changes) -> dict:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize(
    ("header", "text"),
    [
        (b"\xff", "its header is damaged"),
        ([], "its header is damaged"),
        ({"x": entry(shape=[3])}, "tensor x does not fit its place"),
        ({"x": entry(data_offsets=[4, 12])}, "tensor x does not fit its place"),
        ({"x": entry(shape=[-2])}, r"tensor x has the shape \(-2,\)"),
        ({"x": entry(shape=["2"])}, "tensor x has the shape"),
        ({"x": entry(data_offsets=[0])}, "its header is damaged"),
        ({"x": {"dtype": "F32"}}, "its header is damaged"),
        (
            {"x": entry(), "y": entry(data_offsets=[8, 16])},
            "8 bytes of tensors, its header says 16",
        ),
        ({"x": entry(shape=[2**60], data_offsets=[0, 2**62])}, "8 bytes of tensors"),
    ],
)
def test_a_damaged_header_is_an_error(tmp_path, header, text):
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(data).to_bytes(8, "little") + data + b"12345678")
    with pytest.raises(ValueError, match=text):
        read(tmp_path / "x")


@pytest.mark.parametrize("data", [b"", b"1234", b"\xff" * 20])
def test_a_file_without_header_is_an_error(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(ValueError, match="its header is longer than the file"):
        read(tmp_path / "x")


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64])
def test_same_bytes_looks_at_every_byte(count):
    a = bytearray(range(count))
    assert same_bytes(a, bytearray(a))
    assert not same_bytes(a, a + b"x")
    for place in range(count):
        b = bytearray(a)
        b[place] += 1
        assert not same_bytes(a, memoryview(b))


def test_bytes_are_compared_anywhere(tmp_path):
    (tmp_path / "x").write_bytes(b"0123456789")
    assert holds(tmp_path / "x", 3, memoryview(b"3456"))
    assert not holds(tmp_path / "x", 3, memoryview(b"3457"))
    assert not holds(tmp_path / "x", 8, memoryview(b"89+"))  # it ends before
    large = bytearray(2 * CHUNK + 5)
    (tmp_path / "x").write_bytes(large)
    assert holds(tmp_path / "x", 0, memoryview(large))
    for place in (0, CHUNK, 2 * CHUNK + 4):
        other = bytearray(large)
        other[place] = 1
        assert not holds(tmp_path / "x", 0, memoryview(other))


def test_the_index_says_where_each_tensor_lies(tmp_path):
    given = tensors()
    write(tmp_path / "x", given)
    entries, base = read_index(tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    for entry in entries:
        start = base + entry.start
        assert data[start : start + entry.size] == bytes(bytes_of(given[entry.name]))


def test_workers_raise_what_failed_and_go_on():
    workers = Workers(2)

    def fail() -> None:
        raise ValueError("first")

    workers.put(fail)
    with pytest.raises(ValueError, match="first"):
        workers.join()
    done: list[int] = []
    for number in range(50):
        workers.put(done.append, number)
    workers.join()
    workers.close()
    assert sorted(done) == list(range(50))
