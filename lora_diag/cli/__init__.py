"""The command line: the Typer application, built from the catalog.

The only package that prints or exits.
"""


def main() -> None:
    """Run the command line."""
    # deferred: app imports commands, and commands import the options of this package
    from lora_diag.cli.app import main as run

    run()
