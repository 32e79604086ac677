"""``python -m lora_diag``, and the command ``loradiag``.

Ctrl-C prints one line, also during start-up.
"""

import gc
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType

from lora_diag.errors import UNREADABLE

# As in ``cli/app.py``, which is not imported yet.
INTERRUPTED = 130

# Logarithm of the cycles that NumPy's OpenBLAS lets an idle thread spin: 26 by default, 0.06 s of
# each other core when NumPy is imported.
SPIN_LOG2 = "4"

# Bytes of address space below which OpenBLAS and the system's loader end the process while torch is
# imported.
LEAST_ADDRESS_SPACE = 700_000_000

# How the loader, the system and torch say that memory is missing, in errors of other types than
# MemoryError.
OUT_OF_MEMORY = ("failed to map segment", "Cannot allocate memory", "can't allocate memory")

# Characters of an unexpected error that are shown.
SHOWN_CHARACTERS = 500

# Objects before garbage is collected for the first time. Importing makes hundreds of thousands, of
# which none is garbage; to go over them again and again took a tenth of the time of
# ``spectrum ADAPTER``, which stays below this.
FIRST_COLLECTION = 200_000


def main() -> None:
    """Prepare the process and run the command line; an unexpected error becomes one message and an
    exit code.
    """
    _collect_later()
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", SPIN_LOG2)
    # Only requested files are fetched from the Hub: huggingface_hub also fetches a list of programs
    # that use it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _handle_interrupt)
    try:
        _check_address_space()
        from lora_diag.cli import main as run

        run()
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # also one that is no Exception, such as a panic of Rust
        raise SystemExit(_report_unexpected(error)) from error


def _check_address_space() -> None:
    """Refuse a limit of the address space in which imports end the process with a code of their
    own.

    Raises:
        MemoryError: The limit is too low.
    """
    with suppress(ImportError):
        import resource  # not available on every system

        if 0 <= resource.getrlimit(resource.RLIMIT_AS)[0] < LEAST_ADDRESS_SPACE:
            raise MemoryError


def _report_unexpected(error: BaseException) -> int:
    """Print one message about an error that has none of its own, and return the exit code; 1 is for
    failed checks only.

    An error of missing memory gets a message of its own. The whole traceback is printed if
    ``LORADIAG_TRACEBACK`` is set.
    """
    text = str(error)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "lora_diag" in frame.filename
    ]
    places = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-2:])
    message = (
        f"unexpected {type(error).__name__} at {places}: {text[:SHOWN_CHARACTERS]}; this is a "
        "defect of loradiag: "
        "report it with the command and the traceback that LORADIAG_TRACEBACK=1 shows"
    )
    if isinstance(error, MemoryError) or any(words in text for words in OUT_OF_MEMORY):
        message = (
            "out of memory: less is available than loradiag needs; free memory, or raise its limit "
            "(ulimit -v)"
        )
    full_traceback = traceback.format_exc() if os.environ.get("LORADIAG_TRACEBACK") else ""
    try:
        from lora_diag.cli.output import forget_output, print_message, print_traceback

        print_traceback(full_traceback)
        print_message(f"Error: {message}")
        forget_output()
    except Exception:  # nothing can be imported or written; the text may have secrets
        with suppress(Exception):
            sys.stderr.write(
                f"Error: {message if message.startswith('out') else type(error).__name__}\n"
            )
    return UNREADABLE


def _collect_later() -> None:
    """Delay the first collection of garbage; afterwards collect as usual, without the objects that
    exist by then.
    """
    usual = gc.get_threshold()

    def restore_collection(phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            gc.callbacks.remove(restore_collection)
            gc.set_threshold(*usual)
            gc.freeze()

    gc.callbacks.append(restore_collection)
    gc.set_threshold(FIRST_COLLECTION, *usual[1:])


def _handle_interrupt(number: int, frame: FrameType | None) -> None:
    """Exit immediately while modules are imported; otherwise handle Ctrl-C as usual.

    An exception during an import may surface as a different one: in torch as a RecursionError of
    900 lines. Files are as consistent as after any other abrupt exit.
    """
    specs = (getattr(module, "__spec__", None) for module in list(sys.modules.values()))
    if any(getattr(spec, "_initializing", False) for spec in specs):
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
