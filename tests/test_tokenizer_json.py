"""tokenizer.json: ids as the `tokenizers` library gives them, text never special, special ids from
the tokenizer's own files, and stores made with it."""

import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from slmjax.data import store, tokenize, tokenizer
from slmjax.data.tokenizer import Tokenizer, TokenizerError

TEXTS = [path.read_text("utf-8") for path in sorted(Path(random.__file__).parent.glob("s*.py"))]
AWKWARD = ["", "   two  spaces ", "\r\n\t\x00", "日本語 🎉", "<|endoftext|> is text</s>", "\u2581"]


def train(folder: Path, specials: list[str]) -> tokenizers.Tokenizer:
  """A byte-level BPE as GPT-2's, in `folder`/tokenizer.json."""
  made = tokenizers.Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=600,
    special_tokens=specials,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(TEXTS[:20], trainer)
  made.save(str(folder / "tokenizer.json"))
  return made


def config(folder: Path, **settings: Any) -> None:
  (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def gpt2_like(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tokenizers.Tokenizer]:
  folder = tmp_path_factory.mktemp("gpt2")
  made = train(folder, ["<|endoftext|>"])
  return folder / "tokenizer.json", made


def test_ids_and_text_are_the_librarys(gpt2_like: tuple[Path, tokenizers.Tokenizer]) -> None:
  path, made = gpt2_like
  ours = Tokenizer.load(path)
  for text in TEXTS[20:25]:
    ids = ours.encode(text)
    assert ids == made.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == text
  assert ours.encode_batch(TEXTS[20:25]) == [ours.encode(text) for text in TEXTS[20:25]]
  assert (ours.vocab_size, ours.facts.normalisation["pre_tokenizer"]) == (600, "ByteLevel")


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_come_back_without_special_ids(
  gpt2_like: tuple[Path, tokenizers.Tokenizer], text: str
) -> None:
  ours = Tokenizer.load(gpt2_like[0])
  ids = ours.encode(text)
  assert ours.decode(ids) == text
  assert all(map(ours.is_piece_of_text, ids))


def test_symbols_and_unknown_ids_give_no_text(
  gpt2_like: tuple[Path, tokenizers.Tokenizer],
) -> None:
  ours = Tokenizer.load(gpt2_like[0])
  assert ours.eos_id is not None
  assert ours.decode([ours.eos_id, *ours.encode("a b"), 600, 10**6]) == "a b"
  assert not any(map(ours.is_piece_of_text, (ours.eos_id, 600, 10**6)))


@pytest.mark.parametrize(
  ("specials", "settings", "bos_eos_unk_pad"),
  [
    # Nobody says it: the usual names, among the added tokens only.
    (["<|endoftext|>"], None, (0, 0, None, None)),
    (["<unk>", "<s>", "</s>"], None, (1, 2, None, None)),
    (["<pad>"], None, (None, None, None, None)),
    # The config does, as a string or an object, also against the usual names.
    (
      ["<s>", "</s>", "<p>", "<u>"],
      dict(bos_token="<s>", eos_token={"content": "</s>"}, pad_token="<p>", unk_token="<u>"),
      (0, 1, 3, 2),
    ),
    (["<|endoftext|>", "<|im_end|>"], dict(eos_token="<|im_end|>"), (None, 1, None, None)),
    (["<s>", "</s>"], dict(bos_token=None, eos_token="</s>"), (None, 1, None, None)),
    # A padding token that the vocabulary lacks is none: nothing reads it.
    (["<|endoftext|>"], dict(pad_token="[PAD]"), (0, 0, None, None)),
  ],
)
def test_special_ids(
  tmp_path: Path, specials: list[str], settings: dict | None, bos_eos_unk_pad: tuple
) -> None:
  train(tmp_path, specials)
  if settings is not None:
    config(tmp_path, **settings)
  # What models say of themselves is not asked: Fox-1's and LiteLlama's config.json are wrong.
  (tmp_path / "config.json").write_text('{"bos_token_id": 7, "eos_token_id": 8}')
  found = Tokenizer.load(tmp_path / "tokenizer.json")
  assert (found.bos_id, found.eos_id, found.unk_id, found.pad_id) == bos_eos_unk_pad


def test_what_a_file_was_saved_with_changes_no_text(tmp_path: Path) -> None:
  """A template that adds BOS, truncation to 5 and padding to 9 tokens."""
  made = train(tmp_path, ["<s>", "</s>"])
  plain = Tokenizer.load(tmp_path / "tokenizer.json").encode("one two three four")
  made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
  made.enable_truncation(5)
  made.enable_padding(length=9)
  made.save(str(tmp_path / "tokenizer.json"))
  assert len(plain) > 9
  assert Tokenizer.load(tmp_path / "tokenizer.json").encode("one two three four") == plain


def test_normalisation_is_told(tmp_path: Path) -> None:
  made = train(tmp_path, [])
  made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
  made.save(str(tmp_path / "tokenizer.json"))
  ours = Tokenizer.load(tmp_path / "tokenizer.json")
  assert ours.facts.normalisation["normalizer"] == "Sequence(NFC, Lowercase)"
  assert ours.decode(ours.encode("ABC")) == "abc"


def test_pickles_as_its_path(gpt2_like: tuple[Path, tokenizers.Tokenizer]) -> None:
  ours = Tokenizer.load(gpt2_like[0])
  blob = pickle.dumps(ours)
  assert len(blob) < 1000
  assert pickle.loads(blob).encode("return x") == ours.encode("return x")


@pytest.mark.parametrize(
  ("content", "settings", "reason"),
  [
    (None, None, "can't read the tokenizer"),
    (b"", None, "not a usable tokenizer.json"),
    (b'{"version": "1.0"}', None, "not a usable tokenizer.json"),
    (b"\xff\xfe", None, "not a usable tokenizer.json"),
    ("good", '{"eos_token": "</s>"}', "names eos_token '</s>', which is not in the vocabulary"),
    ("good", "[]", "tokenizer_config.json is no JSON object"),
    ("good", "{", "not a usable tokenizer.json"),
  ],
)
def test_bad_files_are_refused_in_one_line(
  tmp_path: Path, content: bytes | str | None, settings: str | None, reason: str
) -> None:
  if content == "good":
    train(tmp_path, ["<|endoftext|>"])
  elif isinstance(content, bytes):
    (tmp_path / "tokenizer.json").write_bytes(content)
  if settings is not None:
    (tmp_path / "tokenizer_config.json").write_text(settings)
  with pytest.raises(TokenizerError, match=r"tokenizer\.json: .*; give") as caught:
    Tokenizer.load(tmp_path / "tokenizer.json")
  assert reason in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_store_made_with_it(tmp_path: Path) -> None:
  """The tokenize command's function: ids, EOS and both files of the tokenizer in the store; and
  another tokenizer_config.json is another tokenizer."""
  made = tmp_path / "made"
  made.mkdir()
  train(made, ["<s>", "</s>", "<end>"])
  config(made, eos_token="<end>")
  (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in TEXTS[:6]))
  arguments: dict[str, Any] = dict(
    tokenizer=made / "tokenizer.json", root=tmp_path / "store", processes=1, heldout_fraction=0
  )
  summary = tokenize.tokenize_source([tmp_path / "a.jsonl"], source="one", **arguments)
  assert summary.lossy_documents_in_sample == 0
  opened = store.TokenStore.open(tmp_path / "store" / "one" / "train")
  opened.verify()
  assert opened.tokenizer_path == tmp_path / "store" / "tokenizer.json"
  copied = Tokenizer.load(opened.tokenizer_path)
  assert copied.eos_id == opened.eos_id == 2
  whole = copied.decode(opened.read(0, opened.tokens).tolist())
  assert sorted(whole) == sorted("".join(TEXTS[:6]))
  config(made, eos_token="</s>")
  with pytest.raises(store.StoreError, match=r"store/tokenizer\.json: another tokenizer than"):
    tokenize.tokenize_source([tmp_path / "a.jsonl"], source="two", **arguments)
  other = tokenizer.train(TEXTS[:3], tmp_path / "other.model", 400)
  with pytest.raises(store.StoreError, match=r"store/tokenizer\.json: another tokenizer than"):
    tokenize.tokenize_source(
      [tmp_path / "a.jsonl"], source="two", **arguments | {"tokenizer": other.path}
    )


def test_the_library_is_imported_for_such_files_only() -> None:
  code = "import sys, slmjax.data.tokenize; sys.exit('tokenizers' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
