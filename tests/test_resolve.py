"""Every combination that cannot work is refused in one line that names the setting and shows the
arithmetic. One case for each refusal in slmjax/resolve.py; the last test counts them."""

import pytest

from slmjax import resolve as module
from slmjax.config import ConfigError
from slmjax.resolve import resolve, resolve_mesh
from tests import shrunken, small
from tests.refusals import change, missed

RATE = "config.stages[1] (curated).learning_rate"


def edited(changes):
  """The small config with some leaves changed."""
  raw = small.raw_config().to_dict()
  for path, value in changes.items():
    change(raw, path, value)
  return raw


def refusal(changes):
  with pytest.raises(ConfigError) as caught:
    resolve(edited(changes))
  return caught.value


def mesh_refusal(devices, changes):
  config = resolve(edited(changes))
  with pytest.raises(ConfigError) as caught:
    resolve_mesh(config, devices)
  return caught.value


CASES = [
  (
    {"data.sources.wiki": {"max_epochs": 1.0}},
    "config.data.sources.wiki is in no stage's sources; add it to one or remove it",
  ),
  ({"stages.1.learning_rate.end": 0.005}, f"{RATE}: end 0.005 is above peak 0.004"),
  # config.optimizer
  *(
    ({f"optimizer.{name}": 0.0}, f"config.optimizer.{name} is 0.0; it must be above 0")
    for name in ("eps", "clip_norm")
  ),
  *(
    ({f"optimizer.{n}": bad}, f"config.optimizer.{n} is {bad}; it must lie in [0, 1)")
    for n in ("beta1", "beta2")
    for bad in (-0.1, 1.0)
  ),
  *(
    ({f"optimizer.{n}": -0.1}, f"config.optimizer.{n} is -0.1; it must not be negative")
    for n in ("weight_decay", "z_loss")
  ),
  # config.mesh
  *(
    ({f"mesh.{axis}": 0}, f"config.mesh.{axis} is 0; it must be above 0")
    for axis in ("replica", "context", "tensor")
  ),
  *(
    (
      {"mesh.fsdp": bad},
      f"config.mesh.fsdp is {bad}; give a count or -1 for the devices that are left",
    )
    for bad in (0, -2)
  ),
  (
    {"mesh.context": 2},
    "config.mesh.context is 2; sequences are not split over devices yet: set it to 1 and use fsdp "
    "or tensor",
  ),
  # config itself, checkpoint, eval, data
  ({"seed": -1}, "config.seed is -1; it must not be negative"),
  *(
    ({f"checkpoint.{n}": 0}, f"config.checkpoint.{n} is 0; it must be above 0")
    for n in ("every_steps", "keep")
  ),
  *(
    ({f"eval.{n}": 0}, f"config.eval.{n} is 0; it must be above 0")
    for n in ("every_steps", "tokens_per_source", "row_length", "rows")
  ),
  (
    {"eval.row_length": 129},
    "config.eval.row_length 129 is above config.model.max_length 128",
  ),
  (
    {"data.sources.docs.max_epochs": 0.0},
    "config.data.sources.docs.max_epochs is 0.0; it must be above 0",
  ),
  (
    {"stages.2.name": "general"},
    "config.stages have equal names: general, curated, general",
  ),
  # config.stages
  *(
    ({f"stages.1.{n}": zero}, f"config.stages[1] (curated).{n} is {zero}; it must be above 0")
    for n, zero in [("tokens", 0), ("batch_tokens", 0), ("microbatch_rows", 0), ("rope_theta", 0.0)]
  ),
  (
    {"stages.1.sources": {"novels": dict(weight=1.0, chunk=64)}},
    "config.stages[1] (curated).sources.novels is not one of config.data.sources: code, docs, "
    "examples, packages, reference",
  ),
  (
    {"stages.1.sources.docs.chunk": 0},
    "config.stages[1] (curated).sources.docs.chunk is 0; it must be above 0",
  ),
  (
    {"stages.1.sources.docs.weight": -0.5},
    "config.stages[1] (curated).sources.docs.weight is -0.5; it must not be negative",
  ),
  (
    {"stages.1.sources.docs.chunk": 24},
    "config.stages[1] (curated).sources.docs.chunk 24 does not divide the row: 64 = 2 x 24 + 16; "
    "the row is the stage's longest chunk",
  ),
  (
    {f"stages.0.sources.{n}.weight": 0.0 for n in ("docs", "code")},
    "config.stages[0] (general).sources: the weights sum to 0.0; at least one must be above 0",
  ),
  (
    {"model.max_length": 63, "eval.row_length": 32},
    "config.stages[1] (curated): a row of 64 tokens is above config.model.max_length 63",
  ),
  (
    {"stages.1.batch_tokens": 500},
    "config.stages[1] (curated).batch_tokens 500 is not whole rows: 7 x 64 + 52",
  ),
  (
    {"stages.1.tokens": 511},
    "config.stages[1] (curated).tokens 511 does not pay for one batch of 512 tokens",
  ),
  (
    {"stages.1.rope_theta": None},
    "config.stages[1] (curated).rope_theta is None; rotary positions need a base",
  ),
  (
    {"model": shrunken.model("gpt2:124m")},
    "config.stages[0] (general).rope_theta is 10000.0, but the model has no rotary positions; set "
    "it to None",
  ),
  # learning rates
  *(
    ({f"stages.1.learning_rate.{n}": bad}, f"{RATE}.{n} is {bad}; it must not be negative")
    for n, bad in [
      ("start", -1.0),
      ("peak", -1.0),
      ("end", -1.0),
      ("warmup_steps", -1),
      ("decay_steps", -1),
    ]
  ),
  (
    {f"stages.1.learning_rate.{n}": 0.0 for n in ("start", "peak")},
    f"{RATE}.peak is 0.0: the stage would not train",
  ),
  (
    {"stages.1.learning_rate.start": 1e-3},
    f"{RATE}: start 0.001 is not peak 0.004; without warmup they must be equal",
  ),
  (
    {"stages.1.learning_rate.shape": "constant"},
    f"{RATE}: end 0.0004 is not peak 0.004; with shape 'constant' they must be equal",
  ),
  (
    {"stages.1.learning_rate.shape": "wsd"},
    f"{RATE}.decay_steps is 0; shape 'wsd' needs it above 0",
  ),
  (
    {"stages.1.learning_rate.decay_steps": 3},
    f"{RATE}.decay_steps is 3; only shape 'wsd' reads it: set it to 0",
  ),
  (
    {
      "stages.1.learning_rate.shape": "wsd",
      "stages.1.learning_rate.decay_steps": 4,
      "stages.1.learning_rate.warmup_steps": 3,
    },
    f"{RATE}: warmup_steps 3 + decay_steps 4 are more than the stage's 6 steps (3072 tokens // "
    "512)",
  ),
]


