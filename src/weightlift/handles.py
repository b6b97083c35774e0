"""What `weightlift.plan` and `weightlift.defer` return: a plan that can be executed, a module that can be loaded."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import nn

from weightlift.ambient import Undisturbed, outside_modes
from weightlift.checkpoint import Checkpoint, open_checkpoint
from weightlift.checkpoint.integrity import digests_of
from weightlift.deferred.inventory import Inventory, is_lazy
from weightlift.deferred.recorder import Recorder
from weightlift.deferred.replay import label_samples, needed, replays
from weightlift.distributed.fsdp import refuse_flat, reshard
from weightlift.distributed.paper import MeshReport
from weightlift.distributed.together import Together
from weightlift.errors import PlanError, Problem
from weightlift.options import LoadOptions, require_known
from weightlift.plan.records import Decisions
from weightlift.plan.remedies import find
from weightlift.plan.report import LoadReport, as_json, report, table
from weightlift.supply import decide
from weightlift.transfer import trace_page
from weightlift.transfer.accelerator import require_devices
from weightlift.transfer.apply import apply
from weightlift.transfer.settle import settle_small
from weightlift.transfer.subject import Given, Load, Subject
from weightlift.transfer.ties import settled
from weightlift.transfer.trace import Trace, timed
from weightlift.unstrided import bytes_of

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    _Module = TypeVar("_Module", bound=nn.Module, default=nn.Module, covariant=True)
else:
    from typing import TypeVar

    _Module = TypeVar("_Module", bound=nn.Module, covariant=True)

_log = logging.getLogger("weightlift")
CheckpointSource = str | os.PathLike[str] | Mapping[str, torch.Tensor] | Checkpoint


class LoadPlan(Generic[_Module]):
    """What a load will do, decided from headers alone: print it, read it, execute it.

    ``str(plan)`` is a table, ``plan.report`` a `LoadReport`, ``plan.to_json()`` JSON text, ``plan.problems`` what
    speaks against it, ``plan.ranks`` what every rank of a ``mesh_shape`` would do. A plan made from a callable holds
    the deferred module and can be executed once.
    Reading a plan is safe from any thread; ``execute`` is for one.
    """

    def __init__(
        self,
        load: Load,
        *,
        take: Callable[[], Subject] | None = None,
        together: Together | None = None,
        given: Given | None = None,
    ) -> None:
        self.decisions = load.decisions
        self._load: Load | None = load
        self._take = take  # uses up the handle that the plan was made from
        self._together = together  # what there is to do besides when the module is spread over ranks
        self._given = given  # a user's module, as it was planned for
        self.ranks: MeshReport | None = None
        self._once = threading.Lock()
        self._final: Decisions | None = None

    @property
    def report(self) -> LoadReport:
        """The lists of loaded, tied, initialised, kept, missing, unexpected and mismatched names.

        Once the plan was executed also what its checks found (``left_out``, names that were untied).
        """
        return report(self._final or self.decisions)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What makes `execute` refuse; empty when it will not."""
        return self.decisions.problems

    def __str__(self) -> str:
        return table(self.decisions) if self.ranks is None else f"{table(self.decisions)}\n\n{self.ranks}"

    def __repr__(self) -> str:
        return f"<LoadPlan of {self.decisions.module}: {str(self.report).splitlines()[0]}>"

    def to_json(self, *, indent: int | None = None) -> str:
        """The plan as JSON text: every tensor with action, key, file, byte range, dtypes and device."""
        ranks = {} if self.ranks is None else {"mesh": self.ranks.as_json()}
        return json.dumps(as_json(self.decisions) | ranks, indent=indent)

    def execute(self) -> _Module:
        """Carry the plan out and return the module, whole.

        Raises PlanError when ``problems`` speak against it, tied names turn out to differ, or a module that existed is
        another one than was planned for (nothing was changed), TransferError when reading fails, LoadCancelled,
        RuntimeError on a second call, and what ``parallelize`` raises, which is called here.
        """
        if self.problems:
            raise PlanError(
                f"{self.decisions.source} does not fit {self.decisions.module}; nothing was changed", self.problems
            )
        load, together = self._peek(), self._together
        with Undisturbed(), contextlib.nullcontext() if together is None else together.loading():
            self._refuse_stale()
            with outside_modes(), timed(load.trace, "check", "devices and tied names"):
                # Both may refuse; until then nothing is used up, so that the plan can be executed again.
                require_devices(self.decisions)
                settle = settled if together is None else together.settled
                final = settle(load.decisions, load.source, load.options)
            spread = contextlib.nullcontext() if together is None else together.spread(final, load.subject)
            with self._as_it_was(load.options), spread:
                self._use()
                module = self._apply(replace(load, decisions=final))
        self._final = final
        if self._given is not None:
            self._given = Given.of(module)
            self._load = replace(load, subject=replace(load.subject, inventory=load.subject.inventory.renewed()))
        _log_outcome(final, load.options)
        return module  # type: ignore[return-value]

    def _refuse_stale(self) -> None:
        if self._given is None:
            return
        reshard(self._given.module)
        if stale := self._given.changes():
            raise PlanError(f"{self.decisions.module} is not what was planned for; nothing was changed", stale)

    @contextlib.contextmanager
    def _as_it_was(self, options: LoadOptions) -> Iterator[None]:
        """Around what fails with a user's tensors back in their places, if not under the same names as before."""
        try:
            yield
        except BaseException:
            if self._given is not None and options.parallelize is not None:
                self._given = Given.of(self._given.module)
            raise

    def _peek(self) -> Load:
        load = self._load  # read once: another thread may use it up at any moment
        if load is None:
            raise RuntimeError("this plan was executed already: its module has its values")
        return load

    def _use(self) -> None:
        """From here on a module that was built for the plan is this execution's alone."""
        with self._once:
            if not self._peek().subject.existing:
                self._load = None
        if self._take is not None:
            self._take()

    def _apply(self, load: Load) -> nn.Module:
        """Apply; the trace is written also of a load that fails, which is when one looks at it."""
        trace, path = load.trace, load.options.trace
        carry_out = apply if self._together is None else self._together.execute
        if trace is None or path is None:
            return carry_out(load)
        try:
            return carry_out(load)
        finally:
            trace.sample()
            title = f"{self.decisions.source} into {self.decisions.module}"
            try:
                trace_page.write(trace, path, title=title)
            except OSError as error:  # no reason to lose the module, nor what the load itself raises
                _log.warning("the trace of %s could not be written to %s: %s", title, path, error)


