"""The training state: made sharded, described abstractly, handed from stage to stage."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.config import Config, StageConfig
from slmjax.model.decoder import Decoder
from slmjax.optimizer import make_optimizer
from slmjax.sharding import Specs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a step reads and writes.

  Attributes:
    step: int32, steps of the run that are done.
    model: the parameters.
    optimizer: optax's state, shaped like the model.
    skipped: int32, steps whose update was left out because it was not finite.
  """

  step: jax.Array
  model: Decoder
  optimizer: Any
  skipped: jax.Array


def init_state(config: Config) -> TrainState:
  """A fresh state on the current mesh. Call it under `jax.jit`: then it is born sharded."""
  model = Decoder(config.model, config.compute, Specs.of_mesh(), jax.random.key(config.seed))
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, model, make_optimizer(config.optimizer).init(model), zero)


def abstract_state(config: Config) -> TrainState:
  """The state's shapes, types and shardings on the current mesh, which may be abstract."""
  return jax.eval_shape(lambda: init_state(config))


def enter_stage(config: Config, stage: StageConfig, state: TrainState) -> TrainState:
  """The state with which a stage begins: Adam's moments kept, or zero with their count."""
  if stage.optimizer_state == "keep":
    return state
  optimizer = jax.jit(make_optimizer(config.optimizer).init)(state.model)
  return dataclasses.replace(state, optimizer=optimizer)
