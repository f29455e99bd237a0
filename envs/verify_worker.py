"""The process that compares answers with math-verify: a script, run by `verify.py` and killed at will.

It reads one JSON object a line, `{"answer": ..., "expected": ...}`, and answers `1` or `0`. Its own alarm ends it
when a comparison takes too long, even inside C code and even when the parent is gone.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import IO


def _limit(memory_bytes: int) -> None:
    for kind, value in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CORE, 0)):
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # a platform without this limit still has the alarm
            continue


def _serve(replies: IO[str], seconds: float) -> None:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    targets = [LatexExtractionConfig(), ExprExtractionConfig()]

    def equal(answer: str, expected: str) -> bool:
        # Timeouts are off: they need the main thread's signals, and the alarm below is harder than they are.
        parsed = [
            parse(f"${text}$", extraction_config=targets, parsing_timeout=None)
            or parse(text, extraction_config=targets, parsing_timeout=None)
            for text in (expected, answer)
        ]
        return bool(verify(parsed[0], parsed[1], timeout_seconds=None))

    equal("\\frac{1}{2}", "x + 1")  # the first call imports and builds the parsers
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            same = equal(request["answer"], request["expected"])
        except (Exception, RecursionError, MemoryError):
            same = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write("1\n" if same else "0\n")
        replies.flush()


def main() -> None:
    """Serve until standard input ends. Arguments: memory limit in bytes, seconds for one comparison."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _limit(int(sys.argv[1]))
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123 - os.devnull is a string
        os.dup2(nowhere.fileno(), 1)
        _serve(replies, float(sys.argv[2]))


if __name__ == "__main__":
    main()
