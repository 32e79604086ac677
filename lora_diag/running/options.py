"""The options of commands, declared once: name, default, help text and command-line form.

A group is a ``TypedDict`` whose fields are annotated with ``Option``. A Python function takes it as
``**options: Unpack[LayerOptions]`` under ``@show_options``, which adds the options to its signature
and its help. The command line builds its own options from the same declaration
(``lora_diag.cli.options.make_function``). Options of one command are a group in the ``__init__.py``
of its folder; those of several are here.

``--help`` reads the groups, so nothing heavy is imported here, and a type from torch or pydantic is
quoted; and annotations are evaluated in this module (no ``from __future__ import annotations``).
"""

import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from inspect import Parameter, signature
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ForwardRef,
    Literal,
    Required,
    TypedDict,
    TypeVar,
    cast,
)

from lora_diag.errors import Given, UsageError, flag
from lora_diag.running.amounts import MAX_RATE

if TYPE_CHECKING:
    from lora_diag.records import AnyRecord
    from lora_diag.running.engines import Ray
    from lora_diag.running.progress import Progress

F = TypeVar("F", bound=Callable[..., Any])
# A ``TypedDict`` of options.
G = TypeVar("G")

# Parts of a command's help, in this order: inputs, computation, output, execution.
INPUTS, MEASUREMENT, OUTPUT, EXECUTION = PANELS = ("Inputs", "Measurement", "Output", "Execution")

# Default of a required option.
REQUIRED: Any = Parameter.empty


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Args:
        default: Value if it is not given; ``REQUIRED`` for a required option.
        help: Help text, one complete line.
        metavar: Placeholder of its value on the command line; ``a|b`` for choices; empty for a
            flag.
        short: Short name on the command line, besides ``--`` and its name.
        panel: Part of the help that shows it, from ``PANELS``.
        completions: Words for shell completion, besides the choices.
        cli: Whether it exists on the command line.
        least: Smallest allowed number, also in a list; None for any.
        most: Largest allowed number, also in a list; None for any.
        between: Ends of the open interval of the number, or of each in a list; None for any.
        former: Earlier names in Python and in the settings of records, with blanks between.
    """

    default: Any
    help: str
    metavar: str = ""
    short: str = ""
    panel: str = MEASUREMENT
    completions: tuple[str, ...] = ()
    cli: bool = True
    least: int | None = None
    most: int | None = None
    between: tuple[float, float] | None = None
    former: str = ""

    def words(self) -> str:
        """Return the help text, with the placeholder of the value if that lists choices."""
        return (
            f"{self.help.removesuffix('.')}: {self.metavar}." if "|" in self.metavar else self.help
        )

    def by(self, default: Any, **changes: Any) -> "Option":
        """Return the option with another default, and with changes of other fields."""
        return replace(self, default=default, **changes)

    @property
    def choices(self) -> tuple[str, ...]:
        """The allowed values; empty if others are allowed.

        >>> (
        ...     Option("both", "How Σ is split.", "both|b").choices,
        ...     Option("auto", "Device.", "auto|cpu|cuda[:i]").choices,
        ... )
        (('both', 'b'), ())
        """
        return (
            tuple(self.metavar.split("|"))
            if re.fullmatch(r"[a-z0-9_]+(\|[a-z0-9_]+)+", self.metavar)
            else ()
        )

    def flags(self, name: str) -> tuple[str, ...]:
        """Return the option's names on the command line, given its name in Python."""
        return (flag(name), self.short) if self.short else (flag(name),)

    def checked(self, name: str, value: Any) -> Any:
        """Return a value, if the option allows it; text that is not parsed yet may have any number.

        Raises:
            UsageError: The value is not a choice of the option, or outside its limits; or a list of
                numbers is empty.
        """
        if isinstance(value, str) and self.choices and value not in self.choices:
            raise UsageError(Given(name, value), "unknown value", f"use {', '.join(self.choices)}")
        if (
            (self.least, self.most, self.between) == (None, None, None)
            or value is None
            or isinstance(value, str)
        ):
            return value
        numbers = value if isinstance(value, list | tuple) else [value]
        if not numbers:
            raise UsageError(Given(name), "is empty", "give at least one number")
        for number in numbers:
            problem = ""
            if self.least is not None and number < self.least:
                problem = f"must be at least {self.least}"
            if self.most is not None and number > self.most:
                problem = f"must be at most {self.most}"
            if self.between is not None and not self.between[0] < number < self.between[1]:
                problem = f"must lie between {self.between[0]:g} and {self.between[1]:g}"
            if problem:
                raise UsageError(Given(name, number), problem)
        return value


