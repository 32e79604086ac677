"""How every tool is run for ``compare``, with the options that its documentation names, and how
what it wrote is read.

Adapters are judged by merging them with PEFT itself into the float32 base; kohya's, which PEFT does
not read, by up · down · alpha / rank. Tools run in environments of their own; a version is asked
from the environment that ran.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.__main__ import peer
from benchmarks.compare.inputs import Weights, kohya_name, weights_of
from benchmarks.measure import Used

OFFLINE = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
FLUX = "double_blocks.0."  # flux_extract_lora.py takes tensors of these names only
NOTHING = Used(0, 0)


@dataclass(frozen=True)
class Ran:
    """One process that has ended: its exit code, all it printed, and what it took."""

    code: int
    text: str
    used: Used = NOTHING

    @property
    def last(self) -> str:
        """The last line that is no progress bar."""
        lines = [
            line.strip()
            for line in re.split(r"[\r\n]", self.text)
            if line.strip() and "it/s]" not in line
        ]
        return lines[-1] if lines else "(nothing printed)"


def run(words: Sequence[object], **env: str) -> Ran:
    with NamedTemporaryFile() as file:
        measured = [sys.executable, "-m", "benchmarks.measure", file.name, *map(str, words)]
        process = subprocess.run(
            measured,
            env={**os.environ, **OFFLINE, **env},
            capture_output=True,
            text=True,
            check=False,
        )
        used = Used(*json.loads(Path(file.name).read_text()))
    return Ran(process.returncode, process.stdout + process.stderr, used)


def done(ran: Ran) -> None:
    """Stop if a process failed of which no failure is expected."""
    if ran.code:
        raise SystemExit(ran.text[-3000:])


@cache
def version(name: str) -> str:
    """Return the version of a tool in the environment that runs it."""
    python = sys.executable if name in ("peft", "transformers", "torch") else peer(name) / "python"
    code = f"import importlib.metadata as m; print(m.version({name!r}))"
    return run([python, "-c", code]).text.strip()


def loradiag(*words: object) -> Ran:
    """Run a command with its whole summary, which names what is left out."""
    return run([sys.executable, "-m", "lora_diag", *words, *(() if "-q" in words else ("-v",))])


def loradiag_records(*words: object) -> list[dict[str, Any]]:
    """Return the records of layers that a command measures."""
    ran = loradiag(*words, "--json", "-q")
    records = [json.loads(line) for line in ran.text.splitlines() if line.startswith("{")]
    return [record for record in records if record["record"] == "spectrum"]


def modeldelta(
    base: Path, tuned: Path, out: Path, top: int = 16
) -> tuple[Ran, list[dict[str, Any]]]:
    """Run ``python -m modeldelta --top-k``, and return the JSON of every tensor with an SVD."""
    out.unlink(missing_ok=True)
    ran = run(
        [
            peer("modeldelta") / "python",
            "-m",
            "modeldelta",
            base,
            tuned,
            "-q",
            "--top-k",
            top,
            "-o",
            out,
        ]
    )
    modules = json.loads(out.read_text())["modules"] if out.exists() else []
    return ran, [module for module in modules if module.get("has_svd")]


def weightwatcher(base: Path, tuned: Path) -> tuple[Ran, list[dict[str, Any]]]:
    """Run ``WeightWatcher(model, base_model).analyze(mp_fit=True)``, and return its table."""
    ran = run(
        [peer("weightwatcher") / "python", "benchmarks/scripts.py", "weightwatcher", base, tuned]
    )
    rows = [line for line in ran.text.splitlines() if line.startswith('[{"')]
    return ran, json.loads(rows[0]) if rows else []


def mergekit(base: Path, tuned: Path, out: Path, rank: int, *more: object) -> Ran:
    words = [
        "--model",
        tuned.resolve(),
        "--base-model",
        base.resolve(),
        "--out-path",
        out.resolve(),
    ]
    return run([peer("mergekit") / "mergekit-extract-lora", *words, "--max-rank", rank, *more])


def audited(adapter: Path) -> Ran:
    """Run ``gradience audit --json`` with all its policies."""
    policies = "energy@0.90,energy@0.95,knee,erank,oht"
    words = ["--peft-dir", adapter, "--json", "--layers", "--no-udr", "--rank-policies", policies]
    return run([peer("gradience") / "gradience", "audit", *words])


def gradience_audit(adapter: Path) -> dict[str, Any]:
    """Return the output of the audit; messages are on standard error, which follows its
    JSON here.
    """
    ran = audited(adapter)
    done(ran)
    return dict(json.JSONDecoder().raw_decode(ran.text[ran.text.index("{") :])[0])


def gradience_truncate(adapter: Path, out: Path, rank: int, *more: object) -> Ran:
    words = ["--peft-dir", adapter, "--out-dir", out, "--rank", rank]
    return run([peer("gradience") / "gradience", "truncate", *words, *more])


def kohya(home: Path, script: str, *words: object) -> Ran:
    """Run a script of sd-scripts from a checkout, in the environment ``.bench/peers/kohya`` with
    its requirements.
    """
    python = Path(".bench/peers/kohya/bin/python").absolute()
    return run([python, home / "networks" / script, *words], PYTHONPATH=str(home))


def kohya_extract(home: Path, base: Path, tuned: Path, out: Path, rank: int, *more: object) -> Ran:
    """Run flux_extract_lora.py on the two-dimensional weights of a pair, named as it asks."""
    sides = []
    for folder in (base, tuned):
        named = {FLUX + name: w for name, w in weights_of(folder).items() if w.dim() == 2}
        sides.append(out.with_suffix(f".{folder.name}.safetensors"))
        save_file(named, sides[-1])
    words: list[object] = [
        "--model_org",
        sides[0],
        "--model_tuned",
        sides[1],
        "--save_to",
        out,
        "--dim",
        rank,
        *more,
    ]
    return kohya(home, "flux_extract_lora.py", *words)


def kohya_resize(home: Path, adapter: Path, out: Path, rank: int, *more: object) -> Ran:
    words = ["--model", adapter, "--save_to", out, "--new_rank", rank, "--verbose", *more]
    return kohya(home, "resize_lora.py", *words)


def peft_convert(base: Path, adapter: Path, out: Path, rank: float) -> None:
    """Load an adapter as PEFT does, and write it again with ``peft.save_as_lora``."""
    from peft import PeftModel, save_as_lora

    save_as_lora(out, PeftModel.from_pretrained(loaded(base), str(adapter)), rank=rank)


def loaded(folder: Path) -> Any:
    """Return a model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def merged(base: Path, adapter: Path) -> Weights:
    """Return what an adapter adds to each parameter, by merging it with PEFT."""
    from peft import PeftModel

    model = loaded(base)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    after = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().state_dict()
    return {name: after[name].double() - w.double() for name, w in before.items()}


