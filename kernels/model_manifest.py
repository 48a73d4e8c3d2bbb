"""What is remembered about a model's folder: its origin, and the hash of each weight file.

Hashing gigabytes takes minutes, so it is done once: a hash counts for as long as the file's size
and modification time stay the same. A manifest is a memory and never an authority: one that cannot
be read is as good as none. Files are replaced whole, so that daemons writing the same manifest at
the same time leave one good copy.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MANIFEST_NAME = "petald-model.json"
_FORMAT = 1
_MAX_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """One weight file's hash, and the state of the file that it was worked out from."""

    sha256: str
    size_bytes: int
    mtime_ns: int | None
    """None for a file that was never fetched, whose hash the hub told."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A model's origin, and its weight files by name."""

    name: str
    source: str
    revision: str | None = None
    note: str = ""
    weights: Mapping[str, WeightFile] = field(default_factory=dict)


def load_manifest(path: Path) -> Manifest | None:
    """The manifest at `path`; None if there is none that can be read."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            return None
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def save_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest at `path` in one step.

    Raises:
        OSError: It could not be written; the old one, if any, is still there.
    """
    value = {"format": _FORMAT, **asdict(manifest)}
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: a reader sees the old text or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    written = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        written.chmod(0o644)
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def _parse(value: Any) -> Manifest | None:
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        return None
    weights = value.get("weights")
    texts = [value.get("name"), value.get("source"), value.get("note", "")]
    revision = value.get("revision")
    if not isinstance(weights, dict) or not all(isinstance(text, str) for text in texts):
        return None
    if revision is not None and not isinstance(revision, str):
        return None
    known = {name: _parse_weight_file(one) for name, one in weights.items()}
    return Manifest(
        name=texts[0],
        source=texts[1],
        revision=revision,
        note=texts[2],
        weights={name: one for name, one in known.items() if one is not None},
    )


def _parse_weight_file(value: Any) -> WeightFile | None:
    if not isinstance(value, dict):
        return None
    sha256, size_bytes, mtime_ns = (value.get(key) for key in ("sha256", "size_bytes", "mtime_ns"))
    if not isinstance(sha256, str) or not is_sha256(sha256) or type(size_bytes) is not int:
        return None
    if mtime_ns is not None and type(mtime_ns) is not int:
        return None
    return WeightFile(sha256=sha256, size_bytes=size_bytes, mtime_ns=mtime_ns)


def is_sha256(text: str) -> bool:
    """Whether `text` is a SHA-256 in lower-case hexadecimal."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