# Options of several commands, each with its own default.
RANKS = Option((4, 8, 16, 32, 64), "Ranks r to measure.", "R,R,...")
RANK = Option(None, "Rank of the adapter in every layer.", "R")
BY_UNIT = Option(
    "all",
    "Truncate all layers together, or each layer or module type alone.",
    "all|layer|type",
    former="granularity per",
)
LR = Option((), "Peak learning rates to try.", "X,X,...", between=(0, MAX_RATE), former="rates")
FULL_LR = LR.by((), help="Peak learning rates of full fine-tuning.", former="full_rates")
STEPS = Option(100, "Training steps of a run.", "N", least=1)
RECOVER = Option(False, "Use the estimate of the update before rounding (see recover).")
REPEATS = Option(2, "Training runs at the best learning rate.", "N", least=1, former="seeds")
TOP = Option(None, "Compute only the K largest singular values; default: all.", "K")
SHOW_RANK = Option(
    None, "Measured rank to show; default: depends on the records.", "R", panel=OUTPUT
)
WEIGHTS = Option(None, "Weight of each update; default: 1, of a mean 1/K.", "W,W,...", panel=INPUTS)
CHECKPOINT = Option(
    False,
    "Write a checkpoint, BASE plus the update; default: an adapter.",
    panel=OUTPUT,
    former="full",
)
ENERGY = Option(None, "Smallest ranks that keep this fraction of Σσ², e.g. 0.9.", "FRACTION")
PARAMS = Option(None, "Budget in trainable parameters, e.g. 10M.", "N")
MEMORY_BUDGET = Option(
    None, "Budget in bytes of adapter, gradients and optimizer, e.g. 2GB.", "SIZE"
)
OPTIMIZER = Option(
    "adamw", "Optimizer assumed by --memory-budget.", "adamw|adamw8bit|sgd|sgd_momentum"
)
ADAPTER_DTYPE = Option(
    "float32", "Dtype of the adapter's weights.", "float32|bfloat16|float16", former="dtype"
)
DORA = Option(False, "Train DoRA instead of LoRA.")
CHECKPOINTING = Option(
    False, "Recompute activations in the backward pass: less memory, more time.", panel=EXECUTION
)
QUANTIZED = Option(None, "Round frozen weights to QLoRA's format; default: off.", "nf4|int8")
GAIN_TOLERANCE = Option(
    0.02,
    "Fraction of the gain that a smaller rank may lose.",
    "X",
    between=(0, 1),
    former="tolerance",
)
TARGET_MODULES = Option(
    (),
    "Modules to adapt, as PEFT names them; default: all linear layers except the head.",
    "NAME,NAME",
    panel=INPUTS,
    former="targets",
)
RSLORA = Option(False, "Scale by lora_alpha/√r (rsLoRA) instead of lora_alpha/r.")
SWEEP = Option(
    None, "Results of probe sweep, source of the best learning rate.", "FILE", panel=INPUTS
)
BASE = Option(None, "Base checkpoint of what is measured; default: none.", "BASE", panel=INPUTS)
ACTIVATIONS = Option(
    None,
    "Second moments of layer inputs, from probe activations, as the metric.",
    "FILE",
    panel=INPUTS,
)
KFAC = Option(False, "K-FAC metric: weight outputs by their gradients; needs --activations.")
REFERENCE = Option(
    None, "Second full fine-tune, e.g. another seed, as a reference.", "TUNED2", panel=INPUTS
)
DATA = Option(REQUIRED, "Data: text, JSONL or datasets folder.", "FILE", panel=INPUTS)
SHIFTED = Option((), "Text from another distribution; repeatable.", "FILE", panel=INPUTS)
Labels = Literal["data", "model"]
LABELS = Option(
    "data", "Labels of the loss: those of the text, or sampled from the model.", "data|model"
)
SEED = Option(0, "Seed of all random numbers.", "N", least=0, most=2**63 - 1)
# Weights that get an adapter: by default all matrices except embeddings, head and routers.
TARGETS = Option(None, "Only weights whose name contains a match.", "REGEX", panel=INPUTS)
MATCH_NORM = Option(
    False, "Lengthen ΔW_r to the norm of ΔW: (‖ΔW‖/‖ΔW_r‖)·ΔW_r; a probe measures both."
)
PORTABLE = Option(
    False, "One rank for all layers: every program scales the adapter alike.", panel=OUTPUT
)
FORMAT = Option(
    "peft", "Format; all but peft imply --portable.", "peft|kohya|diffusers|mlx|gguf", panel=OUTPUT
)
BASE_NAME = Option(
    None, "Name of BASE in config and model card; default: its path.", "NAME", panel=OUTPUT
)
EXCLUDE = Option(None, "Skip weights whose name contains a match.", "REGEX", panel=INPUTS)
LAYERS = Option(None, "Only weights whose name contains a match.", "REGEX", panel=INPUTS)
UNFINISHED = Option(False, "Accept results of an interrupted spectrum run.", panel=INPUTS)
BY_ROW = Option(
    "type", "Rows: pooled by module type, or every layer.", "type|layer", panel=OUTPUT, former="per"
)


