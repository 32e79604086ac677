"""Summary of the records."""

from lora_diag.records import Results
from lora_diag.rendering.statements import (
    Statement,
    final_statements,
    left_out,
    make_statement,
    state_inputs,
)
from lora_diag.rendering.text import number, percent, short
from loradiag_nuclear.record import Nuclear


def statements(results: Results[Nuclear]) -> list[Statement]:
    """Return the summary."""
    total = sum(record.nuclear for record in results)
    most = max(results, key=lambda record: record.nuclear, default=None)
    found = []
    if most is not None and total:
        text = (
            f"{number(total)} in all, {percent(most.nuclear / total)} of it in {short(most.layer)}"
        )
        found.append(make_statement("where", "Nuclear norm", text))
    return [state_inputs(results), *found, left_out(results), *final_statements(results)]
