"""Stops a fake model in its forward pass, so that a test can act while a step runs."""

import threading

from tests.engine.fake_model import FakeModel


class Gate:
    """Holds the model in its forward pass until opened."""

    def __init__(self, model: FakeModel) -> None:
        self.entered = threading.Event()
        self._open = threading.Event()
        model.before_forward = self._pass

    def open(self) -> None:
        self._open.set()

    def _pass(self, batch: object) -> None:
        self.entered.set()
        assert self._open.wait(60)
