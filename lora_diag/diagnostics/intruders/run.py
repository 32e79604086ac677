"""``intruders``: find new directions among the largest of a fine-tuned weight."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from lora_diag.diagnostics.intruders.measure import IntruderSettings, size
from lora_diag.diagnostics.intruders.measure import intruders as measure
from lora_diag.diagnostics.intruders.options import IntruderOptions
from lora_diag.diagnostics.intruders.record import Intruders
from lora_diag.errors import UsageError
from lora_diag.linalg import check_request
from lora_diag.records import Results
from lora_diag.running.layers import LayerRun
from lora_diag.running.measuring import without_rank
from lora_diag.running.options import show_options


@show_options
def intruders(
    base: Path | str,
    tuned: Path | str,
    **options: Unpack[IntruderOptions],
) -> Results[Intruders]:
    r"""Count intruder dimensions: largest left singular vectors of W_tuned without a counterpart in W_base.

    Args:
        base: Base checkpoint.
        tuned: Fine-tuned checkpoint or adapter.
        directions: k, the number of largest directions of each weight to compare.
        epsilon: ε in (0, 1): a direction with max_i |⟨u_i(W_base), u_j⟩| < ε is no direction of W_base.
        window: Width of the window of nearly equal singular values, as a fraction of σ_j.
        **options: ``IntruderOptions``.

    Returns:
        One record per matrix that both sides have.

    Raises:
        UsageError: An option is invalid.
        InputError: An input cannot be read.
        NothingComparedError: The sides have no weight in common.

    Example:
        >>> base, tuned = "sample_checkpoints/base", "sample_checkpoints/full_ft"
        >>> found = intruders(base, tuned, layers=r"0\.mlp\.up_proj")
        >>> found.layers[0].k, found.layers[0].intruders
        (10, 0)
    """
    run = LayerRun("intruders", options, IntruderOptions)
    top, epsilon, window = (run.options[name] for name in ("directions", "epsilon", "window"))
    check_request(run.options["method"], top, run.options["tol"])
    if not 0 < epsilon < 1:
        raise UsageError(f"--epsilon {epsilon}: must lie between 0 and 1")
    if not 0 <= window < 1:
        raise UsageError(f"--window {window}: must lie between 0 and 1")
    compared = run.compare(base, tuned)
    return run.over(
        [delta for delta in compared.pairing.deltas if delta.is_matrix],
        measure,
        size,
        run.settings(IntruderSettings, k=top, epsilon=epsilon, window=window),
        lambda layout, _, __: without_rank(compared.pairing, layout, run.where.here),
        compared.inputs,
        run.own,
    )
