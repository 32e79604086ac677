"""Hooks of MkDocs: what the site adds to the pages, generated from the catalog, so that it cannot
drift.

The page of a feature, ``reference/NAME.md``, gets the options of its commands from Typer and the
fields of its records from pydantic; a feature without a page gets one of these alone. The
navigation lists the features in the order of the catalog. ``python tools/hooks.py spectrum`` prints
what is generated for a feature.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from enum import Enum
from html import escape
from inspect import getdoc, signature
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel

from lora_diag import catalog
from lora_diag.cli.options import make_function
from lora_diag.explanations.terms import all_terms, find_models, remedy_of
from lora_diag.feature import GROUPS, Feature
from lora_diag.linting.rules import MISSING, RULES
from lora_diag.records import run
from lora_diag.records.base import Record, Unit, document_fields

ROOT = Path(__file__).parents[1]
RESULTS = "reference/results.md"
NUMBERS = re.compile(r"(?:[-−+\d.,%±×÷~<>≤≥/|\\ ]|\b(?:m?s|min|h|[kMG]i?B)\b)+")

# Characters of a word in inline code that is kept on one line; longer ones would be wider than a
# phone.
MAX_UNBROKEN = 36

# Pages of the site that stand elsewhere in the repository; and where links to the README lead.
MOVED = {
    "CHANGELOG.md": "changelog.md",
    "lora_diag/explanations/symptoms.md": "guides/symptoms.md",
    "lora_diag/explanations/words.md": "reference/words.md",
    "lora_diag/explanations/findings.md": "reference/findings.md",
    "CONTRIBUTING.md": "contributing.md",
    "sample_checkpoints/README.md": "get-started/samples.md",
}
ELSEWHERE = {**MOVED, "README.md": "index.md"}


def page_of(feature: Feature) -> str:
    """Return the page of a feature: of its command, or of its package where an option of another
    command runs it.
    """
    name = feature.package.rpartition(".")[2] if "--" in feature.name else feature.name
    return f"reference/{name.replace(' ', '-')}.md"


def commands(feature: Feature) -> dict[str, Any]:
    """Return the commands of a feature by their full names, as Typer makes them."""
    found = {}
    for command in feature.commands:
        name = command.name or feature.name
        alone = typer.Typer(rich_markup_mode=None, add_completion=False)
        alone.command(name)(make_function(feature, command))
        found[name] = typer.main.get_command(alone)
    return found


def cell(text: str) -> str:
    r"""Return a text as a cell of a Markdown table.

    Inside code, a backslash before a bar would be shown, so such code becomes HTML.

    >>> print(cell("a|b  <c>"))
    a\|b &lt;c&gt;
    >>> print(cell("`local|ray`"))
    <code>local&#124;ray</code>
    """

    def escaped(found: re.Match[str]) -> str:
        part = found[0]
        if len(part) > 1:
            return (
                part
                if "|" not in part
                else f"<code>{escape(part[1:-1]).replace('|', '&#124;')}</code>"
            )
        return {"<": "&lt;", ">": "&gt;", "|": r"\|"}[part]

    return re.sub(r"`[^`]*`|[<>|]", escaped, " ".join(text.split()).replace("``", "`"))


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table without the columns that are empty in every row.

    >>> print(table(("name", "value"), [("`--json`", "")]))
    | name |
    | --- |
    | `--json` |
    """
    kept = [at for at in range(len(heads)) if any(row[at] for row in rows)]
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join(f"| {' | '.join(line[at] for at in kept)} |" for line in lines)


def value(each: Any, annotations: dict[str, Any]) -> str:
    """Return the placeholder of what an option takes: as declared, its words if it is one of a few,
    or its type.
    """
    if each.metavar or getattr(each, "is_flag", False):
        return each.metavar or ""
    types = [
        part
        for part in (annotations[each.name], *get_args(annotations[each.name]))
        if isinstance(part, type)
    ]
    words = "|".join(str(word) for part in types if issubclass(part, Enum) for word in part)
    return words or next((type_name(part) for part in types if part is not NoneType), "")


