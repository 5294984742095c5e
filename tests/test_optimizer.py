"""The learning rate over the whole run, what weight decay acts on, and AdamW against NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import fox1
from slmjax.config import LearningRateConfig
from slmjax.data.loader import Batch
from slmjax.optimizer import is_matrix, learning_rate, make_optimizer, stage_learning_rate
from slmjax.resolve import resolve
from slmjax.sharding import batch_sharding
from slmjax.state import abstract_state, init_state
from slmjax.step import train_step
from tests import small


def make_stage(steps, **rate):
  """A stage of so many steps with the given learning-rate settings."""
  settings = dict(shape="constant", start=0.0, peak=1.0, end=0.1, warmup_steps=0, decay_steps=0)
  stage = small.config().stages[0]
  return dataclasses.replace(
    stage,
    tokens=steps * stage.batch_tokens,
    learning_rate=LearningRateConfig(**{**settings, **rate}),
  )


def curve(stage):
  return np.array(
    jax.vmap(lambda k: stage_learning_rate(stage, k))(jnp.arange(stage.steps)), np.float64
  )


def expected(stage):
  """The documented curve, written again in NumPy: the rate of each step by how many are done."""
  rate = stage.learning_rate
  done = np.arange(1, stage.steps + 1)
  warm = rate.start + (rate.peak - rate.start) * done / max(rate.warmup_steps, 1)
  into = (done - rate.warmup_steps) / max(stage.steps - rate.warmup_steps, 1)
  fall = rate.peak - rate.end
  after = {
    "constant": lambda: np.full(stage.steps, rate.peak),
    "linear": lambda: rate.peak - fall * into,
    "cosine": lambda: rate.end + fall * 0.5 * (1 + np.cos(math.pi * into)),
    "wsd": lambda: (
      rate.peak
      - fall * np.sqrt(np.clip(1 - (stage.steps - done) / max(rate.decay_steps, 1), 0, None))
    ),
  }[rate.shape]()
  return np.where(done <= rate.warmup_steps, warm, after)


@pytest.mark.parametrize("shape", ["constant", "cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
@pytest.mark.parametrize("steps", [8, 100])
def test_shapes_and_end_points(shape, warmup_steps, steps):
  stage = make_stage(
    steps,
    shape=shape,
    warmup_steps=warmup_steps,
    decay_steps=(steps - warmup_steps) if shape == "wsd" and steps == 8 else 20 * (shape == "wsd"),
    end=1.0 if shape == "constant" else 0.1,
    start=0.0 if warmup_steps else 1.0,
  )
  rates = curve(stage)
  assert rates[0] > 0
  # float32 arithmetic on numbers around 1.
  np.testing.assert_allclose(rates, expected(stage), rtol=0, atol=1e-6)
  assert rates[-1] == np.float32(stage.learning_rate.end)
  if warmup_steps:
    assert rates[warmup_steps - 1] == 1.0
    np.testing.assert_allclose(
      rates[:warmup_steps], np.arange(1, warmup_steps + 1) / warmup_steps, rtol=1e-6
    )
    assert rates.max() == 1.0


def test_cosine_is_that_of_optax():
  """Code that we did not write: optax counts the steps before, we those done after the step."""
  stage = make_stage(50, shape="cosine", warmup_steps=10, end=0.1)
  theirs = optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 50, 0.1)
  np.testing.assert_allclose(curve(stage), theirs(jnp.arange(1, 51)), rtol=1e-5)


def test_one_step_stage_ends_where_it_says():
  for shape in ("cosine", "linear", "wsd"):
    stage = make_stage(1, shape=shape, start=1.0, decay_steps=int(shape == "wsd"))
    assert curve(stage) == np.float32(0.1)


@pytest.mark.parametrize("variant", ["", "tiny"])
def test_continuous_over_the_stages_of_fox1(variant):
  config = resolve(fox1.get_config(variant))
  assert float(learning_rate(config, 0, 0)) > 0
  for i, boundary in enumerate(config.boundaries[1:-1]):
    before = float(learning_rate(config, i, boundary - 1))
    after = float(learning_rate(config, i + 1, boundary))
    steps = config.stages[i + 1].steps
    # The new stage's first step is one step down its curve: at most 2/steps of its fall (linear
    # falls 1/steps, the cosine less), plus float32.
    rate = config.stages[i + 1].learning_rate
    assert rate.start == config.stages[i].learning_rate.end
    assert abs(after - before) <= 2 / steps * (rate.peak - rate.end) + 1e-6 * before
  for i, stage in enumerate(config.stages):
    last = float(learning_rate(config, i, config.boundaries[i + 1] - 1))
    assert last == pytest.approx(stage.learning_rate.end, rel=1e-6)


def test_late_steps_of_the_full_recipe_are_exact():
  """Step numbers of 8e5 through float32: the curve must not jump or stall."""
  config = resolve(fox1.get_config())
  stage = config.stages[1]
  middle = stage.steps // 2
  got = [float(stage_learning_rate(stage, jnp.asarray(middle + k))) for k in (0, 1000, 2000)]
  done = np.array([middle + k + 1 for k in (0, 1000, 2000)]) / stage.steps
  np.testing.assert_allclose(got, 1e-4 + 9e-4 * 0.5 * (1 + np.cos(np.pi * done)), rtol=1e-5)


def test_decay_leaves_out_norms_however_deep_they_are_stacked(enter_mesh):
  raw = small.raw_config()
  raw.model.embedding.tied = False
  config = resolve(raw)
  with enter_mesh((1, 1, 1, 1)):
    model = abstract_state(config).model
  mask = {
    jax.tree_util.keystr(path): bool(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(is_matrix(model))
  }
  assert len(mask) == len(jax.tree.leaves(model)) == 12
  left_out = sorted(name for name, decayed in mask.items() if not decayed)
  assert len(left_out) == 3
  assert all("norm" in name for name in left_out)


def test_a_parameter_without_a_shape_suffix_is_refused():
  @jax.tree_util.register_dataclass
  @dataclasses.dataclass
  class Layer:
    weight: jax.Array

  with pytest.raises(ValueError, match="parameter weight needs a shape suffix"):
    is_matrix(Layer(jnp.ones(3)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Params:
  """Stand-ins for a matrix, a stacked norm and a plain norm."""

  q_DNH: jax.Array
  scale_D: jax.Array


@pytest.mark.parametrize("decay", ["matrices", "all"])
@pytest.mark.parametrize("scale", [0.01, 100.0])  # below and above clip_norm
def test_adamw_is_the_papers(decay, scale):
  """Two updates against float64 NumPy: arXiv 1711.05101, algorithm 2, with the gradient clipped to
  a global norm first and the decay multiplied by the learning rate."""
  config = dataclasses.replace(small.config().optimizer, decay=decay, clip_norm=1.0)
  rng = np.random.default_rng(0)
  params = {"q_DNH": rng.normal(size=(3, 2, 2)), "scale_D": rng.normal(size=(2, 5))}
  tx = make_optimizer(config)
  ours = Params(**{k: jnp.asarray(v, jnp.float32) for k, v in params.items()})
  state = tx.init(ours)
  m = {k: np.zeros_like(v) for k, v in params.items()}
  v = {k: np.zeros_like(x) for k, x in params.items()}
  for t in (1, 2):
    grads = {k: scale * rng.normal(size=x.shape) for k, x in params.items()}
    rate = 0.1 / t
    updates, state = tx.update(
      Params(**{k: jnp.asarray(g, jnp.float32) for k, g in grads.items()}), state, ours
    )
    ours = optax.apply_updates(ours, jax.tree.map(lambda u, r=rate: -r * u, updates))
    norm = math.sqrt(sum(float(np.sum(g**2)) for g in grads.values()))
    for k, g in grads.items():
      g = g / max(norm, 1.0)
      m[k] = config.beta1 * m[k] + (1 - config.beta1) * g
      v[k] = config.beta2 * v[k] + (1 - config.beta2) * g**2
      step = (m[k] / (1 - config.beta1**t)) / (np.sqrt(v[k] / (1 - config.beta2**t)) + config.eps)
      if k == "q_DNH" or decay == "all":
        step = step + config.weight_decay * params[k]
      params[k] = params[k] - rate * step
    for k, x in params.items():
      np.testing.assert_allclose(getattr(ours, k), x, rtol=2e-5, atol=2e-6)  # float32


@pytest.mark.medium
def test_two_steps_move_the_optimizer(enter_mesh):
  """The trap: an update that is returned but not kept freezes the optimizer without an error."""
  config = small.config()
  stage = config.stages[0]
  shape = (stage.microbatches(1), stage.rows // stage.microbatches(1), stage.row_length)
  rng = np.random.default_rng(0)
  ids = jnp.asarray(rng.integers(0, small.VOCAB, shape), jnp.int32)
  positions = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
  batch = Batch(ids, jnp.roll(ids, -1), jnp.ones(shape, jnp.int32), positions, jnp.ones(shape))
  with enter_mesh((1, 1, 1, 1)):
    batch = jax.device_put(batch, batch_sharding(jax.sharding.get_mesh()))
    first = state = jax.jit(lambda: init_state(config))()
    step = jax.jit(lambda s, b: train_step(s, b, config=config, stage_index=0))
    for _ in range(2):
      state, metrics = step(state, batch)
      assert metrics.applied == 1
    counts = [x for x in jax.tree.leaves(state.optimizer) if x.ndim == 0]
    assert [int(x) for x in counts] == [2]
    assert int(state.step) == 2
    assert int(state.skipped) == 0
    for before, after in zip(
      jax.tree.leaves(first.model), jax.tree.leaves(state.model), strict=True
    ):
      assert not np.array_equal(before, after)
    moments = [x for x in jax.tree.leaves(state.optimizer) if x.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(state.model))
    assert all(np.any(x) for x in moments)
