"""Conversions without torch: what is refused, how files are read and written, the way back.

The files are written and read by the library `safetensors`.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import pangu_pi
from slmjax import checkpoint, sharding
from slmjax.config import to_dict
from slmjax.convert import export, import_, registry, tokenizer_files
from slmjax.errors import UserError
from slmjax.resolve import resolve, resolve_model
from slmjax.state import init_state
from tests import small

Tensors = dict[str, np.ndarray]

V, D, N, K, H, F = 24, 16, 4, 2, 4, 20

LLAMA: dict[str, Any] = dict(
  model_type="llama",
  architectures=["LlamaForCausalLM"],
  vocab_size=V,
  hidden_size=D,
  intermediate_size=F,
  num_hidden_layers=2,
  num_attention_heads=N,
  num_key_value_heads=K,
  max_position_embeddings=32,
  rms_norm_eps=1e-5,
  tie_word_embeddings=True,
  rope_theta=500.0,
  torch_dtype="float32",
)


def random(dtype: Any, *shape: int) -> np.ndarray:
  return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def llama_tensors(dtype: Any = np.float32) -> Tensors:
  tensors = {"model.embed_tokens.weight": random(dtype, V, D)}
  for i in range(2):
    layer = {
      "input_layernorm.weight": (D,),
      "self_attn.q_proj.weight": (N * H, D),
      "self_attn.k_proj.weight": (K * H, D),
      "self_attn.v_proj.weight": (K * H, D),
      "self_attn.o_proj.weight": (D, N * H),
      "post_attention_layernorm.weight": (D,),
      "mlp.gate_proj.weight": (F, D),
      "mlp.up_proj.weight": (F, D),
      "mlp.down_proj.weight": (D, F),
    }
    for j, (name, shape) in enumerate(layer.items()):
      tensors[f"model.layers.{i}.{name}"] = random(dtype, *shape) + dtype(i + 2 * j)
  return tensors | {"model.norm.weight": random(dtype, D)}


def save(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  save_file(tensors, folder / "model.safetensors")
  return folder


def around(tmp_path: Path, config: dict[str, Any], tensors: Tensors) -> tuple[Path, Tensors]:
  """There and back: the run's folder, and the tensors that came back."""
  source = save(tmp_path / "hf", config, tensors)
  import_.import_folder(source, tmp_path / "run", ())
  export.export_folder(tmp_path / "run", tmp_path / "back", None, 5.0, parity=False)
  assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
  return tmp_path / "run", load_file(tmp_path / "back" / "model.safetensors")


def assert_same(found: Tensors, expected: Tensors) -> None:
  assert set(found) == set(expected)
  for name, tensor in expected.items():
    assert found[name].dtype == tensor.dtype
    assert found[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: Any) -> None:
  """float16 is float32 in between; the others stay what they are."""
  tensors = llama_tensors(dtype)
  run, back = around(tmp_path, LLAMA, tensors)
  assert_same(back, tensors)
  stored = checkpoint.read_array(run, 0, "segments/0/attention/k_DKH")
  assert stored.dtype == (np.float32 if dtype == np.float16 else dtype)
  k = tensors["model.layers.1.self_attn.k_proj.weight"]
  np.testing.assert_array_equal(stored[1, 3, 1], k[H : 2 * H, 3])
  meta = checkpoint.read_meta(run, 0)
  assert set(meta) == {"step", "model", "rope_theta", "param_dtype", "imported", "tokenizer"}
  assert (meta["step"], meta["rope_theta"], meta["tokenizer"]) == (0, 500.0, None)
  assert meta["imported"]["config"] == LLAMA
  assert resolve_model(meta["model"]).norm.eps == 1e-5


def test_mobilellm_shares_blocks_and_tables(tmp_path: Path) -> None:
  config = LLAMA | dict(
    model_type="mobilellm",
    tie_word_embeddings=False,
    share_embedding=True,
    layer_sharing=True,
    mlp_bias=False,
  )
  tensors = llama_tensors(np.float16)
  run, back = around(tmp_path, config, tensors)
  assert_same(back, tensors)
  model = resolve_model(checkpoint.read_meta(run, 0)["model"])
  assert model.embedding.tied
  assert (model.segments[0].layers, model.segments[0].repeat) == (2, 2)


