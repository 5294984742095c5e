"""Every family against transformers' own code: logits, every gradient, and the way back.

Models are small and no weight has its initial value, so that a norm or bias that is left out, or in
the wrong place, is seen. Settings are chosen so that a trap would show: fewer key/value heads than
heads, head widths other than width / heads, windows shorter than the sequence, positions beyond the
original length of a stretched rotary embedding.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from slmjax import checkpoint, sharding
from slmjax.convert import export, import_, names, parity, registry

pytestmark = pytest.mark.medium

VOCAB, ROWS, LENGTH = 101, 2, 18

LLAMA = dict(
  vocab_size=VOCAB,
  hidden_size=48,
  intermediate_size=80,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=64,
  pad_token_id=None,
)
NEOX = {name: v for name, v in LLAMA.items() if name != "num_key_value_heads"}
GPT = dict(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_positions=32)
OPT = dict(
  vocab_size=VOCAB,
  hidden_size=48,
  ffn_dim=80,
  num_hidden_layers=2,
  num_attention_heads=4,
  max_position_embeddings=32,
  pad_token_id=None,
  dropout=0.0,
)
LATENT = dict(
  LLAMA,
  num_key_value_heads=4,
  q_lora_rank=20,
  kv_lora_rank=24,
  qk_nope_head_dim=16,
  qk_rope_head_dim=8,
  v_head_dim=12,
)
LONGROPE = dict(
  rope_type="longrope",
  rope_theta=10000.0,
  short_factor=[1.0, 1.1, 1.3, 1.7],
  long_factor=[1.0, 1.5, 2.5, 4.0],
  original_max_position_embeddings=16,
)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
  "llama": ("Llama", LLAMA),
  "llama 3, biases, wide heads, tied": (
    "Llama",
    dict(
      LLAMA,
      head_dim=16,
      attention_bias=True,
      mlp_bias=True,
      tie_word_embeddings=True,
      rope_parameters=dict(
        rope_type="llama3",
        rope_theta=500.0,
        factor=4.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
      ),
    ),
  ),
  "llama, yarn": (
    "Llama",
    dict(
      LLAMA,
      hidden_act="gelu",
      rope_parameters=dict(
        rope_type="yarn",
        rope_theta=100.0,
        factor=4.0,
        beta_fast=2.0,
        beta_slow=0.5,
        original_max_position_embeddings=16,
      ),
    ),
  ),
  "mistral": ("Mistral", dict(LLAMA, sliding_window=5, head_dim=16)),
  "qwen2": (
    "Qwen2",
    dict(
      LLAMA, num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
  ),
  "qwen3": ("Qwen3", dict(LLAMA, head_dim=16, attention_bias=True, tie_word_embeddings=True)),
  "gemma": ("Gemma", dict(LLAMA, num_key_value_heads=1, head_dim=16)),
  "gemma2": (
    "Gemma2",
    dict(
      LLAMA,
      num_hidden_layers=3,
      head_dim=16,
      sliding_window=5,
      query_pre_attn_scalar=7,
      attn_logit_softcapping=2.0,
      final_logit_softcapping=3.0,
    ),
  ),
  "olmo": ("Olmo", LLAMA),
  "olmo2": ("Olmo2", LLAMA),
  "stablelm": ("StableLm", dict(LLAMA, use_qkv_bias=True, partial_rotary_factor=0.34)),
  "stablelm, parallel": (
    "StableLm",
    dict(LLAMA, use_parallel_residual=True, partial_rotary_factor=0.34),
  ),
  "phi3": ("Phi3", dict(LLAMA, sliding_window=5)),
  "phi3, longrope over a part": (
    "Phi3",
    dict(
      LLAMA,
      original_max_position_embeddings=16,
      rope_parameters=dict(LONGROPE, partial_rotary_factor=0.67),
    ),
  ),
  "gpt2": ("GPT2", GPT),
  "gpt2, cerebras": (
    "GPT2",
    dict(GPT, activation_function="gelu", n_inner=80, scale_attn_weights=False),
  ),
  "gpt_neo": (
    "GPTNeo",
    dict(
      vocab_size=VOCAB,
      hidden_size=48,
      num_layers=4,
      num_heads=4,
      max_position_embeddings=32,
      attention_types=[[["global", "local"], 2]],
      window_size=5,
    ),
  ),
  "opt": ("OPT", dict(OPT)),
  "opt, 350m": (
    "OPT",
    dict(OPT, do_layer_norm_before=False, word_embed_proj_dim=32, activation_function="gelu"),
  ),
  "gpt_neox": ("GPTNeoX", dict(NEOX, rotary_pct=0.34)),
  "gpt_neox, sequential": (
    "GPTNeoX",
    dict(
      NEOX,
      rotary_pct=1.0,
      rotary_emb_base=500.0,
      use_parallel_residual=False,
      attention_bias=False,
      tie_word_embeddings=True,
    ),
  ),
  "bloom": ("Bloom", dict(vocab_size=VOCAB, hidden_size=48, n_layer=2, n_head=3)),
  "rwkv": (
    "Rwkv",
    dict(
      vocab_size=VOCAB,
      hidden_size=48,
      attention_hidden_size=32,
      intermediate_size=80,
      num_hidden_layers=2,
      context_length=32,
      use_cache=False,
    ),
  ),
  "minicpm3, longrope below its length": (
    "MiniCPM3",
    dict(LATENT, rope_parameters=dict(LONGROPE, original_max_position_embeddings=32)),
  ),
  "deepseek_v2, yarn": (
    "DeepseekV2",
    dict(
      LATENT,
      first_k_dense_replace=2,
      rope_parameters=dict(
        rope_type="yarn",
        rope_theta=100.0,
        factor=4.0,
        beta_fast=2.0,
        beta_slow=0.5,
        mscale=0.9,
        mscale_all_dim=0.7,
        original_max_position_embeddings=16,
      ),
    ),
  ),
  "deepseek_v2, plain queries": (
    "DeepseekV2",
    dict(LATENT, first_k_dense_replace=2, q_lora_rank=None),
  ),
}


def original(kind: str, settings: dict[str, Any], folder: Path) -> Any:
  """A model of transformers with every weight moved from where it began, saved."""
  config_class = getattr(transformers, f"{kind}Config")
  head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
  torch.manual_seed(0)
  config = config_class(**settings)
  config._attn_implementation = "eager"
  model = getattr(transformers, f"{kind}{head}")(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  model.save_pretrained(folder)
  return model


def our_gradients(
  model: Any, tokens: np.ndarray, theta: float | None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Logits, and the gradient of the mean loss by our names."""

  def loss(model: Any, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits = parity.logits(model, ids, theta)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)
    return -jnp.mean(chosen), logits

  with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
    # Compiled in half the time, for a run of some milliseconds.
    quickly = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    step = jax.jit(jax.grad(loss, has_aux=True), compiler_options=quickly)
    gradients, logits = step(model, jnp.asarray(tokens, jnp.int32))
  return np.asarray(logits), checkpoint.by_name(gradients)


