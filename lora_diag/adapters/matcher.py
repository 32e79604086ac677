"""Match regular expressions from untrusted files with names: this file also runs as a script, which
can be ended.

Python's engine backtracks, may take years, and holds the interpreter's lock, so only the end of its
process stops it. The process that starts this one ends it; where that was killed, the limit of
processor time does.
"""

import json
import re
import sys
import warnings
from contextlib import suppress


def match_names(method: str, pattern: str, names: list[str]) -> str:
    """Return one digit per name, 1 if it matches, or the reason why the pattern is invalid.

    Args:
        method: ``match`` or ``fullmatch``.
        pattern: The regular expression.
        names: The names.

    Example:
        >>> match_names("match", "a+$", ["aa", "ab"]), match_names("match", "(", [])
        ('10', 'missing ), unterminated subpattern at position 0')
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "possible nested set" is for authors, not for readers
            matches = getattr(re.compile(pattern), method)
    except (re.error, OverflowError, RecursionError) as error:
        return " ".join(str(error).split()) or "invalid"
    return "".join("01"[matches(name) is not None] for name in names)


def limit_processor_time(seconds: int) -> None:
    """Let the system end this process after so many seconds of processor time, on systems with such
    limits.
    """
    with suppress(ImportError, OSError, ValueError):  # ValueError: the limit is lower already
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


if __name__ == "__main__":
    limit_processor_time(int(sys.argv[1]))
    method, patterns, names = json.load(sys.stdin)
    for pattern in patterns:
        sys.stdout.write(json.dumps(match_names(method, pattern, names)) + "\n")
        sys.stdout.flush()
