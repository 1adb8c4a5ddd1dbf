"""A decode step as one captured graph: whole, and proved to be before it is timed.

    hold shapes -> capture a step -> [replay N times] = [N eager steps]?  -> replay, to be timed

What a graph holds is what the host asked for once. A step is captured only where all that changes
from one to the next is read and advanced on the device (``hold_shapes`` says where it is not), and
the replays must give the logits that as many eager steps give.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from measure.devices.base import AbstractDevice, Captured
from measure.sessions import Session

#: Steps that replays are compared over, where the caches have room for so many.
CHECKED_STEPS = 4
#: Largest difference of logits, as a share of the largest: the same kernels in the same order are
#: equal to the bit; a library may choose others while it captures.
TOLERANCE = 0.02


def captured_step(session: Session, device: AbstractDevice) -> Captured:
    """Capture one step of ``session`` and compare replays with eager steps.

    The caches hold random tokens afterwards, and stand at T. Without a graph steps are the usual
    ones again: what is read of them later is of the steps that were timed.
    """
    captured = _captured(session, device)
    if captured.replay is None:
        session.release_shapes()
    return captured


def _captured(session: Session, device: AbstractDevice) -> Captured:
    reason = session.hold_shapes()
    if reason:
        return Captured(replay=None, reason=reason)
    n = min(CHECKED_STEPS, session.point.output_tokens)
    _start(session)
    expected = _logits_of(session.decode, session, n)
    _start(session)
    captured = device.capture(session.decode, session.reset)
    if captured.replay is not None:
        held = session.logits  # where every replay leaves its logits
        _start(session)
        session.logits = held
        found = _logits_of(captured.replay, session, n)
        apart = difference(found, expected)
        if not apart <= TOLERANCE:
            captured = Captured(
                replay=None,
                reason=f"{n} replays gave other logits than {n} eager steps: they differ by "
                f"{apart:.2g} of the largest",
            )
    session.reset()
    return captured


def _start(session: Session) -> None:
    """The same T random tokens as before, and the mark on them."""
    session.fill()
    session.mark()
    session.reset()


def _logits_of(step: Callable[[], object], session: Session, n: int) -> list[Tensor]:
    found = []
    for _ in range(n):
        step()
        found.append(session.logits.clone())
    return found


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference over the largest logit; not a number where one is not."""
    shares = [
        (a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-30)
        for a, b in zip(found, expected, strict=True)
    ]
    return float(torch.stack(shares).max())  # built-in ``max`` would drop what is not a number


def rewinding(replay: Callable[[], object], session: Session) -> Callable[[], object]:
    """Return ``replay`` for as many calls as one likes: at the end of the caches' room it goes back
    to T, in count alone.
    """
    room, done = session.point.output_tokens, 0

    def step() -> None:
        nonlocal done
        if done == room:
            session.rewind()
            done = 0
        replay()
        done += 1

    return step
