"""The tensor files are those of the safetensors package, and damage is no crash."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.checkpoint.hashing import CHUNK, Hashing, Workers, bytes_of, new_sha, same_bytes
from trainer.checkpoint.tensors import read_bytes, read_index, read_tensors, write_tensors


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


def write(path, given) -> str:
    with Hashing() as hashing:
        sha = write_tensors(path, given, hashing, lambda name, host: None)
        hashing.join()
    return sha.hexdigest()


def read(path) -> dict[str, torch.Tensor]:
    with Hashing() as hashing:
        return {entry.name: tensor for entry, tensor in read_tensors(path, hashing, new_sha())}


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
    digest = write(tmp_path / "x", given)
    with Hashing() as hashing:
        sha = new_sha()
        back = [tensor for _, tensor in read_tensors(tmp_path / "x", hashing, sha)]
        hashing.join()
    assert torch.equal(back[0], given["big"])
    assert sha.hexdigest() == digest


def test_what_is_not_wanted_is_hashed_all_the_same(tmp_path):
    digest = write(tmp_path / "x", tensors())
    with Hashing() as hashing:
        sha = new_sha()
        pairs = list(read_tensors(tmp_path / "x", hashing, sha, lambda entry: entry.name == "a"))
        hashing.join()
    assert [entry.name for entry, tensor in pairs if tensor is not None] == ["a"]
    assert sha.hexdigest() == digest


def test_a_dtype_of_the_future_is_only_hashed(tmp_path):
    header = json.dumps({"x": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    assert read(tmp_path / "x") == {"x": None}


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


def test_bytes_can_be_read_anywhere(tmp_path):
    (tmp_path / "x").write_bytes(b"0123456789")
    assert read_bytes(tmp_path / "x", 3, 4) == b"3456"
    assert read_bytes(tmp_path / "x", 8, 4) == b"89"


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
