"""The Redis sink: what stands in a stream, what a server may answer, clusters, and addresses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
from authority import Authority
from harness import until
from pydantic import ValidationError
from redis._parsers.base import BaseParser
from service import Service, free_port, needed

from cdc.encoding import Encoder
from cdc.errors import PartialFailure, PermanentFailure, TransientFailure
from cdc.event import Event
from cdc.sinks.redis import RedisOptions, RedisSink

Make = Callable[..., Event]
SECRET = "4929-1234-5678"


class Server:
    """A Redis of the test's own, and a client of it."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.port = free_port()
        command = [
            *(needed("redis-server"), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(directory)),
            *("--save", "", "--appendonly", "yes", *options),
        ]
        self.service = Service(command, self.port, directory / "log")
        self.client = redis.Redis(port=self.port, decode_responses=True)

    def close(self) -> None:
        self.client.close()
        self.service.kill()

    def ids(self, stream: str = "cdc:public.orders") -> list[str]:
        """Of the events in a stream, in its order."""
        return [fields["id"] for _, fields in self.client.xrange(stream)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path)
    yield made
    made.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., RedisSink]]:
    """``connect(server, **options)``: a sink, closed after the test."""
    made: list[RedisSink] = []

    def make(server: Server | None, encoder: Encoder | None = None, **options: object) -> RedisSink:
        where = {} if server is None else {"host": "127.0.0.1", "port": server.port}
        given = {"type": "redis", "timeout": "5s", **where, **options}
        made.append(RedisSink("cache", RedisOptions.model_validate(given), encoder))
        return made[-1]

    yield make
    for sink in made:
        sink.close()


def transient(sink: RedisSink, batch: Sequence[Event]) -> str:
    """What the sink says of a batch it cannot deliver for now."""
    with pytest.raises(TransientFailure) as raised:
        sink.deliver(batch)
    assert SECRET not in str(raised.value)
    assert raised.value.__cause__ is None
    return str(raised.value)


# -- streams and channels -----------------------------------------------------------------------------------------


def test_an_entry_says_what_and_where_and_holds_the_event(
    server: Server, connect: Callable[..., RedisSink], make_event: Make
) -> None:
    event = make_event(1)
    connect(server).deliver([event])
    ((_, fields),) = server.client.xrange("cdc:public.orders")
    assert list(fields.items()) == [
        ("id", event.id),
        ("op", "insert"),
        ("database", "shop"),
        ("schema", "public"),
        ("table", "orders"),
        ("event", event.to_json()),
    ]


def test_what_a_format_has_beside_the_text_stands_beside_it(
    server: Server, connect: Callable[..., RedisSink], make_event: Make
) -> None:
    class Decorated(Encoder):
        def headers(self, event: Event) -> Mapping[str, str]:
            return {"ce-type": "made"}

    connect(server, Decorated()).deliver([make_event(1)])
    ((_, fields),) = server.client.xrange("cdc:public.orders")
    assert fields["ce-type"] == "made"


def test_streams_are_named_by_the_event_and_each_is_in_order(
    server: Server, connect: Callable[..., RedisSink], make_event: Make
) -> None:
    events = [make_event(seq, key=seq % 3, table="a b" if seq % 2 else "ü") for seq in range(1, 41)]
    connect(server, stream="{database}/{table}/{key.id}").deliver(events)
    for table in ("a b", "ü"):
        for key in range(3):
            expected = [e.id for e in events if e.source.table == table and e.key == {"id": key}]
            assert server.ids(f"shop/{table}/{key}") == expected


@pytest.mark.parametrize(
    ("database", "schema", "table", "name"),
    [
        ("shop", "public", "orders", "cdc:shop:public.orders"),
        ("shop-2", "my schema", "größe_1", "cdc:shop-2:my schema.größe_1"),
        ("shop", "a", "b.c", "cdc:shop:a.b%2Ec"),
        ("shop", "a.b", "c", "cdc:shop:a%2Eb.c"),
        ("a:b", "{x}", "50%", "cdc:a%3Ab:%7Bx%7D.50%25"),
    ],
)
def test_no_name_says_more_than_what_it_is(
    server: Server,
    connect: Callable[..., RedisSink],
    make_event: Make,
    database: str,
    schema: str,
    table: str,
    name: str,
) -> None:
    event = make_event(1, table=table)
    source = event.source.model_copy(update={"database": database, "schema_name": schema})
    connect(server, stream="cdc:{database}:{schema}.{table}").deliver([event.model_copy(update={"source": source})])
    assert server.client.keys() == [name]


