"""The train step and the evaluation step: pure functions from arrays to arrays.

Letters: A microbatches, B rows, S positions, V vocabulary, E width of the tables.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from slmjax.config import Config
from slmjax.data.loader import Batch
from slmjax.kernels.cross_entropy.api import cross_entropy_and_table
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
) -> tuple[jax.Array, jax.Array, Decoder]:
  """Negative log-likelihood and logsumexp [B, S] in float32 of one microbatch's targets.

  The model comes out as it went in, its tables passed on by the operations that use them: its
  cotangent is the array that the gradient of a table is added to.
  """
  hidden_BSE, model = model.passing_tables_on(
    batch_BS.tokens, batch_BS.segments, batch_BS.positions, rope_theta=rope_theta
  )
  nll_BS, logsumexp_BS, table_VE = cross_entropy_and_table(
    hidden_BSE,
    model.output_VE,
    batch_BS.targets,
    specs=model.specs,
    softcap=model.model.logits.softcap,
    implementation=model.compute.cross_entropy,
  )
  return nll_BS, logsumexp_BS, model.with_output(table_VE)


def gradient(
  model: Decoder, batch: Batch, *, config: Config, stage_index: int
) -> tuple[Decoder, jax.Array]:
  """The gradient of the mean loss over a batch, and the sums [2] of loss and z-loss over it.

  It is the same however many microbatches it comes in: each microbatch's sum is divided by the
  count of all.
  """
  rope_theta = config.stages[stage_index].rope_theta
  count = jnp.sum(batch.weights)

  def microbatch_loss(
    model: Decoder, batch_BS: Batch
  ) -> tuple[tuple[jax.Array, Decoder], jax.Array]:
    nll_BS, logsumexp_BS, model = token_losses(model, batch_BS, rope_theta)
    loss_sum = jnp.sum(nll_BS * batch_BS.weights)
    z_loss_sum = config.optimizer.z_loss * jnp.sum(jnp.square(logsumexp_BS) * batch_BS.weights)
    return ((loss_sum + z_loss_sum) / count, model), jnp.stack([loss_sum, z_loss_sum])

  def accumulate(
    carry: tuple[Decoder, jax.Array], batch_BS: Batch
  ) -> tuple[tuple[Decoder, jax.Array], None]:
    grads, sums = carry
    (loss, _), transpose, more = jax.vjp(
      lambda model: microbatch_loss(model, batch_BS), model, has_aux=True
    )
    # The model passes through, and its cotangent is the gradient of the microbatches before: each
    # parameter's gradient is added to it, that of a table in place.
    (grads,) = transpose((jnp.ones_like(loss), grads))
    return (grads, sums + more), None

  start = (jax.tree.map(jnp.zeros_like, model), jnp.zeros(2, jnp.float32))
  if batch.tokens.shape[0] == 1:
    (grads, sums), _ = accumulate(start, jax.tree.map(lambda x: x[0], batch))
  else:
    (grads, sums), _ = jax.lax.scan(accumulate, start, batch)
  return grads, sums


def train_step(
  state: TrainState, batch: Batch, *, config: Config, stage_index: int
) -> tuple[TrainState, StepMetrics]:
  """One optimizer step of a stage on its batch."""
  grads, sums = gradient(state.model, batch, config=config, stage_index=stage_index)
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
    count=jnp.sum(batch.weights),
    grad_norm=grad_norm,
    learning_rate=rate,
    applied=applied.astype(jnp.float32),
  )
  return new_state, metrics


def eval_step(model: Decoder, batch_BS: Batch, *, rope_theta: float | None) -> jax.Array:
  """Summed negative log-likelihood of the weighted targets, in nats: float32 scalar."""
  nll_BS, _, _ = token_losses(model, batch_BS, rope_theta)
  return jnp.sum(nll_BS * batch_BS.weights)
