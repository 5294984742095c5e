"""gpt_neox (with Pythia and Dolly) and bloom: queries, keys and values fused head by head."""

from typing import Any

from slmjax import families
from slmjax.architecture import alibi, normal, rotary
from slmjax.convert.families.llama import ROPE_BUFFERS
from slmjax.convert.family import (
  Family,
  Reading,
  first,
  head_width,
  rotary_fraction,
)
from slmjax.convert.fields import ACTIVATION_NAMES, Fields
from slmjax.convert.names import Names, Table
from slmjax.convert.rope import Rope, write_rope
from slmjax.model_config import ModelConfig


def _block(attention: str) -> Table:
  """Their blocks differ in what attention is called."""
  return {
    "input_layernorm.weight": {"attention_norm/scale_D": "D"},
    "input_layernorm.bias": {"attention_norm/bias_D": "D"},
    "post_attention_layernorm.weight": {"ffn_norm/scale_D": "D"},
    "post_attention_layernorm.bias": {"ffn_norm/bias_D": "D"},
    f"{attention}.query_key_value.weight": {
      "attention/q_DNH": "N+H D",
      "attention/k_DKH": "K+H D",
      "attention/v_DKH": "K+H D",
    },
    f"{attention}.query_key_value.bias": {
      "attention/q_bias_NH": "N+H",
      "attention/k_bias_KH": "K+H",
      "attention/v_bias_KH": "K+H",
    },
    f"{attention}.dense.weight": {"attention/out_NHD": "D NH"},
    f"{attention}.dense.bias": {"attention/out_bias_D": "D"},
    "mlp.dense_h_to_4h.weight": {"ffn/up_DF": "F D"},
    "mlp.dense_h_to_4h.bias": {"ffn/up_bias_F": "F"},
    "mlp.dense_4h_to_h.weight": {"ffn/down_FD": "D F"},
    "mlp.dense_4h_to_h.bias": {"ffn/down_bias_D": "D"},
  }


def _read_neox(fields: Fields) -> Reading:
  # The class reads these two by names of its own only.
  for name, own in (("rope_theta", "rotary_emb_base"), ("partial_rotary_factor", "rotary_pct")):
    if fields.has(name) and fields.number(name) != fields.number(own):
      fields.refuse(name, fields[name], f"{own} is {fields[own]}; they must agree")
  rope = Rope(fields, fraction=fields.number("rotary_pct"), theta=fields.number("rotary_emb_base"))
  bias = fields.flag("attention_bias")
  settings = families.gpt(
    vocab_size=fields.integer("vocab_size"),
    width=fields.integer("hidden_size"),
    layers=fields.integer("num_hidden_layers"),
    heads=fields.integer("num_attention_heads"),
    max_length=fields.integer("max_position_embeddings"),
    activation=fields.activation("hidden_act"),
    tied=fields.flag("tie_word_embeddings"),
    eps=fields.number("layer_norm_eps"),
    init=normal(fields.number("initializer_range")),
    ffn=fields.integer("intermediate_size"),
    positions=rotary(int(head_width(fields) * rope.fraction), scaling=rope.scaling),
    qkv_bias=bias,
    out_bias=bias,
    wiring="parallel" if fields.flag("use_parallel_residual") else "pre",
  )
  return Reading(settings, rope.theta)


