"""Every architecture that cannot be built, or not on a mesh, is refused in one line. One case for
each refusal in slmjax/resolve_model.py; the last test counts them."""

import pytest

from slmjax import resolve_model as module
from slmjax.config import ConfigError
from slmjax.resolve import resolve, resolve_mesh, resolve_model
from tests import shrunken
from tests.refusals import change, missed

HEADS = "config.model.segments[0].attention"
ROTARY = "config.model.positions"
LLAMA, MLA, OPT = "fox1", "minicpm3:4b", "opt:350m"

CASES = [
  *(
    (LLAMA, {name: 0}, f"config.model.{name} is {zero}; it must be above 0")
    for name, zero in [
      ("vocab_size", 0),
      ("width", 0),
      ("max_length", 0),
      ("norm.eps", 0.0),
      ("embedding.width", 0),
      ("embedding.scale", 0.0),
      ("logits.scale", 0.0),
      ("logits.softcap", 0.0),
      ("block.residual_scale", 0.0),
      ("block.shortcut", 0),
      ("init.embedding_std", 0.0),
      ("init.std", 0.0),
      ("positions.width", 0),
    ]
  ),
  (
    LLAMA,
    {"init.output_std": -1.0},
    "config.model.init.output_std is -1.0; it must not be negative",
  ),
  (
    LLAMA,
    {"norm.bias": True},
    "config.model.norm: kind 'rms' has a scale and no bias; set scale=True, bias=False",
  ),
  (OPT, {"positions.offset": -1}, f"{ROTARY}.offset is -1; it must not be negative"),
  (
    LLAMA,
    {"positions.width": 3},
    f"{ROTARY}.width is 3; rotary positions turn pairs, so it must be even",
  ),
  (
    LLAMA,
    {"positions.width": 10},
    f"{ROTARY}.width 10 is above {HEADS}.head_width 8",
  ),
  (
    "llama:3_2_1b",
    {"positions.scaling.factor": 0.0},
    f"{ROTARY}.scaling.factor is 0.0; it must be above 0",
  ),
  (
    "llama:3_2_1b",
    {"positions.scaling.high": 1.0},
    f"{ROTARY}.scaling: high 1.0 is not above low 1.0",
  ),
  (
    "deepseek_v2_lite:dense",
    {"positions.scaling.magnitude": 0.0},
    f"{ROTARY}.scaling.magnitude is 0.0; it must be above 0",
  ),
  (
    "deepseek_v2_lite:dense",
    {"positions.scaling.fast": 1.0},
    f"{ROTARY}.scaling: fast 1.0 is not above slow 1.0",
  ),
  (
    MLA,
    {"positions.scaling.original_length": 0},
    f"{ROTARY}.scaling.original_length is 0; it must be above 0",
  ),
  (
    MLA,
    {"positions.scaling.long_factors": [1.0]},
    f"{ROTARY}.scaling.long_factors has 1 entries; {ROTARY}.width 8 needs 4",
  ),
  *(
    (LLAMA, {f"segments.0.{n}": -1}, f"config.model.segments[0].{n} is -1; it must be above 0")
    for n in ("layers", "repeat", "ffn.width", "attention.heads", "attention.head_width")
  ),
  (
    LLAMA,
    {"segments.0.attention.kv_heads": 3},
    f"{HEADS}.kv_heads 3 does not divide {HEADS}.heads 4 (remainder 1)",
  ),
  (
    LLAMA,
    {"segments.0.attention.softcap": 0.0},
    f"{HEADS}.softcap is 0.0; it must be above 0",
  ),
  (
    "bloom:560m",
    {"segments.0.attention.softcap": 5.0},
    f"{HEADS}.softcap does not go with positions of kind 'alibi'; set it to None",
  ),
  (
    LLAMA,
    {"segments.0.attention.windows": [0, -1]},
    f"{HEADS}.windows[1] is -1; give a number of keys, or 0 for all of them",
  ),
  (
    "pythia:160m",
    {"segments.0.attention.qk_norm": "head"},
    f"{HEADS}.qk_norm is 'head', which needs a config.model.norm of kind 'rms'",
  ),
  (
    MLA,
    {"segments.0.attention.latent_width": 0},
    f"{HEADS}.latent_width is 0; it must be above 0",
  ),
  (
    MLA,
    {"segments.0.attention.query_latent": 0},
    f"{HEADS}.query_latent is 0; it must be above 0",
  ),
  (
    MLA,
    {"positions": None},
    f"{HEADS}: latent attention has rotary positions; set {ROTARY} to kind 'rotary'",
  ),
  ("rwkv4:169m", {"segments.0.attention.width": 0}, f"{HEADS}.width is 0; it must be above 0"),
  (
    "rwkv4:169m",
    {"positions": {"kind": "alibi"}},
    f"{HEADS}: RWKV knows order by itself; set {ROTARY} to None",
  ),
  (
    LLAMA,
    {"segments.0.ffn": {"kind": "rwkv", "width": 8}},
    "config.model.segments[0]: attention of kind 'rwkv' and a feed-forward of kind 'rwkv' go "
    "together",
  ),
  (
    LLAMA,
    {"segments.0.ffn.series": 0},
    "config.model.segments[0].ffn.series is 0; it must be above 0",
  ),
]

