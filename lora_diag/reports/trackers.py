"""Experiment trackers and model cards that a report can be sent to, one function each; their
libraries are optional.
"""

from __future__ import annotations

import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from lora_diag.catalog import read_results
from lora_diag.errors import DONE, Given, InputError, UsageError, require
from lora_diag.files import CARD, check_output, write_whole
from lora_diag.records import LayerRecord, Results
from lora_diag.records.base import pooled_value
from lora_diag.rendering.html import read_card, with_section
from lora_diag.rendering.text import byte_count
from lora_diag.reports import ReportOptions
from lora_diag.reports.run import report
from lora_diag.running.options import fill_options

if TYPE_CHECKING:
    from lora_diag.cli.options import OutputChoice


def run_report(
    shown: OutputChoice,
    results: Sequence[str],
    to: str | None,
    project: str | None,
    **options: Unpack[ReportOptions],
) -> int:
    """Write or print a report, or send it to a tracker, and return the exit code; HTML goes to
    ``report.html``.

    Raises:
        UsageError: Options contradict each other, or ``report`` or ``track`` refuses them.
    """
    if project is not None and to is None:
        raise UsageError(Given("project"), "names a project of a tracker", "add $to")
    if to is not None:
        if fill_options(ReportOptions, options) != fill_options(ReportOptions, {}):
            raise UsageError(
                Given("to"),
                "sends the report instead of writing a file",
                "leave out $output and its options",
            )
        shown.message(f"{to}: {track(results, to, project)}")
        return DONE
    output, format = options["output"], options["format"]
    if output is None and format == "parquet":
        raise UsageError(Given("format", "parquet"), "needs a file", "give one with $output")
    if output is None and format in {None, "html"}:
        output = options["output"] = Path("report.html")
    rendered = report(*results, **options)
    if output is None:
        shown.print(str(rendered).rstrip("\r\n"))
        return DONE
    shown.message(f"{shlex.quote(str(output))}: {byte_count(Path(output).stat().st_size)}")
    return DONE


def track(results: Sequence[Results[Any] | Path | str], to: str, project: str | None = None) -> str:
    """Send tables, figures and scalars of results to an experiment tracker.

    Args:
        results: Results files, or results in memory.
        to: ``wandb``, ``mlflow``, ``trackio``, ``tensorboard`` or ``hub``.
        project: Project (wandb, trackio), experiment (mlflow), log folder (tensorboard), or model
            id or folder (hub).

    Returns:
        Where the report is.

    Raises:
        UsageError: There is no such tracker, no project where one is needed, or the model card may
            not be written.
    """
    if to not in TRACKERS:
        raise UsageError(Given("to", to), f"choose {', '.join(TRACKERS)}")
    with require(Given("to", to), to, kind=InputError):
        return TRACKERS[to](payload_of(results), project)


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
        """Version, settings and the last input of each role of each run, by its command."""
        config = {}
        for key, results in self._number_runs():
            run = results.run
            values = {"version": run.version}
            values |= {f"input.{item.role}": item.path for item in run.inputs}
            values |= {f"settings.{name}": value for name, value in run.settings.items()}
            config[key] = values
        return config

    @cached_property
    def scalars(self) -> dict[str, float]:
        """The main columns over all records of a kind, such as ``spectrum/energy.16``: pooled as
        tables pool them.
        """
        values: dict[str, float] = {}
        for key, item in self._number_runs():
            by_kind: dict[type[Any], list[Any]] = {}
            for record in (*item.layers, *item.whole):
                by_kind.setdefault(type(record), []).append(record)
            for kind, records in by_kind.items():
                columns = kind.shown
                if issubclass(kind, LayerRecord):
                    columns = kind.shown_of(item.run.settings, records)
                for column in columns:
                    value = pooled_value(column, records) if column.main else None
                    if isinstance(value, int | float):
                        values[f"{key}/{column.path}"] = value
        return values

    @cached_property
    def tables(self) -> dict[str, dict[str, list[Any]]]:
        """The records of each run as columns."""
        return {
            key: item.columns() for key, item in self._number_runs() if item.layers or item.whole
        }

    @cached_property
    def figures(self) -> dict[str, bytes]:
        """Each figure that the records allow, as PNG."""
        from lora_diag import plots

        figures = {}
        for kind in plots.FIGURES:
            if plots.why_not(kind.name, self.results) is None:
                page = plots.figure(kind.name, self.results)
                figures[kind.name] = plots.encode_figure(page, "png")
        return figures

    def render(self, format: str) -> str:
        """Return the report as ``md`` or ``html``."""
        return str(report(*self.results, format=format))

    def _number_runs(self) -> list[tuple[str, Results[Any]]]:
        """Return each run with its command, with underscores, numbered where a command
        has several.
        """
        totals = Counter(item.run.command for item in self.results)
        counts: Counter[str] = Counter()
        numbered = []
        for item in self.results:
            command = item.run.command
            counts[command] += 1
            key = command.replace(" ", "_")
            if totals[command] > 1:
                key += f"_{counts[command]}"
            numbered.append((key, item))
        return numbered


