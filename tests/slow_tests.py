"""Which tests are slow: ``make check`` leaves them out, and does not even import their modules.

A plugin that ``conftest.py`` registers, as the hooks of a ``conftest.py`` see no module outside its
folder.
"""

import gc
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from tests.served import ROOT

# Folders whose tests run models, browsers, or commands many times over.
FOLDERS = {"browser", "models", "probes", "robustness"}
# A module is slow if it declares so, or if it imports packages that take seconds to import.
HEAVY = re.compile(
    r"^ *pytestmark = .*\bslow\b|(?:^ *(?:import|from) |importorskip\(\")(?:datasets|moto|peft|ray|transformers)\b",
    re.M,
)
# Seconds of the processor that a test may take which is not marked ``slow``.
QUICK = 1.0


def is_slow(path: Path) -> bool:
    """Return whether all tests of a module are slow."""
    if (
        path == ROOT / "lora_diag" / "__init__.py"
    ):  # pytest looks at every public function, which imports all
        return True
    return (
        bool(FOLDERS & set(path.parts))
        or HEAVY.search(path.read_text(encoding="utf-8")) is not None
    )


def pytest_ignore_collect(collection_path, config):
    """Do not import modules without tests, nor those of slow tests where these are left out."""
    if collection_path.suffix != ".py" or not collection_path.is_relative_to(ROOT):
        return None
    if not collection_path.name.startswith("test_") and ">>> " not in collection_path.read_text(
        encoding="utf-8"
    ):
        return True
    return (config.option.markexpr == "not slow" and is_slow(collection_path)) or None


def pytest_configure(config):
    """Let pytest-xdist hand out modules in the order of ``pytest_collection_modifyitems``."""
    config.option.loadscopereorder = False


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """Collect no garbage while modules are imported, and never look through what they
    hold again.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the tests of slow modules ``slow``, and begin with them.

    The last modules should be short, so that no worker waits for another; by default those with the
    fewest tests are last, among them the longest of all.
    """
    slow = {path: is_slow(path) for path in {item.path for item in items}}
    for item in items:
        if slow[item.path]:
            item.add_marker("slow")
    some = {item.path for item in items if item.get_closest_marker("slow")}
    tests = Counter(item.path for item in items)
    items.sort(
        key=lambda item: (not slow[item.path], item.path not in some, -tests[item.path], item.path)
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Note what a test takes of the processor, if that is more than a test may take which is not
    slow.
    """
    before = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        taken = sum(os.times()[:4]) - before
        if taken > QUICK and not item.get_closest_marker("slow"):
            item.user_properties.append(("slow", taken))


def pytest_terminal_summary(terminalreporter):
    """Name the tests that should be marked ``slow``."""
    for report in terminalreporter.getreports("passed"):
        for name, taken in report.user_properties:
            if name == "slow":
                terminalreporter.line(
                    f"not marked slow, and takes {taken:.1f} s of the processor: {report.nodeid}"
                )