MESH_CASES = [
  (LLAMA, 3, {}, "config.mesh.fsdp 3 does not divide config.model.width 32 (remainder 2)"),
  (
    OPT,
    32,
    {},
    "config.mesh.fsdp 32 does not divide config.model.embedding.width 16 (remainder 16)",
  ),
  (
    LLAMA,
    2,
    {"mesh.tensor": 2, "model.vocab_size": 383},
    "config.mesh.tensor 2 does not divide config.model.vocab_size 383 (remainder 1)",
  ),
  (
    LLAMA,
    8,
    {"mesh.tensor": 8},
    f"config.mesh.tensor 8 does not divide {HEADS}.heads 4 (remainder 4)",
  ),
  (
    LLAMA,
    4,
    {"mesh.tensor": 4, "model.segments.0.ffn.width": 66},
    "config.mesh.tensor 4 does not divide config.model.segments[0].ffn.width 66 (remainder 2)",
  ),
  (
    LLAMA,
    2,
    {
      "mesh.tensor": 2,
      "model.segments.0.attention.heads": 6,
      "model.segments.0.attention.kv_heads": 3,
    },
    f"config.mesh.tensor 2 does not divide {HEADS}.kv_heads 3 (remainder 1)",
  ),
  (
    LLAMA,
    4,
    {
      "mesh.tensor": 4,
      "model.segments.0.attention.heads": 12,
      "model.segments.0.attention.kv_heads": 3,
    },
    f"{HEADS}.kv_heads 3 does not divide config.mesh.tensor 4 (remainder 1)",
  ),
  (
    "rwkv4:169m",
    2,
    {"mesh.tensor": 2, "model.segments.0.attention.width": 31},
    f"config.mesh.tensor 2 does not divide {HEADS}.width 31 (remainder 1)",
  ),
  (
    MLA,
    4,
    {"model.segments.0.attention.latent_width": 18},
    f"config.mesh.fsdp 4 does not divide {HEADS}.latent_width 18 (remainder 2)",
  ),
  (
    MLA,
    4,
    {"model.segments.0.attention.query_latent": 18},
    f"config.mesh.fsdp 4 does not divide {HEADS}.query_latent 18 (remainder 2)",
  ),
]


def refusal(name, changes):
  settings = shrunken.model(name)
  for path, value in changes.items():
    change(settings, path, value)
  with pytest.raises(ConfigError) as caught:
    resolve_model(settings)
  return caught.value


def mesh_refusal(name, devices, changes):
  raw = shrunken.raw_config(name).to_dict()
  for path, value in changes.items():
    change(raw, path, value)
  config = resolve(raw)
  with pytest.raises(ConfigError) as caught:
    resolve_mesh(config, devices)
  return caught.value


@pytest.mark.parametrize(("name", "changes", "message"), CASES)
def test_refuses(name, changes, message):
  assert str(refusal(name, changes)) == message


@pytest.mark.parametrize(("name", "devices", "changes", "message"), MESH_CASES)
def test_mesh_refuses(name, devices, changes, message):
  assert str(mesh_refusal(name, devices, changes)) == message


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    ("positions.kind", "sinusoidal", "choose one of 'rotary', 'learned', 'alibi'"),
    ("positions", 3, "config.model.positions must be a mapping, got int 3"),
    ("positions.offset", 2, "config.model.positions.offset is not a setting; known here: kind, "),
    ("logits.softcap", "high", "config.model.logits.softcap must be float, got str 'high'"),
  ],
)
def test_a_choice_with_settings_of_its_own(path, value, message):
  assert message in str(refusal(LLAMA, {path: value}))


def test_every_refusal_has_a_case():
  errors = [*(refusal(n, c) for n, c, _ in CASES), *(mesh_refusal(*c[:3]) for c in MESH_CASES)]
  assert not missed(module, errors)
