"""How every command fails: one clear line on standard error and exit code 2."""

import sys
from collections.abc import Callable


class UserError(ValueError):
  """Something the user can mend. The message is one line: what, where, what to do."""


def run_command(main: Callable[[], int | None]) -> None:
  """Runs a command, which returns an exit code or None, and exits. A `UserError` becomes one line;
  anything else is our fault and keeps its traceback."""
  try:
    sys.exit(main() or 0)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    # What a library left unfinished (Orbax its other reads) would add tracebacks on the way out.
    sys.unraisablehook = lambda _: None
    sys.exit(2)
