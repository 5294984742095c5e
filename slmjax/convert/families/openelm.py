"""openelm, whose class is in the models' own code and not in transformers."""

from typing import Any

from slmjax import families
from slmjax.architecture import normal, rotary
from slmjax.convert.family import Family, NotThisFamily, Reading, first
from slmjax.convert.fields import Fields
from slmjax.convert.names import Names
from slmjax.model_config import FeedForward, HeadsAttention, ModelConfig, RotaryPositions

_EPS = 1e-6  # of its norms' class; the config has no such field
_DIVISOR = 256  # of feed-forward widths, in all published models


def _ends(fields: Fields, name: str) -> tuple[float, float]:
  """First and last of a list of multipliers, which must be what lies evenly between, to two
  decimals, where it gives one for each layer."""
  value, layers = fields[name], fields.integer("num_transformer_layers")
  fits = isinstance(value, list) and len(value) in (2, layers)
  if not fits or not all(isinstance(v, int | float) for v in value):
    fields.refuse(name, value, f"it must be a list of 2 or {layers} numbers")
  low, high = float(value[0]), float(value[-1])
  if len(value) == layers:
    even = [round(low + (high - low) * i / (layers - 1), 2) for i in range(layers)]
    if even != [float(v) for v in value]:
      fields.refuse(name, value, f"only even steps can be converted: {even}")
  return low, high


def _read(fields: Fields) -> Reading:
  settings = families.openelm(
    vocab_size=fields.integer("vocab_size"),
    width=fields.integer("model_dim"),
    layers=fields.integer("num_transformer_layers"),
    head_width=fields.integer("head_dim"),
    groups=fields.integer("num_gqa_groups"),
    max_length=fields.integer("max_context_length"),
    eps=_EPS,
    attention_multipliers=_ends(fields, "qkv_multipliers"),
    ffn_multipliers=_ends(fields, "ffn_multipliers"),
  )
  settings["init"] = normal(fields.number("initializer_range"))
  settings["positions"] = rotary(fields.integer("head_dim"))
  settings["embedding"]["tied"] = fields.flag("share_input_output_layers")
  # What follows from the multipliers stands in the config too.
  for name, key in (("num_query_heads", "heads"), ("num_kv_heads", "kv_heads")):
    computed = [segment["attention"][key] for segment in settings["segments"]]
    if fields[name] is not None and fields[name] != computed:
      fields.refuse(name, fields[name], f"the multipliers give {computed}")
  return Reading(settings, fields.number("rope_freq_constant"))


def _write(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  attention = first(model)[0]
  if not isinstance(model.positions, RotaryPositions) or model.depth < 2:
    raise NotThisFamily
  heads, groups, widths = [], [], []
  for segment in model.segments:
    if not isinstance(segment.attention, HeadsAttention):
      raise NotThisFamily
    if not isinstance(segment.ffn, FeedForward):
      raise NotThisFamily
    heads.append(segment.attention.heads)
    groups.append(segment.attention.kv_heads)
    widths.append(segment.ffn.width / model.width)
  return dict(
    vocab_size=model.vocab_size,
    model_dim=model.width,
    num_transformer_layers=model.depth,
    head_dim=attention.head_width,
    num_gqa_groups=attention.heads // attention.kv_heads,
    num_query_heads=heads,
    num_kv_heads=groups,
    qkv_multipliers=_halves([n * attention.head_width / model.width for n in heads]),
    ffn_multipliers=_halves(widths),
    ffn_dim_divisor=_DIVISOR,
    ffn_with_glu=True,
    activation_fn_name="swish",
    normalization_layer_name="rms_norm",
    normalize_qk_projections=True,
    max_context_length=model.max_length,
    rope_max_length=2 * model.max_length,
    rope_freq_constant=theta,
    initializer_range=model.init.std,
    share_input_output_layers=model.embedding.tied,
  )


def _halves(multipliers: list[float]) -> list[float]:
  """The ends of what multipliers were before their products were rounded: those of published
  models are multiples of a half."""
  return [round(2 * end) / 2 for end in (multipliers[0], multipliers[-1])]


OPENELM = Family(
  model_type="openelm",
  architecture="OpenELMForCausalLM",
  defaults=dict(
    vocab_size=32000,
    max_context_length=2048,
    num_transformer_layers=12,
    model_dim=2048,
    head_dim=128,
    qkv_multipliers=1.0,
    num_query_heads=None,
    num_kv_heads=None,
    num_gqa_groups=1,
    ffn_multipliers=4.0,
    share_input_output_layers=True,
    rope_freq_constant=10000,
    # How far its table of angles reaches.
    rope_max_length=4096,
    initializer_range=0.02,
  ),
  accepted=dict(
    ffn_with_glu=(True,),
    ffn_dim_divisor=(_DIVISOR,),
    activation_fn_name=("swish", "silu"),
    normalization_layer_name=("rms_norm",),
    normalize_qk_projections=(True,),
  ),
  rope=False,
  read=_read,
  write=_write,
  in_transformers=False,
  names=Names(
    prefix="transformer.",
    layer="transformer.layers.{}.",
    before={"transformer.token_embeddings.weight": {"embed_VE": "V E"}},
    block={
      "attn.qkv_proj.weight": {
        "attention/q_DNH": "+NH D",
        "attention/k_DKH": "+KH D",
        "attention/v_DKH": "+KH D",
      },
      "attn.q_norm.weight": {"attention/q_norm/scale_H": "H"},
      "attn.k_norm.weight": {"attention/k_norm/scale_H": "H"},
      "attn.out_proj.weight": {"attention/out_NHD": "D NH"},
      "attn_norm.weight": {"attention_norm/scale_D": "D"},
      "ffn.proj_1.weight": {"ffn/gate_DF": "+F D", "ffn/up_DF": "+F D"},
      "ffn.proj_2.weight": {"ffn/down_FD": "D F"},
      "ffn_norm.weight": {"ffn_norm/scale_D": "D"},
    },
    after={
      "transformer.norm.weight": {"final_norm/scale_D": "D"},
      "lm_head.weight": {"head_VE": "V E"},
    },
    embedding="transformer.token_embeddings.weight",
    head="lm_head.weight",
  ),
)

FAMILIES = (OPENELM,)
