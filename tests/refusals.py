"""Which refusals of a module some error went through."""

import ast
import inspect
import traceback
from collections.abc import Iterable
from types import ModuleType
from typing import Any


def change(raw: Any, path: str, value: Any) -> None:
  """Sets a dotted path; `stages.1.x` indexes a list."""
  *parents, last = path.split(".")
  owner = raw
  for key in parents:
    owner = owner[int(key)] if key.isdigit() else owner[key]
  owner[last] = value


def missed(module: ModuleType, errors: Iterable[BaseException]) -> dict[int, str]:
  """The calls in a module that can refuse and did not in any of the errors, by line."""
  calls = {
    node.lineno: ast.unparse(node)
    for node in ast.walk(ast.parse(inspect.getsource(module)))
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Name)
    and node.func.id in ("require", "positive", "divides")
  }
  hit = {
    line
    for error in errors
    for frame, line in traceback.walk_tb(error.__traceback__)
    if frame.f_code.co_filename == module.__file__
  }
  return {line: text for line, text in calls.items() if line not in hit}
