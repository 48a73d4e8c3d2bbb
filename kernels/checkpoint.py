"""Reading a model folder's tensors: safetensors, and only those that are asked for.

Files are mapped, not loaded; nothing is ever unpickled. Invariant: a tensor that is given has the
shape that the model's configuration implies, and the dtype that was asked for.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from kernels.errors import CorruptCheckpoint
from kernels.model_config import load_model_config
from kernels.quant.stored_config import parse_stored_quantisation
from kernels.weight_names import OTHER_PREFIXES, names_of

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


class Checkpoint:
    """A model folder: ``config.json`` and safetensors, whole or in shards.

    Args:
        folder: where it is.

    Attributes:
        stored: how its weights are quantised already; none where they are numbers.

    Raises:
        CorruptCheckpoint: the configuration or the index cannot be read.
        UnsupportedModel: the configuration describes what is not implemented.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = load_model_config(folder)
        self.stored = parse_stored_quantisation(json.loads((folder / "config.json").read_bytes()))
        self._file_of = _read_index(folder)
        self._prefix: tuple[str, str] | None = None

    def load_tensors(
        self, shapes: dict[str, tuple[int, ...]], *, dtype: torch.dtype, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Reads tensors, each converted on its own, so that no more than one is held twice.

        Args:
            shapes: names, as `kernels.weight_names` has them, with the shapes that they must have.
            dtype: of the result.
            device: likewise.

        Raises:
            CorruptCheckpoint: a file is missing or damaged, or a tensor is not as it must be.
        """
        with self.open() as reader:
            return {
                name: reader.read_numbers(name, shape).to(device=device, dtype=dtype)
                for name, shape in shapes.items()
            }

    def open(self) -> TensorReader:
        """Reads its tensors one by one, as the files have them."""
        return TensorReader(self.folder, self._file_of, self._stored)

    def missing_blocks(self) -> frozenset[int]:
        """The blocks of which a file is not here: a server may have fetched but some of them."""
        blocks = {str(block): block for block in range(self.config.num_blocks)}
        if self._file_of is None:
            return frozenset(() if (self.folder / SINGLE_FILE).exists() else blocks.values())
        files = set(self._file_of.values())
        absent = {file for file in files if not (self.folder / file).exists()}
        # Beside the tensors of `block_shapes`, quantised layers have scales and the like.
        before = self._stored(names_of(self.config).output.partition("{block}")[0])
        numbers = {
            name.removeprefix(before).partition(".")[0]
            for name, file in self._file_of.items()
            if file in absent and name.startswith(before)
        }
        return frozenset(blocks[number] for number in numbers if number in blocks)

    def _stored(self, name: str) -> str:
        """What the checkpoint calls a tensor."""
        usual, stored = self._find_prefix()
        return stored + name[len(usual) :] if name.startswith(usual) else name

    def _find_prefix(self) -> tuple[str, str]:
        """How names begin, and what the checkpoint has in the place of that."""
        others = OTHER_PREFIXES.get(self.config.family, ())
        if self._prefix is None and others:
            known = self._names()
            if known is None:
                return "", ""  # reading a tensor will tell
            embedding = f"{names_of(self.config).embedding}.weight"
            self._prefix = next(
                (pair for pair in others if pair[1] + embedding[len(pair[0]) :] in known), None
            )
        return self._prefix or ("", "")

    def _names(self) -> Collection[str] | None:
        """All the checkpoint's tensors; none where its file cannot be read."""
        if self._file_of is not None:
            return self._file_of
        try:
            with safe_open(self.folder / SINGLE_FILE, framework="pt") as file:
                return frozenset(file.keys())
        except (SafetensorError, OSError):
            return None


class TensorReader:
    """Reads tensors out of a model folder; made by `Checkpoint.open`.

    A context manager: its files stay mapped until it is left, and longer where a tensor is kept.
    """

    def __init__(
        self, folder: Path, file_of: Mapping[str, str] | None, stored: Callable[[str], str]
    ) -> None:
        self._folder = folder
        self._file_of = file_of
        self._stored = stored
        self._opened = contextlib.ExitStack()
        self._files: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._opened.close()

    def __contains__(self, name: str) -> bool:
        name = self._stored(name)
        if self._file_of is not None:
            return name in self._file_of
        return name in self._open(SINGLE_FILE).keys()  # noqa: SIM118 - no mapping

    def read(self, name: str) -> torch.Tensor:
        """A tensor as its file has it, of whichever shape and dtype: still to be checked.

        Raises:
            CorruptCheckpoint: a file is missing or damaged, or has no such tensor.
        """
        file_name = self._find(name)
        file = self._open(file_name)
        try:
            tensor: torch.Tensor = file.get_tensor(self._stored(name))
        except (SafetensorError, OSError) as error:
            raise self._unreadable(file_name, error) from error
        return tensor

    def read_numbers(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of floating-point numbers, in the dtype that its file has.

        Raises:
            CorruptCheckpoint: it cannot be read, or is not as it must be.
        """
        tensor = self.read(name)
        _check_tensor(self._folder / self._find(name), name, tensor, shape)
        return tensor

    def _open(self, file_name: str) -> Any:
        file = self._files.get(file_name)
        if file is None:
            path = self._folder / file_name
            try:
                file = self._opened.enter_context(safe_open(path, framework="pt"))
            except FileNotFoundError as error:
                raise CorruptCheckpoint(f"{path} is missing; fetch the model again") from error
            except (SafetensorError, OSError) as error:
                raise self._unreadable(file_name, error) from error
            self._files[file_name] = file
        return file

    def _unreadable(self, file_name: str, error: Exception) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            f"{self._folder / file_name} cannot be read ({error}); fetch the model again"
        )

    def _find(self, name: str) -> str:
        if self._file_of is None:
            return SINGLE_FILE
        file = self._file_of.get(self._stored(name))
        if file is None:
            raise CorruptCheckpoint(
                f"{self._folder / INDEX_FILE} does not know the tensor {name}; "
                "fetch the model again"
            )
        return file


def _check_tensor(path: Path, name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise CorruptCheckpoint(
            f"in {path}, {name} has the shape {list(tensor.shape)}; "
            f"config.json implies {list(expected)}"
        )
    if not tensor.is_floating_point():
        raise CorruptCheckpoint(
            f"in {path}, {name} holds {tensor.dtype}, no floating-point numbers"
        )


def _read_index(folder: Path) -> dict[str, str] | None:
    """Which file holds which tensor; none when one file holds all."""
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_bytes())
        entries = dict(raw["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpoint(f"{path} cannot be read; fetch the model again") from error
    for name, file in entries.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise CorruptCheckpoint(f"{path} sends {name} to {file!r}, which is no file beside it")
    return entries