def test_openelm_scales_its_layers(tmp_path: Path) -> None:
  config = dict(
    model_type="openelm",
    vocab_size=V,
    model_dim=64,
    num_transformer_layers=3,
    head_dim=8,
    qkv_multipliers=[0.5, 1.0],
    num_query_heads=[4, 6, 8],
    num_kv_heads=[2, 3, 4],
    num_gqa_groups=2,
    ffn_multipliers=[0.5, 4.25, 8.0],
    ffn_dim_divisor=256,
    ffn_with_glu=True,
    activation_fn_name="swish",
    normalization_layer_name="rms_norm",
    normalize_qk_projections=True,
    share_input_output_layers=True,
    max_context_length=32,
    rope_freq_constant=10000,
    rope_max_length=64,
    initializer_range=0.02,
  )
  tensors = {
    "transformer.token_embeddings.weight": random(np.float32, V, 64),
    "transformer.norm.weight": random(np.float32, 64),
  }
  for i, (heads, kv, ffn) in enumerate(zip((4, 6, 8), (2, 3, 4), (256, 256, 512), strict=True)):
    tensors |= {
      f"transformer.layers.{i}.{name}": random(np.float32, *shape) + i
      for name, shape in {
        "attn.qkv_proj.weight": ((heads + 2 * kv) * 8, 64),
        "attn.q_norm.weight": (8,),
        "attn.k_norm.weight": (8,),
        "attn.out_proj.weight": (64, heads * 8),
        "attn_norm.weight": (64,),
        "ffn.proj_1.weight": (2 * ffn, 64),
        "ffn.proj_2.weight": (64, ffn),
        "ffn_norm.weight": (64,),
      }.items()
    }
  run, back = around(tmp_path, config, tensors)
  assert_same(back, tensors)
  fused = tensors["transformer.layers.1.attn.qkv_proj.weight"]
  values = checkpoint.read_array(run, 0, "segments/1/attention/v_DKH")[0]
  np.testing.assert_array_equal(values[:, 1], fused[(6 + 3 + 1) * 8 : (6 + 3 + 2) * 8].T)
  up = checkpoint.read_array(run, 0, "segments/2/ffn/up_DF")[0]
  np.testing.assert_array_equal(up, tensors["transformer.layers.2.ffn.proj_1.weight"][512:].T)


def test_what_old_files_hold_too_is_left_out(tmp_path: Path) -> None:
  """An equal head, constants, and names without the outer model's prefix."""
  tensors = {name.removeprefix("model."): t for name, t in llama_tensors().items()}
  tensors["lm_head.weight"] = tensors["embed_tokens.weight"].copy()
  tensors["layers.0.self_attn.rotary_emb.inv_freq"] = random(np.float32, 2)
  _, back = around(tmp_path, LLAMA, tensors)
  assert_same(back, llama_tensors())


def test_sharded_files_in_and_out(tmp_path: Path) -> None:
  tensors = llama_tensors()
  source = save(tmp_path / "hf", LLAMA, tensors)
  (source / "model.safetensors").unlink()
  names = sorted(tensors)
  parts = {"model-00001-of-00002.safetensors": names[::2]}
  parts["model-00002-of-00002.safetensors"] = names[1::2]
  for file, held in parts.items():
    save_file({name: tensors[name] for name in held}, source / file)
  weight_map = {name: file for file, held in parts.items() for name in held}
  index = source / "model.safetensors.index.json"
  index.write_text(json.dumps({"weight_map": weight_map}))
  import_.import_folder(source, tmp_path / "run", ())
  limit = 4000
  export.export_folder(tmp_path / "run", tmp_path / "back", None, limit / 1e9, parity=False)

  written = json.loads((tmp_path / "back" / index.name).read_text())
  assert written["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
  found: Tensors = {}
  files = sorted((tmp_path / "back").glob("*.safetensors"))
  for file in files:
    held = load_file(file)
    assert sum(t.nbytes for t in held.values()) <= limit
    assert {name for name, f in written["weight_map"].items() if f == file.name} == set(held)
    found |= held
  assert len(files) > 2
  assert_same(found, tensors)

  (source / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(UserError, match=r"00002-of-00002.safetensors is missing"):
    import_.import_folder(source, tmp_path / "other", ())


def without(name: str) -> Callable[[Path], None]:
  return lambda folder: edit(folder, lambda tensors: tensors.pop(name))


def put(name: str, tensor: np.ndarray) -> Callable[[Path], None]:
  return lambda folder: edit(folder, lambda tensors: tensors.update({name: tensor}))


def fields(**changed: Any) -> Callable[[Path], None]:
  return lambda folder: (folder / "config.json").write_text(json.dumps(LLAMA | changed)) and None


def edit(folder: Path, change: Callable[[Tensors], Any]) -> None:
  tensors = load_file(folder / "model.safetensors")
  change(tensors)
  save_file(tensors, folder / "model.safetensors")


def truncate(folder: Path) -> None:
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-8])


