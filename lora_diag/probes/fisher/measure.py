"""``probe fisher``: measure the exact Fisher of the part that a truncation discards, and its effect
on the loss.

It is Σ_s ⟨∇ℓ_s, T_r⟩² of each layer, with the discarded part T_r = ΔW − ΔW_r = Σ_{i>r} σ_i u_i
v_iᵀ.

With the inner products a_{s,i} = ⟨∇ℓ_s, σ_i u_i v_iᵀ⟩ of ``models.directions``, ⟨∇ℓ_s, T_r⟩ =
Σ_{i>r} a_{s,i},
and one pass over the text gives the sum for every rank at once. The same projections give the
second moments of x and g in the bases of the singular vectors, and with them the energy of the tail
in the metric of the data and in K-FAC's:

    ‖T_r·C^½‖² = Σ_{i>r} σ_i² v_iᵀCv_i,    ‖G^½·T_r·C^½‖² = Σ_{i,j>r} σ_iσ_j (u_iᵀGu_j)(v_iᵀCv_j).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from lora_diag.errors import Given, InputError, NothingComparedError, UsageError
from lora_diag.linalg.exact import Factors
from lora_diag.models.activations import linear_layers
from lora_diag.models.data import Texts
from lora_diag.models.directions import Projection, run_backward, sides_of
from lora_diag.models.losses import Draw, Losses, divergence, measure
from lora_diag.models.opening import Model, Weights
from lora_diag.models.swapping import FULL, Swapped, truncated_layers
from lora_diag.probes.fisher import FisherOptions
from lora_diag.probes.fisher.record import Effect, Fisher
from lora_diag.records import LeftOut, Results
from lora_diag.rendering.text import quantity
from lora_diag.running.layers import check_ranks
from lora_diag.running.options import show_options
from lora_diag.running.probing import SEQUENCES, ProbeRun, describe_texts, left_out
from lora_diag.running.progress import RunRecords
from lora_diag.storage import open_checkpoint

# Memory limit of the logits of the unchanged model, which are kept because every change is compared
# with them.
LOGIT_BYTES = 2 * 2**30


def measure_unchanged(
    model: Model, texts: Texts, size: int, after: Callable[[], None]
) -> tuple[Losses, list[Tensor]]:
    """Return the losses of the unchanged model on a text, and its logits of every sequence.

    Raises:
        InputError: The logits take too much memory.
    """
    all_logits = list[Tensor]()

    def check_memory() -> None:
        if sum(logits.numel() * 4 for logits in all_logits) > LOGIT_BYTES:
            raise InputError(
                texts.path,
                f"the logits of its first {len(all_logits)} of {len(texts.sequences)} "
                f"sequences need more than {LOGIT_BYTES / 2**30:.0f} GiB of memory",
                "use fewer with $max_sequences",
            )
        after()

    def keep(logits: Tensor) -> None:
        all_logits.append(logits.float())

    return measure(model, texts, size, check_memory, keep), all_logits


def measure_effect(
    model: Model,
    texts: Texts,
    unchanged: tuple[Losses, list[Tensor]],
    size: int,
    after: Callable[[], None],
) -> Effect:
    """Run the changed model on a text, and return the effect of the change.

    Args:
        model: The changed model.
        texts: The text.
        unchanged: Result of ``measure_unchanged`` on the text.
        size: Sequences in a batch.
        after: Called after every batch.
    """
    before, all_logits = unchanged
    remaining, kl = iter(all_logits), list[float]()
    losses = measure(
        model, texts, size, after, lambda logits: kl.append(divergence(next(remaining), logits))
    )
    gap, error = losses.minus(before)
    return Effect(loss=losses.mean, gap=gap, gap_error=error, kl=sum(kl) / losses.tokens)


# Memory limit of the sums and singular vectors of the layers of one pass over the text.
PASS_BYTES = 2 * 2**30


class FisherTail(Projection):
    """One layer's ΔW = Σσ_i u_i v_iᵀ, and its running sums; vectors are float64.

    Args:
        module: The layer.
        s: Singular values, ``(k,)``.
        outer: Singular vectors on the side of the output, as columns ``(out, k)``.
        inner: Those on the side of the input, ``(in, k)``.
        fro: ‖ΔW‖_F.

    Attributes:
        squares: Σ_s ⟨∇ℓ_s, T_r⟩² for r = 0, …, k.
        total: Σ_s ⟨∇ℓ_s, T_r⟩.
        xx: Σ (Vᵀx)(Vᵀx)ᵀ.
        gg: Σ (Uᵀg)(Uᵀg)ᵀ.
        tokens: Number of inputs.
    """

    def __init__(
        self, module: nn.Module, s: Tensor, outer: Tensor, inner: Tensor, fro: float
    ) -> None:
        super().__init__(module, s, outer, inner)
        k, zeros = len(s), outer.new_zeros
        self.fro = fro
        self.tokens = 0
        self.squares = zeros(k + 1)
        self.total = zeros(k + 1)
        self.xx = zeros(k, k)
        self.gg = zeros(k, k)

    def take_input(self, x: Tensor, mask: Tensor) -> Tensor | None:
        """Add the inputs of a batch; return Vᵀx of every token, as ``Projection`` does."""
        inner = super().take_input(x, mask)
        if inner is not None:
            rows = inner.reshape(-1, inner.shape[-1])
            self.xx.addmm_(rows.T, rows)
            self.tokens += int(mask.sum()) if x.dim() > 2 else len(x)
        return inner

    def take_gradient(self, g: Tensor, inner: Tensor) -> Tensor:
        """Add the output gradients of a batch; return Uᵀg of every token."""
        outer = super().take_gradient(g, inner)
        rows = outer.reshape(-1, outer.shape[-1])
        self.gg.addmm_(rows.T, rows)
        return outer

    def end_batch(self) -> None:
        """Add the products ⟨∇ℓ_s, T_r⟩ of the batch and their squares to the sums."""
        if (terms := self.terms()) is not None:
            tails = _tail_sums(terms)
            self.squares += (tails**2).sum(0)
            self.total += tails.sum(0)
        self._terms = None

    @property
    def energies(self) -> tuple[Tensor, Tensor, Tensor]:
        """‖T_r‖², ‖T_r·C^½‖² and ‖G^½·T_r·C^½‖² for r = 0, …, k."""
        c, g = self.xx / max(1, self.tokens), self.gg / max(1, self.tokens)
        # Σ_{i,j>r} of σ_iσ_j (u_iᵀGu_j)(v_iᵀCv_j): sums over the lower right corners.
        weighted = self.s[:, None] * self.s * c * g
        corners = weighted.flip(0, 1).cumsum(0).cumsum(1).flip(0, 1).diagonal()
        kfac = nn.functional.pad(corners, (0, 1))
        return _tail_sums(self.s**2), _tail_sums(self.s**2 * c.diagonal()), kfac


def _tail_sums(values: Tensor) -> Tensor:
    """Return Σ_{i>r} of the values ``(…, k)`` for r = 0, …, k."""
    return nn.functional.pad(values.flip(-1).cumsum(-1).flip(-1), (0, 1))


def tail_of(module: nn.Module, factors: Factors) -> FisherTail:
    """Return the tail of a layer."""
    s, outer, inner = sides_of(module, factors, torch.float64)
    return FisherTail(module, s, outer, inner, factors.fro)


def groups_of(
    layers: Mapping[str, tuple[int, int]], limit: int = PASS_BYTES
) -> Iterator[list[str]]:
    """Yield the layers of each pass over the text, as many as fit into ``limit`` bytes, at least
    one.

    >>> [
    ...     len(group)
    ...     for group in groups_of({"a": (8, 8), "b": (8, 8), "c": (8, 8)}, limit=2 * 8 * 8 * 32)
    ... ]
    [2, 1]
    """
    group, used_bytes = list[str](), 0
    for layer, shape in layers.items():
        # Singular vectors and sums of a layer during a pass.
        own_bytes = 8 * min(shape) * (sum(shape) + 2 * min(shape))
        if group and used_bytes + own_bytes > limit:
            yield group
            group, used_bytes = [], 0
        group.append(layer)
        used_bytes += own_bytes
    if group:
        yield group


def accumulate(
    model: Model,
    texts: Texts,
    tails: Mapping[str, FisherTail],
    size: int,
    draw: Draw,
    after: Callable[[], None],
) -> int:
    """Run a text forward and backward, and add its inputs and gradients to the sums of each tail.

    The tail of a layer that no gradient reaches gets a ``problem``.

    Args:
        model: TUNED.
        texts: The text.
        tails: Tails by layer.
        size: Sequences per batch, sorted by length to reduce padding.
        draw: Returns the labels of the loss.
        after: Called after every batch.

    Returns:
        The number of predictions of the text.
    """
    predictions = 0
    for _, losses in run_backward(model, texts, [*tails.values()], size, draw):
        predictions += losses.tokens
        for tail in tails.values():
            tail.end_batch()
        after()
    for tail in tails.values():
        if not tail.problem and not tail.tokens:
            tail.problem = "no gradient reaches it on this text"
    return predictions


# Cost of a pass forward and back, in forward passes.
_BACKWARD = 3


@show_options
def probe_fisher(
    base: Path | str, tuned: Path | str, **options: Unpack[FisherOptions]
) -> Results[Any]:
    r"""Measure F_ℓ(r) = Σ_s⟨∇ℓ_s, ΔW − ΔW_r⟩²/N of every layer and rank, with gradients of the loss
    at TUNED.

    ∇ℓ_s is the gradient of the summed loss of sequence s with respect to the layer's weight, N the
    number of predictions; F(r)/2 estimates the mean KL by which truncating this layer alone to rank
    r changes the predictions.

    Args:
        base: Base model: a folder that transformers can open, or a Hub id.
        tuned: Fine-tuned checkpoint or adapter.
        data: Text, JSONL or data set whose loss is differentiated.
        eval: One held-out file on which every layer is truncated alone, for comparison with the
            estimates; implies ``measure``.
        measure: Truncate every layer alone and measure, on ``eval``, or on ``data`` without it.
        ranks: Ranks r of measurements and of the other estimates; F is given for all ranks.
        labels: ``data`` for the text's own labels; ``model`` for labels sampled from TUNED.
        seed: Seed of the sampled labels.
        **options: ``FisherOptions``.

    Returns:
        The records are in ``whole``: one ``Fisher`` per measured layer.

    Raises:
        UsageError: An option is invalid, BASE is an adapter, the output can be neither replaced nor
            resumed, or the extra ``train``, or ``datasets`` for a data set, is not installed.
        InputError: An input cannot be read or the output written, transformers cannot open BASE, ΔW
            of a layer, a loss or a gradient is not finite, or the logits of the measurements take
            too much memory.
        NothingComparedError: The checkpoints have no weight in common, or no linear layer is
            selected.

    Reference:
        Kunstner, Balles and Hennig 2019, "Limitations of the empirical Fisher approximation for
        natural gradient descent", equations 2 and 3 (the two kinds of labels).

    Example:
        >>> found = probe_fisher(
        ...     "sample_checkpoints/base",
        ...     "sample_checkpoints/full_ft",
        ...     data="sample_checkpoints/eval/in_domain.txt",
        ...     layers="q_proj",
        ... )  # doctest: +SKIP
        >>> [(record.layer, record.fro) for record in found.whole]  # doctest: +SKIP
    """
    run = ProbeRun("probe fisher", options, FisherOptions)
    evaluate, labels, seed = run.options["eval"], run.options["labels"], run.options["seed"]
    check_ranks(run.options["ranks"], 0)
    if len(evaluate) > 1:
        raise UsageError(
            Given("eval"), "F is compared with measurements on one set", "give one file"
        )
    run.check_files(base, tuned, needs_set=False)
    compared = run.compare(base, tuned)
    deltas = compared.pairing.deltas
    chosen = truncated_layers(deltas, **run.selection)
    model = run.open(base)
    weights, linear = Weights(model.module), linear_layers(model.module)
    modules = {layer: linear[name] for layer in chosen if (name := weights.name(layer)) in linear}
    if not modules:
        raise NothingComparedError(
            open_checkpoint(base).path,
            "no changed linear layer is selected",
            "change $layers or $exclude",
        )
    sets = [run.read(path) for path in (run.options["data"], *evaluate)]
    has_effects = bool(evaluate) or run.options["measure"]

    def count_tokens() -> float:
        passes = _BACKWARD * sum(1 for _ in groups_of({layer: chosen[layer] for layer in modules}))
        measured = has_effects * len(modules) * len(run.options["ranks"])
        return passes * run.count_tokens(sets[:1]) + measured * run.count_tokens(sets[-1:])

    texts, *others = run.fit(sets, count_tokens, (*SEQUENCES, ("ranks", (8, 64)), ("ranks", (8,))))
    ranks = check_ranks(run.options["ranks"], 0)
    effect_texts = (others or [texts])[0] if has_effects else None
    swapped = Swapped(model, deltas, max(ranks))
    probe = _Probe(run, swapped, modules, texts, effect_texts, ranks, Draw(labels, seed))

    def measure_missing(run_records: RunRecords[Any]) -> list[LeftOut]:
        done = {record.layer for record in run_records.records}
        todo = {layer: chosen[layer] for layer in modules if layer not in done}
        probe.report_cost(todo)
        detail = (
            "not a linear layer of its own, so its inputs and output gradients are not to be had"
        )
        problems = [
            LeftOut(layer=layer, shape=shape, reason="no_gradient", detail=detail)
            for layer, shape in chosen.items()
            if layer not in modules
        ]
        for outcome in probe.measure(todo):
            if isinstance(outcome, Fisher):
                run_records.put(outcome)
            else:
                problems.append(outcome)
        return [*left_out(compared.pairing, swapped.absent), *problems]

    settings = {"ranks": list(ranks), "labels": labels, "seed": seed, **run.selection}
    described = [
        describe_texts(texts, "data"),
        *([describe_texts(effect_texts)] if effect_texts is not None else []),
    ]
    return run.over([*compared.inputs, *described], settings, measure_missing)


@dataclass(frozen=True)
class _Probe:
    """What the measurements of a run share.

    Args:
        run: The run; its model has the weights of ``swapped``.
        swapped: The weights.
        modules: The linear layer of each matrix.
        texts: Text of the gradients.
        effect_texts: Text on which truncations are measured; None without measurements.
        ranks: Ranks of measurements and of estimates other than F.
        draw: Labels of the loss.
    """

    run: ProbeRun[FisherOptions]
    swapped: Swapped
    modules: Mapping[str, Any]
    texts: Texts
    effect_texts: Texts | None
    ranks: tuple[int, ...]
    draw: Draw

    def report_cost(self, todo: Mapping[str, tuple[int, int]]) -> None:
        """Report the estimated cost: passes forward and back, and forward passes for TUNED and each
        truncation.
        """
        passes, measuring_batches = len(list(groups_of(todo))), 0
        batches = passes * self.run.batches([self.texts])
        work = (
            f"{quantity(len(todo), 'layer')}, {quantity(passes, 'pass', 'passes')} forward and back"
        )
        if self.effect_texts is not None:
            truncations = sum(rank < min(shape) for shape in todo.values() for rank in self.ranks)
            measuring_batches = (truncations + 1) * self.run.batches([self.effect_texts])
            work += f" and {truncations} truncations measured"
        self.run.watch.total = batches + measuring_batches
        total = _BACKWARD * batches + measuring_batches
        self.run.estimate(self.texts, work, "; a backward pass counts as three", total)

    def measure(self, todo: Mapping[str, tuple[int, int]]) -> Iterator[Fisher | LeftOut]:
        """Yield the record of each layer, or why it cannot be measured, in the order of BASE."""
        run = self.run
        self.swapped.arrange({}, FULL)
        unchanged = None
        if self.effect_texts is not None and todo:
            after = partial(run.watch.batch, "TUNED")
            unchanged = measure_unchanged(run.model, self.effect_texts, run.batch, after)
        for group in groups_of(todo):
            tails = {
                layer: tail_of(self.modules[layer], self.swapped.factors(layer)) for layer in group
            }
            draw = Draw(self.draw.labels, self.draw.seed)  # every pass uses the same labels
            after = partial(run.watch.batch, "gradients")
            predictions = accumulate(run.model, self.texts, tails, run.batch, draw, after)
            for layer, tail in tails.items():
                if tail.problem:
                    yield LeftOut(
                        layer=layer, shape=todo[layer], reason="no_gradient", detail=tail.problem
                    )
                else:
                    yield self._record(layer, todo[layer], tail, predictions, unchanged)

    def _record(
        self,
        layer: str,
        shape: tuple[int, int],
        tail: FisherTail,
        predictions: int,
        unchanged: tuple[Losses, list[Tensor]] | None,
    ) -> Fisher:
        """Return the record of a layer, with measured effects if the outputs of the unchanged model
        are given.

        Raises:
            InputError: The gradients are not finite.
        """
        curve = (tail.squares / predictions).tolist()
        if not all(map(math.isfinite, curve)):
            raise InputError(layer, "the gradients are not finite", "use $dtype float32")
        weight, data, kfac = (energy.clamp(min=0) for energy in tail.energies)

        effects: dict[str, Effect] | None = None
        if unchanged is not None and self.effect_texts is not None:
            effects = {}
            for rank in self.ranks:
                if rank >= min(shape):
                    continue
                self.swapped.arrange({layer: rank}, FULL)
                after = partial(self.run.watch.batch, f"{layer} r={rank}")
                effects[str(rank)] = measure_effect(
                    self.run.model, self.effect_texts, unchanged, self.run.batch, after
                )
            self.swapped.arrange({}, FULL)

        def by_rank(values: Tensor, factor: float = 1.0) -> dict[str, float]:
            last = len(curve) - 1
            return {str(rank): float(values[min(rank, last)]) * factor + 0.0 for rank in self.ranks}

        return Fisher(
            layer=layer,
            shape=shape,
            set=self.texts.name,
            labels=self.draw.labels,
            sequences=len(self.texts.sequences),
            predictions=predictions,
            tokens=tail.tokens,
            fro=tail.fro,
            fisher=tuple(float(f"{value:.9g}") for value in curve),
            linear=by_rank(tail.total, -1 / predictions),
            weight=by_rank(weight),
            data=by_rank(data),
            kfac=by_rank(kfac, tail.tokens / predictions),
            on=None if self.effect_texts is None else self.effect_texts.name,
            effect=effects,
        )
