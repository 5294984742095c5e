"""A config.json, read field by field so that none that changes the function is missed.

Each field is one of four: read by the family (with the value that its class takes where it is
absent), accepted at certain values only, known not to change the function, or unknown. A field of
the second kind with another value is refused, and so is an unknown one, unless it is null, false or
empty: it may be a switch that this code has never heard of.
"""

from collections.abc import Collection, Mapping
from typing import Any

from slmjax.errors import UserError

# What transformers writes beside the architecture: dropout (training only), ids of special tokens,
# generation settings, labels of other heads, book-keeping of the library.
_IGNORED_TEXT = """
  model_type architectures auto_map torch_dtype dtype transformers_version tokenizer_class
  custom_pipelines transformers.js_config
  _name_or_path _attn_implementation attn_implementation _commit_hash use_cache cache_implementation
  return_dict return_dict_in_generate output_attentions output_hidden_states output_scores
  torchscript use_bfloat16 task_specific_params finetuning_task problem_type num_labels id2label
  label2id prefix chunk_size_feed_forward gradient_checkpointing pretraining_tp
  bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
  forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens bad_words_ids
  max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
  diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
  no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
  exponential_decay_length_penalty
  remove_invalid_values
  attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout activation_dropout
  layerdrop classifier_dropout resid_dropout embed_dropout
  summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
"""
IGNORED = frozenset(_IGNORED_TEXT.split())

# Fields that any model may have, and what they must be.
_EVERYWHERE: Mapping[str, tuple[Any, ...]] = {
  "quantization_config": (None,),
  "is_encoder_decoder": (False, None),
  "is_decoder": (False, True, None),
  "add_cross_attention": (False, None),
  "cross_attention_hidden_size": (None,),
  "tie_encoder_decoder": (False, None),
  "pruned_heads": ({}, None),
}

ROPE_LENGTH = "original_max_position_embeddings"
ROPE_FIELDS = (
  *("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor"),
  ROPE_LENGTH,
)

_ACTIVATIONS = {
  "silu": "silu",
  "swish": "silu",
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "relu": "relu",
  "relu2": "relu2",
}
# How we call them when we write: names that old and new transformers have.
ACTIVATION_NAMES = {
  "silu": "silu",
  "gelu": "gelu",
  "gelu_tanh": "gelu_pytorch_tanh",
  "relu": "relu",
  "relu2": "relu2",
}


class Fields:
  """The fields of a config.json with the defaults of its model_type's class."""

  def __init__(
    self,
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    where: str,
    aliases: Mapping[str, str],
    rope: bool,
  ):
    """`aliases` are other names of fields, with those that `defaults` has; `rope` says whether the
    fields of rotary positions are read."""
    self.where = where
    self.given = dict(config)
    for alias, name in aliases.items():
      if alias in self.given:
        value = self.given.pop(alias)
        if name in self.given and self.given[name] != value:
          self.refuse(alias, value, f"{name} is {self.given[name]!r}; they must agree")
        self.given[name] = value
    self._defaults = defaults
    self._values = {**defaults, **self.given}
    self._read = frozenset([*defaults, *(ROPE_FIELDS if rope else ())])

  def check(self, accepted: Mapping[str, tuple[Any, ...]], allowed: Collection[str]) -> None:
    """Refuses what this conversion does not honour; `allowed` are names that the user has cleared.

    `accepted` are the family's fields with all values that they may have.
    """
    accepted = {**_EVERYWHERE, **accepted}
    for name, values in accepted.items():
      if name in self.given and self.given[name] not in values:
        wanted = " or ".join(repr(value) for value in values)
        self.refuse(name, self.given[name], f"only {wanted} can be converted")
    for name, value in self.given.items():
      known = name in accepted or name in self._read or name in IGNORED or name in allowed
      if not known and value not in (None, False, [], {}):
        self.refuse(
          name,
          value,
          f"unknown here; if it does not change what the model computes, pass --ignore={name}",
        )

  def refuse(self, name: str, value: Any, why: str) -> None:
    raise UserError(f"{self.where}: {name} is {value!r}; {why}")

  def reads(self, name: str) -> bool:
    """Whether the class has the field, given or not."""
    return name in self._defaults

  def has(self, name: str) -> bool:
    return self.given.get(name) is not None

  def __getitem__(self, name: str) -> Any:
    return self._values[name]

  def integer(self, name: str) -> int:
    value = self._values[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      self.refuse(name, value, "it must be a whole number above 0")
    return value

  def integer_or(self, name: str, other: int) -> int:
    """`other` where the field is null or absent."""
    return other if self._values[name] is None else self.integer(name)

  def integer_or_none(self, name: str) -> int | None:
    return None if self._values[name] is None else self.integer(name)

  def number(self, name: str) -> float:
    value = self._values[name]
    if not isinstance(value, int | float) or isinstance(value, bool):
      self.refuse(name, value, "it must be a number")
    return float(value)

  def number_or_none(self, name: str) -> float | None:
    return None if self._values[name] is None else self.number(name)

  def flag(self, name: str) -> bool:
    value = self._values[name]
    if not isinstance(value, bool):
      self.refuse(name, value, "it must be true or false")
    return value

  def activation(self, name: str) -> str:
    value = self._values[name]
    if value not in _ACTIVATIONS:
      self.refuse(name, value, f"activations here are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]