def spoil_header(folder: Path) -> None:
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes().replace(b'"dtype":"F32"', b'"dtypo":"F32"', 1))


def overlap(folder: Path) -> None:
  """Two tensors of one size at one place."""
  file = folder / "model.safetensors"
  data = file.read_bytes()
  length = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + length])
  first, second = (f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))
  header[second]["data_offsets"] = header[first]["data_offsets"]
  text = json.dumps(header).encode()
  file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def only_pickle(folder: Path) -> None:
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


NORM = "model.layers.1.input_layernorm.weight"
DEEPSEEK = dict(
  model_type="deepseek_v2", kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4
)
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
  "missing tensor": (without(NORM), rf"lacks the tensor {NORM} \[16\]"),
  "shape": (put(NORM, random(np.float32, D + 1)), rf"{NORM} has shape \[17\].* makes it \[16\]"),
  "extra tensor": (
    put("model.layers.2.mlp.up_proj.weight", random(np.float32, F, D)),
    r"model.layers.2.mlp.up_proj.weight \[20, 16\] has no place in this model",
  ),
  "mixed dtypes": (put(NORM, random(np.float16, D)), rf"{NORM} is F16 and .* F32"),
  "integers": (put(NORM, np.zeros(D, np.int32)), rf"{NORM} is I32"),
  "another head": (
    put("lm_head.weight", random(np.float32, V, D) + 1),
    r"lm_head.weight differs from model.embed_tokens.weight",
  ),
  "truncated": (truncate, r"model.safetensors has \d+ bytes and its header says \d+, within model"),
  "cut header": (
    lambda f: (f / "model.safetensors").write_bytes(b"\x99" * 8) and None,
    r"model.safetensors is not a whole safetensors file: it ends within its header",
  ),
  "broken header": (spoil_header, r"is not a whole safetensors file \('dtype'\)"),
  "overlap": (overlap, r"its tensors overlap or leave gaps"),
  "pickle": (only_pickle, r"pytorch_model.bin is a pickle.*save_pretrained"),
  "no tensors": (lambda f: (f / "model.safetensors").unlink(), r"holds neither"),
  "no config": (lambda f: (f / "config.json").unlink(), r"config.json is missing"),
  "model_type": (fields(model_type="t5"), r"model_type is 't5'; those .* bloom, .*stablelm"),
  "activation": (fields(hidden_act="quick_gelu"), r"hidden_act is 'quick_gelu'"),
  "rope scaling": (
    fields(rope_scaling=dict(type="linear", factor=2.0)),
    r"rope_scaling is 'linear'; scalings",
  ),
  "rope field": (
    fields(rope_parameters=dict(rope_type="default", mrope_section=[1])),
    r"rope_scaling.mrope_section is \[1\]",
  ),
  "yarn's rounding": (
    fields(rope_scaling=dict(rope_type="yarn", factor=2.0, truncate=False)),
    r"truncate is False",
  ),
  "part of heads": (fields(partial_rotary_factor=0.5), r"partial_rotary_factor is 0.5"),
  "quantization": (
    fields(quantization_config=dict(bits=4)),
    r"quantization_config is \{'bits': 4\}",
  ),
  "unknown field": (fields(mlp_gate_power=2), r"mlp_gate_power is 2; .*--ignore=mlp_gate_power"),
  "bad number": (fields(rms_norm_eps="small"), r"rms_norm_eps is 'small'; it must be a number"),
  "clip_qkv": (fields(model_type="olmo", clip_qkv=8.0), r"clip_qkv is 8.0; only None"),
  "qk_layernorm": (fields(model_type="stablelm", qk_layernorm=True), r"qk_layernorm is True"),
  "scale by layer": (
    fields(model_type="gpt2", scale_attn_by_inverse_layer_idx=True),
    r"scale_attn_by_inverse_layer_idx is True",
  ),
  "post-norm residual": (
    fields(model_type="bloom", apply_residual_connection_post_layernorm=True),
    r"apply_residual_connection_post_layernorm is True",
  ),
  "exact gelu": (fields(model_type="gemma2", hidden_activation="relu"), r"hidden_activation is"),
  "both ways": (
    fields(model_type="gemma", use_bidirectional_attention=True),
    r"use_bidirectional_attention",
  ),
  "experts": (
    fields(**DEEPSEEK, first_k_dense_replace=1, num_key_value_heads=4),
    r"first_k_dense_replace is 1; the other of 2 layers are experts",
  ),
  "latent biases": (
    fields(**DEEPSEEK, first_k_dense_replace=2, attention_bias=True),
    r"attention_bias is True",
  ),
  "two bases": (
    fields(
      model_type="gpt_neox", num_key_value_heads=None, rms_norm_eps=None, rotary_emb_base=10000
    ),
    r"rope_theta is 500.0; rotary_emb_base is 10000; they must agree",
  ),
  "two lengths": (
    fields(
      original_max_position_embeddings=8,
      rope_scaling=dict(type="yarn", factor=2.0, original_max_position_embeddings=16),
    ),
    r"original_max_position_embeddings is 8; the scaling's own is 16",
  ),
  "layer types": (
    fields(model_type="qwen2", layer_types=["sliding_attention"] * 2),
    r"gives no window",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line_before_anything_is_written(case: str, tmp_path: Path) -> None:
  source = save(tmp_path / "hf", LLAMA, llama_tensors())
  spoil, message = REFUSED[case]
  spoil(source)
  with pytest.raises(UserError, match=message) as error:
    import_.import_folder(source, tmp_path / "run", ())
  assert "\n" not in str(error.value)
  assert [child.name for child in tmp_path.iterdir()] == ["hf"]


def test_an_unknown_field_may_be_cleared_and_an_old_folder_is_safe(tmp_path: Path) -> None:
  source = save(tmp_path / "hf", LLAMA | dict(vendor_note=7), llama_tensors())
  import_.import_folder(source, tmp_path / "run", ["vendor_note"])
  with pytest.raises(UserError, match="run exists"):
    import_.import_folder(source, tmp_path / "run", ["vendor_note"])
  (tmp_path / "back").mkdir()
  with pytest.raises(UserError, match="back exists"):
    export.export_folder(tmp_path / "run", tmp_path / "back", None, 5.0, parity=False)
  with pytest.raises(UserError, match="no checkpoint of step 3; it has 0"):
    export.export_folder(tmp_path / "run", tmp_path / "other", 3, 5.0, parity=False)


@pytest.mark.parametrize(
  ("model_type", "old", "new"),
  [
    (
      "llama",
      dict(
        rope_theta=500.0,
        rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=8),
      ),
      dict(
        rope_parameters=dict(
          rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=8
        )
      ),
    ),
    (
      "phi3",
      dict(
        original_max_position_embeddings=8,
        rope_theta=500.0,
        partial_rotary_factor=0.5,
        rope_scaling=dict(type="su", short_factor=[1.0], long_factor=[2.0]),
      ),
      dict(
        original_max_position_embeddings=8,
        rope_parameters=dict(
          rope_type="longrope",
          rope_theta=500.0,
          partial_rotary_factor=0.5,
          short_factor=[1.0],
          long_factor=[2.0],
        ),
      ),
    ),
    (
      "gpt_neox",
      dict(rotary_emb_base=500.0, rotary_pct=0.5),
      dict(rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5)),
    ),
  ],
)
def test_positions_in_old_and_new_form(
  model_type: str, old: dict[str, Any], new: dict[str, Any]
) -> None:
  family = registry.FAMILIES[model_type]
  sizes = dict(hidden_size=16, num_attention_heads=4, max_position_embeddings=32)
  readings = [family.reading(sizes | form, "here") for form in (old, new)]
  assert readings[0] == readings[1]
  assert readings[0].rope_theta == 500.0


