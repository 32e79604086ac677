"""The figures by name: which records each needs, and how its page is drawn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from matplotlib.figure import Figure

from lora_diag.errors import UsageError
from lora_diag.plots.allocation import figure as draw_allocation
from lora_diag.plots.alone import figure as draw_alone
from lora_diag.plots.alone import lacks as alone_lacks
from lora_diag.plots.angles import figure as draw_angles
from lora_diag.plots.angles import ranks_of
from lora_diag.plots.curvature import figure as draw_curvature
from lora_diag.plots.energy import figure as draw_energy
from lora_diag.plots.fields import numbers_of, value_of
from lora_diag.plots.fisher import figure as draw_fisher
from lora_diag.plots.fisher import lacks as fisher_lacks
from lora_diag.plots.fleet import figure as draw_fleet
from lora_diag.plots.heatmap import figure as draw_heatmap
from lora_diag.plots.intrinsic import figure as draw_intrinsic
from lora_diag.plots.intrinsic import lacks as intrinsic_lacks
from lora_diag.plots.outputs import depth_figure as draw_depth
from lora_diag.plots.outputs import figure as draw_outputs
from lora_diag.plots.outputs import lacks as outputs_lacks
from lora_diag.plots.outputs import lacks_depth as depth_lacks
from lora_diag.plots.overlap import figure as draw_overlap
from lora_diag.plots.residual import figure as draw_residual
from lora_diag.plots.sensitivity import figure as draw_sensitivity
from lora_diag.plots.sensitivity import lacks as sensitivity_lacks
from lora_diag.plots.series import Options, Series, by_adapter, by_pair, by_step, kind_of, series_of
from lora_diag.plots.sheet import MAX_PANELS, settle
from lora_diag.plots.spectrum import figure as draw_spectrum
from lora_diag.plots.style import CATEGORIES, Look, look_of, styled
from lora_diag.plots.sweep import figure as draw_sweep
from lora_diag.plots.sweep import lacks as sweep_lacks
from lora_diag.plots.truncation import figure as draw_truncation
from lora_diag.plots.truncation import lacks as truncation_lacks
from lora_diag.plots.union import figure as draw_union
from lora_diag.plots.union import shared
from lora_diag.results import LayerRecord, Results
from lora_diag.results.spectrum import METRIC_NAMES


@dataclass(frozen=True, slots=True)
class FigureKind:
    """One kind of figure.

    Args:
        name: As users call it.
        shows: One line.
        needs: The kind of record it draws, of a probe which one; empty for any of layers.
        draw: Series of such records, a page and options → the figure.
        made_by: The command whose records these are, as a user types it.
        by_color: Whether runs are told apart by colour, so that there is an end to how many.
        lacks: Says of such records why they cannot be drawn with the options; None if they can.
    """

    name: str
    shows: str
    needs: str
    draw: Callable[[Sequence[Series[Any]], Look, Options], Figure]
    made_by: str = ""
    by_color: bool = True
    lacks: Callable[[Sequence[Any], Options], str | None] = lambda records, options: None


def _nothing_moved(records: Sequence[Any], options: Options) -> str | None:
    return None if any(record.fro for record in records) else "ΔW = 0 in every matrix"


def _no_one_unit(records: Sequence[Any], options: Options) -> str | None:
    """Refuse σ of several metrics on one axis: they have different units. Shares of energy have none."""
    metrics = dict.fromkeys(record.metric for record in records)
    if len(metrics) > 1:
        named = " and ".join(METRIC_NAMES[metric] for metric in metrics)
        return f"singular values in {named} have no common axis: draw them apart"
    return _nothing_moved(records, options)


def _rank_absent(known: Collection[int], options: Options) -> str | None:
    if options.rank is None or options.rank in known:
        return None
    return f"rank {options.rank} was not measured; there are {', '.join(map(str, sorted(known)))}"


# One line a figure.
FIGURES = (
    FigureKind(
        "energy",
        "C(r): what the best adapter of each rank keeps",
        "spectrum",
        draw_energy,
        "loradiag spectrum BASE TUNED -o spectrum.jsonl",
        lacks=_nothing_moved,
    ),
    FigureKind(
        "spectrum",
        "singular values and the noise edge of the files",
        "spectrum",
        draw_spectrum,
        "loradiag spectrum BASE TUNED -o spectrum.jsonl",
        lacks=_no_one_unit,
    ),
    FigureKind("heatmap", "a field by module type and depth", "", draw_heatmap, by_color=False),
    FigureKind(
        "residual",
        "ε and its floor, layer by layer, by cause",
        "residual",
        draw_residual,
        "loradiag residual BASE TUNED ADAPTER -o residual.jsonl",
        by_color=False,
        lacks=lambda records, _: None if any(len(r.shape) > 1 for r in records) else "no records of matrices",
    ),
    FigureKind(
        "overlap",
        "κ and tangent overlap over the steps, with baselines",
        "overlap",
        draw_overlap,
        "loradiag overlap BASE TUNED GRADIENTS -o overlap.jsonl",
        lacks=lambda records, options: _rank_absent({record.rank for record in records}, options),
    ),
    FigureKind(
        "allocation",
        "rank by layer, and energy kept against the bound",
        "allocation",
        draw_allocation,
        "loradiag allocate spectrum.jsonl --params 10M -o allocation.jsonl",
    ),
    FigureKind(
        "angles",
        "principal angles between updates, beside chance",
        "interference",
        draw_angles,
        "loradiag interference BASE TUNED TUNED -o interference.jsonl",
        by_color=False,
        lacks=lambda records, options: _rank_absent(ranks_of(records), options),
    ),
    FigureKind(
        "union",
        "rank of the sum of updates, against the sum of ranks",
        "union",
        draw_union,
        "loradiag interference BASE TUNED TUNED -o interference.jsonl",
        by_color=False,
        lacks=lambda records, _: None if shared(records) else "no layer is changed by two updates",
    ),
    FigureKind(
        "fleet",
        "many adapters: norm, and rank used; who stands out",
        "fleet",
        draw_fleet,
        "loradiag spectrum --adapters 'adapters/**' -o fleet.jsonl",
        lacks=lambda records, _: "no adapter has a rank" if all(r.used is None for r in records) else None,
    ),
    FigureKind(
        "sweep",
        "held-out loss of LoRA trained at each rank",
        "sweep",
        draw_sweep,
        "loradiag probe sweep BASE --data FILE --eval FILE -o sweep.jsonl",
        lacks=sweep_lacks,
    ),
    FigureKind(
        "truncation",
        "held-out loss of the update truncated to each rank",
        "truncation",
        draw_truncation,
        "loradiag probe truncation BASE TUNED --eval FILE -o truncation.jsonl",
        lacks=truncation_lacks,
    ),
    FigureKind(
        "alone",
        "what it costs to truncate one layer or module type alone",
        "truncation",
        draw_alone,
        "loradiag probe truncation BASE TUNED --eval FILE --per type -o truncation.jsonl",
        lacks=alone_lacks,
    ),
    FigureKind(
        "outputs",
        "held-out loss of each adapter against the full fine-tune's",
        "outputs",
        draw_outputs,
        "loradiag probe outputs BASE TUNED ADAPTER --eval FILE -o outputs.jsonl",
        by_color=False,
        lacks=outputs_lacks,
    ),
    FigureKind(
        "depth",
        "how far hidden states are from the full fine-tune's, by depth",
        "outputs",
        draw_depth,
        "loradiag probe outputs BASE TUNED ADAPTER --eval FILE -o outputs.jsonl",
        by_color=False,
        lacks=depth_lacks,
    ),
    FigureKind(
        "sensitivity",
        "what each layer or module type gains where it is adapted alone",
        "sensitivity",
        draw_sensitivity,
        "loradiag probe sensitivity BASE --data FILE --eval FILE -o sensitivity.jsonl",
        lacks=sensitivity_lacks,
    ),
    FigureKind(
        "curvature",
        "curvature of the loss, and what it says of truncations beside their measured gaps",
        "curvature",
        draw_curvature,
        "loradiag probe curvature BASE TUNED --eval FILE -o curvature.jsonl",
    ),
    FigureKind(
        "intrinsic",
        "share of full fine-tuning's gain by trained parameters",
        "intrinsic",
        draw_intrinsic,
        "loradiag probe intrinsic BASE --data FILE --eval FILE -o intrinsic.jsonl",
        lacks=intrinsic_lacks,
    ),
    FigureKind(
        "fisher",
        "which number predicts what cutting a layer costs",
        "fisher",
        draw_fisher,
        "loradiag probe fisher BASE TUNED --data FILE --measure -o fisher.jsonl",
        by_color=False,
        lacks=fisher_lacks,
    ),
)


def figure_named(name: str) -> FigureKind:
    """Return a kind of figure by its name.

    Raises:
        UsageError: There is none of that name.
    """
    for kind in FIGURES:
        if kind.name == name:
            return kind
    raise UsageError(f"figure {name}: there are {', '.join(kind.name for kind in FIGURES)}")


def figure(
    name: str,
    results: Results[Any] | Sequence[Results[Any]],
    *,
    labels: Sequence[str] = (),
    width: str = "slide",
    per: str = "layer",
    field: str | None = None,
    rank: int | None = None,
    files: Sequence[str] = (),
    plain: bool = False,
) -> Figure:
    """Return a figure as ``loradiag plot`` writes it; ``pyplot`` does not know of it.

    Args:
        name: One of ``FIGURES``.
        results: Of one run, or of several to compare; those without the records that the figure needs do not count.
        labels: What each of them is called; by what was measured if not given.
        width: ``column`` (3.3 in, 7 pt) or ``slide`` (10 in, 12.5 pt).
        per: ``layer``, or ``type`` for all layers of a module type together.
        field: Of a heat map: the dotted name of any number in the records.
        rank: Of ``overlap`` and ``angles``, where several were measured.
        files: Where each of the results was read: the name of runs that nothing else tells apart.
        plain: Whether to leave out title and notes, for a paper whose caption says them.

    Raises:
        UsageError: No such figure, width or field, or the results do not have what it needs.
    """
    kind, look = figure_named(name), replace(look_of(width), plain=plain)
    series, options = _asked(results, labels, per, field, rank, files)
    if reason := _why_not(kind, series, options):
        raise UsageError(f"{name}: {reason}")
    with styled(look):
        return settle(kind.draw(_usable(kind, series, options), look, options))


def why_not(
    name: str,
    results: Results[Any] | Sequence[Results[Any]],
    *,
    labels: Sequence[str] = (),
    width: str = "slide",
    per: str = "layer",
    field: str | None = None,
    rank: int | None = None,
) -> str | None:
    """Say why ``figure`` cannot draw some results; None if it can.

    Raises:
        UsageError: No such figure or width.
    """
    look_of(width)
    return _why_not(figure_named(name), *_asked(results, labels, per, field, rank))


def _asked(
    results: Results[Any] | Sequence[Results[Any]],
    labels: Sequence[str],
    per: str,
    field: str | None,
    rank: int | None,
    files: Sequence[str] = (),
) -> tuple[tuple[Series[Any], ...], Options]:
    runs = [results] if isinstance(results, Results) else list(results)
    if labels and len(labels) != len(runs):
        raise UsageError(f"{len(labels)} labels for {len(runs)} results: give one label each, in their order")
    if per not in {"layer", "type"}:
        raise UsageError(f"per {per}: choose layer or type")
    return series_of(runs, labels, files), Options(per, field, rank)


def _usable(kind: FigureKind, series: Sequence[Series[Any]], options: Options) -> tuple[Series[Any], ...]:
    """Return the series whose records a figure can draw; of a heat map, those of the first kind that has its field."""
    filled = [one for one in series if one.records]
    if kind.needs:
        return tuple(one for one in filled if kind_of(one.records[0]) == kind.needs)
    # The records of a fleet are of adapters, which have no depth and no module type; those of probes are of whole runs.
    filled = [one for one in filled if isinstance(one.records[0], LayerRecord) and one.records[0].record != "fleet"]
    kinds = dict.fromkeys(type(one.records[0]) for one in filled)
    field = options.field
    having = [k for k in kinds if field is None or _has(field, [o for o in filled if type(o.records[0]) is k])]
    chosen = tuple(one for one in filled if having and type(one.records[0]) is having[0])
    if chosen and chosen[0].records[0].record == "residual":
        return by_adapter(chosen)
    if chosen and chosen[0].records[0].record == "interference":
        return by_pair(chosen)
    return by_step(chosen, options.rank) if chosen and chosen[0].records[0].record == "overlap" else chosen


def _has(field: str, series: Sequence[Series[Any]]) -> bool:
    return any(value_of(record, field) is not None for one in series for record in one.records)


def _why_not(kind: FigureKind, series: Sequence[Series[Any]], options: Options) -> str | None:
    fitting = _usable(kind, series, options)
    if not fitting:
        if options.field and not kind.needs and any(one.records for one in series):
            return f"no record has a number {options.field}; there are {_fields(series)}"
        return f"no {f'{kind.needs} ' if kind.needs else ''}records"
    most = len(CATEGORIES) if kind.by_color else MAX_PANELS
    if len(fitting) > most:
        return f"{len(fitting)} runs at once are not told apart: give {most} results at most"
    records: list[Any] = [record for one in fitting for record in one.records]
    return kind.lacks(records, options)


def _fields(series: Sequence[Series[Any]]) -> str:
    return ", ".join(dict.fromkeys(name for one in series for name in numbers_of(one.records[:20])))
