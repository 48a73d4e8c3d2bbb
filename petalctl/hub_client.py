"""The only importer of huggingface_hub: list a repository, fetch and verify files, in clear words.

What a broken transfer leaves is kept for the next try (huggingface_hub 2 itself throws it away),
and a file gets its name only when its hash is the hub's. The package changed its HTTP library with
each major version, so foreign errors are told apart by the package that their class comes from.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kernels.model_manifest import is_sha256
from petalctl.errors import CommandError
from petalctl.models_progress import Progress

_HTTP_PACKAGES = frozenset({"httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3"})
_LIST_TIMEOUT_S = 8.0
"""For the first request: no answer in this time counts as no hub."""
_CHUNK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file in a repository; one of the two hashes is known."""

    name: str
    size_bytes: int
    sha256: str | None
    git_sha1: str | None

    def fetched_bytes(self, folder: Path) -> int:
        """How much of it is in `folder` already, whole or in part."""
        for path in (folder / self.name, folder / f"{self.name}.part"):
            if path.exists():
                return min(path.stat().st_size, self.size_bytes)
        return 0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A repository's files at one commit; only those in its top folder."""

    commit: str
    files: Mapping[str, RemoteFile]


class HubClient:
    """Talks to the hub at ``$HF_ENDPOINT``, with the user's token if there is one."""

    def __init__(self, endpoint: str | None = None) -> None:
        self._endpoint = endpoint or os.environ.get("HF_ENDPOINT", "").rstrip("/") or None

    def snapshot(self, repository: str, revision: str | None) -> Snapshot:
        """The files of a repository at a revision (a branch, tag or commit; None: the default).

        Raises:
            CommandError: No hub, no such repository or revision, or no access to it.
        """
        with _translated_errors(repository, revision):
            from huggingface_hub import HfApi

            info = HfApi(endpoint=self._endpoint).model_info(
                repository, revision=revision, files_metadata=True, timeout=_LIST_TIMEOUT_S
            )
            files = [_remote_file(sibling) for sibling in info.siblings or []]
            commit = str(info.sha)
        if not commit.isalnum():
            raise CommandError("the hub named no commit", code="hub_error")
        return Snapshot(
            commit=commit, files={file.name: file for file in files if _is_plain(file.name)}
        )

    def fetch(
        self,
        repository: str,
        commit: str,
        files: Sequence[RemoteFile],
        folder: Path,
        progress: Progress,
    ) -> None:
        """Have these files in `folder`, each verified. Goes on where an earlier try stopped.

        Raises:
            CommandError: The transfer broke off, or what came is not what the hub announced.
            OSError: The disk is full, or the like.
        """
        for file in files:
            if not (folder / file.name).exists():
                self._fetch_one(repository, commit, file, folder, progress)

    def _fetch_one(
        self, repository: str, commit: str, file: RemoteFile, folder: Path, progress: Progress
    ) -> None:
        part = folder / f"{file.name}.part"
        part.touch()
        if part.stat().st_size > file.size_bytes:
            part.write_bytes(b"")
        with part.open("r+b") as out, _translated_errors(repository, commit, is_transfer=True):
            from huggingface_hub import hf_hub_url
            from huggingface_hub.file_download import http_get
            from huggingface_hub.utils._headers import build_hf_headers

            _quieten()
            counting = _CountingFile(out, file, progress)
            http_get(
                hf_hub_url(repository, file.name, revision=commit, endpoint=self._endpoint),
                counting,  # type: ignore[arg-type]
                resume_size=out.seek(0, os.SEEK_END),
                headers=build_hf_headers(),
                expected_size=file.size_bytes,
                displayed_filename=file.name,
            )
        if not _is_genuine(part, file):
            part.unlink()
            raise CommandError(
                f"{file.name} of {repository} came damaged: its hash is not the one the hub "
                "announced. It was thrown away; run the same command again",
                code="verification_failed",
            )
        part.replace(folder / file.name)