@pytest.mark.medium
def test_a_run_of_our_own_becomes_a_llama(tmp_path: Path) -> None:
  """The position base is that of the stage of the step, and ids are those of the tokenizer."""
  raw = small.raw_config()
  for stage, theta in zip(raw.stages, (100.0, 200.0, 300.0), strict=True):
    stage.rope_theta = theta
  config = resolve(raw)
  with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
    state = jax.jit(lambda: init_state(config))()
  checkpointer = checkpoint.Checkpointer(tmp_path / "run", keep=3, keep_steps=[])
  for step in (8, 9, 18):
    checkpointer.save(step, state, {"step": step, "config": to_dict(config)})
  checkpointer.wait()
  checkpointer.close()

  for step, theta in ((8, 100.0), (9, 200.0), (None, 300.0)):
    out = tmp_path / f"hf{step}"
    done = export.export_folder(tmp_path / "run", out, step, 5.0, parity=False)
    written = json.loads((out / "config.json").read_text())
    assert done["model_type"] == written["model_type"] == "llama"
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == theta
    assert written["dtype"] == "float32"
  tensors = load_file(tmp_path / "hf8" / "model.safetensors")
  ours = checkpoint.by_name(state.model)
  out_NHD = np.asarray(ours["segments/0/attention/out_NHD"][1])
  np.testing.assert_array_equal(
    tensors["model.layers.1.self_attn.o_proj.weight"], out_NHD.reshape(-1, out_NHD.shape[-1]).T
  )
  assert sum(t.size for t in tensors.values()) == sum(x.size for x in ours.values())


