"""The content of results that is sent to a tracker."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_diag.catalog import read_results
from lora_diag.records import LayerRecord, Results
from lora_diag.records.base import pooled_value
from lora_diag.reports.run import report


@dataclass(frozen=True)
class Payload:
    """A report as trackers take it.

    Args:
        results: The runs.
    """

    results: tuple[Results[Any], ...]

    @property
    def name(self) -> str:
        """Name of the run in a tracker, such as ``loradiag spectrum``."""
        return "loradiag " + ", ".join(dict.fromkeys(item.run.command for item in self.results))

    @property
    def config(self) -> dict[str, Any]:
        """Inputs and settings of each run, by its command."""
        return {
            key: {
                "version": item.run.version,
                **{f"input.{run_input.role}": run_input.path for run_input in item.run.inputs},
                **{f"settings.{name}": value for name, value in item.run.settings.items()},
            }
            for key, item in self._number_runs()
        }

    @cached_property
    def scalars(self) -> dict[str, float]:
        """The main columns over all records of a kind, such as ``spectrum/energy.16``: pooled as tables pool them."""
        values: dict[str, float] = {}
        for key, item in self._number_runs():
            for kind in dict.fromkeys(type(record) for record in (*item.layers, *item.whole)):
                records = [record for record in (*item.layers, *item.whole) if type(record) is kind]
                columns = kind.shown_of(item.run.settings, records) if issubclass(kind, LayerRecord) else kind.shown
                for column in columns:
                    value = pooled_value(column, records) if column.main else None
                    if isinstance(value, int | float):
                        values[f"{key}/{column.path}"] = value
        return values

    @cached_property
    def tables(self) -> dict[str, dict[str, list[Any]]]:
        """The records of each run as columns."""
        return {key: item.columns() for key, item in self._number_runs() if item.layers or item.whole}

    @cached_property
    def figures(self) -> dict[str, bytes]:
        """Each figure that the records allow, as PNG."""
        from lora_diag import plots

        runs = list(self.results)
        return {
            kind.name: plots.encoded(plots.figure(kind.name, runs), "png")
            for kind in plots.FIGURES
            if plots.why_not(kind.name, runs) is None
        }

    @property
    def markdown(self) -> str:
        """The report as Markdown."""
        return str(report(*self.results, format="md"))

    @property
    def page(self) -> str:
        """The report as HTML; needs the extra ``report``."""
        return str(report(*self.results, format="html"))

    def _number_runs(self) -> list[tuple[str, Results[Any]]]:
        """Return each run with its command, with underscores, numbered where a command has several."""
        commands = [item.run.command for item in self.results]
        counts: dict[str, int] = {}
        numbered_runs = []
        for item in self.results:
            counts[item.run.command] = number = counts.get(item.run.command, 0) + 1
            name = item.run.command.replace(" ", "_")
            numbered_runs.append((f"{name}_{number}" if commands.count(item.run.command) > 1 else name, item))
        return numbered_runs


def payload_of(results: Sequence[Results[Any] | Path | str]) -> Payload:
    """Return the payload of results or results files."""
    return Payload(tuple(item if isinstance(item, Results) else read_results(item) for item in results))


def pixels(png: bytes) -> Any:
    """Return a picture as an array, height × width × 3 (uint8)."""
    import numpy as np
    from matplotlib.image import imread

    return (imread(io.BytesIO(png))[..., :3] * 255).round().astype(np.uint8)
