"""Hugging Face Hub ids: ``org/name``, ``org/name/subfolder``, either with ``@revision``.

The local cache is searched first, and a model that is complete in it is read without a request. Otherwise the
configuration, the index and the shards of one set of weights are downloaded. ``huggingface_hub`` does
the work: its settings determine cache, token, endpoint and offline mode (``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT``,
``HF_HUB_OFFLINE``), and it shows progress on standard error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_diag.checkpoints.documents import MAX_INDEX_BYTES, QUANTIZE_CONFIG, read_object
from lora_diag.errors import InputError, install_command

PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
# The Hub's own limit.
MAX_REPO_CHARACTERS = 96
# Names with these extensions are files.
FILE = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|json|jsonl)")
HUB_ID = re.compile(rf"({PART}/{PART})((?:/{PART})*)(?:@({PART}(?:/{PART})*))?", re.ASCII)

# The weights of an adapter, in the order in which PEFT looks for them.
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")

# Without one of these, quantization and scaling are unknown, and the cache counts as incomplete.
CONFIGS = ("config.json", "adapter_config.json")

# Maps a file name in the repository to its local path, or None.
Get = Callable[[str], Path | None]


@dataclass(frozen=True, slots=True)
class HubId:
    """A model repository, or a folder in one, at a revision."""

    repo: str
    subfolder: str
    revision: str | None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.repo, self.subfolder))) + (f"@{self.revision}" if self.revision else "")


def parse(text: str) -> HubId | None:
    """Parse a Hub id; return None if the text cannot be one.

    >>> parse("org/name/merged@v1.0")
    HubId(repo='org/name', subfolder='merged', revision='v1.0')
    >>> parse("./runs/last") or parse("model.safetensors") or parse("../a/b")
    """
    match = HUB_ID.fullmatch(text)
    if not match or ".." in text or "--" in match[1] or len(match[1]) > MAX_REPO_CHARACTERS:
        return None
    return None if FILE.fullmatch(Path(text).suffix) else HubId(match[1], match[2].strip("/"), match[3])


def loadable(address: str) -> str:
    """Return the name by which transformers and PEFT find a model: ``org/name`` of an ``hf://`` one, else unchanged.

    >>> loadable("hf://org/name@main/merged"), loadable("runs/base")
    ('org/name', 'runs/base')
    """
    match = re.match(rf"hf://({PART}/{PART})", address)
    return match[1] if match else address


def fetch(hub_id: HubId, weights: Sequence[str]) -> Path:
    """Return the local folder of a model or adapter, after downloading missing files.

    Args:
        hub_id: The repository.
        weights: Names of the files that can hold the weights of a model, in order of preference.

    Returns:
        A folder in the cache of ``huggingface_hub``.

    Raises:
        InputError: ``huggingface_hub`` is not installed, the model does not exist, cannot be reached or is not complete
            in the cache while offline, or it has no complete set of weights with these names.
    """
    try:
        from huggingface_hub import constants
    except ImportError as error:
        raise InputError(
            f"{hub_id}: no such file or folder; to read it as a Hugging Face Hub id: {install_command('hub')}"
        ) from error
    folder = _find_complete_folder(_make_cache_finder(hub_id), weights)
    if folder and (constants.HF_HUB_OFFLINE or any((folder / name).is_file() for name in CONFIGS)):
        return folder
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"{hub_id}: no such file or folder, and incomplete in the Hugging Face cache {constants.HF_HUB_CACHE}; "
            "unset HF_HUB_OFFLINE to download it from the Hub"
        )
    if folder := _find_complete_folder(_make_hub_finder(hub_id), weights):
        return folder
    raise InputError(
        f"{hub_id}: the Hub repository has no complete set of weights; looked for {', '.join((*weights, *ADAPTER))}"
    )


def _find_complete_folder(get: Get, weights: Sequence[str]) -> Path | None:
    """Return the folder that holds all files of a model or adapter; None if a file is unavailable.

    A repository with both an ``adapter_config.json`` and model weights counts as a model, as a local folder does.
    """
    for name in weights:
        if path := get(name):
            get("config.json"), get(QUANTIZE_CONFIG)
            shards = list(_list_shards(path)) if name.endswith(".index.json") else []
            return path.parent if all(get(shard) for shard in shards) else None
    if get("adapter_config.json"):
        return next((path.parent for name in ADAPTER if (path := get(name))), None)
    return None


def _list_shards(index: Path) -> Iterator[str]:
    """Yield the plain file names in an index; others are refused when the folder is opened."""
    weight_map = read_object(index, "shard index", MAX_INDEX_BYTES).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    yield from sorted(name for name in names if isinstance(name, str) and re.fullmatch(PART, name))


def _make_cache_finder(hub_id: HubId) -> Get:
    """Return a function that finds a file of a repository in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    def get(name: str) -> Path | None:
        path = try_to_load_from_cache(hub_id.repo, _join_inside(hub_id, name), revision=hub_id.revision)
        return Path(path) if isinstance(path, str) else None

    return get


def _make_hub_finder(hub_id: HubId) -> Get:
    """List the files of a repository; return a function that downloads one of them; None for other names."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = HfApi().model_info(hub_id.repo, revision=hub_id.revision)
    except Exception as error:  # many types, from two HTTP libraries
        raise unreachable(hub_id, error) from error
    files = {sibling.rfilename for sibling in info.siblings or ()}

    def get(name: str) -> Path | None:
        if _join_inside(hub_id, name) not in files:
            return None
        try:
            # At the listed commit, so that all files belong together.
            return Path(hf_hub_download(hub_id.repo, _join_inside(hub_id, name), revision=info.sha or hub_id.revision))
        except Exception as error:
            raise unreachable(hub_id, error) from error

    return get


def _join_inside(hub_id: HubId, name: str) -> str:
    return f"{hub_id.subfolder}/{name}" if hub_id.subfolder else name


def unreachable(hub_id: HubId, error: Exception, address: str = "") -> InputError:
    """Return the error for a failure of the Hub; ``address`` is the ``hf://`` address, empty for a bare id."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    match error:
        case GatedRepoError():
            reason = "the repository is gated: accept its terms on the Hub and log in (hf auth login)"
        case RepositoryNotFoundError():
            reason = "the Hub has no such model, or it is private and you are not logged in (hf auth login)"
        case RevisionNotFoundError():
            reason = f"the model has no revision {hub_id.revision}; check the spelling"
        case _:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            cached = "" if address else "it is not in the Hugging Face cache, and "
            reason = f"{cached}the Hub cannot be reached ({why}); check the path, or the network"
    message = f"{address}: {reason}" if address else f"{hub_id}: no such file or folder, and as a Hub id: {reason}"
    return InputError(message)
