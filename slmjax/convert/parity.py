"""Whether an export computes what the checkpoint does, by transformers' own code.

The only place that needs torch and transformers, which are no part of the core: they are imported
by name when they are there.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from slmjax import sharding
from slmjax.config import ComputeConfig
from slmjax.kernels import capping
from slmjax.loaded import read_decoder
from slmjax.model.decoder import Decoder
from slmjax.model_config import ModelConfig
from slmjax.parameters import parameters

if TYPE_CHECKING:
  from slmjax.convert.export import Exportable

# Both models are in memory at once, theirs in float32: above this many parameters, no comparison.
MAX_PARAMETERS = 1_500_000_000

ROWS, LENGTH = 2, 64


def compare(what: Exportable, run: Path, step: int, folder: Path) -> dict[str, Any]:
  """Their logits against ours in float32, on fixed random tokens; `line` says it in one line.

  Returns:
    max_abs_logit_error, argmax_agreement (a fraction of positions), kl (the mean over positions of
    the divergence of ours from theirs, in nats); or `skipped` with the reason.
  """
  reason = _why_not(what)
  if reason:
    return {"skipped": reason, "line": f"parity: not compared, {reason}"}
  length = min(LENGTH, what.model.max_length)
  tokens = np.random.default_rng(0).integers(0, what.model.vocab_size, (ROWS, length))
  theirs = _their_logits(folder, tokens)
  ours = our_logits(load(what.model, what.param_dtype, run, step), tokens, what.rope_theta)
  log_p, log_q = _log_softmax(theirs), _log_softmax(ours)
  error = float(np.max(np.abs(theirs - ours)))
  agreement = float(np.mean(theirs.argmax(-1) == ours.argmax(-1)))
  divergence = float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)))
  return {
    "max_abs_logit_error": error,
    "argmax_agreement": agreement,
    "kl": divergence,
    "tokens": int(tokens.size),
    "line": f"parity with transformers over {tokens.size} random tokens in float32: "
    f"max |logit error| {error:.2e}, argmax agrees on {agreement:.1%}, KL {divergence:.2e}",
  }


def _why_not(what: Exportable) -> str | None:
  for package in ("torch", "transformers"):
    if importlib.util.find_spec(package) is None:
      return f"{package} is not installed"
  if not what.family.in_transformers:
    return f"transformers has no class for {what.family.model_type}"
  count = parameters(what.model)
  if count > MAX_PARAMETERS:
    return f"{count:,} parameters are more than the {MAX_PARAMETERS:,} that it loads twice"
  return None


def load(model: ModelConfig, param_dtype: str, run: Path, step: int) -> Decoder:
  """A checkpoint's model, to compute in float32 on one device."""
  mesh = sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])
  compute = ComputeConfig(
    param_dtype="bfloat16" if param_dtype == "bfloat16" else "float32",
    compute_dtype="float32",
    remat="none",
    attention="auto",
    cross_entropy="auto",
  )
  return read_decoder(run, step, model, compute, mesh)


def our_logits(model: Decoder, tokens: np.ndarray, rope_theta: float | None) -> np.ndarray:
  """Logits [B, S, V] in float32 for token ids [B, S], each row one document."""
  mesh = sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])
  # Without it accelerators round the factors of float32 products.
  with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
    ids = jnp.asarray(tokens, jnp.int32)
    return np.asarray(jax.jit(logits, static_argnums=2)(model, ids, rope_theta))


def logits(model: Decoder, tokens_BS: jax.Array, rope_theta: float | None) -> jax.Array:
  """The same, to be traced."""
  tokens_BS = jax.reshard(tokens_BS, model.specs.tokens_BS)
  positions_BS = jnp.zeros_like(tokens_BS) + jnp.arange(tokens_BS.shape[1])
  hidden_BSE, _ = model(tokens_BS, jnp.ones_like(tokens_BS), positions_BS, rope_theta=rope_theta)
  whole_BSE, table_VE = (jax.reshard(x, jax.P()) for x in (hidden_BSE, model.output_VE))
  logits_BSV = whole_BSE @ table_VE.astype(whole_BSE.dtype).T
  return capping.cap(logits_BSV, model.model.logits.softcap)


def _their_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
  torch = importlib.import_module("torch")
  transformers = importlib.import_module("transformers")
  transformers.utils.logging.disable_progress_bar()
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
  )
  model.eval()
  with torch.no_grad():
    return model(torch.from_numpy(tokens), use_cache=False).logits.float().numpy()


def _log_softmax(logits: np.ndarray) -> np.ndarray:
  wide = logits.astype(np.float64)
  wide = wide - wide.max(-1, keepdims=True)
  return wide - np.log(np.exp(wide).sum(-1, keepdims=True))
