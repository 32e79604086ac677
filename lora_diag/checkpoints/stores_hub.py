"""``hf://org/name[@revision][/folder or file]``: the Hugging Face Hub, read by ranges without a local copy.

A bare ``org/name`` names the same model, but downloads it whole into the cache (``hub``). Here, the revision is
resolved once and all files are read at its commit, whose content never changes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any
from urllib.parse import quote, urlsplit

from lora_diag.checkpoints.addresses import call_with_retries, hide_secrets
from lora_diag.checkpoints.hub import PART, HubId, unreachable
from lora_diag.checkpoints.stores import FileInfo, Store
from lora_diag.checkpoints.stores_web import HttpStore
from lora_diag.errors import InputError, install_command

ADDRESS = re.compile(rf"({PART}/{PART})(?:@(refs/(?:pr|convert)/\w+|[^/@]+))?((?:/[^/]+)*)", re.ASCII)


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

    def __init__(self, root: str, endpoint: str, files: Iterable[str], commit: str, headers: dict[str, str]) -> None:
        super().__init__(root)
        self._root, self._endpoint, self._commit, self._headers = root, endpoint, commit, headers
        self._files = frozenset(f"{root}/{file}" for file in files)
        self.note = f"read from the Hub at commit {commit}"

    def url(self, address: str) -> str:
        """Return the URL of a file at the commit."""
        return f"{self._endpoint}/{quote(address.removeprefix(f'{self._root}/'))}"

    def headers(self) -> dict[str, str]:
        """Return the headers with the token."""
        return self._headers

    async def check_redirect(self, address: str, url: Any) -> None:
        """Refuse what is not encrypted, and the private network: the Hub must not choose what is read there.

        A Hub on the private network may redirect anywhere.
        """
        if not await _is_public(urlsplit(self._endpoint).hostname or ""):
            return
        if url.scheme != "https" or not await _is_public(url.host or ""):
            raise InputError(
                f"{address}: the Hub redirects to {hide_secrets(str(url))}, which is no public https:// address; "
                "check HF_ENDPOINT"
            )

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
        relative_paths = (file.removeprefix(f"{address}/") for file in self._files if file.startswith(f"{address}/"))
        return sorted({f"{address}/{relative.partition('/')[0]}" for relative in relative_paths})

    def _find(self, address: str) -> FileInfo | None:
        return (
            call_with_retries(address, lambda: self._run(self._request_head, address))
            if address in self._files
            else None
        )

    def _suggest_access(self) -> str:
        return "the repository is gated or private: accept its terms on the Hub and log in (hf auth login)"


async def _is_public(host: str) -> bool:
    """Return whether all addresses of a host are public; also if it has none, since a proxy may know it."""
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
        InputError: The address is invalid, ``huggingface_hub`` is not installed or offline, or the repository does not
            exist or cannot be reached.
    """
    match = ADDRESS.fullmatch(location)
    if match is None or ".." in location:
        raise InputError(f"{root}: invalid address; give hf://org/name[@revision], or a folder or file in it")
    try:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
    except ImportError as error:
        raise InputError(f"{root}: hf:// needs huggingface_hub: {install_command('hub,remote')}") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{root}: HF_HUB_OFFLINE is set; unset it, or give {match[1]} to read the local cache")
    try:
        info = HfApi().model_info(match[1], revision=match[2])
    except Exception as error:  # many types, from two HTTP libraries
        raise unreachable(HubId(match[1], "", match[2]), error, root) from error
    commit = info.sha or match[2] or "main"
    repository = f"hf://{match[1]}" + (f"@{match[2]}" if match[2] else "")
    endpoint = f"{constants.ENDPOINT}/{match[1]}/resolve/{quote(commit, safe='')}"
    return HubStore(
        repository, endpoint, (sibling.rfilename for sibling in info.siblings or ()), commit, build_hf_headers()
    )
