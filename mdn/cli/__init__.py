"""Entry points: tables of contents."""

import time

# Of the command: this is the first line of the package that it runs.
LAUNCHED = time.monotonic()
