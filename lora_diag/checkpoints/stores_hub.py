"""``hf://org/name[@revision][/folder or file]``: the Hugging Face Hub, by ranges, keeping nothing.

A bare ``org/name`` is another way to the same model: it is downloaded whole into the cache (``hub``). Here a revision
is looked up once and everything is read at its commit, whose files never change.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from lora_diag.checkpoints.hub import PART, HubId, unreachable
from lora_diag.checkpoints.ranges import retried
from lora_diag.checkpoints.stores import Facts, Store
from lora_diag.checkpoints.stores_web import HttpStore
from lora_diag.errors import InputError

ADDRESS = re.compile(rf"({PART}/{PART})(?:@(refs/(?:pr|convert)/\w+|[^/@]+))?((?:/[^/]+)*)", re.ASCII)


class HubStore(HttpStore):
    """The files of a repository of models at one commit.

    The Hub keeps weights on other hosts and redirects there; the token is not sent along (aiohttp sees to that).

    Args:
        root: Address of the repository.
        place: Where its files are requested.
        files: Their paths inside it.
        commit: Of which.
        headers: The user's token, if there is one.
    """

    redirects = 5

    def __init__(self, root: str, place: str, files: Iterable[str], commit: str, headers: dict[str, str]) -> None:
        super().__init__(root)
        self._root, self._place, self._commit, self._headers = root, place, commit, headers
        self._files = frozenset(f"{root}/{file}" for file in files)
        self.note = f"read from the Hub at commit {commit}"

    def url(self, address: str) -> str:
        """Return where a file of the commit is requested."""
        return f"{self._place}/{quote(address.removeprefix(f'{self._root}/'))}"

    def headers(self) -> dict[str, str]:
        """Return the token."""
        return self._headers

    def version(self, headers: Any) -> str:
        """Return the commit: its files never change, whatever host they come from."""
        return self._commit

    join = Store.join  # names are quoted where a file is requested

    def is_file(self, address: str) -> bool:
        """Say whether the commit has such a file."""
        return address in self._files

    def is_folder(self, address: str) -> bool:
        """Say whether the commit has files under an address."""
        return any(file.startswith(f"{address}/") for file in self._files)

    def children(self, address: str) -> Iterable[str]:
        """Return the addresses of what is in a folder."""
        rests = (file.removeprefix(f"{address}/") for file in self._files if file.startswith(f"{address}/"))
        return sorted({f"{address}/{rest.partition('/')[0]}" for rest in rests})

    def _find(self, address: str) -> Facts | None:
        return retried(address, lambda: self._run(self._ask, address)) if address in self._files else None

    def _way_in(self) -> str:
        return "the repository is gated or private: accept its terms on the Hub and log in (hf auth login)"


def open_hub(rest: str, root: str) -> HubStore:
    """Look a repository up.

    Args:
        rest: What is behind ``hf://``.
        root: The whole address, as it may be shown.

    Raises:
        InputError: It is no address of the Hub, ``huggingface_hub`` is not installed, or there is no such repository.
    """
    found = ADDRESS.fullmatch(rest)
    if found is None or ".." in rest:
        raise InputError(f"{root}: is not hf://org/name, hf://org/name@revision or a folder or file in one")
    try:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
    except ImportError as error:
        raise InputError(f"{root}: hf:// needs huggingface_hub: pip install 'loradiag[hub,remote]'") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError(f"{root}: HF_HUB_OFFLINE is set, and a bare {found[1]} is read from the cache")
    try:
        info = HfApi().model_info(found[1], revision=found[2])
    except Exception as error:  # a dozen kinds, of two HTTP libraries
        raise unreachable(HubId(found[1], "", found[2]), error, root) from error
    commit = info.sha or found[2] or "main"
    repository = f"hf://{found[1]}" + (f"@{found[2]}" if found[2] else "")
    place = f"{constants.ENDPOINT}/{found[1]}/resolve/{quote(commit, safe='')}"
    return HubStore(
        repository, place, (sibling.rfilename for sibling in info.siblings or ()), commit, build_hf_headers()
    )
