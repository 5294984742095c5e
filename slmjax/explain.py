"""The whole plan of a run in numbers, before anything is trained."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from slmjax import flops
from slmjax.config import Config, StageConfig, to_dict
from slmjax.data.plan import Plan, demand
from slmjax.data.store import TokenStore
from slmjax.errors import UserError
from slmjax.optimizer import stage_learning_rate
from slmjax.parameters import parameters
from slmjax.resolve import resolve_mesh

# A v5e:16x16 slice and a node of eight H100: what the memory estimates are made for, if the
# recipe's mesh fits.
REFERENCE_DEVICES = {"v5e:16x16": 256, "8 x H100": 8}


def show(config: Config, *, as_json: bool) -> None:
  """Prints the plan."""
  facts = explain(config)
  print(json.dumps(facts, indent=2) if as_json else _text(facts))


def explain(config: Config) -> dict[str, Any]:
  """The plan as plain JSON types."""
  sizes = _store_sizes(config)
  wanted = demand(config)
  if all(size is not None for size in sizes.values()):
    Plan(config, {name: size or 0 for name, size in sizes.items()})  # refuses what cannot be had
  total = sum(s.steps * s.batch_tokens for s in config.stages)
  training = sum(
    s.steps * s.batch_tokens * flops.train_flops_per_token(config.model, s) for s in config.stages
  )
  return {
    "name": config.name,
    "parameters": parameters(config.model),
    "tokens": total,
    "steps": config.steps,
    "train_flops": training,
    "stages": [_stage(config, i, wanted) for i in range(len(config.stages))],
    "sources": {
      name: {"tokens_taken": sum(takes), "by_stage": takes, "tokens_in_store": sizes[name]}
      for name, takes in wanted.items()
    },
    "memory_bytes_per_device": _memory(config),
    "config": to_dict(config),
  }


def _stage(config: Config, index: int, wanted: dict[str, list[int]]) -> dict[str, Any]:
  stage = config.stages[index]
  return {
    "name": stage.name,
    "first_step": config.boundaries[index],
    "steps": stage.steps,
    "tokens": stage.steps * stage.batch_tokens,
    "budget": stage.tokens,
    "batch_tokens": stage.batch_tokens,
    "rows": stage.rows,
    "row_length": stage.row_length,
    "chunks": {name: m.chunk for name, m in stage.sources.items()},
    "tokens_by_source": {name: wanted[name][index] for name in stage.sources},
    "learning_rate": _rates(stage),
    "train_flops_per_token": flops.train_flops_per_token(config.model, stage),
  }


def _rates(stage: StageConfig) -> dict[int, float]:
  """The learning rate at the steps of a stage where it changes its course, and at its middle."""
  rate = stage.learning_rate
  points = {0, rate.warmup_steps - 1, rate.warmup_steps, stage.steps // 2, stage.steps - 1}
  if rate.decay_steps:
    points.add(stage.steps - rate.decay_steps)
  steps = sorted(p for p in points if 0 <= p < stage.steps)
  return {k: float(stage_learning_rate(stage, jnp.asarray(k))) for k in steps}


def _memory(config: Config) -> dict[str, Any]:
  """Estimates per target and stage, or why a target does not fit the recipe."""
  found: dict[str, Any] = {}
  targets = {**REFERENCE_DEVICES, "this machine": jax.device_count()}
  for target, devices in targets.items():
    try:
      mesh = resolve_mesh(config, devices)
    except UserError as error:
      found[target] = str(error)
      continue
    found[target] = {s.name: flops.memory(config, s, mesh).total for s in config.stages}
  return found


def _store_sizes(config: Config) -> dict[str, int | None]:
  """Tokens in each source's training store; None where it has not been made."""
  root = Path(config.data.store)
  paths = {name: root / name / "train" for name in config.data.sources}
  return {n: TokenStore.open(p).tokens if p.exists() else None for n, p in paths.items()}


def _text(facts: dict[str, Any]) -> str:
  lines = [
    f"{facts['name']}: {facts['parameters']:,} parameters, {facts['tokens']:,} tokens in "
    f"{facts['steps']:,} steps, {facts['train_flops']:.3e} FLOPs",
  ]
  for s in facts["stages"]:
    lines += [
      "",
      f"stage {s['name']}: steps {s['first_step']:,} to {s['first_step'] + s['steps']:,}",
      f"  {s['tokens']:,} tokens = {s['steps']:,} steps x {s['batch_tokens']:,} "
      f"(budget {s['budget']:,}; {s['budget'] - s['tokens']:,} left)",
      f"  {s['rows']:,} rows of {s['row_length']:,}; "
      f"{s['train_flops_per_token'] / 1e9:.3f} GFLOPs per token",
      "  learning rate: "
      + ", ".join(f"{rate:.3g} at {k:,}" for k, rate in s["learning_rate"].items()),
    ]
    for name, tokens in s["tokens_by_source"].items():
      share = tokens / s["tokens"]
      lines.append(
        f"    {name:14} {tokens:>22,} tokens  {share:6.2%}  chunks of {s['chunks'][name]:,}"
      )
  lines += ["", "sources"]
  for name, s in facts["sources"].items():
    have = s["tokens_in_store"]
    known = "not tokenized yet" if have is None else f"{have:,} in the store"
    lines.append(f"    {name:14} {s['tokens_taken']:>22,} tokens taken, {known}")
  lines += ["", "memory per device (estimate; slmjax.preflight asks the compiler)"]
  for target, stages in facts["memory_bytes_per_device"].items():
    if isinstance(stages, str):
      lines.append(f"    {target:14} does not fit: {stages}")
    else:
      figures = ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in stages.items())
      lines.append(f"    {target:14} {figures}")
  return "\n".join(lines)
