"""Write the notebooks with the output of a real run: ``python tools/notebooks.py [NAME ...]`` from
the root.

A notebook is made from ``NAME.py``, whose cells begin with ``# %%`` (code) or ``# %% [markdown]``.
The tests run the cells again and compare what they show.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[1] / "docs" / "notebooks"


def cells(source: str) -> Iterator[tuple[str, str]]:
    """Yield the kind, ``code`` or ``markdown``, and the text of each cell."""
    for block in source.split("# %%")[1:]:
        head, _, body = block.partition("\n")
        if head.strip() == "[markdown]":
            yield (
                "markdown",
                "\n".join(
                    line.removeprefix("#").removeprefix(" ") for line in body.strip().split("\n")
                ),
            )
        else:
            yield "code", body.strip()


def shown(value: Any) -> dict[str, Any]:
    """Return what Jupyter would show of a value."""
    bundle: dict[str, Any] = {"text/plain": repr(value)}
    if hasattr(value, "_repr_html_"):
        bundle["text/html"] = value._repr_html_()
    if hasattr(value, "_repr_png_"):
        bundle = {
            "image/png": base64.b64encode(value._repr_png_()).decode(),
            "text/plain": "<Figure>",
        }
    return bundle


def run(code: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a cell and return its outputs in the form of nbformat: what is printed, then the last
    expression.
    """
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "<cell>", "exec"), names)
        value = (
            eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
            if isinstance(last, ast.Expr)
            else None
        )
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": printed.getvalue()})
    if value is not None:
        outputs.append(
            {
                "data": shown(value),
                "execution_count": None,
                "metadata": {},
                "output_type": "execute_result",
            }
        )
    return outputs


def notebook(source: str) -> dict[str, Any]:
    """Return a notebook of nbformat 4.5 whose code cells have been run in the current folder."""
    names: dict[str, Any] = {"__name__": "__main__"}
    made: list[dict[str, Any]] = []
    for at, (kind, text) in enumerate(cells(source)):
        cell: dict[str, Any] = {
            "cell_type": kind,
            "id": f"cell-{at}",
            "metadata": {},
            "source": text,
        }
        if kind == "code":
            cell |= {"execution_count": None, "outputs": run(text, names)}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    for path in [HERE / f"{name}.py" for name in sys.argv[1:]] or sorted(HERE.glob("*.py")):
        text = json.dumps(notebook(path.read_text(encoding="utf-8")), ensure_ascii=False, indent=1)
        path.with_suffix(".ipynb").write_text(text + "\n", encoding="utf-8")