class _CountingFile:
    """A file that shows how far it has been written."""

    def __init__(self, out: BinaryIO, file: RemoteFile, progress: Progress) -> None:
        self._out, self._file, self._progress = out, file, progress

    def __getattr__(self, name: str) -> Any:
        return getattr(self._out, name)

    def write(self, chunk: bytes) -> int:
        count = self._out.write(chunk)
        self._progress.show(self._file.name, self._out.tell(), self._file.size_bytes)
        return count


def _quieten() -> None:
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    disable_progress_bars()  # ours knows of what an earlier try has left


def _remote_file(sibling: Any) -> RemoteFile:
    lfs, git_sha1, name = sibling.lfs, sibling.blob_id, str(sibling.rfilename)
    sha256 = lfs.sha256 if lfs else None
    size_bytes = (lfs.size if lfs else None) or sibling.size
    if type(size_bytes) is not int or size_bytes < 0:
        raise ValueError(f"no size told for {name[:100]}")
    if sha256 is not None and not is_sha256(sha256):
        raise ValueError(f"a bad hash told for {name[:100]}")
    return RemoteFile(name=name, size_bytes=size_bytes, sha256=sha256, git_sha1=git_sha1)


def _is_plain(name: str) -> bool:
    return "/" not in name and "\\" not in name and not name.startswith(".")


def _is_genuine(path: Path, file: RemoteFile) -> bool:
    if path.stat().st_size != file.size_bytes:
        return False
    if file.sha256 is None and file.git_sha1 is None:
        return True
    digest = hashlib.sha256()
    expected = file.sha256
    if expected is None:
        # What is not in large-file storage has git's own hash.
        digest = hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
        expected = file.git_sha1
    with path.open("rb") as opened:
        while chunk := opened.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == expected


@contextmanager
def _translated_errors(
    repository: str, revision: str | None, *, is_transfer: bool = False
) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        found = _explain(error, repository, revision, is_transfer)
        if found is None:
            raise
        code, text = found
        raise CommandError(text, code=code) from error


def _explain(
    error: Exception, repository: str, revision: str | None, is_transfer: bool
) -> tuple[str, str] | None:
    """The code and the sentence for an error; None for one that is not the network's."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if "OfflineModeIsEnabled" in kinds:
        return "hub_offline", "the hub is not asked, because HF_HUB_OFFLINE is set"
    if "GatedRepoError" in kinds:
        return "gated_repo", (
            f"{repository} is gated: accept its terms on its page on the hub, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if "RevisionNotFoundError" in kinds:
        return "revision_not_found", f"{repository} has no revision {str(revision)[:100]!r}"
    if "RepositoryNotFoundError" in kinds:
        return "repo_not_found", (
            f"the hub has no repository {repository}, or it is private: check the spelling, or log "
            "in with `hf auth login` or set HF_TOKEN"
        )
    if "HFValidationError" in kinds:
        return "repo_not_found", f"{repository[:100]!r} cannot name a repository on the hub"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return "hub_error", f"the hub answered {status} for {repository}; try again later"
    if packages & _HTTP_PACKAGES or isinstance(error, ConnectionError | TimeoutError):
        if is_transfer:
            return "download_interrupted", (
                f"the connection to the hub broke while fetching {repository} "
                f"({type(error).__name__}); what came is kept: run the same command again to go on"
            )
        return "hub_unreachable", f"the hub cannot be reached ({type(error).__name__})"
    if is_transfer and isinstance(error, OSError) and "Consistency check" in str(error):
        return "download_interrupted", (
            f"the hub stopped in the middle of a file of {repository}; run the same command again"
        )
    if isinstance(error, OSError):
        return None  # the disk: told by whoever owns the folder
    if isinstance(error, ValueError | TypeError | KeyError | AttributeError):
        return "hub_error", f"what answered for {repository} is not a hub: {str(error)[:200]}"
    return None
