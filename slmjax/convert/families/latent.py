"""Latent attention: minicpm3, and deepseek_v2 where all its layers are dense."""

import math
from typing import Any

from slmjax import families
from slmjax.architecture import normal
from slmjax.convert.families.llama import GATED, NORMS, llama_names
from slmjax.convert.family import Family, NotThisFamily, Reading, with_activation
from slmjax.convert.fields import ACTIVATION_NAMES, Fields
from slmjax.convert.names import Table
from slmjax.convert.rope import Rope, write_rope
from slmjax.model_config import FeedForward, LatentAttention, ModelConfig, RotaryPositions

_LATENT: Table = {
  "self_attn.q_proj.weight": {"attention/q_DNQ": "NQ D"},
  "self_attn.q_a_proj.weight": {"attention/q_down_DR": "R D"},
  "self_attn.q_a_layernorm.weight": {"attention/q_latent_norm/scale_R": "R"},
  "self_attn.q_b_proj.weight": {"attention/q_up_RNQ": "NQ R"},
  "self_attn.kv_a_proj_with_mqa.weight": {
    "attention/kv_down_DC": "+C D",
    "attention/k_rope_DP": "+P D",
  },
  "self_attn.kv_a_layernorm.weight": {"attention/kv_latent_norm/scale_R": "R"},
  "self_attn.kv_b_proj.weight": {"attention/k_up_CNH": "N+H C", "attention/v_up_CNU": "N+U C"},
  "self_attn.o_proj.weight": {"attention/out_NUD": "D NU"},
}

_DEFAULTS: dict[str, Any] = dict(
  hidden_act="silu",
  num_key_value_heads=None,
  # What both classes derive from other fields.
  head_dim=None,
  qk_head_dim=None,
)
_PLAIN = dict(attention_bias=(False,), mlp_bias=(False,))


def _read(fields: Fields, *, value_width: int, **more: Any) -> Reading:
  heads = fields.integer("num_attention_heads")
  if fields.integer_or("num_key_value_heads", heads) != heads:
    fields.refuse("num_key_value_heads", fields["num_key_value_heads"], f"it must be {heads}")
  rope = Rope(fields, latent=True)
  if rope.fraction != 1.0:
    fields.refuse("partial_rotary_factor", rope.fraction, "this model_type turns whole widths")
  settings = families.latent(
    vocab_size=fields.integer("vocab_size"),
    width=fields.integer("hidden_size"),
    layers=fields.integer("num_hidden_layers"),
    heads=heads,
    query_latent=fields.integer_or_none("q_lora_rank"),
    latent_width=fields.integer("kv_lora_rank"),
    content_width=fields.integer("qk_nope_head_dim"),
    rope_width=fields.integer("qk_rope_head_dim"),
    value_width=value_width,
    ffn=fields.integer("intermediate_size"),
    max_length=fields.integer("max_position_embeddings"),
    tied=fields.flag("tie_word_embeddings"),
    eps=fields.number("rms_norm_eps"),
    init=normal(fields.number("initializer_range")),
    scaling=rope.scaling,
    scale_factor=rope.score_factor,
    **more,
  )
  return Reading(with_activation(settings, fields.activation("hidden_act")), rope.theta)


