"""When a condition becomes an alert, and when a company is silent: over values alone, so weeks take no time."""

from __future__ import annotations

from app.alerts import HOUR, Condition, Key, evaluate, silence
from app.snapshot import AlertState, CompanySnapshot

MINUTE = 60_000
DAY = 24 * HOUR
NOW = 498_600 * HOUR + 40 * MINUTE
"""Twenty minutes to the hour."""


class Minutes:
    """Evaluates once a minute and returns what would be logged."""

    def __init__(self) -> None:
        self.states: dict[Key, AlertState] = {}
        self.now = NOW

    def evaluate(self, *conditions: Condition, after: int = MINUTE) -> list[str]:
        self.now += after
        self.states, changes = evaluate(conditions, self.states, self.now)
        return [change.action for change in changes]


def on(name: str, is_true: bool = True) -> Condition:
    return Condition(name=name, company="museum", is_true=is_true)


def counted(count: int, left_at: int | None = None) -> Condition:
    return Condition(name="dead_letters", company="museum", count=count, left_at=left_at)


def hours_of(weeks: int, a_week: dict[int, int]) -> dict[int, int]:
    """Return the same week several times, before this hour: hours ago -> events."""
    this = NOW // HOUR
    return {this - week * 168 - ago: count for week in range(1, weeks + 1) for ago, count in a_week.items()}


def silent(
    hours: dict[int, int] | None = None, *, last: int = 0, missed: int = 0, unsettled: int = 0, now: int = NOW
) -> Condition:
    found = CompanySnapshot(
        "museum", 0, 0, 0, "", 0, last, previous_secret_at=0, unsettled=1, unsettled_since=unsettled
    )
    return silence("museum", found, now, missed, hours or {})


def is_silent(hours: dict[int, int] | None = None, **times: int) -> bool:
    return silent(hours, **times).is_true


def test_an_alert_is_logged_once_when_it_fires_and_once_when_it_is_resolved() -> None:
    minutes = Minutes()

    actions = [minutes.evaluate(on("fetch_late", state)) for state in (False, True, True, True, False, False, True)]

    assert actions == [[], ["firing"], [], [], ["resolved"], [], ["firing"]]


def test_a_clock_that_was_ahead_does_not_hold_an_alert_back() -> None:
    """Once it is right again, the times that it wrote lie in the future."""
    minutes = Minutes()
    minutes.evaluate(on("silence"), after=10 * DAY)
    minutes.now = NOW

    assert [minutes.evaluate(on("silence"), after=30 * MINUTE) for _ in range(3)] == [[], [], ["repeated"]]


def test_a_condition_must_last_before_the_alert_fires() -> None:
    minutes = Minutes()

    assert [minutes.evaluate(on("pools_differ")) for _ in range(12)] == [[]] * 10 + [["firing"], []]
    assert minutes.evaluate(on("pools_differ", False)) == ["resolved"]
    assert [minutes.evaluate(on("pools_differ", state)) for state in (True, True, False, True, True)] == [[]] * 5


def test_the_previous_secret_fires_after_a_week_and_resolves_a_day_after_its_last_use() -> None:
    minutes = Minutes()

    assert [minutes.evaluate(on("previous_secret"), after=DAY) for _ in range(8)] == [[]] * 7 + [["firing"]]
    assert minutes.evaluate(on("previous_secret", False), after=DAY - 1) == []
    assert minutes.evaluate(on("previous_secret", False), after=1) == ["resolved"]


def test_a_counter_fires_when_it_rises_and_resolves_after_an_hour_without_a_rise() -> None:
    """What was counted before the first evaluation is not news."""
    minutes = Minutes()

    assert [minutes.evaluate(counted(count)) for count in (7, 7, 8, 8, 9)] == [[], [], ["firing"], [], []]
    assert minutes.evaluate(counted(9), after=HOUR - 1) == []
    assert minutes.evaluate(counted(9), after=1) == ["resolved"]


def test_an_alert_ends_once_nothing_stands_that_came_up_since_it_began() -> None:
    """What stood before it began is of no account. Where nothing is known, the hour counts."""
    minutes = Minutes()
    minutes.evaluate(counted(7))
    assert minutes.evaluate(counted(9, left_at=minutes.now + 1)) == ["firing"]
    assert minutes.states["dead_letters", "museum", ""].risen == 2

    began = minutes.now
    assert [minutes.evaluate(counted(9, left_at=at)) for at in (began - 1, None)] == [[], []]
    assert minutes.evaluate(counted(9, left_at=began - HOUR)) == ["resolved"]
    assert minutes.evaluate(counted(10, left_at=0)) == ["firing"], "it rose, whatever has become of it"
    assert minutes.evaluate(counted(10, left_at=0)) == ["resolved"]


