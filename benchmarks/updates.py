"""Time of ``interference`` and ``intruders`` on two fine-tunes of one base, as a multiple of two
spectra.

python -m benchmarks.updates BASE TUNED TUNED
"""

import sys

from benchmarks.measure import commands_in_turn, machine, print_figures

LORADIAG = [sys.executable, "-m", "lora_diag"]


def commands(base: str, first: str, second: str) -> dict[str, list[str]]:
    """Return the commands by their names in the table."""
    return {
        "spectrum of one": [*LORADIAG, "spectrum", base, first, "-q"],
        "interference of two": [*LORADIAG, "interference", base, first, second, "-q"],
        "interference of two, --density 0": [
            *LORADIAG,
            "interference",
            base,
            first,
            second,
            "--density",
            "0",
            "-q",
        ],
        "intruders of one": [*LORADIAG, "intruders", base, first, "-q"],
    }


if __name__ == "__main__":
    print(machine())
    print_figures(commands_in_turn(commands(*sys.argv[1:4]), 3), "spectrum of one")
