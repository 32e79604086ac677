"""Draw the figures of the README and the docs from the sample checkpoints: terminals, plots and a
report.

Run from the repository root: ``python -m tools.figures``. The picture of the report needs Chromium.
"""

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.text import Text

from tests.browser.chromium import Page

FOLDER = Path(__file__).parents[1] / "docs" / "figures"
SAMPLES = "sample_checkpoints"
FIGURES = {"spectrum": ["spectrum", f"{SAMPLES}/base", f"{SAMPLES}/full_ft"]}
WIDTH = 80

TEXTS = [
    "--eval",
    f"{SAMPLES}/eval/in_domain.txt",
    "--shifted",
    f"{SAMPLES}/eval/shifted.txt",
    "--max-sequences",
    "40",
]
ADAPTERS = [f"{SAMPLES}/lora_r4", f"{SAMPLES}/lora_r16"]

# Results file -> the command that measures it; then figure of docs/reference/plot.md -> what is
# drawn of which results.
MEASURED = {
    "spectrum": ["spectrum", f"{SAMPLES}/base", f"{SAMPLES}/full_ft"],
    "lora_r16": ["spectrum", f"{SAMPLES}/base", f"{SAMPLES}/lora_r16"],
    "residual": [
        "residual",
        f"{SAMPLES}/base",
        f"{SAMPLES}/full_ft",
        f"{SAMPLES}/lora_r4",
        f"{SAMPLES}/lora_r16",
    ],
    "overlap": ["overlap", f"{SAMPLES}/base", f"{SAMPLES}/full_ft", f"{SAMPLES}/gradients"],
    "interference": ["interference", f"{SAMPLES}/lora_r4", f"{SAMPLES}/lora_r16"],
    "unequal": ["extract", f"{SAMPLES}/base", f"{SAMPLES}/full_ft", "--energy", "0.6"],
    "portability": ["portability", "{unequal}", "--consumers", "peft,vllm,sglang,llamacpp"],
    "allocation": ["allocate", "{spectrum}", "--params", "80k"],
    "truncation": ["probe", "truncation", f"{SAMPLES}/base", f"{SAMPLES}/full_ft", *TEXTS],
    "outputs": ["probe", "outputs", f"{SAMPLES}/base", f"{SAMPLES}/full_ft", *ADAPTERS, *TEXTS],
}
PLOTS = {
    "plot-energy": ["{spectrum}", "--figure", "energy"],
    "plot-runs": ["{spectrum}", "{lora_r16}", "--figure", "energy", "--width", "column"],
    "plot-spectrum": ["{spectrum}", "--figure", "spectrum"],
    "plot-heatmap": ["{spectrum}", "--figure", "heatmap", "--field", "rank_at.0.9"],
    "plot-residual": ["{residual}", "--figure", "residual"],
    "plot-overlap": ["{overlap}", "--figure", "overlap"],
    "plot-allocation": ["{allocation}", "--figure", "allocation"],
    "plot-angles": ["{interference}", "--figure", "angles"],
    "plot-union": ["{interference}", "--figure", "union"],
    "plot-portability": ["{portability}", "--figure", "portability"],
    "plot-fleet": ["{fleet}", "--figure", "fleet"],
    "plot-sweep": ["{sweep}", "--figure", "sweep"],
    "plot-tune": ["{tune}", "--figure", "tune"],
    "plot-truncation": ["{truncation}", "--figure", "truncation"],
    "plot-outputs": ["{outputs}", "--figure", "outputs"],
}


def terminal(words: list[str]) -> str:
    """Return what the command prints, colours included."""
    environment = {
        **os.environ,
        "FORCE_COLOR": "1",
        "COLUMNS": str(WIDTH),
        "TERM": "xterm-256color",
    }
    environment.pop("NO_COLOR", None)
    command = [sys.executable, "-m", "lora_diag", *words]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout


