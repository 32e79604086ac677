"""The import rules of docs/explanation/architecture.md, enforced; and what starting up may cost."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lora_diag
from lora_diag import catalog
from tests.served import ROOT

PACKAGE = ROOT / "lora_diag"

# Ground package -> the ground packages it may import. Those in ``OPEN`` are open to all.
GROUND = {
    "errors": set(),
    "files": set(),
    "scratch": set(),
    "version": set(),
    "calls": {"running"},
    "feature": set(),
    "storage": set(),
    "records": {"feature"},
    "linalg": set(),
    "metrics": set(),
    "thin": set(),
    "deltas": {"storage", "records"},
    "adapters": {"storage", "deltas", "records"},
    "gradients": {"adapters", "storage", "deltas"},
    "layers": {"deltas", "linalg", "metrics", "records"},
    "models": {"adapters", "storage", "deltas", "layers", "linalg", "metrics", "records"},
    "rendering": {"metrics", "records"},
    "running": {
        "adapters",
        "storage",
        "deltas",
        "gradients",
        "layers",
        "linalg",
        "models",
        "records",
        "rendering",
    },
}
OPEN = {"errors", "files", "scratch", "version"}

# Ground package -> the commands that its messages advise. A written list: it should shrink.
ADVISED = {"adapters": {"fleet", "spectrum"}, "running": {"probe activations"}}
# Their names that are also parts of tensor names, or kinds of a subject.
NOT_FEATURES = {"residual", "gate"}

# Folders of features; each folder in them is one.
FEATURES = {"diagnostics", "probes", "decisions"}
# Features that use any others: to judge, show or explain their records, to train with them, or to
# describe the machine.
READERS = {
    "gating",
    "reports",
    "plots",
    "inspection",
    "environment",
    "explanations",
    "tuning",
    "linting",
    "project",
}

# Feature -> the other features that it may import. A written list: it should shrink. No two folders
# import each other.
BETWEEN = {
    "decisions.allocate": {"diagnostics.spectrum", "probes.sweep"},
    "decisions.extract": {
        "decisions.allocate",
        "diagnostics.spectrum",
        "probes.gain",
        "probes.sweep",
    },
    "decisions.merge": {"decisions.extract"},
    "decisions.recover": {"decisions.allocate", "decisions.extract"},
    "diagnostics.fleet": set(),
    "diagnostics.geometry": {"diagnostics.intruders"},
    "diagnostics.interference": {"diagnostics.spectrum"},
}

# Library -> the packages that may import it, or the names of files in features.
LIBRARIES = {
    "click": set(),
    "typer": {"cli"},
    "rich": {"cli", "rendering", "inspection", "plots", "show.py"},
    "matplotlib": {"rendering", "plots", "figures.py", "trackers.py"},
    "jinja2": {"reports"},
    "plotly": {"reports"},
    "torch": {
        "storage",
        "deltas",
        "gradients",
        "adapters",
        "layers",
        "linalg",
        "models",
        "running",
        "environment",
        "thin",
        "tuning",
        "trackers.py",
        *FEATURES,
    },
    "transformers": {"models", *FEATURES},
    "peft": {"models", *FEATURES},
    "accelerate": {"models", *FEATURES},
    "datasets": {"models"},
    "ray": {"running"},
    "fsspec": {"storage"},
    "huggingface_hub": {"storage", "trackers.py"},
    "safetensors": {"adapters"},
    "pickle": {"storage", "processes.py"},
    "pydantic": {"records", "explanations", "record.py", "policy.py"},
}


def unit_of(parts: tuple[str, ...]) -> str:
    """Return the ground package or the feature that a module belongs to."""
    return (
        ".".join(parts[:2])
        if parts[0] in FEATURES and len(parts) > 1
        else parts[0].removesuffix(".py")
    )


@cache
def parsed(file: Path) -> ast.Module:
    """Return the syntax tree of a file, which several tests look at."""
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imports() -> list[tuple[str, Path, str]]:
    """Return (unit, file, imported module) for every import statement of the package."""
    result = []
    for file in sorted(PACKAGE.rglob("*.py")):
        relative = file.relative_to(PACKAGE)
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Import):
                result += [(unit_of(relative.parts), relative, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{relative}: write imports in full"
                result.append((unit_of(relative.parts), relative, node.module or ""))
    return result


def allowed(unit: str, module: str) -> bool:
    """Return whether a unit may import a module of the package."""
    other = unit_of(tuple(module.split(".")[1:]))
    if other in OPEN or unit == other or unit in {"__init__", "__main__", "cli"}:
        return True
    if unit in GROUND:
        return other in GROUND[unit]
    if unit == "catalog":
        return other in {"feature", "records"}
    if other in GROUND or other in FEATURES or (other == "cli" and unit not in GROUND):
        return True
    if other in {"feature", "catalog"}:
        return True
    if unit.startswith("decisions.") and (
        module.endswith(".record")
        or other in {"decisions.memory", "decisions.targets", "decisions.trainers"}
    ):
        return True  # a decision reads the records of any feature
    return unit in READERS or other in BETWEEN.get(unit, set())


def test_every_unit_has_its_rule():
    units = {
        path.name.removesuffix(".py")
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or path.is_dir()
    }
    known = {
        *GROUND,
        *FEATURES,
        *READERS,
        "catalog",
        "cli",
        "__init__",
        "__main__",
        "py.typed",
        "__pycache__",
    }
    assert units <= known


def test_no_package_hides_a_public_function():
    """Importing ``lora_diag.gate``, if it were a package, would replace the function
    ``lora_diag.gate``.
    """
    assert not {path.stem for path in PACKAGE.iterdir()} & {
        *catalog.functions(),
        *lora_diag._OTHER_EXPORTS,
    }


def test_every_feature_is_in_catalog():
    folders = {
        f"{kind}.{path.name}"
        for kind in FEATURES
        for path in (PACKAGE / kind).iterdir()
        if path.is_dir()
    }
    named = {feature.package.removeprefix("lora_diag.") for feature in catalog.features()}
    assert {name for name in folders if not name.endswith("__pycache__")} | READERS <= named


def test_unit_imports_only_what_its_rule_allows():
    wrong = []
    for unit, file, module in imports():
        parts = tuple(module.split("."))
        if parts[0] == "lora_diag" and len(parts) > 1 and not allowed(unit, module):
            wrong.append(f"{file} imports {module}")
    assert not wrong, "\n".join(wrong)


@cache
def modules() -> dict[str, Path]:
    """Return the file of every module of the package."""
    return {
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file
        for file in PACKAGE.rglob("*.py")
    }


def test_no_modules_import_each_other_in_circle():
    """Imports inside functions count, those for type checkers alone do not."""
    graph = {module: _imported(parsed(file)) - {module} for module, file in modules().items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_no_packages_import_each_other_in_circle():
    """So packages have an order in which no import goes upward."""
    graph: dict[str, set[str]] = {}
    for module, file in modules().items():
        package = module.split(".")[1]
        imported = {
            other.split(".")[1] for other in _imported(parsed(file)) if "lora_diag." in other
        }
        graph.setdefault(package, set()).update(imported - {package})
    TopologicalSorter(graph).prepare()


def test_ground_packages_name_no_feature():
    """No message advises a feature's command but for ``ADVISED``, and nothing is compared with its
    name.
    """
    names = {name for name, _, _ in catalog.commands()} | {*catalog.record_kinds()}
    names -= NOT_FEATURES
    command = re.compile(rf"loradiag ({'|'.join(sorted(names, key=len, reverse=True))})\b")
    advised: dict[str, set[str]] = {}
    compared = []
    for module, file in modules().items():
        package = module.split(".")[1]
        if package not in GROUND:
            continue
        for text in _texts(parsed(file)):
            if found := set(command.findall(text)):
                advised.setdefault(package, set()).update(found)
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Compare):
                values = {getattr(part, "value", None) for part in ast.walk(node)}
                compared += [(module, name) for name in names & values]
    assert advised == ADVISED
    assert not compared


def _texts(tree: ast.Module) -> Iterator[str]:
    """Yield the strings of a module that are not documentation."""
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            value = getattr(child, "value", None)
            if isinstance(value, str) and not isinstance(node, ast.Expr):
                yield value


def _imported(node: ast.AST) -> set[str]:
    """Return the modules of the package that a piece of code imports when it runs."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return set()
    if isinstance(node, ast.ImportFrom):
        names = (f"{node.module}.{alias.name}" for alias in node.names)
        return {name if name in modules() else str(node.module) for name in names}
    return set().union(*(_imported(child) for child in ast.iter_child_nodes(node)))


