"""A run of a probe: check options, open the model, read texts, estimate the cost, write records."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, cast

from torch import Tensor

from lora_diag.adapters.source import get_stated_alpha
from lora_diag.deltas import Delta, Pairing
from lora_diag.errors import Given, UsageError, flag
from lora_diag.linalg.devices import resolve_device
from lora_diag.models.data import Texts, check_names, check_texts, name_apart, read_texts
from lora_diag.models.losses import LossesBySet, measure
from lora_diag.models.opening import Model, open_model
from lora_diag.records import LeftOut, Results, ResultsWriter, Run, RunInput
from lora_diag.rendering.text import duration
from lora_diag.running.engines import MachineLayout
from lora_diag.running.fingerprint import legible
from lora_diag.running.inputs import Comparison, compare, describe
from lora_diag.running.layers import leave_out
from lora_diag.running.options import G, fill_options, list_options, stated_alpha
from lora_diag.running.progress import ProgressReporter, RunRecords
from lora_diag.storage import Checkpoint, check_exists
from lora_diag.version import __version__

# Limit of the seeds of probes: later runs add to the seed, and random generators take 63 bits.
MAX_SEED = 2**31

# Parameters times tokens of forward passes in about ten minutes: on two cores of an AMD EPYC, which
# do 8e10 a second without other programs, and on a GPU. Counts and no clock: a command with its
# defaults measures the same everywhere.
CPU_WORK, GPU_WORK = 4e13, 4e15
# Names and values of options, in the order in which they are tried until a run is short enough.
Reductions = Sequence[tuple[str, Any]]
# Numbers of sequences to which a run with default options is reduced; with fewer than eight, errors
# are not reliable.
SEQUENCES = tuple(("max_sequences", 2**k) for k in range(12, 2, -1))


class ProbeRun(Generic[G]):
    """One run of a probe.

    Args:
        command: Its name in the results file.
        options: Options given by the caller.
        group: The probe's options.

    Attributes:
        options: All options, with defaults, as the probe declares them.
        values: The same mapping untyped, for code that serves many groups.
        watch: Callbacks for progress, records and notes.
        batch: Sequences per batch.
        model: BASE, once it is open.
        params: Its number of parameters.
        reduced: Options that ``fit`` reduced, by name, as text with their values before.

    Raises:
        UsageError: An option is invalid.
        TypeError: An option is unknown or missing.
    """

    model: Model
    params: int

    def __init__(self, command: str, options: Mapping[str, object], group: type[G]) -> None:
        self.command = command
        self.options = fill_options(group, options)
        self.values = cast(dict[str, Any], self.options)
        self._given = {name for name, value in options.items() if value is not None}
        self._declared = list_options(group)
        self.reduced: dict[str, str] = {}
        self.watch = ProgressReporter(
            self.values.get("on_progress"), self.values.get("on_record"), self.values.get("on_note")
        )
        self.batch: int = self.values["batch"]
        if (seed := self.values.get("seed", 0)) >= MAX_SEED:
            raise UsageError(Given("seed", seed), f"must be below {MAX_SEED}")

    def settings(self, *names: str) -> dict[str, Any]:
        """Return options by name, for the run record."""
        return {name: self.values[name] for name in names}

    @property
    def selection(self) -> dict[str, str | None]:
        """The options that select weights, in the form of the run record."""
        return self.settings("layers", "exclude")

    def compare(self, base: Path | str, tuned: Path | str) -> Comparison:
        """Open both sides, pair their weights, and describe the inputs.

        Raises:
            InputError: A side cannot be read, the adapter does not fit BASE, or two weights have
                one name.
            NothingComparedError: No weight can be compared.
            UsageError: BASE is an adapter, a side holds second moments, or the options on α are
                invalid.
        """
        return compare(
            base, tuned, verify=self.values["verify"], stated_alpha=get_stated_alpha(self.values)
        )

    def describe(self, stored: Checkpoint) -> RunInput:
        """Return the description of an opened BASE for the run record, where nothing is compared
        with it.
        """
        return describe("base", stored, verify=self.values["verify"])

    def open(self, base: Path | str) -> Model:
        """Open the model, keep it as ``model``, and return it.

        Raises:
            UsageError: An option is invalid, the device does not exist, ``base`` is an adapter, or
                the extra ``train`` is not installed.
            InputError: It is remote or a file, transformers cannot open it, it is quantized or
                lacks weights, or its kind is not supported.
        """
        options = self.values
        device = resolve_device(options["device"])
        self.model = open_model(
            base, device, options["dtype"], options["length"], options["tokenizer"]
        )
        self.params = sum(parameter.numel() for parameter in self.model.module.parameters())
        return self.model

    def read(self, path: Path | str, shifted: bool = False) -> Texts:
        """Return one text, read for the model; ``shifted`` marks one of another distribution.

        Raises:
            UsageError: It is a data set, and the library ``datasets`` is not installed.
            InputError: It cannot be read, does not fit the kind of model, or has nothing to
                predict.
        """
        return read_texts(path, self.model, self.values["max_sequences"], shifted=shifted)

    def check_files(self, *models: Path | str, needs_set: bool = True) -> None:
        """Check that models and texts exist before one is opened: models, evaluation sets, then the
        training text.

        Args:
            models: Paths of the models.
            needs_set: Whether there must be an evaluation set.

        Raises:
            UsageError: No evaluation set is given.
            InputError: A path does not exist, or a folder holds no data set or several splits.
        """
        options = self.values
        if needs_set and not options["eval"]:
            raise UsageError(Given("eval"), "missing", "give at least one file of held-out text")
        for path in models:
            check_exists(path)
        data = [options["data"]] if "data" in options else []
        for path in (*options.get("eval", ()), *options.get("shifted", ()), *data):
            check_texts(path)

    def read_sets(self, labels: Sequence[str | None] = ()) -> list[Texts]:
        """Return all evaluation sets.

        Args:
            labels: Names of the first sets, for those whose files have the same name; None for that
                of the file.

        Raises:
            UsageError: Two have one name, or as ``read``.
            InputError: As ``read``.
        """
        shifted = self.values.get("shifted", ())
        texts = [
            *map(self.read, self.values["eval"]),
            *(self.read(path, shifted=True) for path in shifted),
        ]
        texts = name_apart(texts, labels)
        check_names(texts)
        return texts

    def count_tokens(self, sets: Sequence[Texts]) -> int:
        """Return the number of tokens of evaluation sets, of at most ``max_sequences`` sequences
        each.
        """
        return sum(
            len(one.ids) for each in sets for one in each.sequences[: self.values["max_sequences"]]
        )

    def fit(
        self, sets: Sequence[Texts], count: Callable[[], float], reductions: Reductions = SEQUENCES
    ) -> list[Texts]:
        """Reduce options that were not given until the run takes about ten minutes; return the sets
        for these options.

        Args:
            sets: Evaluation sets; a number of sequences above that of the largest is no reduction.
            count: Returns the tokens of all forward passes with the present options; a backward
                pass counts as the forward passes that take as long.
            reductions: Names and values of options, in the order in which they are tried.
        """
        most = max(len(each.sequences) for each in sets)
        work = CPU_WORK if resolve_device(self.values["device"]).type == "cpu" else GPU_WORK
        whole = {**self.values, "max_sequences": most}
        for name, value in reductions:
            if count() * self.params <= work:
                break
            if name not in self._given and not (name == "max_sequences" and value >= most):
                before, after = (
                    re.sub(r"[() ]|,\)", "", str(each)) for each in (whole[name], value)
                )
                self.reduced[name] = f"{flag(name)} {after} (of {before})"
                self.values[name] = value
        if self.reduced:
            time_of_two_cores = duration(600 * count() * self.params / work)
            self.watch.note(
                f"reduced to about {time_of_two_cores} of two cores: "
                f"{'; '.join(self.reduced.values())}"
            )
        kept = self.values["max_sequences"] if "max_sequences" in self.reduced else most
        return [
            each.reduce(kept, "for about ten minutes; more with --max-sequences") for each in sets
        ]

    @property
    def model_settings(self) -> dict[str, Any]:
        """The settings of running the open model, for the run record."""
        return {
            "length": self.model.length,
            "batch": self.batch,
            "dtype": self.values["dtype"],
            "device": self.model.device.type,
            "tokens": legible(self.model.tokens.about),
            **({"max_sequences": most} if (most := self.values.get("max_sequences")) else {}),
            **({"reduced": list(self.reduced.values())} if self.reduced else {}),
        }

    def batches(self, texts: Sequence[Texts]) -> int:
        """Return the number of batches of evaluation sets."""
        return sum(text_set.count_batches(self.batch) for text_set in texts)

    def measure(self, texts: Iterable[Texts], label: str) -> LossesBySet:
        """Return the losses of the open model on sets; every batch is reported with a label."""
        after = partial(self.watch.batch, label)
        return {each.name: measure(self.model, each, self.batch, after) for each in texts}

    def estimate(
        self,
        texts: Texts,
        description: str,
        extra: str = "",
        passes: int | None = None,
        on_logits: Callable[[Tensor], object] = lambda logits: None,
    ) -> None:
        """Time one batch, after another to warm up, and report an estimate of the run's duration.

        Args:
            texts: An evaluation set.
            description: Description of the work.
            extra: Text to append.
            passes: Total number of forward passes; default ``watch.total``.
            on_logits: What the run computes from the logits of each sequence.
        """
        first, passes = texts.first(self.batch), self.watch.total if passes is None else passes
        measure(self.model, first, self.batch)  # the first pass includes initialization
        start = time.perf_counter()
        measure(self.model, first, self.batch, on_logits=on_logits)
        seconds = time.perf_counter() - start
        self.watch.note(
            f"about {duration(seconds * passes)}: {description}, {passes} batches of {seconds:.2g} "
            f"s each{extra}"
        )

    def over(
        self,
        inputs: Iterable[RunInput],
        settings: dict[str, Any],
        measure_missing: Callable[[RunRecords[Any]], Iterable[LeftOut]],
        extendable: Mapping[str, Callable[[Any, Any], Any]] | None = None,
    ) -> Results[Any]:
        """Measure what an interrupted run has no records of, or nothing if it was finished; write
        and return records.

        Args:
            inputs: For the run record.
            settings: The probe's own settings, for the run record.
            measure_missing: Measures what is not yet in the given records of the run, puts it
                there, and returns the records of skipped tensors.
            extendable: Settings that may be extended when the run is resumed, as in
                ``ResultsWriter``.

        Returns:
            All records of the run, including those of an interrupted run.

        Raises:
            UsageError: The output can be neither replaced nor resumed.
            InputError: An input cannot be read, or the file cannot be written.
        """
        options = self.values
        run = Run(
            command=self.command,
            version=__version__,
            inputs=tuple(inputs),
            settings={**settings, **self.model_settings, **stated_alpha(options)},
        )
        with ResultsWriter[Any](
            options["output"], run, options["resume"], options["overwrite"], extendable
        ) as writer:
            kept = RunRecords(writer, self.watch)
            return kept.end(measure_missing(kept)) if kept.finished is None else kept.finished


def describe_texts(texts: Texts, role: str | None = None) -> RunInput:
    """Return the description of a text for the run record; its role is by default that of an
    evaluation set.
    """
    return RunInput(
        role=role or ("shifted" if texts.shifted else "eval"),
        path=legible(texts.path),
        kind=texts.about,
        tensors=len(texts.sequences),
        notes=texts.notes,
        fingerprint=texts.hash,
    )


def left_out(pairing: Pairing, absent: Iterable[Delta]) -> list[LeftOut]:
    """Return the records of tensors that could not be paired, and of updates that the model has no
    weight for.

    Args:
        pairing: The pairing of BASE and TUNED.
        absent: The updates without a weight in the model.
    """
    detail = "the model that transformers builds of BASE has no such weight"
    return [
        *leave_out(Pairing((), pairing.unpaired), MachineLayout(1, 1), "cpu"),
        *(
            LeftOut(layer=d.layer, shape=d.shape, reason="not_in_model", detail=detail)
            for d in absent
        ),
    ]
