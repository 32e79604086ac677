"""``report``: what several runs say together, as one page, one text or one table."""

from lora_diag.feature import Feature

FEATURE = Feature(__name__, "report", command=".command:report", functions=(".run:report",))
