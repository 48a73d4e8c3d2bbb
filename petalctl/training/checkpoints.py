"""A training run's folder: checkpoints to go on from. Nothing is pickled.

Each checkpoint is written to a folder of its own, flushed to the disk, and then renamed; the one
before it is removed only after that. Invariant: whenever the process or the machine dies, what
`RunFolder.load` gives is the last checkpoint whose `RunFolder.save` came to its end, or the one
that was being saved, each as a whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from petalctl.errors import CommandError

FOLDER = "checkpoint"
_STATE_FILE = "state.json"
_TENSORS_FILE = "tensors.safetensors"
_LOCK_FILE = "lock"
_FORMAT = 1
_NAME = re.compile(r"save-(\d{8})")


class BadRunFolder(CommandError):
    """The folder cannot be used for this run; the text says why, and what to do."""

    def __init__(self, text: str, *, code: str = "bad_run_folder") -> None:
        super().__init__(text, code=code)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was saved.

    Attributes:
        state: as JSON has it.
        tensors: by name, on the CPU.
    """

    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]


class RunFolder:
    """The folder of one run; use as a context manager, which keeps other runs out.

    Args:
        path: of the folder; made where it is missing.
        is_restart: what an earlier run left is removed.

    Raises:
        BadRunFolder: on entering: it cannot be written, another process uses it, or it has an
            adapter that no run left.
    """

    def __init__(self, path: Path, *, is_restart: bool = False) -> None:
        self.path = path
        self._folder = path / FOLDER
        self._is_restart = is_restart
        self._lock: int | None = None

    def __enter__(self) -> Self:
        is_foreign = (self.path / "adapter_config.json").exists() and not self._folder.exists()
        if is_foreign and not self._is_restart:
            raise BadRunFolder(
                f"{self.path} has an adapter, but nothing to go on from; name another --out, or "
                "replace it with --restart"
            )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._folder / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._sweep(keep=None if self._is_restart else self._last())
        except BlockingIOError as error:
            self._unlock()
            raise BadRunFolder(f"another petalctl train uses {self.path}; wait for it") from error
        except OSError as error:
            self._unlock()
            raise BadRunFolder(f"{self.path} cannot be written: {error}") from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._unlock()

    def save(self, checkpoint: Checkpoint) -> None:
        """Saves a checkpoint in the place of the one before.

        Raises:
            OSError: it could not be written; the one before is still there.
        """
        last = self._last()
        serial = 0 if last is None else int(last.name.partition("-")[2]) + 1
        target = self._folder / f"save-{serial:08d}"
        scratch = Path(tempfile.mkdtemp(prefix=".writing-", dir=self._folder))
        try:
            save_file(checkpoint.tensors, scratch / _TENSORS_FILE)
            state = {"format": _FORMAT, **checkpoint.state}
            (scratch / _STATE_FILE).write_text(json.dumps(state))
            for name in (_TENSORS_FILE, _STATE_FILE):
                _flush(scratch / name)
            _flush(scratch)
            os.replace(scratch, target)
        except SafetensorError as error:
            raise OSError(f"{target} cannot be written ({error})") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        _flush(self._folder)
        self._sweep(keep=target)

    def load_state(self) -> dict[str, Any] | None:
        """The last checkpoint's state; none where there is no checkpoint.

        Raises:
            BadRunFolder: it cannot be read.
        """
        last = self._last()
        if last is None:
            return None
        path = last / _STATE_FILE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise _damaged(path, error) from error
        if not isinstance(state, dict) or state.pop("format", None) != _FORMAT:
            raise _damaged(path, "of another version of petalctl")
        return state

    def load(self) -> Checkpoint | None:
        """The last checkpoint; none where there is none.

        Raises:
            BadRunFolder: it cannot be read.
        """
        state, last = self.load_state(), self._last()
        if state is None or last is None:
            return None
        path = last / _TENSORS_FILE
        try:
            return Checkpoint(state, load_file(path))
        except (OSError, SafetensorError) as error:
            raise _damaged(path, error) from error

    def _last(self) -> Path | None:
        names = [entry.name for entry in self._folder.iterdir() if _NAME.fullmatch(entry.name)]
        return self._folder / max(names) if names else None

    def _sweep(self, keep: Path | None) -> None:
        """Removes what is of no use any more: older checkpoints, and what was never finished."""
        for entry in self._folder.iterdir():
            is_ours = _NAME.fullmatch(entry.name) or entry.name.startswith(".writing-")
            if is_ours and entry != keep:
                shutil.rmtree(entry, ignore_errors=True)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def check_arguments(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Sees to it that a run goes on as it began.

    Args:
        saved: what the checkpoint says of the run: options with their values.
        now: what is wanted, likewise.

    Raises:
        BadRunFolder: they differ; the text says in what.
    """
    told = [
        f"{name} was {_say(saved.get(name))} and is {_say(now.get(name))}"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name) != now.get(name)
    ]
    if told:
        raise BadRunFolder(
            f"--out has a run with other arguments: {'; '.join(told)}. Name another --out, or "
            "begin anew with --restart",
            code="other_arguments",
        )


def _say(value: object) -> str:
    text = "not given" if value is None or value == "" else str(value)
    return f"{text[:12]}…" if re.fullmatch("[0-9a-f]{64}", text) else text[:80]


def _damaged(path: Path, why: object) -> BadRunFolder:
    return BadRunFolder(f"{path} cannot be read ({why}); begin anew with --restart")


def _flush(path: Path) -> None:
    """Makes sure that a file, or a folder's list of files, is on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems cannot, for folders
            os.fsync(opened)
    finally:
        os.close(opened)
