"""Where the tensors of a call lie in its one piece of memory: decided by the plan, looked up by the run."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 256  # bytes: of what a GPU's allocator returns


class Buffer(NamedTuple):
    """Describes a tensor in the workspace."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int  # in numbers of its type


class Layout:
    """Hands out places one behind the other; those of a chunk are handed out again to the next one."""

    def __init__(self) -> None:
        self.end = 0  # bytes handed out
        self.bytes = 0  # needed at most
        self.chunks_begin = 0
        self.by_name: dict[str, Buffer] = {}  # of the chunk

    def begin_chunks(self) -> None:
        """Ends the part that lasts for the whole call."""
        self.chunks_begin = self.end

    def begin_chunk(self) -> None:
        """Gives up the places of the chunk before."""
        self.end, self.by_name = self.chunks_begin, {}

    def add(
        self,
        name: str,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        row_stride: int | None = None,
        over: str | None = None,
    ) -> Buffer:
        """Returns the place of a tensor.

        Args:
            name: How the run calls it.
            *shape: Of the tensor.
            dtype: Of its numbers.
            row_stride: How far its rows are apart; None: its last length.
            over: The name of a tensor of 4-byte numbers, in whose memory its rows lie, each where that one's begins.
        """
        row = shape[-1] if row_stride is None else row_stride
        begin = self.end
        if over is not None:
            below = self.by_name[over]
            begin, row = below.offset * below.dtype.itemsize, row * below.dtype.itemsize // dtype.itemsize
        strides = [1]
        for index in range(len(shape) - 1, 0, -1):
            strides.insert(0, row if index == len(shape) - 1 else strides[0] * shape[index])
        buffer = Buffer(name, dtype, shape, tuple(strides), begin // dtype.itemsize)
        self.by_name[name] = buffer
        if over is None:
            numbers = math.prod(shape[:-1]) * row
            self.end += -(-numbers * dtype.itemsize // ALIGNMENT) * ALIGNMENT
            self.bytes = max(self.bytes, self.end)
        return buffer


class Workspace:
    """Holds the memory of one call, and makes tensors in it."""

    def __init__(self, size: int, device: torch.device) -> None:
        memory = torch.empty(size // 4, dtype=torch.float32, device=device)
        self._by_dtype = {torch.float32: memory}

    def tensors(self, buffers: tuple[Buffer, ...]) -> dict[str, Tensor]:
        """Returns the tensors of these places, by name."""
        return {
            name: torch.as_strided(self._of(dtype), shape, strides, offset)
            for name, dtype, shape, strides, offset in buffers
        }

    def _of(self, dtype: torch.dtype) -> Tensor:
        found = self._by_dtype.get(dtype)
        if found is None:
            found = self._by_dtype[dtype] = self._by_dtype[torch.float32].view(dtype)
        return found
