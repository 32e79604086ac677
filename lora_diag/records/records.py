"""The records of schema 1: one JSON object a line, in the words of the field.

Fractions lie in [0, 1]. "Energy" means Σσ² and nothing else. A value that does not exist (the energy share of a zero
update, a rank beyond the values kept) is null, never NaN. A file holds one run: its ``run`` record, the records of its
layers, those about the whole run, what was left out, and its ``end`` record.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lora_diag.records.allocation import Allocation, Certificate
from lora_diag.records.curvature import Curvature, LossBound
from lora_diag.records.extraction import Extraction
from lora_diag.records.fisher import Fisher
from lora_diag.records.fleet import Fleet
from lora_diag.records.interference import Interference, Union
from lora_diag.records.intrinsic import Intrinsic
from lora_diag.records.intruders import Intruders
from lora_diag.records.merge import Merge
from lora_diag.records.overlap import Overlap
from lora_diag.records.probe import Probe
from lora_diag.records.residual import Residual
from lora_diag.records.run import End, LeftOut, Run
from lora_diag.records.sensitivity import FirstOrder, Sensitivity
from lora_diag.records.spectrum import Spectrum
from lora_diag.records.verdict import Verdict

# What a diagnostic says of one layer, and what is said of a run as a whole.
LayerRecord = Spectrum | Residual | Overlap | Allocation | Merge | Extraction | Interference | Union | Intruders | Fleet
WholeRecord = Certificate | Verdict | Probe | Curvature | LossBound | Intrinsic | Sensitivity | FirstOrder | Fisher

AnyRecord = Annotated[Run | LayerRecord | WholeRecord | LeftOut | End, Field(discriminator="record")]
