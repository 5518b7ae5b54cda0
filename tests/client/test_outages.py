"""What is logged while a service is away, and for how long it is asked again, by a clock of the tests' own."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator

import httpx
import pytest

from freestep import (
    Client,
    CoordinatorUnavailable,
    EpochChanged,
    InvalidSetting,
    Overloaded,
    ProblemError,
    ServiceUnreachable,
    ShardUnavailable,
)
from freestep.outages import Outages, Waiter
from freestep.transport import Transport

URL = "http://service.test:8000"


class Clock:
    """Seconds, which pass while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, clock: Clock) -> Callable[[], list[tuple[float, str]]]:
    """The warnings so far, each with when it was logged, in seconds after the beginning."""

    class At(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert record.levelno == logging.WARNING
            found.append((clock.now - 1000.0, record.getMessage()))

    found: list[tuple[float, str]] = []
    handler = At()
    logging.getLogger("freestep").addHandler(handler)
    caplog.set_level(logging.WARNING, "freestep")
    return lambda: found


@pytest.fixture(autouse=True)
def no_handlers_are_left() -> Iterator[None]:
    before = list(logging.getLogger("freestep").handlers)
    yield
    logging.getLogger("freestep").handlers = before


Answer = Callable[[httpx.Request], httpx.Response]


def transport(answer: Answer, clock: Clock, retry_for: float) -> Transport:
    http = httpx.Client(base_url=URL, transport=httpx.MockTransport(answer))
    return Transport(http, retry_for, clock=clock, sleep=clock.sleep)


def raising(error: Exception) -> Answer:
    def answer(request: httpx.Request) -> httpx.Response:
        raise error

    return answer


AWAY: dict[str, tuple[Answer, str]] = {
    "refused": (raising(httpx.ConnectError("[Errno 111] Connection refused")), "Connection refused"),
    "no connection": (raising(httpx.ConnectTimeout("no connection within 30 s")), "no connection within 30 s"),
    "no answer": (raising(httpx.ReadTimeout("")), "ReadTimeout"),
    "cut": (raising(httpx.RemoteProtocolError("the server closed the connection")), "the server closed"),
    **{
        f"a gateway's {status}": (lambda _, status=status: httpx.Response(status, text="upstream"), str(status))
        for status in (429, 502, 503, 504)
    },
    "Redis away": (
        lambda _: httpx.Response(503, json=CoordinatorUnavailable("Redis is loading").to_document(503)),
        "Redis is loading",
    ),
}

BUSY = [Overloaded("no memory"), ShardUnavailable("the shards are being opened")]


@pytest.mark.parametrize(("answer", "cause"), AWAY.values(), ids=AWAY)
def test_it_is_logged_at_once_and_every_ten_seconds_and_raised_in_the_end(
    answer: Answer, cause: str, clock: Clock, lines: Callable[[], list[tuple[float, str]]]
) -> None:
    with pytest.raises((ServiceUnreachable, CoordinatorUnavailable), match=cause):
        transport(answer, clock, 60).request("GET", "/v1/runs")
    times = [at for at, _ in lines()]
    assert times[0] == 0
    # The pauses between attempts are at most three seconds.
    assert [int(at // 10) for at in times] == [0, 1, 2, 3, 4, 5]
    assert all(at % 10 <= 3 for at in times)
    assert 57 <= clock.now - 1000 <= 60
    for (at, line), word in zip(lines(), ["is away or busy"] + 5 * ["has been away or busy for"], strict=True):
        assert line.startswith(f"{URL} {word}")
        assert cause in line
        assert line.endswith(f"requests are repeated for {60 - at:.0f} s")


@pytest.mark.parametrize("refusal", BUSY, ids=lambda refusal: refusal.slug)
def test_a_service_that_is_busy_is_logged_if_that_lasts(
    refusal: ProblemError, clock: Clock, lines: Callable[[], list[tuple[float, str]]]
) -> None:
    until = [1006.0]

    def answer(request: httpx.Request) -> httpx.Response:
        if clock.now < until[0]:
            return httpx.Response(503, json=refusal.to_document(503))
        return httpx.Response(200, json={})

    transport(answer, clock, 60).request("GET", "/v1/runs")
    assert lines() == []
    until[0] = clock.now + 25
    began = clock.now - 1000
    transport(answer, clock, 60).request("GET", "/v1/runs")
    (first, line), (second, _), (_, back) = lines()
    assert 10 <= first - began <= 13
    assert 20 <= second - began <= 23
    assert line.startswith(f"{URL} has been away or busy for") and str(refusal) in line
    assert "answers again" in back


def test_an_attempt_that_took_all_the_time_is_not_the_last(clock: Clock) -> None:
    asked: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.extensions["timeout"]["read"])
        if len(asked) == 1:
            # As on a connection whose other end is gone.
            clock.sleep(asked[0])
            raise httpx.ReadTimeout("no data")
        return httpx.Response(200, json={})

    assert transport(answer, clock, 5).request("GET", "/v1/runs", wait=30).status == 200
    assert asked == [35, 35]


def test_a_busy_service_that_goes_away_is_logged_at_once(
    clock: Clock, lines: Callable[[], list[tuple[float, str]]]
) -> None:
    failures = [BUSY[0], BUSY[0]]

    def answer(request: httpx.Request) -> httpx.Response:
        if failures:
            return httpx.Response(503, json=failures.pop().to_document(503))
        raise httpx.ConnectError("refused")

    with pytest.raises(ServiceUnreachable):
        transport(answer, clock, 5).request("GET", "/v1/runs")
    ((_, line),) = lines()
    assert "(refused)" in line


def test_its_return_is_logged_once(clock: Clock, lines: Callable[[], list[tuple[float, str]]]) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if clock.now < 1025:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json={})

    asked = transport(answer, clock, 60)
    asked.request("GET", "/v1/runs")
    back = lines()[-1]
    assert 25 <= back[0] <= 28
    assert back[1] == f"{URL} answers again, after {back[0]:.0f} s"
    assert sum("answers again" in line for _, line in lines()) == 1
    count = len(lines())
    asked.request("GET", "/v1/runs")
    assert len(lines()) == count


def test_requests_of_several_threads_are_logged_as_one_outage(
    clock: Clock, lines: Callable[[], list[tuple[float, str]]]
) -> None:
    failures = [0]

    def answer(request: httpx.Request) -> httpx.Response:
        failures[0] += 1
        if failures[0] <= 16:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json={})

    asked = transport(answer, clock, 3600)
    asked.threads.run_all([lambda: asked.request("GET", "/v1/runs")] * 8)
    asked.close()
    begun = [line for _, line in lines() if "is away or busy" in line]
    assert len(begun) == 1
    assert sum("answers again" in line for _, line in lines()) == 1


