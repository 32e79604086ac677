"""What the records say."""

from lora_diag.records import Results
from lora_diag.rendering.statements import Statement, compared, ending, left_out, say
from lora_diag.rendering.text import number, percent, short
from loradiag_nuclear.record import Nuclear


def statements(results: Results[Nuclear]) -> list[Statement]:
    """Return the summary."""
    total = sum(record.nuclear for record in results)
    most = max(results, key=lambda record: record.nuclear, default=None)
    found = []
    if most is not None and total:
        share = percent(most.nuclear / total)
        found.append(say("where", "Nuclear norm", f"{number(total)} in all, {share} of it in {short(most.layer)}"))
    return [compared(results), *found, left_out(results), *ending(results)]
