"""Sampling with a key/value cache.

  python -m slmjax.generate --checkpoint=runs/tiny --prompt="def main(" --prompt="The" --tokens=80
  python -m slmjax.generate --checkpoint=runs/tiny --prompt="import" --temperature=0

Prompts of different lengths are sampled together: they are padded on the left to a common power of
two, so that one compilation serves every length up to it.

Letters: B prompts, S prompt positions, V vocabulary, D model width.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from slmjax import sharding
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import UserError, run_command
from slmjax.kernels import capping
from slmjax.loaded import Loaded, add_checkpoint_arguments
from slmjax.model.decoder import Cache, Decoder
from slmjax.model_config import LearnedPositions, RotaryPositions

MIN_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How the next token is drawn. Temperature 0 takes the likeliest; `top_k` 0 and `top_p` 1 leave
  the distribution whole. `top_p` is nucleus sampling (arXiv 1904.09751)."""

  temperature: float
  top_k: int
  top_p: float

  def __post_init__(self) -> None:
    if self.temperature < 0:
      raise UserError(f"--temperature is {self.temperature}; it must not be negative")
    if self.top_k < 0:
      raise UserError(f"--top_k is {self.top_k}; it must not be negative (0 keeps all)")
    if not 0 < self.top_p <= 1:
      raise UserError(f"--top_p is {self.top_p}; it must lie in (0, 1]")


def generate(
  model: Decoder,
  prompts: Sequence[Sequence[int]],
  tokens: int,
  *,
  rope_theta: float | None,
  stop_ids: Sequence[int],
  sampling: Sampling,
  seed: int,
) -> list[list[int]]:
  """Continues each prompt by up to `tokens` tokens, to the first stop id (not returned).

  Args:
    model: on the current mesh, whose data shards must divide the number of prompts.
    prompts: token ids, at least one each, with whatever stands before a document in training.
    rope_theta: the base the model was trained with.

  Raises:
    UserError: prompt and continuation do not fit into the model's positions.
  """
  longest = max(len(prompt) for prompt in prompts)
  # ALiBi and RWKV go on for ever.
  limited = isinstance(model.model.positions, RotaryPositions | LearnedPositions)
  if limited and longest + tokens > model.model.max_length:
    raise UserError(
      f"a prompt of {longest} tokens and {tokens} more do not fit into the model's "
      f"{model.model.max_length} positions; shorten one of them"
    )
  bucket = max(MIN_BUCKET, 1 << (longest - 1).bit_length())
  tokens_BS, segments_BS, positions_BS = (
    np.zeros((len(prompts), bucket), np.int32) for _ in range(3)
  )
  for row, prompt in enumerate(prompts):
    first = bucket - len(prompt)
    tokens_BS[row, first:] = prompt
    segments_BS[row, first:] = 1
    positions_BS[row, first:] = np.arange(len(prompt))
  drawn_BS = np.asarray(
    _sample(
      model,
      *(sharding.place_rows(x) for x in (tokens_BS, segments_BS, positions_BS)),
      np.asarray([len(prompt) for prompt in prompts], np.int32),
      jax.random.key(seed),
      np.asarray(stop_ids, np.int32),
      tokens=tokens,
      rope_theta=rope_theta,
      sampling=sampling,
    )
  )
  stops = set(stop_ids)
  return [_before_stop(row, stops) for row in drawn_BS.tolist()]


def _before_stop(row: list[int], stops: set[int]) -> list[int]:
  return row[: next((i for i, token in enumerate(row) if token in stops), len(row))]


@jax.jit(static_argnames=("tokens", "rope_theta", "sampling"))
def _sample(
  model: Decoder,
  tokens_BS: jax.Array,
  segments_BS: jax.Array,
  positions_BS: jax.Array,
  lengths_B: jax.Array,
  key: jax.Array,
  stop_ids: jax.Array,
  *,
  tokens: int,
  rope_theta: float | None,
  sampling: Sampling,
) -> jax.Array:
  """Prompt in one pass, then one token at a time until all rows have stopped: [B, tokens]."""
  rows, length = tokens_BS.shape
  hidden_BSD, cache = model(
    tokens_BS,
    segments_BS,
    positions_BS,
    rope_theta=rope_theta,
    cache=model.empty_cache(rows, length + tokens),
  )
  assert cache is not None
  table_VE = sharding.whole(model.output_VE.astype(hidden_BSD.dtype))
  layers, cache = model.one_by_one(cache)
  first_B = _draw(_logits(model, table_VE, hidden_BSD), jax.random.fold_in(key, 0), sampling)
  drawn_BS = jnp.zeros((rows, tokens), jnp.int32).at[:, 0].set(first_B)
  done_B = jnp.isin(first_B, stop_ids)

  def unfinished(carry: tuple) -> jax.Array:
    i, _, _, _, done_B = carry
    return (i < tokens) & ~jnp.all(done_B)

  def extend(carry: tuple[jax.Array, jax.Array, jax.Array, Cache, jax.Array]) -> tuple:
    i, drawn_BS, token_B, cache, done_B = carry
    position_B = lengths_B + i - 1
    arrays_B1 = (token_B, jnp.ones_like(token_B), position_B)
    hidden_B1D, longer = model(
      *(sharding.as_rows(x[:, None]) for x in arrays_B1),
      rope_theta=rope_theta,
      cache=cache,
      layers=layers,
    )
    token_B = _draw(_logits(model, table_VE, hidden_B1D), jax.random.fold_in(key, i), sampling)
    drawn_BS = jax.lax.dynamic_update_slice_in_dim(drawn_BS, token_B[:, None], i, axis=1)
    assert longer is not None
    return i + 1, drawn_BS, token_B, longer, done_B | jnp.isin(token_B, stop_ids)

  carry = (jnp.ones((), jnp.int32), drawn_BS, first_B, cache, done_B)
  return jax.lax.while_loop(unfinished, extend, carry)[1]


