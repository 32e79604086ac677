"""Terminal output of ``probe curvature``: curvature of the loss, and quality of the loss bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lora_diag.probes.curvature.record import Curvature, LossBound
from lora_diag.records import Results
from lora_diag.records.base import Shown, value_at
from lora_diag.rendering.losses import probe_summary
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import Grid, Rows, columns_of, grid_of, rows_of, title_of
from lora_diag.rendering.text import format_shown, median_rank, middle, number, percent, short

# Interpretation of the results, by the point or, at TUNED, by the matrix.
_READINGS = {
    "base": "the projected gradient is a surrogate for the update, from one point and few "
    "eigenpairs; probe sweep "
    "measures the rank that training needs",
    "ggn": "Gauss-Newton omits the curvature of the model's outputs: with its λ, (λ/2)Σσ² is not a "
    "bound, even near "
    "TUNED",
    "hessian": "λ is the largest eigenvalue at this point, but a bound needs it for the whole "
    "path, so the bound is an "
    "estimate",
}
# Relative error below which the second-order model is accurate.
ACCURATE_ERROR = 0.1
# Ratio of the bound to the measured gap above which it is too loose for a choice: 680 to 29,000 on
# three models.
LOOSE_RATIO = 100.0


def curvature_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: at TUNED the bound and the model, at BASE the surrogate; the
    curvature.
    """
    joint, layers, bounds = _split_records(results)
    if joint is None:
        return probe_summary(results, reading="")
    statements = []
    reading = _READINGS[joint.matrix]
    if bounds:
        statements.append(_describe_bound(bounds, joint))
    if joint.at == "base":
        reading = _READINGS["base"]
        if layers:
            lines = _describe_surrogate(layers)
            statements.append(make_statement("surrogate", "Surrogate", *lines))
    return probe_summary(
        results,
        *statements,
        make_statement("model", "Model", _describe_model(bounds)),
        make_statement("curvature", "Curvature", _describe_curvature(joint)),
        reading=f"{reading}; all numbers are for this set; the curvature on few tokens can differ "
        "from that on many",
    )


