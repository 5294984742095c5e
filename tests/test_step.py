"""The train step: microbatches and meshes do not matter, updates move, non-finite ones do not."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from slmjax import sharding
from slmjax.config import Config
from slmjax.data.loader import Batch, row_arrays
from slmjax.resolve import resolve
from slmjax.state import TrainState, enter_stage, init_state
from slmjax.step import StepMetrics, train_step
from tests import small

# Between two orders of the same float32 sums: a few hundred terms, a few layers. Adam divides a
# gradient by its own size, so the first updates magnify a relative error, not an absolute one.
TOLERANCE = 2e-5
STEPS = 3


def batches(config: Config, passes: int) -> list[dict[str, np.ndarray]]:
  """Rows with documents, and a few positions out of the loss, unevenly over the microbatches."""
  stage = config.stages[0]
  rng = np.random.default_rng(0)
  result = []
  for _ in range(STEPS):
    spans = rng.integers(2, small.VOCAB, (stage.rows, stage.row_length + 1)).astype(np.int32)
    spans[rng.random(spans.shape) < 0.05] = 1
    rows = [row_arrays(span[None], 1, True) for span in spans]
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    arrays["weights"][0, 5:20] = 0.0
    arrays["weights"][-1, 3:] = 0.0
    result.append({k: v.reshape(passes, -1, v.shape[1]) for k, v in arrays.items()})
  return result


def train(
  config: Config,
  shape: tuple[int, ...],
  passes: int,
  enter_mesh: Any,
  spoil: int | None = None,
  steps: int = STEPS,
) -> tuple[list[StepMetrics], list[np.ndarray], TrainState]:
  with enter_mesh(shape):
    state = jax.jit(functools.partial(init_state, config))()
    step = jax.jit(functools.partial(train_step, config=config, stage_index=0))
    placement = sharding.batch_sharding(jax.sharding.get_mesh())
    reported = []
    for i, arrays in enumerate(batches(config, passes)[:steps]):
      if i == spoil:
        arrays["weights"][0, 0, 0] = np.inf
      batch = Batch(**{k: jax.device_put(v, placement) for k, v in arrays.items()})
      state, metrics = step(state, batch)
      reported.append(jax.tree.map(np.asarray, metrics))
    return reported, [np.asarray(x) for x in jax.tree.leaves(state.model)], state


@pytest.fixture(scope="module")
def config() -> Config:
  return small.config()


def assert_close(one: tuple, other: tuple) -> None:
  for a, b in zip(one[0], other[0], strict=True):
    np.testing.assert_allclose(a.loss_sum, b.loss_sum, rtol=TOLERANCE)
    np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=10 * TOLERANCE)
    assert a.count == b.count
  for a, b in zip(one[1], other[1], strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)  # a twentieth of one update at the peak rate


@pytest.mark.medium
def test_accumulated_equals_full_batch(config: Config, enter_mesh: Any) -> None:
  whole = train(config, (1, 1, 1, 1), 1, enter_mesh)
  assert_close(whole, train(config, (1, 1, 1, 1), 4, enter_mesh))


@pytest.mark.medium
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 2, 1, 2), (2, 2, 1, 1), (1, 2, 1, 4)])
def test_meshes_agree(config: Config, enter_mesh: Any, shape: tuple[int, ...]) -> None:
  assert_close(train(config, (1, 1, 1, 1), 2, enter_mesh), train(config, shape, 2, enter_mesh))


@pytest.mark.medium
def test_steps_move_weights_and_optimizer(config: Config, enter_mesh: Any) -> None:
  reported, weights, state = train(config, (1, 1, 1, 1), 1, enter_mesh)
  with enter_mesh((1, 1, 1, 1)):
    fresh = jax.tree.leaves(jax.jit(functools.partial(init_state, config))().model)
  assert all(not np.array_equal(a, b) for a, b in zip(weights, fresh, strict=True))
  counts = [x for x in jax.tree.leaves(state.optimizer) if x.shape == ()]
  assert [int(c) for c in counts] == [STEPS]
  assert int(state.step) == STEPS
  assert int(state.skipped) == 0
  assert all(m.applied == 1 for m in reported)


@pytest.mark.medium
def test_a_step_that_is_not_finite_changes_nothing(config: Config, enter_mesh: Any) -> None:
  reported, weights, state = train(config, (1, 1, 1, 1), 1, enter_mesh, spoil=2)
  _, before, _ = train(config, (1, 1, 1, 1), 1, enter_mesh, steps=2)
  assert [float(m.applied) for m in reported] == [1, 1, 0]
  assert (int(state.step), int(state.skipped)) == (3, 1)
  for a, b in zip(weights, before, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.medium
def test_entering_a_stage_keeps_or_resets_the_moments(enter_mesh: Any) -> None:
  raw = small.raw_config()
  raw.stages[1].optimizer_state = "reset"
  config = resolve(raw)
  _, _, state = train(config, (1, 1, 1, 1), 1, enter_mesh)
  with enter_mesh((1, 1, 1, 1)):
    kept = enter_stage(config, config.stages[2], state)
    reset = enter_stage(config, config.stages[1], state)
  for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(a, b)
  assert all(not np.any(x) for x in jax.tree.leaves(reset.optimizer))
  for a, b in zip(jax.tree.leaves(reset.model), jax.tree.leaves(state.model), strict=True):
    np.testing.assert_array_equal(a, b)