def option_tables(command: Any) -> Iterator[str]:
    """Yield the tables of a command's arguments and options, by groups where it has groups."""
    parameters = signature(command.callback, eval_str=True).parameters
    annotations = {name: each.annotation for name, each in parameters.items()}
    groups: dict[str, list[tuple[str, ...]]] = {}
    for each in command.params:
        if each.hidden or "--help" in each.opts:
            continue
        kind = "Arguments" if each.param_type_name == "argument" else "Options"
        names = [each.metavar or each.name.upper()] if kind == "Arguments" else each.opts
        takes = "" if kind == "Arguments" else value(each, annotations)
        default = getattr(each.default, "value", each.default)
        shown = (
            "required"
            if each.required
            else ""
            if default in (None, (), "") or default is False
            else f"`{default}`"
        )
        row = (", ".join(f"`{name}`" for name in names), cell(f"`{takes}`") if takes else "", shown)
        group = getattr(each, "rich_help_panel", None) or kind
        groups.setdefault(group, []).append((*row, cell(each.help or "")))
    for group, rows in groups.items():
        yield f"**{group}**\n\n" + table(("name", "value", "default", "description"), rows)


def type_name(annotation: Any) -> str:
    """Return a type in the words of JSON.

    >>> (
    ...     type_name(dict[str, float | None]),
    ...     type_name(tuple[int, ...] | None),
    ...     type_name(Literal["left", "right"]),
    ... )
    ('table of number or null', 'list of integer, or null', '`left`, `right`')
    """
    if get_origin(annotation) is Annotated:
        return type_name(get_args(annotation)[0])
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        names = [type_name(part) for part in parts if part is not NoneType]
        comma = "," if any(" of " in name or "`" in name for name in names) else ""
        return " or ".join(names) + (f"{comma} or null" if NoneType in parts else "")
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (tuple, list):
        kinds = list(dict.fromkeys(type_name(part) for part in parts if part is not Ellipsis))
        return f"list of {' and '.join(kinds)}"
    if origin is dict:
        return f"table of {type_name(parts[1])}"
    names = {float: "number", int: "integer", str: "text", bool: "true or false"}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__
    return names.get(annotation, "any value")


def unit(annotation: Any) -> str:
    """Return the unit of a field's numbers, as its type declares it.

    >>> unit(tuple[Annotated[float, Unit("nats")], ...] | None), unit(int)
    ('nats', '')
    """
    if get_origin(annotation) is Literal:
        return ""
    own = (part.name for part in get_args(annotation) if isinstance(part, Unit))
    return next(own, "") or next(filter(None, map(unit, get_args(annotation))), "")


def null_when(text: str) -> tuple[str, str]:
    """Split off what a description says of null.

    >>> null_when("‖W‖_F, likewise; null if the base was not given.")
    ('‖W‖_F, likewise.', 'if the base was not given')
    >>> null_when("‖Δ‖_F if both sides have it, else null.")
    ('‖Δ‖_F if both sides have it.', 'otherwise')
    """
    if (rest := re.sub(r", else null(?=[.;])", "", text)) != text:
        return rest, "otherwise"
    found = re.search(
        r"(?:;|(?<=\.)) [Nn]ull (?:if|where|for|in|until|without|before|unless) "
        r"[^.;()]*(?:\([^)]*\)[^.;()]*)*",
        text,
    )
    if found is None:
        return text, ""
    when = re.sub(r"^;? [Nn]ull ", "", found[0])
    rest = text[: found.start()].removesuffix(".") + text[found.end() :]
    return " ".join(rest.split()), when.strip()


def field_table(kind: type[BaseModel], linked: dict[str, str]) -> str:
    """Return the table of the fields of a kind of record.

    Args:
        kind: The class.
        linked: Where other classes are described, by their names.
    """
    told, rows = document_fields(kind), []
    for attribute, field in kind.model_fields.items():
        name = field.alias or attribute
        annotation = (
            Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        )
        shown = [each for each in getattr(kind, "shown", ()) if each.path.split(".")[0] == name]
        titles = ", ".join(dict.fromkeys(each.title for each in shown))
        default = field.default if name == "record" else ""
        text, when = null_when(told.get(name, f"Kind of record, `{default}`." if default else ""))
        kinds = cell(type_name(annotation).removesuffix(", or null").removesuffix(" or null"))
        kinds = re.sub(
            r"\b[A-Z]\w+\b",
            lambda at: f"[{at[0]}]({linked[at[0]]})" if at[0] in linked else at[0],
            kinds,
        )
        null = cell(when) or (
            "in older versions" if "null" in type_name(annotation) and field.default is None else ""
        )
        rows.append((f"`{name}`", cell(titles), kinds, unit(annotation), cell(text), null))
    return table(("field", "column", "type", "unit", "description", "null"), rows)


def kinds(feature: Feature) -> list[type[Record]]:
    """Return the kinds of records of a feature."""
    return [feature.load(path) for path in feature.records]


