"""How every command fails: one clear line on standard error and exit code 2."""

import os
import signal
import sys
from collections.abc import Callable


class UserError(ValueError):
  """Something the user can mend. The message is one line: what, where, what to do."""


def run_command(main: Callable[[], int | None]) -> None:
  """Runs a command, which returns an exit code or None, and exits. A `UserError` becomes one line;
  anything else is our fault and keeps its traceback."""
  try:
    sys.exit(main() or 0)
  except BrokenPipeError:
    # The reader has had enough (`... --explain | head`). Python would complain once more at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)
  except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    # What a library left unfinished (Orbax its other reads) would add tracebacks on the way out.
    sys.unraisablehook = lambda _: None
    sys.exit(2)
