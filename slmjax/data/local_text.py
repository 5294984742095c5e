"""Real text that a Python installation carries, as five sources: a corpus without a download.

  code       the standard library's sources, without tests, tables and long docstrings
  reference  the language reference (pydoc_data.topics) and the standard library's long docstrings
  docs       long docstrings of the installed packages, up to the first example in each
  packages   descriptions, read-me files, change logs and licences of the installed packages
  examples   interactive sessions of all those docstrings, as questions and answers

"Packages" are the distributions that requirements.txt names and what those need, as installed; what
else is installed is left alone. The text depends on nothing but their versions and Python's, and no
text is in two sources. Packages are read, never imported.
"""

from __future__ import annotations

import dataclasses
import email
import gc
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path, PurePosixPath
from pydoc_data.topics import topics

from slmjax.data.docstrings import Docstring, docstrings, split_at_example, without
from slmjax.durable import write_atomically

# The names in requirements.txt.
ROOTS = (
  "jax",
  "flax",
  "absl-py",
  "grain",
  "ml-collections",
  "numpy",
  "optax",
  "orbax-checkpoint",
  "sentencepiece",
  "tensorboardX",
)
SOURCES = ("code", "reference", "docs", "packages", "examples")
MIN_CHARS = 200
# A longer text ends at the last line that fits: no single file is a large part of a source.
MAX_CHARS = 100_000
# Tests, tables (encodings), what is `reference` already, other projects' code, generated code.
SKIPPED_FOLDERS = frozenset(
  {"test", "tests", "idle_test", "testing", "_pytest", "encodings", "pydoc_data", "ensurepip"}
  | {"site-packages", "dist-packages", "_vendor", "vendor", "vendored", "third_party"}
)
SKIPPED_FILES = re.compile(r"(test_.*|.*_test|conftest|.*_pb2|.*_gen)\.py$")
ABOUT_FILES = re.compile(
  r"(readme|licen[cs]e|copying|notice|authors|change|history)[^.]*(\.txt|\.apache|\.bsd)?$"
  r"|.*\.(md|rst)$",
  re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class Text:
  """A document and where it is from."""

  origin: str
  text: str


@dataclasses.dataclass(frozen=True)
class Stats:
  """Of a source: documents and UTF-8 bytes written, and documents dropped as short or repeated."""

  documents: int
  bytes: int
  short: int
  repeated: int


@dataclasses.dataclass
class _Source:
  lines: list[str]
  bytes: int = 0
  short: int = 0
  repeated: int = 0


def collect(out_dir: Path | str) -> dict[str, Stats]:
  """Writes `out_dir/SOURCE.jsonl`, objects with "text" and "origin", for each of SOURCES.

  Raises:
    FileNotFoundError: this Python has no standard library sources, or a package isn't installed.
  """
  out_dir = Path(out_dir)
  written = {name: _Source([]) for name in SOURCES}
  seen: set[bytes] = set()
  # Syntax trees hold no cycles; looking for some at every allocation takes a quarter of the time.
  collecting = gc.isenabled()
  gc.disable()
  try:
    for name, text in _all_texts():
      _add(written[name], text, seen)
  finally:
    if collecting:
      gc.enable()
  for name, source in written.items():
    write_atomically(out_dir / f"{name}.jsonl", "".join(source.lines).encode())
  return {
    name: Stats(len(source.lines), source.bytes, source.short, source.repeated)
    for name, source in written.items()
  }


def _add(source: _Source, text: Text, seen: set[bytes]) -> None:
  body = text.text.strip("\n")
  if len(body) > MAX_CHARS:
    body = body[: body.rfind("\n", 0, MAX_CHARS) + 1].rstrip("\n") or body[:MAX_CHARS]
  if len(body.strip()) < MIN_CHARS:
    source.short += 1
    return
  key = _key(body)
  if key in seen:
    source.repeated += 1
    return
  seen.add(key)
  source.bytes += len(body.encode())
  record = {"text": body + "\n", "origin": text.origin}
  source.lines.append(json.dumps(record, ensure_ascii=False) + "\n")


def _key(text: str) -> bytes:
  """Equal for texts that differ in case, white space and punctuation only."""
  plain = re.sub(r"\W+", " ", text.lower()).strip()
  return hashlib.blake2b(plain.encode(), digest_size=16).digest()


def _all_texts() -> Iterator[tuple[str, Text]]:
  for topic, text in sorted(topics.items()):
    yield "reference", Text(f"Python language reference: {topic}", text)
  library = Path(sysconfig.get_path("stdlib"))
  paths = [PurePosixPath(path.relative_to(library)) for path in library.rglob("*.py")]
  if not paths:
    raise FileNotFoundError(f"{library}: no sources of the standard library; install them")
  for path in sorted(paths):
    source = None if _skipped(path) else _read(library / path)
    if source is not None:
      code, prose, examples = _take_apart(source, path)
      yield "code", Text(f"Python: {path}", code)
      yield "reference", Text(f"Python: {path}", prose)
      for example in examples:
        yield "examples", Text(f"Python: {path}", example)
  paragraphs: set[bytes] = set()
  for package in _closure(ROOTS):
    title = f"{package.metadata['Name']} {package.version}"
    yield "packages", Text(title, _fresh_paragraphs(_description(package), paragraphs))
    for file in sorted(package.files or [], key=str):
      path = PurePosixPath(file)
      origin = f"{title}: {path}"
      if ABOUT_FILES.match(path.name):
        about = _read(Path(str(package.locate_file(file)))) or ""
        yield "packages", Text(origin, _fresh_paragraphs(about, paragraphs))
      elif path.suffix == ".py" and not _skipped(path):
        source = _read(Path(str(package.locate_file(file)))) or ""
        # Parsing is what takes time, and most files without one have no long docstring.
        if '"""' in source:
          _, prose, examples = _take_apart(source, path)
          yield "docs", Text(origin, prose)
          for example in examples:
            yield "examples", Text(origin, example)


def _take_apart(source: str, path: PurePosixPath) -> tuple[str, str, list[str]]:
  """A module's code without long docstrings, their prose, and their examples."""
  module = ".".join(part for part in path.with_suffix("").parts if part != "__init__")
  try:
    found = docstrings(source, module)
  except SyntaxError:
    # For another Python, or a template: it's text of no use as an example of anything.
    return "", "", []
  prose: list[str] = []
  examples: list[str] = []
  for one in found:
    before, session = split_at_example(one.text)
    if before:
      prose.append(f"{one.name}\n\n{before}\n")
    if session:
      examples.append(_question(one, before, session))
  return without(source, found), "\n\n".join(prose), examples


def _question(one: Docstring, prose: str, session: str) -> str:
  summary = " ".join(prose.split("\n\n")[0].split())
  return f"Question: Show how to use {one.name}.\n{summary}\n\nAnswer:\n{session}\n"


def _closure(roots: Iterable[str]) -> list[metadata.Distribution]:
  """The named distributions and what they need without extras, where installed, by name.

  Markers aren't evaluated (the standard library can't): a requirement for another platform counts
  when it is installed.

  Raises:
    FileNotFoundError: a named one isn't installed.
  """
  found: dict[str, metadata.Distribution] = {}
  missing = set()
  queue = list(roots)
  while queue:
    name = _normal(queue.pop())
    if name in found or name in missing:
      continue
    try:
      found[name] = metadata.distribution(name)
    except metadata.PackageNotFoundError:
      missing.add(name)
      continue
    needs = [need for need in found[name].requires or [] if "extra ==" not in need]
    queue += [match[0] for need in needs if (match := re.match(r"[\w.-]+", need))]
  absent = sorted(missing & {_normal(root) for root in roots})
  if absent:
    raise FileNotFoundError(f"{', '.join(absent)}: not installed; pip install -r requirements.txt")
  return [found[name] for name in sorted(found)]


def _normal(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


def _description(package: metadata.Distribution) -> str:
  body = email.message_from_string(package.read_text("METADATA") or "").get_payload()
  return body if isinstance(body, str) else ""


def _fresh_paragraphs(text: str, seen: set[bytes]) -> str:
  """The text without paragraphs met before: most of a licence is in many packages."""
  fresh = []
  for paragraph in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")):
    key = _key(paragraph)
    if key not in seen:
      seen.add(key)
      fresh.append(paragraph.strip("\n"))
  return "\n\n".join(fresh)


def _skipped(path: PurePosixPath) -> bool:
  return bool(SKIPPED_FILES.match(path.name)) or not SKIPPED_FOLDERS.isdisjoint(path.parts[:-1])


def _read(path: Path) -> str | None:
  """A file's text, or None when it isn't UTF-8 (a few old sources are Latin-1)."""
  try:
    return path.read_bytes().decode()
  except UnicodeDecodeError:
    return None
