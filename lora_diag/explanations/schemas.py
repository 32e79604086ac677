"""JSON Schema of results files and policies, from the classes that read them."""

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
from lora_diag.explanations.terms import SHARED, document_fields, find_models
from lora_diag.gating.policy import Policy, PolicyTable

if TYPE_CHECKING:
    from lora_diag.cli.options import Shown


def results_schema() -> dict[str, Any]:
    """Return the JSON Schema of one line of a results file.

    Unknown fields are valid: later versions may add some.
    """
    kinds = [*SHARED, *catalog.record_kinds().values()]
    line: Any = Annotated[reduce(or_, kinds), Field(discriminator="record")]
    schema = TypeAdapter(line).json_schema(mode="serialization")
    return _document(schema, "A line of a loradiag results file", kinds)


def policy_schema() -> dict[str, Any]:
    """Return the JSON Schema of a policy of ``gate`` as TOML gives it, with dates as text.

    Unknown keys are invalid.
    """
    return _document(Policy.model_json_schema(), "A policy of loradiag gate", [Policy])


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
        if issubclass(model, PolicyTable):
            definition["additionalProperties"] = False
        documented = document_fields(model)
        for attribute, field in model.model_fields.items():
            name = field.alias or attribute
            if field.exclude:
                del definition["properties"][name]
            elif text := documented.get(name) or documented.get(attribute):
                definition["properties"][name]["description"] = text.replace("``", "")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": title}


_SCHEMAS = {"results": results_schema, "policy": policy_schema}


def run_schema(shown: Shown, file_kind: str) -> int:
    """Print a JSON Schema.

    Raises:
        UsageError: There is no such kind of file.
    """
    if file_kind not in _SCHEMAS:
        raise UsageError(f"schema: {file_kind} has no schema; choose {' or '.join(_SCHEMAS)}")
    shown.print_line(dumps(_SCHEMAS[file_kind](), indent=2, ensure_ascii=False))
    return DONE
