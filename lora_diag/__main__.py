"""``python -m lora_diag``, and the command ``loradiag``: Ctrl-C ends it in one line even while it starts."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from lora_diag.cli import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
