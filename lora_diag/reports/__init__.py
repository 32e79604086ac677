"""``report``: combine the results of several runs in a page, a text or a table."""

from lora_diag.feature import Feature

FEATURE = Feature(__name__, "report", command=".command:report", functions=(".run:report",))
