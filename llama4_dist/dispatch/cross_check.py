"""Finds hosts that compute wrong answers: now and then a second host computes the same rows, and answers must be equal.

Checksums find damage on the way; only this finds damage in a host's memory or arithmetic. Where two answers differ, a
referee in this process says which host is wrong. Without one nobody is accused.
"""

import logging
import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama4_dist.dispatch.in_flight import InFlight
from llama4_dist.dispatch.layout import Indices
from llama4_dist.dispatch.links.link import Frame, FrameKind

log = logging.getLogger(__name__)

MAX_ROWS = 16
MAX_AWAITED = 16

Referee = Callable[[int, int, Tensor], Tensor]  # (layer, unit, x_RD) to y_RD, computed here


class Sample(NamedTuple):
    """Rows of one expert, and what `host` answered."""

    host: str
    layer: int
    expert: int
    experts_N: Indices  # `expert`, once per row
    x_RD: Tensor
    y_RD: Tensor


class CrossCheck:
    """Draws a sample of one in `every` dispatches (0 = never) and compares answers."""

    def __init__(self, *, every: int = 0, referee: Referee | None = None) -> None:
        self._every = every
        self._referee = referee
        self._num_seen = 0
        self._chosen = 0
        self._random = random.Random(0)  # noqa: S311 - spreads checks over layers, hosts and experts; no secret
        self._awaited: dict[int, tuple[str, Sample]] = {}  # by frame number; with the host that was asked

    def due(self) -> bool:
        """Count a dispatch; say whether it is to be checked: one of each `every` in turn, drawn.

        Every step has as many dispatches as layers: a fixed period would meet the same few layers for ever.
        """
        if self._every <= 0:
            return False
        place = self._num_seen % self._every
        if place == 0:
            self._chosen = self._random.randrange(self._every)
        self._num_seen += 1
        return place == self._chosen

    def sample(self, in_flight: InFlight) -> Sample | None:
        """Copy some rows of one expert and their answers out of a finished dispatch."""
        if not in_flight.answered:
            return None
        piece = self._random.choice(in_flight.answered)
        expert, count = self._random.choice(piece.groups)
        before = sum(rows for other, rows in piece.groups if other < expert)
        positions = piece.positions
        indices = np.arange(positions.start, positions.stop) if isinstance(positions, slice) else positions
        wanted = indices[before : before + min(count, MAX_ROWS)]
        return Sample(
            piece.host,
            in_flight.layer,
            expert,
            np.full(len(wanted), expert, dtype=np.int64),
            in_flight.rows_for(wanted).clone(),
            in_flight.outputs_of(wanted),
        )

    def await_answer(self, number: int, host: str, sample: Sample) -> None:
        """Remember what was asked, and of whom."""
        if len(self._awaited) >= MAX_AWAITED:
            self._awaited.pop(next(iter(self._awaited)))
        self._awaited[number] = (host, sample)

    @property
    def hosts(self) -> set[str]:
        """Hosts that owe the answer to a check."""
        return {host for host, _ in self._awaited.values()} if self._awaited else set()

    def awaits(self, number: int) -> bool:
        return number in self._awaited

    def compare(self, number: int, host: str, frame: Frame) -> set[str]:
        """Compare a second answer with the first; return the hosts that are proved wrong."""
        asked, sample = self._awaited.pop(number)
        y_RD = frame.rows_RD
        if asked != host or frame.header.kind != FrameKind.REPLY or y_RD is None or y_RD.shape != sample.y_RD.shape:
            return set()
        if torch.equal(y_RD, sample.y_RD):
            return set()
        names = (sample.host, host)
        if self._referee is None:
            log.error("answers_differ hosts=%s layer=%d expert=%d referee=none", names, sample.layer, sample.expert)
            return set()
        truth_RD = self._referee(sample.layer, sample.expert, sample.x_RD)
        right = {
            name for name, answer_RD in zip(names, (sample.y_RD, y_RD), strict=True) if torch.equal(answer_RD, truth_RD)
        }
        log.error("answers_differ hosts=%s layer=%d expert=%d right=%s", names, sample.layer, sample.expert, right)
        # Two hosts that both differ from the referee are of another kind than this machine: it cannot judge them.
        return {*names} - right if right else set()