def _write(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  attention, ffn = model.segments[0].attention, model.segments[0].ffn
  if not isinstance(attention, LatentAttention) or not isinstance(ffn, FeedForward):
    raise NotThisFamily
  assert isinstance(model.positions, RotaryPositions)
  written = dict(
    vocab_size=model.vocab_size,
    hidden_size=model.width,
    intermediate_size=ffn.width,
    num_hidden_layers=model.depth,
    num_attention_heads=attention.heads,
    num_key_value_heads=attention.heads,
    q_lora_rank=attention.query_latent,
    kv_lora_rank=attention.latent_width,
    qk_nope_head_dim=attention.content_width,
    qk_rope_head_dim=model.positions.width,
    v_head_dim=attention.value_width,
    hidden_act=ACTIVATION_NAMES[ffn.activation],
    max_position_embeddings=model.max_length,
    initializer_range=model.init.std,
    rms_norm_eps=model.norm.eps,
    tie_word_embeddings=model.embedding.tied,
    **write_rope(model, theta),
  )
  # What stretched positions multiply the scores by is written as the mscale that gives it.
  excess = attention.scale * math.sqrt(attention.content_width + model.positions.width)
  for scaling in (written["rope_scaling"], written["rope_parameters"]):
    if scaling and scaling["rope_type"] == "yarn":
      mscale = (math.sqrt(excess) - 1) / (0.1 * math.log(scaling["factor"]))
      scaling["mscale_all_dim"] = scaling["mscale"] = mscale
  return written


def _read_minicpm3(fields: Fields) -> Reading:
  width, layers = fields.integer("hidden_size"), fields.integer("num_hidden_layers")
  heads = fields.integer("num_attention_heads")
  depth_scale, base = fields.number_or_none("scale_depth"), fields.number_or_none("dim_model_base")
  return _read(
    fields,
    value_width=fields.integer_or("v_head_dim", width // heads),
    residual_scale=1.0 if depth_scale is None else depth_scale / math.sqrt(layers),
    embedding_scale=fields.number("scale_emb"),
    logit_scale=1.0 if base is None else base / width,
  )


def _write_minicpm3(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  base = model.logits.scale * model.width
  return _write(model, theta) | dict(
    scale_emb=model.embedding.scale,
    scale_depth=model.block.residual_scale * math.sqrt(model.depth),
    dim_model_base=round(base),
  )


MINICPM3 = Family(
  model_type="minicpm3",
  architecture="MiniCPM3ForCausalLM",
  defaults=_DEFAULTS
  | dict(
    vocab_size=73448,
    hidden_size=2560,
    intermediate_size=6400,
    num_hidden_layers=62,
    num_attention_heads=40,
    num_key_value_heads=40,
    max_position_embeddings=32768,
    initializer_range=0.1,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    kv_lora_rank=256,
    q_lora_rank=768,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=None,
    scale_emb=12,
    scale_depth=1.4,
    dim_model_base=256,
  ),
  accepted=_PLAIN,
  read=_read_minicpm3,
  write=_write_minicpm3,
  names=llama_names({**NORMS, **_LATENT, **GATED}),
)


# Fields of experts, which no layer has where all are dense.
_OF_EXPERTS = (
  *("n_group", "n_routed_experts", "n_shared_experts", "num_experts", "routed_scaling_factor"),
  *("topk_group", "topk_method", "norm_topk_prob", "num_experts_per_tok", "moe_intermediate_size"),
  *("moe_layer_freq", "aux_loss_alpha", "ep_size", "scoring_func", "seq_aux"),
  "output_router_logits",
)


def _read_deepseek(fields: Fields) -> Reading:
  layers, dense = fields.integer("num_hidden_layers"), fields["first_k_dense_replace"]
  if not isinstance(dense, int) or dense < layers:
    fields.refuse(
      "first_k_dense_replace",
      dense,
      f"the other of {layers} layers are experts, which are not here",
    )
  return _read(fields, value_width=fields.integer("v_head_dim"), layout="interleaved")


def _write_deepseek(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  return _write(model, theta) | dict(first_k_dense_replace=model.depth)


DEEPSEEK_V2 = Family(
  model_type="deepseek_v2",
  architecture="DeepseekV2ForCausalLM",
  defaults=_DEFAULTS
  | dict(
    vocab_size=102400,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    max_position_embeddings=2048,
    initializer_range=0.02,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    first_k_dense_replace=0,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
  )
  | dict.fromkeys(_OF_EXPERTS),
  accepted=_PLAIN,
  read=_read_deepseek,
  write=_write_deepseek,
  names=llama_names({**NORMS, **_LATENT, **GATED}),
)

FAMILIES = (MINICPM3, DEEPSEEK_V2)
