"""Exit with a message unless a tag is ``v`` plus the version, and the changelog has an entry with a
date for it.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def problem(tag: str, version: str, changelog: str) -> str:
    """Return what is wrong with a release; empty if nothing is.

    Args:
        tag: The tag that is pushed, such as ``v0.2.0``.
        version: ``__version__``.
        changelog: Text of the changelog in the form of Keep a Changelog.
    """
    if tag != f"v{version}":
        return f"the tag is {tag or 'missing'}, lora_diag/version.py says {version}"
    entry = re.search(
        rf"^## \[?{re.escape(version)}\]? - \d{{4}}-\d{{2}}-\d{{2}}\n(.*?)(?=^## |\Z)",
        changelog,
        re.M | re.S,
    )
    if entry is None:
        return f"CHANGELOG.md has no line '## {version} - YYYY-MM-DD'"
    return (
        "" if re.search(r"^- ", entry[1], re.M) else f"CHANGELOG.md lists nothing under {version}"
    )


if __name__ == "__main__":
    found = re.search(
        r'"(.+)"', (ROOT / "lora_diag" / "version.py").read_text("utf-8").splitlines()[-1]
    )
    assert found is not None
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    sys.exit(problem("".join(sys.argv[1:2]), found[1], changelog) or None)
