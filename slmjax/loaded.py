"""A trained model, opened for use: its config, parameters and tokenizer, from a run folder."""

import argparse
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from slmjax import checkpoint, sharding
from slmjax.config import Config, StageConfig
from slmjax.data.store import TOKENIZER_FILE, TokenStore
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import UserError
from slmjax.model.decoder import Decoder
from slmjax.resolve import resolve
from slmjax.sharding import Specs


@dataclasses.dataclass(frozen=True)
class Loaded:
  """What evaluation and generation need.

  Attributes:
    step: steps the parameters were trained for.
    stage: the stage that trained the last of them.
    mesh: as many devices as divide the width and the evaluation's rows, all on `fsdp`.
    add_bos: whether documents of the training data began with BOS.
  """

  config: Config
  step: int
  stage: StageConfig
  model: Decoder
  tokenizer: Tokenizer
  mesh: jax.sharding.Mesh
  add_bos: bool

  @classmethod
  def open(cls, run: Path, step: int | None) -> "Loaded":
    """Opens a run folder at a step, the newest if None.

    Raises:
      UserError: no such folder, checkpoint or tokenizer.
    """
    steps = checkpoint.steps_in(run)
    if not steps:
      raise UserError(
        f"{run} holds no checkpoint; name the run's folder (--workdir of the training)"
      )
    if step is None:
      step = steps[-1]
    if step not in steps:
      raise UserError(
        f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
      )
    meta = checkpoint.read_meta(run, step)
    config = resolve(meta["config"])
    devices = math.gcd(jax.device_count(), config.model.width, config.eval.rows)
    mesh = sharding.make_mesh((1, devices, 1, 1), jax.devices()[:devices])
    with jax.set_mesh(mesh):
      abstract = jax.eval_shape(
        lambda: Decoder(config.model, config.compute, Specs.of_mesh(), jax.random.key(0))
      )
      model = checkpoint.read_model(run, step, sharding.with_mesh(abstract, mesh))
    path = run / TOKENIZER_FILE
    if not path.exists():
      raise UserError(f"{path} is missing; copy the tokenizer of the training data there")
    tokenizer = Tokenizer.load(path)
    _same_tokenizer(tokenizer.sha256, meta["tokenizer"]["sha256"], path)
    return cls(
      config=config,
      step=step,
      stage=config.stages[config.stage_index(max(step - 1, 0))],
      model=model,
      tokenizer=tokenizer,
      mesh=mesh,
      add_bos=meta["tokenizer"]["add_bos"],
    )

  @property
  def eos_id(self) -> int:
    eos = self.tokenizer.eos_id
    if eos is None:
      raise UserError("the tokenizer has no EOS, which separates documents; train one that has")
    return eos

  @property
  def prefix(self) -> list[int]:
    """What stood before each document in training: the EOS of the one before, and BOS if used."""
    bos = self.tokenizer.bos_id
    return [self.eos_id, *([bos] if self.add_bos and bos is not None else [])]

  def check_tokenizer(self, store: TokenStore) -> None:
    _same_tokenizer(store.index["tokenizer"]["sha256"], self.tokenizer.sha256, store.path)


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