def payload_of(results: Sequence[Results[Any] | Path | str]) -> Payload:
    """Return the payload of results or results files."""
    return Payload(
        tuple(read_results(item) if isinstance(item, Path | str) else item for item in results)
    )


def _decode(png: bytes) -> Any:
    """Return a picture as an array, height × width × 3 (uint8)."""
    import numpy as np
    from matplotlib.image import imread

    return (imread(io.BytesIO(png))[..., :3] * 255).round().astype(np.uint8)


def _send_to_wandb(payload: Payload, project: str | None) -> str:
    """Log a run and return its address or folder; wandb's own settings decide where
    (``WANDB_MODE=offline``).
    """
    import wandb

    run = wandb.init(
        project=project or "loradiag",
        name=payload.name,
        config=payload.config,
        job_type="diagnostics",
    )
    logged: dict[str, Any] = {**payload.scalars, "report": wandb.Html(payload.render("html"))}
    for name, table in payload.tables.items():
        rows = list(map(list, zip(*table.values(), strict=True)))
        logged[f"{name}/records"] = wandb.Table(columns=list(table), data=rows)
    for name, png in payload.figures.items():
        logged[f"figures/{name}"] = wandb.Image(_decode(png))
    run.log(logged)
    location = run.url or run.dir
    run.finish()
    return str(location)


def _send_to_mlflow(payload: Payload, project: str | None) -> str:
    """Log a run to the server or folder of ``MLFLOW_TRACKING_URI``, and return where it is."""
    import mlflow

    mlflow.set_experiment(project or "loradiag")
    with mlflow.start_run(run_name=payload.name) as run:
        mlflow.log_metrics(
            {re.sub(r"[^\w\-./ ]", "_", name): value for name, value in payload.scalars.items()}
        )
        mlflow.log_dict(payload.config, "config.json")
        for name, table in payload.tables.items():
            mlflow.log_text(json.dumps(table), f"{name}.json")
        for name, png in payload.figures.items():
            mlflow.log_image(_decode(png), f"figures/{name}.png")
        mlflow.log_text(payload.render("html"), "report.html")
        return f"run {run.info.run_id} in {mlflow.get_tracking_uri()}"


def _send_to_trackio(payload: Payload, project: str | None) -> str:
    """Log a run, and return its name and the command that shows it; tables need pandas, which
    trackio brings.
    """
    import pandas as pd
    import trackio

    run = trackio.init(
        project=project or "loradiag", name=payload.name, config=payload.config, resume="never"
    )
    logged: dict[str, Any] = dict(payload.scalars)
    for name, table in payload.tables.items():
        logged[f"{name}/records"] = trackio.Table(dataframe=pd.DataFrame(table))
    for name, png in payload.figures.items():
        logged[f"figures/{name}"] = trackio.Image(_decode(png), caption=name)
    trackio.log(logged)
    trackio.finish()
    return f"run {run.name} of project {run.project}: trackio show --project {run.project}"


def _send_to_tensorboard(payload: Payload, project: str | None) -> str:
    """Write event files, and return their folder and the command that shows them."""
    from torch.utils.tensorboard import SummaryWriter

    folder = project or "runs/loradiag"
    with SummaryWriter(folder) as writer:
        for name, value in payload.scalars.items():
            writer.add_scalar(name, value)
        for name, png in payload.figures.items():
            writer.add_image(name, _decode(png), dataformats="HWC")
        writer.add_text("report", payload.render("md"))
    return f"{folder}: tensorboard --logdir {folder}"


def _send_to_hub(payload: Payload, project: str | None) -> str:
    """Write a section into ``README.md`` of a folder, or commit it to a model on the Hugging Face
    Hub.

    Returns:
        The path of the card, or the address of the commit.

    Raises:
        UsageError: There is no project, or the card may not be written.
    """
    if project is None:
        raise UsageError(Given("to", "hub"), "give the model id or a folder with $project")
    # Below the card's own title.
    section = re.sub(r"^(#+) ", r"#\1 ", payload.render("md"), flags=re.MULTILINE)
    folder = Path(project)
    if folder.is_dir():
        card = folder / "README.md"
        check_output(card, CARD, overwrite=True)
        write_whole(card, with_section(read_card(card), "report", section), CARD, overwrite=True)
        return str(card)
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        try:
            old_card = read_card(Path(hf_hub_download(project, "README.md")))
        except EntryNotFoundError:
            old_card = ""
        commit = HfApi().upload_file(
            path_or_fileobj=with_section(old_card, "report", section).encode(),
            path_in_repo="README.md",
            repo_id=project,
            commit_message="Update the loradiag report",
        )
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise InputError(
            f"{project}: its model card cannot be updated: {str(error).splitlines()[0]}"
        ) from error
    return str(commit)


TRACKERS: dict[str, Callable[[Payload, str | None], str]] = {
    "wandb": _send_to_wandb,
    "mlflow": _send_to_mlflow,
    "trackio": _send_to_trackio,
    "tensorboard": _send_to_tensorboard,
    "hub": _send_to_hub,
}
