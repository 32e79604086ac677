"""Opening of transformers models: weights by the names of the checkpoint, and the tokenizer.

Handles transformers, independent of measurements. Code in a checkpoint is never run.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_diag.adapters import is_adapter
from lora_diag.errors import Given, InputError, LoradiagError, UsageError, damaged, require
from lora_diag.models.config import check_unquantized, read_config
from lora_diag.storage import hub, locate_files
from lora_diag.storage.remote import RemotePath

Kind = Literal["causal", "masked", "classifier"]

# Default sequence length: evaluated in seconds on a CPU, and long enough for a meaningful loss.
LENGTH = 512

# Text that no tokenizer with a vocabulary maps to a single repeated token.
_SAMPLE = "The year 1936."

# Kind of prediction, and the class of transformers that opens the model, by the end of the
# architecture's name.
_KINDS: dict[str, tuple[Kind, str]] = {
    "ForSequenceClassification": ("classifier", "AutoModelForSequenceClassification"),
    "ForMaskedLM": ("masked", "AutoModelForMaskedLM"),
    "ForCausalLM": ("causal", "AutoModelForCausalLM"),
    "LMHeadModel": ("causal", "AutoModelForCausalLM"),
}

# Files with the vocabulary of a tokenizer; where a folder has none, ``auto`` may mean bytes.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)

# Models that are open, inside ``keep_open``.
_KEPT: ContextVar[dict[tuple[Any, ...], Model] | None] = ContextVar("_KEPT", default=None)


@dataclass(frozen=True)
class Tokens:
    """Conversion of text to token ids.

    Args:
        ids: Returns the ids of a text, without special tokens.
        first: Ids at the start of every sequence, such as that of ``<s>``.
        last: Ids at the end of sequences of a classifier or a masked model.
        pad: Padding of shorter sequences in a batch; always masked.
        about: Description of the tokenizer.
        mask: Id of the mask token; None for a tokenizer without one.
    """

    ids: Callable[[str], list[int]]
    first: tuple[int, ...]
    last: tuple[int, ...]
    pad: int
    about: str
    mask: int | None = None


@dataclass(frozen=True)
class Model:
    """A model on its device, in evaluation mode.

    Args:
        module: The model; None from ``open_tokenizer``.
        kind: Kind of prediction.
        tokens: The tokenizer.
        length: Number of tokens of a sequence.
        device: Device of the weights.
        labels: For a classifier, the index of each class by name.
    """

    module: Any
    kind: Kind
    tokens: Tokens
    length: int
    device: torch.device
    labels: Mapping[str, int]


def open_model(
    base: Path | str,
    device: torch.device,
    dtype: str = "float32",
    length: int | None = None,
    tokenizer: str = "auto",
) -> Model:
    """Open a causal or masked language model, or a sequence classifier; inside ``keep_open`` only
    once.

    Args:
        base: A folder that transformers can open, or a Hub id.
        device: Device of the weights.
        dtype: Dtype of the weights: ``float32``, ``bfloat16`` or ``float16``.
        length: Number of tokens of a sequence; default 512, or the number of positions if smaller.
        tokenizer: ``auto`` for the one in ``base``, or, unless it is a masked model, as ``bytes``
            if it has none and a vocabulary of 256; ``bytes`` for UTF-8 bytes as token ids; or a
            folder.

    Raises:
        UsageError: An option is invalid, ``base`` is an adapter, or transformers is not installed.
        InputError: ``base`` does not exist, is remote or a file, transformers cannot open the model
            or the tokenizer, the tokenizer of a masked model has no mask token, the model is
            quantized or lacks weights, or its kind is not supported.
    """
    open_models, key = _KEPT.get(), (str(base), str(device), dtype, length, tokenizer)
    if open_models is not None and key in open_models:
        return open_models[key]
    model = _load_model(base, device, dtype, length, tokenizer)
    if open_models is not None:
        open_models[key] = model
    return model


@contextlib.contextmanager
def keep_open() -> Iterator[None]:
    """Let several probes of one process share a model: inside, each is opened once.

    Probes leave BASE as it was.
    """
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def _load_model(
    base: Path | str, device: torch.device | None, dtype: str, length: int | None, tokenizer: str
) -> Model:
    """Return a newly opened model, with frozen weights; without a device, one without weights.

    Arguments and errors are as in ``open_model``.
    """
    with require("running a model, or its tokenizer,", "train"):
        import transformers
    folder, where, options = _locate_base(base)
    with _suppress_messages(transformers):
        config = _read_config(transformers, base, folder, where, options)
        kind, opener = _infer_kind(base, config)
        module = None
        if device is not None:
            module = _load_module(
                getattr(transformers, opener), base, where, dtype, config, options
            )
        tokens = _open_tokenizer(transformers, base, where, options, config, tokenizer, kind)
    length = _choose_length(config, length)
    if module is not None:
        module.eval().requires_grad_(False).to(device)
        if kind == "classifier" and config.pad_token_id is None:
            module.config.pad_token_id = tokens.pad  # by which models find the last token
    labels = {
        str(name): int(index) for name, index in (getattr(config, "label2id", None) or {}).items()
    }
    return Model(module, kind, tokens, length, device or torch.device("cpu"), labels)


def _load_module(
    opener: Any, base: Path | str, where: str, dtype: str, config: Any, options: dict[str, Any]
) -> Any:
    """Return the model of transformers with its weights.

    Raises:
        InputError: The model is quantized or lacks weights, or transformers cannot open it.
    """
    check_unquantized(base, config)
    _refuse_embedded_adapter(base, where, options)
    with _report_failure(base, "transformers cannot open this model"):
        module, info = opener.from_pretrained(
            where,
            config=config,
            dtype=getattr(torch, dtype),
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{base}: has no weights for "
            f"{', '.join(missing[:3])}{' and others' if missing[3:] else ''}, which "
            "would be random; give the complete model"
        )
    return module


def open_tokenizer(base: Path | str, length: int | None = None, tokenizer: str = "auto") -> Model:
    """Open what is needed to read texts: tokenizer, length and kind of a model, without its
    weights.

    Args:
        base: As for ``open_model``; weights need not be there.
        length: Number of tokens of a sequence; default as for ``open_model``.
        tokenizer: As for ``open_model``.

    Returns:
        A model whose ``module`` is None.
    """
    return _load_model(base, None, "float32", length, tokenizer)


def _read_config(
    transformers: Any, base: Path | str, folder: Path, where: str, options: dict[str, Any]
) -> Any:
    """Return the model's config.

    Raises:
        UsageError: BASE is an adapter.
    """
    try:
        with _report_failure(base, "transformers cannot open this model, by its config.json"):
            return read_config(
                transformers.AutoConfig.from_pretrained, folder / "config.json", where, options
            )
    except InputError as error:
        if isinstance(error.__cause__, OSError | ValueError | KeyError) and is_adapter(folder):
            raise UsageError(f"{base}: is an adapter; give its base model") from error
        raise


def _refuse_embedded_adapter(base: Path | str, where: str, options: dict[str, Any]) -> None:
    """Refuse an adapter in the folder of a model: transformers would apply it, or open the model
    that it names.

    Raises:
        InputError: There is one.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    given = {key: value for key, value in options.items() if key != "subfolder"}
    if find_adapter_config_file(where, **given) is not None:
        problem = (
            "has an adapter_config.json, by which transformers would change the model or "
            "open another one"
        )
        raise damaged(base, problem, "move the adapter to a folder of its own")