class Selection(TypedDict, total=False):
    """Selection of weights."""

    layers: Annotated[str | None, LAYERS]
    exclude: Annotated[str | None, EXCLUDE]


class MissingAlpha(TypedDict, total=False):
    """α of adapters whose files give none."""

    alpha: Annotated[
        float | None,
        Option(
            None,
            "α of adapters whose files give none; default: scale 1 (PEFT: an error).",
            "A",
            panel=INPUTS,
        ),
    ]
    alpha_is_rank: Annotated[
        bool, Option(False, "Assume α = r if an adapter's files give no α.", panel=INPUTS)
    ]


def stated_alpha(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given options on adapters without α by name, for the run record."""
    return {name: options[name] for name in ("alpha", "alpha_is_rank") if options.get(name)}


class Matching(Selection, MissingAlpha, total=False):
    """Selection of weights of two sides, and the scaling of adapters without α."""

    allow_unmatched: Annotated[
        bool,
        Option(
            False,
            "Skip weights that the adapter changes and BASE lacks; default: an error.",
            panel=INPUTS,
        ),
    ]


class Device(TypedDict, total=False):
    """Device of the computation."""

    device: Annotated[
        str, Option("auto", "Device to compute on.", "auto|cpu|cuda[:i]|mps", panel=EXECUTION)
    ]


class Method(Device, total=False):
    """Computation of singular values."""

    svd: Annotated[
        str,
        Option("auto", "Method for singular values.", "auto|exact|gram|krylov", former="method"),
    ]
    seed: Annotated[int, SEED]


class Accuracy(Method, total=False):
    """Computation and accuracy of singular values."""

    tol: Annotated[float, Option(5e-4, "Maximum error of an energy fraction.", "T")]


class Workers(TypedDict, total=False):
    """Concurrency on this machine."""

    workers: Annotated[
        int | None,
        Option(
            None,
            "Number of concurrent layers; default: by cores and memory.",
            "N",
            panel=EXECUTION,
            least=1,
        ),
    ]


class Engine(TypedDict, total=False):
    """Where a command runs."""

    engine: Annotated[
        "Ray | None", Option(None, "Ray cluster to measure on; None for this machine.", cli=False)
    ]


class Machines(Workers, Engine, total=False):
    """Concurrency on this machine, or a cluster."""


class Resources(Machines, total=False):
    """Concurrency and memory of this machine, or a cluster."""

    memory: Annotated[
        str | int | None,
        Option(None, "Memory limit, e.g. 8GB; default: none.", "SIZE", panel=EXECUTION),
    ]


class Output(TypedDict, total=False):
    """Destination of records."""

    output: Annotated[
        Path | str | None,
        Option(None, "Results file (JSONL) to write.", "FILE", "-o", OUTPUT),
    ]
    overwrite: Annotated[bool, Option(False, "Replace an existing output.", panel=OUTPUT)]


class VerdictOutputs(TypedDict, total=False):
    """Outputs of a command that judges."""

    output: Annotated[
        Path | None,
        Option(None, "Verdicts or findings (JSONL) to write.", "FILE", "-o", OUTPUT),
    ]
    junit: Annotated[Path | None, Option(None, "JUnit report to write.", "FILE", panel=OUTPUT)]
    github: Annotated[
        bool, Option(False, "Print annotations and step summary of GitHub Actions.", panel=OUTPUT)
    ]
    overwrite: Annotated[bool, Option(False, "Replace an existing output.", panel=OUTPUT)]


class Resuming(TypedDict, total=False):
    """Resuming of interrupted runs."""

    resume: Annotated[
        bool, Option(False, "Resume the interrupted run in the output.", panel=EXECUTION)
    ]
    verify: Annotated[
        bool, Option(False, "Hash every byte of the inputs (SHA-256).", panel=EXECUTION)
    ]


class OnProgress(TypedDict, total=False):
    """Progress callback."""

    on_progress: Annotated[
        "Callable[[Progress], None] | None",
        Option(
            None,
            "Called after every layer, batch or step, and at the start of each layer.",
            cli=False,
        ),
    ]


class Callbacks(OnProgress, total=False):
    """Callbacks for progress and records."""

    on_record: Annotated[
        "Callable[[AnyRecord], None] | None",
        Option(None, "Called with every record, in the order of the file.", cli=False),
    ]


class FolderOptions(Matching, Accuracy, Resources, Resuming, Callbacks, total=False):
    """Options of a command that measures layers and writes an output in its own format."""


class RunOptions(Matching, Resources, Output, Resuming, Callbacks, total=False):
    """Options of a command that compares the weights of two sides without singular values."""


class MethodOptions(Matching, Method, Resources, Output, Resuming, Callbacks, total=False):
    """``RunOptions``, and the device and method for singular values."""


class LayerOptions(Matching, Accuracy, Resources, Output, Resuming, Callbacks, total=False):
    """``MethodOptions``, and the accuracy of singular values."""


class HeldOut(TypedDict, total=False):
    """Evaluation sets."""

    eval: Annotated[
        Sequence[Path | str],
        Option(
            (),
            "Held-out text, JSONL or datasets folder; repeatable.",
            "FILE",
            panel=INPUTS,
            former="evaluate",
        ),
    ]


class Shifted(HeldOut, total=False):
    """``HeldOut``, and evaluation sets of another distribution."""

    shifted: Annotated[Sequence[Path | str], SHIFTED]


class ModelOptions(Device, total=False):
    """Options of running a model on texts."""

    length: Annotated[
        int | None,
        Option(None, "Sequence length in tokens; default: 512 or the model's limit.", "N"),
    ]
    batch: Annotated[int, Option(8, "Sequences per batch.", "N", panel=EXECUTION, least=1)]
    max_sequences: Annotated[
        int | None,
        Option(
            None,
            "Use N sequences of each file, evenly spaced; default: all.",
            "N",
            panel=INPUTS,
            least=1,
        ),
    ]
    tokenizer: Annotated[
        str,
        Option(
            "auto",
            "Tokenizer: of BASE, UTF-8 bytes, or of a folder.",
            "auto|bytes|DIR",
            panel=INPUTS,
        ),
    ]
    dtype: Annotated[
        str, Option("float32", "Dtype of the weights during the run.", "float32|bfloat16|float16")
    ]


class Notes(TypedDict, total=False):
    """Callback for the cost estimate."""

    on_note: Annotated[
        "Callable[[str], None] | None",
        Option(None, "Called with the estimate of what the run will cost.", cli=False),
    ]


class RecordModelOptions(Selection, ModelOptions, OnProgress, Notes, total=False):
    """Options of a command that runs a model once over selected layers and writes an output in its
    own format.
    """


class ProbeOptions(ModelOptions, Output, Resuming, Callbacks, Notes, total=False):
    """Options of every probe that writes a results file."""


class LayerProbeOptions(Selection, ProbeOptions, total=False):
    """``ProbeOptions``, and the selection of layers."""


class Training(TypedDict, total=False):
    """Training options."""

    widen: Annotated[
        int, Option(2, "Learning rates to try beyond the grid; 0 for none.", "N", least=0)
    ]
    seed: Annotated[int, SEED]


class TrainingRuns(Engine, total=False):
    """Training runs on a cluster."""

    concurrent: Annotated[
        int | None,
        Option(
            None,
            "With --engine ray: concurrent runs per node; default: 1, or 1 per GPU.",
            "N",
            panel=EXECUTION,
        ),
    ]


class TrainOptions(Training, ProbeOptions, total=False):
    """``ProbeOptions``, and training options."""


class LayerTrainOptions(Selection, TrainOptions, total=False):
    """``TrainOptions``, and the selection of layers."""


def list_options(group: type) -> dict[str, tuple[Any, Option]]:
    """Return every option of a group by name, with its type: first the command's own, then the
    common ones.

    A quoted type, whose names need not be imported, is returned as a ``ForwardRef``.

    >>> kind, option = list_options(Selection)["layers"]
    >>> kind, option.default, option.metavar
    (str | None, None, 'REGEX')
    """
    options = _list_declared(group)
    return {name: options[name] for name in (*own_options(group), *options)}


def own_options(group: type) -> list[str]:
    """Return the names of a group's options that no group of this module declares alike: the
    command's own options.
    """
    common = _list_common()
    return [
        name for name, (_, option) in _list_declared(group).items() if common.get(name) != option
    ]


def _list_declared(group: type) -> dict[str, tuple[Any, Option]]:
    """Return the type and the declaration of every option of a group, by name, in the order of the
    declarations.
    """
    options = {}
    for name, hint in group.__annotations__.items():
        if isinstance(hint, ForwardRef):  # from a module that does not evaluate its annotations
            hint = eval(hint.__forward_arg__, vars(sys.modules[group.__module__]))
        origin: Any = typing.get_origin(hint)
        hint = typing.get_args(hint)[0] if origin is Required else hint
        options[name] = (hint.__origin__, hint.__metadata__[0])
    return options


@cache
def _list_common() -> dict[str, Option]:
    """Return the options that the groups of this module declare, by name."""
    groups = [value for value in list(globals().values()) if typing.is_typeddict(value)]
    return {name: option for group in groups for name, (_, option) in _list_declared(group).items()}


def fill_options(group: type[G], passed: Mapping[str, object]) -> G:
    """Return all options of a group: the given ones, and the defaults of the others.

    Args:
        group: A ``TypedDict`` of options.
        passed: Options of the caller.

    Raises:
        TypeError: An option is unknown or missing.
        UsageError: A value is none of the option's choices, or outside its limits; or ``resume`` is
            set without the group's ``output``.
    """
    options = list_options(group)
    if unknown := next((name for name in passed if name not in options), None):
        renamed = [
            name for name, (_, option) in options.items() if unknown in option.former.split()
        ]
        names = renamed or [f"one of {', '.join(options)}"]
        raise TypeError(f"unexpected keyword argument {unknown!r}; use {names[0]}")
    if missing := [
        name
        for name, (_, option) in options.items()
        if option.default is REQUIRED and name not in passed
    ]:
        raise TypeError(f"missing keyword argument {missing[0]!r}")
    filled = {
        name: option.checked(name, passed.get(name, option.default))
        for name, (_, option) in options.items()
    }
    if filled.get("resume") and filled.get("output", "given elsewhere") is None:
        raise UsageError(
            Given("resume"), "give the results file of the interrupted run with $output"
        )
    return cast(G, filled)


def rename_settings(group: type, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run record by today's names of the options.

    >>> rename_settings(HeldOut, {"evaluate": ["a.txt"], "seed": 2})
    {'eval': ['a.txt'], 'seed': 2}
    """
    options = list_options(group).items()
    names = {former: name for name, (_, option) in options for former in option.former.split()}
    return {names.get(name, name): value for name, value in recorded.items()}


def select_options(group: type[G], options: Mapping[str, object]) -> G:
    """Return those of the options that another group declares, too."""
    return cast(G, {name: options[name] for name in list_options(group)})


def list_own_settings(group: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the own options of one command by name, for the settings of the run record, in their
    JSON form.

    Args:
        group: A ``TypedDict`` of options.
        values: Options and values derived from them.
    """
    return {name: _to_json(values[name]) for name in own_options(group)}


def list_typed_options(group: type, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options in the settings of a run record that differ from their defaults, by name.

    Values of None, False and 0 are omitted, too.

    Args:
        group: A ``TypedDict`` of options.
        recorded: Settings; those that are not options of the group are ignored.
    """
    return {
        name: recorded[name]
        for name, (_, option) in list_options(group).items()
        if recorded.get(name) not in (None, False, _to_json(option.default))
    }


def _to_json(value: Any) -> Any:
    """Return a value in its JSON form: a list for a tuple."""
    return list(value) if isinstance(value, tuple) else value


def show_options(function: F) -> F:
    """Show the options of a function's group in its signature and docstring; return the same
    function.

    An option that the docstring already describes keeps that description.

    Args:
        function: One with ``**options: Unpack[GROUP]``, and a line ``**options:`` under ``Args:``.

    Example:
        >>> from typing import Unpack
        >>> @show_options
        ... def count(base: str, **options: Unpack[Selection]) -> int: ...
        >>> ", ".join(signature(count).parameters)
        'base, layers, exclude'
    """
    own_signature = signature(function)
    *parameters, last = own_signature.parameters.values()
    hint = last.annotation
    (group,) = typing.get_args(eval(hint, function.__globals__) if isinstance(hint, str) else hint)
    options = list_options(group)
    for name, (kind, option) in options.items():
        annotation = kind.__forward_arg__ if isinstance(kind, ForwardRef) else kind
        parameters.append(
            Parameter(name, Parameter.KEYWORD_ONLY, default=option.default, annotation=annotation)
        )
    vars(function).update(
        __signature__=own_signature.replace(parameters=parameters), options=options
    )

    def describe_missing(match: re.Match[str]) -> str:
        missing = {
            name: option
            for name, (_, option) in options.items()
            if f"\n{match[1]}{name}: " not in docstring
        }
        return "".join(f"{match[1]}{name}: {option.words()}\n" for name, option in missing.items())

    docstring = function.__doc__ or ""
    function.__doc__ = re.sub(
        r"^( *)\*\*options:.*\n", describe_missing, docstring, flags=re.MULTILINE
    )
    return function
