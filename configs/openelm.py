"""OpenELM (arXiv 2404.14619): heads and feed-forward grow with depth, query and key norms.

  python -m slmjax.main --config=configs/openelm.py:270m --workdir=DIR

Parameters: 270m 271,527,168; 450m 457,179,136; 1_1b 1,079,891,456; 3b 3,036,647,424. Its authors:
128 A100 or H100, 3 to 13 days. Not run by us.

Published (apple/corenet at 1aa3acd): architecture, initialisation, 350k steps of 4.2M tokens,
AdamW, warm-up from 1e-6, cosine to a tenth, z-loss. Not done as there: each row was one piece of a
document, padded; here rows are packed and documents do not see each other. The mean of the last
five checkpoints, which they report, is not built. The sources' shares are not published; ours are.
"""

from ml_collections import ConfigDict

from slmjax import families
from slmjax.pretraining import cosine, one_stage

# layers, width, head width, peak learning rate
_SIZES = {
  "270m": (16, 1280, 64, 5.3e-3),
  "450m": (20, 1536, 64, 3.9e-3),
  "1_1b": (28, 2048, 64, 2.4e-3),
  "3b": (36, 3072, 128, 1.2e-3),
}
VARIANTS = tuple(_SIZES)


def get_config(variant: str = "270m") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  layers, width, head_width, peak = _SIZES[variant]
  model = families.openelm(
    vocab_size=32_000,
    width=width,
    layers=layers,
    head_width=head_width,
    groups=4,
    max_length=2048,
    eps=1e-6,
  )
  c = one_stage(
    name=f"openelm_{variant}",
    model=model,
    sources=dict(refinedweb=0.4, pile=0.15, redpajama=0.25, dolma=0.2),
    tokens=350_000 * 2048 * 2048,
    batch_rows=2048,
    length=2048,
    microbatch_rows=4,
    rope_theta=10_000.0,
    isolate_documents=True,
    learning_rate=cosine(peak, peak / 10, warmup=5000),
    z_loss=1e-4,
  )
  c.stages[0].learning_rate.start = 1e-6
  return c
