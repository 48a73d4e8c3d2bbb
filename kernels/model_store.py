"""The models on this machine: folders in one store, or anywhere else, found by name or by path.

Standard library only, so that `petalctl` can look without loading torch. The store is a folder of
model folders. Names that begin with a dot are the store's own business: downloads in progress,
locks, and what is remembered about folders that petald may not or should not write to.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from kernels.errors import CorruptCheckpoint, KernelError
from kernels.model_fingerprint import fingerprint_of, read_json_object, weight_file_names
from kernels.model_manifest import (
    MANIFEST_NAME,
    Manifest,
    WeightFile,
    load_manifest,
    save_manifest,
)

HashProgress = Callable[[str, int, int], None]
"""Called with (file name, bytes hashed, bytes in all)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_CHUNK_BYTES = 2**20
_HASH_TRIES = 3


class UnknownModel(KernelError):
    """No model of this name or at this path: name another one, or pull it."""

    code: ClassVar[str] = "unknown_model"


class BadModelName(KernelError):
    """This text cannot name a model in the store."""

    code: ClassVar[str] = "bad_model_name"


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A model on this machine."""

    name: str
    path: Path
    source: str
    """Where it came from: ``hub:…``, ``wheel:…``, ``gguf:…`` or ``folder:…``."""
    revision: str | None = None
    note: str = ""


def store_root(environ: Mapping[str, str] = os.environ) -> Path:
    """Where models are kept: ``$PETALD_HOME/models``, or else in the user's data folder."""
    if home := environ.get("PETALD_HOME"):
        return Path(home).expanduser().absolute() / "models"
    data_home = environ.get("XDG_DATA_HOME")
    if data_home and Path(data_home).is_absolute():
        return Path(data_home) / "petald" / "models"
    return Path.home() / ".local" / "share" / "petald" / "models"


def check_name(name: str) -> str:
    """The name itself, if it can name a model in the store.

    Raises:
        BadModelName: It cannot; the text says what can.
    """
    if _NAME.fullmatch(name) is None or ".." in name:
        raise BadModelName(
            f"{name[:100]!r} cannot name a model: use letters, digits, '.', '-' and '_', at most "
            "96 of them, beginning with a letter or digit"
        )
    return name


def find_model(name_or_path: str, *, root: Path | None = None) -> ModelFolder:
    """The model of this name in the store, or in the folder at this path.

    A hub repository's name (``owner/name``) finds the model that was pulled from it.

    Raises:
        UnknownModel: There is none; the text lists the known names.
    """
    root = root or store_root()
    if _NAME.fullmatch(name_or_path) and _is_model(root / name_or_path):
        return _describe(root / name_or_path, name_or_path, root)
    if name_or_path:
        path = Path(name_or_path).expanduser().absolute()
        if _is_model(path):
            return _describe(path, path.name, root)
    models = list_models(root=root)
    for model in models:
        if model.source == f"hub:{name_or_path}":
            return model
    known = ", ".join(model.name for model in models) or "none yet"
    what = f"there is no model {name_or_path[:200]!r} on this machine"
    if name_or_path and Path(name_or_path).expanduser().is_dir():
        what = f"the folder {name_or_path[:200]!r} has no config.json, so it is not a model"
    raise UnknownModel(
        f"{what} (known: {known}). Fetch one with: petalctl model pull "
        f"{name_or_path[:200] or 'NAME'}"
    )


def list_models(*, root: Path | None = None) -> list[ModelFolder]:
    """The models in the store, by name."""
    root = root or store_root()
    try:
        names = sorted(entry.name for entry in root.iterdir())
    except OSError:
        return []
    return [
        _describe(root / name, name, root)
        for name in names
        if _NAME.fullmatch(name) and _is_model(root / name)
    ]


def fingerprint(
    folder: Path | ModelFolder, *, root: Path | None = None, on_progress: HashProgress | None = None
) -> str:
    """The model's fingerprint: 64 hexadecimal digits. Hashes what was not hashed before.

    Args:
        folder: The model; its weight files must be there, but for those that were never fetched.
        root: The store, where hashes of folders outside of it are remembered.
        on_progress: Told of the hashing, which takes a second or so for each gigabyte.

    Raises:
        CorruptCheckpoint: A file is missing or cannot be read.
    """
    path = folder.path if isinstance(folder, ModelFolder) else folder
    config = read_json_object(path / "config.json")
    weights = weight_files(path, root=root, on_progress=on_progress)
    return fingerprint_of(config, (weight.sha256 for weight in weights.values()))


