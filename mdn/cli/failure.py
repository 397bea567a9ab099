"""How a command ends that cannot do what it was asked."""

from __future__ import annotations

import sys
from typing import NoReturn

FAILED, INTERRUPTED = 2, 130


def fail(error: object, code: int = FAILED) -> NoReturn:
    """Print one line on stderr, and exit."""
    print(f"error: {error}" if code == FAILED else error, file=sys.stderr, flush=True)
    sys.exit(code)
