"""When a sign becomes an alert, and when a company is silent: over values alone, hours and weeks in no time."""

from __future__ import annotations

from app.alerts import HOUR, Heard, Sign, judge, of
from app.snapshot import AlertState

MINUTE = 60_000
DAY = 24 * HOUR
NOW = 498_600 * HOUR + 40 * MINUTE
"""Twenty to an hour."""


class Minutes:
    """Looks once a minute, and notes what is told."""

    def __init__(self) -> None:
        self.states: dict[str, AlertState] = {}
        self.now = NOW

    def look(self, *signs: Sign, after: int = MINUTE) -> list[str]:
        self.now += after
        self.states, changes = judge(signs, self.states, self.now)
        return [change.what for change in changes]


def on(name: str, is_on: bool = True) -> Sign:
    return Sign(name=name, company="museum", is_on=is_on)


def rose(count: int) -> Sign:
    return Sign(name="dead_letters", company="museum", count=count)


def hours_of(weeks: int, a_week: dict[int, int]) -> dict[int, int]:
    """Return the same week some times over, before this hour: hours ago -> events."""
    this = NOW // HOUR
    return {this - week * 168 - ago: count for week in range(1, weeks + 1) for ago, count in a_week.items()}


def heard(hours: dict[int, int] | None = None, last: int = 0, missed: int = 0, unsettled_since: int = 0) -> Heard:
    return Heard(last=last, missed=missed, unsettled_since=unsettled_since, hours=hours or {})


def test_an_alert_is_told_once_at_its_onset_and_once_at_its_end() -> None:
    look = Minutes().look

    told = [look(on("fetch_late", state)) for state in (False, True, True, True, False, False, True)]

    assert told == [[], ["raised"], [], [], ["cleared"], [], ["raised"]]


def test_a_sign_must_last_before_it_is_an_alert_and_a_short_one_is_none() -> None:
    minutes = Minutes()

    assert [minutes.look(on("breaker_open")) for _ in range(7)] == [[], [], [], [], [], ["raised"], []]
    assert minutes.look(on("breaker_open", False)) == ["cleared"]
    assert [minutes.look(on("breaker_open", state)) for state in (True, True, False, True, True)] == [[]] * 5


def test_the_old_secret_is_an_alert_after_a_week_and_ends_a_day_after_its_last_use() -> None:
    minutes = Minutes()

    days = [minutes.look(on("previous_secret"), after=DAY) for _ in range(8)]
    assert days == [[]] * 7 + [["raised"]]
    assert minutes.look(on("previous_secret", False), after=DAY - 1) == []
    assert minutes.look(on("previous_secret", False), after=1) == ["cleared"]


def test_a_counter_is_an_alert_when_it_rises_and_until_it_has_rested_for_an_hour() -> None:
    """What was counted before anybody looked is no news."""
    minutes = Minutes()

    assert [minutes.look(rose(count)) for count in (7, 7, 8, 8, 9)] == [[], [], ["raised"], [], []]
    assert minutes.look(rose(9), after=HOUR - 1) == []
    assert minutes.look(rose(9), after=1) == ["cleared"]


def test_a_flushed_redis_raises_nothing_by_its_lower_counts() -> None:
    minutes = Minutes()
    minutes.look(rose(500))

    assert [minutes.look(rose(count)) for count in (2, 2, 3)] == [[], [], ["raised"]]
    minutes.states = {}
    assert minutes.look(rose(40)) == []


def test_silence_is_told_again_every_hour() -> None:
    minutes = Minutes()

    told = [minutes.look(on("silence")) for _ in range(121)]

    assert [number for number, one in enumerate(told) if one] == [0, 60, 120]
    assert told[0] + told[60] + told[120] == ["raised", "again", "again"]


def test_the_alert_of_a_company_that_is_settled_no_more_ends() -> None:
    minutes = Minutes()
    minutes.look(on("fetch_late"))

    assert minutes.look() == ["cleared"]
    assert minutes.states == {}


