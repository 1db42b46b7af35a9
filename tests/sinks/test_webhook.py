"""The webhook sink, against a real HTTP server that misbehaves as it is told."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import re
import socket
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
import trustme
from cloudevents.core.bindings.http import HTTPMessage, from_http_event
from harness import until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from receiver import OK, Answer, Receiver, Request
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from cdc.errors import DeliveryError, PartialFailure, PermanentFailure, SinkDisabled, TransientFailure
from cdc.event import Event, Op
from cdc.formats import encoder
from cdc.sinks.webhook import WebhookOptions, WebhookSink

Make = Callable[..., Event]
MakeSink = Callable[..., WebhookSink]

OLD = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
NEW = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oDG8Pu5qk4vJ0="


def options_of(given: dict[str, Any]) -> WebhookOptions:
    """The options as the configuration makes them: lists arrive as tuples."""
    arriving = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return WebhookOptions.model_validate({"type": "webhook", **arriving})


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.stop()


@pytest.fixture
def make_sink(receiver: Receiver) -> Iterator[MakeSink]:
    """``make_sink(**options)``: an opened sink that delivers to the receiver, if no url says otherwise."""
    made: list[WebhookSink] = []

    def make(**options: Any) -> WebhookSink:
        given = {"url": f"{receiver.url}/hook", "allow_private": True, "timeout": "5s", **options}
        checked = options_of(given)
        sink = WebhookSink("hooks", checked, encoder(checked.format, checked.binding))
        made.append(sink)
        sink.open()
        return sink

    yield make
    for sink in made:
        sink.close()


def failure_of(sink: WebhookSink, batch: Sequence[Event]) -> DeliveryError:
    """What delivering raises; of a batch of one, what was said of that one."""
    with pytest.raises(DeliveryError) as raised:
        sink.deliver(batch)
    error = raised.value
    return error.failures[0] if isinstance(error, PartialFailure) and len(batch) == 1 else error


def deliver_all(sink: WebhookSink, batch: Sequence[Event], rounds: int = 1000) -> list[Event]:
    """Deliver again and again what failed, as a pipeline does; returns what was refused for good."""
    left, refused = list(batch), []
    for _ in range(rounds):
        try:
            sink.deliver(left)
        except TransientFailure:
            continue
        except PartialFailure as error:
            refused += [left[i] for i, why in error.failures.items() if isinstance(why, PermanentFailure)]
            left = [left[i] for i, why in sorted(error.failures.items()) if isinstance(why, TransientFailure)]
            if left:
                continue
        return refused
    raise AssertionError("it never ends")


def seqs(requests: Sequence[Request]) -> list[int]:
    return [Event.from_json(request.body.decode()).source.seq for request in requests]


# -- a request ----------------------------------------------------------------------------------------------------


def test_each_event_is_one_request(receiver: Receiver, make_sink: MakeSink, make_event: Make) -> None:
    event = make_event(1)
    make_sink().deliver([event])
    (request,) = receiver.requests
    assert (request.method, request.path) == ("POST", "/hook")
    assert request.body.decode() == event.to_json()
    assert request.id == event.id
    assert request.headers["content-type"] == "application/json"
    assert request.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert abs(int(request.headers["webhook-timestamp"]) - time.time()) < 5
    assert "webhook-signature" not in request.headers


def test_method_path_and_headers_are_the_users(receiver: Receiver, make_sink: MakeSink, make_event: Make) -> None:
    sink = make_sink(
        url=f"{receiver.url}/v1/{{schema}}/{{table}}/{{key.id}}?verbose=1",
        method="PUT",
        headers={"Authorization": "Bearer x", "X-Row": "{table} {key}", "content-type": "application/x-cdc"},
    )
    sink.deliver([make_event(7, table="odd ä/%")])
    (request,) = receiver.requests
    assert (request.method, request.path) == ("PUT", "/v1/public/odd%20%C3%A4%2F%25/7?verbose=1")
    assert request.headers["authorization"] == "Bearer x"
    assert request.headers["x-row"] == 'odd%20%C3%A4/%25 {"id":7}'
    assert request.headers["content-type"] == "application/x-cdc"


@pytest.mark.parametrize("name", [".", ".."])
def test_no_name_leads_to_another_path(receiver: Receiver, make_sink: MakeSink, make_event: Make, name: str) -> None:
    sink = make_sink(url=f"{receiver.url}/hook/{{table}}/in")
    assert isinstance(failure_of(sink, [make_event(1, table=name)]), PermanentFailure)
    assert receiver.requests == []


def test_a_key_column_that_is_not_there_is_a_permanent_failure(make_sink: MakeSink, make_event: Make) -> None:
    failure = failure_of(make_sink(headers={"X-Number": "{key.number}"}), [make_event(1)])
    assert isinstance(failure, PermanentFailure)
    assert "number" in str(failure)


def test_requests_share_a_connection(receiver: Receiver, make_sink: MakeSink, make_event: Make) -> None:
    sink = make_sink(concurrency=1)
    for seq in range(5):
        sink.deliver([make_event(seq)])
    assert receiver.connections == 1


def test_environment_variables_name_no_proxy(
    receiver: Receiver, make_sink: MakeSink, make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    make_sink().deliver([make_event(1)])
    assert len(receiver.taken) == 1


def test_a_sink_may_be_closed_and_opened_again(receiver: Receiver, make_sink: MakeSink, make_event: Make) -> None:
    sink = make_sink()
    sink.close()
    sink.close()
    sink.open()
    sink.open()
    sink.deliver([make_event(1), make_event(2)])
    assert sorted(seqs(receiver.taken)) == [1, 2]


# -- signatures ---------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=4), batch=st.booleans())
def test_the_librarys_verifier_accepts_every_request(
    receiver: Receiver, make_sink: MakeSink, make_event: Make, texts: list[str], batch: bool
) -> None:
    receiver.requests.clear()
    sink = make_sink(secret=[NEW, OLD], **({"mode": "batch"} if batch else {}))
    sink.deliver([make_event(seq, text=json.dumps(text)[1:-1]) for seq, text in enumerate(texts)])
    assert len(receiver.requests) == (1 if batch else len(texts))
    for request in receiver.requests:
        for secret in (OLD, NEW):  # whichever of the two the receiver has by now
            Webhook(secret).verify(request.body, request.headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(OLD).verify(request.body + b" ", request.headers)
        with pytest.raises(WebhookVerificationError):
            Webhook(OLD).verify(request.body, {**request.headers, "webhook-id": "another"})
        with pytest.raises(WebhookVerificationError):
            Webhook(b"x" * 24).verify(request.body, request.headers)


def test_one_secret_makes_one_signature(receiver: Receiver, make_sink: MakeSink, make_event: Make) -> None:
    make_sink(secret=OLD).deliver([make_event(1)])
    (request,) = receiver.requests
    assert re.fullmatch(r"v1,[A-Za-z0-9+/]{43}=", request.headers["webhook-signature"])
    Webhook(OLD).verify(request.body, request.headers)


# -- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_2xx_is_success(receiver: Receiver, make_sink: MakeSink, make_event: Make, status: int) -> None:
    receiver.answer = lambda request: Answer(status)
    make_sink().deliver([make_event(1)])


@pytest.mark.parametrize(
    "status", [301, 302, 303, 304, 307, 308, 401, 403, 407, 408, 425, 429, 500, 502, 503, 504, 599]
)
def test_what_may_pass_is_transient(receiver: Receiver, make_sink: MakeSink, make_event: Make, status: int) -> None:
    receiver.answer = lambda request: Answer(status, body=b"secret row")
    failure = failure_of(make_sink(), [make_event(1)])
    assert isinstance(failure, TransientFailure)
    assert f"http://127.0.0.1:{receiver.port} answered {status}" in str(failure)
    assert "secret row" not in str(failure)
    assert "As It Was Told" not in str(failure), "the receiver's own words may hold anything"
    assert failure.retry_after is None


@pytest.mark.parametrize("status", [400, 402, 404, 405, 406, 409, 411, 413, 414, 415, 422, 431, 451, 499])
def test_what_the_receiver_will_never_take_is_permanent(
    receiver: Receiver, make_sink: MakeSink, make_event: Make, status: int
) -> None:
    receiver.answer = lambda request: Answer(status, body=b"secret row")
    failure = failure_of(make_sink(), [make_event(1)])
    assert isinstance(failure, PermanentFailure)
    assert f"answered {status}" in str(failure)
    assert "secret row" not in str(failure)


def test_410_disables_the_sink(receiver: Receiver, make_sink: MakeSink, make_event: Make) -> None:
    receiver.answer = lambda request: Answer(410)
    with pytest.raises(SinkDisabled, match="answered 410 Gone"):
        make_sink(concurrency=2).deliver([make_event(seq) for seq in range(100)])
    assert len(receiver.requests) <= 4


def test_redirects_are_not_followed(receiver: Receiver, make_sink: MakeSink, make_event: Make) -> None:
    receiver.answer = lambda request: Answer(307, {"Location": f"{receiver.url}/elsewhere"})
    assert "redirects are not followed" in str(failure_of(make_sink(), [make_event(1)]))
    assert [request.path for request in receiver.requests] == ["/hook"]


def _in(seconds: float) -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        (lambda: "7", 7, 7),
        (lambda: " 7.5 ", 7.5, 7.5),
        (lambda: "3600", 60, 60),
        (lambda: "9" * 400, 60, 60),
        (lambda: _in(20), 15, 20),
        (lambda: _in(86400 * 365 * 1000), 60, 60),
        (lambda: "Sun, 06 Nov 2044 08:49:37 -0000", 60, 60),
        *((lambda text=text: text, None, None) for text in ("0", "-5", "", "soon", "1e9", "٣", "NaN", "Mon, 99 Foo")),
        (lambda: _in(-3600), None, None),
    ],
)
def test_retry_after_is_kept_to_within_reason(
    receiver: Receiver,
    make_sink: MakeSink,
    make_event: Make,
    value: Callable[[], str],
    least: float | None,
    most: float | None,
) -> None:
    text = value().encode().decode("latin-1")
    receiver.answer = lambda request: Answer(503, {"Retry-After": text})
    failure = failure_of(make_sink(retry={"max": "60s"}), [make_event(1)])
    assert isinstance(failure, TransientFailure)
    if least is None or most is None:
        assert failure.retry_after is None
    else:
        assert failure.retry_after is not None
        assert least <= failure.retry_after <= most


def test_who_asks_for_a_pause_gets_it_from_every_key(receiver: Receiver, make_sink: MakeSink, make_event: Make) -> None:
    answers = iter([OK, OK, OK])
    receiver.answer = lambda request: next(answers, Answer(429, {"Retry-After": "1"}))
    sink = make_sink(concurrency=1)
    batch = [make_event(seq) for seq in range(50)]
    began = time.monotonic()
    with pytest.raises(PartialFailure) as raised:
        sink.deliver(batch)
    assert len(raised.value.failures) == 47
    assert len(receiver.requests) == 4
    receiver.answer = lambda request: OK
    with pytest.raises(TransientFailure) as early:
        sink.deliver(batch[3:])
    assert early.value.retry_after is not None
    assert 0 < early.value.retry_after <= 1
    assert len(receiver.requests) == 4
    assert deliver_all(sink, batch[3:], rounds=10**9) == []
    assert time.monotonic() - began >= 0.98
    assert sorted(seqs(receiver.taken)) == list(range(50))


def test_an_answer_of_any_length_is_cut(receiver: Receiver, make_sink: MakeSink, make_event: Make) -> None:
    receiver.answer = lambda request: Answer(body=b"x" * 10**7)
    sink = make_sink(concurrency=1)
    sink.deliver([make_event(1)])
    sink.deliver([make_event(2)])
    assert receiver.connections == 2, "the rest of an answer was read to its end"
    receiver.answer = lambda request: Answer(body=b"x" * 1000)
    sink.deliver([make_event(3)])
    sink.deliver([make_event(4)])
    assert receiver.connections == 3


@pytest.mark.parametrize("answer", [Answer(body=b"x", length=100), Answer(body=b"x" * 9000, pause=0.1, slow_body=True)])
def test_what_becomes_of_the_body_of_a_success_does_not_matter(
    receiver: Receiver, make_sink: MakeSink, make_event: Make, answer: Answer
) -> None:
    receiver.answer = lambda request: answer
    began = time.monotonic()
    make_sink(timeout="30s").deliver([make_event(1)])
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("raw", [b"SSH-2.0-OpenSSH_9\r\n", b"HTTP/1.1 abc\r\n\r\n", b"\0" * 1000, b"x" * 200_000])
def test_what_is_not_http_is_transient_and_is_not_repeated(
    receiver: Receiver, make_sink: MakeSink, make_event: Make, raw: bytes
) -> None:
    receiver.answer = lambda request: Answer(raw=raw)
    failure = failure_of(make_sink(), [make_event(1)])
    assert isinstance(failure, TransientFailure)
    assert "SSH" not in str(failure)
    assert "is not HTTP" in str(failure)


# -- connections and time -----------------------------------------------------------------------------------------


def test_a_receiver_that_is_not_there_is_named_once_and_nothing_else_is_tried(
    receiver: Receiver, make_sink: MakeSink, make_event: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = make_sink(concurrency=1)
    receiver.stop()
    tries: list[object] = []
    connect = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: (tries.append(a), connect(*a, **k))[1])
    try:
        failure = failure_of(sink, [make_event(seq) for seq in range(100)])
        assert isinstance(failure, TransientFailure)
        assert str(failure) == f"no connection to http://127.0.0.1:{receiver.port}: Connection refused"
        assert len(tries) == 1
    finally:
        receiver.start()
    sink.deliver([make_event(1)])
    assert seqs(receiver.taken) == [1]


def test_a_connection_that_breaks_is_transient(receiver: Receiver, make_sink: MakeSink, make_event: Make) -> None:
    receiver.answer = lambda request: Answer(cut=True)
    assert isinstance(failure_of(make_sink(), [make_event(1)]), TransientFailure)
    assert len(receiver.requests) == 1


def test_a_connection_that_was_idle_and_is_closed_under_our_feet_costs_nothing(
    receiver: Receiver, make_sink: MakeSink, make_event: Make
) -> None:
    sink = make_sink(concurrency=1)
    sink.deliver([make_event(1)])
    receiver.answer = lambda request: Answer(cut=True) if request.connection == 1 else OK
    sink.deliver([make_event(2)])
    assert seqs(receiver.taken) == [1, 2]
    assert [request.connection for request in receiver.requests] == [1, 1, 2]


def test_a_receiver_that_restarts_between_two_events_is_not_noticed(
    receiver: Receiver, make_sink: MakeSink, make_event: Make
) -> None:
    sink = make_sink()
    sink.deliver([make_event(1)])
    receiver.stop()
    receiver.start()
    sink.deliver([make_event(2)])
    assert seqs(receiver.taken) == [1, 2]


def test_a_success_we_did_not_wait_for_comes_again_under_the_same_id(
    receiver: Receiver, make_sink: MakeSink, make_event: Make
) -> None:
    receiver.stall()
    sink = make_sink(timeout="300ms", secret=OLD)
    failure = failure_of(sink, [make_event(1)])
    assert isinstance(failure, TransientFailure)
    assert str(failure) == f"no answer from http://127.0.0.1:{receiver.port} within 0.3 s"
    receiver.resume()
    sink.deliver([make_event(1)])
    assert len(receiver.taken) == 2
    assert {request.id for request in receiver.taken} == {make_event(1).id}
    assert {request.body for request in receiver.taken} == {make_event(1).to_json().encode()}
    for request in receiver.taken:
        Webhook(OLD).verify(request.body, request.headers)


def test_the_timestamp_is_the_attempts(receiver: Receiver, make_sink: MakeSink, make_event: Make) -> None:
    sink = make_sink()
    sink.deliver([make_event(1)])
    second = int(time.time())
    until(lambda: int(time.time()) > second, "the next second")
    sink.deliver([make_event(1)])
    first, again = (int(request.headers["webhook-timestamp"]) for request in receiver.requests)
    assert first < again


def test_an_answer_that_trickles_ends_with_the_deadline(
    receiver: Receiver, make_sink: MakeSink, make_event: Make
) -> None:
    receiver.answer = lambda request: Answer(pause=0.05)
    began = time.monotonic()
    failure = failure_of(make_sink(timeout="500ms"), [make_event(1)])
    assert "no answer" in str(failure)
    assert 0.45 < time.monotonic() - began < 3


@contextlib.contextmanager
def deaf() -> Iterator[int]:
    """A port where connections are taken and nothing is read or said."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening.getsockname()[1]


