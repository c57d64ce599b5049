"""One block under a plan: recorded first, then followed.

The first two calls of each block (and of each new signature) run under the recorder; the first is proved replayable,
the second must agree with it. Later calls run with hooks for saved tensors alone, no dispatch mode.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_iter

from stowplan.core.errors import PlanMismatch, ReplayMismatch
from stowplan.core.program import Action, Decision
from stowplan.core.units import format_bytes
from stowplan.offload.arguments import Numbers, flatten, signature
from stowplan.offload.blocks import Block, refuse_compiled
from stowplan.offload.buffers import Buffers
from stowplan.offload.copies import CopyEngine, Stop
from stowplan.offload.intercept import Forward, Interception
from stowplan.offload.recording import Recording, devices_of, parameter_of, record_call
from stowplan.offload.refusals import refuse_callers, refuse_hooks, refuse_switched_on
from stowplan.offload.tape.checks import Checks
from stowplan.offload.tape.course import Course, allowed_actions, resolved
from stowplan.offload.tape.proof import Tolerance, prove
from stowplan.offload.tape.rng import draw_position, set_position
from stowplan.offload.tape.run import Counters, Departure, Run, unpack
from stowplan.offload.tape.tape import Origin, Tape

__all__ = ["PlannedBlock", "does_something"]

# Which call of the block in a forward pass, and what can be seen of that call from outside.
Signature = tuple[Any, ...]

# A block that was recorded this often under one signature is left alone.
_MAX_RECORDINGS = 6
# Signatures of a block that are remembered.
_MAX_SIGNATURES = 32
_MAX_LISTED = 5


class PlannedBlock:
    """One block under a plan.

    A call of a new signature is recorded. Two recordings in a row must agree before calls follow the tape without being
    recorded: what only the first call does (filling a cache, say) is no part of the steady state.

    ``planned`` has the decisions for each call in a forward pass, ``places`` their numbers among the calls of all
    blocks. Calls beyond those begin with the first ones again.
    """

    def __init__(
        self,
        block: Block,
        planned: Sequence[Mapping[str, Decision]],
        copies: CopyEngine,
        counters: Counters,
        checks: Checks,
        failure_note: str = "",
        places: Sequence[int] = (),
        tolerance: Tolerance | None = None,
    ) -> None:
        self.name, self.module = block
        self.places = places or range(len(planned))
        self.planned = [dict(actions) for actions in planned]
        self.untouched = {i for i, actions in enumerate(planned) if not does_something(actions)}
        self.is_first = False  # of the model's planned blocks: it looks at who calls them
        self.num_calls = 0  # since the forward pass began
        self.copies = copies
        self.counters = counters
        self.checks = checks
        self.failure_note = failure_note
        self.tolerance = tolerance
        self.planned_keys: dict[int, Signature] = {}  # of the first recording of each call: what the plan is for
        self.tapes: dict[Signature, Tape] = {}  # the last recording
        self.courses: dict[Signature, Course | None] = {}  # what to follow; None: keep everything
        self.num_recordings: Counter[Signature] = Counter()
        self.numbers = Numbers(self.module)
        self.devices = devices_of(self.module)
        self.at_work = threading.Lock()
        self.crowded = False
        self.interception = Interception(self.module, self.call)

    def call(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block's forward, its saved tensors packed by plan.

        A call while another is under way (the block calls itself, or another thread calls it) keeps what it saves.
        """
        refuse_switched_on(self.name, self.module)
        if not torch.is_grad_enabled() or not self.at_work.acquire(blocking=False):
            return forward(*args, **kwargs)
        try:
            number = self.num_calls % len(self.planned)
            self.num_calls += 1
            if number in self.untouched and not self.copies.window:
                return forward(*args, **kwargs)
            stop = self.copies.begin(self.places[number], self.name)
            if number in self.untouched:
                return self._pass_by(stop, forward(*args, **kwargs))
            if self.is_first:
                refuse_callers(self.name)
            else:
                refuse_hooks(self.name)
            if self.module._compiled_call_impl is not None:
                refuse_compiled(self.name, self.module)
            self.checks.settle()
            leaves = flatten(args, kwargs)
            key = (number, *signature(leaves, kwargs, self.numbers.state()))
            course = self.courses.get(key)
            if course is not None:
                return self._follow(key, stop, course, leaves, forward, args, kwargs)
            if key in self.courses:
                return self._pass_by(stop, forward(*args, **kwargs))
            return self._record(key, stop, forward, args, kwargs)
        finally:
            self.at_work.release()

    def _pass_by(self, stop: Stop, output: Any) -> Any:
        """Have the blocks before one that keeps everything come back when its backward begins."""
        if self.copies.window > 1:
            node = next((t.grad_fn for t in tree_iter(output) if isinstance(t, torch.Tensor) and t.grad_fn), None)
            if node is not None:
                copies, counters = self.copies, self.counters

                def turn(gradients: Any) -> None:
                    counters.returned_bytes += copies.turn(stop)

                node.register_prehook(turn)
        return output

    def _follow(
        self,
        key: Signature,
        stop: Stop,
        course: Course,
        leaves: list[Any],
        forward: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        position = draw_position(self.devices)
        buffers = Buffers(self.module) if course.writes_buffers else None
        run = Run(self.name, self.copies, self.counters, self.checks, stop)
        run.failure_note = self.failure_note
        run.follow(course, leaves, self._parameter_of, position)
        try:
            with torch.autograd.graph.saved_tensors_hooks(run.packer(), unpack):
                output = forward(*args, **kwargs)
            run.seal()
        except BaseException as error:
            run.drop_all()  # or its cells and it would keep each other alive until the garbage collector comes
            if not isinstance(error, Departure):
                raise
            # What was dropped already cannot be had back: run the block again from its start, under the recorder.
            self.counters.departures += 1
            output = None
            _refuse_second_run(self.name, leaves)
            set_position(position)
            if buffers is not None:
                buffers.restore()
            del self.courses[key]
            return self._record(key, stop, forward, args, kwargs)
        self.counters.steady_calls += 1
        return output

    def _record(
        self, key: Signature, stop: Stop, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        refuse_compiled(self.name, self.module)
        if key not in self.num_recordings and len(self.num_recordings) >= _MAX_SIGNATURES * len(self.planned):
            self._forget_oldest()
        recording = record_call(
            self.module, forward, args, kwargs, self.copies, self.counters, self.checks, self.name, stop=stop
        )
        self.counters.recorded_calls += 1
        recording.run.failure_note = self.failure_note
        try:
            self._take_up(key, recording)
        except BaseException:
            recording.run.drop_all()
            raise
        return recording.output

    def _take_up(self, key: Signature, recording: Recording) -> None:
        """Have what the recorded call holds done as planned, and the calls after it follow if two recordings agree."""
        tape, run = recording.recorder.finish(), recording.run
        with _disable_current_modes():  # a block around this one may be recording, too
            before = self.tapes.get(key)
            agrees = before is not None and before.does_the_same(tape)
            if before is not None and agrees:
                tape = before  # proved already
            elif tape.steady:
                prove(tape, recording.given, recording.truth(), recording.position)
            reason = self._reason_to_keep(key, tape)
            if reason:
                self.courses[key] = None
                run.keep_all()
                warnings.warn(f"{self.name} keeps everything it saves: {reason}.", RuntimeWarning, stacklevel=2)
                return
            course = self._course(tape, key, recording, new=not agrees)
            run.follow(course, recording.leaves, self._parameter_of, recording.position)
            run.adopt()
            run.seal()
        if agrees:
            self.courses[key] = course
        self.tapes[key] = tape

    def _reason_to_keep(self, key: Signature, tape: Tape) -> str:
        """Why this block is to be left alone; empty if it is not."""
        self.num_recordings[key] += 1
        if not tape.steady:
            return tape.unsteady_reason
        if self.num_recordings[key] > _MAX_RECORDINGS and self.tapes:
            return f"its calls do not do the same twice ({self.num_recordings[key]} recordings of one signature)"
        return ""

    def _forget_oldest(self) -> None:
        """Keep what is known of the latest signatures only. Calls of the others are recorded again: slow, but exact
        and within the budget.
        """
        if not self.crowded:
            self.crowded = True
            warnings.warn(
                f"{self.name} was called in more than {_MAX_SIGNATURES} ways (shapes, arguments or numbers that "
                f"change): its calls go on under the plan, but many of them are recorded anew, which is slow.",
                RuntimeWarning,
                stacklevel=2,
            )
        oldest = next(iter(self.num_recordings))
        del self.num_recordings[oldest]
        self.tapes.pop(oldest, None)
        self.courses.pop(oldest, None)

    def _course(self, tape: Tape, key: Signature, recording: Recording, new: bool) -> Course:
        """The course of a call. What is to be recomputed by rows has to be proved on a ``new`` tape; where it cannot
        be, all of the value is swapped, or recomputed in calls of another signature than the plan is for.
        """
        actions = self._resolve(tape, key[0])
        as_planned = self.planned_keys.setdefault(key[0], key) == key
        course = Course(tape, actions)
        if not course.rows:
            return course
        if new:
            trials = course.trials(self.tolerance)
            prove(tape, recording.given, recording.truth(), recording.position, trials=trials)
        unproved = course.unproved()
        if not unproved:
            return course
        if new and as_planned:
            self._tell_unproved(course, unproved)
        instead = Action.SWAP if as_planned else Action.RECOMPUTE
        return Course(tape, {**actions, **dict.fromkeys(unproved, instead)})

    def _tell_unproved(self, course: Course, unproved: Sequence[int]) -> None:
        values = [course.tape.values[value] for value in unproved]
        more = sum(value.size_bytes for value in values) - sum(
            parts.swapped.stop - parts.swapped.start for value, parts in course.parts.items() if value in unproved
        )
        warnings.warn(
            f"{self.name}: the first rows of {_listed([value.name for value in values])} do not come out bit for bit "
            f"as in the whole on this machine, so these values are swapped whole: {format_bytes(more)} more on the "
            f"host than planned. Plan on this machine, or with exact=False.",
            RuntimeWarning,
            stacklevel=2,
        )

    def _resolve(self, tape: Tape, call: int) -> dict[int, Decision]:
        """The planned decisions by value. At a block's first recording plan and tape must agree on what is saved;
        another call in the same forward pass (which finds autocast's copies of the weights), or a later signature
        (another batch size), may save other values, which are kept.
        """
        planned = self.planned[call]
        allowed = allowed_actions(tape)
        names = {tape.values[v].name: v for v in allowed}
        lasting = {slot.value for slot in tape.lasting_slots}
        made = {name for name, v in names.items() if tape.values[v].origin is Origin.MADE and v in lasting}
        expected = {name for name, action in planned.items() if tape.prefix is None or action is not Action.KEEP}
        if not self.tapes and not call and (expected - names.keys() or made - planned.keys()):
            raise PlanMismatch(
                f"{self.name} saves other values than the plan decides on. Planned, not saved: "
                f"{_listed(expected - names.keys())}; saved, not planned: "
                f"{_listed(made - planned.keys())}. The plan was made for another model, dtype, attention "
                f"implementation, autocast setting or mode (train or eval): plan anew with this one."
            )
        return resolved(tape, {value: planned[name] for name, value in names.items() if name in planned})

    def _parameter_of(self, name: str) -> torch.Tensor:
        return parameter_of(self.module, name)


def does_something(actions: Mapping[str, Decision]) -> bool:
    """Is there anything but keeping?"""
    return any(action is not Action.KEEP for action in actions.values())


def _refuse_second_run(name: str, leaves: Sequence[Any]) -> None:
    """A call may be made again only if what it was given cannot have been changed by the first try."""
    for leaf in leaves:
        if not (leaf is None or isinstance(leaf, bool | int | float | str | torch.Tensor | torch.dtype | torch.device)):
            raise ReplayMismatch(
                f"{name} did something else than in the calls before, and cannot be run again because it was given a "
                f"{type(leaf).__name__}, which its first run may have changed. Pass use_cache=False if that is a "
                f"key-value cache, or leave this block out of the plan (blocks=)."
            )


def _listed(names: Collection[str]) -> str:
    """A few names for a message."""
    shown = sorted(names)[:_MAX_LISTED]
    more = f" and {len(names) - len(shown)} more" if len(names) > len(shown) else ""
    return ", ".join(map(repr, shown)) + more if shown else "nothing"
