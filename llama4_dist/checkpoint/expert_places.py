"""Finds where a routed expert lies in an opened checkpoint, whole or a part, quantised or not; reads nothing."""

from collections.abc import Iterator
from pathlib import Path

from llama4_dist.checkpoint.expert_blocks import (
    ExpertBlocks,
    ExpertRun,
    LinearCut,
    expert_blocks,
    expert_linears,
    part_blocks,
    part_linears,
)
from llama4_dist.checkpoint.names import ExpertLayout
from llama4_dist.checkpoint.part import Part, held_runs
from llama4_dist.checkpoint.quantised_blocks import Place, quantised_blocks
from llama4_dist.checkpoint.scheme import Scheme
from llama4_dist.checkpoint.text_tensors import TextTensors
from llama4_dist.config import ModelConfig
from llama4_dist.errors import UnavailableError


class ExpertPlaces:
    """`path` is only for messages."""

    def __init__(
        self, path: Path, config: ModelConfig, tensors: TextTensors, scheme: Scheme | None, part: Part | None
    ) -> None:
        self._path, self._config, self._part, self._scheme = path, config, part, scheme
        self._entries, self._quantised, self._layout = tensors.entries, tensors.quantised, tensors.layout
        self._held = held_runs(part) if part else None  # None = all of every expert

    def blocks(self, run: ExpertRun) -> ExpertBlocks:
        """Return where a slice that is stored in floats lies; UnavailableError if this part does not hold it."""
        held = self._around(run)
        if held is None:
            return expert_blocks(self._config, self._layout, run)
        return part_blocks(self._config, self._layout, held, run)

    def quantised_linears(self, run: ExpertRun) -> tuple[LinearCut, LinearCut, LinearCut] | None:
        """Return which cuts of which linears a slice is, if it is stored quantised."""
        if self._scheme is None or self._layout is ExpertLayout.FUSED:
            return None
        held = self._around(run)
        linears = expert_linears(run) if held is None else part_linears(held, run)
        return linears if linears[0].name in self._quantised else None

    def stored(self, layer: int, expert: int, start: int, stop: int | None) -> Iterator[Place]:
        """Yield where a slice lies; of a part, where whatever it holds of the expert lies."""
        if self._held is None or (start, stop) != (0, None):
            runs = [ExpertRun(layer, expert, start, self._config.expert_width if stop is None else stop)]
        else:
            runs = list(self._held.get((layer, expert), ()))
        for run in runs:
            yield from self._of_run(run)

    def absent(self, what: str) -> Exception:
        """Return the error for what is not here."""
        if self._part is None:
            return ValueError(f"the checkpoint has no text tensor {what!r}")
        return UnavailableError(
            f"{what} is not in {self._path}, which holds {self._part.label} of the checkpoint: open what has it",
            reason="NOT_IN_PART",
        )

    def _of_run(self, run: ExpertRun) -> Iterator[Place]:
        linears = self.quantised_linears(run)
        if linears is not None:
            assert self._scheme is not None, "quantised tensors were found without a scheme"
            for name, rows, columns in linears:
                entry = self._quantised[name]
                yield from quantised_blocks(entry, self._scheme, rows=rows, columns=columns).places()
            return
        blocks = self.blocks(run)
        for stored in [blocks.gate_up, blocks.down] if blocks.gate_up else blocks:
            yield self._entries[stored.name], stored.block

    def _around(self, run: ExpertRun) -> ExpertRun | None:
        """Return what a part holds around a slice; None where everything is here."""
        if self._held is None:
            return None
        for held in self._held.get((run.layer, run.expert), ()):
            if held.start <= run.start and run.stop <= held.stop:
                return held
        raise self.absent(f"routed expert {run.expert} of layer {run.layer}, columns {run.start} to {run.stop}")
