"""Generation: cached equals uncached, prompts do not see one another, draws follow the settings."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import generate as generation
from slmjax import sharding
from slmjax.errors import UserError
from slmjax.generate import Sampling, generate
from slmjax.model.decoder import Decoder
from tests import small
from tests.test_decoder import build, forward

GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0)
PROMPTS = [[1, 5, 9], [1, 7, 30, 31, 32, 33, 40, 2], [1, 11]]
THETA = 10_000.0


@pytest.fixture(scope="module")
def model() -> Decoder:
  with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
    return build(small.config())


def run(model: Decoder, prompts: list[list[int]], tokens: int = 6, **changes: Any) -> Any:
  settings = {"rope_theta": THETA, "stop_ids": (), "sampling": GREEDY, "seed": 0, **changes}
  with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
    return generate(model, prompts, tokens, **settings)


@pytest.mark.medium
def test_greedy_equals_the_full_forward_token_by_token(model: Decoder) -> None:
  texts = [[*p, *new] for p, new in zip(PROMPTS, run(model, PROMPTS), strict=True)]
  padded = np.asarray([ids + [0] * (14 - len(ids)) for ids in texts], np.int32)
  positions = np.tile(np.arange(14, dtype=np.int32), (3, 1))
  with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
    hidden = forward(model, padded, np.ones_like(padded), positions)
  likeliest = np.argmax(hidden @ np.asarray(model.output_VE).T, axis=-1)
  for ids, prompt, row in zip(texts, PROMPTS, likeliest, strict=True):
    assert ids[len(prompt) :] == row[len(prompt) - 1 : len(ids) - 1].tolist()


def test_prompts_together_equal_prompts_alone(model: Decoder) -> None:
  assert run(model, PROMPTS) == [run(model, [prompt])[0] for prompt in PROMPTS]


def test_one_compilation_serves_a_bucket_of_lengths(model: Decoder) -> None:
  run(model, [[1] * 3])
  before = generation._sample._cache_size()
  run(model, [[1] * 16])
  assert generation._sample._cache_size() == before
  run(model, [[1] * 17])
  assert generation._sample._cache_size() == before + 1


def test_stops_at_a_stop_id_and_leaves_it_out(model: Decoder) -> None:
  whole = run(model, PROMPTS)[0]
  stop = whole[3]
  assert run(model, PROMPTS, stop_ids=(stop,))[0] == whole[: whole.index(stop)]


def test_too_long_for_the_model_is_refused(model: Decoder) -> None:
  with pytest.raises(UserError, match="3 tokens and 126 more do not fit into the model's 128"):
    run(model, [[1, 2, 3]], tokens=126)


@pytest.mark.parametrize(
  ("sampling", "allowed"),
  [
    (Sampling(1.0, 0, 1.0), {0, 1, 2, 3}),
    (Sampling(1.0, 2, 1.0), {0, 1}),
    (Sampling(1.0, 0, 0.6), {0, 1}),
    (Sampling(1.0, 0, 0.5), {0}),
    (Sampling(0.01, 0, 1.0), {0}),
  ],
)
def test_draws_keep_to_the_settings(sampling: Sampling, allowed: set[int]) -> None:
  """Token probabilities 0.5, 0.3, 0.15, 0.05; 400 draws miss the rarest with p < 1e-8."""
  logits_BV = jnp.log(jnp.tile(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]), (400, 1)))
  drawn = np.asarray(generation._draw(logits_BV, jax.random.key(0), sampling))
  assert set(drawn.tolist()) == allowed
  if sampling == Sampling(1.0, 0, 1.0):
    shares = np.bincount(drawn, minlength=4) / 400
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.1)  # four deviations


@pytest.mark.parametrize("wrong", [(-1.0, 0, 1.0), (1.0, -1, 1.0), (1.0, 0, 0.0), (1.0, 0, 1.5)])
def test_impossible_settings_are_refused(wrong: tuple) -> None:
  with pytest.raises(UserError, match="--t"):
    Sampling(*wrong)
