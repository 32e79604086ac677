"""The output folder of ``extract``, written next to its target and renamed when complete.

Until then, ``NAME.part`` holds the records so far and one file of factors per layer, so that an interrupted extraction
resumes after the last layer. The model card is written last and marks a complete adapter. Files that this command did
not write are never removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from lora_diag.adapters.layouts import LAYOUTS
from lora_diag.errors import InputError, UsageError
from lora_diag.files import check_folder_of, lock, sync, write_whole

WEIGHTS, CONFIG, CARD, RECORDS = "adapter_model.safetensors", "adapter_config.json", "README.md", "extraction.jsonl"
FACTORS, SPECTRA = "factors", "spectra.jsonl"
OWN_FILES = frozenset({WEIGHTS, CONFIG, CARD, RECORDS, *(layout.file for layout in LAYOUTS.values())})


class OutputFolder:
    """The folder of one extraction; a subclass names the files of another command.

    Args:
        final: Path of the adapter.
        inputs: Input paths.
        overwrite: Whether an existing adapter may be replaced.
        resume: Whether to resume an interrupted extraction.

    A folder that still has its factors is not complete: a time limit left layers out. Resuming turns it back into
    ``NAME.part``.

    Attributes:
        finished: The adapter is complete at its final path: only its records remain to be reported.
        whole: All files are written, possibly not yet at their final path.

    Raises:
        UsageError: The path exists and may not be replaced.
        InputError: The folder cannot be created.
    """

    records_name: ClassVar[str] = RECORDS
    own_files: ClassVar[frozenset[str]] = OWN_FILES
    description: ClassVar[str] = "an extraction"

    def __init__(self, final: Path, inputs: Sequence[Path | str], overwrite: bool, resume: bool) -> None:
        check_folder_of(final)
        self.final = Path(os.path.realpath(final))
        self.work = self.final.with_name(f"{self.final.name}.part")
        for path in (final, self.work, self.work / FACTORS):
            if path.is_symlink():
                raise UsageError(f"{path}: is a symbolic link, which is not followed; give the folder itself")
        self._overwrite, self._resume = overwrite, resume
        self.finished = (
            resume and not overwrite and not self.work.exists() and (self.final / self.records_name).is_file()
        )
        self._reopened = self.finished and (self.final / FACTORS).is_dir()
        self.finished = self.finished and not self._reopened
        if self.finished:
            self.work = self.final
        self.whole = resume and (self.work / CARD).is_file() and (self.work / self.records_name).is_file()
        if any(os.path.realpath(path) == str(self.final) for path in inputs):
            raise UsageError(f"{final}: is an input; choose another folder for -o")
        self._check_final()
        if self.work.exists() and not resume:
            if not overwrite:
                self._refuse_running()
                raise UsageError(
                    f"{self.work}: holds {self.description} that did not finish; continue it with --resume, or delete "
                    "it"
                )
            self._check_ours(self.work)

    def _refuse_running(self) -> None:
        """Refuse a folder that another process is writing, which must not be deleted.

        Raises:
            UsageError: Another process holds the lock of one of its files.
        """
        for file in filter(Path.exists, (self.records, self.spectra)):
            os.close(lock(file))

    def _check_final(self) -> None:
        if not self.final.exists():
            return
        if not self.final.is_dir():
            raise UsageError(f"{self.final}: is a file; give -o a folder for the adapter")
        if any(self.final.iterdir()) and not (self.finished or self._reopened):
            self._check_ours(self.final)
            if not self._overwrite:
                raise UsageError(f"{self.final}: is not empty; choose another folder, or replace it with --overwrite")

    def _check_ours(self, folder: Path) -> None:
        """Refuse to replace a folder that this command did not write, or that has other files in it.

        A trained adapter has files of the same names, but no records and no factors by layer.
        """
        names = {path.name for path in folder.iterdir()}
        if not names & {self.records_name, FACTORS}:
            raise UsageError(f"{folder}: is not {self.description}, so it is not replaced; choose another folder")
        if foreign := sorted(names - self.own_files - {FACTORS, SPECTRA, f"{self.records_name}.part"}):
            raise UsageError(
                f"{folder}: holds {foreign[0]}, which is not a file of {self.description}; choose another folder"
            )

    @property
    def records(self) -> Path:
        """The results file while the folder is incomplete."""
        return self.work / self.records_name

    @property
    def spectra(self) -> Path:
        """The file of spectra for a budget, while the folder is incomplete."""
        return self.work / SPECTRA

    def factors(self, index: int) -> Path:
        """Return the file for the factors of one layer."""
        return self.work / FACTORS / f"{index:06d}.safetensors"

    def open(self) -> None:
        """Create the folder next to the target, or keep the one to resume: a target that is not complete is moved back.

        A folder there that is not resumed is deleted first.

        Raises:
            UsageError: Another process is writing the folder.
            InputError: The folder cannot be created.
        """
        if self.whole:
            return
        try:
            if self._reopened:
                (self.final / CARD).unlink(missing_ok=True)
                self.final.rename(self.work)
            if self.work.exists() and not self._resume:
                self._refuse_running()
                shutil.rmtree(self.work)
            self._resume = True
            (self.work / FACTORS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.work}: cannot be written: {error.strerror}") from error

    def discard(self) -> None:
        """Remove the folder next to the target."""
        shutil.rmtree(self.work, ignore_errors=True)

    def finish(self, card: str, complete: bool = True) -> None:
        """Move the finished folder to its target, without the files needed only for resuming.

        Args:
            card: Text of the model card.
            complete: Whether no layer is left to measure; else the factors of layers are kept, for a resumed run.

        Raises:
            InputError: The folder cannot be moved.
        """
        if self.finished:
            return
        backup = self.final.with_name(f".{self.final.name}.{os.getpid()}")
        try:
            write_whole(self.work / CARD, card)
            if complete:
                shutil.rmtree(self.work / FACTORS, ignore_errors=True)
            self.spectra.unlink(missing_ok=True)
            for name in self.own_files:
                for leftover in self.work.glob(f".{name}.[0-9]*"):
                    leftover.unlink()  # half-written when an earlier process was killed (files.replacing)
            if self.final.exists():
                self.final.rename(backup)
            self.work.rename(self.final)
            sync(self.final.parent)
        except OSError as error:
            if backup.exists() and not self.final.exists():
                backup.rename(self.final)
            raise InputError(
                f"{self.final}: cannot be written: {error.strerror}; the adapter is in {self.work}"
            ) from error
        shutil.rmtree(backup, ignore_errors=True)


def check_output_folder(final: Path, overwrite: bool, resume: bool) -> None:
    """Refuse an output folder before any work.

    Raises:
        UsageError: As ``OutputFolder``.
    """
    OutputFolder(final, (), overwrite, resume)
