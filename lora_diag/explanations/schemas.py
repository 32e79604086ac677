"""JSON Schema of results files and of what users write, from the classes that read them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from inspect import getdoc
from json import dumps
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter

from lora_diag import catalog
from lora_diag.errors import DONE, UsageError
from lora_diag.explanations.terms import SHARED, find_models
from lora_diag.records.base import document_fields

if TYPE_CHECKING:
    from lora_diag.cli.options import OutputChoice


def results_schema() -> dict[str, Any]:
    """Return the JSON Schema of one line of a results file.

    Unknown fields are valid: later versions may add some.
    """
    kinds = [*SHARED, *catalog.record_kinds().values()]
    line: Any = Annotated[reduce(or_, kinds), Field(discriminator="record")]
    schema = TypeAdapter(line).json_schema(mode="serialization")
    return _document(schema, "A line of a loradiag results file", kinds)


def file_schemas() -> dict[str, dict[str, Any]]:
    """Return the JSON Schema of each kind of file, as JSON, TOML or YAML gives it."""
    schemas = {"results": results_schema()}
    for feature in catalog.features():
        for kind, path in feature.files:
            model = feature.load(path)
            title = f"A {kind} of loradiag {feature.name}"
            schemas[kind] = _document(model.model_json_schema(), title, [model])
    return schemas


def _document(
    schema: dict[str, Any], title: str, kinds: Iterable[type[BaseModel]]
) -> dict[str, Any]:
    """Return a schema with the documentation of every class and field, without excluded fields."""
    for model in dict.fromkeys(model for kind in kinds for model in find_models(kind)):
        names = {field.alias or name for name, field in model.model_fields.items()}
        # Classes of one name, such as that of a plugin, have other keys under $defs.
        definition = next(
            one
            for one in (*schema["$defs"].values(), schema)
            if one.get("title") == model.__name__ and {*one["properties"]} == names
        )
        definition["description"] = (getdoc(model) or "").partition("\n\n")[0].replace("\n", " ")
        documented = document_fields(model)
        for attribute, field in model.model_fields.items():
            name = field.alias or attribute
            if field.exclude:
                del definition["properties"][name]
            elif text := documented.get(name) or documented.get(attribute):
                definition["properties"][name]["description"] = text.replace("``", "")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": title}


def run_schema(shown: OutputChoice, file_kind: str) -> int:
    """Print a JSON Schema.

    Raises:
        UsageError: There is no such kind of file.
    """
    schemas = file_schemas()
    if file_kind not in schemas:
        raise UsageError(f"schema: {file_kind} has no schema; choose {' or '.join(schemas)}")
    shown.print_line(dumps(schemas[file_kind], indent=2, ensure_ascii=False))
    return DONE
