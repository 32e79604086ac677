"""``init``: write a project file, by which paths have names and options have defaults."""

from lora_diag.feature import Argument, Command, Feature

FEATURE = Feature(
    __name__,
    "init",
    "Show",
    commands=(
        Command(
            help="Write loradiag.toml: names for paths (@base), defaults for options.",
            notes="It lists what the folder holds: the model and the length in a trainer's "
            "configuration, the model of an adapter, a training run, texts. Correct it by hand.",
            examples=("init", "spectrum @base @run/checkpoint-100"),
            run=".init:run_init",
            arguments=(
                Argument("folder", "Folder of the project; default: this one.", optional=True),
            ),
            shows=("quiet",),
            call=True,
            needs_input=False,
        ),
    ),
)
