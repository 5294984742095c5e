"""The tokenizer gives back every text, and the trained one depends on its texts and seed alone."""

import pickle
import random
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import sentencepiece

from slmjax.data import tokenizer

TEXTS = [path.read_text("utf-8") for path in sorted(Path(random.__file__).parent.glob("s*.py"))]
AWKWARD = [
  "",
  " ",
  "   leading and trailing   ",
  "\n\n\n",
  "\ttabs\t\there\r\nand\x00nul\x7f",
  "  if x:\n    return 1234567890\n\n\n",
  "日本語のテキスト、한국어, ไทย",
  "👩‍👩‍👧‍👦 emoji 🎉🏽 \U0010ffff",
  "e\u0301 is not \u00e9, \ufb01 is not fi, \u00a0\u3000\u200b\ufeff spaces",
  "\u2581\u2581a\u2581 \u2581",
  "</s><s><unk><pad><0x41>▁",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  out = tmp_path_factory.mktemp("tokenizer") / "new" / "tokenizer.model"
  return tokenizer.train(TEXTS, out, 1000, sample_bytes=1 << 19)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_come_back(trained, text):
  ids = trained.encode(text)
  assert trained.decode(ids) == text
  assert not {trained.bos_id, trained.eos_id, trained.pad_id, trained.unk_id} & set(ids)


@hypothesis.given(st.text() | st.text(alphabet=" \t\n\r\u2581ab1<>▁é", max_size=60))
@hypothesis.settings(
  max_examples=300,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_any_text_comes_back(trained, text):
  assert trained.decode(trained.encode(text)) == text


def test_real_text_comes_back_and_is_compressed(trained):
  for text, ids in zip(TEXTS, trained.encode_batch(TEXTS), strict=True):
    assert trained.decode(ids) == text
    assert ids == trained.encode(text)
  # A thousand pieces, 256 of them bytes, on source code: between single characters and the four
  # characters a token of large vocabularies.
  ratio = sum(map(len, TEXTS)) / sum(map(len, trained.encode_batch(TEXTS)))
  assert 2 < ratio < 4


def test_ids_are_as_stated(trained):
  assert trained.vocab_size == 1000
  assert (trained.pad_id, trained.eos_id, trained.bos_id, trained.unk_id) == (0, 1, 2, 3)
  digits = trained.encode("12345")
  assert len(digits) == 5, "digits are split, so that numbers of any length look alike"
  assert trained.facts.sha256 == trained.sha256
  assert trained.facts.normalisation == {
    "rules": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
  }


def test_training_depends_on_texts_and_seed_only(tmp_path):
  shuffled = random.Random(0).sample(TEXTS, len(TEXTS)) + TEXTS[:3]

  def model(name, texts, seed):
    tokenizer.train(iter(texts), tmp_path / name, 600, seed=seed, sample_bytes=1 << 18)
    return (tmp_path / name).read_bytes()

  assert tokenizer._sample(TEXTS, 0, 1 << 18) == tokenizer._sample(shuffled, 0, 1 << 18)
  assert model("a", TEXTS, 0) == model("b", shuffled, 0)
  assert model("a", TEXTS, 0) != model("c", TEXTS, 1)
  assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_sample_keeps_its_budget():
  sizes = [len(piece.encode()) for piece in tokenizer._sample(TEXTS, 0, 1 << 17)]
  assert 1 << 17 <= sum(sizes) < (1 << 17) + 4 * tokenizer.PIECE_CHARS
  everything = tokenizer._sample(TEXTS, 0, 1 << 30)
  assert sum(map(len, everything)) == sum(map(len, TEXTS))


def test_training_is_silent(tmp_path, capfd):
  tokenizer.train(TEXTS[:3], tmp_path / "m", 400)
  assert capfd.readouterr() == ("", "")


def test_pickles_as_its_path(trained):
  blob = pickle.dumps(trained)
  assert len(blob) < 1000
  assert pickle.loads(blob).encode("return x") == trained.encode("return x")


def test_a_model_without_specials_says_none(tmp_path):
  with (tmp_path / "plain").open("wb") as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(TEXTS[:3]),
      model_writer=file,
      vocab_size=150,
      bos_id=-1,
      eos_id=-1,
      pad_id=-1,
      minloglevel=3,
    )
  plain = tokenizer.Tokenizer.load(tmp_path / "plain")
  assert (plain.bos_id, plain.eos_id, plain.pad_id, plain.unk_id) == (None, None, None, 0)
  assert plain.facts.normalisation["rules"] == "nmt_nfkc"
  # It has no byte pieces: the character is encoded as SentencePiece does by itself, a space.
  assert plain.decode(plain.encode("a\u2581b")) == "a b"


@pytest.mark.parametrize("content", [None, b"", b"not a model at all"])
def test_what_is_no_model_is_refused_in_one_line(tmp_path, content, capfd):
  path = tmp_path / "x.model"
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(tokenizer.TokenizerError, match=r"x\.model: .*; give") as caught:
    tokenizer.Tokenizer.load(path)
  assert "\n" not in str(caught.value)
  assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
  ("texts", "vocab_size", "message"),
  [
    ([], 500, "no text"),
    ([""], 500, "no text"),
    (["abc " * 50], 5000, "of 5000 pieces .*; give more text"),
    (TEXTS[:2], 100, "of 100 pieces .*; give more text or another vocabulary size"),
  ],
)
def test_impossible_training_is_refused_in_one_line(tmp_path, texts, vocab_size, message, capfd):
  with pytest.raises(tokenizer.TokenizerError, match=message) as caught:
    tokenizer.train(texts, tmp_path / "m", vocab_size)
  assert "\n" not in str(caught.value)
  assert list(tmp_path.iterdir()) == []
  assert capfd.readouterr() == ("", "")
