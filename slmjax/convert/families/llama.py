"""Llama and those that follow its names: mistral, qwen2, qwen3, mobilellm, olmo, olmo2."""

import dataclasses
from typing import Any

from slmjax import families
from slmjax.architecture import layer_norm, normal
from slmjax.convert.family import (
  Family,
  NotThisFamily,
  Reading,
  first,
  full_rope,
  head_width,
  layer_windows,
  with_activation,
  with_biases,
  write_layer_types,
)
from slmjax.convert.fields import ACTIVATION_NAMES, Fields
from slmjax.convert.names import Names, Table
from slmjax.convert.rope import write_rope
from slmjax.model_config import ModelConfig, RotaryPositions

# Old files carry the frequencies of rotary positions, which follow from the config.
ROPE_BUFFERS = (r".*\.rotary_emb\.inv_freq",)

ATTENTION: Table = {
  "self_attn.q_proj.weight": {"attention/q_DNH": "NH D"},
  "self_attn.k_proj.weight": {"attention/k_DKH": "KH D"},
  "self_attn.v_proj.weight": {"attention/v_DKH": "KH D"},
  "self_attn.o_proj.weight": {"attention/out_NHD": "D NH"},
  "self_attn.q_proj.bias": {"attention/q_bias_NH": "NH"},
  "self_attn.k_proj.bias": {"attention/k_bias_KH": "KH"},
  "self_attn.v_proj.bias": {"attention/v_bias_KH": "KH"},
  "self_attn.o_proj.bias": {"attention/out_bias_D": "D"},
}
GATED: Table = {
  "mlp.gate_proj.weight": {"ffn/gate_DF": "F D"},
  "mlp.gate_proj.bias": {"ffn/gate_bias_F": "F"},
  "mlp.up_proj.weight": {"ffn/up_DF": "F D"},
  "mlp.up_proj.bias": {"ffn/up_bias_F": "F"},
  "mlp.down_proj.weight": {"ffn/down_FD": "D F"},
  "mlp.down_proj.bias": {"ffn/down_bias_D": "D"},
}
NORMS: Table = {
  "input_layernorm.weight": {"attention_norm/scale_D": "D"},
  "post_attention_layernorm.weight": {"ffn_norm/scale_D": "D"},
}


def llama_names(block: Table) -> Names:
  """Tables and final norm as in Llama, around blocks with these tensors."""
  return Names(
    prefix="model.",
    layer="model.layers.{}.",
    before={"model.embed_tokens.weight": {"embed_VE": "V E"}},
    block=block,
    after={
      "model.norm.weight": {"final_norm/scale_D": "D"},
      "model.norm.bias": {"final_norm/bias_D": "D"},
      "lm_head.weight": {"head_VE": "V E"},
    },
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    buffers=ROPE_BUFFERS,
  )


_DEFAULTS: dict[str, Any] = dict(
  vocab_size=32000,
  hidden_size=4096,
  intermediate_size=11008,
  num_hidden_layers=32,
  num_attention_heads=32,
  num_key_value_heads=None,
  head_dim=None,
  hidden_act="silu",
  max_position_embeddings=2048,
  initializer_range=0.02,
  rms_norm_eps=1e-6,
  tie_word_embeddings=False,
  attention_bias=False,
  mlp_bias=False,
)


def _without(defaults: dict[str, Any], *names: str, **more: Any) -> dict[str, Any]:
  return {name: value for name, value in defaults.items() if name not in names} | more


def _read(fields: Fields, **more: Any) -> Reading:
  """The fields that all of them have; `more` goes to `families.llama`."""
  heads = fields.integer("num_attention_heads")
  rope = full_rope(fields)
  settings = families.llama(
    vocab_size=fields.integer("vocab_size"),
    width=fields.integer("hidden_size"),
    layers=fields.integer("num_hidden_layers"),
    heads=heads,
    kv_heads=fields.integer_or("num_key_value_heads", heads),
    ffn=fields.integer("intermediate_size"),
    max_length=fields.integer("max_position_embeddings"),
    init=normal(fields.number("initializer_range")),
    scaling=rope.scaling,
    **(dict(tied=fields.flag("tie_word_embeddings")) | more),
  )
  return Reading(with_activation(settings, fields.activation("hidden_act")), rope.theta)


