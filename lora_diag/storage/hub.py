"""The Hugging Face Hub: ids ``org/name[/subfolder][@revision]``, and addresses
``hf://org/name[@revision][/path]``.

Of an id, the local cache is searched first, and a model that is complete in it is read without a
request. Otherwise the configuration and one set of weights are downloaded. ``huggingface_hub`` does
the work: its settings determine cache, token, endpoint and offline mode (``HF_HOME``, ``HF_TOKEN``,
``HF_ENDPOINT``, ``HF_HUB_OFFLINE``), and it shows progress on standard error.

An address names the same models, but they are read by ranges. The revision is resolved once and all
files are read at its commit, whose content never changes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from lora_diag.errors import InputError, damaged, install_command, require
from lora_diag.storage.addresses import hide_secrets
from lora_diag.storage.documents import MAX_INDEX_BYTES, QUANTIZE_CONFIG, read_object
from lora_diag.storage.stores import FileInfo, HttpStore, Store, get_first_line

PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
# The Hub's own limit.
MAX_REPO_CHARACTERS = 96
# Names with these extensions are files.
FILE = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|json|jsonl)")
HUB_ID = re.compile(rf"({PART}/{PART})((?:/{PART})*)(?:@({PART}(?:/{PART})*))?", re.ASCII)

ADDRESS = re.compile(
    rf"({PART}/{PART})(?:@(refs/(?:pr|convert)/\w+|[^/@]+))?((?:/[^/]+)*)", re.ASCII
)

# The weights of an adapter, in the order in which PEFT looks for them.
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")

# Without one of these, quantization and scaling are unknown, and the cache counts as incomplete.
CONFIGS = ("config.json", "adapter_config.json")

# Maps a file name in the repository to its local path, or None.
Get = Callable[[str], Path | None]


@dataclass(frozen=True, slots=True)
class HubId:
    """A model repository, or a folder in one, at a revision; the subfolder may be empty, None is
    the main revision.
    """

    repo: str
    subfolder: str
    revision: str | None

    def __str__(self) -> str:
        return "/".join(filter(None, (self.repo, self.subfolder))) + (
            f"@{self.revision}" if self.revision else ""
        )


def parse(text: str) -> HubId | None:
    """Parse a Hub id; return None if the text cannot be one.

    >>> parse("org/name/merged@v1.0")
    HubId(repo='org/name', subfolder='merged', revision='v1.0')
    >>> parse("./runs/last") or parse("model.safetensors") or parse("../a/b")
    """
    match = HUB_ID.fullmatch(text)
    if not match or ".." in text or "--" in match[1] or len(match[1]) > MAX_REPO_CHARACTERS:
        return None
    return (
        None
        if FILE.fullmatch(Path(text).suffix)
        else HubId(match[1], match[2].strip("/"), match[3])
    )


def loadable(address: str) -> str:
    """Return the name of a model's repository, ``org/name``, for an ``hf://`` address; any other
    text unchanged.

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
        InputError: ``huggingface_hub`` is not installed, the model does not exist, cannot be
            reached or is not complete in the cache while offline, its index cannot be read, or it
            has no complete set of weights with these names.
    """
    try:
        from huggingface_hub import constants
    except ImportError:
        problem = "no such file or folder"
        raise damaged(
            hub_id, problem, f"to read it as a Hugging Face Hub id: {install_command('hub')}"
        ) from None
    folder = _find_complete_folder(_make_cache_finder(hub_id), weights)
    if folder and (constants.HF_HUB_OFFLINE or any((folder / name).is_file() for name in CONFIGS)):
        return folder
    if constants.HF_HUB_OFFLINE:
        problem = (
            "no such file or folder, and incomplete in the Hugging Face cache "
            f"{constants.HF_HUB_CACHE}"
        )
        raise damaged(hub_id, problem, "unset HF_HUB_OFFLINE to download it from the Hub")
    if folder := _find_complete_folder(_make_hub_finder(hub_id), weights):
        return folder
    problem = "the Hub repository has no complete set of weights"
    raise damaged(hub_id, problem, f"looked for {', '.join((*weights, *ADAPTER))}")


def _find_complete_folder(get: Get, weights: Sequence[str]) -> Path | None:
    """Return the folder that holds all files of a model or adapter; None if a file is unavailable.

    A repository with both an ``adapter_config.json`` and model weights counts as a model, as in
    ``open_checkpoint``.
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
        path = try_to_load_from_cache(
            hub_id.repo, _join_inside(hub_id, name), revision=hub_id.revision
        )
        return Path(path) if isinstance(path, str) else None

    return get


def _make_hub_finder(hub_id: HubId) -> Get:
    """List the files of a repository; return a function that downloads one of them; None for other
    names.
    """
    from huggingface_hub import HfApi, hf_hub_download

    try:
        info = HfApi().model_info(hub_id.repo, revision=hub_id.revision)
    except Exception as error:  # many types, from two HTTP libraries
        raise make_hub_error(hub_id, error) from error
    files = {sibling.rfilename for sibling in info.siblings or ()}

    def get(name: str) -> Path | None:
        if _join_inside(hub_id, name) not in files:
            return None
        try:
            # At the listed commit, so that all files belong together.
            return Path(
                hf_hub_download(
                    hub_id.repo, _join_inside(hub_id, name), revision=info.sha or hub_id.revision
                )
            )
        except Exception as error:
            raise make_hub_error(hub_id, error) from error

    return get


