"""A small shop that is always busy, and the ledger that holds its every change against what was delivered.

The shop writes like an application does: transactions of one to a handful of rows, now and then one that is rolled
back, a sale that touches many rows at once. It counts its own rows, by transaction, table and op; the ledger strikes
them off as they are delivered, so that at the end nothing has to be taken on trust.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from decimal import Decimal
from random import Random

from cdc.connection import Connection
from cdc.errors import CdcError
from cdc.event import Event, Op

SCHEMA = """
create type order_status as enum ('new', 'paid', 'shipped');
create table customers (
  id bigint generated always as identity primary key,
  name text not null,
  email text not null unique,
  tags text[] not null default '{}',
  address jsonb not null,
  signed_up_at timestamptz not null default now()
);
create table products (
  id bigint generated always as identity primary key,
  name text not null,
  price numeric(10, 2) not null check (price > 0)
);
create table orders (
  id bigint generated always as identity (start with 1001) primary key,
  customer_id bigint not null references customers,
  status order_status not null default 'new',
  total numeric(12, 2) not null,
  tracking text,
  placed_at timestamptz not null default now()
);
create index orders_status on orders (status, id);
create table order_items (
  order_id bigint not null references orders,
  product_id bigint not null references products,
  quantity integer not null check (quantity > 0),
  price numeric(10, 2) not null,
  primary key (order_id, product_id)
);
"""
TABLES = ("customers", "products", "orders", "order_items")

_PRODUCTS = {
    "Espresso cup": "9.50",
    "Moka pot": "34.00",
    "Hand grinder": "79.90",
    "Kettle": "54.00",
    "Paper filters": "4.20",
    "House blend, 1 kg": "24.80",
    "Single origin, 250 g": "11.40",
    "Milk jug": "18.00",
    "Scale": "39.50",
    "Travel mug": "21.00",
}
_FIRST = ("Ada", "Grace", "Edsger", "Barbara", "Donald", "Radia", "Ken", "Frances", "Niklaus", "Margaret", "Zoë")
_LAST = ("Novak", "Okafor", "Lindqvist", "Tanaka", "Moreau", "Silva", "Haddad", "Keller", "Byrne", "Castillo")
_CITIES = ("Lisbon", "Kraków", "Osaka", "Nairobi", "Montréal", "Graz", "Valparaíso", "Utrecht")
_TAGS = ("newsletter", "vip", "wholesale", "gift")

SALE_EVERY = 40
"""Actions between two bulk updates."""
LATEST = 1.0
"""Seconds the workload may fall behind its rate before it gives the rest up."""

Counts = Counter[tuple[str, Op]]
"""Rows changed, by table and op."""


class Ledger:
    """What was committed, against what was delivered. May be used from any thread."""

    def __init__(self) -> None:
        self.changes = 0
        self.transactions = 0
        self.rollbacks = 0
        self.arrivals: Counter[Op] = Counter()
        """Events delivered, whoever made the change, by op."""
        self._lock = threading.Lock()
        self._open: Counter[tuple[int, str, Op]] = Counter()
        self._ours: set[int] = set()
        self._undone: set[int] = set()

    def committed(self, txid: int, counts: Counts) -> None:
        """A transaction was committed, with these rows."""
        with self._lock:
            self.changes += counts.total()
            self.transactions += 1
            self._ours.add(txid)
            for (table, op), count in counts.items():
                self._book((txid, table, op), count)

    def rolled_back(self, txid: int) -> None:
        """A transaction was rolled back: nothing of it may arrive."""
        with self._lock:
            self.rollbacks += 1
            self._undone.add(txid)

    def arrived(self, event: Event) -> None:
        """An event was delivered; it may come before the workload has heard that its commit succeeded."""
        with self._lock:
            self.arrivals[event.op] += 1
            self._book((event.source.txid, event.source.table, event.op), -1)

    def missing(self) -> Counts:
        """What was committed and has not arrived."""
        with self._lock:
            return self._sum(lambda txid, balance: balance)

    def phantoms(self) -> int:
        """How many changes arrived although their transaction was rolled back."""
        with self._lock:
            return self._sum(lambda txid, balance: -balance if txid in self._undone else 0).total()

    def repeats(self) -> int:
        """How many more times than once changes of the workload arrived."""
        with self._lock:
            return self._sum(lambda txid, balance: -balance if txid in self._ours else 0).total()

    def foreign(self) -> int:
        """How many changes arrived that somebody else made."""
        with self._lock:
            known = self._ours | self._undone
            return self._sum(lambda txid, balance: 0 if txid in known else -balance).total()

    def _sum(self, part: Callable[[int, int], int]) -> Counts:
        sums: Counts = Counter()
        for (txid, table, op), balance in self._open.items():
            sums[table, op] += max(0, part(txid, balance))
        return +sums

    def _book(self, entry: tuple[int, str, Op], change: int) -> None:
        self._open[entry] += change
        if not self._open[entry]:
            del self._open[entry]


class Shop:
    """The application: each method is what happens in one transaction, and returns the rows it changed."""

    def __init__(self, connection: Connection, random: Random) -> None:
        self._connection = connection
        self._random = random

    def furnish(self) -> None:
        """Make the tables, with a few rows that are there before anybody captures anything."""
        self._connection.execute(SCHEMA)
        for name, price in _PRODUCTS.items():
            self._connection.execute("insert into products (name, price) values (%s, %s)", (name, Decimal(price)))
        for _ in range(8):
            self.sign_up()

    def sign_up(self) -> Counts:
        first, last = self._random.choice(_FIRST), self._random.choice(_LAST)
        address = {"city": self._random.choice(_CITIES), "postcode": str(self._random.randint(1000, 99999))}
        return self._count(
            ("customers", Op.INSERT),
            "insert into customers (name, email, tags, address)"
            " select %s, format('%%s%%s@example.com', %s, coalesce(max(id), 0) + 1), %s::text[], %s::jsonb"
            " from customers returning id",
            f"{first} {last}",
            last.lower(),
            self._random.sample(_TAGS, self._random.randint(0, 2)),
            json.dumps(address, ensure_ascii=False),
        )

    def place_order(self) -> Counts:
        products = self._connection.query("select id, price from products")
        customers = self._connection.query("select id from customers order by id desc limit 50")
        if not products or not customers:  # somebody has joined in
            return self.sign_up()
        items = [
            (product, self._random.choice((1, 1, 1, 2, 3)), price)
            for product, price in self._random.sample(products, min(len(products), self._random.choice((1, 1, 2, 3))))
        ]
        (customer,) = self._random.choice(customers)
        ((order,),) = self._connection.query(
            "insert into orders (customer_id, total) values (%s, %s) returning id",
            (customer, sum(quantity * price for _, quantity, price in items)),
        )
        counts: Counts = Counter({("orders", Op.INSERT): 1})
        for product, quantity, price in items:
            counts += self._count(
                ("order_items", Op.INSERT),
                "insert into order_items (order_id, product_id, quantity, price) values (%s, %s, %s, %s) returning 1",
                order,
                product,
                quantity,
                price,
            )
        return counts

    def pay(self) -> Counts:
        return self._count(
            ("orders", Op.UPDATE),
            "update orders set status = 'paid'"
            " where id in (select id from orders where status = 'new' order by id limit 1) returning id",
        )

    def ship(self) -> Counts:
        return self._count(
            ("orders", Op.UPDATE),
            "update orders set status = 'shipped', tracking = %s"
            " where id in (select id from orders where status = 'paid' order by id limit 1) returning id",
            f"1Z{self._random.randrange(10**8):08}",
        )

    def change_price(self) -> Counts:
        return self._reprice([self._random.randint(1, len(_PRODUCTS))])

    def sale(self) -> Counts:
        """One statement, many rows."""
        return self._reprice(self._random.sample(range(1, len(_PRODUCTS) + 1), len(_PRODUCTS) // 2))

    def move_house(self) -> Counts:
        city = self._random.choice(_CITIES)
        return self._count(
            ("customers", Op.UPDATE),
            "update customers set address = jsonb_set(address, '{city}', to_jsonb(%s::text))"
            " where id = (select max(id) from customers) and address ->> 'city' <> %s returning id",
            city,
            city,
        )

    def cancel(self) -> Counts:
        orders = self._connection.query("select id from orders where status = 'new' order by id limit 1")
        counts: Counts = Counter()
        for (order,) in orders:
            counts += self._count(
                ("order_items", Op.DELETE), "delete from order_items where order_id = %s returning 1", order
            )
            counts += self._count(("orders", Op.DELETE), "delete from orders where id = %s returning id", order)
        return counts

    def _reprice(self, products: list[int]) -> Counts:
        # Down from 90 and up from 5, so that prices stay believable however long this runs.
        return self._count(
            ("products", Op.UPDATE),
            "update products set price ="
            " round(price * case when price < 5 then 1.25 when price > 90 then 0.8 else %s end, 2)"
            " where id = any (%s) returning id",
            self._random.choice((Decimal("0.9"), Decimal("0.95"), Decimal("1.05"), Decimal("1.1"))),
            products,
        )

    def _count(self, kind: tuple[str, Op], sql: str, *arguments: object) -> Counts:
        return Counter({kind: len(self._connection.query(sql, arguments))})


class Workload(threading.Thread):
    """The thread that keeps the shop busy until told to stop; it finishes the transaction in its hands.

    Attributes:
        error: why it has ended by itself, or None.
    """

    def __init__(self, dsn: str, *, rate: float, ledger: Ledger, random: Random) -> None:
        """
        Args:
            dsn: where :meth:`Shop.furnish` has made the tables.
            rate: changes per second to aim at.
            ledger: told of every transaction.
            random: what happens next.
        """
        super().__init__(name="workload", daemon=True)
        self.error: CdcError | None = None
        self._dsn = dsn
        self._rate = rate
        self._ledger = ledger
        self._random = random
        self._stop_event = threading.Event()

    def stop(self) -> None:
        """Begin no further transaction; returns at once."""
        self._stop_event.set()

    def run(self) -> None:
        try:
            with Connection(self._dsn, purpose="demo workload", source=False) as connection:
                self._work(connection)
        except CdcError as error:
            self.error = error

    def _work(self, connection: Connection) -> None:
        shop = Shop(connection, self._random)
        due = time.monotonic()
        for action, commit in self._script(shop):
            changes = self._transaction(connection, action, commit=commit) or self._transaction(
                connection, shop.place_order, commit=True
            )
            due = max(due + changes / self._rate * self._random.uniform(0.5, 1.5), time.monotonic() - LATEST)
            if self._stop_event.wait(max(0.0, due - time.monotonic())):
                return

    def _transaction(self, connection: Connection, action: Callable[[], Counts], *, commit: bool) -> int:
        """Run one action in a transaction; returns how many rows it touched."""
        connection.execute("begin")
        counts = action()
        ((txid,),) = connection.query("select pg_current_xact_id()::text::bigint")
        connection.execute("commit" if commit else "rollback")
        if not commit:
            self._ledger.rolled_back(txid)
        elif counts.total():
            self._ledger.committed(txid, counts)
        return counts.total()

    def _script(self, shop: Shop) -> Iterator[tuple[Callable[[], Counts], bool]]:
        """What happens, and whether it is committed: first one of everything, then a lively mixture."""
        opening = (shop.sign_up, shop.place_order, shop.pay, shop.ship, shop.place_order, shop.change_price)
        for action in (*opening, shop.place_order, shop.cancel, shop.move_house):
            yield action, True
        mixture = {
            shop.place_order: 24,
            shop.pay: 22,
            shop.ship: 20,
            shop.sign_up: 14,
            shop.change_price: 9,
            shop.move_house: 6,
            shop.cancel: 5,
        }
        while True:
            for action in self._random.choices(list(mixture), list(mixture.values()), k=SALE_EVERY // 2):
                yield action, True
            yield shop.place_order, False
            for action in self._random.choices(list(mixture), list(mixture.values()), k=SALE_EVERY // 2):
                yield action, True
            yield shop.sale, True