def _write_neox(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  attention, ffn = first(model)
  fraction = rotary_fraction(model)
  written = dict(
    vocab_size=model.vocab_size,
    hidden_size=model.width,
    num_hidden_layers=model.depth,
    num_attention_heads=attention.heads,
    intermediate_size=ffn.width,
    hidden_act=ACTIVATION_NAMES[ffn.activation],
    max_position_embeddings=model.max_length,
    layer_norm_eps=model.norm.eps,
    initializer_range=model.init.std,
    tie_word_embeddings=model.embedding.tied,
    attention_bias=attention.out_bias,
    use_parallel_residual=model.block.wiring == "parallel",
    # The names of transformers 4.
    rotary_pct=fraction,
    rotary_emb_base=theta,
    **write_rope(model, theta),
  )
  written["rope_parameters"]["partial_rotary_factor"] = fraction
  return written


GPT_NEOX = Family(
  model_type="gpt_neox",
  architecture="GPTNeoXForCausalLM",
  defaults=dict(
    vocab_size=50432,
    hidden_size=6144,
    num_hidden_layers=44,
    num_attention_heads=64,
    intermediate_size=24576,
    hidden_act="gelu",
    max_position_embeddings=2048,
    initializer_range=0.02,
    layer_norm_eps=1e-5,
    tie_word_embeddings=False,
    use_parallel_residual=True,
    attention_bias=True,
    rotary_pct=0.25,
    rotary_emb_base=10000.0,
  ),
  read=_read_neox,
  write=_write_neox,
  names=Names(
    prefix="gpt_neox.",
    layer="gpt_neox.layers.{}.",
    before={"gpt_neox.embed_in.weight": {"embed_VE": "V E"}},
    block=_block("attention"),
    after={
      "gpt_neox.final_layer_norm.weight": {"final_norm/scale_D": "D"},
      "gpt_neox.final_layer_norm.bias": {"final_norm/bias_D": "D"},
      "embed_out.weight": {"head_VE": "V E"},
    },
    embedding="gpt_neox.embed_in.weight",
    head="embed_out.weight",
    # Causal masks and their fillings, in old files.
    buffers=(*ROPE_BUFFERS, r"gpt_neox\.layers\.\d+\.attention\.(masked_)?bias"),
    renamed={"lm_head.weight": "embed_out.weight"},
  ),
)


def _read_bloom(fields: Fields) -> Reading:
  """Its ALiBi knows no longest length: ours is `seq_length`, that of training, if given."""
  settings = families.gpt(
    vocab_size=fields.integer("vocab_size"),
    width=fields.integer("hidden_size"),
    layers=fields.integer("n_layer"),
    heads=fields.integer("n_head"),
    max_length=fields.integer("seq_length"),
    activation="gelu_tanh",
    tied=fields.flag("tie_word_embeddings"),
    eps=fields.number("layer_norm_epsilon"),
    init=normal(fields.number("initializer_range")),
    positions=alibi(),
    embedding_norm=True,
  )
  return Reading(settings, None)


def _write_bloom(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  attention, _ = first(model)
  return dict(
    vocab_size=model.vocab_size,
    hidden_size=model.width,
    n_layer=model.depth,
    n_head=attention.heads,
    seq_length=model.max_length,
    layer_norm_epsilon=model.norm.eps,
    initializer_range=model.init.std,
    tie_word_embeddings=model.embedding.tied,
    # The class's own default lies beyond small vocabularies.
    pad_token_id=None,
  )


BLOOM = Family(
  model_type="bloom",
  architecture="BloomForCausalLM",
  defaults=dict(
    vocab_size=250880,
    hidden_size=64,
    n_layer=2,
    n_head=8,
    layer_norm_epsilon=1e-5,
    initializer_range=0.02,
    tie_word_embeddings=True,
    seq_length=2048,
    # Another order of the same sums, and settings of the training code.
    slow_but_exact=False,
    attention_softmax_in_fp32=True,
    masked_softmax_fusion=True,
    bias_dropout_fusion=True,
    skip_bias_add=True,
    skip_bias_add_qkv=False,
    offset_alibi=100,
  ),
  aliases=dict(n_embed="hidden_size", num_hidden_layers="n_layer", num_attention_heads="n_head"),
  accepted=dict(apply_residual_connection_post_layernorm=(False,), n_inner=(None,)),
  rope=False,
  read=_read_bloom,
  write=_write_bloom,
  names=Names(
    prefix="transformer.",
    layer="transformer.h.{}.",
    before={
      "transformer.word_embeddings.weight": {"embed_VE": "V E"},
      "transformer.word_embeddings_layernorm.weight": {"embed_norm/scale_D": "D"},
      "transformer.word_embeddings_layernorm.bias": {"embed_norm/bias_D": "D"},
    },
    block=_block("self_attention"),
    after={
      "transformer.ln_f.weight": {"final_norm/scale_D": "D"},
      "transformer.ln_f.bias": {"final_norm/bias_D": "D"},
      "lm_head.weight": {"head_VE": "V E"},
    },
    embedding="transformer.word_embeddings.weight",
    head="lm_head.weight",
  ),
)

FAMILIES = (GPT_NEOX, BLOOM)
