"""The train step and the evaluation step: pure functions from arrays to arrays.

Letters: A microbatches, B rows, S positions, D model width.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from slmjax.config import Config
from slmjax.data.loader import Batch
from slmjax.kernels.cross_entropy.api import cross_entropy
from slmjax.model.decoder import Decoder
from slmjax.optimizer import learning_rate, make_optimizer
from slmjax.state import TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
  """What a step reports: float32 scalars. Sums come with their count, so that parts add up.

  Attributes:
    loss_sum, z_loss_sum: over the targets in the loss, in nats.
    count: targets in the loss.
    grad_norm: of the whole batch's gradient, before clipping.
    learning_rate: what the update was multiplied by.
    applied: 1 if the update was applied, 0 if the loss or the gradient was not finite.
  """

  loss_sum: jax.Array
  z_loss_sum: jax.Array
  count: jax.Array
  grad_norm: jax.Array
  learning_rate: jax.Array
  applied: jax.Array


def token_losses(
  model: Decoder, batch_BS: Batch, rope_theta: float | None
) -> tuple[jax.Array, jax.Array]:
  """Negative log-likelihood and logsumexp [B, S] in float32 of one microbatch's targets."""
  hidden_BSD, _ = model(
    batch_BS.tokens, batch_BS.segments, batch_BS.positions, rope_theta=rope_theta
  )
  return cross_entropy(
    hidden_BSD,
    model.output_VE,
    batch_BS.targets,
    specs=model.specs,
    softcap=model.model.logits.softcap,
    implementation=model.compute.cross_entropy,
  )


def train_step(
  state: TrainState, batch: Batch, *, config: Config, stage_index: int
) -> tuple[TrainState, StepMetrics]:
  """One optimizer step of a stage on its batch.

  The gradient is that of the mean loss over the whole batch, however many microbatches it comes
  in: each microbatch's sum is divided by the count of all.
  """
  stage = config.stages[stage_index]
  count = jnp.sum(batch.weights)

  def microbatch_loss(model: Decoder, batch_BS: Batch) -> tuple[jax.Array, jax.Array]:
    nll_BS, logsumexp_BS = token_losses(model, batch_BS, stage.rope_theta)
    loss_sum = jnp.sum(nll_BS * batch_BS.weights)
    z_loss_sum = config.optimizer.z_loss * jnp.sum(jnp.square(logsumexp_BS) * batch_BS.weights)
    return (loss_sum + z_loss_sum) / count, jnp.stack([loss_sum, z_loss_sum])

  gradient = jax.grad(microbatch_loss, has_aux=True)

  def accumulate(
    carry: tuple[Decoder, jax.Array], batch_BS: Batch
  ) -> tuple[tuple[Decoder, jax.Array], None]:
    return jax.tree.map(jnp.add, carry, gradient(state.model, batch_BS)), None

  if batch.tokens.shape[0] == 1:
    grads, sums = gradient(state.model, jax.tree.map(lambda x: x[0], batch))
  else:
    zeros = (jax.tree.map(jnp.zeros_like, state.model), jnp.zeros(2, jnp.float32))
    (grads, sums), _ = jax.lax.scan(accumulate, zeros, batch)

  grad_norm = optax.tree.norm(grads)
  applied = jnp.isfinite(grad_norm) & jnp.isfinite(sums[0])
  rate = learning_rate(config, stage_index, state.step)
  tx = make_optimizer(config.optimizer)
  updates, optimizer = tx.update(grads, state.optimizer, state.model)
  updates = jax.tree.map(lambda u: -rate * u, updates)
  model = optax.apply_updates(state.model, updates)
  model, optimizer = jax.tree.map(
    lambda new, old: jnp.where(applied, new, old),
    (model, optimizer),
    (state.model, state.optimizer),
  )
  new_state = TrainState(
    step=state.step + 1,
    model=model,
    optimizer=optimizer,
    skipped=state.skipped + (1 - applied.astype(jnp.int32)),
  )
  metrics = StepMetrics(
    loss_sum=sums[0],
    z_loss_sum=sums[1],
    count=count,
    grad_norm=grad_norm,
    learning_rate=rate,
    applied=applied.astype(jnp.float32),
  )
  return new_state, metrics


def eval_step(model: Decoder, batch_BS: Batch, *, rope_theta: float | None) -> jax.Array:
  """Summed negative log-likelihood of the weighted targets, in nats: float32 scalar."""
  nll_BS, _ = token_losses(model, batch_BS, rope_theta)
  return jnp.sum(nll_BS * batch_BS.weights)
