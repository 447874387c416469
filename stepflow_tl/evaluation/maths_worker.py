"""The process behind `maths_grader`: a JSON line in, "right" or "wrong" out. Imports math-verify alone."""

import json
import logging
import sys
from contextlib import suppress
from pathlib import Path

#: Bytes of address space, beyond which a value is given up; math-verify itself takes a fifth.
_MEMORY = 2 << 30


def main() -> None:
    """Compare until the input ends."""
    with suppress(ImportError, ValueError, OSError):  # not on Windows, and never above a limit that is set
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    sys.path.remove(str(Path(__file__).parent))  # where Python looks first for a script's imports
    logging.disable(logging.WARNING)  # that the time limits are off, which the parent keeps
    from math_verify import parse, verify

    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(10_000)
    for line in sys.stdin:
        texts = json.loads(line)
        try:
            right = parse(f"${texts['right']}$", parsing_timeout=0)
            said = parse(texts["said"], parsing_timeout=0)
            verdict = "right" if verify(right, said, timeout_seconds=0) else "wrong"
        except MemoryError:
            verdict = "its value takes more memory than the comparison may"
        sys.stdout.write(verdict + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
