"""Imported models, with either kind of tokenizer: scored and continued as by transformers."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers

from slmjax import evaluate, generate, loaded
from slmjax.convert.import_ import import_folder
from slmjax.data import tokenizer
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import UserError
from slmjax.loaded import Loaded
from tests import test_tokenizer_json

VOCAB, WINDOW = 600, 8
TEXT = "def main():\n  return 'grün', [1, 2]  # two\n"
# Which tokenizer's files a folder has, and what must then stand before a text.
KINDS = {
  "tokenizer.model with BOS": ["BOS"],
  "tokenizer.json with BOS": ["BOS"],
  "tokenizer.json, one token for both": ["EOS"],
  "tokenizer.json without BOS": [],
}


def write_tokenizer(folder: Path, kind: str) -> None:
  if kind == "tokenizer.model with BOS":
    tokenizer.train(test_tokenizer_json.TEXTS[:20], folder / "tokenizer.model", VOCAB)
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')
  elif kind == "tokenizer.json with BOS":
    test_tokenizer_json.train(folder, ["<s>", "</s>"])
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": true}')
  elif kind == "tokenizer.json, one token for both":
    test_tokenizer_json.train(folder, ["<|endoftext|>"])
  else:
    test_tokenizer_json.train(folder, ["</s>"])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
  """A small Llama as transformers saves it."""
  folder = tmp_path_factory.mktemp("original")
  config = transformers.LlamaConfig(
    vocab_size=VOCAB + 8,  # rows that no token has, as in Pythia
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=128,
    initializer_range=0.3,
    # Wrong, as in Fox-1 and LiteLlama: nobody may read these.
    bos_token_id=77,
    eos_token_id=78,
  )
  torch.manual_seed(0)
  model = transformers.LlamaForCausalLM(config).eval()
  model.save_pretrained(folder)
  (folder / "generation_config.json").unlink()
  return folder, model


@pytest.fixture(scope="module")
def imported(original: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
  """The folder of the imported model, by the kind of tokenizer."""

  def make(kind: str) -> Path:
    source = tmp_path_factory.mktemp("source")
    for path in original[0].iterdir():
      (source / path.name).symlink_to(path)
    if kind != "none":
      write_tokenizer(source, kind)
    import_folder(source, source / "imported", ())
    return source / "imported"

  made: dict[str, Path] = {}
  return lambda kind: made[kind] if kind in made else made.setdefault(kind, make(kind))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
  """Calls a command; what it printed. On one device, as on a user's machine."""
  monkeypatch.setattr(jax, "device_count", lambda: 1)

  def call(module: Any, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["command", *flags])
    module.main()
    return capsys.readouterr().out

  return call


@pytest.mark.medium
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_scores_as_in_transformers(
  kind: str, original: tuple[Path, Any], imported: Any, run: Any, tmp_path: Path
) -> None:
  """Window by window, in float64."""
  folder, text = imported(kind), tmp_path / "text.txt"
  text.write_text(TEXT)
  printed = json.loads(
    run(evaluate, f"--checkpoint={folder}", f"--text={text}", f"--window={WINDOW}", "--json")
  )
  ours = Tokenizer.load(
    folder / ("tokenizer.model" if kind.startswith("tokenizer.model") else "tokenizer.json")
  )
  before = {"BOS": ours.bos_id, "EOS": ours.eos_id}
  ids = [*(before[name] for name in KINDS[kind]), *ours.encode(TEXT)]
  assert len(ids) > 2 * WINDOW
  nats, model = 0.0, original[1].double()
  for first in range(0, len(ids) - 1, WINDOW):
    span = torch.tensor([ids[first : first + WINDOW + 1]])
    with torch.inference_mode():
      scores = torch.log_softmax(model(span[:, :-1]).logits[0], dim=-1)
    nats -= float(scores.gather(1, span[0, 1:, None]).sum())
  assert (printed["windows"], printed["prefix"], printed["suffix"]) == (WINDOW, KINDS[kind], [])
  (result,) = printed["results"].values()
  assert (result["tokens"], result["bytes"]) == (len(ids) - 1, len(TEXT.encode()))
  # float32 sums through two layers, against float64.
  np.testing.assert_allclose(
    result["bits_per_byte"], nats / math.log(2) / len(TEXT.encode()), rtol=1e-5
  )


@pytest.mark.medium
@pytest.mark.parametrize("kind", [*KINDS][:2])
def test_a_prompt_goes_on_as_in_transformers(
  kind: str, original: tuple[Path, Any], imported: Any, run: Any
) -> None:
  folder, prompt = imported(kind), "def main("
  flags = (f"--prompt={prompt}", "--tokens=12", "--temperature=0", "--json")
  samples = json.loads(run(generate, f"--checkpoint={folder}", *flags))["samples"]
  ours = Loaded.open(folder, None)
  ids = ours.encode(prompt)
  inputs = torch.tensor([ids])
  drawn = original[1].generate(
    inputs,
    attention_mask=torch.ones_like(inputs),  # else it takes id 0 for padding
    max_new_tokens=12,
    do_sample=False,
    eos_token_id=ours.tokenizer.eos_id,
    pad_token_id=0,
  )
  expected = ours.tokenizer.decode(drawn[0].tolist())
  assert samples == [{"prompt": prompt, "text": expected.removeprefix(prompt)}]


