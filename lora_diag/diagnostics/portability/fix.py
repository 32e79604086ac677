"""``portability --fix``: write an adapter that every consumer scales alike, and judge it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lora_diag.adapters import Adapter, is_adapter, open_adapter
from lora_diag.adapters.contents import contents_of
from lora_diag.adapters.portable import write_portable
from lora_diag.adapters.updates import Site
from lora_diag.adapters.user_alpha import alpha_option
from lora_diag.checkpoints import Checkpoint, as_path, locate, open_checkpoint
from lora_diag.diagnostics.portability.record import NONLINEAR_PARTS, Portability
from lora_diag.diagnostics.portability.run import portability
from lora_diag.errors import InputError, UsageError
from lora_diag.linalg.stacked import gap
from lora_diag.records import Results

# Rounding of s·B to float32 is 2^-24 per entry; a larger error is a fault of the writer.
ROUNDING = 1e-5


def make_portable(
    adapter: Path | str,
    output: Path | str,
    base: Path | str | None = None,
    *,
    form: str | None = None,
    dora_to_lora: bool = False,
    leave_out: bool = False,
    consumers: Sequence[str] = (),
    require: Sequence[str] = (),
    max_lora_rank: int | None = None,
    alpha: float | None = None,
    alpha_is_rank: bool = False,
) -> Results[Portability]:
    r"""Write an adapter that every program scales alike: one rank, zeros where it was lower, α = r, s folded into B.

    Args:
        adapter: The adapter.
        output: Folder to write; must not exist.
        base: The checkpoint it was trained on: for DoRA, for names missing from the adapter, and for other layouts.
        form: ``peft``, ``kohya``, ``diffusers``, ``mlx`` or ``gguf``; by default that of the adapter.
        dora_to_lora: Write the nearest LoRA of its rank for DoRA, with its error.
        leave_out: Omit tensors that it cannot store (biases, weights in full), instead of raising an error.
        consumers: Programs for which the written adapter is judged.
        require: Programs that must apply the written adapter.
        max_lora_rank: Largest rank that servers are configured to serve.
        alpha: α if the adapter's files have none.
        alpha_is_rank: State that α = r if they have none.

    Returns:
        The results of ``portability`` for the written adapter. Their settings name under ``fixed`` the rank, the dtype,
        the errors ε of truncated (also pooled) and of folded factors, and the skipped weights.

    Raises:
        UsageError: ``adapter`` is not an adapter, or ``output`` exists.
        InputError: A portable adapter cannot store a tensor, or the written one reads back differently.

    Example:
        >>> found = make_portable("sample_checkpoints/lora_r4", "portable/")  # doctest: +SKIP
        >>> [(record.consumer, record.status) for record in found]  # doctest: +SKIP
    """
    path = as_path(adapter)
    if not is_adapter(locate(path)):
        raise UsageError(f"{adapter}: not an adapter; the order is: loradiag portability ADAPTER [BASE] --fix -o OUT")
    opened = open_adapter(locate(path), alpha_option({"alpha": alpha, "alpha_is_rank": alpha_is_rank}))
    checkpoint = open_checkpoint(as_path(base)) if base is not None else None
    folder = Path(output)
    written = write_portable(opened, folder, checkpoint, form, dora_to_lora, leave_out)
    errors = distances(opened, folder, checkpoint)
    worst = max(errors.values(), default=0.0)
    if worst > ROUNDING and written.dtype == "float32":
        raise InputError(f"{folder}: reads back with an error of {worst:.1e}; do not use the output, and report this")
    results = portability(folder, base, consumers=consumers, require=require, max_lora_rank=max_lora_rank)
    fixed = {
        "rank": written.rank,
        "dtype": written.dtype,
        "rounding": worst,
        "truncated": dict(written.truncated),
        "epsilon": written.epsilon,
        "left_out": dict(written.unsupported),
    }
    run = results.run.model_copy(update={"settings": {**results.run.settings, "fixed": fixed}})
    return replace(results, run=run)


def distances(before: Adapter, after: Path, base: Checkpoint | None) -> dict[str, float]:
    """Return ‖ΔW' − ΔW‖_F / ‖ΔW‖_F of the written adapter for every weight with plain factors.

    Both are read as adapters are, and compared in factored form.

    Raises:
        InputError: A written weight cannot be read back under its name.
    """
    originals = {item.layer: item for item in contents_of(before, base).items}
    errors = {}
    for item in contents_of(open_adapter(after), base).items:
        counterpart = originals.get(item.layer)
        if counterpart is None:
            if base is None and after.exists() and open_adapter(after).form != before.form:
                continue  # the two layouts name weights differently, and only BASE relates the names
            raise InputError(
                f"{after}: {item.layer} is not a weight of {before.path}; do not use the output, and report this"
            )
        if counterpart.load is None or item.load is None or counterpart.part in NONLINEAR_PARTS:
            continue
        written, original = item.load(Site(item.shape)), counterpart.load(Site(counterpart.shape))
        assert isinstance(written, tuple)
        assert isinstance(original, tuple)
        norm = gap(original, (original[0] * 0, original[1]))
        errors[item.layer] = gap(written, original) / norm if norm else 0.0
    return errors
