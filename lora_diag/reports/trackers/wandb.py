"""Weights & Biases: scalars, tables, figures and the HTML report of one run."""

from __future__ import annotations

from lora_diag.reports.trackers.payload import Payload, pixels


def send(payload: Payload, project: str | None) -> str:
    """Log a run; where and whether online is up to wandb's own settings (``WANDB_MODE=offline``)."""
    import wandb

    run = wandb.init(project=project or "loradiag", name=payload.name, config=payload.config, job_type="diagnostics")
    tables = {
        f"{name}/records": wandb.Table(
            columns=list(table), data=[list(row) for row in zip(*table.values(), strict=True)]
        )
        for name, table in payload.tables.items()
    }
    figures = {f"figures/{name}": wandb.Image(pixels(png)) for name, png in payload.figures.items()}
    run.log({**payload.scalars, **tables, **figures, "report": wandb.Html(payload.page)})
    location = run.url or run.dir
    run.finish()
    return str(location)
