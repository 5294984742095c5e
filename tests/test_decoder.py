"""The decoder: equal to float64 equations, causal, blind to other documents, the same when cached,
rematerialised or split over devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import families, sharding
from slmjax.architecture import normal
from slmjax.config import Config
from slmjax.model.decoder import Decoder
from slmjax.model_config import SegmentConfig
from slmjax.resolve import resolve_model
from slmjax.sharding import Specs
from tests import reference_decoder, shrunken, small

THETA = 10_000.0
# float32 sums of at most a few hundred terms of order one, over a few layers.
TOLERANCE = 2e-5


def build(config: Config, perturb: bool = True) -> Decoder:
  """A decoder whose every weight is random: norms too, so that a test can't miss one."""
  model = Decoder(config.model, config.compute, Specs.of_mesh(), jax.random.key(1))
  if not perturb:
    return model
  leaves, tree = jax.tree.flatten(model)
  rng = np.random.default_rng(2)
  noisy = [
    jax.device_put(x + 0.2 * rng.standard_normal(x.shape).astype(np.float32), x.sharding)
    for x in leaves
  ]
  return jax.tree.unflatten(tree, noisy)


def edited(config: Config, **changes: Any) -> Config:
  return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def rows(seed: int = 0, length: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Tokens, segments (two documents and padding at the end) and positions of two rows."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, small.VOCAB, (2, length)).astype(np.int32)
  segments = np.ones((2, length), np.int32)
  segments[0, 10:] = 2
  segments[1, 3:] = 2
  segments[1, 20:] = 0
  positions = np.concatenate(
    [
      [[*range(10), *range(length - 10)]],
      [[*range(3), *range(17), *range(length - 20)]],
    ]
  ).astype(np.int32)
  return tokens, segments, positions


def forward(model: Decoder, *arrays: np.ndarray) -> np.ndarray:
  placed = [sharding.place_rows(np.asarray(x)) for x in arrays]
  return np.asarray(jax.jit(lambda m, *a: m(*a, rope_theta=THETA)[0])(model, *placed))


def square(model: Decoder, *arrays: jax.Array) -> jax.Array:
  return jnp.sum(jnp.square(model(*arrays, rope_theta=THETA)[0]))


def segment(heads: int, kv_heads: int, head_width: int, ffn: int, **rest: int) -> SegmentConfig:
  """A segment of Llama's blocks, as `layers` and `repeat` say."""
  attention = resolve_model(
    families.llama(
      **dict(vocab_size=8, width=32, max_length=8, tied=True, eps=1e-5, init=normal(0.1)),
      **dict(heads=heads, kv_heads=kv_heads, head_width=head_width, ffn=ffn, **rest),
    )
  )
  return attention.segments[0]


def built_of(config: Config, *segments: SegmentConfig) -> Config:
  """The config with other segments, whose heads are rotated whole."""
  rotary = dataclasses.replace(config.model.positions, width=segments[0].attention.head_width)
  return edited(config, segments=segments, positions=rotary)


SHAPES = {
  "fox": segment(4, 2, 8, 64, layers=2),
  "mha": segment(4, 4, 8, 32, layers=1),
  "mqa_wide": segment(4, 1, 16, 32, layers=1),
  "repeated": segment(4, 2, 8, 32, layers=2, repeat=2),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tied", [True, False])
def test_equals_the_equations(enter_mesh: Any, shape: str, tied: bool) -> None:
  config = built_of(small.config(), SHAPES[shape])
  embedding = dataclasses.replace(config.model.embedding, tied=tied)
  config = edited(config, embedding=embedding)
  tokens, segments, positions = rows()
  with enter_mesh((1, 1, 1, 1)):
    model = build(config)
    ours = forward(model, tokens, segments, positions)
  for b in range(2):
    expected = reference_decoder.hidden_states(model, tokens[b], segments[b], positions[b], THETA)
    np.testing.assert_allclose(ours[b], expected, atol=10 * TOLERANCE, rtol=10 * TOLERANCE)


def test_two_segments_of_blocks_equal_the_equations(enter_mesh: Any) -> None:
  config = built_of(small.config(), SHAPES["fox"], SHAPES["mha"])
  tokens, segments, positions = rows()
  with enter_mesh((1, 1, 1, 1)):
    model = build(config)
    ours = forward(model, tokens, segments, positions)
  expected = reference_decoder.hidden_states(model, tokens[0], segments[0], positions[0], THETA)
  np.testing.assert_allclose(ours[0], expected, atol=10 * TOLERANCE, rtol=10 * TOLERANCE)


@pytest.mark.parametrize("name", ["openelm:270m", "pangu_pi:1b", "mobilellm:125m_ls"])
def test_models_that_no_library_has_equal_the_equations(enter_mesh: Any, name: str) -> None:
  """Forward in float32 against float64, and the gradient against central differences of it."""
  config = shrunken.config(name)
  tokens, segments, positions = rows()
  with enter_mesh((1, 1, 1, 1)):
    model = build(config)
    placed = [sharding.place_rows(x) for x in (tokens, segments, positions)]
    direction = jax.tree.map(
      lambda x: jax.random.normal(
        jax.random.key(x.size), x.shape, out_sharding=jax.typeof(x).sharding
      ),
      model,
    )

    ours_size = tokens.shape[1] * config.model.width

    def loss(model: Decoder) -> tuple[jax.Array, jax.Array]:
      hidden_BSD, _ = model(*placed, rope_theta=THETA)
      first_B11 = (jnp.arange(2) == 0)[:, None, None]
      return jnp.sum(jnp.square(hidden_BSD - 1.0) * first_B11) / ours_size, hidden_BSD

    (_, ours), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
  slope = sum(
    jax.tree.leaves(jax.tree.map(lambda g, d: float(jnp.sum(g * d)), gradient, direction))
  )

  def expected(step: float) -> np.ndarray:
    moved = jax.tree.map(
      lambda x, d: np.asarray(x, np.float64) + step * np.asarray(d, np.float64), model, direction
    )
    return reference_decoder.hidden_states(moved, tokens[0], segments[0], positions[0], THETA)

  np.testing.assert_allclose(ours[0], expected(0.0), atol=10 * TOLERANCE, rtol=10 * TOLERANCE)
  up, down = (np.mean((expected(step) - 1.0) ** 2) for step in (1e-5, -1e-5))
  # Central differences in float64 are exact to about 1e-8; float32 gradients to a few 1e-4.
  assert slope == pytest.approx((up - down) / 2e-5, rel=2e-3)


def test_gradient_reaches_earlier_tokens_of_the_same_document_only(enter_mesh: Any) -> None:
  config = small.config()
  tokens, segments, positions = rows()
  with enter_mesh((1, 1, 1, 1)):
    model = build(config)
    placed = [sharding.place_rows(x) for x in (tokens, segments, positions)]
    # Each position reads its own row of the table, so rows of the gradient are positions.
    ids = sharding.place_rows(np.arange(48, dtype=np.int32).reshape(2, 24))

    @jax.jit
    @jax.grad
    def gradient_of_one(model: Decoder, chosen_BS: jax.Array) -> jax.Array:
      hidden_BSD, _ = model(ids, *placed[1:], rope_theta=THETA)
      return jnp.sum(hidden_BSD * chosen_BS[..., None])

    for i in (0, 9, 10, 17):
      chosen_BS = np.zeros((2, 24), np.float32)
      chosen_BS[0, i] = 1
      gradient = np.asarray(gradient_of_one(model, sharding.place_rows(chosen_BS)).embed_VE[...])
      touched = np.flatnonzero(np.abs(gradient).sum(-1))
      first = 0 if i < 10 else 10
      assert touched.tolist() == list(range(first, i + 1))


def test_packed_documents_equal_documents_alone(enter_mesh: Any) -> None:
  tokens, segments, positions = rows()
  with enter_mesh((1, 1, 1, 1)):
    model = build(small.config())
    packed = forward(model, tokens, segments, positions)
    for start, stop in ((0, 10), (10, 24)):
      alone = forward(
        model,
        np.repeat(tokens[:1, start:stop], 2, 0),
        np.ones((2, stop - start), np.int32),
        np.repeat(np.arange(stop - start, dtype=np.int32)[None], 2, 0),
      )
      np.testing.assert_allclose(alone[0], packed[0, start:stop], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("shape", ["fox", "repeated"])
def test_cached_pieces_equal_one_pass(enter_mesh: Any, shape: str) -> None:
  config = built_of(small.config(), SHAPES[shape])
  tokens, _, _ = rows()
  segments = np.ones_like(tokens)
  segments[1, :5] = 0  # padded on the left
  positions = np.maximum(np.cumsum(segments, 1) - 1, 0).astype(np.int32)
  with enter_mesh((1, 1, 1, 1)):
    model = build(config)
    whole = forward(model, tokens, segments, positions)
    cache = model.empty_cache(2, 30)
    pieces = []
    for start, stop in ((0, 7), (7, 8), (8, 9), (9, 24)):
      part = [sharding.place_rows(x[:, start:stop]) for x in (tokens, segments, positions)]
      hidden, cache = model(*part, rope_theta=THETA, cache=cache)
      pieces.append(np.asarray(hidden))
  assert int(cache.length) == 24
  np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.medium
def test_remat_changes_memory_not_gradients(enter_mesh: Any) -> None:
  tokens, segments, positions = rows()
  gradients = {}
  with enter_mesh((1, 1, 1, 1)):
    placed = [sharding.place_rows(x) for x in (tokens, segments, positions)]
    for remat in ("none", "dots", "block"):
      config = small.config()
      config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat=remat))
      gradients[remat] = jax.tree.leaves(jax.jit(jax.grad(square))(build(config), *placed))
  for remat in ("dots", "block"):
    for ours, plain in zip(gradients[remat], gradients["none"], strict=True):
      np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4 * float(np.abs(plain).max()))