def test_library_is_imported_only_where_its_rule_allows():
    wrong = []
    for unit, file, module in imports():
        places = LIBRARIES.get(module.split(".")[0])
        if places is not None and not places & {
            unit.split(".")[0],
            file.name,
            _as_figure(file.name),
        }:
            wrong.append(f"{file} imports {module}")
    assert not wrong, "\n".join(wrong)


def _as_figure(name: str) -> str:
    return "figures.py" if name.startswith("figure") else name


@pytest.mark.slow
def test_every_declared_path_can_be_imported():
    for feature in catalog.features():
        paths = [
            *feature.records,
            *feature.functions,
            feature.table,
            feature.statements,
            feature.grids,
        ]
        for command in feature.commands:
            paths += [command.run, command.table, command.suggest, command.exit_code]
        for figure in feature.figures:
            paths += [figure.page]
        assert all(callable(feature.load(path)) for path in paths if path)


def test_package_lists_functions_of_catalog():
    """Type checkers and editors read a written list, users the catalog."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    written = {(alias.name, node.module) for node in block.body for alias in node.names}
    own = [feature for feature in catalog.features() if feature.package.startswith("lora_diag.")]
    declared = {
        (name, f"{feature.package}{module}")
        for feature in own
        for module, _, name in (path.partition(":") for path in feature.functions)
    }
    assert written == declared | {
        (name, module) for name, module in lora_diag._OTHER_EXPORTS.items()
    }
    errors = {
        name
        for name, value in vars(lora_diag).items()
        if isinstance(value, type) and "Error" in name
    }
    assert set(dir(lora_diag)) == {
        "__version__",
        *catalog.functions(),
        *lora_diag._OTHER_EXPORTS,
        *errors,
    }
    assert {name for name, _ in written} <= set(dir(lora_diag))


def test_only_cli_prints_or_exits():
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.relative_to(PACKAGE).parts[0] == "cli":
            continue
        calls = [node.func for node in ast.walk(parsed(file)) if isinstance(node, ast.Call)]
        names = [
            (call.id if isinstance(call, ast.Name) else ast.unparse(call))
            for call in calls
            if is_short(call)
        ]
        wrong += [(file, name) for name in names if name in {"print", "sys.exit", "exit", "quit"}]
    assert not wrong


def is_short(call: ast.expr) -> bool:
    """Return whether a call is of a name, or of an attribute of a name."""
    return isinstance(call, ast.Name) or (
        isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name)
    )


def test_names_of_tests_have_60_characters_at_most():
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    names = [
        name
        for file in files
        for name in re.findall(r"^ *def (test_\w+)", file.read_text("utf-8"), re.MULTILINE)
    ]
    assert len(names) > 1000
    assert not [name for name in names if len(name) > 60]


LIGHT = """
import sys
from lora_diag.cli import main
for words, heavy in {steps!r}:
    sys.argv = ["loradiag", *words]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (words, stop.code)
    assert not heavy & set(sys.modules), (words, heavy & set(sys.modules))
