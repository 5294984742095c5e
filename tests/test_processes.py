"""Several real processes over loopback train as one does: the same rows, losses within the order
of float32 sums."""

import json
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from slmjax import checkpoint
from tests.test_resume import command, environment

# Gradients are summed over devices in another order; Adam's first updates magnify the difference.
TOLERANCE = 2e-4


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def start(text_store: str, run: Path, processes: int, *flags: str) -> list[subprocess.Popen[str]]:
  """`processes` processes with two devices each."""
  join = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"]
  return [
    subprocess.Popen(
      command(["slmjax.main"], text_store, run, *join, f"--process={i}", *flags),
      env=environment(devices=2),
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(processes)
  ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
  errors = [process.communicate(timeout=300)[1] for process in processes]
  return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def losses(run: Path) -> list[float]:
  return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def single(text_store: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
  """Losses on one device."""
  folder = tmp_path_factory.mktemp("single")
  subprocess.run(command(["slmjax.main"], text_store, folder), env=environment(), check=True)
  return losses(folder)


@pytest.mark.medium
@pytest.mark.parametrize("mesh", [(4, 1), (2, 2)], ids=["4x1", "2x2"])
def test_meshes_of_one_process(
  text_store: str, single: list[float], tmp_path: Path, mesh: tuple[int, int]
) -> None:
  flags = (f"--config.mesh.fsdp={mesh[0]}", f"--config.mesh.tensor={mesh[1]}")
  subprocess.run(
    command(["slmjax.main"], text_store, tmp_path, *flags), env=environment(devices=4), check=True
  )
  np.testing.assert_allclose(losses(tmp_path), single, rtol=TOLERANCE)


@pytest.mark.medium
def test_two_processes_stop_together_and_resume(
  text_store: str, single: list[float], tmp_path: Path
) -> None:
  """SIGTERM reaches one of them; both save the same step, and the resumed pair goes on."""
  running = start(text_store, tmp_path, 2)
  metrics = tmp_path / "metrics.jsonl"
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
    time.sleep(0.02)
  running[1].send_signal(signal.SIGTERM)
  for code, error in finish(running):
    assert code == 128 + signal.SIGTERM, error
  stopped = checkpoint.steps_in(tmp_path)[-1]
  assert 0 < stopped < len(single)
  for code, error in finish(start(text_store, tmp_path, 2)):
    assert code == 0, error
  np.testing.assert_allclose(losses(tmp_path), single, rtol=TOLERANCE)
