"""Models to and from Hugging Face folders.

python -m slmjax.convert from-hf ~/TinyLlama-1.1B --out /checkpoints/tinyllama
python -m slmjax.convert to-hf /runs/fox1 --step 525000 --out ~/fox1-stage1
"""

import argparse
import json

from slmjax.convert import export, import_
from slmjax.errors import run_command

_FROM = "python -m slmjax.convert from-hf ~/TinyLlama-1.1B --out /checkpoints/tinyllama"
_TO = "python -m slmjax.convert to-hf /runs/fox1 --step 525000 --out ~/fox1-stage1"


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="slmjax.convert",
    description=f"Models to and from Hugging Face folders:\n  {_FROM}\n  {_TO}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  for name, what, example, module in (
    ("from-hf", "a Hugging Face folder into a checkpoint", _FROM, import_),
    ("to-hf", "a checkpoint into a Hugging Face folder", _TO, export),
  ):
    module.add_arguments(commands.add_parser(name, help=what, description=f"{what}: {example}"))
  args = parser.parse_args()
  if args.command == "from-hf":
    done = import_.import_folder(args.folder, args.out, args.ignore or ())
  else:
    done = export.export_folder(
      args.checkpoint, args.out, args.step, args.shard_gb, parity=not args.no_parity
    )
  if args.json:
    print(json.dumps(done))
    return
  print(
    f"{done['model_type']}, {done['parameters']:,} parameters, {done['tensors']} tensors, "
    f"{done['dtype']}: {done['out']}"
  )
  if "parity" in done:
    print(done["parity"]["line"])


if __name__ == "__main__":
  run_command(main)
