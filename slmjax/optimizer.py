"""The optimizer and the learning rate, stage by stage."""

import jax
import jax.numpy as jnp
import optax

from slmjax.config import Config, OptimizerConfig, StageConfig


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """Clipping and AdamW up to the learning rate, which the train step applies where it is seen."""
  decay = optax.add_decayed_weights(
    config.weight_decay, mask=is_matrix if config.decay == "matrices" else None
  )
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.scale_by_adam(config.beta1, config.beta2, config.eps),
    decay,
  )


def is_matrix(tree: object) -> object:
  """True for each array that weight decay acts on: all but norms and other vectors.

  A parameter's name ends in the letters of its shape (`q_DNH`, `scale_D`), without the axis that
  stacking adds, so the name tells a matrix where the rank of a stacked vector cannot. Biases and
  scales that are kept per head (`q_bias_NH`, `scale_NH`) are vectors too.
  """

  def matrix(path: tuple[object, ...], _: object) -> bool:
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    name = next(n for n in reversed(names) if n != "value")
    suffix = name.rpartition("_")[2]
    if not suffix.isupper():
      raise ValueError(f"parameter {'.'.join(names)} needs a shape suffix, as in q_DNH")
    return len(suffix) > 1 and not {"bias", "scale"} & set(name.split("_"))

  return jax.tree_util.tree_map_with_path(matrix, tree)


def learning_rate(config: Config, stage_index: int, step: jax.Array | int) -> jax.Array:
  """The float32 rate at which `step` (of the whole run, inside the stage) is applied."""
  stage = config.stages[stage_index]
  return stage_learning_rate(stage, jnp.asarray(step) - config.boundaries[stage_index])


def stage_learning_rate(stage: StageConfig, k: jax.Array) -> jax.Array:
  """The rate of the stage's step with index k; `LearningRateConfig` describes the shapes."""
  rate = stage.learning_rate
  done = k.astype(jnp.float32) + 1.0  # steps done once this one is
  warm = rate.start + (rate.peak - rate.start) * done / max(rate.warmup_steps, 1)
  if rate.shape == "wsd":
    into = (done - (stage.steps - rate.decay_steps)) / rate.decay_steps
    left = 1.0 - jnp.sqrt(jnp.clip(into, 0.0, 1.0))
  else:
    into = (done - rate.warmup_steps) / max(stage.steps - rate.warmup_steps, 1)
    into = jnp.clip(into, 0.0, 1.0)
    left = {
      "constant": jnp.ones_like(into),
      "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * into)),
      "linear": 1.0 - into,
    }[rate.shape]
  after = rate.end + (rate.peak - rate.end) * left
  return jnp.where(done <= rate.warmup_steps, warm, after).astype(jnp.float32)
