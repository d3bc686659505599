"""The safetensors format, one tensor at a time: nothing but the tensor that is read or written is in memory.

    8 bytes    length of the header, little-endian
    header     JSON: name → {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__" → strings
    data       the tensors' bytes, one after the other; offsets count from here

The header of a file is untrusted: every size in it is compared with the file's. A tensor is refused by its name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipecompile.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LENGTH_BYTES = 8
LARGEST_HEADER_BYTES = 100_000_000
"""What the reference implementation allows."""
AGAIN = "copy or download the file again"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor sits in a file: ``begin`` and ``end`` count from the file's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> int:
    """Write a file of tensors and flush it to the disk; its size in bytes. An older file there is replaced."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _code(name, tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for tensor in tensors.values():
            file.write(_bytes_of(tensor.detach().to("cpu").contiguous()))
        file.flush()
        os.fsync(file.fileno())
    return LENGTH_BYTES + len(text) + position


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name; CheckpointError for a file that is cut off (by tensor), or none of ours."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            text = file.read(length) if length <= LARGEST_HEADER_BYTES else b""
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror}; {AGAIN}") from error
    if size < LENGTH_BYTES + 2 or length > LARGEST_HEADER_BYTES:
        raise CheckpointError(f"{str(path)!r} is no safetensors file ({size} bytes); expected one, or {AGAIN}")
    if len(text) < length:
        raise CheckpointError(f"{str(path)!r} is cut off in its header ({size} of {length} bytes or more); {AGAIN}")
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} has a header that is no JSON ({error}); {AGAIN}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{str(path)!r} has a header that is no JSON object; {AGAIN}")
    header.pop("__metadata__", None)
    start = LENGTH_BYTES + length
    return {name: _entry(path, name, value, start, size) for name, value in header.items()}


def read_tensor(path: Path, name: str, entry: Entry, into: Tensor) -> None:
    """Read a tensor's bytes into the memory of ``into``, which has its shape and dtype. CheckpointError if they end."""
    direct = into.device.type == "cpu" and into.is_contiguous()
    target = into.detach() if direct else torch.empty(entry.shape, dtype=entry.dtype)
    view = memoryview(_bytes_of(target))
    with path.open("rb", buffering=0) as file:
        file.seek(entry.begin)
        done = 0
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise CheckpointError(_cut_off(path, name, entry, entry.begin + done))
            done += got
    if not direct:
        with torch.no_grad():
            into.copy_(target)


def _bytes_of(tensor: Tensor) -> Any:
    """A contiguous CPU tensor's memory as an array of bytes; nothing is copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy()


def _code(name: str, dtype: torch.dtype) -> str:
    if dtype not in CODES:
        raise CheckpointError(
            f"tensor {name!r} is {_name(dtype)}, which safetensors cannot hold; convert it to one of "
            f"{', '.join(map(_name, CODES))}"
        )
    return CODES[dtype]


def _entry(path: Path, name: str, value: Any, start: int, size: int) -> Entry:
    """One tensor of a header, checked."""
    dtype, shape, begin, end = None, [-1], -1, -1
    with suppress(KeyError, TypeError, ValueError):
        dtype, shape = DTYPES.get(value["dtype"]), value["shape"]
        begin, end = value["data_offsets"]
    numbers = [*shape, begin, end] if isinstance(shape, list) else [-1]
    if dtype is None or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise CheckpointError(
            f"tensor {name!r} in {str(path)!r} is described by {value!r}, expected dtype, shape and data_offsets; {AGAIN}"
        )
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(
            f"tensor {name!r} in {str(path)!r} has {end - begin} bytes, but {_name(dtype)}{shape} needs "
            f"{math.prod(shape) * dtype.itemsize}; {AGAIN}"
        )
    entry = Entry(dtype, tuple(shape), start + begin, start + end)
    if entry.end > size:
        raise CheckpointError(_cut_off(path, name, entry, size))
    return entry


def _cut_off(path: Path, name: str, entry: Entry, size: int) -> str:
    return f"tensor {name!r} is cut off: {str(path)!r} ends at byte {size}, but the tensor at byte {entry.end}; {AGAIN}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
