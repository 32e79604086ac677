"""The summary of several adapters: what limits each, the best aligned first, also where there is little room."""

import lora_diag.catalog as catalog
from lora_diag.diagnostics.residual.show import residual_lines
from lora_diag.rendering.statements import find, limit_lines
from tests.reports.making import names, residual, residuals

COSINES = {f"lora_{i}": cosine for i, cosine in enumerate((0.2, 0.5, 0.1, 0.9, 0.3, 0.4, 0.6, 0.7, 0.8))}
RESULTS = residuals([residual(n, cosine=cosine, adapter=a) for a, cosine in COSINES.items() for n in names(2)], COSINES)


def test_each_adapter_has_its_limit_best_aligned_first():
    ranked = sorted(COSINES, key=COSINES.__getitem__, reverse=True)
    for key in ("limited_by", "distance"):
        assert [line.partition(":")[0] for line in find(residual_lines(RESULTS), key).lines] == ranked


def test_short_summary_of_nine_adapters_has_the_best():
    with limit_lines(8):
        text = catalog.table(RESULTS, 80, next_command="loradiag probe outputs base full_ft lora --eval held_out.txt")
    summary = text.rpartition("\n\n")[2].splitlines()
    assert len(summary) <= 8
    assert summary[0].startswith("Limited by  lora_3: rank in ")
    assert any(line.startswith("Distance    lora_3: ε = ") for line in summary)
