"""A model opened for use, with its tokenizer: from the folder of a run, or of an imported model.

An imported model's parameters are float32 and so is its arithmetic on CPU; elsewhere they are as
published and the arithmetic is bfloat16. A run's are as its config says.
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from slmjax import checkpoint, sharding
from slmjax.config import ComputeConfig, Config
from slmjax.data import tokenizer_files
from slmjax.data.store import TokenStore
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import UserError
from slmjax.model.decoder import Decoder
from slmjax.model_config import LatentAttention, ModelConfig
from slmjax.resolve import resolve, resolve_model
from slmjax.sharding import Specs

# An imported model is evaluated in windows of so many tokens, or as many as it has positions for.
IMPORTED_WINDOW = 2048


@dataclasses.dataclass(frozen=True)
class Loaded:
  """What evaluation and generation need.

  Attributes:
    step: steps the parameters were trained for; 0 for an imported model.
    rope_theta: base of the rotary angles, of the last stage that was trained; None without them.
    prefix: ids that stood before each document in training. A run's: the EOS of the document
      before, and BOS if its stores have it. An imported model's: BOS if its tokenizer adds one,
      else EOS if that is its BOS too (GPT-2, Pythia), else nothing.
    suffix: ids that closed a document. A run's: EOS. Nothing for an imported model.
    stop_ids: what ends a generated text. A run's: EOS. An imported model's: EOS, and what its
      generation_config.json adds, but for pieces of text (some published ones name these).
    window, rows: tokens of a row of evaluation, and rows computed at once.
    isolate_documents: whether tokens could not see the document before, in the last stage.
    mesh: as many devices as divide the model's widths and `rows`, all on one axis.
    config: that of the run; None for an imported model.
  """

  step: int
  model: Decoder
  tokenizer: Tokenizer
  rope_theta: float | None
  prefix: tuple[int, ...]
  suffix: tuple[int, ...]
  stop_ids: tuple[int, ...]
  window: int
  rows: int
  isolate_documents: bool
  mesh: jax.sharding.Mesh
  config: Config | None

  @classmethod
  def open(cls, run: Path, step: int | None) -> "Loaded":
    """Opens a folder that holds checkpoints/ at a step, the newest if None.

    Raises:
      UserError: no such folder, checkpoint or tokenizer.
    """
    step = checkpoint.chosen_step(run, step)
    meta = checkpoint.read_meta(run, step)
    if "imported" in meta:
      return _imported(run, step, meta)
    return _trained(run, step, meta)

  def encode(self, text: str) -> list[int]:
    """Ids of a text, with what stood before it in training."""
    ids = [*self.prefix, *self.tokenizer.encode(text)]
    if max(ids, default=0) >= (rows := self.model.model.vocab_size):
      raise UserError(
        f"{self.tokenizer.path} has id {max(ids)}, but the model has {rows} ids; put the model's "
        "own tokenizer there"
      )
    return ids

  def names_of(self, ids: tuple[int, ...]) -> list[str]:
    """Special ids as a reader knows them."""
    names = {self.tokenizer.bos_id: "BOS", self.tokenizer.eos_id: "EOS"}
    return [names[i] for i in ids]

  def check_tokenizer(self, store: TokenStore) -> None:
    _same_tokenizer(store.index["tokenizer"]["sha256"], self.tokenizer.sha256, store.path)


def _trained(run: Path, step: int, meta: dict[str, Any]) -> Loaded:
  config = resolve(meta["config"])
  stage = config.stages[config.stage_index(max(step - 1, 0))]
  tokenizer = _tokenizer(run, meta["tokenizer"])
  bos, eos = tokenizer.bos_id, tokenizer.eos_id
  if eos is None:
    raise UserError(f"{tokenizer.path} has no EOS, which separates documents; train one that has")
  mesh = _mesh(config.model, config.eval.rows)
  return Loaded(
    step=step,
    model=read_decoder(run, step, config.model, config.compute, mesh),
    tokenizer=tokenizer,
    rope_theta=stage.rope_theta,
    prefix=(eos, bos) if meta["tokenizer"]["add_bos"] and bos is not None else (eos,),
    suffix=(eos,),
    stop_ids=(eos,),
    window=config.eval.row_length,
    rows=config.eval.rows,
    isolate_documents=stage.isolate_documents,
    mesh=mesh,
    config=config,
  )


def _imported(run: Path, step: int, meta: dict[str, Any]) -> Loaded:
  if meta["tokenizer"] is None:
    raise UserError(
      f"{run} was imported without a tokenizer; import it again with tokenizer.model or "
      "tokenizer.json beside its weights"
    )
  model = resolve_model(meta["model"])
  tokenizer = _tokenizer(run, meta["tokenizer"])
  bos, eos = tokenizer.bos_id, tokenizer.eos_id
  prefix: tuple[int, ...] = ()
  if meta["tokenizer"]["add_bos"] and bos is not None:
    prefix = (bos,)
  elif eos is not None and bos == eos:
    prefix = (eos,)
  on_cpu = jax.default_backend() == "cpu"
  compute = ComputeConfig(
    param_dtype="float32" if on_cpu else meta["param_dtype"],
    compute_dtype="float32" if on_cpu else "bfloat16",
    remat="none",
    attention="auto",
    cross_entropy="auto",
  )
  mesh = _mesh(model, jax.device_count())
  return Loaded(
    step=step,
    model=read_decoder(run, step, model, compute, mesh),
    tokenizer=tokenizer,
    rope_theta=meta["rope_theta"],
    prefix=prefix,
    suffix=(),
    stop_ids=_stop_ids(run, tokenizer),
    window=min(model.max_length, IMPORTED_WINDOW),
    rows=mesh.size,
    isolate_documents=False,
    mesh=mesh,
    config=None,
  )


def _mesh(model: ModelConfig, rows: int) -> jax.sharding.Mesh:
  widths = [model.width, model.embedding.width]
  for segment in model.segments:
    if isinstance(segment.attention, LatentAttention):
      widths += [segment.attention.latent_width, segment.attention.query_latent or 0]
  devices = math.gcd(jax.device_count(), rows, *widths)
  return sharding.make_mesh((1, devices, 1, 1), jax.devices()[:devices])


def read_decoder(
  run: Path, step: int, config: ModelConfig, compute: ComputeConfig, mesh: jax.sharding.Mesh
) -> Decoder:
  """The parameters of a checkpoint, on a mesh."""
  with jax.set_mesh(mesh):
    abstract = jax.eval_shape(lambda: Decoder(config, compute, Specs.of_mesh(), jax.random.key(0)))
    model: Decoder = checkpoint.read_model(run, step, sharding.with_mesh(abstract, mesh))
  return model


def _tokenizer(run: Path, meta: Mapping[str, Any]) -> Tokenizer:
  path = tokenizer_files.find(run)
  if path is None:
    raise UserError(f"{run} has no tokenizer; copy that of the training data or the import there")
  tokenizer = Tokenizer.load(path)
  _same_tokenizer(tokenizer.sha256, meta["sha256"], path)
  return tokenizer


def _stop_ids(folder: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
  """What ends a text of an imported model."""
  ids = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
  path = folder / "generation_config.json"
  if path.exists():
    try:
      named = json.loads(path.read_bytes()).get("eos_token_id")
    except (ValueError, AttributeError):
      raise UserError(f"{path} is no JSON object; import the model again") from None
    listed = named if isinstance(named, list) else [named]
    ids |= {i for i in listed if isinstance(i, int) and not tokenizer.is_piece_of_text(i)}
  return tuple(sorted(ids))


def tokenizer_meta(stores: Mapping[str, TokenStore]) -> dict[str, Any]:
  """What a checkpoint records of the tokenizer of its stores."""
  store = next(iter(stores.values()))
  return {"sha256": store.index["tokenizer"]["sha256"], "add_bos": store.add_bos}


def _same_tokenizer(found: str, expected: str, where: Path) -> None:
  if found != expected:
    raise UserError(
      f"{where}: tokenizer {found[:12]} is not the one the model was trained with, "
      f"{expected[:12]}; use that one"
    )


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
  """The flags of every command that works on a checkpoint."""
  parser.add_argument(
    "--checkpoint", type=Path, required=True, help="the run's folder, which holds checkpoints/"
  )
  parser.add_argument("--step", type=int, help="step of the checkpoint (the newest)")
  parser.add_argument("--json", action="store_true", help="print one JSON object")
