"""Markdown for a pull request: escaped, below 60 KB, and with the numbers of the records."""

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lora_diag.records.verdict import Verdict
from lora_diag.rendering.html import escape_markdown
from lora_diag.reports.markdown import MAX_BYTES, code, markdown_report
from tests.building import build
from tests.reports.making import decay, residual, residuals, spectra, spectrum
from tests.reports.test_html import evidence, small

GITHUB = MarkdownIt("commonmark").enable("table")


def test_table_has_medians_of_records():
    run = small()[0]
    energies = [record.energy["8"] for record in run if "q_proj" in record.layer]
    (row,) = [
        line
        for line in markdown_report(evidence(run)).splitlines()
        if line.startswith("| `self_attn.q_proj`")
    ]
    assert row.split(" | ")[1] == str(len(energies))
    assert f"| {np.median(energies):.3g} |" in row


def test_adapter_rows_pool_layers_of_type_as_residual_does():
    far = residual("model.layers.0.q_proj.weight", 8, 0.9, fro=9.0, scale=0.5, limited_by="scale")
    near = residual("model.layers.1.q_proj.weight", 8, 0.2, fro=1.0)
    whole = far.fro**2 + near.fro**2
    epsilon, floor = (
        (sum((getattr(record, name) * record.fro) ** 2 for record in (far, near)) / whole) ** 0.5
        for name in ("epsilon", "epsilon_min")
    )
    inner = sum(record.cosine * record.norm_ratio * record.fro**2 for record in (far, near))
    cosine = inner / (whole * sum(record.adapter_fro**2 for record in (far, near))) ** 0.5
    text = markdown_report(evidence(residuals([far, near])))
    assert (
        f"| `q_proj` | 2 | {epsilon:.3g} | {floor:.3g} | {cosine:.3g} | scale 1, rank 1 |" in text
    )


@given(st.text(st.sampled_from("`|\\<>*_@#[]()!&a \n:/"), max_size=40))
def test_text_renders_as_itself(text):
    page = GITHUB.render(f"x{escape_markdown(text)}x")
    plain = re.sub(r"<[^>]+>", "", page)
    assert "<" not in re.sub(r"</?p>", "", page)
    import html

    wanted = "".join(char if char.isprintable() else "\\n" for char in text).strip()
    assert re.sub(r"\s+", " ", html.unescape(plain)).strip() == re.sub(r"\s+", " ", f"x{wanted}x")


@pytest.mark.slow
@given(st.text(min_size=1, max_size=40))
def test_code_span_stays_in_one_cell(text):
    page = GITHUB.render(f"| a | b |\n|---|---|\n| {code(text)} | end |\n")
    assert page.count("<td>") == 2
    assert page.count("<code>") == 1
    assert "<td>end</td>" in page


@pytest.mark.slow
def test_markdown_report_stays_below_60_kb():
    layers = [f"model.layers.{i}.{'x' * 300}{i}.weight" for i in range(3000)]
    run = spectra(
        [spectrum("x", decay(16, 0.1)).model_copy(update={"layer": layer}) for layer in layers]
    )
    failed = {"rule": "r" * 500, "allowed": "x" * 500, "status": "failed", "message": "m" * 999}
    verdicts = tuple(build(Verdict, layer=layer, **failed) for layer in layers)
    text = markdown_report(evidence(replace(run, whole=verdicts)))
    assert len(text.encode()) < MAX_BYTES
    assert "and 2960 more" in text
    few = spectra(run.layers[:1], inputs=(("base", "b" * 300), ("tuned", "t" * 300)))
    text = markdown_report(evidence(*[few] * 250))
    assert len(text.encode()) < MAX_BYTES
    assert "loradiag report --format html" in text[-200:]