def test_a_key_stands_in_a_name_as_the_json_it_is_and_a_column_as_a_word(
    server: Server, connect: Callable[..., RedisSink], make_event: Make
) -> None:
    event = Event.from_json(make_event(1).to_json().replace('"key":{"id":1}', '"key":{"id":"a.b:c"}'))
    connect(server, stream="{table}:{key}:{key.id}:{id}").deliver([event])
    assert server.client.keys() == ['orders:{"id":"a.b:c"}:a%2Eb%3Ac:shop-1-1']


def test_a_stream_is_cut_roughly_to_its_length(
    server: Server, connect: Callable[..., RedisSink], make_event: Make
) -> None:
    connect(server, maxlen=100).deliver([make_event(seq) for seq in range(1, 2001)])
    ids = server.ids()
    assert 100 <= len(ids) < 400
    assert ids == [f"shop-{seq}-1" for seq in range(2001 - len(ids), 2001)]


def test_who_listens_to_a_channel_hears_the_events_in_order(
    server: Server, connect: Callable[..., RedisSink], make_event: Make
) -> None:
    sink = connect(server, mode="pubsub", channel="news.{table}")
    sink.deliver([make_event(1)])  # nobody hears it, and nobody is told
    listener = server.client.pubsub()
    listener.psubscribe("news.*")
    assert (listener.get_message(timeout=5) or {})["type"] == "psubscribe"
    events = [make_event(seq) for seq in range(2, 12)]
    sink.deliver(events)
    heard = [listener.get_message(timeout=5) or {} for _ in events]
    listener.close()
    assert [(message["channel"], message["data"]) for message in heard] == [
        ("news.orders", event.to_json()) for event in events
    ]


# -- what a server may answer -------------------------------------------------------------------------------------


def test_a_server_without_memory_takes_nothing_of_a_batch(
    server: Server, connect: Callable[..., RedisSink], make_event: Make
) -> None:
    sink = connect(server)
    batch = [make_event(seq, text=SECRET) for seq in range(1, 11)]
    server.client.config_set("maxmemory", 1)
    assert transient(sink, batch) == (
        f"redis at 127.0.0.1:{server.port} is out of memory (trim streams with maxlen, or raise maxmemory)"
    )
    server.client.config_set("maxmemory", 0)
    assert server.ids() == []
    sink.deliver(batch)
    assert server.ids() == [event.id for event in batch]


def test_a_replica_is_not_written_to(server: Server, connect: Callable[..., RedisSink], make_event: Make) -> None:
    sink = connect(server)
    sink.deliver([make_event(1)])
    server.client.replicaof("127.0.0.1", "1")
    assert "is a read-only replica (name the primary)" in transient(sink, [make_event(2)])
    server.client.replicaof("NO", "ONE")
    sink.deliver([make_event(2)])
    assert server.ids() == ["shop-1-1", "shop-2-1"]


def test_a_user_without_the_right_is_told_so(
    server: Server, connect: Callable[..., RedisSink], make_event: Make
) -> None:
    server.client.acl_setuser("cdc", enabled=True, passwords=[f"+{SECRET}"], commands=["+multi", "+exec"])
    sink = connect(server, username="cdc", password=SECRET)
    assert "gives us no right to do this" in transient(sink, [make_event(1)])
    server.client.execute_command("ACL SETUSER", "cdc", "+xadd", "~cdc:*")
    sink.deliver([make_event(1)])  # although it may not ask what the server takes
    assert server.ids() == ["shop-1-1"]


def test_a_missing_password_is_asked_for(server: Server, connect: Callable[..., RedisSink], make_event: Make) -> None:
    server.client.config_set("requirepass", SECRET)
    assert "refuses us without a password" in transient(connect(server), [make_event(1)])
    wrong = connect(server, password=f"{SECRET}9")
    assert "refuses the credentials (check username and password)" in transient(wrong, [make_event(1)])
    connect(server, password=SECRET).deliver([make_event(1)])