def test_a_clock_that_was_ahead_does_not_hold_an_alert_back() -> None:
    """Its moments lie in the future once it is right again."""
    minutes = Minutes()
    minutes.look(on("silence"), after=10 * DAY)
    minutes.now = NOW

    assert [minutes.look(on("silence"), after=30 * MINUTE) for _ in range(3)] == [[], [], ["again"]]


def test_a_company_is_silent_when_nothing_comes_at_a_time_at_which_much_usually_does() -> None:
    """Twenty events an hour, four weeks long: forty quiet minutes are too many."""
    hours = hours_of(4, dict.fromkeys(range(24), 20))

    found = of(heard(hours, last=NOW - 40 * MINUTE), NOW)

    assert found is not None
    assert (found.reason, found.quiet) == ("usual", 40 * MINUTE)
    assert 13 <= (found.usual or 0) <= 14
    assert of(heard(hours, last=NOW - 29 * MINUTE), NOW) is None


def test_a_quiet_night_is_none_and_the_morning_after_it_is() -> None:
    """Events usually come from two hours ago on; before, never."""
    hours = hours_of(4, dict.fromkeys(range(2, 30), 0) | {0: 6, 1: 6})
    night = NOW - 2 * HOUR

    assert of(heard(hours, last=night - 9 * HOUR), night) is None
    assert of(heard(hours, last=night - 9 * HOUR), NOW) is not None


def test_few_events_a_day_make_no_alert() -> None:
    assert of(heard(hours_of(4, {3: 2, 9: 2}), last=NOW - 3 * DAY), NOW) is None


def test_one_odd_week_neither_hides_a_silence_nor_makes_one() -> None:
    busy = dict.fromkeys(range(24), 20)
    week_ago = dict.fromkeys(hours_of(1, busy), 0)

    hidden = hours_of(4, busy) | week_ago
    assert of(heard(hidden, last=NOW - HOUR), NOW) is not None

    only_once = dict.fromkeys(hours_of(4, busy), 0) | hours_of(1, busy)
    assert of(heard(only_once, last=NOW - HOUR), NOW) is None


def test_nobody_is_missed_before_two_weeks_are_known() -> None:
    busy = dict.fromkeys(range(48), 20)

    assert of(heard(hours_of(1, busy), last=NOW - HOUR), NOW) is None
    assert of(heard(hours_of(2, busy), last=NOW - HOUR), NOW) is not None


def test_a_company_that_was_never_heard_is_silent_only_by_what_its_list_shows() -> None:
    assert of(heard(), NOW) is None
    found = of(heard(unsettled_since=NOW - 11 * MINUTE), NOW)
    assert found is not None
    assert (found.reason, found.quiet) == ("open_orders", 0)


def test_an_open_order_tells_of_silence_when_no_event_came_since_it_was_seen() -> None:
    """It settles about a minute after it was made; one that hangs while others are told of is no silence."""
    seen = NOW - 10 * MINUTE

    assert of(heard(last=seen - 1, unsettled_since=seen), NOW) is not None
    assert of(heard(last=seen + 1, unsettled_since=seen), NOW) is None
    assert of(heard(last=seen - 1, unsettled_since=seen + 1), NOW) is None


def test_settled_orders_of_which_no_event_told_are_silence_until_one_comes() -> None:
    assert of(heard(last=NOW - HOUR, missed=NOW - MINUTE), NOW) is not None
    assert of(heard(missed=NOW - MINUTE), NOW) is not None
    assert of(heard(last=NOW - 30_000, missed=NOW - MINUTE), NOW) is None
    assert of(heard(last=NOW - 20 * MINUTE, missed=NOW - MINUTE), NOW) is None
    assert of(heard(last=NOW - 9 * HOUR, missed=NOW - 2 * HOUR), NOW) is None


def test_a_silence_longer_than_a_day_stays_an_alert() -> None:
    hours = hours_of(4, {ago: 20 for ago in range(24) if ago % 24 in range(8, 16)})

    assert all(of(heard(hours, last=NOW - 2 * DAY), NOW + ago * HOUR) for ago in range(8))


def test_a_moment_in_the_future_is_now() -> None:
    hours = hours_of(4, dict.fromkeys(range(24), 20))

    assert of(heard(hours, last=NOW + DAY), NOW) is None
