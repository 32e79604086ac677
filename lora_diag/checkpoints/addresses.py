"""The grammar of addresses, and their printable part: no password and no query. Independent of any protocol."""

from __future__ import annotations

import re
from pathlib import Path

# Also matches a single slash: ``Path`` collapses the two.
ADDRESS = re.compile(r"\s*(s3|gs|hf|https?):/{1,2}([^/].*)", re.IGNORECASE | re.DOTALL)
SCHEME = re.compile(r"\s*([A-Za-z][\w+.-]*)://(.*)", re.ASCII | re.DOTALL)
ANY = re.compile(
    r"(?:([A-Za-z][\w+.-]*)://|(?<![\w+.-])(s3|gs|hf|https?):/(?!/))([^\s'\"<>]+)", re.ASCII | re.IGNORECASE
)
WEB = ("http", "https")

# A host without user, as in ``host``, ``host:8000`` or ``[::1]:8000``.
HOST = re.compile(r"(\[[0-9A-Fa-f:.%]*\]|[^:\[\]]*)(:\d*)?", re.ASCII)

# Shown for an address whose host cannot be told from a password with unescaped signs; such an address is refused.
HIDDEN = "(hidden)"


class Address(str):
    """An address whose text has no secrets, so that no text made from it has them; ``as_path`` reads ``full``.

    >>> address = Address("https://user:secret@host/model.safetensors")
    >>> f"{address}", address.full
    ('https://host/model.safetensors', 'https://user:secret@host/model.safetensors')
    """

    full: str

    def __new__(cls, full: str) -> Address:
        """Return the printable text of an address, which keeps the whole one."""
        address = super().__new__(cls, hide_secrets(full))
        address.full = full
        return address

    def __getnewargs__(self) -> tuple[str]:
        return (self.full,)


def hide_secrets(address: Path | str) -> str:
    """Return an address, or a text that contains addresses, without passwords and queries.

    >>> hide_secrets("https://user:secret@host/model.safetensors?X-Amz-Signature=0123")
    'https://host/model.safetensors'
    >>> hide_secrets("cannot reach https://host/x?sig=1: timeout")
    'cannot reach https://host/x timeout'
    >>> hide_secrets("http://user:with/slash@host/x")
    'http://(hidden)'
    """
    text = str(address)
    if match := ADDRESS.fullmatch(text) or SCHEME.fullmatch(text):
        return _drop_secrets(match[1].lower(), match[2].rstrip())
    if ":/" not in text:
        return text
    return ANY.sub(lambda match: _drop_secrets(match[1] or match[2], match[3]), text)


def _drop_secrets(scheme: str, remainder: str) -> str:
    """Return an address without its secrets, given the text after ``://``."""
    authority = re.split(r"[/?#]", remainder, maxsplit=1)[0]
    path_and_query = remainder[len(authority) :]
    path = re.split(r"[?#]" if scheme.lower() in WEB else r"\?", path_and_query, maxsplit=1)[0]
    _, sign, host = authority.rpartition("@")
    # A second @ may belong to a password, unless it is behind the ? of an address with a user.
    is_ambiguous = "@" in (path if sign else path_and_query) and ":" in authority
    if is_ambiguous or HOST.fullmatch(host.rstrip(".,:;)")) is None:
        return f"{scheme}://{HIDDEN}"
    return f"{scheme}://{host}{path}"