def test_a_name_that_is_no_stream_fails_alone(
    server: Server, connect: Callable[..., RedisSink], make_event: Make
) -> None:
    server.client.set("cdc:2", "not a stream")
    sink = connect(server, stream="cdc:{key.id}")
    with pytest.raises(PartialFailure) as raised:
        sink.deliver([make_event(seq, key=seq % 3, text=SECRET) for seq in range(1, 7)])
    failures = raised.value.failures
    assert sorted(failures) == [1, 4]
    for failure in failures.values():
        assert isinstance(failure, TransientFailure)
        assert "has something else under the name of a stream" in str(failure)
        assert SECRET not in str(failure)
    assert server.ids("cdc:1") == ["shop-1-1", "shop-4-1"]


def test_an_event_above_the_servers_limit_is_refused_before_anything_is_sent(
    server: Server, connect: Callable[..., RedisSink], make_event: Make
) -> None:
    server.client.config_set("proto-max-bulk-len", 2**20)
    sink = connect(server)
    with pytest.raises(PermanentFailure, match="the server takes 1048576 at most"):
        sink.deliver([make_event(1), make_event(2, text="ü" * 2**19)])
    assert server.ids() == []


def test_a_connection_that_was_closed_meanwhile_is_no_failure(
    server: Server, connect: Callable[..., RedisSink], make_event: Make
) -> None:
    sink = connect(server)
    sink.deliver([make_event(1)])
    server.client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
    until(lambda: len(server.client.client_list()) == 1, "it is closed")
    sink.deliver([make_event(2)])
    assert server.ids() == ["shop-1-1", "shop-2-1"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("LOADING Redis is loading the dataset in memory", "is still loading its data"),
        ("BUSY Redis is busy running a script.", "is busy with a script"),
        ("MISCONF Redis is configured to save RDB snapshots", "cannot write its data to disk"),
        ("NOREPLICAS Not enough good replicas to write.", "has fewer replicas than min-replicas-to-write asks for"),
        ("MASTERDOWN Link with MASTER is down", "is a replica without its primary"),
        ("CLUSTERDOWN Hash slot not served", "says that the cluster is down"),
        ("MOVED 866 127.0.0.1:7001", "is part of a cluster (set cluster: true)"),
        ("ERR unknown command 'XADD', with args beginning with: " + SECRET, "answered with ERR"),
        (f"-{SECRET}", "answered with ResponseError"),
    ],
)
def test_what_a_server_answers_is_put_into_our_words(connect: Callable[..., RedisSink], answer: str, said: str) -> None:
    error = BaseParser.parse_error(answer)
    failure = str(connect(None)._failure(error))
    assert failure.startswith(f"redis at localhost:6379 {said}")
    assert SECRET not in failure


# -- clusters -----------------------------------------------------------------------------------------------------