def svg(words: list[str]) -> str:
    """Return the command and its output as the picture of a terminal."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(terminal(words)))
    picture = console.export_svg(title=f"loradiag {' '.join(words)}", unique_id="loradiag")
    return re.sub(
        r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL
    )  # fonts from a network: not needed


def fleet(folder: Path) -> str:
    """Write 40 adapters of random factors in a folder, four of them outliers, and measure them.

    Returns:
        The results file.
    """
    import json

    import torch
    from safetensors.torch import save_file

    odd = {"sql-v2": 40.0, "chat-untrained": 0.0, "code-v3": None, "law-high-rate": None}
    generator = torch.Generator().manual_seed(0)
    for name in [*(f"task-{i:02}" for i in range(36)), *odd]:
        decay = torch.linspace(0, -0.6 * float(torch.rand(1, generator=generator)), 16)
        if name == "code-v3":
            decay = torch.linspace(0, -3, 16)
        elif name == "law-high-rate":
            decay = torch.tensor([1.0, *[0.0] * 15])
        scale = (10**decay) * (1.0 if odd.get(name) is None else odd[name])
        tensors = {}
        for layer in range(4):
            key = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            tensors[f"{key}.lora_A.weight"] = torch.randn(16, 64, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(64, 16, generator=generator) * scale
        where = folder / "fleet" / name
        where.mkdir(parents=True)
        save_file(tensors, where / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["q_proj"]}
        (where / "adapter_config.json").write_text(json.dumps(config))
    file = str(folder / "fleet.jsonl")
    terminal(["fleet", str(folder / "fleet" / "*"), "-o", file, "-q"])
    return file


def recovery(folder: Path) -> None:
    """Draw C(r) of the files, of the estimate and of the truth, for a planted update that bfloat16
    storage hides.
    """
    import matplotlib as mpl
    import numpy as np
    import torch
    from matplotlib.figure import Figure
    from safetensors.torch import save_file

    import lora_diag
    from lora_diag.plots import recovery as draw

    rng = np.random.default_rng(0)
    w = torch.tensor(rng.normal(size=(512, 512)) * 0.02).bfloat16()
    x = torch.tensor(rng.normal(size=(512, 8)) @ rng.normal(size=(8, 512)) * 1e-5 / 8**0.5)
    sides = {"base": w, "tuned": (w.double() + x).bfloat16()}
    for name, side in sides.items():
        save_file({"layers.0.up_proj.weight": side}, folder / f"{name}.safetensors")
    records = lora_diag.recover(folder / "base.safetensors", folder / "tuned.safetensors")
    squares = torch.linalg.svdvals(x).numpy() ** 2
    ranks = [int(r) for r in records[0].energy]
    with mpl.rc_context(
        {"svg.hashsalt": "loradiag", "svg.fonttype": "none", "font.family": "sans-serif"}
    ):
        page = Figure(figsize=(5.2, 2.8), layout="constrained")
        axes = draw(records, page.subplots())
        (truth,) = axes.plot(
            ranks, np.cumsum(squares)[np.array(ranks) - 1] / squares.sum(), "k:", label="truth"
        )
        shown = axes.get_legend()
        axes.legend(
            [*shown.legend_handles, truth],
            [*(text.get_text() for text in shown.get_texts()), "truth"],
            fontsize="small",
        )
        axes.set_title(
            f"Planted rank 8, {records[0].unchanged:.0%} of the bfloat16 entries unchanged",
            fontsize="medium",
        )
        page.savefig(FOLDER / "recovery.svg", metadata={"Date": None})


def plots(folder: Path) -> None:
    """Measure the sample checkpoints into a folder, and draw the figures of docs/reference/plot.md
    from the results.
    """
    files = {
        name: str(folder / (name if words[0] == "extract" else f"{name}.jsonl"))
        for name, words in MEASURED.items()
    }
    for name, words in MEASURED.items():
        terminal([*(word.format(**files) for word in words), "-o", files[name], "-q"])
    files |= {
        "fleet": fleet(folder),
        "sweep": "docs/examples/sweep.jsonl",
        "tune": "docs/examples/tune.jsonl",
    }
    for name, words in PLOTS.items():
        terminal(
            [
                "plot",
                *(word.format(**files) for word in words),
                "-o",
                str(FOLDER / f"{name}.svg"),
                "--overwrite",
                "-q",
            ]
        )


def report(folder: Path) -> None:
    """Make a report of the results that ``plots`` measured, and take the picture of its first
    screen.
    """
    page = folder / "report.html"
    results = [str(folder / f"{name}.jsonl") for name in ("spectrum", "residual", "outputs")]
    terminal(["report", *results, "-o", str(page), "-q"])
    with Page(folder / "profile") as tab:
        tab.size(1240, 1760)
        tab.open(page)
        tab.screenshot(folder / "report.png", whole=False)
    Image.open(folder / "report.png").convert("RGB").quantize(64).save(
        FOLDER / "report.png", optimize=True
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        plots(Path(temporary))
        recovery(Path(temporary))
        report(Path(temporary))
    for name, words in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(svg(words), encoding="utf-8")