def test_a_receiver_that_does_not_read_ends_with_the_deadline(make_sink: MakeSink, make_event: Make) -> None:
    with deaf() as port:
        sink = make_sink(url=f"http://127.0.0.1:{port}/", timeout="500ms")
        began = time.monotonic()
        failure = failure_of(sink, [make_event(1, text="x" * 8_000_000)])
        assert "no answer" in str(failure)
        assert 0.45 < time.monotonic() - began < 3


def test_tls_with_somebody_silent_ends_with_the_connections_time_out(make_sink: MakeSink, make_event: Make) -> None:
    with deaf() as port:
        sink = make_sink(url=f"https://127.0.0.1:{port}/", timeout="10s", connect_timeout="300ms")
        began = time.monotonic()
        failure = failure_of(sink, [make_event(1)])
        assert str(failure) == f"no connection to https://127.0.0.1:{port} within 0.3 s"
        assert time.monotonic() - began < 3


def test_a_receiver_that_answers_nobody_is_given_up_before_the_batch_is_through(
    receiver: Receiver, make_sink: MakeSink, make_event: Make
) -> None:
    receiver.stall()
    sink = make_sink(timeout="200ms", concurrency=4)
    failure = failure_of(sink, [make_event(seq) for seq in range(200)])
    receiver.resume()
    assert isinstance(failure, TransientFailure)
    assert len(receiver.requests) <= 8


