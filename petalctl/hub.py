"""Pull a model's repository from the Hugging Face hub.

This module decides which files to have, and registers them when all are there. Only configuration,
tokenizer and safetensors files are ever fetched: nothing that could be code.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from kernels.model_fingerprint import (
    INDEX_NAME,
    WHOLE_NAME,
    is_weight_name,
    read_json_object,
    weight_names_of_index,
)
from kernels.model_manifest import Manifest, WeightFile
from kernels.model_store import load_folder_manifest, save_folder_manifest, weight_files
from petalctl.errors import CommandError
from petalctl.hub_client import HubClient, RemoteFile, Snapshot
from petalctl.hub_shards import is_in_store, read_shard_map, wanted_names
from petalctl.models_place import check_room, format_bytes, partial_folder
from petalctl.models_progress import Progress, tell

_SMALL_NAMES = frozenset(
    {
        "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json",
        "generation_config.json", "merges.txt", "special_tokens_map.json", "tokenizer.json",
        "tokenizer.model", "tokenizer_config.json", "vocab.json", INDEX_NAME,
    }
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HubPull:
    """What to pull, and where to."""

    repository: str
    revision: str | None
    name: str
    root: Path
    blocks: tuple[int, int] | None = None
    is_blocks_only: bool = False
    client: HubClient = field(default_factory=HubClient)

    @property
    def source(self) -> str:
        """How the manifest names this origin."""
        return f"hub:{self.repository}"


def pull_repository(pull: HubPull) -> None:
    """Have the repository's model, or the shards of some blocks of it, in the store.

    What is in the store already stays at its revision, and gains the shards that it lacks.

    Raises:
        CommandError: It cannot be had. What was fetched is kept for the next try.
    """
    with partial_folder(pull.root, pull.name) as partial:
        target = pull.root / pull.name
        have = load_folder_manifest(target, root=pull.root) if target.exists() else None
        if target.exists():
            _check_same(pull, target, have)
        if have and is_in_store(target, pull.blocks, pull.is_blocks_only):
            weight_files(target, root=pull.root)
            tell(f"{pull.name} is here already")
            return
        revision = have.revision if have else pull.revision
        snapshot = pull.client.snapshot(pull.repository, revision)
        _check_usable(pull, snapshot)
        making = partial / snapshot.commit
        _drop_others(partial, making)
        making.mkdir(exist_ok=True)
        with Progress() as progress:
            small = [file for file in snapshot.files.values() if file.name in _SMALL_NAMES]
            pull.client.fetch(pull.repository, snapshot.commit, small, making, progress)
            weights = _weights(snapshot, making)
            shard_map = read_shard_map(making, [file.name for file in weights])
            wanted = wanted_names(shard_map, pull.blocks, pull.is_blocks_only)
            missing = [f for f in weights if f.name in wanted and not (target / f.name).exists()]
            _announce(pull, snapshot, weights, missing, making)
            pull.client.fetch(pull.repository, snapshot.commit, missing, making, progress)
        _register(pull, snapshot, weights, making, target)
        shutil.rmtree(partial)


def _check_same(pull: HubPull, target: Path, have: Manifest | None) -> None:
    other = have is None or have.source != pull.source
    revision = have.revision if have else None
    if other or (pull.revision and not (revision or "").startswith(pull.revision)):
        origin = f"{have.source} at revision {revision}" if have else str(target.resolve())
        raise CommandError(
            f"{pull.name} is here already, from {origin}; pull under another --name, or remove "
            f"{target} first",
            code="name_taken",
        )


def _check_usable(pull: HubPull, snapshot: Snapshot) -> None:
    if "config.json" not in snapshot.files:
        raise CommandError(
            f"{pull.repository} has no config.json, so it is not a transformers model; if it holds "
            "a GGUF file, fetch that and use: petalctl model import FILE.gguf",
            code="not_a_model",
        )
    if not any(name.endswith(".safetensors") for name in snapshot.files):
        raise CommandError(
            f"{pull.repository} holds no safetensors files; petald reads nothing that must be "
            "unpickled. Look for a converted copy or revision",
            code="not_a_model",
        )


def _drop_others(partial: Path, making: Path) -> None:
    for path in partial.iterdir():
        if path != making:
            shutil.rmtree(path)


def _weights(snapshot: Snapshot, making: Path) -> list[RemoteFile]:
    if INDEX_NAME in snapshot.files:
        names = weight_names_of_index(read_json_object(making / INDEX_NAME), INDEX_NAME)
    elif WHOLE_NAME in snapshot.files:
        names = [WHOLE_NAME]
    else:
        names = sorted(name for name in snapshot.files if is_weight_name(name))
    absent = [name for name in names if name not in snapshot.files]
    if absent or not names:
        raise CommandError(
            f"the repository's index names {', '.join(absent)[:200] or 'no file'}, which it does "
            "not hold",
            code="not_a_model",
        )
    return [snapshot.files[name] for name in names]


def _announce(
    pull: HubPull,
    snapshot: Snapshot,
    weights: list[RemoteFile],
    missing: list[RemoteFile],
    making: Path,
) -> None:
    needed_bytes = sum(file.size_bytes - file.fetched_bytes(making) for file in missing)
    check_room(pull.root, needed_bytes)
    whole_bytes = sum(file.size_bytes for file in weights)
    tell(
        f"fetching {pull.repository}@{snapshot.commit[:12]}: {len(missing)} of {len(weights)} "
        f"weight files, {format_bytes(needed_bytes)} of {format_bytes(whole_bytes)}"
    )
    if pull.blocks and len(weights) == 1:
        tell("the repository keeps all blocks in one file, so --blocks saves nothing")


def _register(
    pull: HubPull, snapshot: Snapshot, weights: list[RemoteFile], making: Path, target: Path
) -> None:
    known = {}
    for file in weights:
        here = next((d / file.name for d in (making, target) if (d / file.name).exists()), None)
        if here is None and file.sha256 is None:
            raise CommandError(
                f"the hub does not tell the SHA-256 of {file.name}; pull without --blocks",
                code="hub_error",
            )
        if file.sha256 is not None:
            known[file.name] = WeightFile(
                sha256=file.sha256,
                size_bytes=file.size_bytes,
                mtime_ns=here.stat().st_mtime_ns if here else None,
            )
    manifest = Manifest(name=pull.name, source=pull.source, revision=snapshot.commit, weights=known)
    if target.exists():
        for path in sorted(making.glob("*.safetensors")):
            path.replace(target / path.name)
        save_folder_manifest(target, manifest, root=pull.root)
    else:
        save_folder_manifest(making, manifest, root=making.parent)
        making.replace(target)
    weight_files(target, root=pull.root)
