"""One pass over a checkpoint's files that checks all of them and, if asked, keeps what they hold."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from trainer.checkpoint import hf_reader
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.hashing import Hashing, hash_file, new_sha
from trainer.checkpoint.layout import (
    ARGUMENTS,
    MANIFEST,
    OPTIMIZER,
    TRAIN_STATE,
    TRAINER_STATE,
    host_rng_rank,
    only_describes,
)
from trainer.checkpoint.manifest import File, Manifest, parse_manifest
from trainer.checkpoint.trees import TensorFile, node_path
from trainstep.compare import leaf_digest

_TEXTS = (TRAIN_STATE, TRAINER_STATE, ARGUMENTS)


@define
class _Leaf:
    """A leaf of the state in a file; ``dtype`` and ``shape`` are set if only its bytes are there."""

    path: str
    dtype: str | None
    shape: list[int] | None

    def restore(self, tensor: Tensor) -> Tensor:
        """Return the leaf from the tensor in the file."""
        if self.dtype is None or self.shape is None:
            return tensor
        return tensor.view(getattr(torch, self.dtype.removeprefix("torch."))).reshape(self.shape)


_Places = dict[str, list[_Leaf]]
"""The leaves of one file by the name of their tensor there."""


@define
class Scan:
    """A pass over the checkpoint in ``path``; ``run`` does it, the other fields are its results.

    Attributes:
        path: the folder.
        keep: whether to keep the tensors.
        digests: whether to digest also those leaves whose file's digest does not need it: leaves in a
            file that is no safetensors file.
        manifest: what should be there; None if it cannot be read.
        texts: the JSON files of the checkpoint itself (not the model's), as bytes.
        tensors: the leaves of the state by path, on the host, each with memory of its own.
        problems: what was found wrong, in words.
        changes: the same of files that only describe the model, with which training can go on.
    """

    path: Path
    keep: bool
    digests: bool
    manifest: Manifest | None = None
    texts: dict[str, bytes] = field(factory=dict)
    tensors: dict[str, Tensor] = field(factory=dict)
    problems: list[str] = field(factory=list)
    changes: list[str] = field(factory=list)
    _damaged: set[str] = field(factory=set, init=False)
    _found: set[str] = field(factory=set, init=False)  # leaves that are in their file
    _digests: dict[str, str] = field(factory=dict, init=False)  # of leaves as read, by path

    def run(self) -> list[str]:
        """Read everything and return the problems."""
        if self.read_texts() and self.manifest is None:
            return self.problems
        assert self.manifest is not None
        places = self._places()
        files = self.manifest.files
        large = [name for name in files if not _is_text(name) and self._fits(name)]
        with Hashing() as hashing:
            pending = [self._start(name, places.get(name, {}), hashing) for name in large]
            hashing.join()
        for finish in pending:
            finish()
        self._check_leaves(places)
        return self.problems

    def read_texts(self) -> list[str]:
        """Read the manifest and the JSON files only, and return the problems."""
        try:
            self.manifest = parse_manifest((self.path / MANIFEST).read_bytes())
        except FileNotFoundError:
            what = "missing; the save was cut off, or another program wrote this folder"
            there = self.path.is_dir()
            self.problems = [f"{MANIFEST}: {what}" if there else f"{self.path}: no such folder"]
            return self.problems
        except (CheckpointError, OSError) as error:
            self.problems = [str(error)]
            return self.problems
        for name in _TEXTS:
            if name not in self.manifest.files:
                self._note(name, f"not in {MANIFEST}")
        for name in self.manifest.files:
            if _is_text(name) and self._fits(name):
                self._text(name)
        return self.problems

    def _start(self, name: str, places: _Places, hashing: Hashing) -> Callable[[], None]:
        """Start to read a file; return what is to be called when it has been read."""
        if self._expected(name).of == "tensors":
            return self._start_tree(name, places, hashing)
        sha = new_sha()
        hashing.tasks.put(self._try, name, hash_file, self.path / name, sha)
        return lambda: self._finish_file(name, places, sha)

    def _finish_file(self, name: str, places: _Places, sha: Any) -> None:
        if name in self._damaged or not self._compare(name, sha.hexdigest()) or not places:
            return
        if self.keep or self.digests:
            for entry, tensor in hf_reader.optimizer_tensors(self.path / name).items():
                self._take(places.get(entry, []), tensor)
        else:  # it is, to the bit, what was saved with all these leaves
            self._found |= {leaf.path for leaves in places.values() for leaf in leaves}

    def _start_tree(self, name: str, places: _Places, hashing: Hashing) -> Callable[[], None]:
        """Start to read a safetensors file; its tensors are kept if they are needed."""
        assert self.manifest is not None
        known = self.manifest.leaves
        try:
            tree = TensorFile.open(self.path / name)
        except (ValueError, OSError) as error:
            self._note(name, f"it cannot be read: {error}")
            return lambda: None
        tensors = {
            entry.name: torch.empty(entry.shape, dtype=entry.dtype)
            for entry in tree.entries
            if entry.dtype is not None
            and any(
                self.keep or leaf.dtype or leaf.path != node_path(entry.name, known)
                for leaf in places.get(entry.name, [])
            )
        }
        for run in tree.runs():
            paths = {entry.name: node_path(entry.name, known) for entry in run}
            hashing.tasks.put(self._try, name, tree.read, run, paths, tensors)
        return lambda: self._finish_tree(name, places, tree, tensors)

    def _finish_tree(
        self, name: str, places: _Places, tree: TensorFile, tensors: dict[str, Tensor]
    ) -> None:
        assert self.manifest is not None
        if name in self._damaged:
            return
        self._compare(name, tree.digest())
        for entry in tree.entries:
            for leaf in places.get(entry.name, []):
                if leaf.path == node_path(entry.name, self.manifest.leaves) and leaf.dtype is None:
                    self._digests[leaf.path] = tree.nodes[entry.name]
                    self._found.add(leaf.path)
            if entry.name in tensors:
                self._take(places[entry.name], tensors[entry.name])

    def _take(self, leaves: list[_Leaf], tensor: Tensor) -> None:
        """Digest and keep the leaves that one stored tensor is."""
        for number, leaf in enumerate(leaves):
            own = leaf.restore(tensor.clone() if number and self.keep else tensor)
            self._found.add(leaf.path)
            if leaf.path not in self._digests:
                self._digests[leaf.path] = leaf_digest(leaf.path, own).hex()
            if self.keep:
                self.tensors[leaf.path] = own

    def _try(self, name: str, call: Callable[..., Any], *arguments: Any) -> None:
        """Read a part of a file, in a thread; note if that fails."""
        try:
            call(*arguments)
        except (ValueError, OSError) as error:
            if name not in self._damaged:
                self._note(name, f"it cannot be read: {error}")

    def _text(self, name: str) -> None:
        """Read one of the checkpoint's own JSON files."""
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            self._note(name, f"it cannot be read: {error}")
            return
        if self._compare(name, new_sha(data).hexdigest()):
            self.texts[name] = data

    def _places(self) -> dict[str, _Places]:
        """Return file -> tensor's name there -> leaves; empty if ``train_state.json`` is damaged."""
        if TRAIN_STATE not in self.texts or self.manifest is None:
            return {}
        train_state = json.loads(self.texts[TRAIN_STATE])
        places: dict[str, _Places] = {}
        for path in self.manifest.leaves:
            file, name = train_state["where"].get(path, (OPTIMIZER, path))
            leaf = _Leaf(path, *train_state["raw"].get(path, (None, None)))
            places.setdefault(file, {}).setdefault(name, []).append(leaf)
        return places

    def _fits(self, name: str) -> bool:
        """Check presence and size."""
        try:
            size = (self.path / name).stat().st_size
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            self._note(name, "missing" if missing else f"it cannot be read: {error}")
            return False
        expected = self._expected(name).size
        if size != expected:
            self._differs(name, f"it has {size} bytes, expected {expected}")
        return size == expected

    def _compare(self, name: str, actual: str) -> bool:
        """Compare a file's digest with the manifest's."""
        expected = self._expected(name).sha256
        if actual != expected:
            self._differs(name, f"its SHA-256 is {actual}, expected {expected}")
        return actual == expected

    def _check_leaves(self, places: dict[str, _Places]) -> None:
        assert self.manifest is not None
        for file, names in places.items():
            whole = file not in self._damaged
            for leaf in (leaf for leaves in names.values() for leaf in leaves):
                expected = self.manifest.leaves[leaf.path]
                if self._digests.get(leaf.path, expected) != expected:
                    self._note(file, f"the values of {leaf.path} are not those saved")
                elif whole and leaf.path not in self._found:
                    self._note(file, f"{leaf.path} is not in it")

    def _note(self, name: str, what: str) -> None:
        self._damaged.add(name)
        self.problems.append(f"{name}: {what}")

    def _differs(self, name: str, what: str) -> None:
        """Note that a file is another than the one that was saved."""
        if only_describes(name):
            self.changes.append(
                f"{name}: {what}; it only describes the model, so training can go on"
            )
        else:
            self._note(name, what)

    def _expected(self, name: str) -> File:
        assert self.manifest is not None
        return self.manifest.files[name]


def _is_text(name: str) -> bool:
    return name in _TEXTS or host_rng_rank(name) is not None
