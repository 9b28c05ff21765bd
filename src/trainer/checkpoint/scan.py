"""One pass over a checkpoint's files that checks all of them and, if asked, keeps what they hold."""

import json
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


@define
class Scan:
    """A pass over the checkpoint in ``path``; ``run`` does it, the other fields are its results.

    Attributes:
        path: the folder.
        keep: whether to keep the tensors.
        manifest: what should be there; None if it cannot be read.
        texts: the JSON files of the checkpoint itself (not the model's), as bytes.
        tensors: the leaves of the state by path, on the host, each with memory of its own.
        problems: what was found wrong, in words.
    """

    path: Path
    keep: bool
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
            for name in files:
                if name not in shas:
                    shas[name] = self._file(name, places.get(name), hashing)
            hashing.join()
            self._compare({name: sha for name, sha in shas.items() if not _is_text(name)})
            self._check_leaves(places, hashing.leaves)
        return self.problems

    def _text(self, name: str, hashing: Hashing) -> Any:
        sha = new_sha()
        if self._fits(name):
            self.texts[name] = (self.path / name).read_bytes()
            hashing.update(sha, self.texts[name])
            return sha
        return None

    def _file(self, name: str, places: dict[str, list[_Leaf]] | None, hashing: Hashing) -> Any:
        """Read one file; return its SHA-256 object, or None if a problem was noted already."""
        sha = new_sha()
        if not self._fits(name):
            return None
        try:
            if places is None:
                with open(self.path / name, "rb", buffering=0) as file:
                    skim(file, self._expected(name).size, sha, hashing)
            else:
                self._leaves(name, places, hashing, sha)
        except (ValueError, OSError) as error:
            self._note(name, f"it cannot be read: {error}")
            return None
        return sha

    def _leaves(
        self, name: str, places: dict[str, list[_Leaf]], hashing: Hashing, sha: Any
    ) -> None:
        reading = read_tensors(self.path / name, hashing, sha, lambda entry: entry.name in places)
        for entry, tensor in reading:
            if tensor is None:
                continue
            for number, leaf in enumerate(places[entry.name]):
                own = leaf.restore(tensor.clone() if number else tensor)
                hashing.leaf(leaf.path, own)
                if self.keep:
                    self.tensors[leaf.path] = own

    def _places(self) -> dict[str, dict[str, list[_Leaf]]]:
        """Return file -> tensor's name there -> leaves; empty if ``train_state.json`` is damaged."""
        if TRAIN_STATE not in self.texts or self.manifest is None:
            return {}
        train_state = json.loads(self.texts[TRAIN_STATE])
        places: dict[str, dict[str, list[_Leaf]]] = {}
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

    def _compare(self, shas: dict[str, Any]) -> None:
        """Compare the files' digests with the manifest's; forget texts that do not fit."""
        for name, sha in shas.items():
            expected = self._expected(name).sha256
            if sha is not None and sha.hexdigest() != expected:
                self._note(name, f"its SHA-256 is {sha.hexdigest()}, expected {expected}")
                self.texts.pop(name, None)

    def _check_leaves(
        self, places: dict[str, dict[str, list[_Leaf]]], digests: dict[str, str]
    ) -> None:
        assert self.manifest is not None
        for file, names in places.items():
            whole = file not in self._damaged
            for leaf in (leaf for leaves in names.values() for leaf in leaves):
                if leaf.path in digests:
                    if digests[leaf.path] != self.manifest.leaves[leaf.path]:
                        self._note(file, f"the values of {leaf.path} are not those saved")
                elif whole:  # of a file with another problem, nothing more need be said
                    self._note(file, f"{leaf.path} is not in it")

    def _note(self, name: str, what: str) -> None:
        self._damaged.add(name)
        self.problems.append(f"{name}: {what}")

    def _expected(self, name: str) -> File:
        assert self.manifest is not None
        return self.manifest.files[name]


def _is_text(name: str) -> bool:
    return name in _TEXTS or host_rng_rank(name) is not None
