"""Docstrings of Python source text, found by parsing: nothing is imported or run."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import warnings

# A docstring of fewer lines belongs to its code; a longer one is documentation.
LONG_LINES = 3
# What announces an interactive session: "Examples" underlined, "Example::", "Example usage:".
HEADING = re.compile(r"(^|\n)[ \t]*(examples?( usage)?|usage)[ \t]*(:+|\n[ \t]*[-=~]{3,})?$", re.I)


@dataclasses.dataclass(frozen=True)
class Docstring:
  """One documented object.

  Attributes:
    name: dotted name, with the arguments when it is a function: `json.dumps(obj, *, indent=None)`.
    text: the docstring without its indentation.
    lines: first and last line in the source, from 1.
  """

  name: str
  text: str
  lines: tuple[int, int]


def docstrings(source: str, module: str) -> list[Docstring]:
  """The docstrings of LONG_LINES lines and more, in source order.

  An object whose whole body is its docstring is left out: `without` couldn't take it away.

  Raises:
    SyntaxError: the source doesn't parse on this Python.
  """
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # on escapes and comparisons in code that isn't ours
    try:
      tree = ast.parse(source)
    except (ValueError, RecursionError) as error:  # null bytes; nesting
      raise SyntaxError(str(error)) from None
  found: list[Docstring] = []
  _visit(tree, module, found)
  return found


def without(source: str, found: list[Docstring]) -> str:
  """The source without the lines of these docstrings."""
  cut = {line for one in found for line in range(one.lines[0], one.lines[1] + 1)}
  # As the parser counts lines: a form feed or a line separator doesn't end one.
  lines = re.split(r"(?<=\n)", source.replace("\r\n", "\n"))
  return "".join(line for number, line in enumerate(lines, start=1) if number not in cut)


def split_at_example(text: str) -> tuple[str, str]:
  """A docstring's prose up to its first interactive session, and the rest from there on.

  A heading that announced the session goes with neither. The rest is empty without a session.
  """
  match = re.search(r"^[ \t]*>>> ", text, re.MULTILINE)
  if not match:
    return text.strip(), ""
  before = text[: match.start()].rstrip()
  return HEADING.sub("", before).strip(), textwrap.dedent(text[match.start() :]).strip()


def _visit(node: ast.AST, name: str, found: list[Docstring]) -> None:
  if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
    first = node.body[0] if node.body else None
    if (
      isinstance(first, ast.Expr)
      and isinstance(first.value, ast.Constant)
      and isinstance(first.value.value, str)
      and first.end_lineno is not None
      and first.end_lineno - first.lineno + 1 >= LONG_LINES
      and len(node.body) > 1
      and node.body[1].lineno > first.end_lineno
    ):
      text = inspect.cleandoc(first.value.value)
      title = name
      if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        title += f"({ast.unparse(node.args)})"
      found.append(Docstring(title, text, (first.lineno, first.end_lineno)))
  # Not into functions: what they define inside has no name that a reader could use.
  if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
    for child in ast.iter_child_nodes(node):
      if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        _visit(child, f"{name}.{child.name}", found)
      elif isinstance(child, (ast.If, ast.Try, ast.ExceptHandler)):
        _visit(child, name, found)
