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
    return probe_summary(
        results,
        *([_describe_bound(bounds, joint)] if bounds else []),
        make_statement(
            "surrogate",
            "Surrogate",
            *(_describe_surrogate(layers) if joint.at == "base" and layers else ()),
        ),
        make_statement("model", "Model", _describe_model(bounds)),
        make_statement("curvature", "Curvature", _describe_curvature(joint)),
        reading=f"{_READINGS['base' if joint.at == 'base' else joint.matrix]}; all numbers are for "
        "this set; the "
        "curvature on few tokens can differ from that on many",
    )


def curvature_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return the table of curvatures, one row per module ``type`` or ``layer``, and that of bounds
    by rank, if any.
    """
    joint, layers, bounds = _split_records(results)
    return [
        *([_make_curvatures_grid(joint, layers, per)] if joint is not None else []),
        *([_make_bounds_grid(bounds)] if bounds else []),
    ]


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
        "fraction of the gradient in the top eigenpairs",
        main=True,
        form="percent",
    ),
    Shown(
        "surrogate",
        "pairs",
        "eigenpairs that hold it",
        main=True,
        pool=_pool_ranks("surrogate.pairs_at"),
    ),
    Shown(
        "surrogate",
        "rank 90%",
        "rank of it at 90%",
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
    convex = ", positive: the loss is strongly convex there" if joint.strongly_convex else ""
    smallest = "" if joint.smallest is None else f", smallest μ = {number(joint.smallest)}{convex}"
    return f"largest eigenvalue λ = {number(joint.eigenvalues[0])}{smallest}"


def _describe_model(bounds: Sequence[LossBound]) -> str:
    """State the range of the second-order model over the measured gap, and the ranks at which it is
    accurate.
    """
    ratios = {
        r.rank: r.predicted_ratio for r in bounds if r.along == 1 and r.predicted_ratio is not None
    }
    if not ratios:
        return "no gap is large enough to compare" if bounds else ""
    accurate = [f"r={rank}" for rank, ratio in ratios.items() if abs(ratio - 1) <= ACCURATE_ERROR]
    return (
        f"the second-order model is {min(ratios.values()):.2f} to {max(ratios.values()):.2f} times "
        f"the measured gap, {'' if accurate else 'not '}within {ACCURATE_ERROR:.0%} at "
        f"{', '.join(accurate) or 'any rank'}"
    )


def _describe_bound(bounds: Sequence[LossBound], joint: Curvature) -> Statement:
    """State how far the bound is above the measured gaps, and where it does not hold."""
    bound, exceeded = (
        "⟨∇L, E⟩ + (λ/2)Σσ²",
        [f"r={r.rank} (fraction {r.along:g})" for r in bounds if not r.holds],
    )
    if exceeded:
        bound += (
            f" is exceeded at {', '.join(exceeded)}: the curvature between the points exceeds λ"
        )
    else:
        bound += f" is at or above the gap at all {len(bounds)} points measured"
        if any(record.curvature > joint.eigenvalues[0] for record in bounds):
            bound += ", although the curvature along E exceeds λ at some"
    ratios = [
        record.upper / record.gap for record in bounds if record.along == 1 and record.gap > 1e-6
    ]
    answer = ""
    if ratios:
        loose = ": too loose to choose a rank" if min(ratios) > LOOSE_RATIO else ""
        answer = (
            f"(λ/2)Σσ² is {number(min(ratios))} to {number(max(ratios))} times the measured "
            f"gap{loose}"
        )
    return make_statement(
        "bound", "Bound", *((bound, answer) if exceeded else (answer, bound)), answer=answer
    )


def _describe_surrogate(layers: Sequence[Curvature]) -> list[str]:
    """State the fraction of the gradient in the top eigenpairs, and the rank that it suggests."""
    pairs = [(record, record.surrogate) for record in layers if record.surrogate is not None]
    if not pairs:
        return ["not measured yet"]
    first = pairs[0][1]
    share, random = (middle([getattr(s, name) for _, s in pairs]) for name in ("share", "random"))
    kind, scope = ("joint", "") if first.joint else ("each layer's", " (median)")
    lines = [
        f"the span of {kind} top {first.eigenpairs} eigenpairs has {format_shown(share, percent)} "
        "of the gradient"
        f"{scope}; a random subspace of the same dimension would have {percent(random or 0.0)}"
    ]
    ranks = sorted(
        (s.rank_at["0.9"], short(r.layer or "")) for r, s in pairs if s.rank_at["0.9"] is not None
    )
    if ranks:
        (low, _), (high, name) = ranks[0], ranks[-1]
        lines.append(
            f"the gradient projected onto them has rank {low} to {high} at 90% of its energy, the "
            f"highest in {name}"
        )
    return lines
