"""Models to and from Hugging Face folders.

python -m slmjax.convert from-hf ~/TinyLlama-1.1B --out /checkpoints/tinyllama
python -m slmjax.convert to-hf /runs/fox1 --step 525000 --out ~/fox1-stage1
"""

import argparse
import json

from slmjax.convert import export, import_
from slmjax.errors import run_command


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="slmjax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  commands = parser.add_subparsers(dest="command", required=True)
  import_.add_arguments(
    commands.add_parser("from-hf", help="a Hugging Face folder into a checkpoint")
  )
  export.add_arguments(commands.add_parser("to-hf", help="a checkpoint into a Hugging Face folder"))
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