@pytest.mark.parametrize(("changes", "message"), CASES)
def test_refuses(changes, message):
  assert str(refusal(changes)) == message


def test_the_small_config_itself_is_fine():
  resolve(small.raw_config())


@pytest.mark.parametrize(
  ("devices", "changes", "mesh"),
  [
    (1, {}, (1, 1, 1, 1)),
    (4, {}, (1, 4, 1, 1)),
    (4, {"mesh.tensor": 2}, (1, 2, 1, 2)),
    (4, {"mesh.tensor": 4}, (1, 1, 1, 4)),  # two key/value heads on four devices: copies
    (8, {"mesh.replica": 2, "mesh.tensor": 2}, (2, 2, 1, 2)),
    (2, {"mesh.fsdp": 2}, (1, 2, 1, 1)),
  ],
)
def test_mesh(devices, changes, mesh):
  assert resolve_mesh(resolve(edited(changes)), devices) == mesh


MESH_CASES = [
  (
    4,
    {"mesh.fsdp": 2},
    "config.mesh: replica 1 x fsdp 2 x context 1 x tensor 1 = 2, but there are 4 devices",
  ),
  (
    6,
    {"mesh.tensor": 4},
    "config.mesh: replica 1 x fsdp 1 x context 1 x tensor 4 = 4, but there are 6 devices",
  ),
  (
    2,
    {"mesh.tensor": 4},
    "config.mesh: replica 1 x fsdp 0 x context 1 x tensor 4 = 0, but there are 2 devices",
  ),
  (
    8,
    {},
    "replica 1 x fsdp 8 x microbatch_rows 2 = 16 does not divide the rows of config.stages[0] "
    "(general), 256 / 32 = 8 (remainder 8)",
  ),
  (
    4,
    {"mesh.replica": 2, "eval.rows": 6},
    "replica 2 x fsdp 2 = 4 does not divide config.eval.rows 6 (remainder 2)",
  ),
]


@pytest.mark.parametrize(("devices", "changes", "message"), MESH_CASES)
def test_mesh_refuses(devices, changes, message):
  assert str(mesh_refusal(devices, changes)) == message


def test_every_refusal_has_a_case():
  """Each line of resolve.py that can refuse does so in some case above: a new one needs a case."""
  errors = [*(refusal(c) for c, _ in CASES), *(mesh_refusal(d, c) for d, c, _ in MESH_CASES)]
  assert not missed(module, errors)
