r"""What programs that serve adapters apply, as run, and what ``portability`` predicted:
docs/reference/portability.md.

    python -m benchmarks.servers MODEL [--out FILE] [--programs NAMES] [--python PATH] [--llamacpp
    FOLDER]

MODEL is the folder of a small Llama with a tied head (SmolLM2-135M-Instruct in float32, with its
tokenizer). A copy with a head of its own, adapters of PEFT, mlx-lm, diffusers and kohya, a U-Net
and a CLIP are made in ``--work``.

Every program runs in a process of its own, so that an error or an abort is a result. The changes of
its outputs on four passages of 12 tokens (of diffusers: on three inputs) are compared with those of
PEFT: ``slope`` is their regression, the scale that was applied, and ``error`` their relative error.
The third number, ``from prediction``, is their error against transformers or diffusers with the
weights W + ΔW of which ``portability`` predicts ΔW. A prediction is right if that is below
``TOLERANCE``, or if an adapter that is predicted to be refused is refused. For PEFT's own rows, and
for files made by hand, the ΔW that this package reads from the file takes the place of PEFT's.

Prints Markdown; ``--out`` gets the rows as JSON lines. Models and adapters in ``--work`` are used
again.

PATH is a Python with the programs. PEFT is run by the Python of this script; the others may be
installed with::

    python -m venv VENV
    VENV/bin/pip install --no-deps llama-cpp-py-sync==0.11739 cffi pycparser sentencepiece gguf
    VENV/bin/pip install --no-deps mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2

and torch, transformers, peft and diffusers in the same environment, or by a ``.pth`` file in its
site-packages that names those of this one. FOLDER has llama.cpp's converters: ``vendor/llama.cpp``
in the source package of llama-cpp-python 0.3.36. After a whole run, ``--programs peft`` with an
older PEFT in PYTHONPATH judges that one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import lora_diag
from benchmarks.measure import print_table, processor
from benchmarks.servers.adapters import (
    CASES,
    LARGE,
    PATTERNS,
    Case,
    image_adapters,
    make_peft,
    make_text_encoder,
    make_unet,
    mlx_adapters,
)
from lora_diag.adapters import open_adapter
from lora_diag.adapters.contents import read_contents
from lora_diag.adapters.layouts import LAYOUTS
from lora_diag.adapters.updates import UpdateSite
from lora_diag.diagnostics.portability.record import Portability
from lora_diag.errors import InputError
from lora_diag.layers.change import load_change
from lora_diag.storage import open_checkpoint

# Q4_0: llama.cpp rounds activations to 8 bits; how much of its error that is depends on the size of
# ΔW.
TOLERANCE, TOLERANCE_Q4 = 1e-3, 0.25
PASSAGES = (
    "The capital of France is Paris, and the river that flows through it is called",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1)",
    "In the beginning God created the heaven and the earth. And the earth was without",
    "Water boils at 100 degrees Celsius at sea level, but at high altitude it boils",
)
CONSUMERS = {"peft": "peft", "llama.cpp": "llamacpp", "mlx-lm": "mlx", "diffusers": "diffusers"}
FORMS = {"llama.cpp": "gguf", "mlx-lm": "mlx"}


@dataclass(frozen=True)
class Row:
    """The result of one program and one file.

    Args:
        program: The program.
        version: Its version.
        adapter: The adapter.
        file: Who wrote the file that the program read.
        predicted: The prediction of ``portability``; if no file was written, the reason.
        measured: What happened.
        slope: Regression of the change of outputs on PEFT's; null if the adapter did not run.
        error: Relative error of this change against PEFT's.
        from_prediction: Relative error of this change against that of the predicted ΔW.
        agrees: Whether the prediction is right; null without a file.
    """

    program: str
    version: str
    adapter: str
    file: str
    predicted: str
    measured: str
    slope: float | None = None
    error: float | None = None
    from_prediction: float | None = None
    agrees: bool | None = None


Outcome = np.ndarray | str  # outputs, or why there are none


@dataclass
class Shop:
    """The folder of models, adapters and outputs, and the programs that fill it.

    Args:
        folder: The folder.
        model: The given model.
        python: The Python that has the programs.
        converters: The folder of llama.cpp's converters.
        versions: The version of each program that has run.
        running: The process of each program.
        outputs: The outputs of programs without an adapter, by program and model.
        inputs: The tokens of the passages.
    """

    folder: Path
    model: Path
    python: str
    converters: Path | None
    versions: dict[str, str] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    outputs: dict[tuple[str, Path], np.ndarray] = field(default_factory=dict)
    inputs: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model)
        self.inputs = [tokenizer(text)["input_ids"][:12] for text in PASSAGES]

    def base(self, name: str) -> Path:
        """Return a model: ``tied`` (the given one), ``untied``, with ``mlx-``, ``q4``, ``unet`` or
        ``text_encoder``.
        """
        folder = self.model if name == "tied" else self.folder / name
        if not folder.exists():
            part = fresh(folder)
            if name == "unet":
                make_unet(part)
            elif name.startswith("text_encoder"):
                make_text_encoder(part, name == "text_encoder_2")
            elif name == "q4":
                self._dequantise(part)
            elif name == "untied":
                self._untie(part)
            else:  # mlx-lm 0.32.2 reads rope_theta at the top level only
                shutil.copytree(self.base(name.removeprefix("mlx-")), part)
                config = json.loads((part / "config.json").read_text())
                config.setdefault(
                    "rope_theta", (config.get("rope_parameters") or {}).get("rope_theta", 10000.0)
                )
                (part / "config.json").write_text(json.dumps(config))
            part.rename(folder)
        return folder

    def _untie(self, folder: Path) -> None:
        """Write the given model with a head of its own."""
        shutil.copytree(self.model, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    def _dequantise(self, folder: Path) -> None:
        """Write the weights of the Q4_0 file in float32."""
        from transformers import AutoModelForCausalLM

        file = self.gguf("q4")
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        del model.config.quantization_config  # otherwise save_pretrained refuses
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(folder)

    def gguf(self, name: str) -> Path:
        """Return a model as a GGUF file: ``tied`` or ``untied`` in float32, or ``q4``, which is
        tied.
        """
        file = self.folder / f"{name}.gguf"
        if not file.exists():
            part = file.with_suffix(".part")
            if name == "q4":
                failed = self.run("quantize", self.gguf("tied"), out=part)
            else:
                failed = self.convert(
                    "convert_hf_to_gguf.py", self.base(name), "--outtype", "f32", "--outfile", part
                )
            if failed:
                raise SystemExit(f"{file}: {failed}")
            part.rename(file)
        return file

    def convert(self, script: str, *words: object) -> str:
        """Run a converter of llama.cpp; return why it stopped, empty if it did not."""
        if self.converters is None:
            raise SystemExit("llama.cpp: needs its converters; give their folder with --llamacpp")
        command = [str(word) for word in (self.python, self.converters / script, *words)]
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False
        )
        return explain(done.returncode, done.stderr)

    def start(self, program: str) -> subprocess.Popen[str]:
        """Return the process that runs the jobs of a program."""
        if program not in self.running:
            python = sys.executable if program == "peft" else self.python
            words = [python, Path(__file__).with_name("programs.py"), program]
            pipes = {
                "stdin": subprocess.PIPE,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.DEVNULL,
            }
            self.running[program] = subprocess.Popen(list(map(str, words)), text=True, **pipes)
            self.versions[program] = self.running[program].stdout.readline().strip()
            if not self.versions[program]:
                raise SystemExit(
                    f"{program} does not start in {python}; the beginning of this script has its "
                    "packages"
                )
        return self.running[program]

    def run(
        self,
        program: str,
        model: Path,
        adapter: Path | None = None,
        weights: Path | None = None,
        out: Path | None = None,
    ) -> str:
        """Run a program; return why it failed, empty if it wrote ``out``."""
        process, log = self.start(program), self.folder / "log.txt"
        paths = {
            "model": model,
            "adapter": adapter,
            "weights": weights,
            "out": out or self.folder / "out.npy",
        }
        job: dict[str, Any] = {
            name: None if path is None else str(path) for name, path in paths.items()
        }
        print(
            json.dumps(job | {"inputs": self.inputs, "log": str(log)}),
            file=process.stdin,
            flush=True,
        )
        code = int(process.stdout.readline())
        return explain(code, log.read_text(errors="replace"))

    def change(
        self, program: str, model: Path, adapter: Path | None = None, weights: Path | None = None
    ) -> Outcome:
        """Return the change of a program's outputs by an adapter, or by other weights; or why there
        is none.
        """
        if (program, model) not in self.outputs:
            if failed := self.run(program, model):
                raise SystemExit(f"{program} does not run {model}: {failed}")
            self.outputs[program, model] = np.load(self.folder / "out.npy").astype(np.float64)
        if failed := self.run(program, model, adapter, weights):
            return failed
        return np.load(self.folder / "out.npy") - self.outputs[program, model]

    def change_by(
        self, adapter: Path, base: Path, records: Sequence[Portability] = (), program: str = "peft"
    ) -> np.ndarray:
        """Return the change of outputs by the ΔW that an adapter states, or that
        records predict.
        """
        weights = self.folder / "weights.safetensors"
        save_file(add_updates(adapter, base, records), weights)
        change = self.change(program, base, weights=weights)
        if isinstance(change, str):
            raise SystemExit(f"{adapter}: {change}")
        return change


def fresh(path: Path) -> Path:
    """Return a path for a part of a folder, which does not exist."""
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    return part


REASON = re.compile(r"^\w+Error: |^ERROR|GGML_ASSERT|failed to apply|added nothing")


def explain(code: int, log: str) -> str:
    """Return how a command ended, and the line of its messages that tells why; empty if it did not
    fail.
    """
    if not code:
        return ""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    at = next((at for at, line in enumerate(lines) if REASON.search(line)), None)
    reason = "no message" if at is None else " ".join(lines[at : at + 2])
    end = f"aborts ({signal.Signals(-code).name})" if code < 0 else "refuses"
    return f"{end}: {re.sub(r'/?(?:[^ /]+/)+', '', reason)[:200]}"


def predict(adapter: Path, base: Path, program: str, version: str) -> list[Portability]:
    """Return the records of ``portability``; builds of llama.cpp have one rule."""
    consumer = CONSUMERS[program] if program == "llama.cpp" else f"{CONSUMERS[program]}=={version}"
    return list(
        lora_diag.portability(
            base, adapter, consumers=[consumer], allow_unmatched=program == "diffusers"
        )
    )


def describe(records: Sequence[Portability]) -> str:
    """Return a prediction in words."""
    counts = Counter(record.status for record in records)
    if counts["refused"]:
        return f"refuses: {records[0].why}"
    wrong = [record for record in records if record.status == "wrong"]
    alone = [record for record in wrong if record.part in {"dora", "residual"}]
    factors = sorted({f"×{record.scale / record.intended:.3g}" for record in wrong})
    texts = (
        [f"{'B·A alone' if alone else ', '.join(factors)} in {len(wrong)} of {len(records)}"]
        if wrong
        else []
    )
    texts += [
        f"{status} in {counts[status]} of {len(records)}"
        for status in ("dropped", "unknown")
        if counts[status]
    ]
    return "; ".join(texts) or "exact"


def add_updates(
    adapter: Path, base: Path, records: Sequence[Portability] = ()
) -> dict[str, torch.Tensor]:
    """Return W + ΔW of the weights that an adapter changes, with the ΔW that it states, or that
    records predict.
    """
    opened, checkpoint = open_adapter(adapter), open_checkpoint(base)
    items = {item.layer: item for item in read_contents(opened, checkpoint).items}
    predicted = {record.layer: record for record in records}
    (source,) = base.glob("*.safetensors")
    before, weights = load_file(source), {}
    for delta in opened.pair(checkpoint, allow_unmatched=opened.form in {"kohya", "diffusers"})[
        0
    ].deltas:
        status = predicted[delta.layer].status if records else "exact"
        if status == "dropped":
            continue
        if status == "wrong":
            item = items[delta.layer]
            b, a = item.load(UpdateSite(delta.shape))
            update = b.double() @ a.double() * (predicted[delta.layer].scale / item.scale)
            update = update if tuple(update.shape) == tuple(delta.shape) else update.T
        else:
            update = torch.cat(list(load_change(delta, torch.device("cpu")).blocks(delta.shape)))
        weight = before[delta.layer]
        weights[delta.layer] = (weight.double() + update.reshape(weight.shape)).float().contiguous()
    return weights


@dataclass(frozen=True)
class File:
    """A file that a program reads, and what it is compared with.

    Args:
        program: The program.
        adapter: The adapter's name in tables.
        file: Who wrote the file.
        path: The file or folder that the program reads; or why it was not written.
        model: The model that the program loads.
        judged: The adapter that ``portability`` judges.
        base: Its base.
        plain: A base in which every changed weight is a tensor of its own.
        reference: The change of outputs by PEFT, or by the ΔW that the file states.
        whole: Whether the file states the ΔW of the reference.
        tolerance: The largest error of a right prediction.
    """

    program: str
    adapter: str
    file: str
    path: Path | str
    model: Path
    judged: Path
    base: Path
    plain: Path
    reference: np.ndarray
    whole: bool = True
    tolerance: float = TOLERANCE


def measure(shop: Shop, file: File) -> Row:
    """Run a program with a file, and compare the change of its outputs with the prediction."""
    shop.start(file.program)
    version = shop.versions[file.program]
    records = predict(file.judged, file.base, file.program, version)
    words, refused = describe(records), records[0].status == "refused"
    change = (
        file.path
        if isinstance(file.path, str)
        else shop.change(file.program, file.model, file.path)
    )
    row = partial(Row, file.program, version, file.adapter, file.file, words)
    if isinstance(change, str):
        return row(change, agrees=refused)
    expected: np.ndarray | None = file.reference
    if refused:
        expected = None
    elif words != "exact" or not file.whole:
        expected = shop.change_by(
            file.judged, file.plain, records, "diffusers" if file.program == "diffusers" else "peft"
        )
    from_prediction = None if expected is None else distance(change, expected)
    slope = float((change * file.reference).sum() / (file.reference**2).sum())
    agrees = from_prediction is not None and from_prediction < file.tolerance
    return row("runs", slope, distance(change, file.reference), from_prediction, agrees)


def distance(change: np.ndarray, reference: np.ndarray) -> float:
    """Return the relative error of a change of outputs."""
    return float(np.linalg.norm(change - reference) / np.linalg.norm(reference))


def language_rows(shop: Shop, programs: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of the adapters of PEFT."""
    if not {"peft", *FORMS} & {*programs}:
        return
    plain = shop.base("untied")
    for case, base in ((each, name) for each in CASES for name in each.bases):
        adapter, model = shop.folder / "peft" / base / case.name.replace(" ", "_"), shop.base(base)
        if not adapter.exists():
            part = fresh(adapter)
            make_peft(case, model, part)
            part.rename(adapter)
        change = shop.change("peft", model, adapter)
        if isinstance(change, str) and programs != ["peft"]:
            raise SystemExit(f"PEFT does not load {adapter}: {change}")
        title = f"{case.name}, {base}" if len(case.bases) > 1 else case.name
        make = partial(File, adapter=title, base=model, plain=plain, reference=change)
        if "peft" in programs:
            stated = shop.change_by(adapter, plain)
            yield measure(
                shop,
                make(
                    "peft", file="PEFT", path=adapter, model=model, judged=adapter, reference=stated
                ),
            )
        if "llama.cpp" in programs:
            out = shop.folder / "out.gguf"
            failed = shop.convert(
                "convert_lora_to_gguf.py", adapter, "--base", model, "--outfile", out
            )
            path = f"converter {failed}" if failed else out
            yield measure(
                shop,
                make(
                    "llama.cpp", file="converter", path=path, model=shop.gguf(base), judged=adapter
                ),
            )
        for program, form in FORMS.items():
            if program in programs:
                yield from written_rows(shop, make, program, form, case, adapter, base)


