"""Spectra in the metric of the data are told as such: never as those of the weights."""

import pytest

from lora_diag.records.vocabulary import METRIC_NAMES
from lora_diag.reports.advice import advice
from lora_diag.reports.subject import subject_of
from tests.reports.making import decay, low_rank, names, questions, spectra, spectrum, vector
from tests.reports.test_html import evidence

INPUTS = (("base", "base"), ("tuned", "full ft"), ("activations", "act.safetensors"))


def plain(power: float = 0.3):
    """Slow decay, a head that holds most of the change and a heavy norm: three rules have something
    to say.
    """
    head = spectrum("lm_head.weight", decay(128, 0.3, scale=20.0))
    return spectra(
        [*(spectrum(n, decay(128, power)) for n in names(2)), head],
        [vector("model.norm.weight", 90.0)],
    )


def weighted(metric: str = "data", power: float = 0.3):
    run = plain(power)
    layers = tuple(
        record.model_copy(update={"metric": metric, "weights_fro": 1.0}) for record in run.layers
    )
    return spectra(layers, run.left_out, INPUTS)


def test_rules_on_weights_ignore_other_metrics():
    assert advice(evidence(plain()))
    assert advice(evidence(weighted())) == []


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_spectrum_and_residual_are_separate_evidence(order):
    runs = [plain(), weighted("kfac", power=3.0)]
    both = evidence(*(runs[i] for i in order))
    assert both.update is not None
    assert both.update.results is runs[0]
    assert [step.because for step in advice(both)] == [
        step.because for step in advice(evidence(plain()))
    ]
    answers = {answer.question: answer.says for answer in subject_of(both).answers}
    assert answers[low_rank()].startswith("no")
    assert answers[f"{low_rank()[:-1]} in {METRIC_NAMES['kfac']}?"].startswith("yes")
    assert "‖ΔW‖²" in answers[questions("spectrum", place=3)[0]]
