"""All records of one run, in memory."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from lora_diag.files import RESULTS, write_whole
from lora_diag.records.base import LayerRecord, Record, WholeRecord
from lora_diag.records.run import AnyRecord, End, LeftOut, Run

L = TypeVar("L", bound=LayerRecord)
A = TypeVar("A", bound=Record)
W = TypeVar("W", bound=WholeRecord)


@dataclass(frozen=True)
class Results(Generic[L]):
    """All records of one run, in memory.

    Iterating gives the layers' records: one a layer for ``spectrum``, one a layer and adapter for ``residual``, one a
    layer, step and rank for ``overlap``.

    Attributes:
        run: What was asked of what.
        layers: The layers' records, in the order of BASE.
        left_out: Tensors without one.
        end: Totals; None if the run did not finish.
        whole: What is said of the run as a whole: an allocation's certificate, a gate's verdicts.
    """

    run: Run
    layers: tuple[L, ...]
    left_out: tuple[LeftOut, ...] = ()
    end: End | None = None
    whole: tuple[WholeRecord, ...] = ()

    def __iter__(self) -> Iterator[L]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: str) -> L:
        """Return the first record of a layer by its name.

        Raises:
            KeyError: No such layer was measured.
        """
        for record in self.layers:
            if record.layer == layer:
                return record
        raise KeyError(layer)

    @property
    def non_finite(self) -> tuple[LeftOut, ...]:
        """What could not be measured, because of an entry that is not a finite number."""
        return tuple(item for item in self.left_out if item.reason == "non_finite")

    @property
    def unmeasured(self) -> tuple[LeftOut, ...]:
        """What was asked for and could not be measured: entries that are not finite, or too little memory."""
        return tuple(item for item in self.left_out if item.reason in {"non_finite", "memory"})

    def whole_of(self, kind: type[W]) -> list[W]:
        """Return the records on the run as a whole that are of one kind."""
        return [record for record in self.whole if isinstance(record, kind)]

    def filter(self, layers: str) -> Results[L]:
        """Return the results of the layers whose name contains a match of a regular expression.

        What was left out is filtered alike, and the totals of ``end`` are those of what remains.
        """
        pattern = re.compile(layers)
        kept = tuple(record for record in self.layers if pattern.search(record.layer))
        left_out = tuple(record for record in self.left_out if pattern.search(record.layer))
        end = totals(kept, left_out) if self.end is not None else None
        return replace(self, layers=kept, left_out=left_out, end=end)

    def records(self) -> Iterator[AnyRecord]:
        """Yield every record in the order of the file."""
        yield self.run
        yield from self.layers
        yield from self.whole
        yield from self.left_out
        if self.end is not None:
            yield self.end

    def write(self, path: Path | str, overwrite: bool = False) -> None:
        """Write a results file: beside the target, then renamed over it.

        Args:
            path: The file; a finished run there is replaced.
            overwrite: Replace a file there that loradiag did not write.

        Raises:
            UsageError: A link, an unfinished run or another file is there.
            InputError: It cannot be written.
        """
        write_whole(Path(path), "".join(f"{line}\n" for line in lines_of(self.records())), RESULTS, overwrite)

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame``, one row a layer; ``energy.8``, ``rank_at.0.9`` and so on are columns.

        Raises:
            ImportError: pandas is not installed (``pip install loradiag[pandas]``).
        """
        import pandas as pd

        return pd.json_normalize([record.model_dump() for record in self.layers])


def totals(layers: Sequence[LayerRecord], left_out: Sequence[LeftOut]) -> End:
    """Return the last line of a finished run: counts, and the norms of ΔW and W_base over its layers."""
    by_name = {record.layer: record for record in layers}
    fro = [getattr(record, "fro", None) for record in by_name.values()]
    base_fro = [getattr(record, "base_fro", None) for record in by_name.values()]
    return End(layers=len(by_name), left_out=len(left_out), fro=_norm(fro), base_fro=_norm(base_fro))


def _norm(parts: Sequence[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return math.hypot(*known) if len(known) == len(parts) else None


def to_line(record: AnyRecord) -> str:
    """Return the record as one line of JSON, its kind first."""
    return record.model_dump_json(by_alias=True)


class Seal:
    """The SHA-256 of the lines of a results file, which its ``end`` record carries."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def copy(self) -> Seal:
        """Return another one to which the same lines were added."""
        other = Seal()
        other._hash = self._hash.copy()
        return other

    def add(self, line: bytes) -> None:
        """Add one line; how it ends does not count, so that a checkout with other line ends has the same hash."""
        self._hash.update(line.rstrip(b"\r\n") + b"\n")

    def sealed(self, record: A) -> A:
        """Return a record as it is written: an ``end`` record with the hash of what was added before."""
        if isinstance(record, End):
            return record.model_copy(update={"sha256": self.hexdigest()})
        return record

    def hexdigest(self) -> str:
        """Return the hash of the lines so far."""
        return self._hash.hexdigest()


def lines_of(records: Iterable[AnyRecord]) -> Iterator[str]:
    """Yield the lines of a results file; its last one carries the hash of those before it."""
    seal = Seal()
    for record in records:
        line = to_line(seal.sealed(record))
        seal.add(line.encode())
        yield line
