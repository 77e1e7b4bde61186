"""Looks at the alarms once a minute, in one pool of all, and tells of each in the log."""

from __future__ import annotations

import time
from typing import Final

from redis import Redis
from redis.exceptions import RedisError

from app import bootstrap, log
from app.alarms import onset, signs
from app.alarms.onset import Change
from app.settings import Settings
from app.store.vitals import Vitals, VitalSigns
from app.store.watch import Watch

EVERY: Final = 5.0
"""Seconds between two questions whether it is our minute: a pool that dies is followed so soon."""

RUNBOOK: Final = "docs/operations.md#"

_log = log.get()


class Watchman:
    """Part of each pool; `tick` is called each second. Told before it is kept: killed in between, it is told twice."""

    def __init__(self, settings: Settings, redis: Redis) -> None:
        self._signs = bootstrap.vital_signs(settings)
        self._watch = Watch(redis)
        self._redis = redis
        self._next = 0.0

    def tick(self) -> None:
        """Look if it is time; raises what Redis raises."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + EVERY
        if not self._watch.take_turn():
            return
        try:
            look(self._watch, self._signs, self._signs.read(self._redis, bootstrap.clock()))
        except (RedisError, OSError):
            raise
        except Exception as error:
            # Whatever stands there that we cannot read: orders are fetched all the same.
            _log.error("alarm.failed", error=type(error).__name__, trace=log.trace_of(error))


def look(watch: Watch, vital_signs: VitalSigns, vitals: Vitals) -> list[Change]:
    """Compare what is seen with what is known, tell of the changes, and keep what is known from now on."""
    states = watch.states()
    seen = signs.Seen(
        vitals,
        watch.totals(),
        {one.company_id: watch.hours(one.company_id, vitals.now) for one in vital_signs.subjects},
        states,
    )
    after, changes = onset.judge(signs.read(seen, vital_signs.subjects), states, vitals.now)
    for change in changes:
        _tell(change, vitals.now)
    watch.save(after)
    return changes


def _tell(change: Change, now: int) -> None:
    sign = change.sign
    about = {"name": sign.name, "company": sign.company or None, "sink": sign.sink or None}
    runbook = f"{RUNBOOK}{sign.name.replace('_', '-')}"
    if change.what == "cleared":
        _log.info("alarm.cleared", lasted_s=round((now - change.since) / 1000), **about)
    elif sign.name == "silence":
        _log.warning(
            "alarm.silence",
            company=sign.company,
            reason=sign.reason,
            quiet_s=sign.figure,
            usual=None if sign.usual is None else round(sign.usual),
            runbook=runbook,
        )
    else:
        _log.error("alarm.raised", figure=sign.figure, runbook=runbook, **about)
