"""``explain``: the meaning of a word of loradiag's output; ``schema``: its files as JSON Schema."""

from lora_diag.feature import Argument, Command, Feature

FEATURE = Feature(
    __name__,
    "explain",
    "Show",
    commands=(
        Command(
            help="Meaning of a word of the output, and what to do about it.",
            notes="Without words, it lists symptoms of training, merging and serving, each with "
            "the command to run.",
            run=".show:run_explain",
            examples=(
                "explain unresolved",
                "explain 'r@90%'",
                "explain the merged model is gibberish",
            ),
            arguments=(
                Argument(
                    "words",
                    "A word as loradiag prints it, or a symptom.",
                    "WORD",
                    many=True,
                    optional=True,
                ),
            ),
            shows=("json",),
            call=True,
            needs_input=False,
        ),
        Command(
            help="JSON Schema of results files or policies.",
            notes="A results file is JSON Lines: the schema describes one line. A policy is TOML.",
            name="schema",
            run=".schemas:run_schema",
            examples=("schema results > results.schema.json",),
            arguments=(
                Argument("file_kind", "Kind of file: results or policy.", "results|policy"),
            ),
            shows=(),
            call=True,
        ),
    ),
)
