"""From a checkpoint, imported or of a run of our own, to a Hugging Face folder."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from slmjax import checkpoint
from slmjax.convert import parity as parity_of
from slmjax.convert.family import Family
from slmjax.convert.hf_files import DTYPES, Writer
from slmjax.convert.import_ import array_shapes, parts_of
from slmjax.convert.names import lay_out
from slmjax.convert.registry import FAMILIES, describe
from slmjax.convert.tokenizer_files import copy_files
from slmjax.data.tokenizer import Tokenizer
from slmjax.data.tokenizer_files import find
from slmjax.durable import new_folder, write_atomically
from slmjax.errors import UserError
from slmjax.model_config import ModelConfig
from slmjax.parameters import parameters
from slmjax.resolve import resolve, resolve_model

# As transformers names the dtypes in config.json.
_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Exportable:
  """What a checkpoint is in their terms. `dtype` is that of the tensors, as safetensors names it;
  `param_dtype` that of our arrays."""

  model: ModelConfig
  rope_theta: float | None
  param_dtype: str
  family: Family
  config: dict[str, Any]
  dtype: str


def exportable(run: Path, step: int) -> Exportable:
  """What the checkpoint of a step is.

  Raises:
    UserError: its model is one that no class of Hugging Face computes.
  """
  meta = checkpoint.read_meta(run, step)
  if "imported" in meta:
    imported = meta["imported"]
    return Exportable(
      model=resolve_model(meta["model"]),
      rope_theta=meta["rope_theta"],
      param_dtype=meta["param_dtype"],
      family=FAMILIES[imported["model_type"]],
      config=imported["config"],
      dtype=imported["dtype"],
    )
  config = resolve(meta["config"])
  stage = config.stages[config.stage_index(max(step - 1, 0))]
  family, described = describe(config.model, stage.rope_theta)
  dtype = "BF16" if config.compute.param_dtype == "bfloat16" else "F32"
  # Both names: transformers 4 reads torch_dtype, 5 reads dtype.
  dtypes = {"dtype": _TORCH_NAMES[dtype], "torch_dtype": _TORCH_NAMES[dtype]}
  return Exportable(
    model=config.model,
    rope_theta=stage.rope_theta,
    param_dtype=config.compute.param_dtype,
    family=family,
    config={**described, **dtypes, **_special_ids(run)},
    dtype=dtype,
  )


def _special_ids(run: Path) -> dict[str, int | None]:
  """Ids of the run's tokenizer: those of the class's own defaults would be another one's."""
  path = find(run)
  if path is None:
    return {"bos_token_id": None, "eos_token_id": None}
  tokenizer = Tokenizer.load(path)
  return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def export_folder(
  run: Path, out: Path, step: int | None, shard_gb: float, *, parity: bool
) -> dict[str, Any]:
  """Converts; returns what was done, as printed by the command.

  Our arrays are read one at a time and their layers written where they belong.

  Raises:
    UserError: `out` exists, no such checkpoint, a model that cannot be exported.
  """
  if out.exists():
    raise UserError(f"{out} exists; name a new folder for --out")
  if shard_gb <= 0:
    raise UserError(f"--shard-gb is {shard_gb}; it must be above 0")
  step = checkpoint.chosen_step(run, step)
  what = exportable(run, step)
  with new_folder(out) as temporary:
    done = {
      "out": str(out),
      "model_type": what.family.model_type,
      "parameters": parameters(what.model),
      "tensors": write_model(what, run, step, temporary, int(shard_gb * 1e9)),
      "dtype": _TORCH_NAMES[what.dtype],
      "tokenizer_files": copy_files(run, temporary),
    }
    if parity:
      done["parity"] = parity_of.compare(what, run, step, temporary)
      text = json.dumps(done["parity"], indent=2) + "\n"
      write_atomically(temporary / "parity.json", text.encode())
  return done


def write_model(what: Exportable, run: Path, step: int, folder: Path, shard_bytes: int) -> int:
  """Config and tensors of a checkpoint, into a folder that is there; the number of tensors."""
  shapes = array_shapes(what.model)
  tensors = lay_out(what.family.names, what.model, shapes)
  dtype = DTYPES[what.dtype]
  theirs = {name: tensor.shape for name, tensor in tensors.items()}
  writer = Writer(folder, theirs, dtype, shard_bytes)
  for name in shapes:
    array = checkpoint.read_array(run, step, name)
    for tensor, part in parts_of(name, tensors):
      layer = array if part.layer is None else array[part.layer]
      tensor.write(part, layer.astype(dtype, copy=False), writer[tensor.name])
    writer.release()
  writer.close()
  text = json.dumps(what.config, indent=2) + "\n"
  write_atomically(folder / "config.json", text.encode())
  return len(tensors)


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument("checkpoint", type=Path, help="the folder that has checkpoints/ in it")
  parser.add_argument("--out", type=Path, required=True, help="the Hugging Face folder, a new one")
  parser.add_argument("--step", type=int, help="step of the checkpoint (the newest)")
  parser.add_argument(
    "--shard-gb", type=float, default=5.0, help="largest size of a file in 1e9 bytes (5)"
  )
  parser.add_argument(
    "--no-parity", action="store_true", help="do not compare the export with the checkpoint"
  )
  parser.add_argument("--json", action="store_true", help="print one JSON object")