def curvature_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return the table of curvatures, one row per module ``type`` or ``layer``, and that of bounds
    by rank, if any.
    """
    joint, layers, bounds = _split_records(results)
    grids = []
    if joint is not None:
        grids.append(_make_curvatures_grid(joint, layers, per))
    if bounds:
        grids.append(_make_bounds_grid(bounds))
    return grids


def _split_records(
    results: Results[Any],
) -> tuple[Curvature | None, list[Curvature], list[LossBound]]:
    """Return the record of all layers, the records of single layers, and the records of
    truncations.
    """
    records = results.whole_of(Curvature)
    joint = next((record for record in records if record.layer is None), None)
    layers = [record for record in records if record.layer is not None]
    return joint, layers, results.whole_of(LossBound)


def _pool_ranks(path: str) -> Callable[[Sequence[Any]], str | None]:
    """Return a function that gives the median of the known ranks at a path, as text; None if none
    is known.
    """

    def pool(records: Sequence[Any]) -> str | None:
        known = [rank for record in records if (rank := value_at(record, path)) is not None]
        return median_rank(known, max(known)) if known else None

    return pool


# Columns of the gradient in the span of the top eigenpairs, at BASE.
_SURROGATE = (
    Shown(
        "surrogate.share",
        "held",
        "Fraction of the gradient in the top eigenpairs",
        main=True,
        form="percent",
    ),
    Shown(
        "surrogate",
        "pairs",
        "Eigenpairs that hold it",
        main=True,
        pool=_pool_ranks("surrogate.pairs_at"),
    ),
    Shown(
        "surrogate",
        "rank 90%",
        "Rank of it at 90%",
        main=True,
        pool=_pool_ranks("surrogate.rank_at.0.9"),
    ),
)


def _make_curvatures_grid(joint: Curvature, layers: Sequence[Any], per: str) -> Grid:
    rows: Rows = [("all layers", [joint]), *rows_of(layers, per)]
    columns = []
    about = (
        "λ max is the largest curvature of the loss in any direction; the trace is the sum over "
        "all directions, "
        "with its standard error. A step of a given length costs most where λ is large."
    )
    if joint.at == "base":
        first = next((record for record in layers if record.surrogate is not None), None)
        # Joint eigenpairs have one fraction of the whole gradient, which belongs in the row of all
        # layers.
        whole: Rows = [("all layers", [first]), *((name, []) for name, _ in rows[1:])]
        is_joint = first is not None and first.surrogate.joint
        *held, rank = _SURROGATE
        columns = [*columns_of(held, whole if is_joint else rows), *columns_of([rank], rows)]
        columns = [column for column in columns if set(column.cells) != {"-"}]
        about += (
            " Held is the fraction of the gradient in the span of the top eigenpairs, rank "
            "90% the rank of that part."
        )
    matrix = "Hessian" if joint.matrix == "hessian" else "generalised Gauss-Newton"
    caption = f"Curvature of the loss at {joint.at.upper()} ({matrix})"
    return grid_of(Curvature.shown, rows, title_of(per), caption, about, columns)


def _make_bounds_grid(bounds: Sequence[LossBound]) -> Grid:
    rows = [(f"r={record.rank}", [record]) for record in bounds if record.along == 1]
    columns = columns_of(LossBound.shown, rows)
    along = min(record.along for record in bounds)
    if along < 1:
        nearer = [
            (name, [r for r in bounds if r.rank == end.rank and r.along == along])
            for name, (end,) in rows
        ]
        ratio_field = next(field for field in LossBound.shown if field.path == "predicted_ratio")
        columns[-2:-2] = columns_of([replace(ratio_field, head=f"at {along:g}")], nearer)
    return Grid(
        "Loss gap of truncation to rank r, measured and modelled, E = ΔW_r − ΔW",
        "rank",
        tuple(name for name, _ in rows),
        tuple(columns),
        "Columns with ÷ are the second-order model and the bound (λ/2)Σσ² divided by the measured "
        "gap. A model "
        "near 1 can replace a measurement; a bound many times the gap cannot choose a rank.",
    )


def _describe_curvature(joint: Curvature) -> str:
    """State the largest and the smallest eigenvalue."""
    text = f"largest eigenvalue λ = {number(joint.eigenvalues[0])}"
    if joint.smallest is not None:
        text += f", smallest μ = {number(joint.smallest)}"
        if joint.strongly_convex:
            text += ", positive: the loss is strongly convex there"
    return text


def _describe_model(bounds: Sequence[LossBound]) -> str:
    """State the range of the second-order model over the measured gap, and the ranks at which it is
    accurate.
    """
    if not bounds:
        return ""
    ratios = {
        r.rank: r.predicted_ratio for r in bounds if r.along == 1 and r.predicted_ratio is not None
    }
    if not ratios:
        return "no gap is large enough to compare"
    accurate = [f"r={rank}" for rank, ratio in ratios.items() if abs(ratio - 1) <= ACCURATE_ERROR]
    within = f"within {ACCURATE_ERROR:.0%} at"
    where = f"{within} {', '.join(accurate)}" if accurate else f"not {within} any rank"
    return (
        f"the second-order model is {min(ratios.values()):.2f} to {max(ratios.values()):.2f} times "
        f"the measured gap, {where}"
    )


def _describe_bound(bounds: Sequence[LossBound], joint: Curvature) -> Statement:
    """State how far the bound is above the measured gaps, and where it does not hold."""
    ratios = [r.upper / r.gap for r in bounds if r.along == 1 and r.gap > 1e-6]
    answer = ""
    if ratios:
        range_ = f"{number(min(ratios))} to {number(max(ratios))}"
        answer = f"(λ/2)Σσ² is {range_} times the measured gap"
        if min(ratios) > LOOSE_RATIO:
            answer += ": too loose to choose a rank"
    bound = "⟨∇L, E⟩ + (λ/2)Σσ²"
    exceeded = [f"r={r.rank} (fraction {r.along:g})" for r in bounds if not r.holds]
    if exceeded:
        where = ", ".join(exceeded)
        bound += f" is exceeded at {where}: the curvature between the points exceeds λ"
        return make_statement("bound", "Bound", bound, answer, answer=answer)
    bound += f" is at or above the gap at all {len(bounds)} points measured"
    if any(record.curvature > joint.eigenvalues[0] for record in bounds):
        bound += ", although the curvature along E exceeds λ at some"
    return make_statement("bound", "Bound", answer, bound, answer=answer)


def _describe_surrogate(layers: Sequence[Curvature]) -> list[str]:
    """State the fraction of the gradient in the top eigenpairs, and the rank that it suggests."""
    surrogates = {r.layer or "": r.surrogate for r in layers if r.surrogate is not None}
    if not surrogates:
        return ["not measured yet"]
    first = next(iter(surrogates.values()))
    kind, scope = ("joint", "") if first.joint else ("each layer's", " (median)")
    share = middle([surrogate.share for surrogate in surrogates.values()])
    random = middle([surrogate.random for surrogate in surrogates.values()])
    lines = [
        f"the span of {kind} top {first.eigenpairs} eigenpairs has {format_shown(share, percent)} "
        f"of the gradient{scope}; a random subspace of the same dimension would have "
        f"{percent(random or 0.0)}"
    ]
    ranks = []
    for layer, surrogate in surrogates.items():
        rank = surrogate.rank_at["0.9"]
        if rank is not None:
            ranks.append((rank, short(layer)))
    if ranks:
        low, _ = min(ranks)
        high, name = max(ranks)
        lines.append(
            f"the gradient projected onto them has rank {low} to {high} at 90% of its energy, "
            f"the highest in {name}"
        )
    return lines
