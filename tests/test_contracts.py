"""Every recipe traces on the pods that it is for: nothing is computed, so seconds suffice."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from slmjax import sharding
from slmjax.config import Config, ConfigError
from slmjax.data.loader import abstract_batch
from slmjax.parameters import parameters
from slmjax.recipe import load_recipe
from slmjax.resolve import resolve_mesh
from slmjax.state import TrainState, abstract_state
from slmjax.step import StepMetrics, train_step
from tests import shrunken

_FOX1 = shrunken.recipe_path("fox1")
# replica, fsdp, context, tensor: a v5e pod, and smaller meshes for batches that do not fill it.
_PODS = ((16, 16, 1, 1), (4, 16, 1, 1), (1, 1, 1, 1))


def _trace_every_stage(config: Config, mesh: tuple[int, ...]) -> TrainState:
  """Traces init and each stage's train step; checks that a step gives back what it was given."""
  pod = sharding.abstract_mesh(mesh)
  with jax.sharding.use_abstract_mesh(pod):
    state = abstract_state(config)
    for index, stage in enumerate(config.stages):
      batch = abstract_batch(stage, pod)
      after, metrics = jax.eval_shape(
        lambda state, batch, index=index: train_step(
          state, batch, config=config, stage_index=index
        ),
        state,
        batch,
      )
      assert jax.tree.structure(after) == jax.tree.structure(state)
      for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        # Sharding too: an output that moved would be moved back by every following step.
        assert (x.shape, x.dtype, _spec(x)) == (y.shape, y.dtype, _spec(y))
      assert isinstance(metrics, StepMetrics)
      assert all(x.shape == () and x.dtype == jnp.float32 for x in jax.tree.leaves(metrics))
  return state


def _spec(x: jax.ShapeDtypeStruct) -> tuple[object, ...]:
  spec = () if x.sharding is None else tuple(x.sharding.spec)
  while spec and spec[-1] is None:
    spec = spec[:-1]
  return spec


def _check_parameters(config: Config, state: TrainState) -> None:
  params = jax.tree.leaves(state.model, is_leaf=lambda x: isinstance(x, nnx.Param))
  assert all(isinstance(param, nnx.Param) for param in params)
  assert len(jax.tree.leaves(state.model)) == len(params)
  assert sum(x.size for x in jax.tree.leaves(state.model)) == parameters(config.model)


def _on_a_pod(recipe: str) -> tuple[Config, tuple[int, ...]]:
  """The recipe and the largest of the pods that its rows fill."""
  for mesh in _PODS:
    config = load_recipe(recipe, [f"mesh.replica={mesh[0]}"])
    try:
      return config, resolve_mesh(config, math.prod(mesh))
    except ConfigError:
      continue
  raise AssertionError(f"{recipe} fits no mesh")


def _tiers() -> list[Any]:
  """The first size of each family in the fast tier, but OpenELM's: one segment per layer takes as
  many traces, ten to twenty seconds."""
  firsts = {name.partition(":")[0]: name for name in reversed(shrunken.RECIPES)}
  fast = {name for family, name in firsts.items() if family != "openelm"}
  return [pytest.param(n, marks=[pytest.mark.medium] * (n not in fast)) for n in shrunken.RECIPES]


@pytest.mark.parametrize("name", _tiers())
def test_every_recipe_traces(name: str) -> None:
  config, mesh = _on_a_pod(shrunken.recipe_path(name))
  assert math.prod(mesh) > 1 or name == "fox1:tiny"
  _check_parameters(config, _trace_every_stage(config, mesh))


@pytest.mark.parametrize("mesh", [(1, 256, 1, 8), (1, 256, 1, 1), (16, 16, 1, 1), (1, 8, 1, 1)])
def test_fox1_traces_on_its_pods(mesh: tuple[int, ...]) -> None:
  config = load_recipe(_FOX1)
  state = _trace_every_stage(config, mesh)
  _check_parameters(config, state)


def test_fox1_is_spread_evenly_over_a_pod() -> None:
  """No matrix is left whole on a device: state per device is the total over the devices, norms
  (0.02 % of the whole model, but kept whole) apart."""
  mesh = (1, 256, 1, 8)
  config = load_recipe(_FOX1)
  with jax.sharding.use_abstract_mesh(sharding.abstract_mesh(mesh)):
    model = abstract_state(config).model
  for x in jax.tree.leaves(model):
    local = x.sharding.shard_shape(x.shape)
    pieces = x.size // jnp.prod(jnp.array(local)).item()
    # Four key/value heads do not split over eight devices: those projections are over fsdp alone.
    kv = x.shape == (32, 2048, 4, 128)
    norm = x.shape in ((2048,), (32, 2048))
    assert pieces == (1 if norm else 256 if kv else 2048), (x.shape, local)