def test_an_outage_after_one_that_was_given_up_is_a_new_one(
    clock: Clock, lines: Callable[[], list[tuple[float, str]]]
) -> None:
    asked = transport(AWAY["refused"][0], clock, 5)
    for _ in range(2):
        with pytest.raises(ServiceUnreachable, match=r"did not answer for 5 s: .*refused"):
            asked.request("GET", "/v1/runs")
    assert ["is away or busy" in line for _, line in lines()] == [True, True]


def test_what_is_asked_once_only_is_not_logged(clock: Clock, lines: Callable[[], list[tuple[float, str]]]) -> None:
    asked = transport(AWAY["refused"][0], clock, 60)
    with pytest.raises(ServiceUnreachable, match=r"^http://service\.test:8000 did not answer: .*refused"):
        asked.request("GET", "/v1/runs", retry=False)
    assert lines() == []


def test_what_is_asked_once_only_ends_no_outage(clock: Clock, lines: Callable[[], list[tuple[float, str]]]) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if clock.now < 1025:
            raise httpx.ConnectError("refused")
        return httpx.Response(200, json={})

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        if clock.now < 1025:
            # As another thread renews a lease while a push is repeated.
            with pytest.raises(ServiceUnreachable):
                asked.request("PUT", "/lease", retry=False)

    http = httpx.Client(base_url=URL, transport=httpx.MockTransport(answer))
    asked = Transport(http, 60, clock=clock, sleep=sleep)
    asked.request("POST", "/v1/runs")
    kinds = ["is away or busy", "has been away or busy", "has been away or busy", "answers again"]
    assert [kind in line for kind, (_, line) in zip(kinds, lines(), strict=True)] == 4 * [True]


