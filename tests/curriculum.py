"""The tests' curriculum as a config file: --config=tests/curriculum.py --config.data.store=DIR."""

from ml_collections import ConfigDict

from tests import small


def get_config(variant: str = "") -> ConfigDict:
  if variant:
    raise ValueError(f"tests/curriculum.py has no variant {variant!r}")
  return small.raw_config()
