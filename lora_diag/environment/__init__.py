"""``doctor``: what this installation and this machine offer, and how to close each gap."""

from lora_diag.feature import Argument, Command, Feature

FEATURE = Feature(
    __name__,
    "doctor",
    "Show",
    commands=(
        Command(
            help="Versions, extras, devices and memory, with a fix per gap.",
            run=".check:run_doctor",
            examples=("doctor s3://models/base",),
            arguments=(
                Argument(
                    "inputs",
                    "Checkpoints or adapters to open, local or remote (headers only).",
                    "INPUT",
                    many=True,
                    optional=True,
                ),
            ),
            shows=("json",),
            call=True,
            needs_input=False,
        ),
    ),
)