def written_rows(
    shop: Shop,
    make: Callable[..., File],
    program: str,
    form: str,
    case: Case,
    adapter: Path,
    base: str,
) -> Iterator[Row]:
    """Yield the rows of the files that loradiag writes of an adapter for a program."""
    model = shop.base(base)
    out = fresh(shop.folder / "written" / base / case.name.replace(" ", "_") / form)
    options = {case.fix: True} if case.fix else {}
    title = " ".join(["--fix", *(f"--{name.replace('_', '-')}" for name in options)])
    fix = partial(lora_diag.make_portable, adapter, out, model, form=form, **options)
    yield written_row(shop, partial(make, file=title, whole=not options), program, fix, out, base)
    if case.name == PATTERNS:
        extracted = fresh(out.with_name(f"extracted-{form}"))
        extract = partial(lora_diag.extract, model, adapter, extracted, rank=8, format=form)
        yield written_row(shop, partial(make, file="extract"), program, extract, extracted, base)
    if case.name == LARGE and program == "llama.cpp":
        change = shop.change("peft", shop.base("q4"), adapter)
        quantised = partial(
            make, adapter=f"{case.name}, base in Q4_0", reference=change, tolerance=TOLERANCE_Q4
        )
        yield measure(
            shop,
            quantised(
                program, file=title, path=out / "adapter.gguf", model=shop.gguf("q4"), judged=out
            ),
        )


