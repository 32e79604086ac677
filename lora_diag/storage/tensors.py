"""The interface of a checkpoint: names, shapes and dtypes of tensors, and ranges of their entries
on request.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.errors import InputError
from lora_diag.storage.remote import RemotePath

if TYPE_CHECKING:
    import torch

    from lora_diag.storage.file_bytes import Numbers

# 8-bit floats: bits of the mantissa, exponent bias, and the meaning of the largest exponent:
# ``ieee`` (an infinity and NaNs), ``fn`` (numbers, and one NaN for each sign), ``fnuz`` (numbers;
# NaN takes the place of -0). References: Micikevicius et al. 2022,
# https://arxiv.org/abs/2209.05433; Noune et al. 2022, https://arxiv.org/abs/2206.02915.
FLOAT8 = {
    "float8_e4m3fn": (3, 7, "fn"),
    "float8_e5m2": (2, 15, "ieee"),
    "float8_e4m3fnuz": (3, 8, "fnuz"),
    "float8_e5m2fnuz": (2, 16, "fnuz"),
}

# Bytes per entry of the dtypes that are read.
WIDTH = {
    dtype: width
    for width, dtypes in {
        8: ("float64", "int64", "uint64", "complex64"),
        4: ("float32", "int32", "uint32"),
        2: ("float16", "bfloat16", "int16", "uint16"),
        1: ("int8", "uint8", "bool", *FLOAT8, "float8_e8m0fnu"),
    }.items()
    for dtype in dtypes
}

# Floating-point dtypes whose bytes are the values. 8-bit floats are excluded: their values also
# depend on scales.
FLOAT_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})

# What ``file_bytes.decode`` reads.
DECODED = FLOAT_DTYPES | FLOAT8.keys()

# Longest name of a tensor; those of known models have up to 150 characters. Names are matched,
# sorted and printed.
MAX_NAME = 1000

# The bytes of 0.0 and -0.0 in every floating-point dtype (and of a few tiny numbers, such as 2^-126
# in bfloat16), and the number of bytes that are checked first.
ZERO, FIRST_BYTES = b"\0\x80", 4096


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, shape and dtype of a stored tensor.

    Args:
        name: Its name.
        shape: Its logical shape.
        dtype: The dtype in which it is read: torch's name (``bfloat16``), or the file's (``F4``) if
            torch has none.
        stored: The storage format (``nf4``, ``int8``, ``float8_e4m3fn``) if the values are
            dequantized on reading; None if the bytes in the file are the values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str | None = None

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


class TensorFile:
    """One open file of tensors, or a view of one; ``folder.FORMATS`` lists the formats of files.

    Reading raises ``InputError`` if a file cannot be read.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = {}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return a copy of the entries ``start:stop`` of a tensor (row-major, 1-D, dtype of
        ``tensors``).

        Raises:
            InputError: They cannot be read.
        """
        raise NotImplementedError

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of a small tensor; without torch where the format allows it."""
        import torch

        return self.read(name, 0, self.tensors[name].numel).view(torch.uint8).numpy().tobytes()

    def read_start(self, name: str, limit: int) -> bytes:
        """Return the first ``limit`` bytes of a tensor; all of them where the format does not read
        a part alone.
        """
        return self.read_bytes(name)

    def read_steps(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return steps whose half bounds the error of the entries ``start:stop``; None if not
        quantized.
        """
        return None

    def read_scales(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return the scales of the codes of the entries ``start:stop``, or None; see
        ``Checkpoint.read_scales``.
        """
        return None

    def decodes(self, name: str) -> bool:
        """Return whether ``read_arrays`` can read a tensor."""
        return False

    def read_range(self, name: str, start: int, stop: int) -> Numbers:
        """Return the entries ``start:stop`` of a tensor, float32 or float64; without torch where
        ``decodes`` is true.
        """
        return self.read(name, start, stop).double().numpy()

    def read_arrays(self, names: Sequence[str]) -> Numbers:
        """Return whole tensors of one shape and dtype as a stack, float32 or float64, without
        torch.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors of one file, or of the shards of a folder.

    Args:
        path: The path as given by the user.
        kind: Description of the format, such as ``sharded safetensors``.
        files: The open files; tensor names are unique across them.
        notes: Remarks on how the checkpoint was opened, such as dequantization or renamed tensors.
        config: Content of the weights' ``config.json``, or what a GGUF header gives of it; empty
            without one.
    """

    path: Path
    kind: str
    files: tuple[TensorFile, ...]
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    _file_by_name: dict[str, TensorFile] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Index the tensors by name.

        Raises:
            InputError: A name is too long.
        """
        object.__setattr__(
            self, "_file_by_name", {name: file for file in self.files for name in file.tensors}
        )
        if (longest := max(self._file_by_name, key=len, default="")) and len(longest) > MAX_NAME:
            path = self._file_by_name[longest].path
            raise InputError(
                f"{path}: a tensor's name has {len(longest):,} characters ({longest[:40]}…); "
                "rename it"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._file_by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_by_name)

    def __len__(self) -> int:
        return len(self._file_by_name)

    def __getitem__(self, name: str) -> TensorInfo:
        return self._file_by_name[name].tensors[name]

    def file_of(self, name: str) -> Path:
        """Return the file that holds a tensor; the folder if its parts are in several files."""
        return self._file_by_name[name].path

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of a small tensor, such as the settings of a quantizer.

        Raises:
            InputError: The file ended early or could not be read.
        """
        return self._file_by_name[name].read_bytes(name)

    def are_zero(self, names: Iterable[str]) -> Iterator[bool]:
        """Yield for each tensor whether all its entries are zero; remote files are requested
        concurrently.

        Entries with no other bytes than 0.0 and -0.0 count as zero: also some of at most 8e-6 in
        float16 and 2e-38 in the other floating-point dtypes of 16 to 64 bits.

        Raises:
            InputError: The file ended early or could not be read.
        """
        if isinstance(self.files[0].path, RemotePath):
            from lora_diag.storage.addresses import (
                map_concurrently,
            )  # imported only for remote files

            yield from map_concurrently(self._is_zero, names)
            return
        yield from map(self._is_zero, names)

    def _is_zero(self, name: str) -> bool:
        """Return whether a tensor has only bytes of 0.0 and -0.0; the first ones are read alone
        where possible.
        """
        file = self._file_by_name[name]
        return not (
            file.read_start(name, FIRST_BYTES).strip(ZERO) or file.read_bytes(name).strip(ZERO)
        )

    def decodes(self, name: str) -> bool:
        """Return whether ``read_arrays`` can read a tensor: its file and format need no torch."""
        return self._file_by_name[name].decodes(name)

    def read_array(self, name: str) -> Numbers:
        """Return a whole tensor for which ``decodes`` is true, in its shape; float64 if so stored,
        else float32.

        Raises:
            InputError: The file ended early or could not be read.
        """
        array: Numbers = self.read_arrays([name])[0]
        return array

    def read_arrays(self, names: Sequence[str]) -> Numbers:
        """Return whole tensors of one file, shape and dtype as a stack, otherwise like
        ``read_array``.

        Raises:
            InputError: The file ended early or could not be read.
        """
        return self._file_by_name[names[0]].read_arrays(names)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Read a range of a tensor's entries.

        Args:
            name: A name in this checkpoint.
            start: First entry, counted in row-major order.
            stop: One past the last entry; default all.

        Returns:
            A 1-D copy of ``stop - start`` entries in the dtype of its ``TensorInfo``.

        Raises:
            InputError: The file ended early or could not be read.
        """
        return self._file_by_name[name].read(
            name, start, self[name].numel if stop is None else stop
        )

    def read_range(self, name: str, start: int, stop: int) -> Numbers:
        """Return the entries ``start:stop`` of a tensor, float32 or float64; without torch where
        ``decodes`` is true.

        Raises:
            InputError: The file ended early or could not be read.
        """
        return self._file_by_name[name].read_range(name, start, stop)

    def read_each(self, name: str, spans: Iterable[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """Yield ranges of a tensor's entries in order; for a remote file, the next ranges are
        fetched in advance.

        Args:
            name: A name in this checkpoint.
            spans: First entry and one past the last of each range.

        Raises:
            InputError: The file ended early or could not be read.
        """
        file = self._file_by_name[name]
        if isinstance(file.path, RemotePath):
            from lora_diag.storage.addresses import READ_AHEAD, map_concurrently

            yield from map_concurrently(lambda span: file.read(name, *span), spans, READ_AHEAD)
            return
        for start, stop in spans:
            yield file.read(name, start, stop)

    def read_steps(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor | None:
        """Read the quantization steps of a range of a tensor's entries.

        Args:
            name: A name in this checkpoint.
            start: First entry, counted in row-major order.
            stop: One past the last entry; default all.

        Returns:
            1-D float32 tensor: steps whose half bounds the rounding error of each entry, mostly the
                distance to the
            next number that the storage format can represent there. None if the bytes in the file
                are the values
            (``stored`` is None); the step then follows from value and dtype.

        Raises:
            InputError: The file ended early or could not be read.
        """
        return self._file_by_name[name].read_steps(
            name, start, self[name].numel if stop is None else stop
        )

    def read_scales(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> torch.Tensor | None:
        """Read the scales that multiply the codes of a range of a tensor's entries: W = code ·
        scale.

        Args:
            name: A name in this checkpoint.
            start: First entry, counted in row-major order.
            stop: One past the last entry; default all.

        Returns:
            1-D float32 tensor; None unless the weight is stored as scaled FP8 or int8, or as GGUF's
                Q8_0.

        Raises:
            InputError: The file ended early or could not be read.
        """
        return self._file_by_name[name].read_scales(
            name, start, self[name].numel if stop is None else stop
        )