@contextlib.contextmanager
def _report_failure(subject: object, problem: str, fix: str = "") -> Iterator[None]:
    """Turn whatever a library raises for a damaged file into one message.

    A panic of the tokenizers' Rust code is no ``Exception``.

    Raises:
        InputError: The block failed.
    """
    try:
        yield
    except (LoradiagError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(subject, f"{problem}: {_first_line_of_error(error)}", fix) from error


def _choose_length(config: Any, length: int | None) -> int:
    """Return the number of tokens of a sequence: the requested one, or the default for the model.

    A config without a number of positions counts as one with 512.

    Raises:
        UsageError: The requested number is below 2, or the model has fewer positions.
    """
    positions = getattr(config, "max_position_embeddings", None) or LENGTH
    if length is not None and not 2 <= length <= positions:
        raise UsageError(
            Given("length", length), f"must be from 2 up to the {positions} positions of this model"
        )
    return length or min(LENGTH, positions)


@contextlib.contextmanager
def _suppress_messages(transformers: Any) -> Any:
    """Suppress the messages and progress bars of transformers within the block."""
    verbosity = transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _locate_base(base: Path | str) -> tuple[Path, str, dict[str, Any]]:
    """Return the local folder of a path or a Hub id, and transformers' first argument and options
    for it.

    Raises:
        InputError: The model does not exist, is remote, or is a file.
    """
    located = locate_files(base)
    local = located.files
    if isinstance(local, RemotePath):
        raise InputError(
            f"{local}: a model to run must be a complete folder on this machine; download it first"
        )
    if local == located.path:
        if not local.is_dir():
            raise InputError(
                f"{base}: is a file; to run the model, give the folder with its config.json"
            )
        return local, str(local), {"local_files_only": True}
    hub_id = hub.parse(Path(base).as_posix())
    assert hub_id is not None
    return (
        local,
        hub_id.repo,
        {"revision": hub_id.revision or "main", "subfolder": hub_id.subfolder},
    )


def _infer_kind(base: Path | str, config: Any) -> tuple[Kind, str]:
    """Return the kind of prediction by the name of the architecture, and the class of transformers
    that opens it.

    Raises:
        InputError: The architecture is of no supported kind.
    """
    name = (getattr(config, "architectures", None) or [""])[0]
    for ending, found in _KINDS.items():
        if name.endswith(ending):
            return found
    raise InputError(
        f"{base}: is a {name or 'model without architectures in its config.json'}; probe runs "
        "causal language models (…ForCausalLM), masked ones (…ForMaskedLM) and sequence "
        "classifiers (…ForSequenceClassification)"
    )


def _open_tokenizer(
    transformers: Any,
    base: Path | str,
    where: str,
    options: dict[str, Any],
    config: Any,
    requested: str,
    kind: Kind,
) -> Tokens:
    """Return the requested tokenizer: ``auto``, ``bytes`` or a folder, as in ``open_model``.

    Raises:
        UsageError: Bytes are requested for a masked model, or for a vocabulary below 256.
        InputError: transformers cannot open the tokenizer, or that of a masked model has no mask
            token.
    """
    vocabulary = getattr(config, "vocab_size", 0)
    if requested == "bytes":
        if kind == "masked" or vocabulary < 256:
            problem = (
                f"has 256 ids and no mask token, but this is a {kind} model with a "
                f"vocabulary of {vocabulary}"
            )
            raise UsageError(Given("tokenizer", "bytes"), problem, "give a tokenizer folder")
        return _make_byte_tokens("--tokenizer bytes")
    if requested != "auto":
        where, options = requested, {"local_files_only": True}
    path = _find_vocabulary(where)
    source = path or (base if requested == "auto" else requested)
    fix = (
        "give another folder with $tokenizer DIR, or UTF-8 bytes as token ids with $tokenizer "
        "bytes (not for masked models)"
    )
    try:
        with (
            _report_failure(source, "transformers cannot open a tokenizer", fix),
            _discard_standard_error(),
        ):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                where, trust_remote_code=False, **options
            )
            # For some families transformers creates one without a vocabulary if there are no files.
            if len(set(tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"])) < 2:
                raise ValueError("it has no vocabulary")
            with_special = list(tokenizer("a")["input_ids"])
    except InputError:
        if requested == "auto" and path is None and vocabulary == 256 and kind != "masked":
            return _make_byte_tokens("no tokenizer in BASE and a vocabulary of 256")
        raise

    def ids(text: str) -> list[int]:
        with _report_failure(source, "the tokenizer fails on a text", fix):
            return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    # The special tokens around a text are determined by experiment, because every family has its
    # own rule.
    inside = ids("a")
    begin = next(
        (i for i in range(len(with_special)) if with_special[i : i + len(inside)] == inside), 0
    )
    last = () if kind == "causal" else tuple(with_special[begin + len(inside) :])
    mask = tokenizer.mask_token_id
    if kind == "masked" and mask is None:
        problem = "the tokenizer has no mask token, which a masked language model needs"
        raise damaged(where, problem, "give another with $tokenizer")
    return Tokens(
        ids,
        tuple(with_special[:begin]),
        last,
        tokenizer.pad_token_id or 0,
        f"tokenizer of {where}",
        mask,
    )


def _find_vocabulary(folder: str) -> Path | None:
    """Return the file of a folder that holds a tokenizer's vocabulary; None without one, or for a
    name on the Hub.
    """
    return next((path for name in _VOCABULARIES if (path := Path(folder) / name).is_file()), None)


@contextlib.contextmanager
def _discard_standard_error() -> Iterator[None]:
    """Discard what a library writes to standard error by itself: a panic of Rust, up to 20 kB."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _make_byte_tokens(reason: str) -> Tokens:
    """Return the tokenizer whose token ids are UTF-8 bytes, described with the reason for its
    choice.
    """
    return Tokens(
        lambda text: list(text.encode()), (), (), 0, f"UTF-8 bytes are the token ids ({reason})"
    )


def _first_line_of_error(error: BaseException) -> str:
    """Return the first line of transformers' message; the other lines are about other models.

    A built-in exception, such as a KeyError with the message ``'x'``, is ambiguous without its
    type. If the line is the heading of a list of ways to get a tokenizer, there are no tokenizer
    files.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(": ")
    if isinstance(error, ArithmeticError | AttributeError | LookupError | TypeError):
        return f"{type(error).__name__}: {line}"
    return "it has no tokenizer files" if line.endswith("one of") else line


class Weights:
    """The weights of a model by the names in its checkpoint.

    Args:
        module: The model.

    The prefix of the inner model (``transformer.``) may be absent in the checkpoint or in the
    model; one expert of a stack is ``name[3]``.
    """

    def __init__(self, module: nn.Module) -> None:
        self._named = dict(module.named_parameters(remove_duplicate=False))
        self._prefix = f"{getattr(module, 'base_model_prefix', '')}."

    def name(self, stored: str) -> str | None:
        """Return the name in the model of a tensor in the checkpoint; None if the model has no such
        weight.
        """
        candidates = (stored, f"{self._prefix}{stored}", stored.removeprefix(self._prefix))
        return next((candidate for candidate in candidates if candidate in self._named), None)

    def base_names(self, stored: Iterable[str]) -> dict[str, str]:
        """Return the names of the checkpoint's tensors that the model has, by the names in the
        model.
        """
        return {
            name: stored_name
            for stored_name in stored
            if (name := self.name(stored_name)) is not None
        }

    def locate(self, layer: str) -> tuple[nn.Parameter, int | None] | None:
        """Return the parameter of a layer, and its index in a stack of experts, if it is one; None
        if not found.
        """
        stored, _, index = layer.partition("[")
        name = self.name(stored)
        return (
            None if name is None else (self._named[name], int(index.rstrip("]")) if index else None)
        )

    def find(self, layer: str) -> Tensor | None:
        """Return the tensor of a layer, of an expert its part of the stack; None if the model has
        none.
        """
        if (located := self.locate(layer)) is None:
            return None
        parameter, index = located
        return parameter.data if index is None else parameter.data[index]

    def place(self, layers: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        """Return the tensors of those layers that the model has, viewed in the shapes of BASE.

        Args:
            layers: Shapes ``(out, in)`` by the names in BASE.

        Raises:
            InputError: A layer has another number of entries in the model, or two layers share one
                weight.
        """
        tensors: dict[str, Tensor] = {}
        owners: dict[int, str] = {}
        for layer, shape in layers.items():
            if (tensor := self.find(layer)) is None:
                continue
            if tensor.numel() != shape[0] * shape[1]:
                problem = (
                    f"shape {list(shape)} in BASE, {list(tensor.shape)} in transformers' model"
                )
                raise damaged(layer, problem, "check that config.json belongs to these weights")
            if (owner := owners.setdefault(tensor.data_ptr(), layer)) != layer:
                problem = f"shares one weight with {owner} in the model, but both are stored"
                raise damaged(layer, problem, "exclude one with $exclude")
            tensors[layer] = tensor.view(shape)
        return tensors


def pad_sequences(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """Return sequences as one tensor ``(n, longest)``, padded at the end."""
    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *([value] * (longest - len(ids)))] for ids in sequences])
