"""Kafka brokers that fail to order: librdkafka's own mock cluster, which answers with the errors it is given.

It speaks the protocol over real sockets and keeps what it is sent. It does not check sequence numbers, credentials or
rights; what a broker does by itself is tested on a real one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import confluent_kafka

PRODUCE = 0
"""ApiKey of a request to append."""
INIT_PRODUCER_ID = 22

NO_ERROR = 0
NOT_LEADER = 6
MSG_SIZE_TOO_LARGE = 10
NOT_ENOUGH_REPLICAS = 19
TOPIC_AUTHORIZATION_FAILED = 29
OUT_OF_ORDER_SEQUENCE_NUMBER = 45
INVALID_PRODUCER_EPOCH = 47
INVALID_RECORD = 87


def _library() -> ctypes.CDLL:
    """The librdkafka that confluent_kafka itself uses."""
    (path,) = (Path(confluent_kafka.__file__).parents[1] / "confluent_kafka.libs").glob("librdkafka*.so*")
    library = ctypes.CDLL(str(path))
    for name in ("rd_kafka_conf_new", "rd_kafka_new", "rd_kafka_mock_cluster_new"):
        getattr(library, name).restype = ctypes.c_void_p
    library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
    return library


class MockKafka:
    """A running mock cluster.

    Attributes:
        brokers: ``host:port`` of each.
    """

    def __init__(self, library: ctypes.CDLL, cluster: ctypes.c_void_p) -> None:
        self._library = library
        self._cluster = cluster
        self.brokers: list[str] = library.rd_kafka_mock_cluster_bootstraps(cluster).decode().split(",")

    def create(self, topic: str, partitions: int = 1) -> None:
        """Make a topic; one that is produced to is made by itself, with four partitions."""
        assert self._library.rd_kafka_mock_topic_create(self._cluster, topic.encode(), partitions, 1) == NO_ERROR

    def deny(self, topic: str, error: int) -> None:
        """Answer questions about a topic with an error; NO_ERROR: no longer."""
        self._library.rd_kafka_mock_topic_set_error(self._cluster, topic.encode(), error)

    def answer(self, api: int, *errors: int) -> None:
        """Answer the next requests of a kind with these errors, one each; NO_ERROR lets one through."""
        array = (ctypes.c_int * len(errors))(*errors)
        self._library.rd_kafka_mock_push_request_errors_array(
            self._cluster, ctypes.c_int16(api), ctypes.c_size_t(len(errors)), array
        )

    def slow_down(self, milliseconds: int) -> None:
        """Let every broker take so long for every answer."""
        for broker in range(1, len(self.brokers) + 1):
            self._library.rd_kafka_mock_broker_set_rtt(self._cluster, broker, milliseconds)

    def down(self) -> None:
        """Let every broker be gone."""
        for broker in range(1, len(self.brokers) + 1):
            self._library.rd_kafka_mock_broker_set_down(self._cluster, broker)

    def up(self) -> None:
        """Bring them back."""
        for broker in range(1, len(self.brokers) + 1):
            self._library.rd_kafka_mock_broker_set_up(self._cluster, broker)

    def lead(self, topic: str, partition: int, broker: int) -> None:
        """Move the leadership of a partition."""
        self._library.rd_kafka_mock_partition_set_leader(self._cluster, topic.encode(), partition, broker)


@contextmanager
def mock_kafka(brokers: int = 1) -> Iterator[MockKafka]:
    """A cluster for as long as the block lasts."""
    library = _library()
    text = ctypes.create_string_buffer(512)
    configuration = ctypes.c_void_p(library.rd_kafka_conf_new())
    library.rd_kafka_conf_set(configuration, b"log_level", b"0", text, ctypes.c_size_t(len(text)))
    client = ctypes.c_void_p(library.rd_kafka_new(0, configuration, text, ctypes.c_size_t(len(text))))
    assert client, text.value
    cluster = ctypes.c_void_p(library.rd_kafka_mock_cluster_new(client, brokers))
    try:
        yield MockKafka(library, cluster)
    finally:
        library.rd_kafka_mock_cluster_destroy(cluster)
        library.rd_kafka_destroy(client)
