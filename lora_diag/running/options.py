"""The options that commands have in common, declared once: name, default, help text and command-line form.

A group is a ``TypedDict`` whose fields are annotated with ``Option``. A Python function takes it as
``**options: Unpack[LayerOptions]`` under ``@show_options``, which adds the options to its signature and its help. The
command line builds its own options from the same declaration (``lora_diag.cli.options.spread``).

``--help`` reads the groups, so nothing heavy is imported here: a type that comes with torch or pydantic is quoted. For
the same reason annotations are evaluated in this module (no ``from __future__ import annotations``).
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ForwardRef, TypedDict, TypeVar, get_args

if TYPE_CHECKING:
    from lora_diag.records import AnyRecord
    from lora_diag.running.engines import Ray
    from lora_diag.running.progress import Progress

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Option:
    """One option.

    Args:
        default: Its value where it is not given.
        help: What it does, in one line that is complete by itself.
        metavar: The placeholder of its value on the command line; empty for a flag.
        flags: Its names on the command line; by default ``--`` and its name.
        cli: Whether the command line has it.
    """

    default: Any
    help: str
    metavar: str = ""
    flags: tuple[str, ...] = ()
    cli: bool = True

    def words(self) -> str:
        """Return what it does and, where it is one of a few words, which."""
        return f"{self.help.removesuffix('.')}: {self.metavar}." if "|" in self.metavar else self.help


class Selection(TypedDict, total=False):
    """Which weights."""

    layers: Annotated[str | None, Option(None, "Only weights whose name contains a match.", "REGEX")]
    exclude: Annotated[str | None, Option(None, "No weights whose name contains a match.", "REGEX")]


class MissingAlpha(TypedDict, total=False):
    """α of adapters whose files give none."""

    alpha: Annotated[float | None, Option(None, "α of adapters whose files give none: s = A/r.", "A")]
    alpha_is_rank: Annotated[bool, Option(False, "State that α = r, so s = 1, where an adapter's files give no α.")]


class Matching(Selection, MissingAlpha, total=False):
    """Which weights of two sides, and how adapters without α are scaled."""

    allow_unmatched: Annotated[bool, Option(False, "Leave out what an adapter changes and BASE lacks, not stop.")]


class Device(TypedDict, total=False):
    """Where numbers are computed."""

    device: Annotated[str, Option("auto", "Where to compute.", "auto|cpu|cuda[:i]|mps")]


class Method(Device, total=False):
    """How singular values are computed."""

    method: Annotated[str, Option("auto", "How to compute singular values.", "auto|exact|gram|krylov")]
    seed: Annotated[int, Option(0, "Seed of the random starts of krylov.", "N")]


class Accuracy(Method, total=False):
    """How singular values are computed, and how well."""

    tol: Annotated[float, Option(1e-4, "Bound to reach on the error of every energy fraction.", "T")]


class Workers(TypedDict, total=False):
    """How layers share this machine."""

    workers: Annotated[int | None, Option(None, "Layers at once; default by cores and memory.", "N")]


class Machines(Workers, total=False):
    """How layers share this machine, or a cluster."""

    engine: Annotated["Ray | None", Option(None, "Ray cluster to measure on; None for this machine.", cli=False)]


class Resources(Machines, total=False):
    """How layers share this machine and its memory, or a cluster."""

    memory: Annotated[
        str | int | None,
        Option(None, "Memory limit, e.g. 8GB; larger layers are read in row blocks, or left out.", "SIZE"),
    ]


class Output(TypedDict, total=False):
    """Where records go."""

    output: Annotated[Path | str | None, Option(None, "Results file (JSONL) to write.", "FILE", ("--output", "-o"))]
    overwrite: Annotated[bool, Option(False, "Replace a file in the way that loradiag did not write; never a link.")]


class Resuming(TypedDict, total=False):
    """How an interrupted run is resumed."""

    resume: Annotated[bool, Option(False, "Resume the interrupted run in the output.")]
    verify: Annotated[bool, Option(False, "Hash every byte of the inputs (SHA-256), for resuming to compare.")]


class OnProgress(TypedDict, total=False):
    """What is called as a run goes on."""

    on_progress: Annotated[
        "Callable[[Progress], None] | None",
        Option(None, "Called after every layer, batch or step; for layers at the start, too.", cli=False),
    ]


class Callbacks(OnProgress, total=False):
    """What is called as a run goes on, and with its records."""

    on_record: Annotated[
        "Callable[[AnyRecord], None] | None",
        Option(None, "Called with every record, in the order of the file.", cli=False),
    ]


class FolderOptions(Matching, Accuracy, Resources, Resuming, Callbacks, total=False):
    """Options of a command that measures layers into an output of its own form."""


class RunOptions(Matching, Resources, Output, Resuming, Callbacks, total=False):
    """Options of a command that compares the weights of two sides, and computes no singular values."""


class MethodOptions(Matching, Method, Resources, Output, Resuming, Callbacks, total=False):
    """``RunOptions``, and how singular values are computed."""


class LayerOptions(Matching, Accuracy, Resources, Output, Resuming, Callbacks, total=False):
    """``MethodOptions``, and how well they are computed."""


class ModelOptions(TypedDict, total=False):
    """How a model runs on texts."""

    length: Annotated[int | None, Option(None, "Tokens of a sequence; default 512 or the model's most.", "N")]
    batch: Annotated[int, Option(8, "Sequences in a batch.", "N")]
    max_sequences: Annotated[int | None, Option(None, "Use the first N sequences of each file.", "N")]
    tokenizer: Annotated[str, Option("auto", "Tokenizer: of BASE, UTF-8 bytes, or of a folder.", "auto|bytes|DIR")]
    dtype: Annotated[str, Option("float32", "Type of the weights while they run.", "float32|bfloat16|float16")]
    device: Annotated[str, Option("auto", "Where to run the model.", "auto|cpu|cuda[:i]")]


class Notes(TypedDict, total=False):
    """What is called before a model runs."""

    on_note: Annotated[
        "Callable[[str], None] | None", Option(None, "Called with the estimate of what the run will cost.", cli=False)
    ]


class RecordModelOptions(Selection, ModelOptions, OnProgress, Notes, total=False):
    """Options of a command that runs a model once over its selected layers, into an output of its own form."""


class ProbeOptions(ModelOptions, Output, Resuming, Callbacks, Notes, total=False):
    """Options of every probe that writes a results file."""


class LayerProbeOptions(Selection, ProbeOptions, total=False):
    """``ProbeOptions``, and which layers."""


class Training(TypedDict, total=False):
    """How runs are trained."""

    widen: Annotated[int, Option(2, "Rates to try beyond a grid where the best is its last; 0 for none.", "N")]
    seed: Annotated[int, Option(0, "Seed of the data's order, and the first of the seeds.", "N")]


class TrainOptions(Training, ProbeOptions, total=False):
    """``ProbeOptions``, and how runs are trained."""


class LayerTrainOptions(Selection, TrainOptions, total=False):
    """``TrainOptions``, and which layers."""


def declared(group: type) -> dict[str, tuple[Any, Option]]:
    """Return every option of a group by its name, with its type; a type that is not imported stays quoted.

    >>> kind, option = declared(Selection)["layers"]
    >>> kind, option.default, option.metavar
    (str | None, None, 'REGEX')
    """
    found = {}
    for name, hint in group.__annotations__.items():
        if isinstance(hint, ForwardRef):  # of a module that does not evaluate its annotations
            hint = eval(hint.__forward_arg__, vars(sys.modules[group.__module__]))
        found[name] = (hint.__origin__, hint.__metadata__[0])
    return found


def filled(group: type, given: Mapping[str, object]) -> dict[str, Any]:
    """Return all options of a group: those given, and the defaults of the others.

    Args:
        group: A ``TypedDict`` of options.
        given: What a caller gave.

    Raises:
        TypeError: There is no such option.
    """
    options = declared(group)
    if unknown := sorted(set(given) - set(options)):
        raise TypeError(f"unexpected keyword argument {unknown[0]!r}; there are {', '.join(options)}")
    return {name: given.get(name, option.default) for name, (_, option) in options.items()}


def show_options(function: F) -> F:
    """Show the options of a function's group in its signature and its documentation.

    Args:
        function: One with ``**options: Unpack[GROUP]``, and a line ``**options:`` under ``Args:``.

    Example:
        >>> from typing import Unpack
        >>> @show_options
        ... def count(base: str, **options: Unpack[Selection]) -> int: ...
        >>> ", ".join(signature(count).parameters)
        'base, layers, exclude'
    """
    own = signature(function)
    *parameters, last = own.parameters.values()
    hint = last.annotation
    (group,) = get_args(eval(hint, function.__globals__) if isinstance(hint, str) else hint)
    options = declared(group)
    for name, (kind, option) in options.items():
        shown = kind.__forward_arg__ if isinstance(kind, ForwardRef) else kind
        parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=option.default, annotation=shown))
    function.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]

    def lines(found: re.Match[str]) -> str:
        return "".join(f"{found[1]}{name}: {option.words()}\n" for name, (_, option) in options.items())

    function.__doc__ = re.sub(r"^( *)\*\*options:.*\n", lines, function.__doc__ or "", flags=re.MULTILINE)
    return function
