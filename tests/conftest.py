"""What every test needs before JAX is imported: the CPU, as eight devices.

The suite is mostly compilation, of programs that are too small to gain by what the compiler's
optimisations cost: without them it takes half the time. `make run`, which CI runs too, has them.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  (
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
  )
)

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from slmjax import sharding
from slmjax.data import tokenize, tokenizer
from tests import small


@pytest.fixture
def enter_mesh() -> Callable[[tuple[int, ...]], contextlib.AbstractContextManager[sharding.Specs]]:
  """`with enter_mesh((1, 2, 1, 2)) as specs:` enters a mesh of the first so many devices."""

  @contextlib.contextmanager
  def enter(shape: tuple[int, ...]) -> Iterator[sharding.Specs]:
    with jax.set_mesh(sharding.make_mesh(shape, jax.devices()[: math.prod(shape)])):
      yield sharding.Specs.of_mesh()

  return enter


@pytest.fixture(scope="session")
def text_store(tmp_path_factory: pytest.TempPathFactory) -> str:
  """A token store with small.SOURCES, made of the standard library's own text."""
  folder = tmp_path_factory.mktemp("text_store")
  files = sorted(Path(argparse.__file__).parent.glob("*.py"))[:60]
  texts = [file.read_text(encoding="utf-8") for file in files]
  paragraphs = [p for text in texts for p in text.split("\n\n") if len(p) > 80]
  tokenizer.train(paragraphs, folder / "tokenizer.model", small.VOCAB)
  for i, source in enumerate(small.SOURCES):
    lines = [json.dumps({"text": p}) for p in paragraphs[i :: len(small.SOURCES)][:400]]
    (folder / f"{source}.jsonl").write_text("\n".join(lines))
    tokenize.tokenize_source(
      [folder / f"{source}.jsonl"],
      source=source,
      tokenizer=folder / "tokenizer.model",
      root=folder / "store",
      heldout_fraction=0.1,
      processes=1,
    )
  return str(folder / "store")
