"""Small real token stores for tests: documents of random ids, laid out by the real writer."""

from pathlib import Path

import numpy as np

from slmjax.data.store import TOKENIZER_FILE, TokenizerFacts, TokenStore, file_sha256
from slmjax.data.store_writer import StoreWriter

EOS = 1


def make_store(
  directory: Path, tokens: int, *, seed: int = 0, vocab_size: int = 384, mean: int = 20
) -> TokenStore:
  """A store at STORE/SOURCE/SPLIT of at least so many tokens, in documents of `mean` on average.

  Empty documents (a lone EOS) occur, and shards of 257 tokens make reads cross their ends.
  """
  tokenizer = directory.parent.parent / TOKENIZER_FILE
  if not tokenizer.exists():
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.write_bytes(b"a tokenizer that nobody loads")
  facts = TokenizerFacts(
    sha256=file_sha256(tokenizer),
    vocab_size=vocab_size,
    bos_id=None,
    eos_id=EOS,
    unk_id=0,
    pad_id=None,
    normalisation={},
  )
  rng = np.random.default_rng([seed, *directory.parent.name.encode()])
  with StoreWriter(
    directory,
    source=directory.parent.name,
    split=directory.name,
    tokenizer=facts,
    shard_tokens=257,
  ) as writer:
    while writer.tokens < tokens:
      ids = rng.integers(2, vocab_size, rng.integers(0, 2 * mean))
      writer.add(ids, 3 * len(ids) + 1)
  return TokenStore.open(directory)
