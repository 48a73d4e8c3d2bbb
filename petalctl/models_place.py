"""Put a model into the store: whole or not at all, one process at a time, disk-full in clear words.

What is being made lies in the store's ``.partial`` folder, on the same file system, and is renamed
into place when it is complete.
"""

from __future__ import annotations

import errno
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kernels.model_manifest import Manifest
from kernels.model_store import save_folder_manifest, weight_files
from petalctl.errors import CommandError
from petalctl.models_progress import Progress, tell


@contextmanager
def partial_folder(root: Path, name: str) -> Iterator[Path]:
    """The folder ``.partial/<name>``, for this process alone; a second one waits here.

    What is in it is kept when the block is left, so that a later pull can go on.

    Raises:
        CommandError: The disk is full, or the store cannot be written to.
    """
    with translated_disk_errors(root):
        partial = root / ".partial"
        partial.mkdir(parents=True, exist_ok=True)
        with (partial / f"{name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell(f"another process is fetching {name}; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            folder = partial / name
            folder.mkdir(exist_ok=True)
            yield folder


@contextmanager
def translated_disk_errors(root: Path) -> Iterator[None]:
    """Turn what the operating system says about disks and permissions into a `CommandError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CommandError(
                f"the disk that holds {root} is full; make room, or set PETALD_HOME to a folder "
                "elsewhere, and pull again",
                code="disk_full",
            ) from error
        raise CommandError(
            f"cannot write to the model store {root}: {error}", code="store_error"
        ) from error


def check_room(root: Path, needed_bytes: int) -> None:
    """Refuse early what cannot fit.

    Raises:
        CommandError: The disk has less room than that.
    """
    free_bytes = shutil.disk_usage(root).free
    if free_bytes < needed_bytes:
        raise CommandError(
            f"this needs {format_bytes(needed_bytes)}, and the disk that holds {root} has "
            f"{format_bytes(free_bytes)} left; make room, or set PETALD_HOME to a folder elsewhere",
            code="disk_full",
        )


def register(making: Path, target: Path, manifest: Manifest, progress: Progress) -> None:
    """Hash a finished folder's weights where `manifest` lacks them, and put it into the store."""
    save_folder_manifest(making, manifest, root=making.parent)
    weight_files(making, root=making.parent, on_progress=progress.show)
    making.replace(target)


def format_bytes(count: int) -> str:
    """A size for people: 135 B, 7.1 MB, 4.9 GB."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.1f} {unit}" if unit != "B" else f"{count} B"
        size /= 1000
    return f"{size:.1f} GB"