def written_row(
    shop: Shop,
    make: Callable[..., File],
    program: str,
    write: Callable[[], object],
    out: Path,
    base: str,
) -> Row:
    """Write a file for a program with loradiag; return the row of the file, or why
    there is none.
    """
    gguf = program == "llama.cpp"
    path = out / "adapter.gguf" if gguf else out
    file = make(
        program, path=path, model=shop.gguf(base) if gguf else shop.base(f"mlx-{base}"), judged=out
    )
    try:
        write()
    except InputError as error:
        return not_written(file, error)
    return measure(shop, file)


def not_written(file: File, error: InputError) -> Row:
    """Return the row of a file that loradiag refuses to write."""
    reason = str(error).partition(": ")[2].partition(";")[0]
    return Row(file.program, "", file.adapter, file.file, f"not written: {reason}", "")


def mlx_rows(shop: Shop) -> Iterator[Row]:
    """Yield the rows of adapters as mlx-lm writes them."""
    for base in ("tied", "untied"):
        folder = fresh(shop.folder / "mlx")
        for name, path in mlx_adapters(shop.base(base), folder, base == "tied").items():
            model, title = (
                shop.base(base),
                f"mlx-lm: {name}, {base}" if "LoRA on" in name else f"mlx-lm: {name}",
            )
            plain = shop.base("untied") if "lm_head" in name else model
            try:
                stated = shop.change_by(path, plain)
            except InputError as error:
                outcome = shop.change("mlx-lm", shop.base(f"mlx-{base}"), path)
                end = outcome if isinstance(outcome, str) else "runs"
                problem = f"not read: {str(error).partition(': ')[2]}"
                yield Row(
                    "mlx-lm",
                    shop.versions["mlx-lm"],
                    title,
                    "by hand",
                    problem,
                    end,
                    agrees=end != "runs",
                )
                continue
            file = File(
                "mlx-lm",
                title,
                "by hand",
                path,
                shop.base(f"mlx-{base}"),
                path,
                model,
                plain,
                stated,
            )
            yield measure(shop, file)


