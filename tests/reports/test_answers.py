"""Answers are statements found by the keys that features declare: a key of one side only would
empty an answer.
"""

import ast
from importlib import import_module
from pathlib import Path

import pytest

from lora_diag.catalog import features
from lora_diag.rendering.losses import on_set
from lora_diag.rendering.statements import describe_resolution
from lora_diag.reports.evidence import Evidence
from lora_diag.reports.subject import answers
from tests.reports.making import names, overlap, overlaps, residual, residuals, spectra, spectrum
from tests.reports.test_advice import EASY
from tests.reports.test_html import evidence

ANSWERING = [feature for feature in features() if feature.questions]


# Statements that several features make by a function of ``rendering``.
SHARED = {"on_set": on_set("dev", "line"), "describe_resolution": describe_resolution([], "", "")}


def keys_of(package: str) -> set[str]:
    """Return the keys of all statements that the modules of a package make."""
    keys = set()
    for path in Path(import_module(package).__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = (
                node.func.id
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                else ""
            )
            if called in {"make_statement", "Statement"}:
                keys |= {
                    value.value
                    for value in ast.walk(node.args[0])
                    if isinstance(value, ast.Constant)
                }
            elif called in SHARED:
                keys.add(SHARED[called].key)
    return keys


@pytest.mark.parametrize("feature", ANSWERING, ids=[feature.name for feature in ANSWERING])
def test_declared_key_is_made_by_its_feature(feature):
    assert feature.statements
    assert {key for key, _ in feature.questions} <= keys_of(feature.package)


def ask(*results):
    return answers(evidence(*results))


UPDATE = spectra([spectrum(n, EASY) for n in names(2)])
ADAPTER = residuals([residual(n, 8, 0.4) for n in names(2)])
GRADIENTS = overlaps([overlap(n, step, 0.3, 0.6) for n in names(2) for step in (0, 50)])


@pytest.mark.parametrize(
    "results", [UPDATE, ADAPTER, GRADIENTS], ids=["spectrum", "residual", "overlap"]
)
def test_every_declared_question_on_weights_is_answered(results):
    (feature,) = [feature for feature in ANSWERING if feature.name == results.run.command]
    assert [answer.question for answer in ask(results)] == [
        *dict.fromkeys(q for _, q in feature.questions)
    ]


def test_answers_of_two_updates_name_their_run():
    first, *_ = ask(UPDATE)
    one, two = [answer for answer in ask(UPDATE, UPDATE) if answer.question == first.question]
    assert (one.more, two.more) == (
        (*first.more, "spectrum0.jsonl"),
        (*first.more, "spectrum1.jsonl"),
    )


def test_page_without_records_has_no_answer():
    assert answers(Evidence(())) == []
    assert ask(spectra([])) == [answer for answer in ask(spectra([])) if "no matrix" in answer.says]