def test_an_early_answer_to_a_large_request_counts(make_sink: MakeSink, make_event: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def refuse() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                connection.shutdown(socket.SHUT_WR)
                with contextlib.suppress(OSError):
                    while connection.recv(65536):
                        pass

        thread = threading.Thread(target=refuse)
        thread.start()
        sink = make_sink(url=f"http://127.0.0.1:{listening.getsockname()[1]}/")
        failure = failure_of(sink, [make_event(1, text="x" * 3_000_000)])
        sink.close()
        thread.join()
    assert isinstance(failure, PermanentFailure)


# -- order --------------------------------------------------------------------------------------------------------


def test_requests_of_one_key_are_made_one_after_the_other_and_of_others_side_by_side(
    receiver: Receiver, make_sink: MakeSink, make_event: Make
) -> None:
    receiver.stall()
    sink = make_sink(concurrency=3)
    batch = [make_event(seq, key=seq % 5) for seq in range(25)]
    delivery = threading.Thread(target=sink.deliver, args=(batch,))
    delivery.start()
    until(lambda: len(receiver.requests) == 3, "as many requests as may be made at a time")
    assert sorted(seqs(receiver.requests)) == [0, 1, 2]
    receiver.resume()
    delivery.join()
    assert len(receiver.taken) == 25
    assert_in_order(receiver.taken)


def assert_in_order(taken: Sequence[Request]) -> None:
    """Of each key, what was taken first came in order; and nothing was taken twice."""
    by_key: dict[int, list[int]] = defaultdict(list)
    for request in taken:
        event = Event.from_json(request.body.decode())
        assert event.key is not None
        by_key[event.key["id"]].append(event.source.seq)
    for key, found in by_key.items():
        assert found == sorted(set(found)), f"key {key}"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("concurrency", [1, 2, 8])
def test_nothing_overtakes_whatever_fails(
    receiver: Receiver, make_sink: MakeSink, make_event: Make, seed: int, concurrency: int
) -> None:
    chance = random.Random(seed)
    poison = {chance.randrange(120) for _ in range(5)}

    def answer(request: Request) -> Answer:
        (seq,) = seqs([request])
        if seq in poison:
            return Answer(422)
        return Answer(chance.choice([200, 200, 200, 200, 500, 503, 429, 302]))

    receiver.answer = answer
    batch = [make_event(seq, key=chance.randrange(9)) for seq in range(120)]
    refused = deliver_all(make_sink(concurrency=concurrency), batch)
    assert {event.source.seq for event in refused} == poison
    assert sorted(seqs(receiver.taken)) == [seq for seq in range(120) if seq not in poison]
    assert_in_order(receiver.taken)


def test_what_fails_holds_back_its_key_and_nothing_else(
    receiver: Receiver, make_sink: MakeSink, make_event: Make
) -> None:
    statuses = {1: 400, 2: 500}
    receiver.answer = lambda request: Answer(statuses.get(seqs([request])[0], 200))
    batch = [make_event(seq, key=seq % 4) for seq in range(12)]  # key 1: 1, 5, 9; key 2: 2, 6, 10
    with pytest.raises(PartialFailure) as raised:
        make_sink(concurrency=2).deliver(batch)
    failures = raised.value.failures
    assert sorted(failures) == [1, 2, 5, 6, 9, 10]
    assert isinstance(failures[1], PermanentFailure)
    assert all(isinstance(failures[index], TransientFailure) for index in (2, 5, 6, 9, 10))
    assert sorted(seqs(receiver.taken)) == [0, 3, 4, 7, 8, 11]


def test_keys_that_fail_again_and_again_starve_nobody(
    receiver: Receiver, make_sink: MakeSink, make_event: Make
) -> None:
    receiver.answer = lambda request: Answer(500 if seqs([request])[0] < 20 else 200)
    sink = make_sink(concurrency=1)
    left = [make_event(seq) for seq in range(40)]
    for _ in range(10):
        with pytest.raises(DeliveryError) as raised:
            sink.deliver(left)
        if isinstance(raised.value, PartialFailure):
            left = [left[index] for index in sorted(raised.value.failures)]
    assert sorted(seqs(receiver.taken)) == list(range(20, 40))


# -- many events in a request -------------------------------------------------------------------------------------


def bodies(receiver: Receiver) -> list[list[int]]:
    return [[event["source"]["seq"] for event in json.loads(request.body)] for request in receiver.taken]


def test_a_batch_is_one_array(receiver: Receiver, make_sink: MakeSink, make_event: Make) -> None:
    make_sink(mode="batch", secret=OLD).deliver([make_event(seq) for seq in range(1, 101)])
    (request,) = receiver.requests
    assert request.headers["content-type"] == "application/json"
    assert [Event.from_json(json.dumps(event)).source.seq for event in json.loads(request.body)] == list(range(1, 101))
    assert Webhook(OLD).verify(request.body, request.headers)[99]["id"] == make_event(100).id


def test_a_batch_may_be_lines(receiver: Receiver, make_sink: MakeSink, make_event: Make) -> None:
    make_sink(mode="batch", batch_body="lines").deliver([make_event(1), make_event(2)])
    (request,) = receiver.requests
    assert request.headers["content-type"] == "application/x-ndjson"
    assert request.body.decode() == f"{make_event(1).to_json()}\n{make_event(2).to_json()}\n"


def test_the_id_of_a_batch_is_the_same_when_the_same_batch_comes_again(
    receiver: Receiver, make_sink: MakeSink, make_event: Make
) -> None:
    answers = iter([Answer(500), OK, OK])
    receiver.answer = lambda request: next(answers)
    batch = [make_event(seq) for seq in range(10)]
    assert isinstance(failure_of(make_sink(mode="batch"), batch), TransientFailure)
    make_sink(mode="batch").deliver(batch)
    make_sink(mode="batch").deliver(batch[:9])
    first, again, other = (request.id for request in receiver.requests)
    assert first == again == f"{batch[0].id}_{batch[9].id}_10"
    assert other != first


def test_one_event_of_a_batch_that_is_refused_is_found(
    receiver: Receiver, make_sink: MakeSink, make_event: Make
) -> None:
    receiver.answer = lambda request: Answer(400 if b'"seq":37,' in request.body else 200)
    batch = [make_event(seq, key=seq % 10) for seq in range(100)]
    with pytest.raises(PartialFailure) as raised:
        make_sink(mode="batch").deliver(batch)
    failures = raised.value.failures
    assert isinstance(failures[37], PermanentFailure)
    assert sorted(failures) == [37, 47, 57, 67, 77, 87, 97], "the rest of its key waits"
    assert all(isinstance(failures[index], TransientFailure) for index in sorted(failures)[1:])
    assert [seq for body in bodies(receiver) for seq in body] == [seq for seq in range(100) if seq not in failures]
    assert len(receiver.requests) < 20


def test_events_go_where_templates_send_them_and_a_key_keeps_its_order(
    receiver: Receiver, make_sink: MakeSink, make_event: Make
) -> None:
    sink = make_sink(mode="batch", url=f"{receiver.url}/{{table}}/{{key.id}}", headers={"X-Table": "{table}"})
    sink.deliver([make_event(seq, table=("a", "b")[seq % 2], key=seq % 3) for seq in range(12)])
    assert [(request.path, request.headers["x-table"]) for request in receiver.requests] == [
        (f"/{table}/{key}", table) for table, key in (("a", 0), ("b", 1), ("a", 2), ("b", 0), ("a", 1), ("b", 2))
    ]
    receiver.taken.clear()
    sink = make_sink(mode="batch", url=f"{receiver.url}/{{id}}")
    sink.deliver([make_event(seq, key=1) for seq in range(5)])
    assert bodies(receiver) == [[0], [1], [2], [3], [4]]


@pytest.mark.parametrize("seed", range(8))
def test_a_batch_keeps_the_order_of_keys_across_requests_and_failures(
    receiver: Receiver, make_sink: MakeSink, make_event: Make, seed: int
) -> None:
    chance = random.Random(seed)
    poison = {chance.randrange(120) for _ in range(3)}

    def answer(request: Request) -> Answer:
        if poison & {event["source"]["seq"] for event in json.loads(request.body)}:
            return Answer(422)
        return Answer(chance.choice([200, 200, 500, 429]))

    receiver.answer = answer
    batch = [  # the operation chooses the path, so the events of a key go to several
        make_event(seq, key=chance.randrange(6)).model_copy(update={"op": chance.choice([Op.INSERT, Op.READ])})
        for seq in range(120)
    ]
    sink = make_sink(mode="batch", url=f"{receiver.url}/{{op}}", max_body=4000)
    refused = deliver_all(sink, batch)
    assert {event.source.seq for event in refused} == poison
    taken = [seq for body in bodies(receiver) for seq in body]
    assert sorted(taken) == [seq for seq in range(120) if seq not in poison]
    keys = {event.source.seq: event.key["id"] for event in batch if event.key is not None}
    for key in set(keys.values()):
        of_key = [seq for seq in taken if keys[seq] == key]
        assert of_key == sorted(of_key)


def test_a_destination_that_fails_holds_back_no_other(
    receiver: Receiver, make_sink: MakeSink, make_event: Make
) -> None:
    receiver.answer = lambda request: Answer(500 if request.path == "/a" else 200)
    batch = [make_event(seq, table="abc"[seq % 3]) for seq in range(9)]
    with pytest.raises(PartialFailure) as raised:
        make_sink(mode="batch", url=f"{receiver.url}/{{table}}").deliver(batch)
    assert sorted(raised.value.failures) == [0, 3, 6]
    assert [request.path for request in receiver.taken] == ["/b", "/c"]


def test_bodies_do_not_exceed_their_limit(receiver: Receiver, make_sink: MakeSink, make_event: Make) -> None:
    batch = [make_event(seq, text="ä" * 100) for seq in range(50)]
    make_sink(mode="batch", max_body=3000).deliver(batch)
    assert [seq for body in bodies(receiver) for seq in body] == list(range(50))
    assert all(len(request.body) <= 3000 for request in receiver.requests)
    assert len(receiver.requests) < 15


@pytest.mark.parametrize("mode", ["single", "batch"])
def test_an_event_that_is_too_large_is_a_permanent_failure_and_is_not_sent(
    receiver: Receiver, make_sink: MakeSink, make_event: Make, mode: str
) -> None:
    batch = [make_event(1), make_event(2, text="secret row" * 500), make_event(3)]
    with pytest.raises(PartialFailure) as raised:
        make_sink(mode=mode, max_body=2000).deliver(batch)
    ((index, failure),) = raised.value.failures.items()
    assert index == 1
    assert isinstance(failure, PermanentFailure)
    assert "max_body (2000)" in str(failure)
    assert "secret row" not in str(failure)
    assert b"secret row" not in b"".join(request.body for request in receiver.requests)


def test_410_disables_a_sink_in_batch_mode_too(receiver: Receiver, make_sink: MakeSink, make_event: Make) -> None:
    receiver.answer = lambda request: Answer(410)
    with pytest.raises(SinkDisabled):
        make_sink(mode="batch").deliver([make_event(1), make_event(2)])


# -- TLS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def secured(authority: trustme.CA) -> Iterator[Callable[..., Receiver]]:
    """``secured(name, asks=CA)``: an HTTPS server with a certificate for the name; `asks` for the client's, too."""
    started: list[Receiver] = []

    def start(name: str = "127.0.0.1", asks: trustme.CA | None = None) -> Receiver:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(context)
        if asks is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            asks.configure_trust(context)
        started.append(Receiver(context))
        return started[-1]

    yield start
    for receiver in started:
        receiver.stop()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


def test_a_certificate_of_a_named_authority_is_trusted(
    secured: Callable[..., Receiver], make_sink: MakeSink, make_event: Make, ca_file: str
) -> None:
    receiver = secured()
    make_sink(url=f"{receiver.url}/", tls={"ca": ca_file}).deliver([make_event(1)])
    assert seqs(receiver.taken) == [1]


def test_a_certificate_of_anybody_else_is_not(
    secured: Callable[..., Receiver], make_sink: MakeSink, make_event: Make, ca_file: str
) -> None:
    unknown, wrong = secured(), secured("somebody.example")
    failure = failure_of(make_sink(url=f"{unknown.url}/"), [make_event(1)])
    assert isinstance(failure, TransientFailure)
    assert "its certificate is not trusted: " in str(failure)
    failure = failure_of(make_sink(url=f"{wrong.url}/", tls={"ca": ca_file}), [make_event(1)])
    assert "IP address mismatch" in str(failure)
    assert unknown.requests == wrong.requests == []


def test_certificates_go_unchecked_only_when_told_and_not_without_a_word(
    secured: Callable[..., Receiver], make_sink: MakeSink, make_event: Make, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = secured("somebody.example")
    make_sink(url=f"{receiver.url}/", tls={"verify": False}).deliver([make_event(1)])
    assert seqs(receiver.taken) == [1]
    assert "certificate is not checked" in caplog.text


def _pair(authority: trustme.CA, directory: Path) -> tuple[str, str]:
    pair = authority.issue_cert("sender.example")
    cert, key = directory / "cert.pem", directory / "key.pem"
    cert.write_bytes(b"".join(blob.bytes() for blob in pair.cert_chain_pems))
    pair.private_key_pem.write_to_path(str(key))
    return str(cert), str(key)


def test_a_receiver_that_asks_for_a_certificate_is_shown_ours(
    authority: trustme.CA,
    secured: Callable[..., Receiver],
    make_sink: MakeSink,
    make_event: Make,
    ca_file: str,
    tmp_path: Path,
) -> None:
    receiver = secured(asks=authority)
    url = f"{receiver.url}/"
    without = failure_of(make_sink(url=url, tls={"ca": ca_file}), [make_event(1)])
    assert isinstance(without, TransientFailure)
    assert "TLS" in str(without)
    cert, key = _pair(authority, tmp_path)
    make_sink(url=url, tls={"ca": ca_file, "certificate": cert, "key": key}).deliver([make_event(2)])
    (request,) = receiver.taken
    assert request.certificate is not None
    assert ("DNS", "sender.example") in request.certificate["subjectAltName"]


def test_a_certificate_that_is_renewed_on_disk_is_used_after_the_next_failure(
    authority: trustme.CA,
    secured: Callable[..., Receiver],
    make_sink: MakeSink,
    make_event: Make,
    ca_file: str,
    tmp_path: Path,
) -> None:
    receiver = secured(asks=authority)
    cert, key = _pair(trustme.CA(), tmp_path)  # of an authority the receiver does not know
    sink = make_sink(url=f"{receiver.url}/", tls={"ca": ca_file, "certificate": cert, "key": key})
    assert isinstance(failure_of(sink, [make_event(1)]), TransientFailure)
    _pair(authority, tmp_path)
    sink.deliver([make_event(1)])
    assert seqs(receiver.taken) == [1]


@pytest.mark.parametrize("key", ["ca", "certificate"])
def test_files_that_cannot_be_used_are_named_and_waited_for(make_sink: MakeSink, tmp_path: Path, key: str) -> None:
    with pytest.raises(TransientFailure, match=rf"tls\.{key} cannot be used: No such file"):
        make_sink(url="https://hooks.example.com/", tls={key: str(tmp_path / "nowhere.pem")})


# -- addresses ----------------------------------------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """Name → its answers, look-up by look-up; the last one stays. What is not here is looked up for real."""
    known: dict[str, list[list[str]]] = {}
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, *arguments: Any, **options: Any) -> Any:
        if host not in known:
            return real(host, port, *arguments, **options)
        answers = known[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [entry for address in found for entry in real(address, port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["8.8.8.8", "10.0.0.7"], ["169.254.169.254"], ["::ffff:127.0.0.1"], ["0.0.0.0"]],  # noqa: S104
)
def test_a_name_that_leads_inside_is_not_followed(
    make_sink: MakeSink,
    make_event: Make,
    names: dict[str, list[list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    addresses: list[str],
) -> None:
    names["hooks.example.com"] = [addresses]
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("it was connected to"))
    failure = failure_of(make_sink(url="https://hooks.example.com/", allow_private=False), [make_event(1)])
    assert isinstance(failure, TransientFailure)
    assert str(failure).startswith("no connection to https://hooks.example.com: ")


def test_what_is_refused_says_what_would_allow_it(
    make_sink: MakeSink, make_event: Make, names: dict[str, list[list[str]]]
) -> None:
    names["hooks.example.com"] = [["10.0.0.7"]]
    failure = failure_of(make_sink(url="https://hooks.example.com/", allow_private=False), [make_event(1)])
    assert "10.0.0.7 is private (allow_private: true allows that, or a list with its network)" in str(failure)


def test_http_without_tls_does_not_leave_for_a_public_address(
    make_sink: MakeSink, make_event: Make, names: dict[str, list[list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names["hooks.example.com"] = [["8.8.8.8"]]
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("it was connected to"))
    failure = failure_of(make_sink(url="http://hooks.example.com/"), [make_event(1)])
    assert isinstance(failure, TransientFailure)
    assert "8.8.8.8 is public, which HTTP without TLS must not leave for" in str(failure)


def test_a_name_is_looked_up_once_and_what_was_checked_is_connected_to(
    secured: Callable[..., Receiver],
    make_sink: MakeSink,
    make_event: Make,
    names: dict[str, list[list[str]]],
    ca_file: str,
) -> None:
    receiver = secured("hooks.example.com")
    names["hooks.example.com"] = [["127.0.0.1"], ["192.0.2.1"]]
    url = f"https://hooks.example.com:{receiver.port}/"
    make_sink(url=url, tls={"ca": ca_file}, allow_private=["127.0.0.0/8"]).deliver([make_event(1)])
    (request,) = receiver.taken
    assert request.headers["host"] == f"hooks.example.com:{receiver.port}"
    assert names["hooks.example.com"] == [["192.0.2.1"]], "one look-up"


def test_other_addresses_of_a_name_are_tried(
    receiver: Receiver, make_sink: MakeSink, make_event: Make, names: dict[str, list[list[str]]]
) -> None:
    names["hooks.example.com"] = [["127.0.0.2", "127.0.0.1"]]  # nobody listens at the first
    make_sink(url=f"http://hooks.example.com:{receiver.port}/").deliver([make_event(1)])
    assert seqs(receiver.taken) == [1]


def test_a_name_that_does_not_exist_is_transient(make_sink: MakeSink, make_event: Make) -> None:
    failure = failure_of(make_sink(url="https://no-such-name.invalid/"), [make_event(1)])
    assert isinstance(failure, TransientFailure)
    assert "its name cannot be resolved" in str(failure)


# -- proxies ------------------------------------------------------------------------------------------------------


class Proxy:
    """One that connects every CONNECT, and answers every other request itself. Attributes: heads: of the requests."""

    def __init__(self, to: int, status: str = "200 Fine") -> None:
        self.heads: list[str] = []
        self._to, self._status = to, status
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listening.accept()
            head = b""
            while b"\r\n\r\n" not in head:
                came = connection.recv(65536)
                if not came:
                    break
                head += came
            if not head:  # the one that close() makes
                connection.close()
                return
            self.heads.append(head.decode())
            if not head.startswith(b"CONNECT") or not self._status.startswith("200"):
                connection.sendall(f"HTTP/1.1 {self._status}\r\nContent-Length: 0\r\n\r\n".encode())
                connection.close()
                continue
            connection.sendall(f"HTTP/1.1 {self._status}\r\n\r\n".encode())
            far = socket.create_connection(("127.0.0.1", self._to))
            for one, other in ((connection, far), (far, connection)):
                self._threads.append(threading.Thread(target=self._pump, args=(one, other)))
                self._threads[-1].start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while came := one.recv(65536):
                other.sendall(came)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        socket.create_connection(("127.0.0.1", self.port)).close()
        for thread in self._threads:
            thread.join()
        self._listening.close()


@pytest.fixture
def proxied(secured: Callable[..., Receiver]) -> Iterator[Callable[..., tuple[Receiver, Proxy]]]:
    proxies: list[Proxy] = []

    def start(**options: str) -> tuple[Receiver, Proxy]:
        receiver = secured("hooks.example.com")
        proxies.append(Proxy(receiver.port, **options))
        return receiver, proxies[-1]

    yield start
    for proxy in proxies:
        proxy.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the proxy's own sockets
def test_a_proxy_is_used_and_looks_names_up_itself(
    proxied: Callable[..., tuple[Receiver, Proxy]], make_sink: MakeSink, make_event: Make, ca_file: str
) -> None:
    receiver, proxy = proxied()
    sink = make_sink(
        url="https://hooks.example.com/in", tls={"ca": ca_file}, proxy=f"http://ann:pass%20word@127.0.0.1:{proxy.port}",
        allow_private=False,
    )  # fmt: skip
    sink.deliver([make_event(1)])
    sink.close()
    assert seqs(receiver.taken) == [1]
    (head,) = proxy.heads
    assert head.startswith("CONNECT hooks.example.com:443 HTTP/1.1\r\n")
    assert "Proxy-Authorization: Basic YW5uOnBhc3Mgd29yZA==" in head
    assert "proxy-authorization" not in receiver.taken[0].headers


def test_a_proxy_that_refuses_is_transient_and_its_password_is_not_told(
    proxied: Callable[..., tuple[Receiver, Proxy]], make_sink: MakeSink, make_event: Make
) -> None:
    _, proxy = proxied(status="407 pass-word")
    sink = make_sink(url="https://hooks.example.com/in", proxy=f"http://ann:pass-word@127.0.0.1:{proxy.port}")
    failure = failure_of(sink, [make_event(1)])
    assert isinstance(failure, TransientFailure)
    assert str(failure) == "the proxy refuses to connect to https://hooks.example.com"


def test_plain_http_goes_through_a_proxy_too(
    proxied: Callable[..., tuple[Receiver, Proxy]], make_sink: MakeSink, make_event: Make
) -> None:
    _, proxy = proxied()
    sink = make_sink(url="http://hooks.example.com/in", allow_http=True, proxy=f"http://127.0.0.1:{proxy.port}")
    sink.deliver([make_event(1)])
    assert proxy.heads[0].startswith("POST http://hooks.example.com:80/in HTTP/1.1\r\nHost: hooks.example.com\r\n")


# -- what is not said ---------------------------------------------------------------------------------------------


def test_no_failure_and_no_log_line_holds_a_secret_or_a_row(
    receiver: Receiver, make_sink: MakeSink, make_event: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "cdc")
    canary = "c4nary"
    echo = Answer(500, {"X-Echo": canary}, canary.encode())
    answers: list[Answer] = [
        echo,
        Answer(400, {"Retry-After": canary}, canary.encode()),
        Answer(301, {"Location": f"http://{canary}/"}),
        Answer(raw=f"{canary}\r\n".encode()),
        Answer(raw=f"HTTP/1.1 200 OK\r\n{canary}\r\n\r\n".encode()),
        Answer(cut=True),
        Answer(410, body=canary.encode()),
    ]
    errors: list[BaseException] = []
    sink = make_sink(
        url=f"{receiver.url}/{canary}?{canary}={canary}", headers={"X-Token": canary, "X-Row": "{key}"}, secret=OLD
    )
    for answer in answers:
        receiver.answer = lambda request, answer=answer: answer  # type: ignore[misc]
        errors.append(failure_of(sink, [make_event(1, text=canary)]))
    receiver.stop()
    errors.append(failure_of(sink, [make_event(1, text=canary)]))
    receiver.start()
    assert len({str(error) for error in errors}) > 5
    for error in errors:
        for said in (str(error), repr(error), str(error.__cause__), caplog.text):
            assert canary not in said
            assert OLD not in said
    assert canary not in repr(sink.options)
    assert OLD not in repr(sink.options)


# -- configuration ------------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"url": "https://hooks.example.com/in/{table}"}


@pytest.mark.parametrize(
    ("options", "finding"),
    [
        ({"url": "hooks.example.com"}, "not a URL"),
        ({"url": "ftp://hooks.example.com/"}, "not a URL"),
        ({"url": "https:///in"}, "not a URL"),
        ({"url": "https://[::1/"}, "not a URL"),
        ({"url": "https://hooks.example.com:99999/"}, "not a URL"),
        ({"url": "https://hooks.example.com:0/"}, "not a URL"),
        ({"url": "https://hööks.example.com/"}, "a character that no URL has"),
        ({"url": "https://hooks.example.com/a b"}, "a character that no URL has"),
        ({"url": "https://hooks.example.com\\@127.0.0.1/"}, "a character that no URL has"),
        ({"url": "https://{table}.example.com/"}, "a placeholder outside of the path"),
        ({"url": "https://hooks.example.com/?t={table}"}, "a placeholder outside of the path"),
        ({"url": "https://hooks.example.com/{tabel}"}, "a placeholder that does not exist"),
        ({"url": "https://ann:pw@hooks.example.com/"}, "a password in the URL"),
        ({"url": "https://hooks.example.com/#x"}, "a URL with a #"),
        ({"url": "http://hooks.example.com/"}, "HTTP without TLS"),
        ({"url": "http://127.0.0.1:8080/"}, "HTTP without TLS"),
        ({"url": "http://10.0.0.1/", "allow_private": True, "proxy": "http://127.0.0.1:3128"}, "HTTP without TLS"),
        ({"url": "http://8.8.8.8/", "allow_private": True}, "an address that is public"),
        ({"url": "https://a..b/"}, "not the name of a host"),
        ({"url": f"https://{'a' * 64}.example.com/"}, "not the name of a host"),
        ({"url": "https://a%2eb/"}, "not the name of a host"),
        ({"url": "https://127.0.0.1/"}, "an address that is private"),
        ({"url": "https://[::ffff:10.0.0.1]/"}, "an address that is private"),
        ({"url": "https://169.254.169.254/", "allow_private": True}, "an address that is not public"),
        ({"allow_private": "yes"}, "not a list of networks"),
        ({"allow_private": []}, "not a list of networks"),
        ({"allow_private": ["10.0.0.0/33"]}, "not a network"),
        ({"allow_private": ["10.0.0.1/8"]}, "not a network"),
        ({"headers": {"bad name": "x"}}, "not the name of a header"),
        ({"headers": {"Host": "x"}}, "a header that the sink makes itself"),
        ({"headers": {"Webhook-Id": "x"}}, "a header that the sink makes itself"),
        ({"headers": {"X-A": "line\r\nX-B: break"}}, "not the value of a header"),
        ({"headers": {"X-A": ""}}, "not the value of a header"),
        ({"headers": {"X-A": "{tabel}"}}, "a placeholder that does not exist"),
        ({"secret": "hunter2"}, "not a Standard Webhooks secret"),
        ({"secret": "whsec_c2hvcnQ="}, "not a Standard Webhooks secret"),
        ({"secret": "whsec_!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!!"}, "not a Standard Webhooks secret"),
        ({"secret": [OLD, NEW, OLD]}, "more than two secrets"),
        ({"secret": []}, "more than two secrets"),
        ({"proxy": "socks5://127.0.0.1:1080"}, "not a URL"),
        ({"proxy": "http://127.0.0.1:3128/path"}, "a proxy with a path"),
        ({"mode": "batch", "format": "cloudevents-binary"}, "its headers are one event's"),
        ({"batch_body": "lines"}, "batch_body without mode: batch"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_cure(options: dict[str, Any], finding: str) -> None:
    with pytest.raises(ValidationError) as raised:
        options_of(GOOD | options)
    (error,) = raised.value.errors(include_url=False, include_input=False)
    message = str(error["ctx"]["error"])
    assert finding in message
    assert re.search(r"\(.+\)$", message), "it says what would be right"
    for name in ("url", "secret", "proxy"):
        assert not isinstance(options.get(name), str) or options[name] not in message


@pytest.mark.parametrize(
    "options",
    [
        {"url": "http://127.0.0.1:8080/", "allow_private": True},
        {"url": "http://10.1.2.3/", "allow_private": ["10.1.0.0/16"]},
        {"url": "http://169.254.169.254/", "allow_private": ["169.254.169.254"]},
        {"url": "http://hooks.example.com/", "allow_http": True},
        {"url": "https://[2606:4700::1]:8443/x/{key}?a=b&c=d"},
        {"url": "https://hooks.example.com/{key.größe}", "headers": {"X-A": "{key.größe}"}},
        {"url": "https://hooks.example.com"},
        {"url": "https://10.0.0.1/", "proxy": "http://127.0.0.1:3128"},
        {"secret": OLD},
        {"secret": [OLD, NEW]},
        {"mode": "batch", "batch_body": "lines", "format": "cloudevents"},
        {"format": "cloudevents-binary"},
    ],
)
def test_a_right_configuration_is_accepted(options: dict[str, Any]) -> None:
    options_of(GOOD | options)


def test_the_path_of_a_url_without_one_is_the_root(receiver: Receiver, make_sink: MakeSink, make_event: Make) -> None:
    make_sink(url=receiver.url).deliver([make_event(1)])
    assert receiver.requests[0].path == "/"


# -- formats over HTTP --------------------------------------------------------------------------------------------


def test_the_cloudevents_sdk_reads_what_arrives_in_either_mode(
    receiver: Receiver, make_sink: MakeSink, make_event: Make
) -> None:
    event = make_event(1, table="odd ä", text="50 % \\u00e4")
    for form in ("cloudevents", "cloudevents-binary"):
        make_sink(format=form, url=f"{receiver.url}/").deliver([event])
    structured, binary = receiver.taken
    assert structured.headers["content-type"] == "application/cloudevents+json"
    assert "ce-id" not in structured.headers
    assert binary.headers["content-type"] == "application/json"
    assert binary.body.decode() == event.to_json()
    for request in (structured, binary):
        read = from_http_event(HTTPMessage(request.headers, request.body))
        assert (read.get_id(), read.get_source()) == (event.id, "/shop/public/odd%20%C3%A4")
        assert (read.get_type(), read.get_subject()) == ("cdc.insert", '{"id":1}')
        assert read.get_time() == event.source.ts
        assert read.get_data() == json.loads(event.to_json())


def test_a_batch_of_cloudevents_has_its_own_media_type(
    receiver: Receiver, make_sink: MakeSink, make_event: Make
) -> None:
    make_sink(format="cloudevents", mode="batch").deliver([make_event(1), make_event(2)])
    (request,) = receiver.taken
    assert request.headers["content-type"] == "application/cloudevents-batch+json"
    for number, part in enumerate(json.loads(request.body), 1):
        message = HTTPMessage({"content-type": "application/cloudevents+json"}, json.dumps(part).encode())
        assert from_http_event(message).get_id() == make_event(number).id