@pytest.mark.medium
@pytest.mark.parametrize("mesh", [(1, 2, 1, 1), (2, 1, 1, 1), (1, 1, 1, 2), (1, 2, 1, 4)])
def test_sharded_equals_single_device(enter_mesh: Any, mesh: tuple[int, ...]) -> None:
  """With tensor 4 and two key/value heads each pair of devices shares one head."""
  tokens, segments, positions = rows()
  results = []
  for shape in ((1, 1, 1, 1), mesh):
    with enter_mesh(shape):
      model = build(small.config())
      placed = [sharding.place_rows(x) for x in (tokens, segments, positions)]
      value, gradient = jax.jit(jax.value_and_grad(square))(model, *placed)
      results.append([np.asarray(x) for x in jax.tree.leaves((value, gradient))])
  for single, sharded in zip(*results, strict=True):
    # Only the order of float32 sums differs.
    np.testing.assert_allclose(sharded, single, rtol=1e-4, atol=1e-5 * float(np.abs(single).max()))


@pytest.mark.medium
def test_initial_weights_do_not_depend_on_the_mesh(enter_mesh: Any) -> None:
  weights = []
  for shape in ((1, 1, 1, 1), (1, 2, 1, 4)):
    with enter_mesh(shape):
      weights.append([np.asarray(x) for x in jax.tree.leaves(build(small.config(), False))])
  for a, b in zip(*weights, strict=True):
    np.testing.assert_array_equal(a, b)


def test_every_leaf_is_a_param_with_a_shape_suffix(enter_mesh: Any) -> None:
  with enter_mesh((1, 1, 1, 1)):
    model = build(small.config(), False)
  leaves = jax.tree_util.tree_leaves_with_path(model)
  assert len(leaves) == 2 + 9  # table, final norm; q k v out, gate up down, two norms
  assert all(isinstance(leaf, jax.Array) for _, leaf in leaves)
  names = [next(k.name for k in reversed(path) if k.name != "value") for path, _ in leaves]
  assert all(name.rpartition("_")[2].isupper() for name in names)
