"""Trackio: scalars, tables and figures of one run, in its local database or a Space."""

from __future__ import annotations

from lora_diag.reports.trackers.payload import Payload, pixels


def send(payload: Payload, project: str | None) -> str:
    """Log a run; tables need pandas, which trackio brings."""
    import pandas as pd
    import trackio

    run = trackio.init(project=project or "loradiag", name=payload.name, config=payload.config, resume="never")
    tables = {f"{name}/records": trackio.Table(dataframe=pd.DataFrame(table)) for name, table in payload.tables.items()}
    figures = {f"figures/{name}": trackio.Image(pixels(png), caption=name) for name, png in payload.figures.items()}
    trackio.log({**payload.scalars, **tables, **figures})
    trackio.finish()
    return f"run {run.name} of project {run.project}: trackio show --project {run.project}"
