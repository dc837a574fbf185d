"""RawTensor: a weight as it lies in its file, packed rows and all, and its dequantised values.

The block formats are ggml's (ggml-quants.h); the common ones are unpacked with torch on the target
device, the others by the gguf package on the CPU. Both give bit-identical fp32 values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import gguf
import numpy as np
import numpy.typing as npt
import torch

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PACKED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
SUPPORTED_TYPES = (*_PLAIN, *_PACKED)

# Values unpacked at a time: the fp32 intermediates stay in the cache, and small beside the model.
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class RawTensor:
    """`type` is a ggml name (F32, BF16, Q4_1, ...); `shape` is row-major, [rows, cols] or [n].

    `data` is uint8 [rows, bytes_per_row] on the CPU, often a view of a mapped file: never write to
    it. A vector has one value a row."""

    name: str
    type: str
    shape: tuple[int, ...]
    data: torch.Tensor

    @property
    def num_elements(self) -> int:
        """How many values the tensor has."""
        count = 1
        for dim in self.shape:
            count *= dim
        return count

    def take_rows(self, rows: torch.Tensor) -> RawTensor:
        """The rows named by an int64 vector, in its order, still packed (a copy)."""
        shape = (rows.numel(), *self.shape[1:])
        return replace(self, shape=shape, data=self.data.index_select(0, rows))

    def to_torch(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """The values, [shape], in memory of their own."""
        out = torch.empty(self.shape, dtype=dtype, device=device)
        self.dequantize_into(out)
        return out

    def dequantize_into(self, out: torch.Tensor) -> None:
        """Write the values to `out` [shape], contiguous, of any dtype and device."""
        if self.type in _PLAIN:
            out.copy_(self.data.view(_PLAIN[self.type]).view(self.shape))
            return
        rows, cols = self.shape
        step = max(1, _CHUNK // cols)
        for start in range(0, rows, step):
            packed = self.data[start : start + step]
            out[start : start + step] = self._unpack(packed, out.device).view(-1, cols)

    def _unpack(self, packed: torch.Tensor, device: torch.device) -> torch.Tensor:
        """uint8 [rows, bytes_per_row] -> fp32 [blocks, values of a block]."""
        kind = gguf.GGMLQuantizationType[self.type]
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        unpack = _UNPACK.get(self.type)
        if unpack is not None:
            return unpack(packed.reshape(-1, block_bytes).to(device))
        # Infinite scales in a broken file are the file's affair, not worth a warning.
        with np.errstate(all="ignore"):
            values = gguf.dequantize(packed.numpy(), kind)
        return torch.from_numpy(values).view(-1, block_values).to(device)


def from_numpy(
    name: str, kind: str, shape: tuple[int, ...], data: npt.NDArray[np.uint8]
) -> RawTensor:
    """A RawTensor over bytes that may be read-only. Raises ValueError for a type that is not
    supported, or a vector that is packed."""
    if kind not in SUPPORTED_TYPES or (len(shape) == 1 and kind not in _PLAIN) or len(shape) > 2:
        raise ValueError(
            f"tensor {name} is {kind} {list(shape)}; supported are matrices of "
            f"{', '.join(SUPPORTED_TYPES)} and vectors of {', '.join(_PLAIN)}"
        )
    with warnings.catch_warnings():
        # torch warns of read-only memory; nothing writes to raw data.
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch.from_numpy(data)
    return RawTensor(name, kind, shape, tensor.view(shape[0], -1))


# ---------------------------------------------------------------- blocks [n, bytes] -> fp32 [n, 32]


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[n, 16] bytes -> [n, 32]: the low halves, then the high halves."""
    return torch.cat([packed & 15, packed >> 4], dim=1)


def _with_fifth_bit(nibbles: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Bit i of the four bytes [n, 4] is the fifth bit of value i."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    fifth = (bits[:, :, None] >> shifts & 1).flatten(1)
    return nibbles | fifth << 4


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 2:]).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 4:]).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    values = _with_fifth_bit(_nibbles(blocks[:, 6:]), blocks[:, 2:6])
    return values.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    values = _with_fifth_bit(_nibbles(blocks[:, 8:]), blocks[:, 4:8])
    return values.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float().mul_(_half(blocks, 0))


_UNPACK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
}