class Cluster:
    """Two nodes with half of the slots each."""

    def __init__(self, directory: Path) -> None:
        self.nodes: list[Server] = []
        for name in ("a", "b"):
            (directory / name).mkdir()
            self.nodes.append(
                Server(
                    directory / name,
                    *("--cluster-enabled", "yes", "--cluster-port", str(free_port())),
                    *("--cluster-require-full-coverage", "no", "--cluster-node-timeout", "60000"),
                )
            )
        a, b = (node.client for node in self.nodes)
        a.execute_command("CLUSTER ADDSLOTSRANGE", 0, 8191)
        b.execute_command("CLUSTER ADDSLOTSRANGE", 8192, 16383)
        bus = b.config_get("cluster-port")["cluster-port"]
        a.execute_command("CLUSTER MEET", "127.0.0.1", self.nodes[1].port, bus)
        until(lambda: all(self._is_ready(client) for client in (a, b)), "the nodes know each other")

    @staticmethod
    def _is_ready(client: Any) -> bool:
        info = client.execute_command("CLUSTER INFO")
        return bool(info["cluster_slots_assigned"] == "16384" and info["cluster_state"] == "ok")

    def close(self) -> None:
        for node in self.nodes:
            node.close()

    def node_of(self, stream: str) -> Server:
        """Where a stream belongs before anything was moved."""
        slot = int(self.nodes[0].client.execute_command("CLUSTER KEYSLOT", stream))
        return self.nodes[slot // 8192]

    def move(self, stream: str) -> Server:
        """Move a stream, and its slot, to the other node, which is returned."""
        slot = int(self.nodes[0].client.execute_command("CLUSTER KEYSLOT", stream))
        source = self.node_of(stream)
        (target,) = (node for node in self.nodes if node is not source)
        names = {node: node.client.execute_command("CLUSTER MYID") for node in self.nodes}
        target.client.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", names[source])
        source.client.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", names[target])
        source.client.execute_command("MIGRATE", "127.0.0.1", target.port, stream, 0, 5000)
        for node in (target, source):
            node.client.execute_command("CLUSTER SETSLOT", slot, "NODE", names[target])
        return target


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(tmp_path)
    yield made
    made.close()


def test_a_cluster_takes_each_stream_where_it_belongs(
    cluster: Cluster, connect: Callable[..., RedisSink], make_event: Make
) -> None:
    sink = connect(cluster.nodes[0], cluster=True, stream="cdc:{key.id}")
    events = [make_event(seq, key=seq % 8) for seq in range(1, 81)]
    sink.deliver(events)
    for key in range(8):
        stream = f"cdc:{key}"
        assert cluster.node_of(stream).ids(stream) == [event.id for event in events if event.key == {"id": key}]
    assert {cluster.node_of(f"cdc:{key}").port for key in range(8)} == {node.port for node in cluster.nodes}


def test_a_stream_that_moves_is_followed_in_order(
    cluster: Cluster, connect: Callable[..., RedisSink], make_event: Make
) -> None:
    sink = connect(cluster.nodes[0], cluster=True)
    sink.deliver([make_event(seq) for seq in range(1, 11)])
    target = cluster.move("cdc:public.orders")
    sink.deliver([make_event(seq) for seq in range(11, 21)])
    assert target.ids() == [f"shop-{seq}-1" for seq in range(1, 21)]


def test_a_node_that_is_down_holds_back_its_own_streams_only(
    cluster: Cluster, connect: Callable[..., RedisSink], make_event: Make
) -> None:
    there = f"127.0.0.1:{cluster.nodes[0].port}"
    sink = connect(cluster.nodes[1], cluster=True, nodes=(there,), stream="cdc:{key.id}", timeout="1s")
    sink.open()
    events = [make_event(seq, key=seq % 8, text=SECRET) for seq in range(1, 25)]
    down = cluster.nodes[1]
    theirs = [i for i, event in enumerate(events) if cluster.node_of(f"cdc:{event.key['id']}") is down]  # type: ignore[index]
    down.service.kill()
    with pytest.raises(PartialFailure) as raised:
        sink.deliver(events)
    assert sorted(raised.value.failures) == theirs
    assert all(isinstance(failure, TransientFailure) for failure in raised.value.failures.values())
    assert SECRET not in "".join(map(str, raised.value.failures.values()))
    down.service.start()

    def rest_is_taken() -> bool:
        try:
            sink.deliver([events[index] for index in theirs])
        except (TransientFailure, PartialFailure):
            return False
        return True

    until(rest_is_taken, "the rest is taken")
    for key in range(8):
        expected = [event.id for event in events if event.key == {"id": key}]
        assert cluster.node_of(f"cdc:{key}").ids(f"cdc:{key}")[-len(expected) :] == expected


def test_a_cluster_that_is_not_called_one_says_so(
    cluster: Cluster, connect: Callable[..., RedisSink], make_event: Make
) -> None:
    elsewhere = next(node for node in cluster.nodes if node is not cluster.node_of("cdc:public.orders"))
    assert "is part of a cluster (set cluster: true)" in transient(connect(elsewhere), [make_event(1)])


def test_no_node_of_a_cluster_that_can_be_reached(connect: Callable[..., RedisSink], make_event: Make) -> None:
    sink = connect(None, host="127.0.0.1", port=1, cluster=True)
    assert transient(sink, [make_event(1)]) == "redis at 127.0.0.1:1 cannot be reached: Connection refused"


# -- TLS and addresses ----------------------------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def encrypted(tmp_path: Path, authority: Authority) -> Iterator[Server]:
    """A server that speaks TLS only, and wants to know its clients."""
    made = Server(tmp_path, "--tls-port", "0")
    made.client.config_set("tls-cert-file", str(authority.server))
    made.close()
    port = free_port()
    made.port = port
    made.service = Service(
        [
            *(needed("redis-server"), "--port", "0", "--bind", "127.0.0.1", "--dir", str(tmp_path), "--save", ""),
            *("--tls-port", str(port), "--tls-auth-clients", "yes", "--tls-ca-cert-file", str(authority.ca)),
            *("--tls-cert-file", str(authority.server), "--tls-key-file", str(authority.server_key)),
        ],
        port,
        tmp_path / "log",
    )
    yield made
    made.service.kill()


def test_tls_with_certificates_on_both_sides(
    encrypted: Server, authority: Authority, connect: Callable[..., RedisSink], make_event: Make
) -> None:
    ours = {"certificate": str(authority.client), "key": str(authority.client_key)}
    connect(encrypted, tls={"ca": str(authority.ca), **ours}).deliver([make_event(1)])
    connect(None, url=f"rediss://127.0.0.1:{encrypted.port}", tls={"verify": False, **ours}).deliver([make_event(2)])
    assert "certificate verify failed" in transient(connect(encrypted, tls=ours), [make_event(3)]).lower()
    assert "cannot be reached" in transient(connect(encrypted), [make_event(3)])
    missing = connect(encrypted, tls={"ca": "/nowhere/ca.pem"})
    assert transient(missing, [make_event(3)]) == "tls.ca cannot be used: No such file or directory"
    nonsense = connect(encrypted, tls={"certificate": str(authority.client_key)})
    assert transient(nonsense, [make_event(3)]) == "tls.certificate cannot be used: not what it should be, in PEM"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://db1", ("db1", 6379, 0, None, None, False, None)),
        ("redis://db1:7000/3", ("db1", 7000, 3, None, None, False, None)),
        ("rediss://cdc:a%40b%2Fc@db1/", ("db1", 6379, 0, "cdc", "a@b/c", True, None)),
        ("redis://:secret@[::1]:7000", ("::1", 7000, 0, None, "secret", False, None)),
        ("unix:///run/redis.sock", ("", 0, 0, None, None, False, "/run/redis.sock")),
    ],
)
def test_a_url_says_where_and_who(url: str, address: tuple[object, ...]) -> None:
    assert RedisOptions.model_validate({"type": "redis", "url": url}).address == address


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": f"http://u:{SECRET}@h"}, "not a Redis URL"),
        ({"url": f"redis://u:{SECRET}@h:port"}, "not a Redis URL"),
        ({"url": f"redis://u:{SECRET}@h/x"}, "not a Redis URL"),
        ({"url": f"redis://u:{SECRET}@"}, "not a Redis URL"),
        ({"url": f"redis://h?password={SECRET}"}, "options after"),
        ({"url": f"redis://u:{SECRET}@h", "port": 1}, "url, and port beside it"),
        ({"cluster": True, "mode": "pubsub"}, "every node passes a message on to all"),
        ({"cluster": True, "db": 1}, "a cluster has neither"),
        ({"mode": "pubsub", "stream": "x"}, "stream, and mode: pubsub (leave stream out)"),
        ({"mode": "pubsub", "maxlen": 1}, "maxlen, and mode: pubsub (leave maxlen out)"),
        ({"channel": "x"}, "channel, and mode: stream (leave channel out)"),
        ({"stream": "{nothing}"}, "a placeholder that does not exist"),
        ({"tls": {"key": "x"}}, "key without certificate"),
        ({"nodes": ("db2:6379",)}, "nodes, and not cluster: true"),
        ({"cluster": True, "nodes": ("db2",)}, "not a node (write host:port)"),
    ],
)
def test_what_does_not_fit_together_is_refused_without_its_value(options: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError) as raised:
        RedisOptions.model_validate({"type": "redis", **options})
    assert said in str(raised.value)
    assert SECRET not in str(raised.value)


def test_secrets_are_not_shown() -> None:
    for options in ({"url": f"redis://u:{SECRET}@h"}, {"username": "u", "password": SECRET}):
        sink = RedisSink("cache", RedisOptions.model_validate({"type": "redis", **options}))
        assert SECRET not in repr(sink.options) + str(sink.options.address)
        with contextlib.closing(sink):
            assert sink.options.address.password == SECRET
