"""How a setting is refused: one line that names it and shows the arithmetic."""

from typing import Any

from slmjax.config import ConfigError


def require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def positive(owner: Any, path: str, *names: str) -> None:
  for name in names:
    value = getattr(owner, name)
    require(value > 0, f"{path}.{name} is {value}; it must be above 0")


def divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
  require(
    value % divisor == 0,
    f"{divisor_name} {divisor} does not divide {name} {value} (remainder {value % divisor})",
  )
