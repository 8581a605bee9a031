"""Reading torch.distributed.checkpoint directories that an earlier release has written."""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE, Metadata

from .options import RENAMED_GROUP_KEYS


class RenamingLoadPlanner(DefaultLoadPlanner):
    """Find the param-group entries that have been renamed since the checkpoint was written.

    ``dcp.load`` looks for the entries that the optimizer has today; a missing entry is read from
    its former name. A checkpoint of this release loads as without this planner.

    Args:
        The arguments are those of torch.distributed.checkpoint.DefaultLoadPlanner.

    Example:
        >>> import torch.distributed.checkpoint as dcp
        >>> from mechanic_fused.checkpoints import RenamingLoadPlanner
        >>> planner = RenamingLoadPlanner()  # dcp.load(state_dict, ..., planner=planner)
    """

    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Prepare to load, as the base class does, and look up the former names."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        saved = {} if metadata is None else metadata.state_dict_metadata
        former = {new: old for old, new in RENAMED_GROUP_KEYS.items()}
        self.state_dict = self._with_former_names(self.state_dict, saved, former)
        self.mappings = self._with_former_names(self.mappings, saved, former)

    @staticmethod
    def _with_former_names(
        entries: dict[str, Any], saved: dict[str, Any], former: dict[str, str]
    ) -> dict[str, Any]:
        renamed = {}
        for name, value in entries.items():
            prefix, dot, last = name.rpartition(".")
            old = f"{prefix}{dot}{former.get(last, last)}"
            renamed[old if name not in saved and old in saved else name] = value
        return renamed
