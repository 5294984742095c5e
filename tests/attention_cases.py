"""What tests of attention run: cases, arrays, the expected output and gradients, tolerances."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import reference_attention

# Relative to the largest magnitude in the array that is compared. float32: sums of up to 1000
# products, each rounded to 2^-24, in another order than NumPy's. bfloat16: inputs are
# the same rounded numbers on both sides, but weights and their gradients are rounded to 2^-9
# before they are multiplied, and so is the result: a few such roundings that do not cancel.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}


@dataclasses.dataclass(frozen=True)
class Case:
  """`documents` is the mean length of documents; 0 is one document as long as the row. `U` is the
  width of values where it is not H. `alibi`: with slopes."""

  S: int
  H: int = 64
  N: int = 4
  K: int = 4
  B: int = 2
  T: int | None = None
  q_start: int = 0
  documents: int = 0
  padding: int = 0
  dtype: str = "float32"
  U: int | None = None
  window: int | None = None
  traced: bool = True
  softcap: float | None = None
  alibi: bool = False

  def __str__(self) -> str:
    """What differs from the defaults."""
    fields = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))
    return "-".join(f"{f.name}={x}" for f, x in fields if x != f.default)

  @property
  def keys(self) -> int:
    return self.S if self.T is None else self.T

  @property
  def slopes_N(self) -> np.ndarray | None:
    """The published slopes of ALiBi for a power of two of heads."""
    return np.float32(2.0 ** (-8 * np.arange(1, self.N + 1) / self.N)) if self.alibi else None

  @property
  def traced_arrays(self) -> dict[str, Any]:
    """What attention gets as arguments of the compiled program, beside the arrays of a batch."""
    arrays = {"window": self.window if self.traced else None, "slopes_N": self.slopes_N}
    return {name: jnp.asarray(x) for name, x in arrays.items() if x is not None}

  @property
  def static(self) -> dict[str, Any]:
    options = {"window": None if self.traced else self.window, "softcap": self.softcap}
    return {name: x for name, x in options.items() if x is not None}


CASES = [
  Case(S=1),
  Case(S=1, H=80, N=8, K=1, dtype="bfloat16"),
  Case(S=127, H=80, N=4, K=1, documents=20, padding=30),
  Case(S=127, H=128, N=8, K=8, documents=1),
  Case(S=128, H=128, N=8, K=1, documents=40),
  Case(S=128, H=64, N=8, K=2, documents=128, dtype="bfloat16"),
  Case(S=1000, H=64, N=4, K=4, documents=150, padding=300),
  Case(S=1000, H=80, N=8, K=1, B=1, documents=500, dtype="bfloat16"),
  Case(S=1000, H=128, N=4, K=1, B=1),
  Case(S=1, H=64, N=8, K=2, T=127, q_start=99),
  Case(S=128, H=128, N=4, K=1, T=1000, q_start=500, documents=300),
  Case(S=127, H=80, N=4, K=4, T=300, q_start=130, documents=60, padding=40, dtype="bfloat16"),
  Case(S=200, B=1, N=2, K=2, H=32, window=50, traced=False),
  Case(S=300, N=4, K=2, window=90, documents=120, padding=60),
  Case(S=128, T=300, N=4, K=2, q_start=130, window=70, documents=100, padding=20),
  Case(S=150, H=96, U=64, documents=60),
  Case(S=1, H=576, U=512, N=4, K=1, T=127, q_start=99, dtype="bfloat16"),
  Case(S=127, N=4, K=2, softcap=0.7, documents=50, padding=20),
  Case(S=200, N=4, K=2, softcap=2.0, window=70, dtype="bfloat16"),
  Case(S=300, N=8, K=2, alibi=True, documents=120, padding=40),
  Case(S=128, T=300, N=4, K=4, q_start=130, alibi=True, window=100, H=24, U=40),
  Case(S=127, H=96, N=4, K=1, documents=60),
  Case(S=128, H=256, N=8, K=1, B=1, dtype="bfloat16"),
  Case(S=130, H=192, U=128, N=2, K=2, B=1, documents=50, dtype="bfloat16"),
  Case(S=2048, H=64, N=4, K=1, B=1, documents=300, padding=100),
  Case(S=2048, H=128, N=2, K=2, B=1, window=600, dtype="bfloat16"),
]


def segments(rng: np.random.Generator, B: int, length: int, documents: int, padding: int) -> Any:
  """Segment ids that ascend from 1 along each row, the last `padding` positions 0."""
  new = rng.random((B, length)) < (1 / documents if documents else 0)
  ids = 1 + np.cumsum(new, axis=1)
  ids[:, length - padding :] = 0
  return ids.astype(np.int32)


def draw(case: Case) -> tuple[Any, Any, Any, Any, Any, Any]:
  """q, k, v, segments of queries and of keys, and a cotangent for the output."""
  rng = np.random.default_rng(0)
  T = case.keys

  def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), case.dtype)

  kv_segments = segments(rng, case.B, T, case.documents, case.padding)
  at = np.minimum(case.q_start + np.arange(case.S), T - 1)
  return (
    normal(case.B, case.S, case.N, case.H),
    normal(case.B, T, case.K, case.H),
    normal(case.B, T, case.K, case.U or case.H),
    kv_segments[:, at],
    kv_segments,
    normal(case.B, case.S, case.N, case.U or case.H),
  )


def differentiate(attend: Any) -> Any:
  """A function to the output and the gradients of q, k and v."""

  @jax.jit
  def forward_backward(*args: Any, **traced: Any) -> Any:
    q, k, v, qs, ks, do, q_start = args
    o, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, qs, ks, q_start, **traced), q, k, v)
    return o, *vjp(do)

  return forward_backward


def run(attend: Any, *arrays: Any, **traced: Any) -> list[Any]:
  return list(differentiate(attend)(*arrays, **traced))


def assert_close(got: list[Any], want: Any, tolerance: float) -> None:
  """`got` and `want` are an output and its gradients of q, k and v (`want` may have more)."""
  for name, x, y in zip(("o", "dq", "dk", "dv"), got, want[:4], strict=True):
    x = np.asarray(x, np.float64)
    assert np.isfinite(x).all(), name
    largest = np.abs(y).max()
    if name in ("dq", "dk"):
      # They are sums of scale * weight * (do.v - do.o) * k, of which the difference may cancel: in
      # documents of one token o is v, and only the two sums' rounding remains. Measured there (H =
      # 128): 4 units in the last place of the largest do.v, 39, or 1.5e-5, which scale = 0.088 and
      # k up to 4.6 make 4e-6. A typical term before cancelling is H^-0.5 * H^0.5 * 1 = 1.
      largest = max(1.0, largest)
    error = np.abs(x - y).max()
    assert error <= tolerance * largest, f"{name}: {error} of {largest}"


def expect(
  q: Any,
  k: Any,
  v: Any,
  qs: Any,
  ks: Any,
  do: Any,
  q_start: int,
  scale: float,
  window: int | None = None,
  **scores: Any,
) -> Any:
  """`scores` are the options of the reference's scores: softcap and slopes_N."""
  q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
  see = reference_attention.visible(qs, ks, q_start, window)
  return reference_attention.attention(q, k, v, see, scale, do, **scores)


def expect_case(case: Case, arrays: Any, scale: float) -> Any:
  options = {"window": case.window, "softcap": case.softcap, "slopes_N": case.slopes_N}
  return expect(*arrays, case.q_start, scale, **options)
