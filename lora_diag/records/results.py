"""All records of one run in memory, the lines of its results file, and a description in five lines
for a prompt.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, Generic, SupportsIndex, TypeVar, overload

from lora_diag.errors import require, safe
from lora_diag.feature import load
from lora_diag.files import RESULTS, write_whole
from lora_diag.records.base import LayerRecord, Record, Shown, WholeRecord, pooled_value
from lora_diag.records.frames import record_columns, unify_types, value_columns
from lora_diag.records.names import short_names
from lora_diag.records.run import AnyRecord, End, LeftOut, Run

L = TypeVar("L", bound=LayerRecord)
A = TypeVar("A", bound=Record)
W = TypeVar("W", bound=WholeRecord)


@dataclass(frozen=True, repr=False)
class Results(Generic[L]):
    """All records of one run, in memory.

    Iteration yields the records of layers: one per layer for ``spectrum``, one per layer and
    adapter for ``residual``, one per layer, step and rank for ``overlap``.

    Attributes:
        run: The command, its inputs and settings.
        layers: The layers' records, in the order of the file.
        left_out: Skipped tensors.
        end: Totals; None if the run did not finish.
        whole: Records about the run as a whole: an allocation's certificate, a gate's verdicts.
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

    def __repr__(self) -> str:
        return text_of(self)

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the tables and the summary of the command."""
        shown: str = load("lora_diag.catalog:html_of")(self)
        return shown

    def plot(self, figure: str | None = None, **options: Any) -> Any:
        """Return a figure of the results, a ``matplotlib.figure.Figure`` that a notebook shows.

        Args:
            figure: Name of a figure, as for ``loradiag plot --figure``; None for the first that the
                records allow.
            **options: ``labels``, ``width``, ``by``, ``field``, ``rank`` and ``plain`` of
                ``lora_diag.plots.figure``.

        Raises:
            UsageError: There is no such figure, an option is invalid, or the records cannot be
                drawn.

        Example:
            >>> import lora_diag
            >>> base, tuned = "sample_checkpoints/base", "sample_checkpoints/full_ft"
            >>> results = lora_diag.spectrum(base, tuned, layers="o_proj")
            >>> results.plot("energy").axes[0].get_ylabel()
            'C(r)'
        """
        return load("lora_diag.plots.run:figure_of")(self, figure, **options)

    @overload
    def __getitem__(self, item: str | SupportsIndex) -> L: ...

    @overload
    def __getitem__(self, item: slice) -> Results[L]: ...

    def __getitem__(self, item: str | SupportsIndex | slice) -> L | Results[L]:
        """Return the first record of a layer, a record by index, or the results for a slice of the
        records.

        Args:
            item: A layer's name, with or without ``.weight``; an index, from the end if negative;
                or a slice, whose ``end`` has the totals of its records.

        Raises:
            KeyError: The layer was not measured; the message suggests similar names.
            IndexError: The index is out of range.

        Example:
            >>> import lora_diag
            >>> base, tuned = "sample_checkpoints/base", "sample_checkpoints/full_ft"
            >>> results = lora_diag.spectrum(base, tuned, layers="o_proj")
            >>> (
            ...     results[0].layer == results["model.layers.0.self_attn.o_proj"].layer,
            ...     len(results[:2]),
            ... )
            (True, 2)
        """
        if isinstance(item, slice):
            return self._keep_only(self.layers[item], self.left_out)
        if not isinstance(item, str):
            return self.layers[item]
        for name in (item, f"{item}.weight"):
            for record in self.layers:
                if record.layer == name:
                    return record
        raise KeyError(self._describe_unknown(item))

    def __contains__(self, item: object) -> bool:
        if isinstance(item, str):
            return any(record.layer in {item, f"{item}.weight"} for record in self.layers)
        return item in self.layers

    def _describe_unknown(self, name: str) -> str:
        """Return the message for a layer without records, with similar names."""
        names = list(dict.fromkeys(record.layer for record in self.layers))
        stems = list(dict.fromkeys(layer.removesuffix(".weight") for layer in names))
        stem = name.removesuffix(".weight")
        close = [short for short in stems if stem and stem in short][:3]
        close = close or get_close_matches(stem, stems)
        hint = f"there are {len(names)} layers"
        if close:
            hint = f"did you mean {', '.join(close)}?"
        return f"{name}: no record of this layer; {hint}"

    @property
    def non_finite(self) -> tuple[LeftOut, ...]:
        """Layers that could not be measured because an entry is not finite."""
        return tuple(item for item in self.left_out if item.reason == "non_finite")

    @property
    def unmeasured(self) -> tuple[LeftOut, ...]:
        """Layers or adapters that could not be measured: not finite, unreadable, or too little
        memory.
        """
        return tuple(
            item for item in self.left_out if item.reason in {"non_finite", "memory", "unreadable"}
        )

    def whole_of(self, kind: type[W]) -> list[W]:
        """Return the records of one kind about the run as a whole."""
        return [record for record in self.whole if isinstance(record, kind)]

    def filter(self, layers: str) -> Results[L]:
        """Return the results of the layers whose name contains a match of a regular expression.

        Skipped tensors are filtered in the same way, and ``end`` has the totals of the remaining
        records. Records about the run as a whole are kept.

        Raises:
            re.error: The regular expression is invalid.
        """
        pattern = re.compile(layers)
        kept = tuple(record for record in self.layers if pattern.search(record.layer))
        left_out = tuple(record for record in self.left_out if pattern.search(record.layer))
        return self._keep_only(kept, left_out)

    def _keep_only(self, layers: tuple[L, ...], left_out: tuple[LeftOut, ...]) -> Results[L]:
        """Return the results with only these layers and skipped tensors, and their totals if the
        run is finished.
        """
        end = totals(layers, left_out) if self.end is not None else None
        return replace(self, layers=layers, left_out=left_out, end=end)

    def records(self) -> Iterator[AnyRecord]:
        """Yield every record: the run, layers, the run as a whole, skipped tensors, the end; the
        order of ``write``.
        """
        yield self.run
        yield from self.layers
        yield from self.whole
        yield from self.left_out
        if self.end is not None:
            yield self.end

    def write(self, path: Path | str, overwrite: bool = False) -> None:
        """Write a results file atomically.

        Args:
            path: The file; a finished run there is replaced.
            overwrite: Replace an existing file that loradiag did not write.

        Raises:
            UsageError: The path is a link, an unfinished run, or a file that may not be replaced.
            InputError: It cannot be written, or the existing file cannot be read.
        """
        text = "".join(f"{line}\n" for line in lines_of(self.records()))
        write_whole(Path(path), text, RESULTS, overwrite)

    def columns(self, values: bool = False, kind: str | None = None) -> dict[str, list[Any]]:
        """Return a tidy table of the records by columns, for any data frame library.

        One row per record, one value per cell: ``energy.8``, ``rank_at.0.9`` and so on are columns;
        ``module_type``, ``block``, ``relative`` (‖ΔW‖_F / ‖W_base‖_F) and ``adapter_name`` are
        computed. Several words are one cell, but lists of numbers or records, such as singular
        values, are none: with ``values`` each of their entries is a row.

        Args:
            values: Return the entries of lists, one row each: ``field`` (``s``), ``index`` from 1
                on, and ``value``, or ``text`` for words.
            kind: Only the records of a kind, such as ``spectrum``, ``certificate`` or ``left_out``;
                default those of layers, or without layers those about the whole run (a probe's
                losses, a gate's verdicts).

        Example:
            >>> import lora_diag
            >>> base, tuned = "sample_checkpoints/base", "sample_checkpoints/full_ft"
            >>> results = lora_diag.spectrum(base, tuned, layers="o_proj")
            >>> table = results.columns()
            >>> table["block"], table["energy.8"] == [record.energy["8"] for record in results]
            ([0, 1, 2, 3], True)
        """
        records: Sequence[Record] = self.layers or self.whole
        if kind is not None:
            all_records: tuple[Any, ...] = (*self.layers, *self.whole, *self.left_out)
            records = [record for record in all_records if record.record == kind]
        make = value_columns if values else record_columns
        return make(
            ((record, {}) for record in records),
            short_names(run_input.path for run_input in self.run.inputs),
        )

    def to_pandas(self, values: bool = False, kind: str | None = None) -> Any:
        """Return ``columns`` as a ``pandas.DataFrame``; integer columns with missing values are
        ``Int64``.

        Raises:
            UsageError: pandas is not installed (extra ``pandas``).
        """
        with require("Results.to_pandas()", "pandas"):
            import pandas as pd

        table = self.columns(values, kind)
        for name, column in table.items():
            if {int, NoneType} == set(map(type, column)):
                table[name] = pd.array(column, dtype="Int64")
        return pd.DataFrame(table)

    def to_arrow(self, values: bool = False, kind: str | None = None) -> Any:
        """Return ``columns`` as a ``pyarrow.Table``, which other libraries read without a copy.

        Raises:
            UsageError: pyarrow is not installed (extra ``arrow``).
        """
        with require("Results.to_arrow()", "arrow"):
            import pyarrow as pa

        return pa.table(unify_types(self.columns(values, kind)))

    def to_polars(self, values: bool = False, kind: str | None = None) -> Any:
        """Return ``columns`` as a ``polars.DataFrame``.

        Raises:
            UsageError: polars or pyarrow (extra ``arrow``) is not installed.
        """
        with require("Results.to_polars()", "arrow", "polars"):
            import polars as pl

        return pl.from_arrow(self.to_arrow(values, kind))


def totals(layers: Sequence[LayerRecord], left_out: Sequence[LeftOut]) -> End:
    """Return the last line of a finished run: counts, and the norms of ΔW and W_base over its
    layers.
    """
    by_name = {record.layer: record for record in layers}
    fro = [getattr(record, "fro", None) for record in by_name.values()]
    base_fro = [getattr(record, "base_fro", None) for record in by_name.values()]
    return End(
        layers=len(by_name),
        left_out=len(left_out),
        fro=_pool_norm(fro),
        base_fro=_pool_norm(base_fro),
    )


def _pool_norm(norms: Sequence[float | None]) -> float | None:
    """Return the root of the sum of squares; None if a norm is unknown or the root is beyond
    float64.
    """
    known = [part for part in norms if part is not None]
    pooled = math.hypot(*known) if len(known) == len(norms) else math.inf
    return pooled if math.isfinite(pooled) else None


def to_line(record: AnyRecord) -> str:
    """Return the record as one line of JSON, its kind first."""
    return record.model_dump_json(by_alias=True)


class Seal:
    """The SHA-256 of the lines of a results file, stored in its ``end`` record."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def copy(self) -> Seal:
        """Return a copy in the same state."""
        duplicate = Seal()
        duplicate._hash = self._hash.copy()
        return duplicate

    def add(self, line: bytes) -> None:
        """Add one line; line endings are ignored, so that a checkout with other line endings has
        the same hash.
        """
        self._hash.update(line.rstrip(b"\r\n") + b"\n")

    def add_hash(self, record: A) -> A:
        """Return a record as written: an ``end`` record gets the hash of the lines before it,
        others are unchanged.
        """
        if isinstance(record, End):
            return record.model_copy(update={"sha256": self.hexdigest()})
        return record

    def hexdigest(self) -> str:
        """Return the hash of the lines so far."""
        return self._hash.hexdigest()


def lines_of(records: Iterable[AnyRecord]) -> Iterator[str]:
    """Yield the lines of a results file; an ``end`` record has the hash of the lines before it."""
    seal = Seal()
    for record in records:
        line = to_line(seal.add_hash(record))
        seal.add(line.encode())
        yield line


# Maximum number of inputs that are named.
_MAX_INPUTS = 4


def text_of(results: Results[Any]) -> str:
    """Return a description of results in at most five lines."""
    records = (*results.layers, *results.whole)
    inputs = [
        f"{safe(run_input.role)} {safe(run_input.path)}".strip() for run_input in results.run.inputs
    ]
    if len(inputs) > _MAX_INPUTS:
        inputs[_MAX_INPUTS:] = [f"and {len(inputs) - _MAX_INPUTS} more"]
    layers = len(
        {record.layer for record in results.layers if "layer" in type(record).model_fields}
    )
    kinds = _count_words(record.record for record in records) or "none"
    properties = {
        "inputs": ", ".join(inputs) or "none",
        "records": f"{kinds} of {layers} layers" if layers else kinds,
        "left out": _count_words(item.reason.replace("_", " ") for item in results.left_out),
        "measured": _describe_main_value(results.run.settings, records),
    }
    finished = "finished" if results.end is not None else "unfinished"
    title = f"Results of loradiag {safe(results.run.command)}, {finished}"
    return "\n".join(
        [title, *(f"  {label:<9} {text}" for label, text in properties.items() if text)]
    )


def _count_words(words: Iterable[str]) -> str:
    return ", ".join(f"{count} {safe(word)}" for word, count in Counter(words).items())


def _describe_main_value(settings: Mapping[str, Any], records: Sequence[Any]) -> str | None:
    """Return the range of the first main value, such as ``ε 0.5 to 0.9, pooled 0.7, 30 records``,
    or frequent words.

    None without a main value.
    """
    kinds: Iterable[type[Any]] = dict.fromkeys(map(type, records))
    for kind in kinds:
        own = [record for record in records if type(record) is kind]
        all_shown = kind.shown_of(settings, own) if issubclass(kind, LayerRecord) else kind.shown
        if shown := next((field for field in all_shown if field.main), None):
            return _describe_range(shown, own)
    return None


def _describe_range(shown: Shown, records: Sequence[Any]) -> str | None:
    """Return the range and the pooled value, or the most frequent words; None without values."""
    values = [value for record in records if (value := shown.value(record)) is not None]
    whole = pooled_value(shown, records)
    if not values or whole is None:
        return None
    if any(isinstance(value, str) for value in values):
        counts = Counter(map(str, values)).most_common(4)
        return f"{shown.title} " + ", ".join(f"{safe(word)} {count}" for word, count in counts)
    low, high, middle = (_format_value(shown, value) for value in (min(values), max(values), whole))
    how = "median" if shown.pool is None else "pooled"
    return f"{shown.title} {low} to {high}, {how} {middle}, {len(values)} records"


def _format_value(shown: Shown, value: float | int | str) -> str:
    """Return a value in four digits; a fraction below 1 is not rounded up to 1."""
    if isinstance(value, float):
        return f"{min(value, 0.9999) if shown.share and value < 1 else value:.4g}"
    return safe(str(value)).removesuffix(".weight")