def image_rows(shop: Shop) -> Iterator[Row]:
    """Yield the rows of adapters of the U-Net and the text encoder, as their programs and ``--fix``
    write them.
    """
    unet, encoder, second = map(shop.base, ("unet", "text_encoder", "text_encoder_2"))
    folder = fresh(shop.folder / "images")
    for name, path in image_adapters(unet, encoder, folder).items():
        base = second if "text encoder 2" in name else encoder if "text encoder" in name else unet
        stated = shop.change_by(path, base, program="diffusers")
        yield measure(
            shop, File("diffusers", name, "by hand", path, base, path, base, base, stated)
        )
        for form in ("kohya", "diffusers") if "U-Net" not in name else ():
            out = path.parent / form
            fixed = out / LAYOUTS[form].file
            file = File("diffusers", name, f"--fix {form}", fixed, base, fixed, base, base, stated)
            try:
                lora_diag.make_portable(path, out, base, form=form)
            except InputError as error:
                yield not_written(file, error)
            else:
                yield measure(shop, file)


def main() -> None:
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.servers")
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, help="JSON lines, one per row")
    parser.add_argument("--programs", default=",".join(CONSUMERS))
    parser.add_argument("--python", default=sys.executable, help="a Python that has the programs")
    parser.add_argument("--llamacpp", type=Path, help="folder of llama.cpp's converters")
    parser.add_argument("--work", type=Path, default=Path(".bench/servers"))
    options = parser.parse_args()
    programs = options.programs.split(",")
    if unknown := {*programs} - {*CONSUMERS}:
        raise SystemExit(
            f"--programs: {', '.join(unknown)} unknown; give some of {', '.join(CONSUMERS)}"
        )
    options.work.mkdir(parents=True, exist_ok=True)
    shop = Shop(options.work.resolve(), options.model.resolve(), options.python, options.llamacpp)
    if options.out:
        options.out.write_text("")
    rows = [*show(language_rows(shop, programs), options.out)]
    rows += [*show(mlx_rows(shop) if "mlx-lm" in programs else (), options.out)]
    rows += [*show(image_rows(shop) if "diffusers" in programs else (), options.out)]
    print(f"\n{processor()}, torch {torch.__version__}")
    for program in dict.fromkeys(row.program for row in rows):
        print(f"\n**{program} {shop.versions[program]}**")
        print_table(HEAD, map(cells, merge(row for row in rows if row.program == program)))
    wrong = [row for row in rows if row.agrees is False]
    print(f"\n{len(rows)} rows, {len(wrong)} wrong predictions")