def shared() -> list[type[BaseModel]]:
    """Return the classes of records that belong to no feature, or to several: those of every file
    first.
    """
    catalog.record_kinds()
    used = [
        one
        for feature in catalog.features()
        for kind in kinds(feature)
        for one in find_models(kind)
    ]
    loose = [one for one in used if one.__module__.startswith("lora_diag.records.")]
    every = [one for kind in (run.Run, run.LeftOut, run.End) for one in find_models(kind)]
    return list(dict.fromkeys([*every, *loose]))


def record_tables(
    classes: list[type[BaseModel]], linked: dict[str, str], level: int
) -> Iterator[str]:
    """Yield a heading, the first paragraph of its docstring and the table of fields of
    every class.
    """
    for kind in classes:
        about = cell((getdoc(kind) or "").partition("\n\n")[0])
        yield f"{'#' * level} {kind.__name__}\n\n{about}\n\n{field_table(kind, linked)}"


def generated(feature: Feature) -> str:
    """Return what the site adds to the page of a feature: synopsis, options and output fields."""
    parts = []
    for name, command in commands(feature).items():
        words = [
            each.metavar or each.name.upper()
            for each in command.params
            if each.param_type_name == "argument"
        ]
        parts += [
            f"## Options of `{name}`",
            f"    loradiag {' '.join([name, *words, '[OPTIONS]'])}",
        ]
        parts += option_tables(command)
    elsewhere = {
        kind.__name__: f"{PurePosixPath(RESULTS).name}#{kind.__name__.lower()}" for kind in shared()
    }
    classes = list(dict.fromkeys(one for kind in kinds(feature) for one in find_models(kind)))
    own = [one for one in classes if one.__name__ not in elsewhere]
    links = {**elsewhere, **{one.__name__: f"#{one.__name__.lower()}" for one in own}}
    if classes:
        where = [
            f"[{one.__name__}]({elsewhere[one.__name__]})"
            for one in kinds(feature)
            if one not in own
        ]
        lines = (
            f"Lines of the [results file]({PurePosixPath(RESULTS).name}), besides its first "
            "and last."
        )
        parts += [
            "## Output fields",
            lines + (f" The record is a {', '.join(where)}." if where else ""),
        ]
        parts += record_tables(own, links, 3)
    return "\n\n".join(parts) + "\n"


def results_tables() -> str:
    """Return the tables of the records that several features have."""
    links = {kind.__name__: f"#{kind.__name__.lower()}" for kind in shared()}
    return "\n\n".join(record_tables(shared(), links, 2)) + "\n"


def api() -> str:
    """Return the directives of mkdocstrings for every public function and what they return."""
    named = [
        (feature.package, path) for feature in catalog.features() for path in feature.functions
    ]
    paths = [
        (package if path.startswith(".") else "") + path.replace(":", ".")
        for package, path in named
    ]
    errors = ("LoradiagError", "UsageError", "InputError", "NothingComparedError")
    more = [
        "lora_diag.records.results.Results",
        "lora_diag.catalog.read_results",
        "lora_diag.running.engines.ray.Ray",
    ]
    more += [f"lora_diag.errors.{name}" for name in errors]
    return "\n\n".join(f"::: {path}" for path in (*paths, *more)) + "\n"


