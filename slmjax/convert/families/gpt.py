"""Learned positions: gpt2 (with Cerebras-GPT), gpt_neo, opt (with Galactica)."""

from typing import Any

from slmjax import families
from slmjax.architecture import layer_norm, learned, normal
from slmjax.convert.family import Family, NotThisFamily, Reading, cycle, first
from slmjax.convert.fields import ACTIVATION_NAMES, Fields
from slmjax.convert.names import Names, Table
from slmjax.model_config import LearnedPositions, ModelConfig

# Causal masks and their fillings, which old files carry.
_MASKS = (r"transformer\.h\.\d+\.attn\.(attention\.)?(masked_)?bias",)

_NORMS: Table = {
  "ln_1.weight": {"attention_norm/scale_D": "D"},
  "ln_1.bias": {"attention_norm/bias_D": "D"},
  "ln_2.weight": {"ffn_norm/scale_D": "D"},
  "ln_2.bias": {"ffn_norm/bias_D": "D"},
}


def _gpt_names(block: Table) -> Names:
  return Names(
    prefix="transformer.",
    layer="transformer.h.{}.",
    before={
      "transformer.wte.weight": {"embed_VE": "V E"},
      "transformer.wpe.weight": {"position_TD": "T D"},
    },
    block=block,
    after={
      "transformer.ln_f.weight": {"final_norm/scale_D": "D"},
      "transformer.ln_f.bias": {"final_norm/bias_D": "D"},
      "lm_head.weight": {"head_VE": "V E"},
    },
    embedding="transformer.wte.weight",
    head="lm_head.weight",
    buffers=_MASKS,
  )


def _read_gpt2(fields: Fields) -> Reading:
  width = fields.integer("n_embd")
  settings = families.gpt(
    vocab_size=fields.integer("vocab_size"),
    width=width,
    layers=fields.integer("n_layer"),
    heads=fields.integer("n_head"),
    max_length=fields.integer("n_positions"),
    activation=fields.activation("activation_function"),
    tied=fields.flag("tie_word_embeddings"),
    eps=fields.number("layer_norm_epsilon"),
    init=normal(fields.number("initializer_range")),
    ffn=fields.integer_or("n_inner", 4 * width),
    scale=None if fields.flag("scale_attn_weights") else 1.0,
  )
  return Reading(settings, None)