HEAD = "adapter | file | predicted | measured | slope | error | from prediction | agrees"


def show(rows: Iterable[Row], out: Path | None) -> Iterator[Row]:
    """Yield rows, and append each to a file as it is there."""
    for row in rows:
        print(row.program, *cells(row), sep=" | ", file=sys.stderr, flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        yield row


def merge(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield one row for the files of one adapter with one result, that with the largest error."""
    groups: dict[tuple[str, str, str, bool | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.adapter, row.predicted, row.measured, row.agrees), []).append(row)
    for group in groups.values():
        worst = max(group, key=lambda row: row.from_prediction or 0)
        yield replace(worst, file=", ".join(row.file for row in group))


def cells(row: Row) -> list[str]:
    """Return the cells of a row."""
    slope = "" if row.slope is None else f"{row.slope:.5f}"
    errors = ["" if value is None else f"{value:.2g}" for value in (row.error, row.from_prediction)]
    agrees = {None: "", True: "yes", False: "**no**"}[row.agrees]
    texts = (row.adapter, row.file, shorten(row.predicted), shorten(row.measured))
    return [*(text.replace("|", "/") for text in texts), slope, *errors, agrees]


def shorten(text: str, most: int = 110) -> str:
    """Return a text with at most so many characters."""
    return text if len(text) <= most else f"{text[:most]}…"


if __name__ == "__main__":
    main()
