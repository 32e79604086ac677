"""``python -m lora_diag``, and the command ``loradiag``. Ctrl-C prints one line, also during start-up."""

import gc
import os
import signal
import sys
from types import FrameType

# As in ``cli/app.py``, which is not imported yet.
INTERRUPTED = 130

# Logarithm of the cycles that NumPy's OpenBLAS lets an idle thread spin: 26 by default, 0.06 s of each other core when
# NumPy is imported.
SHORTEST = "4"

# Objects before garbage is collected for the first time. Importing makes hundreds of thousands, of which none is
# garbage; to go over them again and again took a tenth of the time of ``spectrum ADAPTER``, which stays below this.
FIRST_COLLECTION = 200_000


def main() -> None:
    """Run the command line."""
    _collect_later()
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", SHORTEST)
    # Only what is asked for is asked of the Hub: huggingface_hub also fetches a list to identify programs that use it.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _handle_interrupt)
    from lora_diag.cli import main as run

    run()


def _collect_later() -> None:
    """Collect garbage as usual only after a first time, and then leave out the objects that were there."""
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

    An exception during an import may surface as a different one: in torch as a RecursionError of 900 lines. Files are
    as consistent as after any other abrupt exit.
    """
    specs = (getattr(module, "__spec__", None) for module in list(sys.modules.values()))
    if any(getattr(spec, "_initializing", False) for spec in specs):
        sys.stderr.write("interrupted\n")
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