@pytest.mark.parametrize("case", CASES)
def test_logits_gradients_and_the_way_back(case: str, tmp_path: Path) -> None:
  kind, settings = CASES[case]
  theirs = original(kind, settings, tmp_path / "original")
  import_.import_folder(tmp_path / "original", tmp_path / "run", ())
  what = export.exportable(tmp_path / "run", 0)
  ours = parity.load(what.model, what.param_dtype, tmp_path / "run", 0)
  tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH))

  logits, gradients = our_gradients(ours, tokens, what.rope_theta)
  ids = torch.from_numpy(tokens)
  expected = theirs(ids, use_cache=False).logits
  # Float32, sums in another order: errors are some 1e-6 of logits of order 1 to 10.
  np.testing.assert_allclose(logits, expected.detach().numpy(), rtol=0, atol=1e-4)

  loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
  loss.backward()
  gradient_of = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
  shapes = {name: g.shape for name, g in gradients.items()}
  tensors = names.lay_out(what.family.names, what.model, shapes)
  renamed = {new: old for old, new in what.family.names.renamed.items()}
  for tensor in tensors.values():
    wanted = gradient_of.pop(tensor.name if tensor.name in gradient_of else renamed[tensor.name])
    for part in tensor.parts:
      mine = np.asarray(gradients[part.array])
      mine = mine if part.layer is None else mine[part.layer]
      slice_ = tensor.read(part, wanted)
      error, size = np.max(np.abs(mine - slice_)), np.max(np.abs(slice_))
      if part.array.endswith("k_bias_KH") and what.rope_theta is None:
        # It moves all scores of a query alike: its gradient is zero, and what is left is rounding.
        assert max(error, size) < 1e-6
        continue
      assert size > 1e-6, part.array
      assert error <= 1e-3 * size, (part.array, part.layer, error, size)
  assert not gradient_of

  export.export_folder(tmp_path / "run", tmp_path / "back", None, 5.0, parity=False)
  again = type(theirs).from_pretrained(tmp_path / "back", attn_implementation="eager")
  for name, weight in theirs.state_dict().items():
    assert torch.equal(weight, again.state_dict()[name]), name
  with torch.no_grad():
    assert torch.equal(again(ids, use_cache=False).logits, expected)

  # The same model as one of our own, whose config.json is ours to write.
  family, config = registry.describe(what.model, what.rope_theta)
  mine = dataclasses.replace(what, family=family, config=config)
  (tmp_path / "own").mkdir()
  export.write_model(mine, tmp_path / "run", 0, tmp_path / "own", 10**9)
  own = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "own", attn_implementation="eager"
  )
  with torch.no_grad():
    error = torch.max(torch.abs(own(ids, use_cache=False).logits - expected))
  assert error < 1e-4, family.model_type


def test_the_report_of_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """It is near zero for an export, and shows a weight that is not the checkpoint's."""
  original(*CASES["llama"], tmp_path / "original")
  import_.import_folder(tmp_path / "original", tmp_path / "run", ())
  done = export.export_folder(tmp_path / "run", tmp_path / "back", None, 5.0, parity=True)
  assert json.loads((tmp_path / "back" / "parity.json").read_text()) == done["parity"]
  assert done["parity"]["max_abs_logit_error"] < 1e-4
  assert done["parity"]["argmax_agreement"] == 1.0
  assert abs(done["parity"]["kl"]) < 1e-6

  what = export.exportable(tmp_path / "run", 0)
  spoilt = original("Llama", dict(CASES["llama"][1], rope_theta=20.0), tmp_path / "spoilt")
  with torch.no_grad():
    spoilt.lm_head.weight.mul_(2.0)
  spoilt.save_pretrained(tmp_path / "spoilt")
  wrong = parity.compare(what, tmp_path / "run", 0, tmp_path / "spoilt")
  assert wrong["max_abs_logit_error"] > 0.1
  assert wrong["kl"] > 0.01

  monkeypatch.setattr(parity, "MAX_PARAMETERS", 1000)
  skipped = parity.compare(what, tmp_path / "run", 0, tmp_path / "back")
  assert skipped["line"].startswith("parity: not compared")
  assert "1,000" in skipped["skipped"]
  theirs = dataclasses.replace(what, family=registry.FAMILIES["openelm"])
  skipped = parity.compare(theirs, tmp_path / "run", 0, tmp_path / "back")
  assert skipped["skipped"] == "transformers has no class for openelm"