def test_a_refusal_is_an_answer_that_ends_an_outage(clock: Clock, lines: Callable[[], list[tuple[float, str]]]) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if clock.now < away_until:
            raise httpx.ConnectError("refused")
        return httpx.Response(409, json=EpochChanged("the run was opened again").to_document(409))

    asked = transport(answer, clock, 60)
    for begins in (0.0, 500.0):
        clock.now, away_until = 1000 + begins, 1005 + begins
        with pytest.raises(EpochChanged):
            asked.request("POST", "/v1/runs/mnist/gradients")
    kinds = [line.removeprefix(URL).partition(" (")[0].partition(",")[0].strip() for _, line in lines()]
    assert kinds == 2 * ["is away or busy", "answers again"]


def test_an_outage_lasts_as_long_as_anybody_waits(clock: Clock, lines: Callable[[], list[tuple[float, str]]]) -> None:
    outages, refused = Outages(clock), httpx.ConnectError("refused")
    first, second = Waiter(), Waiter()
    outages.failed(URL, refused, 12, first)
    outages.failed(URL, refused, 60, second)
    clock.sleep(12)
    outages.ended(first)
    outages.failed(URL, refused, 48, second)
    clock.sleep(1)
    outages.failed(URL, refused, 47, second)
    outages.ended(second)
    outages.failed(URL, refused, 60, Waiter())
    assert [(at, line.partition(" (")[0]) for at, line in lines()] == [
        (0, f"{URL} is away or busy"),
        (12, f"{URL} has been away or busy for 12 s"),
        (13, f"{URL} is away or busy"),
    ]


@pytest.mark.parametrize("while_asked", [True, False])
def test_once_sigterm_has_come_nothing_is_repeated(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, while_asked: bool
) -> None:
    asked: list[str] = []

    def come() -> None:
        monkeypatch.setattr("freestep.leaving._is_leaving", True)

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        if while_asked:
            come()
        raise httpx.ConnectError("refused")

    def sleep(seconds: float) -> None:
        clock.sleep(seconds)
        come()

    http = httpx.Client(base_url=URL, transport=httpx.MockTransport(answer))
    with pytest.raises(ServiceUnreachable, match=r"did not answer: .*refused"):
        Transport(http, 60, clock=clock, sleep=sleep).request("GET", "/v1/runs")
    assert len(asked) == 1
    assert (clock.now == 1000) is while_asked


def test_a_request_that_cannot_be_sent_is_not_repeated(
    clock: Clock, lines: Callable[[], list[tuple[float, str]]]
) -> None:
    with pytest.raises(ServiceUnreachable, match="cannot be sent: Illegal header value"):
        transport(raising(httpx.LocalProtocolError("Illegal header value")), clock, 60).request("GET", "/v1/runs")
    assert (clock.now, lines()) == (1000, [])


# For how long


def refused_after(client: Client) -> str:
    with client, pytest.raises(ServiceUnreachable) as caught:
        client.runs()
    return str(caught.value)


def test_the_environment_says_for_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FREESTEP_RETRY_SECONDS", "0.25")
    assert "did not answer for 0.25 s" in refused_after(Client("http://127.0.0.1:9"))
    assert "did not answer for 0.5 s" in refused_after(Client("http://127.0.0.1:9", retry_for=0.5))
    assert "did not answer: " in refused_after(Client("http://127.0.0.1:9", retry_for=0))


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "1 minute"])
def test_a_wrong_time_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("FREESTEP_RETRY_SECONDS", value)
    with pytest.raises(InvalidSetting, match=f"FREESTEP_RETRY_SECONDS must be a number of seconds.*{value}") as caught:
        Client()
    assert isinstance(caught.value, ValueError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    for client in (Client(retry_for=1), Client(retry_for=1, http=httpx.Client())):
        client.close()
    monkeypatch.delenv("FREESTEP_RETRY_SECONDS")
    for given in (-1.0, float("nan"), "soon"):
        with pytest.raises(InvalidSetting, match="retry_for must be a number of seconds"):
            Client(retry_for=given)  # type: ignore[arg-type]