def test_a_counter_that_a_flush_made_lower_does_not_fire() -> None:
    minutes = Minutes()
    minutes.evaluate(counted(500))

    assert [minutes.evaluate(counted(count)) for count in (2, 2, 3)] == [[], [], ["firing"]]
    minutes.states = {}
    assert minutes.evaluate(counted(40)) == []


def test_silence_is_logged_again_each_hour() -> None:
    minutes = Minutes()

    actions = {number: minutes.evaluate(on("silence")) for number in range(121)}

    assert {number for number, one in actions.items() if one} == {0, 60, 120}
    assert (actions[0], actions[60], actions[120]) == (["firing"], ["repeated"], ["repeated"])


def test_the_alert_of_a_company_that_left_the_settings_is_resolved() -> None:
    minutes = Minutes()
    minutes.evaluate(on("fetch_late"))

    assert minutes.evaluate() == ["resolved"]
    assert minutes.states == {}


def test_a_company_is_silent_when_usually_many_events_come_at_this_time() -> None:
    """Twenty events an hour, four weeks long: forty quiet minutes are too many."""
    hours = hours_of(4, dict.fromkeys(range(24), 20))

    found = silent(hours, last=NOW - 40 * MINUTE)

    assert (found.is_true, found.reason, found.figure) == (True, "usual", 40 * 60)
    assert 13 <= (found.usual or 0) <= 14
    assert not is_silent(hours, last=NOW - 29 * MINUTE)


def test_a_quiet_night_is_normal_and_the_morning_after_it_is_not() -> None:
    """Events usually come from two hours ago on, and never before."""
    hours = hours_of(4, dict.fromkeys(range(2, 30), 0) | {0: 6, 1: 6})
    night = NOW - 2 * HOUR

    assert not is_silent(hours, last=night - 9 * HOUR, now=night)
    assert is_silent(hours, last=night - 9 * HOUR)


def test_one_odd_week_neither_hides_a_silence_nor_causes_one() -> None:
    busy = dict.fromkeys(range(24), 20)

    assert is_silent(hours_of(4, busy) | dict.fromkeys(hours_of(1, busy), 0), last=NOW - HOUR)
    assert not is_silent(dict.fromkeys(hours_of(4, busy), 0) | hours_of(1, busy), last=NOW - HOUR)


def test_two_weeks_with_many_events_must_be_known() -> None:
    assert [is_silent(hours_of(weeks, dict.fromkeys(range(48), 20)), last=NOW - HOUR) for weeks in (1, 2)] == [
        False,
        True,
    ]
    assert not is_silent(hours_of(4, {3: 2, 9: 2}), last=NOW - 3 * DAY)


def test_a_silence_longer_than_a_day_keeps_firing() -> None:
    hours = hours_of(4, {ago: 20 for ago in range(24) if ago % 24 in range(8, 16)})

    assert all(is_silent(hours, last=NOW - 2 * DAY, now=NOW + ago * HOUR) for ago in range(8))


def test_a_company_that_never_sent_is_silent_only_by_its_order_list() -> None:
    assert not is_silent()
    found = silent(unsettled=NOW - 11 * MINUTE)
    assert (found.is_true, found.reason, found.figure) == (True, "open_orders", 0)


def test_an_unsettled_order_means_silence_if_no_event_came_since_it_was_seen() -> None:
    """It settles about a minute after it was made. If it hangs while other events come, the sender works."""
    seen = NOW - 10 * MINUTE

    assert is_silent(last=seen - 1, unsettled=seen)
    assert not is_silent(last=seen + 1, unsettled=seen)
    assert not is_silent(last=seen - 1, unsettled=seen + 1)


def test_missed_events_mean_silence_until_an_event_comes() -> None:
    missed = NOW - MINUTE

    assert is_silent(last=NOW - HOUR, missed=missed)
    assert is_silent(missed=missed), "it never sent"
    assert not is_silent(last=NOW - MINUTE // 2, missed=missed), "an event came since"
    assert not is_silent(last=NOW - 20 * MINUTE, missed=missed), "an event came of late"
    assert not is_silent(last=NOW - 9 * HOUR, missed=NOW - 2 * HOUR), "they were missed long ago"
