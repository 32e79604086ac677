"""The ``torch.save`` format: ``pytorch_model.bin``, ``*.pt``, ``*.pth``, ``*.ckpt``.

Files are loaded with ``weights_only=True`` only: a file that needs code to be read is refused. A zip file with entries
that are compressed, or larger than the file, is refused before torch unpacks them. Zip files are memory-mapped, and the
pages of a range are released after the range was copied, so that resident memory does not grow with the file. The
legacy format of torch < 1.6 cannot be mapped and is loaded whole, with a note.
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
import sys
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_diag.checkpoints.remote import RemotePath
from lora_diag.checkpoints.tensors import TensorInfo
from lora_diag.errors import InputError

if TYPE_CHECKING:
    import torch

ZIP = b"PK\x03\x04"
# Keys under which trainers store the weights in a larger dictionary.
WRAPPERS = ("state_dict", "model", "module", "model_state_dict")


class TorchFile:
    """A file written by ``torch.save`` that holds a state dict or a dictionary around one.

    Args:
        path: The file.

    Raises:
        InputError: The file is damaged, needs code to be read, or holds no tensors.
    """

    label = "torch pickle"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.notes: tuple[str, ...] = ()
        self._load()

    @staticmethod
    def matches(path: Path) -> bool:
        """Return whether this format claims the file: by its extension, or the first bytes of a zip or pickle."""
        if path.suffix in {".bin", ".pt", ".pth", ".ckpt"}:
            return True
        with path.open("rb") as file:
            head = file.read(4)
        return head == ZIP or (len(head) > 1 and head[0] == 0x80 and head[1] in range(2, 6))

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return a copy of the entries ``start:stop`` of a tensor (row-major, stored dtype)."""
        tensor = self._state[name]
        if not tensor.is_contiguous():
            return tensor.reshape(-1)[start:stop].clone()
        view = tensor.view(-1)[start:stop]
        out = view.clone()
        if self._mapped:
            _release_pages(view)
        return out

    def read_bytes(self, name: str) -> bytes:
        """Return the bytes of a small tensor."""
        import torch

        return self.read(name, 0, self.tensors[name].numel).view(torch.uint8).numpy().tobytes()

    def _load(self) -> None:
        import torch  # imported here, so that safetensors headers can be read without torch

        try:
            with self.path.open("rb") as file:
                self._mapped = file.read(4) == ZIP
            # A mapped file stays readable after its name is removed.
            whole = self.path.downloaded() if isinstance(self.path, RemotePath) else nullcontext(self.path)
            with whole as local, warnings.catch_warnings():
                if self._mapped:
                    _check_stored(Path(local), self.path)
                warnings.simplefilter("ignore")  # about pickle protocols: the file is refused or read below
                loaded = torch.load(local, map_location="cpu", weights_only=True, mmap=self._mapped)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read: {error.strerror}") from error
        except pickle.UnpicklingError as error:
            raise InputError(
                f"{self.path}: holds more than tensors, and reading it could run code; "
                "save only the weights: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
            ) from error
        except InputError:
            raise
        except Exception as error:  # torch raises many types on damaged files, down to a bare EOFError
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{self.path}: is not a readable torch file ({reason}); copy or save it again") from error
        self._state = _state_dict(loaded, self.path)
        self.metadata: Mapping[str, str] = {}
        if not self._mapped:
            self.notes = (f"{self.path.name} is in torch's legacy format and was loaded whole",)
        if isinstance(self.path, RemotePath):
            size = self.path.file_info().size
            self.notes += (f"{self.path.name} is a torch file and was downloaded whole, {size:,} bytes",)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in self._state.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        """Drop the mapped tensors: a copy in another process maps the file itself."""
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path = state["path"]
        self.notes = ()
        self._load()


def _check_stored(file: Path, path: Path) -> None:
    """Refuse an archive with entries larger than their place in the file, which torch would unpack into memory.

    Args:
        file: The archive.
        path: The path as given by the user.

    Raises:
        InputError: An entry is compressed, or the entries together are larger than the file.
        zipfile.BadZipFile: The file is not an archive.
    """
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED or part.compress_size != part.file_size:
            raise InputError(
                f"{path}: {part.filename} is compressed, which torch.save never does; "
                "write the file again with torch.save or safetensors"
            )
    total, size = sum(part.file_size for part in parts), file.stat().st_size
    if total > size:
        raise InputError(
            f"{path}: its entries claim {total:,} bytes, but the file has {size:,}; copy or download it again"
        )


def _state_dict(loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors by name, from a nested dictionary if the outer one has none."""
    import torch

    if isinstance(loaded, dict):
        tensors = {str(name): value.detach() for name, value in loaded.items() if isinstance(value, torch.Tensor)}
        if tensors:
            dense = {name: value for name, value in tensors.items() if value.layout == torch.strided}
            if len(dense) < len(tensors):
                raise InputError(f"{path}: {min(tensors.keys() - dense.keys())} is a sparse tensor; save it dense")
            try:
                "".join(dense).encode()
            except UnicodeEncodeError as error:  # a lone surrogate, which a results file cannot hold
                raise InputError(f"{path}: a tensor name is not valid Unicode ({error}); save it again") from error
            return dense
        for key in WRAPPERS:
            if isinstance(loaded.get(key), dict):
                return _state_dict(loaded[key], path)
    raise InputError(f"{path}: holds no named tensors (a {type(loaded).__name__}); save model.state_dict()")


def _release_pages(view: torch.Tensor) -> None:
    """Release the memory-mapped pages under ``view``; they can be read again."""
    if sys.platform == "win32":
        return
    page = mmap.PAGESIZE
    begin = -(-view.data_ptr() // page) * page
    length = (view.data_ptr() + view.numel() * view.element_size() - begin) // page * page
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