def moved(folder: Path) -> Weights:
    """Return what the fine-tune added to each parameter, of models as transformers loads them (ties
    included).
    """
    before, after = loaded(folder / "base").state_dict(), loaded(folder / "tuned").state_dict()
    changes = {name: after[name].double() - w.double() for name, w in before.items()}
    return {name: change for name, change in changes.items() if change.any()}


def kohya_updates(file: Path, names: Iterable[str]) -> Weights:
    """Return up · down · alpha / rank of these weights, from a file of kohya's scripts."""
    tensors = load_file(file)
    updates = {}
    for name, module in kohya_modules(tensors, names).items():
        down, up = (
            tensors[f"{module}.lora_down.weight"].double(),
            tensors[f"{module}.lora_up.weight"].double(),
        )
        updates[name] = up @ down * float(tensors[f"{module}.alpha"]) / len(down)
    return updates


def kohya_ranks(file: Path, names: Iterable[str]) -> dict[str, int]:
    tensors = load_file(file)
    return {
        n: len(tensors[f"{m}.lora_down.weight"]) for n, m in kohya_modules(tensors, names).items()
    }


def kohya_modules(tensors: Weights, names: Iterable[str]) -> dict[str, str]:
    """Return the name of each weight's module in kohya's file."""
    flux = any(name.startswith("lora_unet_" + FLUX.replace(".", "_")) for name in tensors)
    return {name: kohya_name((FLUX if flux else "") + name) for name in names}


def peft_ranks(folder: Path, names: Iterable[str]) -> dict[str, int]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        n: len(tensors[f"base_model.model.{n.removesuffix('.weight')}.lora_A.weight"])
        for n in names
    }
