"""Prometheus metrics (extra ``metrics``): `register` a manager, and the application's own exposition shows it.

A scrape reads what is on the host already, from whatever thread it comes, and never asks the device. The device's
counters are those of the newest snapshot, which the stats line or the health check takes; turn both off, and they stay
at 0.

Where several processes share one exposition (PROMETHEUS_MULTIPROC_DIR), prometheus_client serves files that each
process writes, and asks no collector. There `register` makes real counters and gauges, and an observer brings them up
to date at the end of a step: now and then, and of one in which something was found, or the health changed.
"""

from __future__ import annotations

import atexit
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from kvcanary.errors import ConfigError, PhaseError
from kvcanary.observers.facts import StepFacts
from kvcanary.observers.health import Health, KernelRunCounterHealthChecker
from kvcanary.observers.metric_families import FAMILIES, Family, Reading, read_manager

_OWN_LABELS = {label for family in FAMILIES for label in family.labels}
_LABEL = re.compile(r"[a-zA-Z][a-zA-Z0-9_]*")
_collectors: weakref.WeakKeyDictionary[Any, CanaryCollector] = weakref.WeakKeyDictionary()
_instruments: dict[tuple[str, ...], dict[str, Any]] = {}


def register(
    manager: Any, registry: Any = None, *, every_n_steps: int = 100, **labels: str
) -> CanaryCollector | ProcessMetrics:
    """Show a manager's metrics, as long as somebody holds it; a closed one goes when its labels are given anew.

    Registered anew, a manager has its new labels instead of the old ones; where several processes share an exposition,
    register it once.

    Args:
        registry: of prometheus_client; None = its default one. Not used where several processes share an exposition.
        every_n_steps: there, steps between two updates; the step that reports a violation or another health makes one
            too, and so do `CanaryManager.close` and the end of the process.
        labels: the same for all its metrics, to tell several managers apart: ``rank="0"``. All managers of a registry
            have the same label names. Values from a small set: never an id of a slot or request.

    Raises:
        ConfigError: prometheus_client is missing, this is no manager, or labels that cannot be.
    """
    client = _client()
    _check_manager(manager)
    _check_labels(labels)
    if client.values.ValueClass is not client.values.MutexValue:
        metrics = ProcessMetrics(manager, labels, every_n_steps)
        manager.add_observer(metrics)
        return metrics
    registry = client.REGISTRY if registry is None else registry
    collector = _collectors.get(registry)
    if collector is None:
        collector = CanaryCollector()
        collector.add(manager, labels)
        registry.register(collector)
        _collectors[registry] = collector
    else:
        collector.add(manager, labels)
    return collector


class CanaryCollector:
    """A collector of prometheus_client over one or more managers; it does not keep them alive."""

    def __init__(self) -> None:
        self._managers: dict[tuple[str, ...], weakref.ref[Any]] = {}
        self._names: tuple[str, ...] = ()

    def add(self, manager: Any, labels: Mapping[str, str]) -> None:
        """One more manager, or one that gets other labels; it may have those of one that was dropped or closed."""
        names, values = tuple(sorted(labels)), tuple(str(labels[name]) for name in sorted(labels))
        held = {key: ref for key, ref in self._managers.items() if ref() is not None and ref() is not manager}
        living = {key: ref for key, ref in held.items() if not _is_over(ref())}
        if living and not self._names:  # it is one, as there are no labels to tell several apart
            raise ConfigError(
                f"labels {dict(labels)}: another manager is registered without labels, and all need labels of the same "
                "names to be told apart: register that one anew with some, register(other, rank='0') say, then this "
                "one, register(manager, rank='1'); or close the other"
            )
        if living and names != self._names:
            raise ConfigError(
                f"labels {dict(labels)}: the managers before it have the names {list(self._names)}; give this one the "
                "same names, with values of its own"
            )
        if values in living:
            taken = [list(of_one) for of_one in sorted(living)]
            raise ConfigError(
                f"labels {dict(labels)}: another manager has them; give this one other values of {list(names)} than "
                f"{taken}, or close the other"
            )
        kept = held if names == self._names else living  # closed ones are shown, as far as the names allow
        self._names, self._managers = names, {**kept, values: weakref.ref(manager)}

    def describe(self) -> Iterator[Any]:
        """The families without samples, so that the registry knows their names."""
        for family in FAMILIES:
            yield self._family(family)

    def collect(self) -> Iterator[Any]:
        """The families with the samples of all managers."""
        readings = [(values, _read(ref())) for values, ref in self._managers.items()]
        for family in FAMILIES:
            found = self._family(family)
            for values, reading in readings:
                for own, value in family.read(reading) if reading is not None else ():
                    found.add_metric([*values, *own], float(value))
            yield found

    def _family(self, family: Family) -> Any:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        kind = CounterMetricFamily if family.is_counter else GaugeMetricFamily
        return kind(family.name, family.help, labels=[*self._names, *family.labels])


