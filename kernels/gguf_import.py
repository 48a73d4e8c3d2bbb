"""Turn a GGUF file into a Hugging Face-style folder, without torch.

The result is a folder like one from the hub: ``config.json``, ``model-0000i-of-0000n.safetensors``
with an index, ``tokenizer.json``, ``tokenizer_config.json`` and ``generation_config.json``. It
appears whole or not at all. The same file always gives the same bytes, since they are what the
model's fingerprint is made of: two peers that import one GGUF file can work together.

Linear layers in Q8_0, Q4_0 or Q4_1 may be kept so, bit for bit (`kernels.gguf_quants`): the folder
is then a half or a quarter of the size, and what is loaded from it as fast as other weights in 8 or
4 bits. But it is another model by its fingerprint, and nobody but petald reads it; so numbers are
the default, of which ``int4`` gives Q4_0 and Q4_1 back as good as exactly.

No more than one shard is in memory at a time. GGUF files come from strangers: whatever is wrong
with one ends in `CorruptCheckpoint` or `UnsupportedModel`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.errors import CorruptCheckpoint, UnsupportedModel
from kernels.gguf_config import ModelShape, TensorPlan, config_from_metadata
from kernels.gguf_quants import BLOCK_SIZE, KEPT_FORMS, BlockForm, take_apart
from kernels.gguf_tokenizer import tokenizer_files
from kernels.quant.stored_config import PETALD, PETALD_VERSION

ProgressFunction = Callable[[int, int], None]

DEFAULT_MAX_SHARD_BYTES = 64 * 2**20
"""Small, so that a span is read, or fetched, without much of its neighbours."""

_ROWS_AT_A_TIME = 4096

# The reader indexes blindly; this is what comes out where a file leads it astray.
_READER_ERRORS = (
    AttributeError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)

# What each kind of tensor becomes. Unquantised ones keep their type, bit for bit. Quantised ones
# become float16 rather than float32: it halves the file, and its rounding (half of 2^-11 of a
# value) is far below that of the quantisation itself (half of 2^-4 of the range for 4 bits, of 2^-8
# for 8); bfloat16's would not be. Whoever computes in float32 widens float16 exactly, so all users
# of the folder agree on every bit.
_NUMPY_TYPE: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_KEPT_TYPES: dict[Any, str] = {np.dtype(np.uint8): "U8", np.dtype(np.int8): "I8"}
_CONFIG_NAME = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class _StoredTensor:
    name: str
    type_name: str
    array: npt.NDArray[Any]


def import_gguf(
    file: Path,
    folder: Path,
    *,
    on_progress: ProgressFunction | None = None,
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES,
    keep_quantised: bool = False,
) -> None:
    """Write the model in `file` as a Hugging Face-style folder.

    Args:
        file: The GGUF file; it is only read.
        folder: Must not exist yet, or be empty. Its parent is created.
        on_progress: Called with (bytes of weights done, bytes of weights in all).
        max_shard_bytes: A shard holds as many whole blocks as fit in this, and at least one.
        keep_quantised: Keep linear layers in 8 or 4 bits where their types allow it.

    Raises:
        CorruptCheckpoint: The file is cut short, damaged, or not GGUF: fetch it again.
        UnsupportedModel: The file is sound, but of an architecture or tokenizer not known here.
        OSError: Reading or writing failed; nothing is left behind.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is already there")
    gguf = _GgufFile(file, keep_quantised=keep_quantised)
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(
        tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".importing", dir=folder.parent)
    )
    try:
        making.chmod(0o755)
        _write_folder(gguf, making, on_progress or _no_progress, max_shard_bytes)
        making.replace(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _no_progress(done_bytes: int, total_bytes: int) -> None:
    pass


class _GgufFile:
    """A GGUF file, with what the `gguf` package raises for a bad one translated."""

    def __init__(self, file: Path, *, keep_quantised: bool) -> None:
        from gguf import GGUFReader

        with file.open("rb") as opened:
            if opened.read(4) != b"GGUF":
                raise CorruptCheckpoint(f"{file} is not a GGUF file (its first four bytes say so)")
        try:
            reader = GGUFReader(file)
            self.metadata: dict[str, Any] = {
                name: field.contents() for name, field in reader.fields.items()
            }
        except _READER_ERRORS as error:
            raise CorruptCheckpoint(
                f"{file} is damaged or incomplete ({type(error).__name__} while reading its header)"
            ) from error
        self.file = file
        self._keep_quantised = keep_quantised
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}

    def is_quantised(self, name: str) -> bool:
        return self.tensors[name].tensor_type.name not in _NUMPY_TYPE

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape as numpy and torch have it: ggml counts dimensions from the innermost."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def kept_form(self, plan: TensorPlan) -> BlockForm | None:
        """How a tensor's blocks are laid out, where they are kept."""
        if not self._keep_quantised or not plan.name.endswith("_proj.weight"):
            return None
        return KEPT_FORMS.get(self.tensors[plan.gguf_name].tensor_type.name)

    def read_kept(self, plan: TensorPlan, form: BlockForm) -> dict[str, npt.NDArray[Any]]:
        """A tensor's codes and scales, by the suffixes of their names."""
        shape = self.shape(plan.gguf_name)
        packed = self.tensors[plan.gguf_name].data.reshape(shape[0], -1)
        parts = take_apart(form, packed)
        for suffix in form.numbers:
            self._check_finite(plan.gguf_name, parts[suffix])
        return parts

    def stored_type(self, name: str) -> str:
        return "F16" if self.is_quantised(name) else str(self.tensors[name].tensor_type.name)

    def read(self, name: str) -> npt.NDArray[Any]:
        """The tensor in its `stored_type`, dequantised some rows at a time."""
        tensor = self.tensors[name]
        shape, type_name = self.shape(name), self.stored_type(name)
        if not self.is_quantised(name):
            raw = np.ascontiguousarray(tensor.data).view(_NUMPY_TYPE[type_name]).reshape(shape)
            self._check_finite(name, _as_floats(raw, type_name))
            return raw
        return self._dequantise(name, tensor, shape)

    def _dequantise(self, name: str, tensor: Any, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        from gguf.quants import dequantize

        result = np.empty(shape, np.float16)
        rows = result.reshape(-1, shape[-1])
        packed = tensor.data.reshape(len(rows), -1)
        for start in range(0, len(rows), _ROWS_AT_A_TIME):
            part = slice(start, start + _ROWS_AT_A_TIME)
            try:
                values = dequantize(packed[part], tensor.tensor_type)
            except NotImplementedError as error:
                raise UnsupportedModel(
                    f"{self.file}: tensor {name} is quantised as {tensor.tensor_type.name}, which "
                    "the gguf package cannot read yet; take another quantisation of this model"
                ) from error
            with np.errstate(over="ignore"):  # an overflow becomes infinite, and is caught below
                rows[part] = values
            self._check_finite(name, rows[part])
        return result

    def _check_finite(self, name: str, values: npt.NDArray[Any]) -> None:
        if not np.isfinite(values).all():
            raise CorruptCheckpoint(
                f"{self.file}: tensor {name} holds values that are infinite, not numbers, or too "
                "large for float16"
            )


def _as_floats(raw: npt.NDArray[Any], type_name: str) -> npt.NDArray[Any]:
    if type_name != "BF16":
        return raw
    return (raw.astype(np.uint32) << 16).view(np.float32)


def _write_folder(
    gguf: _GgufFile, folder: Path, on_progress: ProgressFunction, max_shard_bytes: int
) -> None:
    shape, config = config_from_metadata(
        gguf.metadata, {name: gguf.shape(name) for name in gguf.tensors}, gguf.read
    )
    _write_json(folder / "generation_config.json", _generation_config(config))
    for name, text in tokenizer_files(gguf.metadata, shape.vocab_size).items():
        (folder / name).write_text(text, encoding="utf-8")
    groups = _shards(gguf, shape, max_shard_bytes)
    total_bytes = sum(_stored_bytes(gguf, plan) for group in groups for plan in group)
    done_bytes = 0
    on_progress(0, total_bytes)
    weight_map: dict[str, str] = {}
    bytes_by_type: dict[str, int] = {}
    for number, group in enumerate(groups, 1):
        shard_name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        stored: list[_StoredTensor] = []
        for tensor in _read_tensors(gguf, group):
            stored.append(tensor)
            size_bytes = tensor.array.nbytes
            if tensor.type_name in _CONFIG_NAME:
                bytes_by_type[tensor.type_name] = (
                    bytes_by_type.get(tensor.type_name, 0) + size_bytes
                )
            else:
                config["quantization_config"] = {"quant_method": PETALD, "version": PETALD_VERSION}
            weight_map[tensor.name] = shard_name
            done_bytes += size_bytes
            on_progress(done_bytes, total_bytes)
        _write_safetensors(folder / shard_name, stored)
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total_bytes}, "weight_map": weight_map},
    )
    main_type = max(bytes_by_type, key=lambda type_name: bytes_by_type[type_name])
    _write_json(folder / "config.json", {**config, "torch_dtype": _CONFIG_NAME[main_type]})


