"""Records → a tidy table by columns: one row per record, one value per cell.

Fields of a record in a record, and the entries of a table, are columns with dotted names
(``energy.8``, ``resolution.verdict``); those of a field with a fixed number of entries are numbered
(``shape.0``). Lists of numbers or records are not cells: their entries are rows of a separate table
of values.

Further columns are derived from the fields: ``module_type`` and ``block`` from ``layer``,
``relative`` = ``fro`` / ``base_fro``, and the short name of every field that holds the path of an
input (``adapter_name``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from lora_diag.records.base import Record
from lora_diag.records.names import depth_of, module_type_of

Columns = dict[str, list[Any]]

# Separator of several words in one cell.
_SEPARATOR = "; "

# Leading columns that identify a record, including nested ones.
_LEADING_COLUMNS = ("record", "layer")

# Columns that identify a row of values, besides the key fields.
_IDENTIFYING_COLUMNS = {"results", "record", "module_type", "block", "adapter", "adapter_name"}


def record_columns(
    records: Iterable[tuple[Record, Mapping[str, Any]]],
    label_by_path: Mapping[str, str] | None = None,
) -> Columns:
    """Return a table with one row per record; missing values are None.

    Args:
        records: Records, each with leading cells.
        label_by_path: Labels of the paths of inputs; None for no columns of labels.
    """
    return _join_blocks(
        ({**first, **_make_row(record, label_by_path or {})}, {}) for record, first in records
    )


def value_columns(
    records: Iterable[tuple[Record, Mapping[str, Any]]],
    label_by_path: Mapping[str, str] | None = None,
) -> Columns:
    """Return a table with one row per entry of lists: ``field``, ``index`` from 1 on, and ``value``
    or ``text``.

    Entries of tables whose keys are layers have a ``layer`` and no index.

    Args:
        records: Records, each with leading cells.
        label_by_path: Labels of the paths of inputs; None for no columns of labels.
    """
    return _join_blocks(
        block
        for record, first in records
        for block in _make_value_rows(record, first, label_by_path or {})
    )


def unify_types(columns: Columns) -> Columns:
    """Return columns of one type each, as required by Arrow: strings if numbers and words are
    mixed.

    >>> unify_types({"measured": [0.5, None, "unresolved"], "rank": [8, 16]})
    {'measured': ['0.5', None, 'unresolved'], 'rank': [8, 16]}
    """
    return {
        name: [None if value is None else str(value) for value in column]
        if len({isinstance(value, str) for value in column if value is not None}) > 1
        else column
        for name, column in columns.items()
    }


def _join_blocks(blocks: Iterable[tuple[Mapping[str, Any], Mapping[str, list[Any]]]]) -> Columns:
    """Return the columns of blocks of rows; a block has cells common to its rows, and lists with a
    cell per row.
    """
    columns: Columns = {}
    rows = 0
    for cells, lists in blocks:
        size = len(next(iter(lists.values()))) if lists else 1
        for name, values in (
            *((name, [value] * size) for name, value in cells.items()),
            *lists.items(),
        ):
            column = columns.setdefault(name, [])
            column += [None] * (rows - len(column))
            column += values
        rows += size
    for column in columns.values():
        column += [None] * (rows - len(column))
    return columns


def _make_row(record: Record, label_by_path: Mapping[str, str]) -> dict[str, Any]:
    """Return the cells of a record and the cells derived from them."""
    row: dict[str, Any] = {}
    for name, value in _iterate_cells(record):
        if value is None and name in row:  # a probe of one layer has no separate module type
            continue
        paths = value if isinstance(value, tuple) else (value,)
        row[name] = _SEPARATOR.join(value) if isinstance(value, tuple) else value
        if name == "layer":
            row |= _make_layer_cells(value)
        elif name in {"fro", "base_fro"} and {"fro", "base_fro"} <= row.keys():
            row["relative"] = (
                row["fro"] / row["base_fro"] if row["fro"] is not None and row["base_fro"] else None
            )
        elif paths and all(isinstance(path, str) and path in label_by_path for path in paths):
            # Probes name an adapter ``name``, other records ``adapter``: one common column to join
            # them.
            column = "adapter" if name == "name" else name
            row[f"{column}_name"] = _SEPARATOR.join(label_by_path[path] for path in paths)
    return row


def _make_layer_cells(layer: str | None) -> dict[str, Any]:
    """Return the module type and the block of a layer; both None for a record of no layer."""
    if layer is None:
        return {"module_type": None, "block": None}
    return {"module_type": module_type_of(layer), "block": depth_of(layer)}


def _walk(record: Record, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Yield the dotted name, the value and the layout of each field, and of those in records and
    tables.
    """
    for name, form in _classify_fields(type(record)).items():
        if name not in record.long and not (prefix and name in _LEADING_COLUMNS):
            yield from _walk_value(f"{prefix}{name}", getattr(record, name), form)


