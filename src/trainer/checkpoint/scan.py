"""One pass over a checkpoint's files that checks all of them and, if asked, keeps what they hold."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from attrs import define, field
from torch import Tensor

from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.hashing import Hashing, new_sha
from trainer.checkpoint.layout import (
    ARGUMENTS,
    MANIFEST,
    OPTIMIZER,
    TRAIN_STATE,
    TRAINER_STATE,
    host_rng_rank,
)
from trainer.checkpoint.manifest import File, Manifest, parse_manifest
from trainer.checkpoint.tensors import read_tensors, skim

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
        digests: whether to digest every leaf. If not, only those in files whose SHA-256 does not fit, to
            name the damaged ones: the others' bytes are those that were digested when they were saved.
        manifest: what should be there; None if it cannot be read.
        texts: the JSON files of the checkpoint itself (not the model's), as bytes.
        tensors: the leaves of the state by path, on the host, each with memory of its own.
        problems: what was found wrong, in words.
    """

    path: Path
    keep: bool
    digests: bool
    manifest: Manifest | None = None
    texts: dict[str, bytes] = field(factory=dict)
    tensors: dict[str, Tensor] = field(factory=dict)
    problems: list[str] = field(factory=list)
    _damaged: set[str] = field(factory=set, init=False)

    def run(self) -> list[str]:
        """Read everything and return the problems."""
        try:
            self.manifest = parse_manifest((self.path / MANIFEST).read_bytes())
        except FileNotFoundError:
            what = "missing; the save was cut off, or another program wrote this folder"
            return [f"{MANIFEST}: {what}" if self.path.is_dir() else f"{self.path}: no such folder"]
        except (CheckpointError, OSError) as error:
            return [str(error)]
        files = self.manifest.files
        for name in _TEXTS:
            if name not in files:
                self._note(name, f"not in {MANIFEST}")
        with Hashing() as hashing:
            shas = {name: self._text(name, hashing) for name in files if _is_text(name)}
            hashing.join()
            self._compare(shas)
            places = self._places()
            found: set[str] = set()
            large = [name for name in files if name not in shas]
            shas = {name: self._file(name, places.get(name), hashing, found) for name in large}
            hashing.join()
            for name in self._compare(shas):
                if name in places and not self.digests:
                    self._digest(name, places[name], hashing)
            hashing.join()
            self._check_leaves(places, found, hashing.leaves)
        return self.problems

    def _text(self, name: str, hashing: Hashing) -> Any:
        """Read one of the checkpoint's own JSON files; return as ``_file`` does."""
        sha = new_sha()
        if not self._fits(name):
            return None
        try:
            self.texts[name] = (self.path / name).read_bytes()
        except OSError as error:
            self._note(name, f"it cannot be read: {error}")
            return None
        hashing.update(sha, self.texts[name])
        return sha

    def _file(self, name: str, places: _Places | None, hashing: Hashing, found: set[str]) -> Any:
        """Read one file; return its SHA-256 object, or None if a problem was noted already."""
        sha = new_sha()
        if not self._fits(name):
            return None
        try:
            if places is None:
                with open(self.path / name, "rb", buffering=0) as file:
                    skim(file, self._expected(name).size, sha, hashing)
            else:
                self._leaves(name, places, hashing, sha, found)
        except (ValueError, OSError) as error:
            self._note(name, f"it cannot be read: {error}")
            return None
        return sha

    def _leaves(
        self, name: str, places: _Places, hashing: Hashing, sha: Any, found: set[str]
    ) -> None:
        """Read a file that holds leaves, keeping and digesting them as the fields say."""
        needed = self.keep or self.digests
        reading = read_tensors(
            self.path / name, hashing, sha, lambda entry: needed and entry.name in places
        )
        for entry, tensor in reading:
            for number, leaf in enumerate(places.get(entry.name, ())):
                found.add(leaf.path)
                if tensor is None:
                    continue
                own = leaf.restore(tensor.clone() if number else tensor)
                if self.digests:
                    hashing.leaf(leaf.path, own)
                if self.keep:
                    self.tensors[leaf.path] = own

    def _digest(self, name: str, places: _Places, hashing: Hashing) -> None:
        """Digest the leaves in a damaged file, as far as it can be read."""
        reading = read_tensors(
            self.path / name, hashing, new_sha(), lambda entry: entry.name in places
        )
        with suppress(ValueError, OSError):
            for entry, tensor in reading:
                for leaf in places.get(entry.name, ()):
                    if tensor is not None:
                        hashing.leaf(leaf.path, leaf.restore(tensor))

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
            self._note(name, f"it has {size} bytes, expected {expected}")
        return size == expected

    def _compare(self, shas: dict[str, Any]) -> list[str]:
        """Compare the files' digests with the manifest's; return, and forget, those that differ."""
        differing = []
        for name, sha in shas.items():
            expected = self._expected(name).sha256
            if sha is not None and sha.hexdigest() != expected:
                self._note(name, f"its SHA-256 is {sha.hexdigest()}, expected {expected}")
                self.texts.pop(name, None)
                differing.append(name)
        return differing

    def _check_leaves(
        self, places: dict[str, _Places], found: set[str], digests: dict[str, str]
    ) -> None:
        assert self.manifest is not None
        for file, names in places.items():
            whole = file not in self._damaged
            for leaf in (leaf for leaves in names.values() for leaf in leaves):
                if (
                    digests.get(leaf.path, self.manifest.leaves[leaf.path])
                    != (self.manifest.leaves[leaf.path])
                ):
                    self._note(file, f"the values of {leaf.path} are not those saved")
                elif whole and leaf.path not in found:
                    self._note(file, f"{leaf.path} is not in it")

    def _note(self, name: str, what: str) -> None:
        self._damaged.add(name)
        self.problems.append(f"{name}: {what}")

    def _expected(self, name: str) -> File:
        assert self.manifest is not None
        return self.manifest.files[name]


def _is_text(name: str) -> bool:
    return name in _TEXTS or host_rng_rank(name) is not None