def _logits(model: Decoder, table_VE: jax.Array, hidden_BSE: jax.Array) -> jax.Array:
  """Scores of the token after the last position, [B, V] in float32, whole on each device."""
  last_BE = sharding.whole(hidden_BSE)[:, -1]
  logits_BV = jnp.einsum("be,ve->bv", last_BE, table_VE, preferred_element_type=jnp.float32)
  return capping.cap(logits_BV, model.model.logits.softcap)


def _draw(logits_BV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
  """One token per row, int32[B]."""
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BV = logits_BV / sampling.temperature
  if sampling.top_k:
    kth_B1 = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
    logits_BV = jnp.where(logits_BV < kth_B1, -jnp.inf, logits_BV)
  if sampling.top_p < 1:
    sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
    mass_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1)
    # The smallest set of tokens whose mass reaches top_p: those before it is reached, and one.
    kept_B = jnp.sum(mass_BV < sampling.top_p, axis=-1, keepdims=True)
    logits_BV = jnp.where(
      logits_BV < jnp.take_along_axis(sorted_BV, kept_B, axis=-1), -jnp.inf, logits_BV
    )
  return jax.random.categorical(key, logits_BV, axis=-1).astype(jnp.int32)


def continuation(tokenizer: Tokenizer, prompt: Sequence[int], ids: Sequence[int]) -> str:
  """The text that `ids` add to a prompt: alone, some tokenizers would drop its first space."""
  before, whole = tokenizer.decode([*prompt]), tokenizer.decode([*prompt, *ids])
  return whole[len(before) :] if whole.startswith(before) else tokenizer.decode([*ids])


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m slmjax.generate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add_checkpoint_arguments(parser)
  parser.add_argument("--prompt", action="append", help="text to continue; repeat it for more")
  parser.add_argument("--tokens", type=int, default=100, help="tokens to add at most (100)")
  parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (0.8)")
  parser.add_argument("--top_k", type=int, default=0, help="draw among so many; 0 is all (0)")
  parser.add_argument("--top_p", type=float, default=0.95, help="draw among this mass (0.95)")
  parser.add_argument("--seed", type=int, default=0, help="seed of the draws (0)")
  args = parser.parse_args()
  if args.tokens < 1:
    raise UserError(f"--tokens is {args.tokens}; it must be at least 1")
  texts_in = args.prompt or [""]
  sampling = Sampling(args.temperature, args.top_k, args.top_p)
  run = Loaded.open(args.checkpoint, args.step)
  prompts = [run.encode(text) for text in texts_in]
  if not all(prompts):
    raise UserError("this model has no token that begins a text; give --prompt=TEXT, not empty")
  rows = sharding.data_shards(run.mesh)
  padding = [prompts[0]] * (-len(prompts) % rows)
  with jax.set_mesh(run.mesh):
    outputs = generate(
      run.model,
      [*prompts, *padding],
      args.tokens,
      rope_theta=run.rope_theta,
      stop_ids=run.stop_ids,
      sampling=sampling,
      seed=args.seed,
    )
  pairs = zip(prompts, outputs, strict=False)  # without the padding
  texts = [continuation(run.tokenizer, prompt, ids) for prompt, ids in pairs]
  if args.json:
    samples = [{"prompt": p, "text": t} for p, t in zip(texts_in, texts, strict=True)]
    print(json.dumps({"checkpoint": str(args.checkpoint), "step": run.step, "samples": samples}))
    return
  for prompt, text in zip(texts_in, texts, strict=True):
    print(f"--- step {run.step}\n{prompt}{text}")


if __name__ == "__main__":
  run_command(main)