def weight_files(
    path: Path, *, root: Path | None = None, on_progress: HashProgress | None = None
) -> dict[str, WeightFile]:
    """The model's weight files by name, hashed where that is not remembered (and then it is).

    Raises:
        CorruptCheckpoint: A file is missing or cannot be read.
    """
    root = root or store_root()
    manifest = load_folder_manifest(path, root=root)
    remembered = manifest.weights if manifest else {}
    weights = {
        name: _weight_file(path / name, remembered.get(name), on_progress)
        for name in weight_file_names(path)
    }
    if weights != remembered:
        base = manifest or Manifest(name=path.name, source=f"folder:{path}")
        save_folder_manifest(path, replace(base, weights=weights), root=root)
    return weights


def remembered_fingerprint(folder: ModelFolder, *, root: Path | None = None) -> str | None:
    """The fingerprint, if it can be told without hashing anything; for lists.

    Raises:
        CorruptCheckpoint: A configuration or index cannot be read.
    """
    manifest = load_folder_manifest(folder.path, root=root or store_root())
    hashes = []
    for name in weight_file_names(folder.path):
        weight = manifest.weights.get(name) if manifest else None
        if weight is None or _state(folder.path / name) not in (
            (weight.size_bytes, weight.mtime_ns),
            (None, weight.mtime_ns),
        ):
            return None
        hashes.append(weight.sha256)
    return fingerprint_of(read_json_object(folder.path / "config.json"), hashes)


def load_folder_manifest(path: Path, *, root: Path) -> Manifest | None:
    """What is remembered about a model's folder, in it or for it."""
    return load_manifest(_memory_path(path, root)) or load_manifest(path / MANIFEST_NAME)


def save_folder_manifest(path: Path, manifest: Manifest, *, root: Path) -> bool:
    """Remember `manifest`: in the folder if it is the store's own, or else beside it.

    Returns:
        Whether it could be written; if not, hashes are worked out again by each process.
    """
    places = [_memory_path(path, root)]
    if _is_own(path, root):
        places.insert(0, path / MANIFEST_NAME)
    for place in places:
        try:
            save_manifest(place, manifest)
            if place != places[-1]:
                places[-1].unlink(missing_ok=True)  # an older memory must not shadow the folder's
        except OSError:
            continue
        return True
    return False


def _is_model(path: Path) -> bool:
    try:
        return (path / "config.json").is_file()
    except OSError:
        return False


def _is_own(path: Path, root: Path) -> bool:
    return path.parent == root and not path.is_symlink()


def _memory_path(path: Path, root: Path) -> Path:
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    return root / ".remembered" / f"{key[:32]}.json"


def _describe(path: Path, name: str, root: Path) -> ModelFolder:
    manifest = load_folder_manifest(path, root=root)
    if manifest is None:
        return ModelFolder(name=name, path=path, source=f"folder:{path.resolve()}")
    return ModelFolder(
        name=name,
        path=path,
        source=manifest.source,
        revision=manifest.revision,
        note=manifest.note,
    )


def _state(path: Path) -> tuple[int | None, int | None]:
    """Size and modification time; (None, None) for a file that is not there."""
    try:
        found = path.stat()
    except OSError:
        return (None, None)
    return (found.st_size, found.st_mtime_ns)


def _weight_file(
    path: Path, remembered: WeightFile | None, on_progress: HashProgress | None
) -> WeightFile:
    for _ in range(_HASH_TRIES):
        try:
            before = path.stat()
            state = (before.st_size, before.st_mtime_ns)
            if remembered and (remembered.size_bytes, remembered.mtime_ns) == state:
                return remembered
            sha256 = _sha256(path, *state, on_progress)
            after = path.stat()
        except FileNotFoundError as error:
            if remembered and remembered.mtime_ns is None:
                return remembered
            raise CorruptCheckpoint(
                f"the weight file {path} is missing; pull the model again"
            ) from error
        except OSError as error:
            raise CorruptCheckpoint(f"the weight file {path} cannot be read: {error}") from error
        if (after.st_size, after.st_mtime_ns) == state:
            return WeightFile(sha256=sha256, size_bytes=state[0], mtime_ns=state[1])
    raise CorruptCheckpoint(f"the weight file {path} is being written to; wait until that is done")


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, size_bytes: int, mtime_ns: int, on_progress: HashProgress | None) -> str:
    """The file's hash; cached by its state, for folders whose manifest cannot be kept."""
    digest = hashlib.sha256()
    done_bytes = 0
    with path.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
            done_bytes += len(chunk)
            if on_progress:
                on_progress(path.name, done_bytes, size_bytes)
    return digest.hexdigest()
