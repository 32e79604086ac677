"""The table of imports in docs/architecture.md, enforced; and what starting up may cost."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lora_diag"

# Room -> the rooms it may import. ``errors``, ``files`` and ``version`` are open to all.
ALLOWED = {
    "errors": set(),
    "files": set(),
    "version": set(),
    "checkpoints": set(),
    "results": set(),
    "linalg": set(),
    "metrics": set(),
    "deltas": {"checkpoints", "results"},
    "adapters": {"checkpoints", "deltas", "results"},
    "gradients": {"adapters", "checkpoints", "deltas"},
    "diagnostics": {"deltas", "gradients", "linalg", "metrics", "results"},
    "engines": {"checkpoints", "diagnostics", "results"},
    "planning": {"results", "metrics"},
    "gating": {"results", "metrics"},
    "plots": {"planning", "results", "metrics"},
    "reports": {"gating", "planning", "plots", "results", "metrics"},
    "training": {"adapters", "checkpoints", "deltas", "diagnostics", "linalg", "results"},
    "api": {
        "adapters",
        "checkpoints",
        "deltas",
        "diagnostics",
        "engines",
        "gating",
        "gradients",
        "linalg",
        "planning",
        "plots",
        "reports",
        "results",
        "training",
    },
    "cli": {"api", "results", "reports"},
    "__init__": {"api", "engines", "results"},
    "__main__": {"cli"},
}

# Library -> the rooms that may import it.
LIBRARIES = {
    "torch": {"checkpoints", "deltas", "gradients", "adapters", "linalg", "diagnostics", "engines", "training"},
    "numpy": {"metrics", "diagnostics", "planning", "plots"},
    "scipy": {"metrics", "linalg", "planning"},
    "matplotlib": {"plots"},
    "jinja2": {"reports"},
    "plotly": {"reports"},
    "transformers": {"training"},
    "peft": {"training"},
    "accelerate": {"training"},
    "datasets": {"training"},
    "curvlinops": set(),
    "fsspec": {"checkpoints"},
    "ray": {"engines"},
    "pydantic": {"results"},
    "rich": {"reports", "cli"},
    "typer": {"cli"},
    "pandas": {"reports", "results"},
    "huggingface_hub": {"checkpoints"},
    "safetensors": {"adapters"},
    "click": set(),
    "pickle": {"checkpoints"},
}


def imports() -> list[tuple[str, str, str]]:
    """Return (room, file, imported module) for every import statement of the package."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        relative = file.relative_to(PACKAGE)
        room = relative.parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found += [(room, str(relative), alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{relative}: write imports in full"
                found.append((room, str(relative), node.module or ""))
    return found


def test_every_room_has_its_rule():
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"__pycache__", "py.typed"} == set(ALLOWED)


def test_a_room_imports_only_what_its_rule_allows():
    wrong = []
    for room, file, module in imports():
        parts = module.split(".")
        if parts[0] == "lora_diag" and len(parts) > 1:
            other = parts[1]
            if other not in {room, "errors", "files", "version"} | ALLOWED[room]:
                wrong.append(f"{file} imports {module}")
        elif parts[0] in LIBRARIES and room not in LIBRARIES[parts[0]]:
            wrong.append(f"{file} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_only_cli_prints_or_exits():
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if file.relative_to(PACKAGE).parts[0] == "cli":
            continue
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        wrong += [call for call in calls if ast.unparse(call.func) in {"print", "sys.exit", "exit", "quit"}]
    assert not wrong


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["spectrum", "--help"],
        ["inspect", "--help"],
        ["gate", "--help"],
        ["report", "--help"],
        ["--version"],
    ],
)
def test_help_and_version_import_no_torch(words):
    code = (
        f"import sys; sys.argv = ['loradiag', *{words!r}]\n"
        "from lora_diag.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'numpy', 'scipy', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_looking_at_a_checkpoint_or_results_file_imports_no_torch(pair_of_models, loradiag, tmp_path):
    base, tuned, *_ = pair_of_models
    assert loradiag("spectrum", base, tuned, "-o", "r.jsonl", "-q").code == 0
    for path in (base, tmp_path / "r.jsonl"):
        code = (
            f"import sys; sys.argv = ['loradiag', 'inspect', {str(path)!r}]\nfrom lora_diag.cli import main\nmain()\n"
        )
        code = code.replace("main()\n", "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n")
        code += "assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_help_is_quick():
    """Under 0.3 s; of the processor, so that a busy machine does not fail, and the best of three tries."""
    best = float("inf")
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "lora_diag", "--help"], check=True, capture_output=True)
        after = os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, used)
    assert best < 0.3
