"""gemma and gemma2."""

from typing import Any

from slmjax import families
from slmjax.architecture import normal
from slmjax.convert.families.llama import ATTENTION, GATED, NORMS, llama_names
from slmjax.convert.family import (
  Family,
  NotThisFamily,
  Reading,
  first,
  full_rope,
  layer_windows,
  with_biases,
  write_layer_types,
)
from slmjax.convert.fields import Fields
from slmjax.convert.names import Table
from slmjax.convert.rope import write_rope
from slmjax.model_config import ModelConfig, RotaryPositions

_DEFAULTS: dict[str, Any] = dict(
  vocab_size=256000,
  hidden_size=3072,
  intermediate_size=24576,
  num_hidden_layers=28,
  num_attention_heads=16,
  num_key_value_heads=16,
  head_dim=256,
  max_position_embeddings=8192,
  initializer_range=0.02,
  rms_norm_eps=1e-6,
  tie_word_embeddings=True,
  attention_bias=False,
)
# The class computes the tanh form, also where old configs say `gelu`.
_TANH = ("gelu_pytorch_tanh", None)
_ONE_WAY = (False, None)


def _sizes(fields: Fields) -> dict[str, Any]:
  return dict(
    vocab_size=fields.integer("vocab_size"),
    width=fields.integer("hidden_size"),
    layers=fields.integer("num_hidden_layers"),
    heads=fields.integer("num_attention_heads"),
    kv_heads=fields.integer("num_key_value_heads"),
    head_width=fields.integer("head_dim"),
    ffn=fields.integer("intermediate_size"),
    max_length=fields.integer("max_position_embeddings"),
    eps=fields.number("rms_norm_eps"),
    init=normal(fields.number("initializer_range")),
  )


def _finish(fields: Fields, settings: dict[str, Any]) -> Reading:
  rope = full_rope(fields)
  settings["positions"]["scaling"] = rope.scaling
  settings["embedding"]["tied"] = fields.flag("tie_word_embeddings")
  return Reading(with_biases(settings, attention=fields.flag("attention_bias")), rope.theta)


def _read_gemma(fields: Fields) -> Reading:
  return _finish(fields, families.gemma(**_sizes(fields)))


def _write_gemma(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  attention, ffn = first(model)
  if not isinstance(model.positions, RotaryPositions):
    raise NotThisFamily
  return dict(
    vocab_size=model.vocab_size,
    hidden_size=model.width,
    intermediate_size=ffn.width,
    num_hidden_layers=model.depth,
    num_attention_heads=attention.heads,
    num_key_value_heads=attention.kv_heads,
    head_dim=attention.head_width,
    hidden_act="gelu_pytorch_tanh",
    hidden_activation="gelu_pytorch_tanh",
    max_position_embeddings=model.max_length,
    initializer_range=model.init.std,
    rms_norm_eps=model.norm.eps,
    tie_word_embeddings=model.embedding.tied,
    attention_bias=attention.out_bias,
    **write_rope(model, theta),
  )


GEMMA = Family(
  model_type="gemma",
  architecture="GemmaForCausalLM",
  defaults=_DEFAULTS,
  accepted=dict(
    hidden_act=(*_TANH, "gelu"), hidden_activation=_TANH, use_bidirectional_attention=_ONE_WAY
  ),
  read=_read_gemma,
  write=_write_gemma,
  names=llama_names({**NORMS, **ATTENTION, **GATED}),
)

_SANDWICH: Table = {
  "input_layernorm.weight": {"attention_norm/scale_D": "D"},
  "post_attention_layernorm.weight": {"attention_output_norm/scale_D": "D"},
  "pre_feedforward_layernorm.weight": {"ffn_norm/scale_D": "D"},
  "post_feedforward_layernorm.weight": {"ffn_output_norm/scale_D": "D"},
}


def _read_gemma2(fields: Fields) -> Reading:
  layers = fields.integer("num_hidden_layers")
  kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
  settings = families.gemma2(
    **_sizes(fields),
    windows=layer_windows(fields, fields.integer_or_none("sliding_window"), kinds),
    query_scalar=fields.number("query_pre_attn_scalar"),
    attention_softcap=fields.number_or_none("attn_logit_softcapping"),
    logit_softcap=fields.number_or_none("final_logit_softcapping"),
  )
  return _finish(fields, settings)


def _write_gemma2(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  attention = first(model)[0]
  return _write_gemma(model, theta) | dict(
    **write_layer_types(model),
    # The class wants a whole number.
    query_pre_attn_scalar=round(attention.scale**-2),
    attn_logit_softcapping=attention.softcap,
    final_logit_softcapping=model.logits.softcap,
  )


GEMMA2 = Family(
  model_type="gemma2",
  architecture="Gemma2ForCausalLM",
  defaults=_DEFAULTS
  | dict(
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    num_attention_heads=8,
    num_key_value_heads=4,
    sliding_window=4096,
    layer_types=None,
    query_pre_attn_scalar=256,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
  ),
  accepted=dict(hidden_act=_TANH, hidden_activation=_TANH, use_bidirectional_attention=_ONE_WAY),
  read=_read_gemma2,
  write=_write_gemma2,
  names=llama_names({**_SANDWICH, **ATTENTION, **GATED}),
)

FAMILIES = (GEMMA, GEMMA2)
