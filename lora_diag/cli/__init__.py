"""The command line: the Typer application, built from the catalog. The only package that prints or exits."""

from lora_diag.cli.main import app, main

__all__ = ["app", "main"]
