"""From a Hugging Face folder to a checkpoint. Everything is checked before anything is written."""

import argparse
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax import checkpoint, sharding
from slmjax.config import ComputeConfig, to_dict
from slmjax.convert.hf_files import DTYPES, Stored, equal, read_json, stored_in
from slmjax.convert.names import Names, Tensor, lay_out
from slmjax.convert.registry import family_of
from slmjax.convert.tokenizer_files import copy_files, describe_tokenizer
from slmjax.durable import new_folder
from slmjax.errors import UserError
from slmjax.model.decoder import Decoder
from slmjax.model_config import ModelConfig
from slmjax.parameters import parameters
from slmjax.resolve import resolve_model
from slmjax.sharding import Specs

# An imported checkpoint was trained for no steps of ours.
STEP = 0


def import_folder(source: Path, out: Path, ignore: Sequence[str]) -> dict[str, Any]:
  """Converts; returns what was done, as printed by the command.

  Weights keep their dtype, but float16 becomes float32, which holds it exactly: this code computes
  in float32 or bfloat16. An export gives float16 back.

  Raises:
    UserError: `out` exists, a field that cannot be honoured, a tensor that is missing, unknown, of
      another shape or dtype, or cut off.
  """
  if out.exists():
    raise UserError(f"{out} exists; name a new folder for --out")
  where = source / "config.json"
  config = read_json(where)
  family = family_of(config, str(where))
  reading = family.reading(config, str(where), ignore)
  model = resolve_model(reading.settings)
  found = matched(family.names, stored_in(source), source)
  shapes = array_shapes(model)
  tensors = lay_out(family.names, model, shapes)
  dtype = check_tensors(family.names, tensors, found, source, tied=model.embedding.tied)
  meta = {
    "step": STEP,
    "model": to_dict(model),
    "rope_theta": reading.rope_theta,
    "param_dtype": "bfloat16" if dtype == "BF16" else "float32",
    "imported": {"model_type": family.model_type, "config": config, "dtype": dtype},
    "tokenizer": describe_tokenizer(source),
  }
  param_dtype = jnp.dtype(meta["param_dtype"])
  arrays = {
    name: checkpoint.LazyArray(
      shape,
      param_dtype,
      functools.partial(_array, name, shape, param_dtype, tensors, found),
    )
    for name, shape in shapes.items()
  }
  with new_folder(out) as temporary:
    checkpoint.write_imported(temporary, STEP, arrays, meta)
    files = copy_files(source, temporary)
  return {
    "out": str(out),
    "model_type": family.model_type,
    "parameters": parameters(model),
    "tensors": len(tensors),
    "dtype": meta["param_dtype"],
    "tokenizer_files": files,
  }


def array_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
  """The shapes of our arrays by name."""
  compute = ComputeConfig("float32", "float32", "none", "reference", "reference")
  with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
    abstract = jax.eval_shape(lambda: Decoder(model, compute, Specs.of_mesh(), jax.random.key(0)))
  return {name: leaf.shape for name, leaf in checkpoint.by_name(abstract).items()}


def matched(names: Names, found: Mapping[str, Stored], source: Path) -> dict[str, Stored]:
  """The tensors by the names of the table: prefixes put back, buffers left out."""
  bare = not any(name.startswith(names.prefix) for name in found)
  result: dict[str, Stored] = {}
  for name, stored in found.items():
    full = names.renamed.get(name) or name
    if bare and full != names.head:
      full = names.prefix + full
    if any(re.fullmatch(pattern, full) for pattern in names.buffers):
      continue
    if full in result:
      raise UserError(f"{source} holds {full} under two names; remove one")
    result[full] = stored
  return result


def check_tensors(
  names: Names,
  tensors: Mapping[str, Tensor],
  found: Mapping[str, Stored],
  source: Path,
  *,
  tied: bool,
) -> str:
  """The dtype of all tensors, which are exactly those expected; a tied head may be there too."""
  for name, tensor in tensors.items():
    if name not in found:
      raise UserError(f"{source} lacks the tensor {name} {list(tensor.shape)}")
    if found[name].shape != tensor.shape:
      raise UserError(
        f"{found[name].file}: {name} has shape {list(found[name].shape)}; config.json makes it "
        f"{list(tensor.shape)}"
      )
  extra = sorted(set(found) - set(tensors) - ({names.head} if tied else set()))
  if extra:
    raise UserError(
      f"{found[extra[0]].file}: {extra[0]} {list(found[extra[0]].shape)} has no place in this model"
      + (f", nor have {len(extra) - 1} more" if len(extra) > 1 else "")
    )
  dtype = found[names.embedding].dtype
  for name, stored in found.items():
    if stored.dtype not in DTYPES or stored.dtype != dtype:
      raise UserError(
        f"{stored.file}: {name} is {stored.dtype} and {names.embedding} {dtype}; all weights must "
        f"have one dtype of {', '.join(DTYPES)}; save the model in one"
      )
  if tied and names.head in found and not equal(found[names.head], found[names.embedding]):
    raise UserError(
      f"{found[names.head].file}: {names.head} differs from {names.embedding}, but config.json "
      "ties them; set tie_word_embeddings to false if both were trained"
    )
  return dtype


def _array(
  name: str,
  shape: tuple[int, ...],
  dtype: np.dtype,
  tensors: Mapping[str, Tensor],
  found: Mapping[str, Stored],
) -> np.ndarray:
  """One of our arrays, filled layer by layer."""
  parts = list(parts_of(name, tensors))
  if parts[0][1].layer is None:
    ((tensor, part),) = parts
    return np.ascontiguousarray(tensor.read(part, found[tensor.name].load()), dtype)
  array = np.empty(shape, dtype)
  for tensor, part in parts:
    array[part.layer] = tensor.read(part, found[tensor.name].load())
  return array


def parts_of(name: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Any]]:
  """The tensors that hold something of an array of ours."""
  for tensor in tensors.values():
    for part in tensor.parts:
      if part.array == name:
        yield tensor, part


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("folder", type=Path, help="with config.json and model.safetensors")
  parser.add_argument("--out", type=Path, required=True, help="the checkpoint's folder, a new one")
  parser.add_argument(
    "--ignore",
    action="append",
    metavar="FIELD",
    help="a field of config.json that is unknown here and does not change the function; repeatable",
  )
  parser.add_argument("--json", action="store_true", help="print one JSON object")
