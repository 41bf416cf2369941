"""Control calls of a front end: numbered, and matched to their answers by number. Sans I/O."""

from __future__ import annotations

import itertools

from quire.messages import Answer, Control, ControlAction, Failure, LoadAdapter, Sleep

CALLED_OFF = Failure("wake_up was called before the engine slept.", "EngineError")


class Controls:
    """The control calls in progress, and whether the engine sleeps.

    A `Sleep` is held here until no request is left; until then it may be cancelled. A call that was sent is
    carried out, even if its caller no longer waits for the answer.
    """

    def __init__(self) -> None:
        self.sleep_level = 0
        """The engine's level, from its latest answer."""
        self._ids = itertools.count(1)
        self._held: dict[int, Control] = {}
        self._sent: dict[int, Control] = {}

    @property
    def is_sleeping(self) -> bool:
        """Whether the engine sleeps or is about to, so that it takes no requests."""
        sleep_sent = any(isinstance(control.action, Sleep) for control in self._sent.values())
        return bool(self.sleep_level or self._held or sleep_sent)

    @property
    def is_loading(self) -> bool:
        """Whether adapters are being loaded, for which a sleep waits."""
        return any(isinstance(control.action, LoadAdapter) for control in self._sent.values())

    def new(self, action: ControlAction) -> Control:
        return Control(next(self._ids), action)

    def start(self, control: Control, *, busy: bool) -> list[Control]:
        """The messages to send now: the call, unless it is a sleep and requests run (`busy`)."""
        if busy and isinstance(control.action, Sleep):
            self._held[control.id] = control
            return []
        self._sent[control.id] = control
        return [control]

    def release(self) -> list[Control]:
        """The held sleeps, which are to be sent when no request is left."""
        held, self._held = self._held, {}
        self._sent.update(held)
        return list(held.values())

    def call_off(self) -> list[Answer]:
        """End the held sleeps, because the engine is to be awake. Returns their answers."""
        held, self._held = self._held, {}
        return [Answer(control_id, self.sleep_level, CALLED_OFF) for control_id in held]

    def cancel(self, control_id: int) -> None:
        """The caller no longer waits."""
        self._held.pop(control_id, None)

    def take(self, answer: Answer) -> None:
        del self._sent[answer.id]
        self.sleep_level = answer.sleep_level
