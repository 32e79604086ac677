"""The ``torch.save`` format: ``pytorch_model.bin``, ``*.pt``, ``*.pth``, ``*.ckpt``.

Files are loaded with ``weights_only=True`` only: a file that needs code to be read is refused. A
zip file with entries that are compressed, or larger than the file, is refused before torch unpacks
them; so is a pickle that takes more memory than its length explains (``inert``), and afterwards a
tensor with more entries than its storage. Zip files are memory-mapped, and the pages of a range are
released after the range was copied, so that resident memory does not grow with the file. The legacy
format of torch < 1.6 cannot be mapped and is loaded whole, with a note.
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
import sys
import warnings
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.errors import InputError, damaged
from lora_diag.files import open_regular
from lora_diag.storage import inert
from lora_diag.storage.documents import check_unicode
from lora_diag.storage.parts import WRAPPERS, check_entries
from lora_diag.storage.remote import RemotePath
from lora_diag.storage.tensors import TensorFile, TensorInfo

if TYPE_CHECKING:
    import torch

ZIP = b"PK\x03\x04"
# First pickle of the legacy format.
MAGIC = 0x1950A86A20F9469CFC6C


class TorchFile(TensorFile):
    """A file written by ``torch.save`` that holds a state dict or a dictionary around one.

    Args:
        path: The file.

    Raises:
        InputError: The file cannot be read, is damaged, needs code to be read, or holds no tensors,
            or one that is sparse, larger than its storage or not named in valid Unicode.
    """

    label = "torch pickle"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._load()

    @staticmethod
    def matches(path: Path) -> bool:
        """Return whether this format claims the file: by its extension, or the first bytes of a zip
        or pickle.

        Raises:
            InputError: The path is not a regular file, or a remote file cannot be read.
            OSError: The file cannot be opened.
        """
        if path.suffix in {".bin", ".pt", ".pth", ".ckpt"}:
            return True
        with open_regular(path) as file:
            head = file.read(4)
        return head == ZIP or (len(head) > 1 and head[0] == 0x80 and head[1] in range(2, 6))

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return a copy of the entries ``start:stop`` of a tensor (row-major, stored dtype)."""
        tensor = self._state[name]
        out, storage = _copy_range(tensor, start, stop), tensor.untyped_storage()
        copied = storage.data_ptr(), storage.nbytes()
        if (
            tensor.is_contiguous()
        ):  # to release all of it after each range would take quadratic time
            copied = tensor.data_ptr() + start * tensor.itemsize, out.nbytes
        if self._mapped:
            _release_pages(*copied)
        return out

    def _load(self) -> None:
        """Load or map the file after checking it, and set tensors and notes."""
        import torch  # imported here, so that safetensors headers can be read without torch

        try:
            with open_regular(self.path) as file:
                self._mapped = file.read(4) == ZIP
            # A mapped file stays readable after its name is removed.
            remote = self.path.download_temporarily() if isinstance(self.path, RemotePath) else None
            with remote or nullcontext(self.path) as local, warnings.catch_warnings():
                (_check_archive if self._mapped else _check_legacy)(Path(local), self.path)
                warnings.simplefilter(
                    "ignore"
                )  # about pickle protocols: the file is refused or read below
                loaded = torch.load(local, map_location="cpu", weights_only=True, mmap=self._mapped)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from error
        except pickle.UnpicklingError as error:
            problem = "holds more than tensors, and reading it could run code"
            fix = (
                "save only the weights: safetensors.torch.save_file(model.state_dict(), "
                "'model.safetensors')"
            )
            raise damaged(self.path, problem, fix) from error
        except (
            Exception
        ) as error:  # torch raises many types on damaged files, down to a bare EOFError
            if isinstance(error, InputError):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"{self.path}: is not a readable torch file ({reason}); copy or save it again"
            ) from error
        self._state = _find_state_dict(loaded, self.path)
        if not self._mapped:
            self.notes = (f"{self.path.name} is in torch's legacy format and was loaded whole",)
        if isinstance(self.path, RemotePath):
            size = self.path.file_info().size
            self.notes += (
                f"{self.path.name} is a torch file and was downloaded whole, {size:,} bytes",
            )
        self.tensors = {
            name: TensorInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._state.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        """Drop the tensors: a copy in another process loads or maps the file itself."""
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self._load()


def _check_archive(file: Path, path: Path) -> None:
    """Refuse an archive that torch would unpack into more memory than the file has bytes.

    Args:
        file: The archive.
        path: The file, for messages.
    """
    with zipfile.ZipFile(file) as archive:
        check_entries(archive.infolist(), file.stat().st_size, path, path.name)
        for entry in archive.infolist():
            if entry.filename.endswith("data.pkl"):
                inert.load(archive.read(entry), path, entry.filename)


def _check_legacy(file: Path, path: Path) -> None:
    """Refuse a legacy file whose pickles take more memory than their length explains."""
    with file.open("rb") as content:
        # A magic number, version, machine, data and names of the storages; any other file is
        # refused by torch.
        if inert.load(content, path, "the first pickle") == MAGIC:
            for entry in ("version", "machine", "data", "list of storages"):
                inert.load(content, path, f"the {entry}")


def _find_state_dict(loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors by name, from a nested dictionary if the outer one has none."""
    import torch

    if isinstance(loaded, dict):
        tensors = {
            str(name): value.detach()
            for name, value in loaded.items()
            if isinstance(value, torch.Tensor)
        }
        if tensors:
            for name, value in tensors.items():
                if value.layout != torch.strided:
                    raise InputError(f"{path}: {name} is a sparse tensor; save it dense")
                if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                    raise InputError(
                        f"{path}: {name} has more entries than its storage; save it contiguous"
                    )
            check_unicode(tensors, path)
            return tensors
        for key in WRAPPERS:
            if isinstance(loaded.get(key), dict):
                return _find_state_dict(loaded[key], path)
    raise InputError(
        f"{path}: holds no named tensors (a {type(loaded).__name__}); save model.state_dict()"
    )


def _copy_range(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return a copy of the entries ``start:stop``; if they are not contiguous, copy only the rows
    that hold them.
    """
    while tensor.ndim > 1 and start < stop:
        width = max(1, tensor[0].numel())
        first, last = start // width, -(-stop // width)
        start, stop = start - first * width, stop - first * width
        if last - first > 1:
            return tensor[first:last].reshape(-1)[start:stop].clone()
        tensor = tensor[first]
    return tensor.reshape(-1)[start:stop].clone()


def _release_pages(address: int, size: int) -> None:
    """Release the memory-mapped pages inside a range of bytes; they can be read again."""
    if sys.platform == "win32":
        return
    page = mmap.PAGESIZE
    begin = -(-address // page) * page
    length = (address + size - begin) // page * page
    if length > 0:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_DONTNEED
        )
