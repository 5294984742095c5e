"""Cached generation for every kind of attention and position: equal to the full forward at every
position, alone or among others; and what the cache holds."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import sharding
from slmjax.config import Config
from slmjax.generate import Sampling, generate
from slmjax.model.attention import KeyValues
from slmjax.model.decoder import Decoder
from slmjax.model.latent_attention import Latents
from tests import shrunken, small
from tests.test_decoder import build

KINDS = {
  "grouped-query": "fox1",
  "multi-query": "gemma:2b",
  "learned positions": "gpt2:124m",
  "ALiBi": "bloom:560m",
  "parallel, partly rotary": "pythia:160m",
  "one window": "phi3:mini",
  "windows in turn, soft-caps": "gemma2:2b",
  "layers of different widths": "openelm:270m",
  "latent": "minicpm3:4b",
  "repeated blocks": "mobilellm:125m_ls",
  "RWKV": "rwkv4:169m",
}
PROMPTS = (6, 1, 3)
NEW = 6
LENGTHS = tuple(length + NEW for length in PROMPTS)
PIECE = 5  # columns that a cached forward gets in one piece: of the second row all are padding
# float32 sums of the same terms in another order, through two layers, beside the largest value.
TOLERANCE = 2e-5


@functools.cache
def opened(kind: str) -> tuple[Config, Decoder]:
  config = shrunken.config(KINDS[kind])
  with mesh():
    return config, build(config)


def mesh() -> contextlib.AbstractContextManager:
  return jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1]))


def greedy(kind: str, prompts: list[list[int]]) -> list[list[int]]:
  config, model = opened(kind)
  with mesh():
    return generate(
      model,
      prompts,
      NEW,
      rope_theta=config.stages[0].rope_theta,
      stop_ids=(),
      sampling=Sampling(temperature=0.0, top_k=0, top_p=1.0),
      seed=0,
    )


@functools.cache
def texts(kind: str) -> list[list[int]]:
  """Random prompts of different lengths with their continuation."""
  rng = np.random.default_rng(0)
  prompts = [rng.integers(0, small.VOCAB, length).tolist() for length in PROMPTS]
  return [[*p, *new] for p, new in zip(prompts, greedy(kind, prompts), strict=True)]


def rows(texts: list[list[int]], *, left: bool) -> list[np.ndarray]:
  """Tokens, segments and positions of texts, padded on the left or on the right."""
  longest = max(map(len, texts))
  arrays = [np.zeros((len(texts), longest), np.int32) for _ in range(3)]
  for row, ids in enumerate(texts):
    first = longest - len(ids) if left else 0
    for array, values in zip(arrays, (ids, 1, np.arange(len(ids))), strict=True):
      array[row, first : first + len(ids)] = values
  return arrays


@functools.partial(jax.jit, static_argnames="theta")
def full_and_cached(
  model: Decoder, full: list[jax.Array], cached: list[jax.Array], theta: float | None
) -> tuple[jax.Array, ...]:
  """Hidden states of the full forward; of the prompt in one piece; and token by token after it,
  from the stacked blocks and from `one_by_one`."""
  hidden_BSD, _ = model(*full, rope_theta=theta)
  B, S = cached[0].shape
  prompt = [x[:, :PIECE] for x in cached]
  prompt_BSD, cache = model(*prompt, rope_theta=theta, cache=model.empty_cache(B, S))
  assert cache is not None
  later = [jnp.moveaxis(sharding.whole(x)[:, PIECE:], 1, 0) for x in cached]
  layers, slots = model.one_by_one(cache)

  def step(caches: Any, column: list[jax.Array]) -> Any:
    arrays = [sharding.as_rows(x[:, None]) for x in column]
    stacked_B1D, scanned = model(*arrays, rope_theta=theta, cache=caches[0])
    hidden_B1D, looped = model(*arrays, rope_theta=theta, cache=caches[1], layers=layers)
    return (scanned, looped), (stacked_B1D[:, 0], hidden_B1D[:, 0])

  _, steps = jax.lax.scan(step, (cache, slots), later)
  return hidden_BSD, prompt_BSD, *(jnp.moveaxis(x, 0, 1) for x in steps)


@functools.cache
def hidden(kind: str) -> tuple[np.ndarray, ...]:
  """`full_and_cached` of the kind's texts: padded on the right, and on the left for the cache."""
  config, model = opened(kind)
  with mesh():
    placed = [[*map(sharding.place_rows, rows(texts(kind), left=left))] for left in (False, True)]
    arrays = full_and_cached(model, *placed, config.stages[0].rope_theta)
  return tuple(map(np.asarray, arrays))


@pytest.mark.medium
@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_the_full_forward_at_every_position(kind: str) -> None:
  full, prompt, scanned, looped = hidden(kind)
  scale = np.abs(full).max()
  for steps in (scanned, looped):
    cached = np.concatenate([prompt, steps], axis=1)
    for row, length in enumerate(LENGTHS):
      first = max(LENGTHS) - length
      np.testing.assert_allclose(cached[row, first:], full[row, :length], atol=TOLERANCE * scale)


@pytest.mark.medium
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_takes_the_likeliest_together_and_alone(kind: str) -> None:
  """Alone is with itself: the same compiled program serves."""
  model, full = opened(kind)[1], hidden(kind)[0]
  table = np.asarray(model.output_VE)
  for row, (ids, start) in enumerate(zip(texts(kind), PROMPTS, strict=True)):
    likeliest = np.argmax(full[row, start - 1 : start + NEW - 1] @ table.T, axis=-1)
    assert ids[start:] == likeliest.tolist()
    assert greedy(kind, [ids[:start]] * len(PROMPTS)) == [ids[start:]] * len(PROMPTS)


def test_a_latent_cache_holds_the_latent_and_the_rotated_key_alone() -> None:
  config, model = opened("latent")
  (segment,) = config.model.segments
  with mesh():
    cache = jax.eval_shape(lambda: model.empty_cache(3, 20))
  ((kept, nothing),) = cache.layers
  assert isinstance(kept, Latents)
  assert nothing is None
  shapes = [x.shape for x in jax.tree.leaves(kept)]
  latent, rotated = segment.attention.latent_width, config.model.positions.width
  assert shapes == [(2, 1, 3, 20, latent), (2, 1, 3, 20, rotated)]
  # Per token and layer, against keys and values of every head.
  heads = segment.attention.heads
  widths = segment.attention.content_width + rotated + segment.attention.value_width
  assert sum(shape[-1] for shape in shapes) == latent + rotated < heads * widths


def test_a_repeated_block_has_a_slot_for_each_pass() -> None:
  config, model = opened("repeated blocks")
  (segment,) = config.model.segments
  assert segment.repeat == 2
  with mesh():
    cache = jax.eval_shape(lambda: model.empty_cache(3, 20))
  ((kept, _),) = cache.layers
  assert isinstance(kept, KeyValues)
  heads = segment.attention
  assert kept.k_BTKH.shape == (segment.layers, 2, 3, 20, heads.kv_heads, heads.head_width)


def test_states_of_rwkv_do_not_grow_with_the_text() -> None:
  _, model = opened("RWKV")
  with mesh():
    sizes = [
      sum(x.size for x in jax.tree.leaves(model.empty_cache(3, n).layers)) for n in (20, 200)
    ]
  assert sizes[0] == sizes[1]
