"""``probe curvature``: measure the curvature of the loss, and compare its prediction for
truncations with their loss.

A Hessian-vector product of a model's mean loss on a set is one backward pass through a gradient
(Pearlmutter 1994), which works for every model that torch can differentiate twice. Forward mode, as
in curvlinops 3.0, does not support SiLU, used by every Llama; the tests compare these products with
curvlinops where it runs, and with dense Hessians.

With E = ΔW_r − ΔW over all truncated layers, L(W_tuned + E) − L(W_tuned) = ⟨∇L, E⟩ + ½⟨E, H(ξ)E⟩
for some point ξ between the two (Taylor). So it is at most ⟨∇L, E⟩ + (λ/2)‖E‖² if no curvature
between them exceeds λ; λ is measured at one end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_diag.deltas import natural_order, selector
from lora_diag.errors import Given, InputError, NothingComparedError, UsageError
from lora_diag.linalg.krylov import Eigenpairs, basis_size, eigenpairs, extreme_eigenpairs
from lora_diag.models.data import Texts
from lora_diag.models.losses import Losses, measure, predict
from lora_diag.models.opening import Model, Weights
from lora_diag.models.swapping import FULL, Swapped, truncated_layers
from lora_diag.probes.curvature import CurvatureOptions
from lora_diag.probes.curvature.record import Curvature, LossBound, Matrix, Surrogate
from lora_diag.probes.curvature.record import Point as Where
from lora_diag.records import LeftOut, Results
from lora_diag.records.names import part_of
from lora_diag.rendering.text import duration
from lora_diag.running.layers import check_ranks
from lora_diag.running.options import show_options
from lora_diag.running.probing import SEQUENCES, ProbeRun, describe_texts, left_out
from lora_diag.running.progress import RunRecords
from lora_diag.storage import Checkpoint, open_checkpoint

# Fractions of the projected gradient at which eigenpairs are counted, and of its energy at which
# ranks are.
SHARE = 0.9
SHARES = (0.9, 0.95, 0.99)

# Time of a Hessian-vector product in forward passes: 9.5 of a Llama with 135 M parameters. Nine
# matrix products by each weight: one forward, two for the gradient, six for its derivative; a
# gradient alone took 4.
PRODUCT = 9.5
# Reductions of a run with default options; at BASE the eigenpairs are what the gradient is
# projected on.
REDUCTIONS = (
    *SEQUENCES[:-1],
    ("eigenvalues", 1),
    SEQUENCES[-1],
    ("trace_vectors", 5),
    ("ranks", (1, 4, 16, 64)),
)
REDUCTIONS_AT_BASE = (*SEQUENCES, ("trace_vectors", 5), ("eigenvalues", 2))

# Singular values below this fraction of the largest are rounding errors of float32.
ROUNDING = 1e-6


class LossFunction:
    """The loss as a function of selected layers: its gradient, and products with its Hessian or
    Gauss–Newton matrix.

    The loss is the mean negative log-likelihood over the predictions of the set. All other weights
    are constant.

    Args:
        model: The model in evaluation mode, float32.
        texts: The set.
        size: Sequences in a batch; products are summed over batches.
        layers: Shapes of the selected layers, by their names in BASE.
        matrix: ``hessian`` or ``ggn``.
        after: Called after every batch.

    Raises:
        InputError: The model has no weight of a layer.
    """

    def __init__(
        self,
        model: Model,
        texts: Texts,
        size: int,
        layers: Mapping[str, tuple[int, int]],
        matrix: Matrix = "hessian",
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.texts = texts
        self.size = size
        self.matrix = matrix
        self._after = after
        self.layers = dict(layers)
        weights = Weights(model.module)
        places: dict[nn.Parameter, int] = {}
        # Each layer's parameter, as a position in ``_parameters``, and of an expert the index in
        # its stack.
        self._locations: dict[str, tuple[int, int | None]] = {}
        for layer in layers:
            if (location := weights.locate(layer)) is None:
                raise InputError(
                    layer,
                    "the model that transformers builds from BASE has no such weight",
                    "exclude it with $exclude",
                )
            self._locations[layer] = places.setdefault(location[0], len(places)), location[1]
        self._parameters = list(places)

    @property
    def params(self) -> int:
        """Number of parameters n."""
        return sum(map(math.prod, self.layers.values()))

    def only(self, layer: str) -> LossFunction:
        """Return the same loss as a function of one layer."""
        shapes = {layer: self.layers[layer]}
        return LossFunction(self.model, self.texts, self.size, shapes, self.matrix, self._after)

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the tensors of all layers as one vector ``(n,)``."""
        return torch.cat([tensors[layer].reshape(-1) for layer in self.layers])

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector ``(n,)`` as one matrix ``(out, in)`` for each layer."""
        pieces = torch.split(vector, [math.prod(shape) for shape in self.layers.values()])
        return {
            layer: piece.view(shape)
            for (layer, shape), piece in zip(self.layers.items(), pieces, strict=True)
        }

    def weights(self) -> Tensor:
        """Return a copy of the layers' weights, ``(n,)``."""
        return self.flat(self._parts([parameter.data for parameter in self._parameters]))

    def put(self, weights: Tensor) -> None:
        """Write the layers' weights, given as one vector ``(n,)``."""
        self._fill([parameter.data for parameter in self._parameters], weights)

    def _parts(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return each layer's part of tensors of the parameters' shapes: all of one, or one expert
        of a stack.
        """
        parts = {}
        for layer, (position, expert) in self._locations.items():
            parts[layer] = tensors[position]
            if expert is not None:
                parts[layer] = parts[layer][expert]
        return parts

    def _fill(self, tensors: Sequence[Tensor], vector: Tensor) -> Sequence[Tensor]:
        """Write a vector ``(n,)`` into the layers' parts of tensors of the parameters' shapes, and
        return these.
        """
        parts = self._parts(tensors)
        for layer, part in self.split(vector).items():
            parts[layer].copy_(part.view(parts[layer].shape))
        return tensors

    def gradient(self) -> Tensor:
        """Return ∇L, ``(n,)``."""
        return self._sum(
            lambda loss, logits: torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        )

    def product(self, vector: Tensor) -> Tensor:
        """Return H·x or, for the GGN, JᵀBJ·x with B the Hessian of the loss with respect to the
        logits; ``(n,)``.
        """
        vectors = self._fill(
            [torch.zeros_like(parameter) for parameter in self._parameters], vector
        )
        return self._sum(
            lambda loss, logits: _multiply(self.matrix, loss, logits, self._parameters, vectors)
        )

    def ends(self, count: int, seed: int, vectors: bool) -> tuple[Eigenpairs, Eigenpairs]:
        """Return the ``count`` largest eigenpairs, or all if there are fewer, and the smallest one.

        ``vectors`` is whether eigenvectors of the largest are needed; without, they may be missing.
        """
        n, device = self.params, self.model.device
        largest, smallest = extreme_eigenpairs(self.product, n, seed, device)
        if count > 1 or vectors:
            largest = eigenpairs(self.product, n, min(count, n), seed, device)
        return largest, smallest

    def _sum(self, step: Callable[[Tensor, Tensor], Sequence[Tensor]]) -> Tensor:
        """Return the sum of a step's results over batches, divided by the number of predictions,
        ``(n,)``.
        """
        sums = [torch.zeros_like(parameter) for parameter in self._parameters]
        predictions = 0
        with _enable_gradients(self._parameters):
            for sequences in self.texts.batches(self.size):
                outputs, labels = predict(self.model, sequences)
                logits, targets = torch.cat(outputs).float(), torch.cat(labels)
                loss = functional.cross_entropy(logits, targets, reduction="sum")
                for sum_, part in zip(sums, step(loss, logits), strict=True):
                    sum_ += part.detach()
                predictions += len(targets)
                self._after()
        return self.flat(self._parts(sums)) / predictions


@contextmanager
def _enable_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Enable gradients of these parameters within the block, with attention that can be
    differentiated twice.
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        # The fused kernels of scaled_dot_product_attention have no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _multiply(
    matrix: Matrix,
    loss: Tensor,
    logits: Tensor,
    parameters: Sequence[Tensor],
    vectors: Sequence[Tensor],
) -> Sequence[Tensor]:
    """Return the product of a batch's Hessian or GGN with x, the ``vectors``.

    The Hessian of the summed loss L gives ∇⟨∇L, x⟩ (Pearlmutter 1994). The GGN gives JᵀBJ·x, with B
    the Hessian of the loss in the logits (Schraudolph 2002).
    """
    output, w = loss, None
    if matrix == "ggn":
        output, w = logits, torch.zeros_like(logits, requires_grad=True)
    # ∇L of the loss, or Jᵀw of the logits.
    gradient = torch.autograd.grad(output, parameters, w, create_graph=True, materialize_grads=True)
    products = [(part * vector).sum() for part, vector in zip(gradient, vectors, strict=True)]
    inner = torch.stack(products).sum()
    if not inner.requires_grad:
        # The loss is linear in these parameters, or does not depend on them.
        return [torch.zeros_like(parameter) for parameter in parameters]
    if w is None:
        return torch.autograd.grad(inner, parameters, materialize_grads=True)
    # ⟨Jᵀw, x⟩ = ⟨w, J·x⟩ is linear in w: its derivative in w is J·x.
    (jvp,) = torch.autograd.grad(inner, w, retain_graph=True)
    # B = diag(p) − ppᵀ at each prediction, p its probabilities.
    p = logits.detach().softmax(-1)
    hessian_product = p * (jvp - (p * jvp).sum(-1, keepdim=True))
    return torch.autograd.grad(logits, parameters, hessian_product, materialize_grads=True)


@dataclass(frozen=True, slots=True)
class Trace:
    """Hutchinson's estimate of a trace.

    Args:
        mean: Mean of xᵀHx over random signs x.
        error: Standard error of ``mean``; None for one x.
        vectors: Number of x.
    """

    mean: float
    error: float | None
    vectors: int


def estimate_traces(
    loss_function: LossFunction, probes: int, seed: int
) -> tuple[Trace, dict[str, Trace]]:
    """Estimate the trace of the joint Hessian or GGN H, and of every layer's block, from the same
    products.

    With random signs x, E[xᵀHx] = tr(H) (Hutchinson 1990); and E[x_ℓᵀ(Hx)_ℓ] = tr(H_ℓℓ), because
    the other blocks' terms have mean zero, though they add to the variance.

    Args:
        loss_function: The loss.
        probes: Number of random vectors.
        seed: Seed of their signs.

    Returns:
        The trace of H, and those of the blocks by layer.

    Reference:
        Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix".
    """
    generator = torch.Generator().manual_seed(seed)
    by_layer: dict[str, list[float]] = {layer: [] for layer in loss_function.layers}
    for _ in range(probes):
        signs = (torch.randint(0, 2, (loss_function.params,), generator=generator) * 2 - 1).float()
        signs = signs.to(loss_function.model.device)
        for layer, part in loss_function.split(signs * loss_function.product(signs)).items():
            by_layer[layer].append(float(part.sum(dtype=torch.float64)))
    joint_samples = [sum(terms) for terms in zip(*by_layer.values(), strict=True)]
    traces = {layer: _estimate_trace(samples) for layer, samples in by_layer.items()}
    return _estimate_trace(joint_samples), traces


def _estimate_trace(samples: Sequence[float]) -> Trace:
    """Return the mean of samples xᵀHx, with its standard error."""
    n = len(samples)
    error = None
    if n > 1:
        error = stdev(samples) / math.sqrt(n)
    return Trace(fmean(samples), error, n)


def _make_surrogates(
    loss_function: LossFunction, gradient: Tensor, largest: Eigenpairs, joint: bool
) -> dict[str, Surrogate]:
    """Return, for each layer, the fraction of the gradient in the span of the eigenpairs, and what
    holds most of it.

    Args:
        loss_function: The loss.
        gradient: ∇L, ``(n,)``.
        largest: The eigenpairs.
        joint: Whether they are those of all layers together.
    """
    # V·Vᵀ∇L is the projection of the gradient; Vᵀ∇L has its energy, one term per eigenpair.
    coefficients = largest.vectors.T @ gradient
    energy_held = coefficients.double().square().cumsum(0)
    squared = inner(gradient, gradient)
    count = len(coefficients)
    surrogates = {}
    for layer, part in loss_function.split(largest.vectors @ coefficients).items():
        s = torch.linalg.svdvals(part.double())
        energy = s.square().cumsum(0)
        found = Surrogate(
            eigenpairs=count,
            joint=joint,
            share=min(1.0, float(energy_held[-1]) / squared) if squared else None,
            random=min(1.0, count / loss_function.params),
            pairs_at=None,
            rank_at=dict.fromkeys(map("{:g}".format, SHARES)),
            rank=0,
        )
        if energy[-1] > 0:
            found = found.model_copy(
                update={
                    "pairs_at": _count_to(energy_held, SHARE),
                    "rank_at": {f"{share:g}": _count_to(energy, share) for share in SHARES},
                    "rank": int((s > ROUNDING * s[0]).sum()),
                }
            )
        surrogates[layer] = found
    return surrogates


def _count_to(sums: Tensor, share: float) -> int:
    """Return the number of terms of ascending partial sums that reach a fraction of the
    whole sum.
    """
    return int((sums < share * sums[-1]).sum()) + 1


# Rounding to float32 in a mean loss of order 1: two evaluations of one model in different batches
# differ by 1e-7.
BOUND_ROUNDING = 1e-6


@dataclass(frozen=True)
class TunedPoint:
    """Quantities at W_tuned.

    Args:
        weights: Weights of the truncated layers, ``(n,)``.
        gradient: ∇L, ``(n,)``.
        losses: Losses of the set.
        largest: The joint largest eigenvalue λ.
        smallest: The smallest eigenvalue μ; None if it is not above zero by more than rounding.
    """

    weights: Tensor
    gradient: Tensor
    losses: Losses
    largest: float
    smallest: float | None


def inner(x: Tensor, y: Tensor) -> float:
    """Return ⟨x, y⟩, summed in float64."""
    return float(x.double() @ y.double())


def measure_bounds(
    loss_function: LossFunction,
    swapped: Swapped,
    tuned: TunedPoint,
    rank: int,
    along: Sequence[float],
    after: Callable[[], None],
) -> list[LossBound]:
    """Return the records of one rank, one for each point between TUNED and the truncated update.

    Args:
        loss_function: The loss as a function of the truncated layers.
        swapped: The weights of its model; truncated to ``rank`` afterwards.
        tuned: Quantities at TUNED.
        rank: r.
        along: Fractions t of the distance.
        after: Called after every batch of a loss.
    """
    texts = loss_function.texts
    swapped.arrange(dict.fromkeys(loss_function.layers, rank), FULL)
    truncated = loss_function.weights()
    change = truncated - tuned.weights
    loss_function.put(tuned.weights)
    # With E = ``change``, L(W + tE) − L(W) = t⟨∇L, E⟩ + ½t²⟨E, HE⟩ + O(t³) (Taylor), and at most
    # t⟨∇L, E⟩ + (λ/2)t²‖E‖² if no curvature between the points exceeds λ.
    linear = inner(tuned.gradient, change)
    quadratic = 0.5 * inner(change, loss_function.product(change))
    energy = inner(change, change)
    records = []
    for t in along:
        loss_function.put(truncated if t == 1 else tuned.weights + t * change)
        losses = measure(loss_function.model, texts, loss_function.size, after)
        curvature = inner(change, loss_function.product(change)) / energy if energy else 0.0
        gap, error = losses.minus(tuned.losses)
        upper = t * t * tuned.largest / 2 * energy
        records.append(
            LossBound(
                set=texts.name,
                data=texts.hash,
                tokens=losses.tokens,
                rank=rank,
                along=t,
                tail_energy=t * t * energy,
                linear=t * linear,
                quadratic=t * t * quadratic,
                upper=upper,
                lower=None if tuned.smallest is None else t * t * tuned.smallest / 2 * energy,
                curvature=curvature,
                loss=losses.mean,
                gap=gap,
                gap_error=error,
                sequences=len(losses.sums),
                holds=gap <= t * linear + upper + BOUND_ROUNDING * max(1.0, losses.mean),
            )
        )
    loss_function.put(truncated)  # restore the values that ``swapped`` expects
    return records


def _list_unselected(stored: Checkpoint, chosen: Collection[str]) -> list[LeftOut]:
    """Return the records of the tensors of BASE at which no curvature is measured."""
    skipped = []
    for name in stored:
        if name not in chosen:
            shape = stored[name].shape
            reason = "vector" if len(shape) < 2 else "not_selected"
            skipped.append(LeftOut(layer=name, shape=shape, reason=reason, detail=""))
    return skipped


@show_options
def probe_curvature(
    base: Path | str, tuned: Path | str | None = None, **options: Unpack[CurvatureOptions]
) -> Results[Any]:
    r"""Measure eigenvalues, trace and gradient of the loss at TUNED, and compare the loss bound
    with the measured gap.

    For every rank, with E = ΔW_r − ΔW over all truncated layers: ⟨∇L, E⟩, ½⟨E, HE⟩, (λ/2)‖E‖² =
    (λ/2)Σ_{i>r}σ_i², and L(W_0 + ΔW_r) − L(W_tuned) measured on the same sequences. Without TUNED
    all quantities are at BASE, and the gradient is projected on the top eigenpairs instead.

    Args:
        base: Base model: a folder that transformers can open, or a Hub id.
        tuned: Fine-tuned checkpoint or adapter; None for the curvature at BASE.
        eval: One text or JSONL file; the mean negative log-likelihood of all its predictions is
            differentiated.
        ranks: Ranks r; 0 restores the truncated layers of ``base``.
        along: Fractions t of the distance from TUNED to the truncated update; 1 is added.
        eigenvalues: Number of largest eigenvalues.
        trace_vectors: Number of random vectors of the trace estimate.
        ggn: Measure the generalised Gauss–Newton matrix instead of the Hessian: the Hessian without
            the part from the model's own curvature, positive semidefinite.
        by: ``all`` for eigenvalues of all layers jointly; ``layer`` also for those of
            every layer's own block.
        seed: Seed of the Lanczos start and of the random vectors of the trace.
        **options: ``CurvatureOptions``.

    Returns:
        The records are in ``whole``: ``Curvature`` jointly and of every layer, then ``LossBound``
            of every rank
        that truncates a layer and every fraction, if there is a TUNED.

    Raises:
        UsageError: An option is invalid, BASE is an adapter, ``dtype`` is not ``float32`` (Lanczos
            does not converge in others), the output can be neither replaced nor resumed, or the
            extra ``train``, or ``datasets`` for a data set, is not installed.
        InputError: An input cannot be read or the output written, transformers cannot open BASE,
            its model has no weight of a layer, ΔW, a loss or a product is not finite, or Lanczos
            did not converge.
        NothingComparedError: The checkpoints have no weight in common, or no matrix is selected.

    Reference:
        Pearlmutter 1994, "Fast exact multiplication by the Hessian"; Yao et al. 2020, PyHessian.

    Example:
        >>> found = probe_curvature(
        ...     "sample_checkpoints/base",  # doctest: +SKIP
        ...     eval=["sample_checkpoints/eval/in_domain.txt"],
        ...     layers="q_proj",
        ...     max_sequences=2,
        ... )
        >>> found.whole[0].eigenvalues  # doctest: +SKIP
    """
    run = ProbeRun("probe curvature", options, CurvatureOptions)
    options = run.options
    check_ranks(options["ranks"], 0)
    along = options["along"]
    if not all(0 < t <= 1 for t in along):
        raise UsageError(Given("along", along), "fractions must lie in (0, 1]")
    fractions = sorted({*map(float, along), 1.0})
    # products in bfloat16 have errors of 2%; Lanczos converges to 1e-4
    if options["dtype"] != "float32":
        raise UsageError(
            Given("dtype", options["dtype"]),
            "Hessian-vector products have errors of several percent, too large for Lanczos",
            "use float32",
        )
    run.check_files(base, *([tuned] if tuned is not None else []))
    if len(options["eval"]) > 1:
        raise UsageError(
            Given("eval"), "curvature is computed for one evaluation set", "give one file"
        )
    compared = None if tuned is None else run.compare(base, tuned)
    chosen = truncated_layers(compared.pairing.deltas, **run.selection) if compared else {}
    model = run.open(base)
    sets = run.read_sets()
    inputs, skipped = compared.inputs if compared else (), list[LeftOut]()
    if compared is None:
        stored = open_checkpoint(base)
        chosen, inputs = _select_matrices(stored, model, run.selection), (run.describe(stored),)
        skipped = _list_unselected(stored, chosen)

    def count_tokens() -> float:
        bounds = len(options["ranks"]) * (1 + len(fractions)) if compared else 0
        blocks = len(chosen) * (options["by"] == "layer")
        products = _count_products(options, blocks + 1, bounds, compared is None)
        return PRODUCT * products * run.count_tokens(sets)

    (texts,) = run.fit(sets, count_tokens, REDUCTIONS if compared else REDUCTIONS_AT_BASE)
    ranks = list(check_ranks(options["ranks"], 0))
    swapped = Swapped(model, compared.pairing.deltas, ranks[-1]) if compared else None
    matrix: Matrix = "ggn" if options["ggn"] else "hessian"
    settings = {
        "ranks": ranks if swapped else [],
        "along": fractions if swapped else [],
        **run.settings("eigenvalues", "trace_vectors"),
        "matrix": matrix,
        **run.settings("by", "layers", "exclude", "seed"),
    }
    loss_function = LossFunction(
        model, texts, run.batch, chosen, matrix, partial(run.watch.batch, "products")
    )

    def measure_missing(run_records: RunRecords[Any]) -> list[LeftOut]:
        _measure(loss_function, swapped, options, settings["ranks"], fractions, run_records)
        return left_out(compared.pairing, swapped.absent) if compared and swapped else skipped

    return run.over([*inputs, describe_texts(texts)], settings, measure_missing)


def _select_matrices(
    stored: Checkpoint, model: Model, selection: Mapping[str, str | None]
) -> dict[str, tuple[int, int]]:
    """Return the shapes of the selected matrices of BASE outside embeddings and head that the model
    uses.

    Raises:
        NothingComparedError: No matrix is selected.
    """
    selected, weights = selector(**selection), Weights(model.module)
    matrices = {
        name: (shape[0], shape[1])
        for name in sorted(stored, key=natural_order)
        if len(shape := stored[name].shape) == 2
        and part_of(name) == "matrices"
        and selected(name)
        and weights.find(name) is not None
    }
    if not matrices:
        raise NothingComparedError(
            stored.path,
            "no matrix outside embeddings and head is selected",
            "change $layers or $exclude",
        )
    return matrices


def _measure(
    loss_function: LossFunction,
    swapped: Swapped | None,
    options: CurvatureOptions,
    ranks: list[int],
    fractions: list[float],
    run_records: RunRecords[Any],
) -> None:
    """Report the estimated cost, then measure the records that the file lacks: joint curvature,
    layers, ranks.
    """
    watch = run_records.watch
    done = {record.layer for record in run_records.records if isinstance(record, Curvature)}
    done_ranks = {record.rank for record in run_records.records if isinstance(record, LossBound)}
    largest_rank = max(map(min, loss_function.layers.values()))
    ranks = [rank for rank in ranks if rank < largest_rank and rank not in done_ranks]
    missing = [layer for layer in loss_function.layers if layer not in done]
    if swapped is not None:
        swapped.arrange({}, FULL)
    blocks = len(missing) * (options["by"] == "layer")
    bounds = len(ranks) * (1 + len(fractions))
    products = _count_products(options, (None not in done) + blocks, bounds, swapped is None)
    watch.total = watch.done + products * loss_function.texts.count_batches(loss_function.size)
    start = time.perf_counter()
    loss_function.product(loss_function.weights())
    seconds = time.perf_counter() - start
    kept = basis_size(loss_function.params, options["eigenvalues"])
    gib = (
        4
        * loss_function.params
        * (kept if options["eigenvalues"] > 1 or swapped is None else 3)
        / 2**30
    )
    of = (
        f"some {products} Hessian-vector products of {seconds:.2g} s each; Lanczos takes "
        f"{gib:.1f} GiB"
    )
    watch.note(f"about {duration(products * seconds)}: {of}")
    gradient = loss_function.gradient()
    losses = measure(
        loss_function.model, loss_function.texts, loss_function.size, partial(watch.batch, "loss")
    )
    if missing or None not in done:
        at: Where = "base" if swapped is None else "tuned"
        for records in _iterate_curvatures(
            loss_function, at, options, gradient, losses, None in done, missing
        ):
            run_records.put(*records)
    if swapped is None:
        return
    joint = next(
        record
        for record in run_records.records
        if isinstance(record, Curvature) and record.layer is None
    )
    smallest = joint.smallest if joint.strongly_convex else None
    tuned = TunedPoint(loss_function.weights(), gradient, losses, joint.eigenvalues[0], smallest)
    for rank in ranks:
        after = partial(watch.batch, f"r={rank}")
        run_records.put(*measure_bounds(loss_function, swapped, tuned, rank, fractions, after))


def _iterate_curvatures(
    loss_function: LossFunction,
    at: Where,
    options: CurvatureOptions,
    gradient: Tensor,
    losses: Losses,
    has_joint: bool,
    layers: Sequence[str],
) -> Iterator[list[Curvature]]:
    """Yield the missing records, those from the same eigenpairs in one list; a missing joint record
    is in the first.

    Layers have the gradient, the trace and, at BASE, the surrogate: by ``all`` from
    the joint eigenpairs, with ``layer`` from their own, whose eigenvalues they then have, too.

    Args:
        loss_function: The loss.
        at: Name of the point.
        options: Options of the run.
        gradient: ∇L, ``(n,)``.
        losses: Losses of the set.
        has_joint: Whether the file has the joint record.
        layers: Layers without a record.
    """
    top, per, seed = options["eigenvalues"], options["by"], options["seed"]
    parts = loss_function.split(gradient)
    joint_trace, traces = estimate_traces(loss_function, options["trace_vectors"], seed)

    def record(
        layer: str | None, trace: Trace, ends: Sequence[Eigenpairs] = (), **more: Any
    ) -> Curvature:
        own_gradient = gradient if layer is None else parts[layer]
        if ends:
            more |= {"eigenvalues": tuple(ends[0].values.tolist()), "residual": ends[0].residual}
            more |= {"smallest": float(ends[1].values[0]), "smallest_residual": ends[1].residual}
            more |= {"products": sum(pairs.products for pairs in ends)}
        return Curvature(
            set=loss_function.texts.name,
            data=loss_function.texts.hash,
            tokens=losses.tokens,
            layer=layer,
            at=at,
            matrix=loss_function.matrix,
            params=own_gradient.numel(),
            loss=losses.mean,
            gradient=float(own_gradient.double().norm()),
            trace=trace.mean,
            trace_error=trace.error,
            trace_vectors=trace.vectors,
            **more,
        )

    def surrogates(
        block: LossFunction, own_gradient: Tensor, largest: Eigenpairs
    ) -> dict[str, Surrogate]:
        if at != "base":
            return {}
        return _make_surrogates(block, own_gradient, largest, block is loss_function)

    if not has_joint or per == "all":
        ends = loss_function.ends(top, seed, at == "base")
        of_layer = surrogates(loss_function, gradient, ends[0])
        records = [record(None, joint_trace, ends)]
        if per == "all":
            records += [record(x, traces[x], surrogate=of_layer.get(x)) for x in layers]
        yield records
    if per == "layer":
        for layer in layers:
            block = loss_function.only(layer)
            ends = block.ends(top, seed, at == "base")
            of_layer = surrogates(block, parts[layer].reshape(-1), ends[0])
            yield [record(layer, traces[layer], ends, surrogate=of_layer.get(layer))]


def _count_products(options: CurvatureOptions, operators: int, bounds: int, vectors: bool) -> int:
    """Return the estimated number of products, of which ``operators`` is the number of matrices
    with eigenvalues.
    """
    # About 25 for both ends; for more eigenvalues, or vectors, again 25 and 5 for each.
    top = options["eigenvalues"]
    lanczos = 25 + (25 + 5 * top) * (top > 1 or vectors)
    return int(operators * lanczos + options["trace_vectors"] + bounds)
