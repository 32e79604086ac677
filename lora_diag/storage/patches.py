"""Sparse patches: the entries of a model that a training step changed, read as the whole model over
BASE.

``NAME.indices`` are positions of changed entries in row-major order, and ``NAME.values`` their new
values. Tensors that a patch does not name are those of BASE. The metadata has ``sparse`` and, in
patches of a run, ``model_version``; each then changes the version before it, so a folder of them is
applied in that order.

Reference: Hugging Face, Delta weight sync (May 2026), sections 4.1 and 4.3: an announced layout. No
library has released a writer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_diag.errors import InputError, damaged
from lora_diag.storage.locating import Located
from lora_diag.storage.reading import open_checkpoint, read_checkpoint
from lora_diag.storage.tensors import FLOAT_DTYPES, Checkpoint, TensorFile, TensorInfo

if TYPE_CHECKING:
    import torch

INDICES, VALUES = ".indices", ".values"
INTEGERS = frozenset({"int32", "int64"})


class PatchedFile(TensorFile):
    """A patch over a checkpoint, presented as one file of whole tensors.

    Args:
        base: The checkpoint that the patch changes.
        patch: The patch as stored.
        path: The file or folder that holds all patches.

    Raises:
        InputError: The patch is incomplete, holds another tensor, or does not fit the checkpoint.
    """

    def __init__(self, base: Checkpoint, patch: Checkpoint, path: Path) -> None:
        self._base, self._patch, self.path = base, patch, path
        self._file = patch.files[0].path
        self.metadata = patch.files[0].metadata
        changed = [name.removesuffix(INDICES) for name in patch if name.endswith(INDICES)]
        for name in changed:
            self._check_change(name)
        self._changed = frozenset(changed)
        if unknown := [
            n for n in patch if n.removesuffix(INDICES).removesuffix(VALUES) not in self._changed
        ]:
            raise InputError(
                f"{self._file}: {min(unknown)} is neither indices nor values of a patch; write it "
                "again"
            )
        self.tensors = {name: self._describe_tensor(name) for name in base}
        self.notes = (
            f"a sparse patch: {len(changed)} tensors with changed entries, the others are those of "
            "BASE",
        )

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return a copy of the entries ``start:stop`` of a tensor (row-major)."""
        import torch

        values = self._base.read(name, start, stop)
        if name not in self._changed:
            return values
        values = values.to(getattr(torch, self.tensors[name].dtype))
        positions, inside = self._locate_changes(name, start, stop)
        values[positions[inside] - start] = self._patch.read(f"{name}{VALUES}")[inside].to(
            values.dtype
        )
        return values

    def read_steps(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return steps whose half bounds the error of the entries ``start:stop``; None if not
        quantized.
        """
        return self._base.read_steps(name, start, stop)

    def read_scales(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Return the scales of the codes of the entries ``start:stop``, or None; see
        ``Checkpoint.read_scales``.
        """
        return self._base.read_scales(name, start, stop)

    def _locate_changes(
        self, name: str, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the changed positions of a tensor, and which of them are in a range.

        Raises:
            InputError: A position is outside the tensor, or occurs twice.
        """
        positions, numel = self._patch.read(f"{name}{INDICES}").long(), self.tensors[name].numel
        ordered = positions.sort().values
        for wrong, problem in (
            (ordered[(ordered < 0) | (ordered >= numel)], f"of {numel:,}"),
            (ordered[1:][ordered[1:] == ordered[:-1]], "twice"),
        ):
            if len(wrong):
                raise damaged(
                    self._file,
                    f"{name}{INDICES} names entry {wrong[0]} {problem}",
                    "write the patch again",
                )
        return positions, (positions >= start) & (positions < stop)

    def _check_change(self, name: str) -> None:
        """Refuse a change of a tensor that is incomplete, or does not fit BASE."""
        values, indices = f"{name}{VALUES}", f"{name}{INDICES}"
        if name not in self._base:
            raise InputError(
                f"{self._file}: changes {name}, which BASE {self._base.path} lacks; give its own "
                "base"
            )
        if values not in self._patch:
            raise InputError(f"{self._file}: {values} is missing; write the patch again")
        of_indices, of_values = self._patch[indices], self._patch[values]
        if (
            len(of_indices.shape) != 1
            or of_indices.shape != of_values.shape
            or of_indices.dtype not in INTEGERS
        ):
            problem = (
                f"{indices} is {of_indices.dtype} {list(of_indices.shape)}, and {values} "
                f"{list(of_values.shape)}"
            )
            raise damaged(
                self._file, problem, "both must be vectors of one length, of integers and floats"
            )
        base_info = self._base[name]
        if base_info.stored is not None or not {base_info.dtype, of_values.dtype} <= FLOAT_DTYPES:
            kind = base_info.stored or base_info.dtype
            problem = f"changes {name} by {of_values.dtype} values, which BASE stores as {kind}"
            raise damaged(self._file, problem, "patches are read over plain floating-point weights")

    def _describe_tensor(self, name: str) -> TensorInfo:
        """Return the description of a tensor; its dtype holds the values of BASE and those of the
        patch exactly.
        """
        info = self._base[name]
        if name not in self._changed:
            return info
        dtypes = {info.dtype, self._patch[f"{name}{VALUES}"].dtype}
        dtype = info.dtype
        if len(dtypes) > 1:
            dtype = "float64" if "float64" in dtypes else "float32"
        return TensorInfo(name, info.shape, dtype)


def is_patch(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint is a sparse patch: by its metadata, or if it has only indices and
    values.
    """
    names = list(checkpoint)
    if any(file.metadata.get("sparse", "").lower() == "true" for file in checkpoint.files):
        return True
    return all(name.endswith((INDICES, VALUES)) for name in names) and any(
        name.endswith(INDICES) for name in names
    )


def open_tuned(located: Located, base: Checkpoint) -> Checkpoint:
    """Open TUNED: a checkpoint, or sparse patches over BASE.

    Args:
        located: A checkpoint, a patch, or a folder of patches.
        base: BASE.

    Returns:
        TUNED, with whole tensors.
    """
    path = located.path
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    is_single = len(files) < 2 or any(
        (path / name).exists() for name in ("model.safetensors", "config.json")
    )
    opened = [] if is_single else [open_checkpoint(file) for file in files]
    if not opened or not all(map(is_patch, opened)):
        opened = [read_checkpoint(located)]
        if not is_patch(opened[0]):
            return opened[0]
    checkpoint, many = base, len(opened) > 1
    applied = f"{len(opened)} sparse patches, applied in the order of model_version"
    for patch in sorted(opened, key=_make_sort_key):
        file = PatchedFile(checkpoint, patch, path if many else patch.files[0].path)
        kind, notes = ("sparse patches", (applied,)) if many else ("sparse patch", file.notes)
        checkpoint = Checkpoint(path, kind, (file,), notes, base.config)
    return checkpoint


def _make_sort_key(patch: Checkpoint) -> tuple[int, str]:
    """Return a sort key: the version of a patch, 0 without a valid one, then the name
    of its file.
    """
    version = patch.files[0].metadata.get("model_version", "")
    is_number = version.isascii() and version.isdecimal() and len(version) < 20
    return int(version) if is_number else 0, patch.files[0].path.name