def _own_width(fields: Fields) -> int:
  """Of a class whose heads may have any width."""
  return fields.integer("head_dim") if fields["head_dim"] is not None else head_width(fields)


def _read_llama(fields: Fields, **more: Any) -> Reading:
  reading = _read(fields, eps=fields.number("rms_norm_eps"), head_width=_own_width(fields), **more)
  with_biases(
    reading.settings, attention=fields.flag("attention_bias"), ffn=fields.flag("mlp_bias")
  )
  return reading


def _write(model: ModelConfig, theta: float | None) -> dict[str, Any]:
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
    hidden_act=ACTIVATION_NAMES[ffn.activation],
    max_position_embeddings=model.max_length,
    initializer_range=model.init.std,
    rms_norm_eps=model.norm.eps,
    tie_word_embeddings=model.embedding.tied,
    **write_rope(model, theta),
  )


def _write_llama(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  attention, ffn = first(model)
  biases = dict(attention_bias=attention.out_bias, mlp_bias=ffn.bias)
  return _write(model, theta) | biases


LLAMA = Family(
  model_type="llama",
  architecture="LlamaForCausalLM",
  defaults=_DEFAULTS,
  accepted=dict(is_llama_config=(True,), rope_interleaved=(False,)),  # in SmolLM's config
  read=_read_llama,
  write=_write_llama,
  names=llama_names({**NORMS, **ATTENTION, **GATED}),
)


def _read_mistral(fields: Fields) -> Reading:
  window = fields.integer_or("sliding_window", 0)
  eps = fields.number("rms_norm_eps")
  return _read(fields, eps=eps, head_width=_own_width(fields), windows=(window,))


def _write_mistral(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  return _write(model, theta) | dict(sliding_window=first(model)[0].windows[0] or None)


MISTRAL = Family(
  model_type="mistral",
  architecture="MistralForCausalLM",
  defaults=_without(
    _DEFAULTS,
    *("attention_bias", "mlp_bias"),
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=4096 * 32,
    sliding_window=4096,
  ),
  read=_read_mistral,
  write=_write_mistral,
  names=llama_names({**NORMS, **ATTENTION, **GATED}),
)

_QWEN_DEFAULTS = _without(
  _DEFAULTS,
  "mlp_bias",
  vocab_size=151936,
  intermediate_size=22016,
  num_key_value_heads=32,
  max_position_embeddings=32768,
  use_sliding_window=False,
  sliding_window=4096,
  max_window_layers=28,
  layer_types=None,
)


def _qwen_windows(fields: Fields) -> tuple[int, ...]:
  layers = fields.integer("num_hidden_layers")
  used = fields.flag("use_sliding_window")
  window = fields.integer_or_none("sliding_window") if used else None
  full = layers if window is None else fields.number("max_window_layers")
  kinds = ["sliding_attention" if i >= full else "full_attention" for i in range(layers)]
  return layer_windows(fields, window, kinds)


def _read_qwen2(fields: Fields) -> Reading:
  eps = fields.number("rms_norm_eps")
  return _read(fields, eps=eps, qkv_bias=True, windows=_qwen_windows(fields))


def _write_qwen2(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  windows = write_layer_types(model)
  uses = dict(use_sliding_window=windows["sliding_window"] is not None)
  written = _write(model, theta) | windows | uses
  del written["head_dim"]
  return written


QWEN2 = Family(
  model_type="qwen2",
  architecture="Qwen2ForCausalLM",
  defaults=_without(_QWEN_DEFAULTS, "attention_bias", "head_dim"),
  read=_read_qwen2,
  write=_write_qwen2,
  names=llama_names({**NORMS, **ATTENTION, **GATED}),
)

_HEAD_NORMS: Table = {
  "self_attn.q_norm.weight": {"attention/q_norm/scale_H": "H"},
  "self_attn.k_norm.weight": {"attention/k_norm/scale_H": "H"},
}


def _read_qwen3(fields: Fields) -> Reading:
  reading = _read(
    fields,
    eps=fields.number("rms_norm_eps"),
    head_width=fields.integer("head_dim"),
    qk_norm="head",
    windows=_qwen_windows(fields),
  )
  with_biases(reading.settings, attention=fields.flag("attention_bias"))
  return reading


def _write_qwen3(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  attention = first(model)[0]
  more = dict(head_dim=attention.head_width, attention_bias=attention.out_bias)
  return _write_qwen2(model, theta) | more


QWEN3 = Family(
  model_type="qwen3",
  architecture="Qwen3ForCausalLM",
  defaults=_QWEN_DEFAULTS | dict(head_dim=128),
  read=_read_qwen3,
  write=_write_qwen3,
  names=llama_names({**NORMS, **ATTENTION, **_HEAD_NORMS, **GATED}),
)


def _read_mobilellm(fields: Fields) -> Reading:
  """`share_embedding` ties the tables whatever tie_word_embeddings says, and `layer_sharing`
  applies each block twice."""
  tied = fields.flag("share_embedding") or fields.flag("tie_word_embeddings")
  return _read_llama(fields, tied=tied, repeat=2 if fields.flag("layer_sharing") else 1)


def _write_mobilellm(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  sharing = dict(
    share_embedding=model.embedding.tied,
    layer_sharing=model.segments[0].repeat == 2,
    tie_word_embeddings=False,
  )
  return _write_llama(model, theta) | sharing


MOBILELLM = dataclasses.replace(
  LLAMA,
  model_type="mobilellm",
  architecture="MobileLLMForCausalLM",
  defaults={**_DEFAULTS, "share_embedding": False, "layer_sharing": False},
  read=_read_mobilellm,
  write=_write_mobilellm,
  in_transformers=False,
)

_OLMO_DEFAULTS = _without(_DEFAULTS, "head_dim", "mlp_bias", "rms_norm_eps", vocab_size=50304)


def _read_olmo(fields: Fields) -> Reading:
  reading = _read(fields, eps=1e-5)
  reading.settings["norm"] = layer_norm(1e-5, scale=False, bias=False)
  with_biases(reading.settings, attention=fields.flag("attention_bias"))
  return reading


def _write_olmo(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  written = _write(model, theta) | dict(attention_bias=first(model)[0].out_bias)
  return _without(written, "head_dim", "rms_norm_eps")


OLMO = Family(
  model_type="olmo",
  architecture="OlmoForCausalLM",
  defaults=_OLMO_DEFAULTS,
  accepted={"clip_qkv": (None,)},
  read=_read_olmo,
  write=_write_olmo,
  names=llama_names({**ATTENTION, **GATED}),
)


def _read_olmo2(fields: Fields) -> Reading:
  reading = _read(fields, eps=fields.number("rms_norm_eps"), qk_norm="width", wiring="output")
  with_biases(reading.settings, attention=fields.flag("attention_bias"))
  return reading


def _write_olmo2(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  written = _write(model, theta) | dict(attention_bias=first(model)[0].out_bias)
  del written["head_dim"]
  return written


OLMO2 = Family(
  model_type="olmo2",
  architecture="Olmo2ForCausalLM",
  defaults={**_OLMO_DEFAULTS, "rms_norm_eps": 1e-5},
  read=_read_olmo2,
  write=_write_olmo2,
  names=llama_names(
    {
      **ATTENTION,
      "self_attn.q_norm.weight": {"attention/q_norm/scale_NH": "NH"},
      "self_attn.k_norm.weight": {"attention/k_norm/scale_NH": "NH"},
      "post_attention_layernorm.weight": {"attention_output_norm/scale_D": "D"},
      **GATED,
      "post_feedforward_layernorm.weight": {"ffn_output_norm/scale_D": "D"},
    }
  ),
)

FAMILIES = (LLAMA, QWEN2, MISTRAL, QWEN3, OLMO, OLMO2, MOBILELLM)