def on_config(config: Any) -> Any:
    """Put the features into the navigation, grouped as in ``loradiag --help``."""
    pages: dict[str, list[dict[str, str]]] = {group: [] for group in GROUPS}
    for feature in catalog.features():
        pages.setdefault(feature.group, []).append(
            {next(iter(commands(feature))): page_of(feature)}
        )
    for section in config.nav:
        for entry in section.get("Reference", []) if isinstance(section, dict) else []:
            if isinstance(entry, dict) and "Commands" in entry:
                entry["Commands"] = [{group: listed} for group, listed in pages.items()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that stand elsewhere, and those of features that have none."""
    from mkdocs.structure.files import File

    for source, page in MOVED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=moved_links(text, source, page)))
    for feature in catalog.features():
        if files.get_file_from_path(page_of(feature)) is None:
            about = next(
                (getdoc(one.callback) or "" for one in commands(feature).values()), feature.name
            )
            files.append(
                File.generated(config, page_of(feature), content=f"# {feature.name}\n\n{about}\n")
            )
    return files


def rules_table() -> str:
    """Return the table of the rules of ``lint``, from their registry and the page of findings."""
    texts = {term.word: term.text for term in all_terms() if term.role == "finding"}
    rows = []
    for name, rule in RULES.items():
        what = re.split(r"(?<=[.:]) ", " ".join(texts[name].split("\n\n")[0].split()))[0].rstrip(
            ":"
        )
        given = {"settings", "peft", "invalid", "mismatch", "servers"}
        needs = ", ".join(
            dict.fromkeys(
                MISSING.get(need, f"--{need}".replace("_", "-"))
                for need in signature(rule.check).parameters
                if need not in given
            )
        )
        link = f"[`{name}`](../../lora_diag/explanations/findings.md#{name})"
        rows.append((link, rule.severity, cell(what), cell(needs), cell(remedy_of(name)[1])))
    return "## Rules\n\n" + table(("rule", "severity", "finds", "needs", "source"), rows)


def completed(here: str, markdown: str) -> str:
    """Return a page with what is generated for it at its end."""
    for feature in catalog.features():
        if here == page_of(feature):
            markdown += f"\n\n{generated(feature)}"
    if here == "reference/lint.md":
        markdown += f"\n\n{rules_table()}"
    if here == RESULTS:
        markdown += f"\n\n{results_tables()}"
    if here == "reference/api.md":
        markdown += f"\n\n{api()}"
    return markdown


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Append what is generated to a page, and lead links out of the docs to where the site has
    these pages.
    """
    here = page.file.src_uri
    markdown = linked_figures(unbroken_numbers(completed(here, markdown)))
    return markdown if here in MOVED.values() else moved_links(markdown, f"docs/{here}", here)


def unbroken_numbers(markdown: str) -> str:
    """Return a page whose table cells do not break between the parts of a number, such as 1.59 ±
    0.01.

    >>> unbroken_numbers("| 48 | 1.5 ± 0.1 | a 3 |")
    '| 48 | <span class="number">1.5 ± 0.1</span> | a 3 |'
    """

    def row(line: re.Match[str]) -> str:
        cells = re.split(r"(?<!\\)\|", line[0])
        return "|".join(unbroken(part) for part in cells)

    def unbroken(part: str) -> str:
        text = part.strip()
        return (
            f' <span class="number">{text}</span> '
            if " " in text and NUMBERS.fullmatch(text)
            else part
        )

    return re.sub(r"^\|.*\|$", row, markdown, flags=re.MULTILINE)


def linked_figures(markdown: str) -> str:
    """Return a page whose figures lead to the file, to be read at full size on a small screen.

    >>> linked_figures("![A figure](figures/a.svg)")
    '[![A figure](figures/a.svg)](figures/a.svg)'
    """
    return re.sub(r"^!\[([^\]]*)\]\((\S+)\)", r"[![\1](\2)](\2)", markdown, flags=re.MULTILINE)


def on_page_content(html: str, **_: Any) -> str:
    """Keep options and names in inline code on one line."""
    return unbroken_code(html)


def unbroken_code(html: str) -> str:
    """Return a page whose inline code does not break after the hyphens of a word.

    >>> unbroken_code("<code>allocate --max-rank R</code>")
    '<code>allocate <span class="number">--max-rank</span> R</code>'
    >>> unbroken_code("<pre><span></span><code>a --b</code></pre>")
    '<pre><span></span><code>a --b</code></pre>'
    """

    def word(found: re.Match[str]) -> str:
        return (
            f'<span class="number">{found[0]}</span>' if len(found[0]) < MAX_UNBROKEN else found[0]
        )

    def code(found: re.Match[str]) -> str:
        words = re.sub(r"[^\s<]*[-…][^\s<]*", word, found[1])
        return f"<code>{words}</code>"

    return re.sub(r"(?<!<span></span>)<code>([^<]*)</code>", code, html)


def moved_links(text: str, source: str, page: str) -> str:
    """Return a page with its relative links as they lead from its place on the site.

    A link to a file that is not on the site becomes its text.

    Args:
        text: The page.
        source: Where it stands in the repository.
        page: Where it stands on the site.
    """

    def link(found: re.Match[str]) -> str:
        words, target, anchor = found[1], found[2], found[3] or ""
        if "://" in target or not target:
            return found[0]
        path = PurePosixPath(os.path.normpath(PurePosixPath(source).parent / target)).as_posix()
        there = ELSEWHERE.get(path) or (
            path.removeprefix("docs/") if path.startswith("docs/") else None
        )
        if there is None:
            return words
        return f"[{words}]({os.path.relpath(there, PurePosixPath(page).parent)}{anchor})"

    return re.sub(r"\[([^\]\[]*)\]\(([^)#\s]*)(#[^)\s]*)?\)", link, text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        feature = catalog.feature_of(name)
        print(generated(feature) if feature else f"{name}: is no feature")  # noqa: T201