class Deferred(Generic[_Module]):
    """A module that was built without memory and without initialisation, and has no values yet.

    The module itself stays inside until `load` or `materialize` has made it whole; either can be done once, by one of
    any number of threads; a second time is a RuntimeError.

    ``name`` is that of its class, ``numel`` and ``nbytes`` count the parameters, ``buffer_nbytes`` the buffers, and
    ``forced`` says which calls of the constructor had to run at once, and for how many bytes (docs/deferred.md).
    """

    def __init__(self, inventory: Inventory, recorder: Recorder | None, seed: int, *, seed_given: bool) -> None:
        self._subject: Subject | None = Subject(inventory, recorder)
        # Held while a plan is made: what another thread fills meanwhile would look like a module that fits nothing.
        self._alone = threading.RLock()  # a state-dict hook may ask for a plan, too
        self._seed, self._seed_given = seed, seed_given
        self.name = type(inventory.module).__qualname__
        tensors = {id(slot.tensor): slot for slot in inventory.slots}
        parameters = [slot.tensor for slot in tensors.values() if slot.kind == "parameter" and not is_lazy(slot.tensor)]
        buffers = [slot.tensor for slot in tensors.values() if slot.kind == "buffer" and not is_lazy(slot.tensor)]
        self.numel = sum(tensor.numel() for tensor in parameters)
        self.nbytes = sum(map(bytes_of, parameters))
        self.buffer_nbytes = sum(map(bytes_of, buffers))
        self.forced = {} if recorder is None else dict(recorder.forced)

    def __repr__(self) -> str:
        return f"<Deferred {self.name}: {self.numel:,} parameters, {self.nbytes:,} bytes>"

    def plan(
        self,
        ckpt: CheckpointSource,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> LoadPlan[_Module]:
        """Plan loading ``ckpt`` into this module; executing the plan uses this up.

        The same options and errors as `weightlift.plan`, but for ``mesh_shape`` and ``placements``, and for ``defer``,
        which comes too late. Raises TypeError for these.
        """
        require_known(options)
        given = options.pop("seed", None)
        if given is None and self._seed_given:
            given = self._seed
        made = LoadOptions.create(**options, seed=self._seed if given is None else given)
        hub = {"revision": revision, "token": token, "local_files_only": local_files_only}
        with opened(ckpt, made, seed=given, **hub) as opening, self._alone:
            return planned(self._peek(), opening, take=self._take)  # type: ignore[return-value]

    def load(self, ckpt: CheckpointSource, **options: Any) -> _Module:
        """Load ``ckpt`` and return the module. The options and errors of `weightlift.load`, but for ``defer``."""
        return self.plan(ckpt, **options).execute()

    def materialize(self) -> _Module:
        """Run the recorded initialisers and return the module, initialised as its constructor meant.

        Values that are sampled depend on the seed and the parameter's name alone, not on order or threads. Raises
        PlanError, and uses nothing up, where the constructor built on ``meta``.
        """
        self._refuse_meta()
        subject = self._take()
        recorder = subject.recorder
        if recorder is not None:
            with Undisturbed(), outside_modes():
                owned = subject.records()
                label_samples(owned)
                for replay in replays(needed(owned)):
                    replay.run(recorder.seed)
                for record in owned:
                    record.memory()
                settle_small(subject.inventory.slots, owned)
        return subject.inventory.module  # type: ignore[return-value]

    def _refuse_meta(self) -> None:
        """What was built on ``meta`` has no initialiser that could run."""
        slots = self._peek().inventory.slots
        problems = [
            Problem(
                f"the {slot.kind} was built without a value, on meta",
                fqn=slot.fqn,
                hint="build it outside torch.device('meta'), or load it from a checkpoint",
            )
            for slot in slots
            if not is_lazy(slot.tensor) and slot.tensor.is_meta
        ]
        if problems:
            raise PlanError(f"{self.name} cannot be materialised; nothing was changed", problems)

    def _peek(self) -> Subject:
        subject = self._subject  # read once: another thread may use it up at any moment
        if subject is None:
            raise RuntimeError(f"this {self.name} has been loaded or materialised already")
        return subject

    def _take(self) -> Subject:
        with self._alone:
            subject = self._peek()
            self._subject = None
            return subject


@dataclass(frozen=True, slots=True)
class Opening:
    """What a plan begins with: the checkpoint, the options that all ranks share, the ranks, the trace."""

    checkpoint: Checkpoint
    options: LoadOptions
    together: Together
    trace: Trace | None


@contextlib.contextmanager
def opened(ckpt: CheckpointSource, options: LoadOptions, *, seed: int | None, **hub: Any) -> Iterator[Opening]:
    """Around the making of one plan. ``seed`` is the user's; where that is None, ranks share the first one's.

    ``hub`` is what `open_checkpoint` takes for a hub id. An error of one rank becomes one of all.
    """
    trace, together = None if options.trace is None else Trace(), Together(options)
    with together.planning():
        options = together.seeded(seed)
        with timed(trace, "open", "headers"):
            checkpoint = together.open(lambda: open_checkpoint(ckpt, **hub))
        yield Opening(checkpoint, options, together, trace)


def planned(subject: Subject, opening: Opening, *, take: Callable[[], Subject] | None = None) -> LoadPlan:
    """The plan of filling ``subject``."""
    checkpoint, options, trace = opening.checkpoint, opening.options, opening.trace
    refuse_flat(subject.inventory)
    given = Given.of(subject.inventory.module) if subject.existing else None
    with Undisturbed(), timed(trace, "plan", "headers against names"):
        load = decide(subject, checkpoint, options)
    digests = digests_of(checkpoint.files, checkpoint.index) if options.verify else {}
    load = replace(load, source=replace(load.source, digests=digests), trace=trace)
    together = opening.together if opening.together.settle(load.decisions, load.subject) else None
    return LoadPlan(load, take=take, together=together, given=given)


def _log_outcome(decisions: Decisions, options: LoadOptions) -> None:
    """One record a load: INFO, or a warning that names what did not match. Of ties `settled` has told."""
    summary = report(decisions)
    warning = summary.warning()
    remedy = find(decisions.rows, decisions.unexpected, {}, options.key_mapping) if warning else None
    if remedy is not None:
        warning = f"{remedy}: {remedy.hint(options.key_mapping)}; {warning}"
    _log.log(
        logging.WARNING if warning else logging.INFO,
        "%s into %s: %s", decisions.source, decisions.module, warning or summary.headline(),
    )  # fmt: skip
