"""House rules that the syntax tree can check. Each rule is tried on a line that breaks it."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from slmjax import main
from slmjax.sharding import AXES

ROOT = Path(__file__).parent.parent
FILES = {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in ROOT.glob("slmjax/**/*.py")}
RECIPES = {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in ROOT.glob("configs/*.py")}


def imports(tree):
  """Every module that a file imports, anywhere in it: `from a import b` gives a and a.b."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module or ""
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_any(tree, *packages):
  return sorted({m for m in imports(tree) if m.split(".")[0] in packages})


def nnx_names(tree):
  """What a file takes from nnx, as an attribute or by name."""
  for node in ast.walk(tree):
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("nnx", "flax.nnx"):
      yield node.attr
  yield from (m.removeprefix("flax.nnx.") for m in imports(tree) if m.startswith("flax.nnx."))


def axis_literals(tree):
  """String literals that name a mesh axis."""
  return [
    f"line {node.lineno}: {node.value!r}"
    for node in ast.walk(tree)
    if isinstance(node, ast.Constant) and node.value in AXES
  ]


def hidden_defaults(tree):
  """Calls `x.get(name, default)`, and getattr with a constant but None for a default."""
  return [
    f"line {node.lineno}: {ast.unparse(node)}"
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    and (
      (isinstance(node.func, ast.Attribute) and node.func.attr == "get" and len(node.args) == 2)
      or (
        ast.unparse(node.func) == "getattr"
        and len(node.args) == 3
        and isinstance(node.args[2], ast.Constant)
      )
    )
    and ast.unparse(node.args[-1]) != "None"
  ]


def broad_excepts(tree):
  caught = {"Exception", "BaseException", None}
  return [
    f"line {node.lineno}"
    for node in ast.walk(tree)
    if isinstance(node, ast.ExceptHandler) and (node.type and ast.unparse(node.type)) in caught
  ]


def offenders(check, files=FILES):
  return {name: found for name, tree in files.items() if (found := check(tree))}


def test_the_rules_see_what_breaks_them():
  def parse(line):
    return ast.parse(line)

  assert imports_any(parse("def f():\n  import torch.nn"), "torch") == ["torch.nn"]
  assert list(nnx_names(parse("nnx.jit(f); flax.nnx.split(m)"))) == ["jit", "split"]
  assert list(nnx_names(parse("from flax.nnx import Optimizer"))) == ["Optimizer"]
  assert axis_literals(parse("P('fsdp', None)"))
  assert hidden_defaults(parse("config.get('z', 0)"))
  assert hidden_defaults(parse("getattr(config, 'z', 0)"))
  assert not hidden_defaults(parse("getattr(module, 'get_config', None)"))
  assert broad_excepts(parse("try: f()\nexcept Exception: pass"))
  assert broad_excepts(parse("try: f()\nexcept: pass"))


def test_only_the_three_names_of_nnx():
  used = set(itertools.chain.from_iterable(map(nnx_names, FILES.values())))
  assert used == {"Module", "Param", "List"}


def test_only_sharding_names_mesh_axes():
  """The config's fields have the same names; they are attributes, so no literal is needed."""
  assert set(offenders(axis_literals)) == {"slmjax/sharding.py"}


def test_only_checkpoint_imports_orbax():
  assert set(offenders(lambda tree: imports_any(tree, "orbax"))) == {"slmjax/checkpoint.py"}


def test_the_core_never_imports_an_extra():
  extras = ("torch", "transformers", "ray", "lm_eval", "wandb", "datasets", "tensorflow")
  assert not offenders(lambda tree: imports_any(tree, *extras))


def test_models_know_neither_mesh_nor_data_and_the_plan_no_file():
  """model/ meets sharding in Specs alone; data/plan.py and what it stands on know no file."""
  for name, tree in FILES.items():
    found = {m for m in imports(tree) if m.startswith("slmjax.")}
    if name.startswith("slmjax/model/"):
      assert not {m for m in found if m.startswith(("slmjax.data", "slmjax.train"))}, name
      assert not imports_any(tree, "grain", "optax"), name
    if name == "slmjax/sharding.py":
      assert not found, name
    if name in ("slmjax/data/plan.py", "slmjax/data/mixture.py", "slmjax/data/permutation.py"):
      assert found <= {
        "slmjax.config",
        "slmjax.config.Config",
        "slmjax.config.ConfigError",
        "slmjax.data.mixture",
        "slmjax.data.mixture.Mixture",
        "slmjax.data.permutation",
        "slmjax.data.permutation.permute",
        "slmjax.data.permutation.round_keys",
      }, name
      assert not imports_any(tree, "pathlib", "os", "io", "jax", "grain"), name


def test_no_default_hides_in_a_get():
  assert not offenders(hidden_defaults, FILES | RECIPES)


def test_no_broad_except():
  """But for one: Orbax reports damaged array data as a bare Exception."""
  assert list(offenders(broad_excepts)) == ["slmjax/checkpoint.py"]


def test_configs_have_no_defaults():
  """Every setting is given in the recipe: a dataclass field of the config has no default."""
  files = (FILES["slmjax/config.py"], FILES["slmjax/model_config.py"])
  for node in itertools.chain.from_iterable(map(ast.walk, files)):
    if isinstance(node, ast.ClassDef):
      fields = [statement for statement in node.body if isinstance(statement, ast.AnnAssign)]
      assert not [ast.unparse(field) for field in fields if field.value is not None], node.name


def test_files_are_short():
  lengths = {name: len((ROOT / name).read_text().splitlines()) for name in FILES}
  assert not {name: length for name, length in lengths.items() if length > 400}


def test_flags_are_frozen():
  """A new flag is a new promise: settings belong in the config."""
  defined = [flag for action in main.flags()._actions for flag in action.option_strings]
  assert defined == [
    *("-h", "--help", "--workdir", "--explain", "--json"),
    *("--distributed", "--coordinator", "--processes", "--process"),
  ]


@pytest.mark.medium
def test_importing_the_data_path_loads_no_accelerator():
  """Tokenizing runs on machines of its own, in many processes: it needs no jax."""
  code = "import sys, slmjax.data.tokenize; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
