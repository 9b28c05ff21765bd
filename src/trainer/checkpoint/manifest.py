"""``manifest.json``: what a checkpoint consists of, with a checksum of its own. Written last."""

import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Any

import torch
from attrs import asdict, field, frozen

import trainstep
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.layout import MANIFEST

FORMAT = 1
"""Version of the folder's layout."""


@frozen
class File:
    """One file of a checkpoint.

    Attributes:
        size: in bytes.
        sha256: in hexadecimal.
        of: what was hashed: ``"bytes"``, the file as it is, or ``"tensors"``, the header of a safetensors
            file and then the digests of its tensors, see ``trainer.checkpoint.trees``.
    """

    size: int
    sha256: str
    of: str = "bytes"


@frozen
class Manifest:
    """The contents of ``manifest.json``.

    Attributes:
        step: the step of the checkpoint.
        world_size: how many processes wrote it.
        files: every file of the checkpoint but the manifest, by its path in the folder.
        leaves: the digest (``trainstep.compare.leaf_digest``) of every tensor of the state by path.
        versions: of trainstep, torch and Python.
        format: version of the layout.
    """

    step: int
    world_size: int
    files: dict[str, File]
    leaves: dict[str, str]
    versions: dict[str, str] = field(factory=lambda: current_versions())
    format: int = FORMAT

    def render(self) -> bytes:
        """Return the file's bytes; equal manifests give equal bytes."""
        fields = asdict(self)
        fields["files"] = dict(sorted(fields["files"].items()))
        fields["leaves"] = dict(sorted(fields["leaves"].items()))
        return to_json({**fields, "sha256": hashlib.sha256(to_json(fields)).hexdigest()})


def parse_manifest(data: bytes) -> Manifest:
    """Read a manifest and check it against its checksum; the inverse of ``render``.

    Raises:
        CheckpointError: if it is damaged, or of a format that this version does not know.
    """
    try:
        fields = json.loads(data)
        claimed = fields.pop("sha256")
        if fields["format"] != FORMAT:
            raise CheckpointError(
                f"{MANIFEST}: it has format {fields['format']!r}, this version reads {FORMAT}; "
                "use the version of trainstep that it names, or a newer one"
            )
        actual = hashlib.sha256(to_json(fields)).hexdigest()
        # Comparing the bytes as well catches what parsing forgives, such as a duplicate key.
        if claimed != actual or to_json({**fields, "sha256": claimed}) != data:
            raise CheckpointError(f"{MANIFEST}: it is damaged, its checksum does not fit its text")
        files = {name: File(**entry) for name, entry in fields.pop("files").items()}
        return Manifest(files=files, **fields)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST}: it is damaged: {error!r}") from None


def to_json(value: Any) -> bytes:
    """Return the JSON text of ``value``, the same for equal values.

    Raises:
        TypeError: for what JSON cannot hold, mapping keys that are not strings among it, as those
            would come back as strings.
    """
    _check_keys(value)
    return (json.dumps(value, indent=1) + "\n").encode()


def current_versions() -> dict[str, str]:
    """Return the versions of what wrote a checkpoint."""
    return {
        "trainstep": trainstep.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _check_keys(value: Any) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise TypeError(f"key {key!r} is not a string")
            _check_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_keys(inner)