def _join_inside(hub_id: HubId, name: str) -> str:
    return f"{hub_id.subfolder}/{name}" if hub_id.subfolder else name


def make_hub_error(hub_id: HubId, error: Exception, address: str = "") -> InputError:
    """Return the error for a failed request to the Hub; ``address`` is its ``hf://`` address, empty
    for a bare id.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match error:
        case GatedRepoError():
            reason = (
                "the repository is gated: accept its terms on the Hub and log in (hf auth login)"
            )
        case RepositoryNotFoundError():
            reason = (
                "the Hub has no such model, or it is private and you are not logged in (hf "
                "auth login)"
            )
        case RevisionNotFoundError():
            reason = f"the model has no revision {hub_id.revision}; check the spelling"
        case _:
            cached = "" if address else "it is not in the Hugging Face cache, and "
            reason = (
                f"{cached}the Hub cannot be reached ({get_first_line(error)}); check the "
                "path, or the network"
            )
    message = (
        f"{address}: {reason}"
        if address
        else f"{hub_id}: no such file or folder, and as a Hub id: {reason}"
    )
    return InputError(message)


class HubStore(HttpStore):
    """The files of a model repository at one commit.

    The Hub stores weights on other hosts and redirects there, without the token.

    Args:
        root: Address of the repository.
        endpoint: URL prefix of the requests for its files.
        files: Paths of the files in the repository.
        commit: The commit.
        headers: Headers with the user's token, if there is one.
    """

    redirects = 5

    def __init__(
        self, root: str, endpoint: str, files: Iterable[str], commit: str, headers: dict[str, str]
    ) -> None:
        super().__init__(root)
        self._root = root
        self._endpoint = endpoint
        self._commit = commit
        self._headers = headers
        self._files = frozenset(f"{root}/{file}" for file in files)
        self.note = f"read from the Hub at commit {commit}"

    def url(self, address: str) -> str:
        """Return the URL of a file at the commit."""
        return f"{self._endpoint}/{quote(address.removeprefix(f'{self._root}/'))}"

    def headers(self) -> dict[str, str]:
        """Return the headers with the user's token, if there is one."""
        return self._headers

    async def check_redirect(self, address: str, url: Any) -> None:
        """Refuse redirects that are unencrypted or lead to a private network, where the Hub must
        not choose the target.

        A Hub on a private network may redirect anywhere.

        Raises:
            InputError: The redirect is refused.
        """
        if not await _is_public(urlsplit(self._endpoint).hostname or ""):
            return
        if url.scheme != "https" or not await _is_public(url.host or ""):
            target = hide_secrets(str(url))
            problem = f"the Hub redirects to {target}, which is no public https:// address"
            raise damaged(address, problem, "check HF_ENDPOINT")

    def version(self, headers: Any) -> str:
        """Return the commit: its files never change, whichever host sends them."""
        return self._commit

    join = Store.join  # ``url`` quotes the names

    def is_file(self, address: str) -> bool:
        """Return whether the commit has this file."""
        return address in self._files

    def is_folder(self, address: str) -> bool:
        """Return whether the commit has files under an address."""
        return any(file.startswith(f"{address}/") for file in self._files)

    def children(self, address: str) -> Iterable[str]:
        """Return the addresses of a folder's content."""
        relative_paths = (
            file.removeprefix(f"{address}/")
            for file in self._files
            if file.startswith(f"{address}/")
        )
        return sorted({f"{address}/{relative.partition('/')[0]}" for relative in relative_paths})

    def _find(self, address: str) -> FileInfo | None:
        return super()._find(address) if address in self._files else None

    def _suggest_access(self) -> str:
        return (
            "the repository is gated or private: accept its terms on the Hub and log in (hf "
            "auth login)"
        )


async def _is_public(host: str) -> bool:
    """Return whether all addresses of a host are public; also if it has none, since a proxy may
    know it.
    """
    try:
        entries = await asyncio.get_running_loop().getaddrinfo(host, None)
    except OSError:
        return True
    return all(ip_address(str(entry[4][0]).partition("%")[0]).is_global for entry in entries)


def open_hub(location: str, root: str) -> HubStore:
    """Return the store of a repository, after resolving its commit and listing its files.

    Args:
        location: The part after ``hf://``.
        root: The whole printable address.

    Raises:
        InputError: The address is invalid, ``huggingface_hub`` is not installed or offline, or the
            repository does not exist, denies access or cannot be reached.
    """
    match = ADDRESS.fullmatch(location)
    if match is None or ".." in location:
        raise InputError(
            f"{root}: invalid address; give hf://org/name[@revision], or a folder or file in it"
        )
    with require(f"{root}: hf://", "hub,remote", kind=InputError):
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"{root}: HF_HUB_OFFLINE is set; unset it, or give {match[1]} to read the local cache"
        )
    try:
        info = HfApi().model_info(match[1], revision=match[2])
    except Exception as error:  # many types, from two HTTP libraries
        raise make_hub_error(HubId(match[1], "", match[2]), error, root) from error
    commit = info.sha or match[2] or "main"
    repository = f"hf://{match[1]}" + (f"@{match[2]}" if match[2] else "")
    endpoint = f"{constants.ENDPOINT}/{match[1]}/resolve/{quote(commit, safe='')}"
    return HubStore(
        repository,
        endpoint,
        (sibling.rfilename for sibling in info.siblings or ()),
        commit,
        build_hf_headers(),
    )
