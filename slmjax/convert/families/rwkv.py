"""rwkv: RWKV-4."""

from typing import Any

from slmjax import families
from slmjax.architecture import normal
from slmjax.convert.family import Family, NotThisFamily, Reading
from slmjax.convert.fields import Fields
from slmjax.convert.names import Names
from slmjax.model_config import ModelConfig, RwkvChannelMix, RwkvTimeMix

# The config has no such field; its class draws by a rule of its own.
_STD = 0.02


def _read(fields: Fields) -> Reading:
  """`rescale_every` halves activations and weights of deep blocks at inference in float16, which
  does not change the function."""
  width = fields.integer("hidden_size")
  settings = families.rwkv(
    vocab_size=fields.integer("vocab_size"),
    width=width,
    layers=fields.integer("num_hidden_layers"),
    attention_width=fields.integer_or("attention_hidden_size", width),
    ffn=fields.integer_or("intermediate_size", 4 * width),
    max_length=fields.integer("context_length"),
    tied=fields.flag("tie_word_embeddings"),
    eps=fields.number("layer_norm_epsilon"),
    init=normal(_STD),
  )
  return Reading(settings, None)


def _write(model: ModelConfig, theta: float | None) -> dict[str, Any]:
  time_mix, channel_mix = model.segments[0].attention, model.segments[0].ffn
  if not isinstance(time_mix, RwkvTimeMix) or not isinstance(channel_mix, RwkvChannelMix):
    raise NotThisFamily
  return dict(
    vocab_size=model.vocab_size,
    hidden_size=model.width,
    num_hidden_layers=model.depth,
    attention_hidden_size=time_mix.width,
    intermediate_size=channel_mix.width,
    context_length=model.max_length,
    layer_norm_epsilon=model.norm.eps,
    tie_word_embeddings=model.embedding.tied,
    rescale_every=0,
  )


RWKV = Family(
  model_type="rwkv",
  architecture="RwkvForCausalLM",
  defaults=dict(
    vocab_size=50277,
    context_length=1024,
    hidden_size=4096,
    num_hidden_layers=32,
    attention_hidden_size=None,
    intermediate_size=None,
    layer_norm_epsilon=1e-5,
    tie_word_embeddings=False,
    rescale_every=6,
  ),
  aliases=dict(max_position_embeddings="context_length"),
  rope=False,
  read=_read,
  write=_write,
  names=Names(
    prefix="rwkv.",
    layer="rwkv.blocks.{}.",
    before={
      "rwkv.embeddings.weight": {"embed_VE": "V E"},
      "rwkv.blocks.0.pre_ln.weight": {"embed_norm/scale_D": "D"},
      "rwkv.blocks.0.pre_ln.bias": {"embed_norm/bias_D": "D"},
    },
    block={
      "ln1.weight": {"attention_norm/scale_D": "D"},
      "ln1.bias": {"attention_norm/bias_D": "D"},
      "ln2.weight": {"ffn_norm/scale_D": "D"},
      "ln2.bias": {"ffn_norm/bias_D": "D"},
      "attention.time_decay": {"attention/decay_A": "A"},
      "attention.time_first": {"attention/bonus_A": "A"},
      "attention.time_mix_key": {"attention/key_mix_D": "1 1 D"},
      "attention.time_mix_value": {"attention/value_mix_D": "1 1 D"},
      "attention.time_mix_receptance": {"attention/receptance_mix_D": "1 1 D"},
      "attention.key.weight": {"attention/key_DA": "A D"},
      "attention.value.weight": {"attention/value_DA": "A D"},
      "attention.receptance.weight": {"attention/receptance_DA": "A D"},
      "attention.output.weight": {"attention/out_AD": "D A"},
      "feed_forward.time_mix_key": {"ffn/key_mix_D": "1 1 D"},
      "feed_forward.time_mix_receptance": {"ffn/receptance_mix_D": "1 1 D"},
      "feed_forward.key.weight": {"ffn/key_DF": "F D"},
      "feed_forward.receptance.weight": {"ffn/receptance_DD": "d D"},
      "feed_forward.value.weight": {"ffn/value_FD": "D F"},
    },
    after={
      "rwkv.ln_out.weight": {"final_norm/scale_D": "D"},
      "rwkv.ln_out.bias": {"final_norm/bias_D": "D"},
      "head.weight": {"head_VE": "V E"},
    },
    embedding="rwkv.embeddings.weight",
    head="head.weight",
  ),
)

FAMILIES = (RWKV,)
