"""The command that trains a tokenizer: its model is lossless, and it overwrites nothing."""

import subprocess
import sys
from pathlib import Path

from slmjax.data.tokenizer import Tokenizer


def run(*flags: str) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, "-m", "slmjax.data.train_tokenizer", *flags]
  return subprocess.run(command, capture_output=True, text=True, check=False)


def test_trains_on_files_and_refuses_to_overwrite(tmp_path: Path) -> None:
  (tmp_path / "a.txt").write_text("\n".join(f"def f{i}(x): return x + {i}" for i in range(2000)))
  flags = (f"--input={tmp_path}", "--vocab_size=290", f"--out={tmp_path}/t.model")
  done = run(*flags)
  assert done.returncode == 0, done.stderr
  trained = Tokenizer.load(tmp_path / "t.model")
  assert trained.vocab_size == 290
  text = "  def f(x):\n\treturn 'grün'  "
  assert trained.decode(trained.encode(text)) == text
  again = run(*flags)
  assert again.returncode == 2
  assert again.stderr.startswith(f"error: {tmp_path}/t.model exists")


def test_missing_input_is_one_line(tmp_path: Path) -> None:
  done = run("--input=/no/such", "--vocab_size=290", f"--out={tmp_path}/t.model")
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1
  assert "/no/such" in done.stderr
