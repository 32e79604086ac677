"""``explain``: every word of the output has a text; ``schema``: it accepts what the program reads,
and nothing else.
"""

import json
import re
import shlex
import tomllib
from typing import Literal

import jsonschema
import pytest
import typer

from lora_diag import catalog
from lora_diag.cli.options import make_function
from lora_diag.explanations import schemas, terms
from lora_diag.gating.policy import READY, Checks
from lora_diag.records.base import LayerRecord, document_fields
from tests.served import ROOT

EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.jsonl"))


@pytest.fixture(scope="module")
def results_validator():
    schema = schemas.results_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def fields_of_records():
    kinds = dict.fromkeys(model for _, model in terms._find_models())
    return [
        (model, name, field)
        for model in kinds
        for name, field in model.model_fields.items()
        if name != "record"
    ]


def test_every_value_of_every_field_is_explained():
    words = {
        word for _, _, field in fields_of_records() for word in terms.list_values(field.annotation)
    }
    assert {"unresolved", "wrong scale", "only_in_base", "not judged"} <= words
    assert [word for word in words if not terms.find_terms(word)] == []


def test_every_field_column_and_check_is_explained():
    undocumented = [
        f"{model.__name__}.{name}"
        for model, name, field in fields_of_records()
        if not document_fields(model).get(field.alias or name)
    ]
    assert undocumented == []
    assert [name for name in Checks.names() if len(document_fields(Checks)[name]) < 20] == []
    columns = [shown for _, model in terms._find_models() for shown in getattr(model, "shown", ())]
    assert all(column.about for column in columns)
    titles = {column.title for column in columns}
    assert len(titles) > 50
    assert [title for title in titles if not terms.find_terms(title)] == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["r@90%"], "90% of the energy"),
        (["Not", "Judged"], "does not apply"),
        (["gibberish"], "loradiag verify-merge BASE ADAPTER MERGED"),
    ],
)
def test_explain_prints_meaning(loradiag, words, expected):
    ran = loradiag("explain", *words)
    assert (ran.code, ran.err) == (0, "")
    assert re.search(expected, " ".join(ran.out.split()))
    assert max(map(len, ran.out.splitlines())) <= 80


def test_explain_without_words_lists_symptoms(loradiag):
    lines = loradiag("explain").out.splitlines()
    assert sum(line.startswith("  ") for line in lines) >= 20
    assert loradiag("explain", *lines[1].split()).code == 0


def test_unknown_word_gets_nearest(loradiag):
    ran = loradiag("explain", "unresolvd\x1b[2J")
    assert ran.code == 2
    assert "\x1b" not in ran.err
    assert "did you mean unresolved" in loradiag("explain", "unresolvd").err
    assert loradiag("explain", "?").code == 2
    assert "Ε" not in loradiag("explain", "excess").out  # a Greek capital is another sign


def commands_in(page: str) -> list[list[str]]:
    text = (ROOT / "lora_diag" / "explanations" / page).read_text(encoding="utf-8")
    return [
        shlex.split(line)[1:]
        for line in re.findall(r"^    (loradiag .*)$", text, flags=re.MULTILINE)
    ]


@pytest.mark.parametrize("words", commands_in("symptoms.md"), ids=" ".join)
def test_commands_of_symptoms_exist(words):
    declared = {name: (feature, command) for name, feature, command in catalog.commands()}
    name = " ".join(words[:2]) if " ".join(words[:2]) in declared else words[0]
    application = typer.Typer(rich_markup_mode=None, add_completion=False)
    application.command(name)(make_function(*declared[name]))
    # refuses unknown options and missing arguments
    typer.main.get_command(application).make_context(name, words[len(name.split()) :])


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_schema_accepts_every_record(results_validator, path):
    for line in path.read_text(encoding="utf-8").splitlines():
        results_validator.validate(json.loads(line))


@pytest.mark.parametrize(
    "change",
    [
        {"record": "spektrum"},
        {"energy": {"4": 1.5}},
        {"fro": -1.0},
        {"shape": [1]},
        {"layer": None},
    ],
)
def test_schema_refuses_what_the_program_refuses(results_validator, change):
    record = json.loads((ROOT / "docs/examples/spectrum.jsonl").read_text().splitlines()[1])
    results_validator.validate(record)
    with pytest.raises(jsonschema.ValidationError):
        results_validator.validate(record | change)


@pytest.mark.parametrize("name", READY)
def test_policy_schema_accepts_included_policies(name):
    validator = jsonschema.Draft202012Validator(schemas.file_schemas()["policy"])
    policy = tomllib.loads(
        (ROOT / f"lora_diag/gating/policies/{name}.toml").read_text(encoding="utf-8")
    )
    validator.validate(policy)
    policy["rule"][0]["requires"] = "relative <= 1"
    with pytest.raises(jsonschema.ValidationError, match="requires"):
        validator.validate(policy)


def test_schema_is_printed_as_json(loradiag):
    assert json.loads(loradiag("schema", "policy").out) == schemas.file_schemas()["policy"]
    refused = loradiag("schema", "tables")
    assert (refused.code, "results or policy" in refused.err) == (2, True)


def test_schema_documents_classes_of_one_name(monkeypatch):
    class Spectrum(LayerRecord):
        """A spectrum of a plugin."""

        record: Literal["plugin_spectrum"] = "plugin_spectrum"
        layer: str

    kinds = {**catalog.record_kinds(), "plugin_spectrum": Spectrum}
    monkeypatch.setattr(catalog, "record_kinds", lambda: kinds)
    found = [
        one["description"]
        for one in schemas.results_schema()["$defs"].values()
        if one["title"] == "Spectrum"
    ]
    assert len(found) == 2
    assert "A spectrum of a plugin." in found
