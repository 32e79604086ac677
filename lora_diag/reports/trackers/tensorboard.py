"""TensorBoard: scalars, figures and the Markdown report, as event files in a folder."""

from __future__ import annotations

from lora_diag.reports.trackers.payload import Payload, pixels


def send(payload: Payload, project: str | None) -> str:
    """Write event files."""
    from torch.utils.tensorboard import SummaryWriter

    folder = project or "runs/loradiag"
    with SummaryWriter(folder) as writer:
        for name, value in payload.scalars.items():
            writer.add_scalar(name, value)
        for name, png in payload.figures.items():
            writer.add_image(name, pixels(png), dataformats="HWC")
        writer.add_text("report", payload.markdown)
    return f"{folder}: tensorboard --logdir {folder}"
