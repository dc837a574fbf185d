"""A bounded reader of GGUF files: the header as plain Python values, the tensors as views.

The layout is that of the GGUF specification (ggml's docs/gguf.md), versions 2 and 3, little-endian:
magic, version, two counts, key-value pairs, tensor infos, padding, tensor data. The file is a
stranger's: each count, length, offset and product is compared with a cap and with the bytes that
are left before it is used, and every fault is a `GGUFError`. Nothing here knows text or torch.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as dequantize_blocks

Scalar: TypeAlias = int | float | bool | str
Value: TypeAlias = Scalar | list[int] | list[float] | list[bool] | list[str]

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_KEYS = 1 << 14
MAX_TENSORS = 1 << 17
MAX_ARRAY = 1 << 24
MAX_NAME_BYTES = 1 << 10
MAX_STRING_BYTES = 1 << 26
MAX_DIMS = 4
MAX_ELEMENTS = 1 << 42

_STRING, _ARRAY, _BOOL = 8, 9, 7
# GGUF's value type -> numpy's little-endian type. Booleans are one byte, 0 or 1.
_SCALARS: dict[int, np.dtype[np.generic]] = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    _BOOL: np.dtype("u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class GGUFError(ValueError):
    """The file is not a GGUF file that can be read safely. One line that says why."""


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor. `shape` is row-major, [rows, cols], the reverse of the file's order.
    `offset` and `nbytes` are bytes, the offset counted from the start of the file."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Cursor:
    """A position in the header that never leaves the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.position = 0

    def skip(self, count: int, what: str) -> int:
        """Moves on by `count` bytes and returns where they start."""
        start = self.position
        if count > self.size - start:
            raise GGUFError(
                f"the file ends inside {what}: {count} bytes are needed at byte {start}, "
                f"{self.size - start} are left; it is truncated or broken"
            )
        self.position = start + count
        return start

    def u32(self, what: str) -> int:
        value: int = _U32.unpack_from(self.data, self.skip(4, what))[0]
        return value

    def u64(self, what: str, cap: int) -> int:
        value: int = _U64.unpack_from(self.data, self.skip(8, what))[0]
        if value > cap:
            raise GGUFError(f"{what} is {value}, over the limit of {cap}; the file is broken")
        return value

    def string(self, what: str, cap: int) -> str:
        length = self.u64(f"the length of {what}", cap)
        start = self.skip(length, what)
        try:
            return self.data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise GGUFError(f"{what} is not valid UTF-8 (byte {start + error.start})") from None

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings. The loop is written out: a vocabulary has a hundred thousand."""
        data, size, position = self.data, self.size, self.position
        unpack, result = _U64.unpack_from, []
        for index in range(count):
            start = position + 8
            if start > size:
                raise GGUFError(f"the file ends inside {what}, at string {index} of {count}")
            position = start + unpack(data, position)[0]
            if position > size:
                raise GGUFError(f"string {index} of {what} reaches beyond the end of the file")
            result.append(data[start:position])
        self.position = position
        try:
            return [item.decode() for item in result]
        except UnicodeDecodeError:
            raise GGUFError(f"{what} holds a string that is not valid UTF-8") from None

    def numbers(self, kind: int, count: int, what: str) -> list[int] | list[float] | list[bool]:
        dtype = _SCALARS[kind]
        start = self.skip(count * dtype.itemsize, what)
        array = np.frombuffer(self.data, dtype, count, start)
        if kind == _BOOL:
            if count and array.max() > 1:
                raise GGUFError(f"{what} holds a boolean that is neither 0 nor 1")
            array = array.astype(np.bool_)
        values: list[int] | list[float] | list[bool] = array.tolist()
        return values

    def value(self, key: str) -> Value:
        kind = self.u32(f"the type of {key!r}")
        if kind == _STRING:
            return self.string(f"the value of {key!r}", MAX_STRING_BYTES)
        if kind in _SCALARS:
            return self.numbers(kind, 1, f"the value of {key!r}")[0]
        if kind != _ARRAY:
            raise GGUFError(f"{key!r} has the unknown value type {kind}; expected 0 to 12")
        item = self.u32(f"the item type of {key!r}")
        if item != _STRING and item not in _SCALARS:
            raise GGUFError(
                f"{key!r} is an array of type {item}; only scalars and strings are read"
            )
        count = self.u64(f"the number of items of {key!r}", MAX_ARRAY)
        # Checked before anything is made: the smallest string is its eight bytes of length.
        smallest = 8 if item == _STRING else _SCALARS[item].itemsize
        if count * smallest > self.size - self.position:
            raise GGUFError(f"{key!r} claims {count} items, more than the rest of the file holds")
        if item == _STRING:
            return self.strings(count, repr(key))
        return self.numbers(item, count, repr(key))


class GGUFFile:
    """An open GGUF file.

    `metadata` has every key-value pair. Views that `read` returns keep the mapping alive.
    """

    def __init__(
        self, path: Path, data: mmap.mmap, metadata: dict[str, Value], tensors: list[GGUFTensor]
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self._data = data

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Reads and checks the header. Raises GGUFError, or OSError if the file cannot be read."""
        path = Path(path)
        with path.open("rb") as file:
            if file.seek(0, 2) < 24:
                raise GGUFError(f"{path.name} is too short to be a GGUF file")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            return cls(path, data, *_read_header(data))
        except GGUFError as error:
            raise GGUFError(f"{path.name}: {error}") from None

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes as stored, not copied and read-only: uint8 [rows, bytes_per_row],
        rows being the product of all dimensions but the last; flat for one dimension."""
        tensor = self._tensor(name)
        view = np.frombuffer(self._data, np.uint8, tensor.nbytes, tensor.offset)
        return view if len(tensor.shape) == 1 else view.reshape(math.prod(tensor.shape[:-1]), -1)

    def dequantize(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor's values as float32 of `shape`; for F32 a view of the file."""
        tensor = self._tensor(name)
        # A scale that is infinite or not a number is the file's affair, not worth a warning.
        try:
            with np.errstate(all="ignore"):
                values = dequantize_blocks(self.read(name), tensor.type)
        except NotImplementedError:
            raise GGUFError(
                f"tensor {name!r} has the type {tensor.type.name}, which cannot be dequantised"
            ) from None
        return values.reshape(tensor.shape)

    def _tensor(self, name: str) -> GGUFTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise GGUFError(f"{self.path.name} has no tensor {name!r}") from None


