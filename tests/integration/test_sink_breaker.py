"""A sink whose destination is away, or wants nothing more: its deliveries wait, and use no attempt."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from app.deployment import Deployment
from app.dev.sandbox.process import Sandbox
from app.ledger import policy
from app.ledger.rq_jobs import sink_queue
from app.ledger.work import DeliveryOutcome
from tests.lab import KEYS, SINK, Lab, order
from tests.lab_upstream import Shop, worker_lab
from workers.sinks.contract import Disable, Failed, Unavailable

FIRST = policy.BREAKER_FIRST / 1000
MANY = 12


@pytest.fixture
def shop(shop: Lab) -> Lab:
    """Orders 0 to 11 wait for their delivery, and no job of them is queued."""
    for number in range(MANY):
        shop.accept_and_fetch(order(number), number)
    shop.clear_queues()
    shop.later(policy.GRACE / 1000)
    return shop


def away(lab: Lab, number: int, *, worker: str = "w") -> None:
    """Let an attempt find that the destination is away."""
    lab.deliver("retry", order(number), worker=worker, reason="HTTP 503", unavailable=True)


def opened(lab: Lab) -> Lab:
    for number in range(policy.BREAKER_FAILURES):
        away(lab, number)
    return lab


def is_open(lab: Lab) -> bool:
    return lab.redis.hget(KEYS.sink_breaker("shop"), "open_until") is not None


def attempts(lab: Lab, number: int) -> str | None:
    return lab.field("shop:attempts", order(number))


class TestBreaker:
    def test_it_opens_after_five_attempts_in_a_row_and_nothing_uses_an_attempt_while_it_is_open(
        self, shop: Lab
    ) -> None:
        for number in range(policy.BREAKER_FAILURES):
            assert not is_open(shop)
            away(shop, number)
        assert is_open(shop)

        assert shop.acquire_delivery(order(7)) is None
        shop.later(FIRST - 1)

        assert (shop.acquire_delivery(order(8)), attempts(shop, 7), attempts(shop, 8)) == (None, None, None)
        assert (shop.dispatch(), shop.pending()) == (0, MANY)

    @pytest.mark.parametrize("outcome", ["succeeded", "retry", "rejected", "postponed", "dead"])
    def test_an_attempt_that_its_destination_answered_ends_the_row(self, shop: Lab, outcome: DeliveryOutcome) -> None:
        for number in range(policy.BREAKER_FAILURES - 1):
            away(shop, number)
        shop.deliver(outcome, order(9))

        away(shop, 10)

        assert not is_open(shop)

    @pytest.mark.parametrize(
        ("outcome", "reason"), [("skipped", ""), ("dead", "kills_worker"), ("retry", "unreadable_answer")]
    )
    def test_a_delivery_that_did_not_call_the_sink_shows_nothing(
        self, shop: Lab, outcome: DeliveryOutcome, reason: str
    ) -> None:
        for number in range(policy.BREAKER_FAILURES - 1):
            away(shop, number)
        shop.deliver(outcome, order(9), reason=reason)

        away(shop, 10)

        assert is_open(shop)

    def test_a_repeated_complete_counts_once(self, shop: Lab) -> None:
        for number in range(policy.BREAKER_FAILURES - 1):
            delivery = shop.start_delivery(order(number))
            for _ in range(2):
                shop.complete_delivery(delivery, "retry", order(number), unavailable=True)

        assert not is_open(shop)

    def test_one_probe_at_a_time_and_a_success_lets_all_go_on(self, shop: Lab) -> None:
        opened(shop).later(FIRST)

        assert (shop.dispatch(), len(shop.jobs(sink_queue("shop")))) == (1, 1)
        probe = shop.start_delivery(order(5), "a")
        assert (shop.acquire_delivery(order(6), "b"), attempts(shop, 6), shop.dispatch()) == (None, None, 0)
        shop.complete_delivery(probe, order=order(5), worker="a")

        assert not is_open(shop)
        assert shop.dispatch() == MANY - 1, "also those whose attempt failed: their wait of 5 s is over"

    def test_a_probe_that_fails_doubles_the_pause_up_to_five_minutes(self, shop: Lab) -> None:
        opened(shop)
        pauses = []
        for number in range(6):
            pause = int(shop.redis.hget(KEYS.sink_breaker("shop"), "open_ms") or 0) / 1000
            pauses.append(pause)
            shop.later(pause)
            away(shop, 5 + number)

        assert pauses == [15, 30, 60, 120, 240, 300]

    @pytest.mark.parametrize("waited", [0.0, 6.0])
    def test_a_requeue_by_hand_makes_the_probe_now_and_its_success_lets_all_go_on(
        self, shop: Lab, waited: float
    ) -> None:
        """Also where only the breaker still holds the delivery: after six seconds its own wait is over."""
        opened(shop).later(waited)
        assert shop.dispatch() == 0

        requeued = [shop.ledger.retry_delivery(order(number), "shop") for number in range(policy.BREAKER_FAILURES)]

        assert requeued == [True] * policy.BREAKER_FAILURES
        assert shop.dispatch() == 1, "still one at a time: the cause may not be gone"
        shop.deliver("succeeded", order(1))
        assert (is_open(shop), shop.dispatch()) == (False, MANY - 2)

    def test_a_requeue_of_what_has_not_failed_makes_no_probe(self, shop: Lab) -> None:
        assert not opened(shop).ledger.retry_delivery(order(9), "shop")

        assert shop.dispatch() == 0

    def test_attempts_that_began_before_it_opened_open_it_no_further(self, shop: Lab) -> None:
        late = [shop.start_delivery(order(number), f"w{number}") for number in (10, 11)]
        opened(shop)

        for number, delivery in zip((10, 11), late, strict=True):
            shop.complete_delivery(delivery, "retry", order(number), worker=f"w{number}", unavailable=True)

        assert shop.redis.hget(KEYS.sink_breaker("shop"), "open_ms") == b"15000"

    @pytest.mark.parametrize("noticed", [True, False])
    def test_the_death_of_the_probes_worker_lets_another_one_probe(self, shop: Lab, noticed: bool) -> None:
        opened(shop).later(FIRST)
        shop.start_delivery(order(5), "killed")
        if noticed:
            shop.ledger.release_worker("killed", "killed")
        else:
            shop.later(policy.DELIVERY_LEASE / 1000)

        assert shop.start_delivery(order(6), "b").attempts == 1

    def test_a_clock_that_was_ahead_holds_nothing_back(self, shop: Lab) -> None:
        shop.later(policy.DAY / 1000)
        opened(shop).later(FIRST)
        shop.start_delivery(order(5), "killed")
        shop.later(-policy.DAY / 1000)

        assert shop.start_delivery(order(6), "b").attempts == 1

    def test_a_probe_that_fails_after_a_clock_was_ahead_opens_it_again(self, shop: Lab) -> None:
        shop.later(policy.DAY / 1000)
        opened(shop).later(-policy.DAY / 1000)

        away(shop, 6)

        assert (shop.acquire_delivery(order(7)), attempts(shop, 7)) == (None, None)

    def test_a_broken_key_of_it_stops_no_delivery(self, shop: Lab) -> None:
        for key in (KEYS.sink_breaker("shop"), KEYS.sinks_disabled):
            shop.overwrite(key, b"of another program")

        away(shop, 1)
        shop.deliver("disabled", order(2), reason="HTTP 410")
        shop.deliver(order=order(3))

        assert shop.field("shop:revision", order(3)) == "1"

    def test_another_sink_goes_on(self, shop: Lab) -> None:
        both = Lab(opened(shop).redis, sinks=("shop", "mail"), now=shop.now)
        both.accept_and_fetch(order(1), 99)

        assert (both.acquire_delivery(order(1)), both.deliver(order=order(1), sink="mail").revision) == (None, 2)


class TestDisabled:
    def test_nothing_is_delivered_and_no_attempt_is_used_until_it_is_enabled_then_all_is_due_at_once(
        self, shop: Lab
    ) -> None:
        shop.now = None
        deployment = Deployment(shop.redis)
        shop.deliver("retry", order(1), wait=7200)
        shop.deliver("disabled", order(2), reason="HTTP 410")
        shop.accept_and_fetch(order(MANY), 1)

        assert attempts(shop, 2) == "0"
        assert (shop.acquire_delivery(order(3)), attempts(shop, 3), shop.dispatch()) == (None, None, 0)
        assert shop.pending() == MANY + 1

        assert (deployment.enable("shop"), deployment.enable("shop")) == (True, False)
        assert shop.dispatch() == MANY + 1
        assert shop.start_delivery(order(1)).attempts == 2
        assert shop.start_delivery(order(2), "b").attempts == 1

    def test_an_operator_may_disable_it_and_the_first_reason_stays(self, shop: Lab) -> None:
        deployment = Deployment(shop.redis)

        assert (deployment.disable("shop", "maintenance"), deployment.disable("shop", "again")) == (True, False)

        assert shop.acquire_delivery(order(1)) is None
        redis: Any = shop.redis
        assert redis.hget(KEYS.sinks_disabled, "shop").endswith(b" maintenance")
        deployment.enable("shop")
        assert shop.start_delivery(order(1)).attempts == 1


class TestAWorker:
    def outcome(self, url: str, sandbox: Sandbox, error: Exception) -> tuple[Any, list[Any]]:
        """Return the record of an order whose delivery raised this, with `due_in`, and the lines of the log."""

        def trouble(order_id: str) -> None:
            raise error

        with worker_lab(url, sandbox, {"shop": Shop(trouble)}) as lab, capture_logs() as lines:
            (key,) = lab.issue()
            lab.work()
            return lab.record(key) | {"due_in": lab.delivery_in(key)}, lines

    @pytest.mark.parametrize(
        ("after", "shortest", "longest"), [(None, 4, 6), (90.0, 90, 90), (10**9, 7200, 7200), (1.0, 4, 6)]
    )
    def test_a_destination_that_is_away_uses_an_attempt_and_may_name_the_wait(
        self, redis_url: str, sandbox: Sandbox, after: float | None, shortest: int, longest: int
    ) -> None:
        record, lines = self.outcome(redis_url, sandbox, Unavailable("HTTP 503", after=after))

        assert shortest <= record["due_in"] <= longest
        assert (record["shop:attempts"], record["shop:error"]) == ("1", "HTTP 503")
        assert [line["error"] for line in lines if line["event"] == "delivery.failed"] == ["HTTP 503"]

    def test_a_destination_that_wants_nothing_more_uses_none(self, redis_url: str, sandbox: Sandbox) -> None:
        record, lines = self.outcome(redis_url, sandbox, Disable("HTTP 410"))

        assert (record["shop:attempts"], record.get("shop:dead"), record["due_in"]) == ("0", None, 0)
        assert [line["reason"] for line in lines if line["event"] == "sink.disabled"] == ["HTTP 410"]

    def test_the_log_says_once_when_it_opens(self, redis_url: str, sandbox: Sandbox) -> None:
        shop = Shop()
        with worker_lab(redis_url, sandbox, {"shop": shop}) as lab, capture_logs() as lines:
            orders = lab.issue(20)

            def trouble(order_id: str) -> None:
                raise Unavailable("HTTP 503")

            shop.trouble = trouble
            lab.work()
            assert [line["due_in_s"] for line in lines if line["event"] == "sink.unavailable"] == [15]
            assert len(shop.called) == policy.BREAKER_FAILURES

            lab.run_for(3600)
            assert len(shop.called) < 40, "probes alone"
            shop.trouble = lambda order_id: None
            lab.run_for(3 * 3600)

            assert (len(shop.received), lab.pending(), len(set(shop.received))) == (20, 0, len(orders))

    def test_a_delivery_is_attempted_for_three_days(self, redis_url: str, sandbox: Sandbox) -> None:
        def trouble(order_id: str) -> None:
            raise Failed("HTTP 422")

        shop = Shop(trouble)
        with worker_lab(redis_url, sandbox, {"shop": shop}) as lab:
            (key,) = lab.issue()
            lab.run_for(50 * 3600)
            assert lab.field("shop:dead", key) is None
            lab.run_for(40 * 3600)

            assert (lab.field("shop:dead", key), len(shop.called), lab.pending()) == ("HTTP 422", 46, 0)


class TestShown:
    def test_an_open_breaker_is_shown_with_its_next_probe(self, lab: Lab) -> None:
        lab.declare()
        for number in range(6):
            lab.accept_and_fetch(order(number))
        for number in range(policy.BREAKER_FAILURES):
            lab.deliver("retry", order(number), reason="HTTP 503", unavailable=True)

        page, (found,) = lab.run_command("status").out, lab.run_command("status", "--json").objects
        explained = " ".join(lab.run_command("orders", "explain", order(5).order_id).out.split())

        (sink,) = found["sinks"]
        assert (sink["breaker"]["reason"], sink["disabled_at"]) == ("HTTP 503", None)
        assert f"{SINK}: 6 orders behind; breaker open: HTTP 503 since " in page
        assert f"next Nothing for this order alone: {SINK} is not called, breaker open: HTTP 503 since " in explained
        assert "next probe at " in explained

    def test_a_disabled_sink_is_shown_and_fires_an_alert(self, lab: Lab) -> None:
        lab.declare()
        lab.accept_and_fetch(order(1))
        lab.deliver("disabled", order(1), reason="HTTP 410")

        page, (found,) = lab.run_command("status").out, lab.run_command("status", "--json").objects
        explained = " ".join(lab.run_command("orders", "explain", order(1).order_id).out.split())

        (sink,) = found["sinks"]
        assert (sink["disabled_at"] is None, sink["disabled_reason"], sink["breaker"]) == (False, "HTTP 410", None)
        assert "disabled since" in page
        assert f"{SINK} is not called, disabled since " in explained
        assert "so the sink is disabled, does not count as an attempt" in explained
        assert f": HTTP 410. To go on: ota-receiver sinks enable {SINK}" in explained

    def test_explain_says_of_each_sink_why_it_waits_and_first_what_only_a_person_ends(self, lab: Lab) -> None:
        """Five sinks: one away, one disabled, one that failed, one that is called now, and one whose turn is next."""
        lab.declare(sinks=("away", "off", "failed", "busy", SINK))
        for number in range(policy.BREAKER_FAILURES):
            lab.accept_and_fetch(order(number))
            lab.deliver("retry", order(number), sink="away", reason="HTTP 503", unavailable=True)
        lab.deliver("disabled", sink="off", order=order(1), reason="HTTP 410")
        lab.deliver("retry", sink="failed", order=order(1), failure="HTTP 422", wait=60)
        lab.start_delivery(order(1), sink="busy")

        page = " ".join(lab.run_command("orders", "explain", order(1).order_id).out.split())
        (found,) = lab.run_command("orders", "explain", order(1).order_id, "--json").objects

        why = {one["sink"]: one["why"].split(" since")[0] for one in found["outstanding"]}
        assert why == {
            "away": "breaker open: HTTP 503",
            "off": "disabled",
            "failed": "",
            "busy": "running",
            SINK: "",
        }
        planned = {one["sink"] for one in found["outstanding"] if one["next"]}
        assert planned == {"failed", SINK}, "a delivery that runs hides no attempt of another sink"
        assert "pending off: revision 1 not delivered yet; disabled since " in page
        assert found["next"].startswith("Nothing for this order alone: off is not called, disabled since ")
        assert found["next"].endswith("ota-receiver sinks enable off")

    def test_explain_names_the_sink_that_failed_while_another_one_is_called(self, lab: Lab) -> None:
        lab.declare(sinks=("failed", "busy", SINK))
        lab.accept_and_fetch(order(1))
        lab.deliver("retry", sink="failed", order=order(1), failure="HTTP 422", wait=60)
        lab.start_delivery(order(1), sink="busy")

        (found,) = lab.run_command("orders", "explain", order(1).order_id, "--json").objects

        assert found["next"].startswith("Fix the sink failed (HTTP 422). Delivery is attempted again at ")

    def test_it_is_disabled_and_enabled_by_hand_with_an_entry_in_the_audit(self, lab: Lab) -> None:
        lab.declare()
        lab.accept_and_fetch(order(1))
        disable, enable = ("sinks", "disable", SINK), ("sinks", "enable", SINK)

        ended = [lab.run_command(*words, "--why", "the shop moves") for words in (disable, disable)]
        assert [one.code for one in ended] == [0, 1]
        assert "disabled since" in lab.run_command("status").out
        assert lab.acquire_delivery(order(1)) is None
        ended = [lab.run_command(*words) for words in (enable, enable)]
        assert [one.code for one in ended] == [0, 1]
        assert lab.start_delivery(order(1)).attempts == 1

        entries = [(one["what"], one["selected"]) for one in lab.run_command("audit", "--json").objects]
        assert entries[0] == ("sink-enable", SINK)
        assert entries[-1] == ("sink-disable", SINK)

    @pytest.mark.parametrize("what", ["enable", "disable"])
    def test_a_name_that_no_sink_has_is_refused_with_those_that_there_are(self, lab: Lab, what: str) -> None:
        lab.declare(sinks=("shop",))

        ended = lab.run_command("sinks", what, "shpo")

        assert (ended.code, "There are: shop." in ended.err) == (1, True)
        assert lab.redis.exists(KEYS.audit, KEYS.sinks_disabled) == 0