def test_a_model_that_no_class_has_is_refused() -> None:
  model = resolve(pangu_pi.get_config("1b")).model
  with pytest.raises(UserError, match=r"as llama, .* model.block.shortcut.*ffn.series"):
    registry.describe(model, 10000.0)


@pytest.mark.parametrize(
  ("files", "add_bos"),
  [
    ({"tokenizer.json": {"post_processor": None}}, False),
    ({"tokenizer.model": {}}, True),
    ({"tokenizer.model": {}, "tokenizer_config.json": {"add_bos_token": False}}, False),
    (
      {"tokenizer.json": {}, "tokenizer_config.json": {"add_bos_token": True}},
      True,
    ),
    (
      {
        "tokenizer.json": {
          "post_processor": {
            "type": "Sequence",
            "processors": [
              {"type": "ByteLevel"},
              {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}],
              },
            ],
          }
        }
      },
      True,
    ),
    (
      {
        "tokenizer.json": {
          "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}],
          }
        }
      },
      False,
    ),
  ],
)
def test_whether_a_tokenizer_adds_bos(files: dict[str, Any], add_bos: bool, tmp_path: Path) -> None:
  for name, content in files.items():
    (tmp_path / name).write_text(json.dumps(content))
  described = tokenizer_files.describe_tokenizer(tmp_path)
  assert described is not None
  assert described["add_bos"] is add_bos


@pytest.mark.medium
def test_the_command_there_and_back(tmp_path: Path) -> None:
  source = save(tmp_path / "hf", LLAMA, llama_tensors(ml_dtypes.bfloat16))
  (source / "tokenizer.json").write_text("{}")

  def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
      [sys.executable, "-m", "slmjax.convert", *words],
      capture_output=True,
      text=True,
      check=False,
      cwd=Path(__file__).parent.parent,
    )

  run, back = tmp_path / "run", tmp_path / "back"
  done = command("from-hf", str(source), "--out", str(run), "--json")
  assert json.loads(done.stdout)["model_type"] == "llama"
  shutil.rmtree(source)
  done = command("to-hf", str(run), "--out", str(back), "--no-parity")
  assert done.stdout == f"llama, 3,920 parameters, 20 tensors, bfloat16: {back}\n"
  assert_same(load_file(back / "model.safetensors"), llama_tensors(ml_dtypes.bfloat16))
  assert (back / "tokenizer.json").read_text() == "{}"
  failed = command("to-hf", str(tmp_path), "--out", str(tmp_path / "other"))
  assert failed.returncode == 2
  assert failed.stderr.count("\n") == 1