def _write_gpt2(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  attention, ffn = first(model)
  return dict(
    vocab_size=model.vocab_size,
    n_embd=model.width,
    n_layer=model.depth,
    n_head=attention.heads,
    n_inner=ffn.width,
    n_positions=model.max_length,
    activation_function=ACTIVATION_NAMES[ffn.activation],
    layer_norm_epsilon=model.norm.eps,
    initializer_range=model.init.std,
    scale_attn_weights=attention.scale != 1.0,
    tie_word_embeddings=model.embedding.tied,
  )


GPT2 = Family(
  model_type="gpt2",
  architecture="GPT2LMHeadModel",
  defaults=dict(
    vocab_size=50257,
    n_positions=1024,
    n_embd=768,
    n_layer=12,
    n_head=12,
    n_inner=None,
    activation_function="gelu_new",
    layer_norm_epsilon=1e-5,
    initializer_range=0.02,
    scale_attn_weights=True,
    tie_word_embeddings=True,
    # Of the same meaning as n_positions in old configs, where nothing reads it; and an order of
    # the same products.
    n_ctx=None,
    reorder_and_upcast_attn=False,
  ),
  aliases=dict(
    hidden_size="n_embd",
    num_hidden_layers="n_layer",
    num_attention_heads="n_head",
    max_position_embeddings="n_positions",
  ),
  accepted=dict(scale_attn_by_inverse_layer_idx=(False,)),
  rope=False,
  read=_read_gpt2,
  write=_write_gpt2,
  # Its linear layers store their weights as [in, out].
  names=_gpt_names(
    {
      **_NORMS,
      "attn.c_attn.weight": {
        "attention/q_DNH": "D +NH",
        "attention/k_DKH": "D +KH",
        "attention/v_DKH": "D +KH",
      },
      "attn.c_attn.bias": {
        "attention/q_bias_NH": "+NH",
        "attention/k_bias_KH": "+KH",
        "attention/v_bias_KH": "+KH",
      },
      "attn.c_proj.weight": {"attention/out_NHD": "NH D"},
      "attn.c_proj.bias": {"attention/out_bias_D": "D"},
      "mlp.c_fc.weight": {"ffn/up_DF": "D F"},
      "mlp.c_fc.bias": {"ffn/up_bias_F": "F"},
      "mlp.c_proj.weight": {"ffn/down_FD": "F D"},
      "mlp.c_proj.bias": {"ffn/down_bias_D": "D"},
    }
  ),
)


def _read_gpt_neo(fields: Fields) -> Reading:
  """Scores are not divided by the root of the head width. `attention_types` is a list of
  [kinds, how often]; its unrolled form, attention_layers, follows from it."""
  width, layers = fields.integer("hidden_size"), fields.integer("num_layers")
  types = fields["attention_types"]
  try:
    kinds = [kind for kinds, times in types for kind in list(kinds) * times]
  except (TypeError, ValueError):
    kinds = []
  if len(kinds) != layers or not set(kinds) <= {"global", "local"}:
    fields.refuse("attention_types", types, f"it must give {layers} layers, global or local")
  window = fields.integer("window_size")
  settings = families.gpt(
    vocab_size=fields.integer("vocab_size"),
    width=width,
    layers=layers,
    heads=fields.integer("num_heads"),
    max_length=fields.integer("max_position_embeddings"),
    activation=fields.activation("activation_function"),
    tied=fields.flag("tie_word_embeddings"),
    eps=fields.number("layer_norm_epsilon"),
    init=normal(fields.number("initializer_range")),
    ffn=fields.integer_or("intermediate_size", 4 * width),
    scale=1.0,
    windows=cycle([window if kind == "local" else 0 for kind in kinds]),
    qkv_bias=False,
  )
  return Reading(settings, None)


def _write_gpt_neo(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  attention, ffn = first(model)
  windows = [attention.window(i) for i in range(model.depth)]
  kinds = ["local" if window else "global" for window in windows]
  return dict(
    vocab_size=model.vocab_size,
    hidden_size=model.width,
    num_layers=model.depth,
    num_heads=attention.heads,
    intermediate_size=ffn.width,
    max_position_embeddings=model.max_length,
    activation_function=ACTIVATION_NAMES[ffn.activation],
    layer_norm_epsilon=model.norm.eps,
    initializer_range=model.init.std,
    attention_types=[[kinds, 1]],
    window_size=max(windows) or 256,
    tie_word_embeddings=model.embedding.tied,
  )


GPT_NEO = Family(
  model_type="gpt_neo",
  architecture="GPTNeoForCausalLM",
  defaults=dict(
    vocab_size=50257,
    max_position_embeddings=2048,
    hidden_size=2048,
    num_layers=24,
    attention_types=[[["global", "local"], 12]],
    attention_layers=None,
    num_heads=16,
    intermediate_size=None,
    window_size=256,
    activation_function="gelu_new",
    layer_norm_epsilon=1e-5,
    initializer_range=0.02,
    tie_word_embeddings=True,
  ),
  aliases=dict(num_hidden_layers="num_layers", num_attention_heads="num_heads"),
  rope=False,
  read=_read_gpt_neo,
  write=_write_gpt_neo,
  names=_gpt_names(
    {
      **_NORMS,
      "attn.attention.q_proj.weight": {"attention/q_DNH": "NH D"},
      "attn.attention.k_proj.weight": {"attention/k_DKH": "KH D"},
      "attn.attention.v_proj.weight": {"attention/v_DKH": "KH D"},
      "attn.attention.out_proj.weight": {"attention/out_NHD": "D NH"},
      "attn.attention.out_proj.bias": {"attention/out_bias_D": "D"},
      "mlp.c_fc.weight": {"ffn/up_DF": "F D"},
      "mlp.c_fc.bias": {"ffn/up_bias_F": "F"},
      "mlp.c_proj.weight": {"ffn/down_FD": "D F"},
      "mlp.c_proj.bias": {"ffn/down_bias_D": "D"},
    }
  ),
)


def _either_norm(vector: str, pattern: str) -> tuple[dict[str, str], ...]:
  """A norm that stands before its branch or after the sum."""
  name, _, kind = vector.partition("/")
  return {f"{name}_norm/{kind}": pattern}, {f"{name}_output_norm/{kind}": pattern}


def _read_opt(fields: Fields) -> Reading:
  """`do_layer_norm_before` false is OPT-350M: norms after each sum and none at the end."""
  pre = fields.flag("do_layer_norm_before")
  affine, bias = fields.flag("layer_norm_elementwise_affine"), fields.flag("enable_bias")
  width = fields.integer("hidden_size")
  settings = families.gpt(
    vocab_size=fields.integer("vocab_size"),
    width=width,
    layers=fields.integer("num_hidden_layers"),
    heads=fields.integer("num_attention_heads"),
    max_length=fields.integer("max_position_embeddings"),
    activation=fields.activation("activation_function"),
    tied=fields.flag("tie_word_embeddings"),
    eps=1e-5,
    init=normal(fields.number("init_std")),
    ffn=fields.integer("ffn_dim"),
    positions=learned(offset=2),
    qkv_bias=bias,
    out_bias=bias,
    wiring="pre" if pre else "post",
    embedding_width=fields.integer_or("word_embed_proj_dim", width),
    final_norm=pre and not fields.flag("_remove_final_layer_norm"),
  )
  settings["norm"] = layer_norm(1e-5, scale=affine, bias=affine)
  settings["segments"][0]["ffn"]["bias"] = bias
  return Reading(settings, None)


def _write_opt(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  attention, ffn = first(model)
  if not isinstance(model.positions, LearnedPositions):
    raise NotThisFamily
  pre = model.block.wiring == "pre"
  return dict(
    vocab_size=model.vocab_size,
    hidden_size=model.width,
    num_hidden_layers=model.depth,
    num_attention_heads=attention.heads,
    ffn_dim=ffn.width,
    max_position_embeddings=model.max_length,
    activation_function=ACTIVATION_NAMES[ffn.activation],
    do_layer_norm_before=pre,
    _remove_final_layer_norm=pre and not model.logits.norm,
    word_embed_proj_dim=model.embedding.width,
    init_std=model.init.std,
    enable_bias=ffn.bias,
    layer_norm_elementwise_affine=model.norm.scale,
    tie_word_embeddings=model.embedding.tied,
    # The class leaves the row of its padding token untrained unless told that there is none.
    pad_token_id=None,
  )


OPT = Family(
  model_type="opt",
  architecture="OPTForCausalLM",
  defaults=dict(
    vocab_size=50272,
    hidden_size=768,
    num_hidden_layers=12,
    ffn_dim=3072,
    max_position_embeddings=2048,
    do_layer_norm_before=True,
    _remove_final_layer_norm=False,
    word_embed_proj_dim=None,
    num_attention_heads=12,
    activation_function="relu",
    init_std=0.02,
    enable_bias=True,
    layer_norm_elementwise_affine=True,
    tie_word_embeddings=True,
  ),
  accepted=dict(learned_embeddings=(True,)),  # in Galactica's config
  rope=False,
  read=_read_opt,
  write=_write_opt,
  names=Names(
    prefix="model.",
    layer="model.decoder.layers.{}.",
    before={
      "model.decoder.embed_tokens.weight": {"embed_VE": "V E"},
      "model.decoder.embed_positions.weight": {"position_TD": "T D"},
      "model.decoder.project_in.weight": {"project_in_ED": "D E"},
    },
    block={
      "self_attn_layer_norm.weight": _either_norm("attention/scale_D", "D"),
      "self_attn_layer_norm.bias": _either_norm("attention/bias_D", "D"),
      "self_attn.q_proj.weight": {"attention/q_DNH": "NH D"},
      "self_attn.q_proj.bias": {"attention/q_bias_NH": "NH"},
      "self_attn.k_proj.weight": {"attention/k_DKH": "KH D"},
      "self_attn.k_proj.bias": {"attention/k_bias_KH": "KH"},
      "self_attn.v_proj.weight": {"attention/v_DKH": "KH D"},
      "self_attn.v_proj.bias": {"attention/v_bias_KH": "KH"},
      "self_attn.out_proj.weight": {"attention/out_NHD": "D NH"},
      "self_attn.out_proj.bias": {"attention/out_bias_D": "D"},
      "final_layer_norm.weight": _either_norm("ffn/scale_D", "D"),
      "final_layer_norm.bias": _either_norm("ffn/bias_D", "D"),
      "fc1.weight": {"ffn/up_DF": "F D"},
      "fc1.bias": {"ffn/up_bias_F": "F"},
      "fc2.weight": {"ffn/down_FD": "D F"},
      "fc2.bias": {"ffn/down_bias_D": "D"},
    },
    after={
      "model.decoder.final_layer_norm.weight": {"final_norm/scale_D": "D"},
      "model.decoder.final_layer_norm.bias": {"final_norm/bias_D": "D"},
      "model.decoder.project_out.weight": {"project_out_DE": "E D"},
      "lm_head.weight": {"head_VE": "V E"},
    },
    embedding="model.decoder.embed_tokens.weight",
    head="lm_head.weight",
  ),
)

FAMILIES = (GPT2, GPT_NEO, OPT)