class ProcessMetrics:
    """A manager's metrics as counters and gauges of this process; an observer of the manager.

    Counters of all processes are added up, gauges as their `Family.mode` says, unless labels tell them apart. So that a
    process that has ended no longer counts, the application calls ``prometheus_client.multiprocess.mark_process_dead``.
    """

    def __init__(self, manager: Any, labels: Mapping[str, str], every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ConfigError(f"every_n_steps={every_n_steps}: give at least 1")
        names = tuple(sorted(labels))
        self._manager = weakref.ref(manager)
        self._values = tuple(str(labels[name]) for name in names)
        self._every = every_n_steps
        self._has_news = False
        self._checker: KernelRunCounterHealthChecker | None = manager._health if manager.is_on else None
        self._health, self._n_reports = Health.OFF, 0  # as shown
        self._is_over = False
        self._counted: dict[tuple[str, tuple[str, ...]], float] = {}
        self._series: dict[tuple[str, tuple[str, ...]], Any] = {}
        if names not in _instruments:
            _instruments[names] = _make_instruments(names)
        self._instruments = _instruments[names]
        manager.on_violation(self._note)
        manager._call_at_close(self._end)
        self.update()
        atexit.register(_update_at_exit, weakref.ref(self))

    def is_due(self, step: int) -> bool:
        """Whether `step` has anything to do."""
        return self._has_news or step % self._every == 0 or self._has_other_health()

    def step(self, facts: StepFacts) -> None:
        """Bring the metrics up to date."""
        self.update()

    def update(self) -> None:
        """Bring the metrics up to date now; after the manager was closed, they stay as they are."""
        if self._is_over:  # the manager after it may have its labels
            return
        self._has_news = False
        if self._checker is not None:
            self._health, self._n_reports = self._checker.health, self._checker.n_reports
        reading = _read(self._manager())
        if reading is None:
            return
        for family in FAMILIES:
            for own, value in family.read(reading):
                self._set(family, own, float(value))

    def _note(self, _violation: Any) -> None:
        self._has_news = True

    def _has_other_health(self) -> bool:
        checker = self._checker
        return checker is not None and (checker.health is not self._health or checker.n_reports != self._n_reports)

    def _end(self) -> None:
        self.update()
        self._is_over = True

    def _set(self, family: Family, own: tuple[str, ...], value: float) -> None:
        key = (family.name, own)
        series = self._series.get(key)
        if series is None:
            values, instrument = (*self._values, *own), self._instruments[family.name]
            series = self._series[key] = instrument.labels(*values) if values else instrument
        if not family.is_counter:
            series.set(value)
            return
        before = self._counted.get(key, 0.0)
        if value > before:  # a counter that fell was overwritten: the health check says so, here it stays
            series.inc(value - before)
            self._counted[key] = value


def _make_instruments(names: tuple[str, ...]) -> dict[str, Any]:
    client = _client()
    found: dict[str, Any] = {}
    for family in FAMILIES:
        labels = [*names, *family.labels]
        # In no registry: the files are what is served, and both together would show everything twice.
        if family.is_counter:
            found[family.name] = client.Counter(family.name, family.help, labels, registry=None)
        else:
            mode: Any = family.mode
            found[family.name] = client.Gauge(family.name, family.help, labels, registry=None, multiprocess_mode=mode)
    return found


def _update_at_exit(ref: weakref.ref[ProcessMetrics]) -> None:
    metrics = ref()
    if metrics is not None:
        with suppress(Exception):  # the folder may be gone by now
            metrics.update()


def _read(manager: Any) -> Reading | None:
    try:
        return None if manager is None else read_manager(manager)
    except PhaseError:  # it is of the process that this one was forked from, which shows it
        return None


def _is_over(manager: Any) -> bool:
    """Whether it was closed, or is of the process that this one was forked from."""
    try:
        return manager is None or (manager.is_on and not manager.stats().is_on)
    except PhaseError:
        return True


def _check_manager(manager: Any) -> None:
    from kvcanary.manager import CanaryManager

    if not isinstance(manager, CanaryManager):
        raise ConfigError(f"register({manager!r}): give the CanaryManager whose metrics are to be shown")


def _check_labels(labels: Mapping[str, str]) -> None:
    for name in labels:
        if not _LABEL.fullmatch(name) or name in _OWN_LABELS:
            raise ConfigError(
                f"label {name!r}: give letters, digits and _, and none of {', '.join(sorted(_OWN_LABELS))}"
            )


def _client() -> Any:
    try:
        import prometheus_client
        import prometheus_client.values
    except ImportError as error:
        raise ConfigError('there is no package prometheus_client: pip install "kvcanary[metrics]"') from error
    return prometheus_client
