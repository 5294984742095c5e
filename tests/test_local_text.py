"""Local text: five sources that share nothing, the same each time, taken apart without a loss."""

import ast
import json
import re
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from slmjax.data import local_text
from slmjax.data.docstrings import docstrings, split_at_example, without

LIBRARY = Path(sysconfig.get_path("stdlib"))
# With form feeds, continuation lines, nested definitions, raw docstrings, decorators, doctests.
SOME = "argparse ast calendar dataclasses difflib doctest heapq mailbox smtplib statistics turtle"

MODULE = '''\
"""About the module.

A second paragraph.
"""
import os\x0c


def short():
  """One line."""
  return 1


def long(a, *, b: int = 2) -> int:
  r"""Adds \\d.

  >>> long(1)
  3
  """
  return a + b


class Only:
  """Nothing
  but
  words."""


if os.name:
  class Inner:
    """Under
    an
    if."""

    def method(self): """On
      one
      line."""; return 2

    async def other(self):
      """A

      method."""
      return 3
'''


def test_docstrings_names_and_lines():
  found = docstrings(MODULE, "pack.mod")
  assert [one.name for one in found] == [
    "pack.mod",
    "pack.mod.long(a, *, b: int=2)",
    "pack.mod.Inner",
    "pack.mod.Inner.other(self)",
  ]
  assert found[0].text == "About the module.\n\nA second paragraph."
  assert found[1].text == "Adds \\d.\n\n>>> long(1)\n3"
  rest = without(MODULE, found)
  assert "paragraph" not in rest
  assert "Adds" not in rest
  assert "under" not in rest.lower()
  assert '"""One line."""' in rest
  assert "but" in rest
  ast.parse(rest)


def without_long(tree, found):
  """A dump of the tree without the given docstrings, equal for equal programs."""
  lines = {one.lines for one in found}
  for node in ast.walk(tree):
    match node:
      case ast.Module(body=body) | ast.ClassDef(body=body) | ast.FunctionDef(body=body):
        if ast.get_docstring(node) and (body[0].lineno, body[0].end_lineno) in lines:
          del body[0]
  return ast.dump(tree)


@pytest.mark.parametrize("name", SOME.split())
def test_what_is_left_is_the_same_program(name):
  source = (LIBRARY / f"{name}.py").read_text("utf-8")
  found = docstrings(source, name)
  assert found
  assert ast.dump(ast.parse(without(source, found))) == without_long(ast.parse(source), found)


@pytest.mark.parametrize(
  ("text", "prose", "session"),
  [
    ("Just words.\n\nMore.", "Just words.\n\nMore.", ""),
    ("Adds.\n\n>>> 1 + 1\n2", "Adds.", ">>> 1 + 1\n2"),
    ("Adds.\n\nExamples\n--------\n>>> 1\n1\n\nMore\n>>> 2", "Adds.", ">>> 1\n1\n\nMore\n>>> 2"),
    ("Adds.\n\nExample usage::\n\n    >>> 1\n    1\n", "Adds.", ">>> 1\n1"),
    ("Adds.\n\nExample\n  >>> 1\n  1", "Adds.", ">>> 1\n1"),
    (">>> 1\n1", "", ">>> 1\n1"),
    ("Write >>> at the prompt.", "Write >>> at the prompt.", ""),
  ],
)  # fmt: skip
def test_split_at_example(text, prose, session):
  assert split_at_example(text) == (prose, session)


def test_source_that_does_not_parse_raises():
  for source in ("def f(:\n", "x = '\x00'"):
    with pytest.raises(SyntaxError):
      docstrings(source, "m")
  docstrings("'\\d' is 1\n", "m")  # what Python warns of isn't our concern


def test_roots_are_the_requirements():
  lines = (Path(__file__).parent.parent / "requirements.txt").read_text().splitlines()
  names = {re.split(r"[<=>;\s]", line)[0] for line in lines if line and line[0] != "#"}
  # What these two bring (a client of a model hub) would change the corpus and add little to it.
  assert set(local_text.ROOTS) == names - {"safetensors", "tokenizers"}


