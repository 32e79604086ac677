"""Summary of an overlap run: containment of gradients, trend, and a suggestion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lora_diag.diagnostics.overlap.record import Overlap
from lora_diag.diagnostics.overlap.tracks import Track, near, reference_is_adapter, tracks, trend
from lora_diag.metrics.overlap import NEAR_RANDOM
from lora_diag.records import Results
from lora_diag.records.names import part_of
from lora_diag.rendering.statements import Statement, compared, final_statements, left_out, make_statement
from lora_diag.rendering.text import middle, number, short

# Maximum number of layers named in a sentence.
_NAMED = 4

_LIMIT = f"below {NEAR_RANDOM:g}× random or halfway to 1"

# An adapter still reaches the gradient if tangent² exceeds its baseline by this fraction of ‖G‖². A convention: both
# numbers are printed.
MIN_REACH = 0.1


def lines(results: Results[Overlap], shown: Sequence[Track] | None = None) -> list[Statement]:
    """Return the summary.

    Args:
        results: The results.
        shown: Its layers at the rank of the table; default: at the default rank.
    """
    shown = tracks(results) if shown is None else shown
    sentences = [compared(results, *_describe_measured(results))]
    relevant = [track for track in _select_relevant(shown) if track.known]
    if relevant:
        sentences += [
            _describe_containment(relevant, len(relevant) < len(shown)),
            make_statement("reach", "Reach", _describe_reach(relevant)),
            make_statement("trend", "Trend", _describe_trend(relevant)),
            make_statement("by_rank", "By rank", _describe_ranks(results, relevant)),
            make_statement("suggests", "Suggestion", _suggest_fix(results, relevant)),
            *_describe_resolution(relevant),
            make_statement("interpretation", "Interpretation", _interpret(results)),
        ]
    elif shown:
        sentences.append(make_statement("inside", "Containment", "not known: every gradient is zero", level="warning"))
    sentences.append(left_out(results))
    if skipped := _describe_skipped_ranks(results):
        sentences.append(make_statement("ranks", "Ranks", skipped))
    return [*sentences, *final_statements(results, "records so far")]


def _describe_measured(results: Results[Overlap]) -> list[str]:
    layers, steps, ranks = (len({getattr(r, name) for r in results}) for name in ("layer", "step", "rank"))
    times = f"{steps} step{'s' if steps > 1 else ''}, {ranks} rank{'s' if ranks > 1 else ''}"
    return [f"{_matrices(layers)}, {times}"] if layers else []


def _select_relevant(shown: Sequence[Track]) -> list[Track]:
    """Return the layers that adapters usually target, or else the others."""
    return [track for track in shown if part_of(track.layer) == "matrices"] or list(shown)


def _describe_containment(relevant: Sequence[Track], outside: bool) -> Statement:
    """State how many layers end near the baseline, which, and since when."""
    near_random = sorted(
        (t for t in relevant if t.near_since is not None), key=lambda t: (t.last.kappa or 0) / t.last.kappa_random
    )
    word = "no" if len(near_random) > len(relevant) / 2 else "partly" if near_random else "yes"
    kappa, random = middle([t.last.kappa for t in relevant]), middle([t.last.kappa_random for t in relevant])
    place = " outside embeddings and head" if outside else ""
    head = (
        f"{word}: at the last step the median κ of {_matrices(len(relevant))}{place} is {number(kappa or 0)}, that of "
        f"random subspaces {number(random or 0)}"
    )
    if not near_random:
        return make_statement("inside", "Containment", f"{head}; none is near random ({_LIMIT})")
    sentences = [head, f"{len(near_random)} of them {'is' if len(near_random) == 1 else 'are'} near random ({_LIMIT}):"]
    first = min(track.records[0].step for track in relevant)
    sentences += [
        f"  {short(t.layer)}: {number(t.last.kappa or 0)}, {_describe_fall(t, first)}" for t in near_random[:_NAMED]
    ]
    suffix = [f"  and {len(near_random) - _NAMED} more"] if len(near_random) > _NAMED else []
    return make_statement("inside", "Containment", *sentences, *suffix, level="warning")


def _describe_fall(track: Track, first: int) -> str:
    return "at every step" if track.near_since == first else f"since step {track.near_since}"


def _list_layers(near_random: Sequence[Track]) -> str:
    return f"in {len(near_random)} layers near random" if len(near_random) > 1 else f"in {short(near_random[0].layer)}"


def _matrices(number_of: int) -> str:
    return f"{number_of} {'matrix' if number_of == 1 else 'matrices'}"


def _describe_reach(relevant: Sequence[Track]) -> str:
    """State the first-order reach of an adapter with these subspaces, and of a fresh one."""

    def change(name: str) -> str:
        first, last = (middle([getattr(t.known[i], name) for t in relevant]) or 0.0 for i in (0, -1))
        random = middle([getattr(t.last, f"{name}_random") for t in relevant]) or 0.0
        values = number(last) if first == last else f"{number(first)} → {number(last)}"
        return f"{values} of ‖G‖ (random {number(random)})"

    return (
        f"an adapter in these subspaces reaches {change('tangent')} to first order; a new one (B = 0, with the rows "
        f"of A spanning V) {change('right')}"
    )


def _describe_trend(relevant: Sequence[Track]) -> str:
    """Count the layers whose κ falls, rises or stays, and name the layer where it falls most."""
    ends_of = {track.layer: ends for track in relevant if (ends := track.ends) is not None}
    if not ends_of:
        return "not known from one step; record several"
    counts = Counter(trend(ends) for ends in ends_of.values())
    words = [f"{word} in {counts[word]}" for word in ("falls", "rises") if counts[word]]
    words += [f"is steady in {counts['steady']}"] if counts["steady"] else []
    sentence = f"κ {', '.join(words)} of {_matrices(len(ends_of))}"
    falling = sorted(
        (layer for layer in ends_of if trend(ends_of[layer]) == "falls"), key=lambda x: ends_of[x][1] / ends_of[x][0]
    )
    if falling:
        named = [f"{short(x)} ({number(ends_of[x][0])} → {number(ends_of[x][1])})" for x in falling[:2]]
        sentence += f"; falls most in {', '.join(named)}"
    return sentence


def _describe_ranks(results: Results[Overlap], relevant: Sequence[Track]) -> str:
    """Show κ at the last step for every rank with its baseline: κ rises with rank for any subspace."""
    last = {track.layer: track.last.step for track in relevant}
    parts = []
    for rank in sorted({record.rank for record in results}):
        known = [r for r in results if r.rank == rank and last.get(r.layer) == r.step and r.kappa is not None]
        if known:
            kappa, random = middle([r.kappa for r in known]) or 0.0, middle([r.kappa_random for r in known]) or 0.0
            parts.append(f"r={rank} {number(kappa)} ({number(random)})")
    return f"κ (random): {', '.join(parts)}"


def _is_above_random(record: Overlap) -> bool:
    """Return whether κ is well above its baseline; never for full subspaces, where both are 1."""
    return record.kappa_random < 1 and not near(record)


def _suggest_fix(results: Results[Overlap], relevant: Sequence[Track]) -> str:
    """Suggest what to do about the layers near their baseline."""
    near_random = [track for track in relevant if track.near_since is not None]
    if not near_random:
        return "nothing to change: in every layer these subspaces contain more of the gradient than random ones"
    tangent_only = [track for track in near_random if _has_reach(track.last)]
    largest = {
        track.layer: max((r for r in results if r.layer == track.layer), key=_rank_then_step) for track in near_random
    }
    at_higher_rank = [
        track for track in near_random if track not in tangent_only and _is_above_random(largest[track.layer])
    ]
    outside = [track for track in near_random if track not in tangent_only and track not in at_higher_rank]
    sentences = []
    if tangent_only:
        tangent, random = (
            middle([getattr(t.last, name) for t in tangent_only]) for name in ("tangent", "tangent_random")
        )
        sentences.append(
            f"{_list_layers(tangent_only)} one side is aligned: an adapter there still reaches {number(tangent or 0)} "
            f"of ‖G‖ (random {number(random or 0)}); keep it"
        )
    if at_higher_rank:
        ranks = max(largest[track.layer].rank for track in at_higher_rank)
        sentences.append(f"{_list_layers(at_higher_rank)} κ exceeds the baseline at r={ranks}: use a higher rank there")
    if outside:
        cause = "the adapter's directions" if reference_is_adapter(results) else "this update's directions"
        # At full rank the subspaces are the whole space, which contains every gradient.
        full = any(largest[track.layer].kappa_random >= 1 for track in outside)
        sentences.append(
            f"{_list_layers(outside)} the gradients are outside {cause} at every rank "
            f"measured{' below full rank' if full else ''}: initialize the adapter there from recent gradients, or "
            "move its parameters to layers that contain theirs"
        )
    return "\n".join(sentences)


def _has_reach(record: Overlap) -> bool:
    """Return whether an adapter reaches clearly more of ‖G‖² than its baseline, for any κ."""
    return (record.tangent or 0.0) ** 2 - record.tangent_random**2 >= MIN_REACH


def _rank_then_step(record: Overlap) -> tuple[int, int]:
    return record.rank, record.step


def _describe_resolution(relevant: Sequence[Track]) -> list[Statement]:
    counts = Counter(track.last.verdict for track in relevant)
    if counts["resolved"] == len(relevant):
        return []
    parts = [f"{counts[word]} {word}" for word in ("unresolved", "floor-limited") if counts[word]]
    return [
        make_statement(
            "resolved",
            "Resolution",
            f"of {_matrices(len(relevant))} {' and '.join(parts)}: where the files do not resolve the update, its "
            "subspaces are those of rounding noise and a κ near random has no meaning",
            level="warning",
        )
    ]


def _interpret(results: Results[Overlap]) -> str:
    caveat = (
        "; near a minimum over the adapter's own weights tangent goes to 0, since the gradient vanishes in its "
        "directions"
        if reference_is_adapter(results)
        else ""
    )
    return (
        "overlap measures direction, not quality, and increases with rank for any subspace: compare with random, not "
        f"with 1{caveat}"
    )


def _describe_skipped_ranks(results: Results[Overlap]) -> str:
    """State which requested ranks exceed some layers."""
    ranks_of: dict[str, set[int]] = {}
    for record in results:
        ranks_of.setdefault(record.layer, set()).add(record.rank)
    requested = [rank for rank in results.run.settings.get("ranks", []) if isinstance(rank, int)]
    too_small = {rank: sum(rank not in ranks for ranks in ranks_of.values()) for rank in requested}
    parts = [f"{rank} in {number_of}" for rank, number_of in too_small.items() if number_of]
    if not parts:
        return ""
    limit = "the adapter's rank" if reference_is_adapter(results) else "min(out, in)"
    return f"not measured where they exceed {limit}: r={', '.join(parts)} of {_matrices(len(ranks_of))}"