"""


@pytest.mark.slow
def test_commands_import_no_heavy_modules(pair_of_models, loradiag, tmp_path):
    """Help and the gate need no NumPy; what reads headers or results needs no torch."""
    base, tuned, *_ = pair_of_models
    (tmp_path / "p.toml").write_text('[[rule]]\nname = "r"\nrequire = "relative <= 1e9"\n')
    assert loradiag("spectrum", base, tuned, "-o", "r.jsonl", "-q").code == 0
    nothing, no_torch = (
        {"torch", "numpy", "scipy", "pandas", "ray"},
        {"torch", "matplotlib.pyplot", "ray"},
    )
    helps = [
        [],
        ["spectrum"],
        ["verify-merge"],
        ["inspect"],
        ["gate"],
        ["report"],
        ["probe", "sweep"],
    ]
    steps = [
        *([[*words, "--help"], nothing] for words in helps),
        [["--version"], nothing],
        [["inspect", "base"], nothing],
        [["gate", "p.toml", "r.jsonl", "--junit", "j.xml", "--model-card", "c.md"], nothing],
        [["spectrum", str(ROOT / "sample_checkpoints" / "lora_r4"), "-q"], no_torch | {"scipy"}],
        [["inspect", "r.jsonl"], no_torch],
        [["inspect", str(ROOT / "sample_checkpoints" / "lora_r4")], no_torch],
        [["plan", str(ROOT / "sample_checkpoints" / "base")], no_torch],
        [
            [
                "lint",
                *(str(ROOT / "sample_checkpoints" / name) for name in ("base", "lora_r4")),
                "--lr",
                "1e-4",
            ],
            no_torch,
        ],
        [["allocate", "r.jsonl", "--params", "1k", "-o", "c.json"], no_torch],
        [["plot", "r.jsonl", "-o", "x.png"], no_torch],
        [["report", "r.jsonl", "-o", "x.html"], no_torch],
    ]
    code = LIGHT.format(steps=steps)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert not done.returncode, done.stderr


def test_help_is_quick():
    """Under 0.45 s of the processor, the best of three tries; a quiet machine takes 0.25 s, a busy
    one up to 0.4 s.
    """
    best = float("inf")
    for _ in range(3):
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", "lora_diag", "--help"], check=True, capture_output=True
        )
        after = os.times()
        used = (
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
        best = min(best, used)
    assert best < 0.45
