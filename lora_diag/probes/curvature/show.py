"""Terminal output of ``probe curvature``: curvature of the loss, and quality of the loss bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lora_diag.probes.curvature.record import Curvature, LossBound
from lora_diag.records import Results
from lora_diag.rendering.losses import probe_summary
from lora_diag.rendering.statements import Statement, make_statement
from lora_diag.rendering.tables import Column, Grid, Rows, columns_of, grid_of, rows_of, title_of
from lora_diag.rendering.text import count, format_shown, median_rank, middle, number, percent, short

# Relative error below which the second-order model is accurate, and the linear term is small.
ACCURATE_ERROR = 0.1
# Ratio of the bound to the measured gap above which it is too loose for a choice: 700 to 12,000 on two models.
LOOSE_RATIO = 100.0


def curvature_lines(results: Results[Any]) -> list[Statement]:
    """Return the statements: loss, curvature, gradient; at BASE the surrogate, at TUNED model and bounds."""
    joint, layers, bounds = _split_records(results)
    statements = []
    if joint is not None:
        statements += [
            make_statement("loss", "Loss", _describe_loss(joint)),
            make_statement("curvature", "Curvature", _describe_curvature(joint)),
            make_statement("gradient", "Gradient", _describe_gradient(joint, bounds)),
        ]
        statements += (
            [make_statement("surrogate", "Surrogate", _describe_surrogate(layers))]
            if joint.at == "base" and layers
            else []
        )
        if bounds:
            statements += [
                make_statement("model", "Model", _describe_model(bounds)),
                _describe_bound(bounds, joint),
                make_statement("lower", "Lower bound", _describe_lower_bound(joint)),
            ]
    return probe_summary(results, *statements, reading=_interpret(joint) if joint is not None else "")


def curvature_grids(results: Results[Any], per: str = "type") -> list[Grid]:
    """Return the table of curvatures, one row per module ``type`` or ``layer``, and that of bounds by rank, if any."""
    joint, layers, bounds = _split_records(results)
    return [
        *([_make_curvatures_grid(joint, layers, per)] if joint is not None else []),
        *([_make_bounds_grid(bounds)] if bounds else []),
    ]


def _split_records(results: Results[Any]) -> tuple[Curvature | None, list[Curvature], list[LossBound]]:
    """Return the record of all layers, the records of single layers, and the records of truncations."""
    records = results.whole_of(Curvature)
    joint = next((record for record in records if record.layer is None), None)
    layers = [record for record in records if record.layer is not None]
    return joint, layers, results.whole_of(LossBound)


def _make_curvatures_grid(joint: Curvature, layers: Sequence[Any], per: str) -> Grid:
    groups: Rows = [("all layers", [joint]), *rows_of(layers, per)]
    columns = []
    if joint.at == "base":
        surrogates = [[record.surrogate for record in group if record.surrogate is not None] for _, group in groups]
        # Joint eigenpairs have one fraction of the whole gradient, which belongs in the row of all layers.
        shares = (
            [surrogates[1][:1], *([] for _ in surrogates[1:])]
            if surrogates[1:] and any(s.joint for s in surrogates[1])
            else surrogates
        )
        columns = [
            Column("held", tuple(format_shown(middle([s.share for s in group]), percent) for group in shares)),
            Column("pairs", tuple(_format_median_rank([s.pairs_at for s in group]) for group in shares)),
            Column("rank 90%", tuple(_format_median_rank([s.rank_at["0.9"] for s in group]) for group in surrogates)),
        ]
    columns = [column for column in columns if set(column.cells) != {"-"}]
    about = (
        "λ max is the largest curvature of the loss in any direction; the trace is the sum over all directions, "
        "with its standard error. A step of a given length costs most where λ is large."
    )
    if joint.at == "base":
        about += (
            " Held is the fraction of the gradient in the span of the top eigenpairs, rank 90% the rank of that part."
        )
    caption = f"Curvature of the loss at {joint.at.upper()} ({_name_matrix(joint)})"
    return grid_of(Curvature.shown, groups, title_of(per), caption, about, columns)


def _format_median_rank(ranks: Sequence[int | None]) -> str:
    known_ranks = [rank for rank in ranks if rank is not None]
    return median_rank(known_ranks, max(known_ranks)) if known_ranks else "-"


def _name_matrix(joint: Curvature) -> str:
    return "Hessian" if joint.matrix == "hessian" else "generalised Gauss-Newton"


def _make_bounds_grid(bounds: Sequence[LossBound]) -> Grid:
    truncated = [record for record in bounds if record.along == 1]
    nearest_by_rank = {record.rank: record for record in bounds if record.along == min(bound.along for bound in bounds)}
    rows = [(f"r={record.rank}", [record]) for record in truncated]
    columns = columns_of(LossBound.shown, rows)
    if any(record.along < 1 for record in nearest_by_rank.values()):
        along = min(record.along for record in bounds)
        nearer = [(name, [nearest_by_rank[r.rank]] if r.rank in nearest_by_rank else []) for name, (r,) in rows]
        ratio_field = next(field for field in LossBound.shown if field.path == "predicted_ratio")
        columns[-2:-2] = columns_of([replace(ratio_field, head=f"at {along:g}")], nearer)
    return Grid(
        "Loss gap of truncation to rank r, measured and modelled, E = ΔW_r − ΔW",
        "rank",
        tuple(name for name, _ in rows),
        tuple(columns),
        "Columns with ÷ are the second-order model and the bound (λ/2)Σσ² divided by the measured gap. A model "
        "near 1 can replace a measurement; a bound many times the gap cannot choose a rank.",
    )


def _describe_loss(joint: Curvature) -> str:
    return (
        f"{joint.loss:.4f}, the mean negative log-likelihood of {count(joint.tokens)} predictions of "
        f"{short(joint.set)}, without dropout; derivatives are of this loss"
    )


def _describe_curvature(joint: Curvature) -> str:
    first, *others = joint.eigenvalues
    following = f" (then {', '.join(map(number, others[:4]))})" if others else ""
    lines = [f"largest eigenvalue λ = {number(first)}{following}; residual ‖Hv − λv‖ {number(joint.residual or 0.0)}"]
    if joint.smallest is not None:
        lines.append(f"smallest μ = {number(joint.smallest)}{_describe_convexity(joint)}")
    mean = joint.trace / joint.params
    error = "" if joint.trace_error is None else f" ± {number(joint.trace_error)}"
    text = f"trace {number(joint.trace)}{error}"
    if joint.trace > (joint.trace_half or 0.0):
        text += f", {number(mean)} per direction on average; λ is {number(first / mean)} times that"
    else:
        text += ", not significantly different from zero; use more --trace-vectors"
    return "\n".join([*lines, text])


def _describe_convexity(joint: Curvature) -> str:
    if joint.matrix == "ggn":
        return ": non-negative by definition, up to rounding"
    if joint.strongly_convex:
        return ": the loss is strongly convex there"
    return (
        ": the curvature is negative in some directions, so the loss is not convex there"
        if (joint.smallest or 0) < 0
        else ""
    )


def _describe_gradient(joint: Curvature, bounds: Sequence[LossBound]) -> str:
    text = f"‖∇L‖ = {number(joint.gradient)}"
    truncated = [record for record in bounds if record.along == 1 and abs(record.gap) > 1e-6]
    if not truncated:
        return text
    last = truncated[-1]
    linear_share = last.linear / last.gap
    verdict = (
        "small compared with the gap"
        if abs(linear_share) < ACCURATE_ERROR
        else "not small, so the zero gradient that the bound assumes does not hold"
    )
    return f"{text}; ⟨∇L, E⟩ is {linear_share:.0%} of the measured gap at r={last.rank}: {verdict}"


def _describe_model(bounds: Sequence[LossBound]) -> str:
    """State, for each fraction of the way, the range of model over gap, and the ranks at which it is accurate."""
    lines = []
    for along in sorted({record.along for record in bounds}, reverse=True):
        at_fraction = [record for record in bounds if record.along == along and abs(record.gap) > 1e-6]
        ratios = [record.predicted / record.gap for record in at_fraction]
        if not ratios:
            continue
        point = "at the truncated weights" if along == 1 else f"at {along:g} of the way to them"
        accurate_ranks = [
            record.rank for record, ratio in zip(at_fraction, ratios, strict=True) if abs(ratio - 1) <= ACCURATE_ERROR
        ]
        named = (
            f"within {ACCURATE_ERROR:.0%} at {', '.join(f'r={rank}' for rank in accurate_ranks)}"
            if accurate_ranks
            else f"not within {ACCURATE_ERROR:.0%} at any rank"
        )
        lines.append(f"{point} it is {min(ratios):.2f} to {max(ratios):.2f} times the measured gap, {named}")
    return "\n".join(lines) or "no gap is large enough to compare"


def _describe_bound(bounds: Sequence[LossBound], joint: Curvature) -> Statement:
    exceeded = [record for record in bounds if not record.holds]
    top = joint.eigenvalues[0]
    exceeding = [record for record in bounds if record.curvature > top]
    truncated = [record for record in bounds if record.along == 1 and record.gap > 1e-6]
    lines, answer = [], ""
    if exceeded:
        named = ", ".join(f"r={record.rank} (fraction {record.along:g})" for record in exceeded)
        why = (
            "the curvature between the points exceeds λ"
            if exceeding
            else "λ was measured at TUNED and does not hold between the points"
        )
        lines.append(f"⟨∇L, E⟩ + (λ/2)Σσ² is exceeded at {named}: {why}")
    else:
        lines.append(f"⟨∇L, E⟩ + (λ/2)Σσ² is at or above the gap at all {len(bounds)} points measured")
    if truncated:
        ratios = [record.upper / record.gap for record in truncated]
        loose = ": too loose to choose a rank" if min(ratios) > LOOSE_RATIO else ""
        answer = f"(λ/2)Σσ² is {number(min(ratios))} to {number(max(ratios))} times the measured gap{loose}"
        lines.append(answer)
    largest = max(record.curvature for record in bounds)
    comparison = "exceeds" if exceeding else "does not exceed"
    lines.append(f"the curvature along E is at most {number(largest)} and {comparison} λ at the points measured")
    if truncated and joint.trace > (joint.trace_half or 0.0):
        last = truncated[-1]
        mean = joint.trace / joint.params / 2 * last.tail_energy
        lines.append(
            f"with the mean curvature, (tr H/2n)Σσ² is {number(mean)} at r={last.rank}; ½⟨E,HE⟩ is "
            f"{number(last.quadratic)}"
        )
    return make_statement("bound", "Bound", *lines, answer=answer)


def _describe_lower_bound(joint: Curvature) -> str:
    if not joint.strongly_convex:
        rounding = " is zero up to rounding" if (joint.smallest or 0) > 0 else ""
        return f"none: (μ/2)Σσ² needs μ > 0, and μ = {format_shown(joint.smallest)}{rounding}"
    return f"(μ/2)Σσ² with μ = {format_shown(joint.smallest)}, if the curvature between the points is nowhere below μ"


def _describe_surrogate(layers: Sequence[Curvature]) -> str:
    """State the fraction of the gradient in the top eigenpairs, and the rank that it suggests."""
    pairs = [(record, record.surrogate) for record in layers if record.surrogate is not None]
    if not pairs:
        return "not measured yet"
    first = pairs[0][1]
    kind = "joint" if first.joint else "each layer's"
    share = middle([surrogate.share for _, surrogate in pairs])
    lines = [
        f"the span of {kind} top {first.eigenpairs} eigenpairs has {format_shown(share, percent)} of the gradient"
        + ("" if first.joint else " (median)")
        + f"; a random subspace of the same dimension would have {percent(middle([s.random for _, s in pairs]) or 0.0)}"
    ]
    ranks = sorted((s.rank_at["0.9"], short(r.layer or "")) for r, s in pairs if s.rank_at["0.9"] is not None)
    if ranks:
        (low, _), (high, name) = ranks[0], ranks[-1]
        lines.append(
            f"the gradient projected onto them has rank {low} to {high} at 90% of its energy, the highest in {name}"
        )
    return "\n".join(lines)


def _interpret(joint: Curvature) -> str:
    text = (
        "λ is the largest eigenvalue at this point, but a bound needs it for the whole path, so the bound is an "
        "estimate"
    )
    if joint.matrix == "ggn":
        text = (
            "Gauss-Newton omits the curvature of the model's outputs: with its λ, (λ/2)Σσ² is not a bound, even near "
            "TUNED"
        )
    if joint.at == "base":
        text = (
            "the projected gradient is a surrogate for the update, from one point and few eigenpairs; probe sweep "
            "measures the rank that training needs"
        )
    return f"{text}; all numbers are for this set; the curvature on few tokens can differ from that on many"