def _read_tensors(gguf: _GgufFile, plans: list[TensorPlan]) -> Iterator[_StoredTensor]:
    for plan in plans:
        form = gguf.kept_form(plan)
        parts = {"": gguf.read(plan.gguf_name)} if form is None else gguf.read_kept(plan, form)
        for suffix, array in parts.items():
            type_name = _KEPT_TYPES.get(array.dtype)
            if type_name is None:
                type_name = "F16" if suffix else gguf.stored_type(plan.gguf_name)
            if plan.rotary_heads:
                array = _undo_rotary_permutation(array, plan.rotary_heads)
            yield _StoredTensor(name=plan.name + suffix, type_name=type_name, array=array)


def _undo_rotary_permutation(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """Put the rows of a query or key projection back in the order of Hugging Face.

    Rotary positions turn pairs of rows of a head. Hugging Face pairs row i with row i + H/2, ggml's
    Llama pairs neighbours, so the conversion to GGUF interleaved the halves of every head.
    """
    half = rows.shape[0] // heads // 2
    split = rows.reshape(heads, half, 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(rows.shape)


def _shards(gguf: _GgufFile, shape: ModelShape, max_shard_bytes: int) -> list[list[TensorPlan]]:
    """Groups of tensors: the embedding, then runs of whole blocks, then the norm and head."""
    groups = [shape.embedding_plans()]
    run: list[TensorPlan] = []
    run_bytes = 0
    for block in range(shape.blocks):
        plans = shape.block_plans(block)
        size_bytes = sum(_stored_bytes(gguf, plan) for plan in plans)
        if run and run_bytes + size_bytes > max_shard_bytes:
            groups.append(run)
            run, run_bytes = [], 0
        run.extend(plans)
        run_bytes += size_bytes
    groups.append(run)
    groups.append(shape.head_plans())
    return groups


def _stored_bytes(gguf: _GgufFile, plan: TensorPlan) -> int:
    elements = 1
    for size in gguf.shape(plan.gguf_name):
        elements *= size
    if (form := gguf.kept_form(plan)) is not None:
        return elements // BLOCK_SIZE * form.block_bytes
    return elements * np.dtype(_NUMPY_TYPE[gguf.stored_type(plan.gguf_name)]).itemsize


def _write_safetensors(path: Path, tensors: list[_StoredTensor]) -> None:
    """Write one safetensors file.

    Not left to the safetensors package because these bytes are hashed into the fingerprint: they
    must not change with the version of a library. (Its own reader is what reads them.)

    Source: "Format" in the readme of the safetensors project.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.array.nbytes
        header[tensor.name] = {
            "dtype": tensor.type_name,
            "shape": list(tensor.array.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned for whoever maps the file
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for tensor in tensors:
            out.write(np.ascontiguousarray(tensor.array).data)


def _generation_config(config: dict[str, Any]) -> dict[str, Any]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: config[name] for name in names if name in config}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
