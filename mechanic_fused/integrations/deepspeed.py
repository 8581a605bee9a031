"""DeepSpeed's universal checkpoints with x_ref, so that a run goes on on another number of ranks.

DeepSpeed's own converter takes Adam's two moments and the param groups, in which S is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

MOMENT = "exp_avg"

SHARDS = "_optim_states.pt"
"""The end of the names of files with shards of the optimizer's state."""


def to_universal(folder: str | Path, output: str | Path) -> None:
    """Convert a checkpoint of a DeepSpeed engine into a universal one, as ds_to_universal does.

    Of MechanicAdamW or MechanicAdam in the running form, in ZeRO 1, 2 or 3.

    Args:
        folder: the checkpoint's, with its tag: "run/global_step100".
        output: the new folder beside it: "run/global_step100_universal".

    Raises:
        ValueError: for a state that the converter does not know; nothing has been written then.
    """
    from deepspeed.checkpoint import ds_to_universal

    folder, output = Path(folder), Path(output)
    for path in optim_files(folder):
        check(path)

    def convert(source: Path, target: Path) -> None:
        workers = {"num_extract_workers": 1, "num_merge_workers": 1}
        choices = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
        folders = {"input_folder": str(source), "output_folder": str(target)}
        ds_to_universal.main(argparse.Namespace(**folders, **workers, **choices))

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        # The converter knows moments by name alone: x_ref is converted in the place of one.
        disguised, found = Path(scratch, "in"), Path(scratch, "out")
        shutil.copytree(folder, disguised, copy_function=copy_or_link)
        for path in optim_files(disguised):
            saved = torch.load(path, map_location="cpu", weights_only=False)
            for state in states_of(saved):
                state[MOMENT] = state["x_ref"]
            torch.save(saved, path)
        convert(disguised, found)
        convert(folder, output)
        for path in found.glob(f"zero/**/{MOMENT}.pt"):
            shutil.move(path, output / path.relative_to(found).with_name("x_ref.pt"))


def copy_or_link(source: str, target: str) -> None:
    """Copy the shards of the optimizer's state, which are written to, and link all other files."""
    if not source.endswith(SHARDS):
        try:
            os.link(source, target)
            return
        except OSError:  # a file system without links
            pass
    shutil.copy2(source, target)


def load_universal(engine: Any, folder: str | Path, tag: str) -> None:
    """Let a DeepSpeed engine load what :func:`to_universal` has made.

    Args:
        engine: DeepSpeed's; its configuration has ``"checkpoint": {"load_universal": true}``.
        folder: the checkpoints', without the tag.
        tag: the universal checkpoint's, such as "global_step100_universal".

    Raises:
        ValueError: for a checkpoint without x_ref, from DeepSpeed's own converter.
    """
    zero = Path(folder, tag, "zero")
    if next(zero.glob("**/x_ref.pt"), None) is None:
        raise ValueError(
            f"expected a universal checkpoint by to_universal, got {zero} without x_ref.pt"
        )
    engine.load_checkpoint(str(folder), tag=tag)
    if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
        complete_stage_3(engine.optimizer, zero)


def complete_stage_3(sharded: Any, zero: Path) -> None:
    """Load what DeepSpeed's stage 3 leaves out, and undo what it shares between pieces and groups.

    It loads the moments alone, lets all pieces count steps in one tensor, and gives the options of
    the first param group to every group.

    Args:
        sharded: DeepSpeed's optimizer around ours.
        zero: the folder of the checkpoint with a folder for each weight.
    """
    states = sharded.optimizer.state
    flats = sharded.fp32_partitioned_groups_flat
    for params, flat in zip(sharded.fp16_groups, flats, strict=True):
        pieces = [
            sharded.load_hp_checkpoint_state(str(zero / sharded.param_names[p]), "x_ref", param=p)
            for p in params
        ]
        x_ref = torch.zeros_like(flat)
        joined = torch.cat(pieces)
        x_ref[: len(joined)] = joined
        states[flat] |= {"x_ref": x_ref, "step": states[flat]["step"].clone()}
    saved = torch.load(zero / "optimizer_state.pt", map_location="cpu", weights_only=False)
    groups = saved["optimizer_state_dict"]["param_groups"]
    for group, options in zip(sharded.optimizer.param_groups, groups, strict=True):
        group.update({name: value for name, value in options.items() if name != "params"})


def optim_files(folder: Path) -> list[Path]:
    """Return the files with the shards of the optimizer's state."""
    return sorted(folder.glob(f"*{SHARDS}"))


def states_of(saved: Any) -> list[dict[str, Any]]:
    """Return the entries of every flat weight, as ZeRO 1 and 2 or ZeRO 3 save them."""
    found = saved["optimizer_state_dict"]
    found = found.get("base_optimizer_state") or found["optimizer_state_dict"]
    if not isinstance(found, dict):
        raise ValueError("expected a checkpoint without elastic_checkpoint, got one with it")
    return list(found["state"].values())


def check(path: Path) -> None:
    """Raise ValueError unless the states are of Adam in the running form."""
    for state in states_of(torch.load(path, map_location="cpu", weights_only=False)):
        known = {MOMENT, "exp_avg_sq", "step", "x_ref"}
        if state.keys() != known or state["x_ref"].shape != state[MOMENT].shape:
            raise ValueError(
                f"DeepSpeed's converter knows Adam's moments alone: expected the entries "
                f"{sorted(known)} of one size, got {sorted(state)} in {path.name}"
            )
