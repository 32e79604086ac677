"""``python -m tests.robustness.licences``: every package that the program needs to run, and its
licence, as a table.

From the metadata of the installed packages; ``make licences`` writes it into docs/licences.txt.
"""

import re
import sys
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Those of development, and experiment trackers, whose own packages are not listed.
UNLISTED = {"audit", "docs", "release", "test", "mlflow", "tensorboard", "trackio", "wandb"}
# Those that users install; "" is what comes without any.
EXTRAS = ("", *(extra for extra in PROJECT["optional-dependencies"] if extra not in UNLISTED))
PAGE = ROOT / "docs" / "licences.txt"
BEGIN, END = "<!-- licences -->\n", "<!-- end -->"

# What licences are called in metadata -> SPDX. Longest first where one contains another.
SPDX = {
    "apache": "Apache-2.0", "bsd 3-clause": "BSD-3-Clause", "3-clause bsd": "BSD-3-Clause",
    "bsd-3-clause": "BSD-3-Clause", "bsd-2-clause": "BSD-2-Clause", "simplified bsd": "BSD-2-Clause", "bsd": "BSD",
    "python software foundation": "PSF-2.0", "psf": "PSF-2.0", "mozilla public license 2.0": "MPL-2.0",
    "mpl-2.0": "MPL-2.0", "mit-cmu": "MIT-CMU", "mit": "MIT", "isc": "ISC", "unlicense": "Unlicense", "zlib": "Zlib",
    "0bsd": "0BSD",
}  # fmt: skip
# None of these asks anything of a program that imports the package. MPL-2.0 asks that changed files
# of the package itself stay open; it is weak copyleft, and is listed for transparency.
PERMISSIVE = {
    *(
        "Apache-2.0",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSD",
        "MIT",
        "MIT-CMU",
        "ISC",
        "PSF-2.0",
        "Unlicense",
        "Zlib",
    ),
    *(
        "0BSD",
        "HPND",
        "CC0-1.0",
        "MPL-2.0",
        "Python-2.0",
        "LLVM-exception",
        "BSL-1.0",
        "CNRI-Python",
    ),
}
# What torch's builds for CUDA bring, which are what the package index has for Linux: names and
# licence.
CUDA_ROWS = (
    ("triton, cuda-bindings, cuda-pathfinder", "MIT, Apache-2.0", "torch for CUDA"),
    ("nvidia-\\*, cuda-toolkit", "NVIDIA's own, proprietary", "torch for CUDA"),
)


def needed(
    name: str, extra: str = "", seen: dict[str, Distribution] | None = None, cuda: bool = False
) -> dict[str, Distribution]:
    """Return the installed packages that a package needs here, with those that they need.

    Args:
        name: The package.
        extra: One of its extras; empty for none.
        seen: The packages found so far, which grows.
        cuda: Include what only some platforms' torch brings.
    """
    seen = {} if seen is None else seen
    for text in own() if name == "loradiag" else distribution(name).requires or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        if name == "torch" and not cuda and "platform" in str(requirement.marker):
            continue
        key = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if key == "loradiag":
            for more in requirement.extras:
                needed(name, more, seen, cuda)
        elif key not in seen:
            try:
                seen[key] = distribution(requirement.name)
            except PackageNotFoundError:
                continue
            for more in ("", *requirement.extras):
                needed(key, more, seen, cuda)
    return seen


def own() -> list[str]:
    """Return what pyproject.toml asks for, in the words of a package's metadata; an installed copy
    may be older.
    """
    extras = {extra: PROJECT["optional-dependencies"][extra] for extra in EXTRAS if extra}
    return PROJECT["dependencies"] + [
        f'{text}; extra == "{extra}"' for extra in extras for text in extras[extra]
    ]


def licence(package: Distribution) -> str:
    """Return a package's licence: its SPDX expression, or what its other metadata call it."""
    if expression := package.metadata.get("License-Expression"):
        return str(expression)
    classifiers = package.metadata.get_all("Classifier") or []
    classified = [text.rpartition(" :: ")[2] for text in classifiers if text.startswith("License")]
    words = [*classified, *(package.metadata.get("License") or "").splitlines()[:1]]
    found = (spdx for text in words for called, spdx in SPDX.items() if called in text.lower())
    return next(found, "; ".join(words) or "unknown")


def forbidden(expression: str) -> set[str]:
    """Return the parts of an expression that are not known to be permissive; of alternatives, one
    is enough.

    >>> forbidden("MIT OR GPL-3.0-only"), forbidden("Apache-2.0 AND (GPL-3.0-only)")
    (set(), {'GPL-3.0-only'})
    """
    choices = (re.split(r" AND | WITH ", choice) for choice in expression.split(" OR "))
    return min(({part.strip(" ()") for part in parts} - PERMISSIVE for parts in choices), key=len)


def rows() -> list[tuple[str, str, str]]:
    """Return name, licence and the extras that bring a package on every platform, those of no extra
    first.
    """
    by_extra = {extra: needed("loradiag", extra) for extra in EXTRAS}
    result = {name: package for packages in by_extra.values() for name, package in packages.items()}
    table = []
    for name, package in sorted(result.items()):
        always = name in by_extra[""]
        extras = (
            []
            if always
            else [f"`{extra}`" for extra in EXTRAS if extra and name in by_extra[extra]]
        )
        table.append((name, licence(package), "always" if always else " ".join(extras)))
    return sorted(table, key=lambda row: (row[2] != "always", row[0]))


def cuda_licences() -> dict[str, str]:
    """Return the licences of the packages that only this platform's torch brings; none with a build
    for CPUs.
    """
    everywhere = needed("loradiag")
    here = needed("loradiag", cuda=True)
    return {name: licence(package) for name, package in here.items() if name not in everywhere}


def main() -> None:
    """Print the table, or put it into the page if ``--write`` is given."""
    lines = ["| package | licence | needed |", "|---|---|---|"]
    text = "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in (*rows(), *CUDA_ROWS))]) + "\n"
    if "--write" in sys.argv:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}{text}{END}{rest.partition(END)[2]}")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
