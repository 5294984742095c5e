"""MobileLLM (arXiv 2402.14905): deep and thin, tied tables, and in the LS models each block twice.

  python -m slmjax.main --config=configs/mobilellm.py:125m --workdir=DIR

Parameters: 125m 124,635,456; 350m 345,355,200; 600m 603,188,352; 1b 1,005,461,760; 1_5b
1,511,188,800; the LS variants have those of their bases and run 60 and 64 blocks. Its authors: 3,
6, 8, 12 and 18 days on 32 A100-80G. Not run by us. Results to compare with, average of eight zero-
shot tasks: 46.3, 51.3, 54.3, 57.3, 59.4; LS 47.0 and 52.1.

Published (paper and its repository at 8b9769d): architecture, 480k steps of 2.1M tokens, AdamW,
2e-3 with 1000 steps of warm-up and a cosine to a tenth. The data are not; the clip is assumed.
"""

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import normal
from slmjax.pretraining import cosine, one_stage

# layers, width, heads, key/value heads, feed-forward, passes through each block
_SIZES = {
  "125m": (30, 576, 9, 3, 1536, 1),
  "350m": (32, 960, 15, 5, 2560, 1),
  "600m": (40, 1152, 18, 6, 3072, 1),
  "1b": (54, 1280, 20, 5, 3584, 1),
  "1_5b": (54, 1600, 25, 5, 4352, 1),
  "125m_ls": (30, 576, 9, 3, 1536, 2),
  "350m_ls": (32, 960, 15, 5, 2560, 2),
}
VARIANTS = tuple(_SIZES)


def get_config(variant: str = "125m") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  layers, width, heads, kv_heads, ffn, repeat = _SIZES[variant]
  model = families.llama(
    vocab_size=32_000,
    width=width,
    layers=layers,
    repeat=repeat,
    heads=heads,
    kv_heads=kv_heads,
    ffn=ffn,
    max_length=2048,
    tied=True,
    eps=1e-5,
    init=normal(0.02),
  )
  return one_stage(
    name=f"mobilellm_{variant}",
    model=model,
    sources=dict(web=1.0),
    tokens=480_000 * 1024 * 2048,
    batch_rows=1024,
    length=2048,
    microbatch_rows=4,
    rope_theta=10_000.0,
    learning_rate=cosine(2e-3, 2e-4, warmup=1000),
  )