@pytest.mark.medium
def test_what_is_opened(imported: Any, run: Any) -> None:
  """float32 on CPU; the window follows the model; the command says what it did."""
  opened = Loaded.open(imported("tokenizer.json with BOS"), None)
  assert opened.config is None
  assert (opened.step, opened.window, opened.rope_theta) == (0, 128, 10_000.0)
  assert opened.model.compute.compute_dtype == "float32"
  assert opened.stop_ids == (opened.tokenizer.eos_id,)


@pytest.mark.medium
def test_bfloat16_weights_are_widened_once_on_cpu(
  original: tuple[Path, Any], tmp_path: Path
) -> None:
  narrow = transformers.LlamaForCausalLM.from_pretrained(original[0], dtype=torch.bfloat16)
  narrow.save_pretrained(tmp_path / "source")
  write_tokenizer(tmp_path / "source", "tokenizer.json with BOS")
  done = import_folder(tmp_path / "source", tmp_path / "imported", ())
  assert done["dtype"] == "bfloat16"
  opened = Loaded.open(tmp_path / "imported", None)
  assert {str(x.dtype) for x in jax.tree.leaves(opened.model)} == {"float32"}
  theirs = narrow.model.embed_tokens.weight.detach().float().numpy()
  np.testing.assert_array_equal(np.asarray(opened.model.embed_VE[...]), theirs)


def test_stop_ids_are_symbols_of_the_tokenizer(tmp_path: Path) -> None:
  """Those of generation_config.json, but for pieces of text."""
  test_tokenizer_json.train(tmp_path, ["<|endoftext|>", "<|im_end|>"])
  ours = Tokenizer.load(tmp_path / "tokenizer.json")
  assert loaded._stop_ids(tmp_path, ours) == (0,)
  named = tmp_path / "generation_config.json"
  for ids, expected in (
    ([1, 50], (0, 1)),
    (50, (0,)),
    (1, (0, 1)),
    (None, (0,)),
    ([700], (0, 700)),
  ):
    named.write_text(json.dumps({"eos_token_id": ids}))
    assert loaded._stop_ids(tmp_path, ours) == expected
  named.write_text("[]")
  with pytest.raises(UserError, match=r"generation_config\.json is no JSON object"):
    loaded._stop_ids(tmp_path, ours)


@pytest.mark.medium
def test_bad_input_is_refused_in_one_line(imported: Any, run: Any, tmp_path: Path) -> None:
  folder, text = imported("tokenizer.json without BOS"), tmp_path / "text"
  text.write_text("e")
  there = f"--checkpoint={folder}"
  for flags, message in (
    ([there], "is an imported model, which has no sources; give --text=FILE"),
    ([there, f"--text={text}"], "is a single token, with nothing to predict it from"),
    ([there, f"--text={text}", "--window=129"], "--window is 129; it must lie in 1 to the model's"),
    ([f"--checkpoint={imported('none')}"], "was imported without a tokenizer; import it again"),
  ):
    with pytest.raises(UserError, match=message) as caught:
      run(evaluate, *flags)
    assert "\n" not in str(caught.value)
  with pytest.raises(UserError, match="no token that begins a text; give --prompt=TEXT"):
    run(generate, there)


@pytest.mark.medium
def test_another_tokenizer_is_refused(imported: Any, tmp_path: Path) -> None:
  folder = imported("tokenizer.json with BOS")
  other = tmp_path / "imported"
  other.mkdir()
  (other / "checkpoints").symlink_to(folder / "checkpoints")
  with pytest.raises(UserError, match=f"{other} has no tokenizer; copy"):
    Loaded.open(other, None)
  test_tokenizer_json.train(other, ["<s>", "</s>", "<more>"])
  with pytest.raises(
    UserError, match=r"tokenizer\.json: tokenizer \w{12} is not the one the model"
  ):
    Loaded.open(other, None)


def test_a_continuation_keeps_its_first_space(tmp_path: Path) -> None:
  """Llama's tokenizers put a space before a text and take one away from what they decode."""
  import sentencepiece

  with (tmp_path / "tokenizer.model").open("wb") as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(test_tokenizer_json.TEXTS[:5]),
      model_writer=file,
      vocab_size=400,
      model_type="bpe",
      byte_fallback=True,
      minloglevel=3,
    )
  llama = Tokenizer.load(tmp_path / "tokenizer.model")
  prompt, new = llama.encode("import"), llama.encode("os")
  assert llama.decode(new) == "os"
  assert generate.continuation(llama, prompt, new) == " os"
  # A character that is whole only with what follows.
  head, tail = (ids := llama.encode("ü"))[:-1], ids[-1:]
  assert generate.continuation(llama, head, tail) == llama.decode(tail)