@pytest.fixture
def small(tmp_path, monkeypatch):
  """A standard library of a few files, one package and few topics."""
  library = tmp_path / "library"
  for path in [*(f"{name}.py" for name in SOME.split()), "json/decoder.py", "encodings/cp037.py"]:
    (library / path).parent.mkdir(parents=True, exist_ok=True)
    (library / path).write_bytes((LIBRARY / path).read_bytes())
  (library / "test").mkdir()
  (library / "test" / "heapq2.py").write_text("x = 1\n" * 100)
  (library / "latin.py").write_bytes(b"# \xe9\n" * 100)
  (library / "broken.py").write_text("def f(:\n" * 100)
  (library / "long.py").write_text("x = 1  # a line\n" * 10_000)
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
  monkeypatch.setattr(local_text, "ROOTS", ("ml-collections",))
  return tmp_path


def read(directory):
  return {
    name: [
      json.loads(line) for line in (directory / f"{name}.jsonl").read_text("utf-8").splitlines()
    ]
    for name in local_text.SOURCES
  }


def test_collect(small):
  stats = local_text.collect(small / "a")
  assert local_text.collect(small / "b") == stats
  texts = read(small / "a")
  assert texts == read(small / "b")
  for name, found in stats.items():
    assert found.documents == len(texts[name]) > 0
    assert found.bytes == sum(len(one["text"].encode()) - 1 for one in texts[name])
    for one in texts[name]:
      assert local_text.MIN_CHARS <= len(one["text"]) <= local_text.MAX_CHARS + 1
  code = {one["origin"]: one["text"] for one in texts["code"]}
  expected = {f"Python: {name}.py" for name in [*SOME.split(), "json/decoder", "long"]}
  assert set(code) == expected
  assert len(code["Python: long.py"]) == local_text.MAX_CHARS // 16 * 16
  origins = {re.split(r"[ :]", one["origin"])[0] for one in texts["docs"] + texts["packages"]}
  assert {"ml_collections", "absl-py", "PyYAML"} == origins, "a package and what it needs"
  assert all(one["text"].startswith("Question: ") for one in texts["examples"])
  assert all("\nAnswer:\n>>> " in one["text"] for one in texts["examples"])
  every = [local_text._key(one["text"]) for name in texts for one in texts[name]]
  assert len(set(every)) == len(every)


def test_a_missing_root_or_library_is_an_error(small, monkeypatch):
  monkeypatch.setattr(local_text, "ROOTS", ("ml-collections", "not-a-package"))
  with pytest.raises(FileNotFoundError, match="not-a-package: not installed; pip install"):
    local_text.collect(small / "out")
  monkeypatch.setattr(sysconfig, "get_path", lambda name: str(small / "nowhere"))
  with pytest.raises(FileNotFoundError, match="no sources of the standard library"):
    local_text.collect(small / "out")
  assert not (small / "out").exists()


def test_a_paragraph_is_taken_once():
  seen: set[bytes] = set()
  licence = "Permission is granted.\n\nTHE SOFTWARE\nIS PROVIDED.\n\nMine."
  assert local_text._fresh_paragraphs(licence, seen) == licence
  other = "permission  is granted!\r\n\r\nThe software is provided\r\n\r\nTheirs."
  assert local_text._fresh_paragraphs(other, seen) == "Theirs."


def test_only_the_standard_library_is_imported():
  program = textwrap.dedent("""
    import sys
    from slmjax.data import local_text
    mine = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names
    sys.exit(str(mine & {"numpy", "jax", "sentencepiece", "absl", "scipy", "flax"}))
  """)
  result = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, check=False
  )
  assert result.stderr == "set()\n"


@pytest.mark.medium
def test_the_whole_installation(tmp_path):
  stats = local_text.collect(tmp_path)
  megabytes = {name: found.bytes / 1e6 for name, found in stats.items()}
  # Two thirds of what was measured with both pinned sets of packages.
  least = {"code": 5, "reference": 1.4, "docs": 6, "packages": 0.3, "examples": 1.9}
  assert all(megabytes[name] > least[name] for name in least), megabytes
  blocks: dict[str, set[str]] = {}
  for name, found in read(tmp_path).items():
    lines = [[line.strip() for line in one["text"].splitlines() if line.strip()] for one in found]
    blocks[name] = {
      "\n".join(part) for one in lines for part in zip(one, one[1:], one[2:], one[3:], strict=False)
    }
  # Four lines in a row of one source are hardly ever in another: held-out text of a source isn't
  # training text of the next. What remains are modules that quote others and licence headers.
  for name, own in blocks.items():
    others = set().union(*(blocks[other] for other in blocks if other != name))
    share = len(own & others) / len(own)
    print(name, len(own), f"{share:.4f}")
    assert share < 0.01, (name, share)