def _read_header(data: mmap.mmap) -> tuple[dict[str, Value], list[GGUFTensor]]:
    cursor = _Cursor(data)
    if data[:4] != MAGIC:
        raise GGUFError(f"it starts with {data[:4]!r}, not {MAGIC!r}: it is not a GGUF file")
    cursor.skip(4, "the magic")
    version = cursor.u32("the version")
    if version not in VERSIONS:
        endian = " (a big-endian file?)" if version & 0xFFFF == 0 else ""
        raise GGUFError(f"GGUF version {version}{endian} is not supported; expected 2 or 3")
    num_tensors = cursor.u64("the number of tensors", MAX_TENSORS)
    num_keys = cursor.u64("the number of keys", MAX_KEYS)
    metadata: dict[str, Value] = {}
    for _ in range(num_keys):
        key = cursor.string("a key", MAX_NAME_BYTES)
        if key in metadata:
            raise GGUFError(f"the key {key!r} is there twice")
        metadata[key] = cursor.value(key)
    infos = [_read_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if (
        not isinstance(alignment, int)
        or isinstance(alignment, bool)
        or not 0 < alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise GGUFError(f"general.alignment is {alignment!r}; expected a power of two up to 2^20")
    start = -(-cursor.position // alignment) * alignment
    tensors = [info(start, alignment, cursor.size) for info in infos]
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise GGUFError("two tensors have the same name")
    ordered = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise GGUFError(f"the tensors {before.name!r} and {after.name!r} overlap")
    return metadata, tensors


def _read_info(cursor: _Cursor) -> Callable[[int, int, int], GGUFTensor]:
    """One tensor info. It can be placed only when the start of the data is known."""
    name = cursor.string("a tensor's name", MAX_NAME_BYTES)
    num_dims = cursor.u32(f"the dimensions of {name!r}")
    if not 1 <= num_dims <= MAX_DIMS:
        raise GGUFError(f"tensor {name!r} has {num_dims} dimensions; expected 1 to {MAX_DIMS}")
    dims = [cursor.u64(f"a dimension of {name!r}", MAX_ELEMENTS) for _ in range(num_dims)]
    # Python's integers do not wrap, so the product of checked dimensions can be compared as it is.
    elements = math.prod(dims)
    if not 0 < elements <= MAX_ELEMENTS:
        raise GGUFError(f"tensor {name!r} has the shape {dims[::-1]}: empty, or too large")
    number = cursor.u32(f"the type of {name!r}")
    try:
        kind = GGMLQuantizationType(number)
        block, block_bytes = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError):
        raise GGUFError(f"tensor {name!r} has the unknown type {number}") from None
    if dims[0] % block:
        raise GGUFError(
            f"tensor {name!r} has rows of {dims[0]}, not a multiple of the {block} of {kind.name}"
        )
    offset = cursor.u64(f"the offset of {name!r}", (1 << 64) - 1)
    nbytes = elements // block * block_bytes

    def place(start: int, alignment: int, size: int) -> GGUFTensor:
        if offset % alignment:
            raise GGUFError(f"the offset {offset} of {name!r} is not a multiple of {alignment}")
        if start + offset + nbytes > size:
            raise GGUFError(
                f"tensor {name!r} needs the file to have {start + offset + nbytes} bytes, "
                f"it has {size}: it is truncated or broken"
            )
        return GGUFTensor(name, kind, tuple(dims[::-1]), start + offset, nbytes)

    return place
