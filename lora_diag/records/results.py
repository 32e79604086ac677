"""All records of one run, in memory."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from lora_diag.files import RESULTS, write_whole
from lora_diag.records.base import LayerRecord, WholeRecord
from lora_diag.records.run import AnyRecord, End, LeftOut, Run

L = TypeVar("L", bound=LayerRecord)


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
        write_whole(Path(path), "".join(f"{to_line(record)}\n" for record in self.records()), RESULTS, overwrite)

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