def _walk_value(name: str, value: Any, form: str) -> Iterator[tuple[str, Any, str]]:
    """Yield a value, or those in a record, a table or a list of fixed length, as ``_walk``."""
    if isinstance(value, Record):
        yield from _walk(value, f"{name}.")
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _walk_value(f"{name}.{key}", entry, form)
    elif isinstance(value, tuple | list) and (
        form == "fixed" or name.rpartition(".")[2] in {"shape", "tuned_shape"}
    ):
        yield from ((f"{name}.{place}", entry, "scalar") for place, entry in enumerate(value))
    else:
        yield name, value, form


def _iterate_cells(record: Record) -> Iterator[tuple[str, Any]]:
    """Yield the cells of a record, several words as a tuple; other lists are omitted."""
    for name, value, form in _walk(record):
        if isinstance(value, tuple | list):
            if value and all(isinstance(entry, str) for entry in value):
                yield name, tuple(value)
        elif value is not None or form == "scalar":
            yield name, value


def _make_value_rows(
    record: Record, first: Mapping[str, Any], label_by_path: Mapping[str, str]
) -> Iterator[tuple[dict[str, Any], dict[str, list[Any]]]]:
    """Yield a block of rows for each list of a record: the cells common to its rows, and the
    columns of entries.
    """
    identifying = _IDENTIFYING_COLUMNS | set(record.key) | {f"{name}_name" for name in record.key}
    row = {
        **first,
        **{
            name: value
            for name, value in _make_row(record, label_by_path).items()
            if name in identifying
        },
    }
    for name, layer, entries in _iterate_lists(record):
        layer_values = {} if layer is None else {"layer": layer, **_make_layer_cells(layer)}
        index = [None] if layer is not None else list(range(1, len(entries) + 1))
        is_text = all(isinstance(entry, str) for entry in entries)
        yield (
            {**row, **layer_values, "field": name},
            {"index": index, "text" if is_text else "value": entries},
        )


def _iterate_lists(record: Record) -> Iterator[tuple[str, str | None, list[Any]]]:
    """Yield each list of a record: its name, the layer of a nested record, and its entries."""
    for name in record.long:
        for layer, entry in getattr(record, name).items():
            yield from ((f"{name}.{field}", layer, [cell]) for field, cell in _iterate_cells(entry))
    for name, value, _ in _walk(record):
        if not isinstance(value, tuple | list) or not value:
            continue
        if all(isinstance(entry, Record) for entry in value):
            columns = _join_blocks((dict(_iterate_cells(entry)), {}) for entry in value)
            yield from ((f"{name}.{field}", None, entries) for field, entries in columns.items())
        elif all(entry is None or isinstance(entry, float | int) for entry in value):
            yield name, None, list(value)


@cache
def _classify_fields(kind: type[Record]) -> dict[str, str]:
    """Return the layout of each field of a kind of record; for a table, that of its entries."""
    fields = kind.model_fields
    order = [
        *(name for name in _LEADING_COLUMNS if name in fields),
        *(name for name in fields if name not in _LEADING_COLUMNS),
    ]
    return {name: _classify(fields[name].annotation) for name in order}


def _classify(annotation: Any) -> str:
    """Return ``scalar``, ``record``, ``fixed`` for a fixed number of entries, or ``list`` for any
    number.

    >>> [
    ...     _classify(kind)
    ...     for kind in (
    ...         float | None,
    ...         tuple[int, int] | None,
    ...         tuple[float, ...],
    ...         dict[str, float | None],
    ...     )
    ... ]
    ['scalar', 'fixed', 'list', 'scalar']
    """
    for option in _iterate_types(annotation):
        origin, inner = get_origin(option), get_args(option)
        if origin is dict:
            return _classify(inner[1])
        if origin is tuple:
            return "list" if Ellipsis in inner else "fixed"
        if origin is list:
            return "list"
        if isinstance(option, type) and issubclass(option, Record):
            return "record"
    return "scalar"


def _iterate_types(annotation: Any) -> Iterator[Any]:
    """Yield the types of a value, except None."""
    if get_origin(annotation) is Annotated:
        yield from _iterate_types(get_args(annotation)[0])
    elif get_origin(annotation) in {Union, UnionType}:
        for option in get_args(annotation):
            yield from _iterate_types(option)
    elif annotation is not NoneType:
        yield annotation
