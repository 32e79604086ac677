"""The grammar of addresses, and their printable part: no password and no query. Independent of any protocol."""

from __future__ import annotations

import re
from pathlib import Path

# Also matches a single slash: ``Path`` collapses the two.
ADDRESS = re.compile(r"(s3|gs|hf|https?):/{1,2}([^/].*)", re.IGNORECASE | re.DOTALL)
SCHEME = re.compile(r"[A-Za-z][\w+.-]*://", re.ASCII)
ANY = re.compile(r"[A-Za-z][\w+.-]*://[^\s'\"<>]+", re.ASCII)
WEB = ("http", "https")


def hide_secrets(address: Path | str) -> str:
    """Return an address, or a text that contains addresses, without passwords and queries.

    >>> hide_secrets("https://user:secret@host/model.safetensors?X-Amz-Signature=0123")
    'https://host/model.safetensors'
    >>> hide_secrets("cannot reach https://host/x?sig=1: timeout")
    'cannot reach https://host/x timeout'
    """
    text = str(address)
    if match := ADDRESS.fullmatch(text):
        return _without_secrets(match[1].lower(), match[2])
    if "://" not in text:
        return text
    return ANY.sub(lambda part: _without_secrets(*part[0].split("://", 1)), text)


def _without_secrets(scheme: str, remainder: str) -> str:
    location = re.split(r"[?#]" if scheme in WEB else r"\?", remainder, maxsplit=1)[0]
    authority, slash, key = location.partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{key}"
