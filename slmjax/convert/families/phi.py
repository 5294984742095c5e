"""Rotary positions over a part of each head: phi3, with fused projections, and stablelm."""

from typing import Any

from slmjax import families
from slmjax.architecture import normal, rotary
from slmjax.convert.families.llama import ATTENTION, GATED, NORMS, llama_names
from slmjax.convert.family import (
  Family,
  Reading,
  first,
  head_width,
  rotary_fraction,
  with_activation,
)
from slmjax.convert.fields import ACTIVATION_NAMES, ROPE_LENGTH, Fields
from slmjax.convert.names import Table
from slmjax.convert.rope import Rope, write_rope
from slmjax.model_config import LongRopeScaling, ModelConfig, RotaryPositions

_FUSED: Table = {
  "self_attn.qkv_proj.weight": {
    "attention/q_DNH": "+NH D",
    "attention/k_DKH": "+KH D",
    "attention/v_DKH": "+KH D",
  },
  "self_attn.o_proj.weight": {"attention/out_NHD": "D NH"},
  "mlp.gate_up_proj.weight": {"ffn/gate_DF": "+F D", "ffn/up_DF": "+F D"},
  "mlp.down_proj.weight": {"ffn/down_FD": "D F"},
}


def _write(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  attention, ffn = first(model)
  return dict(
    vocab_size=model.vocab_size,
    hidden_size=model.width,
    intermediate_size=ffn.width,
    num_hidden_layers=model.depth,
    num_attention_heads=attention.heads,
    num_key_value_heads=attention.kv_heads,
    hidden_act=ACTIVATION_NAMES[ffn.activation],
    max_position_embeddings=model.max_length,
    initializer_range=model.init.std,
    tie_word_embeddings=model.embedding.tied,
    **write_rope(model, theta, rotary_fraction(model)),
  )


def _read_phi3(fields: Fields) -> Reading:
  heads = fields.integer("num_attention_heads")
  rope = Rope(fields)
  settings = families.llama(
    vocab_size=fields.integer("vocab_size"),
    width=fields.integer("hidden_size"),
    layers=fields.integer("num_hidden_layers"),
    heads=heads,
    kv_heads=fields.integer_or("num_key_value_heads", heads),
    ffn=fields.integer("intermediate_size"),
    max_length=fields.integer("max_position_embeddings"),
    tied=fields.flag("tie_word_embeddings"),
    eps=fields.number("rms_norm_eps"),
    init=normal(fields.number("initializer_range")),
    windows=(fields.integer_or("sliding_window", 0),),
  )
  width = int(head_width(fields) * rope.fraction)
  settings["positions"] = rotary(width, scaling=rope.scaling)
  return Reading(with_activation(settings, fields.activation("hidden_act")), rope.theta)


def _write_phi3(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  written = _write(model, theta) | dict(
    rms_norm_eps=model.norm.eps,
    sliding_window=first(model)[0].windows[0] or None,
    # The class's own defaults lie beyond small vocabularies.
    pad_token_id=None,
  )
  assert isinstance(model.positions, RotaryPositions)
  scaling = model.positions.scaling
  if isinstance(scaling, LongRopeScaling):
    written[ROPE_LENGTH] = scaling.original_length
  return written


PHI3 = Family(
  model_type="phi3",
  architecture="Phi3ForCausalLM",
  defaults=dict(
    vocab_size=32064,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=None,
    hidden_act="silu",
    max_position_embeddings=4096,
    original_max_position_embeddings=4096,
    initializer_range=0.02,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    sliding_window=None,
  ),
  # Written by the models' own code, with these values in all published ones.
  accepted=dict(
    attention_bias=(False,),
    mlp_bias=(False,),
    lm_head_bias=(False,),
    full_attn_mod=(1,),
    interpolate_factor=(1,),
  ),
  read=_read_phi3,
  write=_write_phi3,
  names=llama_names({**NORMS, **_FUSED}),
)


def _read_stablelm(fields: Fields) -> Reading:
  rope = Rope(fields, fraction=0.25)
  settings = families.stablelm(
    vocab_size=fields.integer("vocab_size"),
    width=fields.integer("hidden_size"),
    layers=fields.integer("num_hidden_layers"),
    heads=fields.integer("num_attention_heads"),
    kv_heads=fields.integer("num_key_value_heads"),
    ffn=fields.integer("intermediate_size"),
    max_length=fields.integer("max_position_embeddings"),
    rotary_width=int(head_width(fields) * rope.fraction),
    qkv_bias=fields.flag("use_qkv_bias"),
    tied=fields.flag("tie_word_embeddings"),
    eps=fields.number("layer_norm_eps"),
    init=normal(fields.number("initializer_range")),
  )
  settings["positions"]["scaling"] = rope.scaling
  if fields.flag("use_parallel_residual"):
    settings["block"]["wiring"] = "parallel_shared"
  return Reading(with_activation(settings, fields.activation("hidden_act")), rope.theta)


def _write_stablelm(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  fraction = rotary_fraction(model)
  written = _write(model, theta) | dict(
    layer_norm_eps=model.norm.eps,
    use_qkv_bias=first(model)[0].qkv_bias,
    use_parallel_residual=model.block.wiring == "parallel_shared",
    partial_rotary_factor=fraction,
  )
  written["rope_parameters"]["partial_rotary_factor"] = fraction
  return written


STABLELM = Family(
  model_type="stablelm",
  architecture="StableLmForCausalLM",
  defaults=dict(
    vocab_size=50304,
    hidden_size=2560,
    intermediate_size=6912,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    hidden_act="silu",
    max_position_embeddings=4096,
    initializer_range=0.02,
    layer_norm_eps=1e-5,
    tie_word_embeddings=False,
    use_qkv_bias=False,
    use_parallel_residual=False,
  ),
  accepted=dict(qk_layernorm=(False,)),
  read=_read_stablelm,
  write=_write_stablelm,
  names=llama_names(
    {
      **NORMS,
      "input_layernorm.bias": {"attention_norm/bias_D": "D"},
      "post_attention_layernorm.bias": {"ffn_norm/bias_D": "D"},
      **ATTENTION,
      **GATED,
    }
  ),
)

FAMILIES = (PHI3, STABLELM)
