"""Match regular expressions from untrusted files with names: this file also runs as a script, which can be ended.

Python's engine backtracks, may take years, and holds the interpreter's lock, so only the end of its process stops it.
"""

import json
import re
import sys
import warnings


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


if __name__ == "__main__":
    method, patterns, names = json.load(sys.stdin)
    for pattern in patterns:
        sys.stdout.write(json.dumps(match_names(method, pattern, names)) + "\n")
        sys.stdout.flush()
