"""MLflow: metrics, parameters, tables, figures and the HTML report of one run."""

from __future__ import annotations

import json
import re

from lora_diag.reports.trackers.payload import Payload, pixels


def send(payload: Payload, project: str | None) -> str:
    """Log a run to the tracking server or folder of ``MLFLOW_TRACKING_URI``."""
    import mlflow

    mlflow.set_experiment(project or "loradiag")
    with mlflow.start_run(run_name=payload.name) as run:
        mlflow.log_metrics({re.sub(r"[^\w\-./ ]", "_", name): value for name, value in payload.scalars.items()})
        mlflow.log_dict(payload.config, "config.json")
        for name, table in payload.tables.items():
            mlflow.log_text(json.dumps(table), f"{name}.json")
        for name, png in payload.figures.items():
            mlflow.log_image(pixels(png), f"figures/{name}.png")
        mlflow.log_text(payload.page, "report.html")
        return f"run {run.info.run_id} in {mlflow.get_tracking_uri()}"
