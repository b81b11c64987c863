"""What sessions of SQLAlchemy record of their changes, seen in the outbox of a real Postgres."""

import doctest
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from sqlalchemy import ForeignKey, Integer, String, delete, event, func, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, sessionmaker

import cacheinval.sqlalchemy
from cacheinval.errors import ConfigurationError, InvalidKeyError, SchemaMissingError
from cacheinval.outbox import schema_sql
from cacheinval.sqlalchemy import record_changes, rules

Recorded = tuple[dict[str, int | None], set[str], bool]


class Base(DeclarativeBase):
    pass


class Product(Base):
    __tablename__ = "products"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(default="Kettle")
    category: Mapped[str | None] = mapped_column(default="kitchen")
    parts: Mapped[list["Part"]] = relationship(cascade="all, delete-orphan")


class Part(Base):
    __tablename__ = "parts"
    shop: Mapped[int] = mapped_column("shop_number", primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    product_id: Mapped[str] = mapped_column(ForeignKey("products.id"))


class Counted(Base):
    __tablename__ = "counted"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String)
    version: Mapped[int] = mapped_column(default=1)
    label: Mapped[str] = mapped_column(default="")


class Item(Base):
    __tablename__ = "items"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str]
    __mapper_args__ = {"polymorphic_on": "kind", "polymorphic_identity": "item"}  # noqa: RUF012


class Book(Item):
    __tablename__ = "books"
    id: Mapped[int] = mapped_column(ForeignKey("items.id"), primary_key=True)
    shelf: Mapped[str]
    __mapper_args__ = {"polymorphic_identity": "book"}  # noqa: RUF012


class Unrelated(Base):
    __tablename__ = "unrelated"
    id: Mapped[int] = mapped_column(primary_key=True)


@dataclass
class Shop:
    """A database with the tables of the models, and what was recorded in it."""

    engine: AsyncEngine
    statements: list[str] = field(default_factory=list)

    def sessions(self, *arguments: Any, **options: Any) -> async_sessionmaker[AsyncSession]:
        """A factory of sessions that record changes so."""
        sessions = async_sessionmaker(self.engine)
        record_changes(sessions, *arguments, **options)
        return sessions

    async def recorded(self) -> list[Recorded]:
        """What others can see in the outbox, which is empty then."""
        async with self.engine.begin() as connection:
            rows = await connection.execute(
                text("DELETE FROM cacheinval.outbox RETURNING keys, versions, tags, everything, recorded_at")
            )
            return [
                (
                    dict(zip(row.keys, row.versions or [None] * len(row.keys), strict=True)),
                    set(row.tags),
                    row.everything,
                )
                for row in sorted(rows, key=lambda row: row.recorded_at)
            ]

    async def run(self, statement: str) -> None:
        """Behind the back of every session."""
        async with self.engine.begin() as connection:
            await connection.execute(text(statement))


@pytest.fixture
async def empty(database_url: str) -> AsyncIterator[Shop]:
    """The same, without the schema."""
    engine = create_async_engine(database_url.replace("postgresql://", "postgresql+asyncpg://"))
    shop = Shop(engine)
    event.listen(engine.sync_engine, "before_cursor_execute", lambda *about: shop.statements.append(about[2]))
    try:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        yield shop
    finally:
        await engine.dispose()


@pytest.fixture
async def shop(empty: Shop) -> Shop:
    async with empty.engine.begin() as connection:
        raw = await connection.get_raw_connection()
        await raw.driver_connection.execute(schema_sql())
    return empty


EVERYTHING: Recorded = ({}, set(), True)


def keys(*names: str, tags: tuple[str, ...] = ()) -> Recorded:
    return dict.fromkeys(names), set(tags), False


async def test_what_is_inserted_updated_and_deleted_is_recorded_in_the_transaction(shop: Shop) -> None:
    sessions = shop.sessions({Product: "product:{id}"}, tags={Product: "products"})
    async with sessions() as session:
        session.add(Product(id="a"))
        await session.flush()
        assert await shop.recorded() == [], "not before it is committed"
        assert not session.info, "nothing is kept after the flush"
        await session.commit()
        assert await shop.recorded() == [keys("product:a", tags=("products",))]
        product = await session.get_one(Product, "a")
        product.name = "Lamp"
        await session.commit()
        assert await shop.recorded() == [keys("product:a", tags=("products",))]
        await session.delete(product)
        await session.commit()
        assert await shop.recorded() == [keys("product:a", tags=("products",))]
        await session.commit()
        assert await shop.recorded() == []


async def test_a_flush_of_many_objects_takes_one_statement(shop: Shop) -> None:
    sessions = shop.sessions({Product: "product:{id}", Part: ["part:{shop}/{number}", "part-{number:04}"]})
    async with sessions.begin() as session:
        for number in range(1_500):
            session.add(Product(id=str(number), parts=[Part(shop=7, number=number)]))
    assert len([one for one in shop.statements if "invalidate(" in one]) == 1
    assert not [one for one in shop.statements if one.startswith("SELECT products")], (
        "the key costs nothing more"
    )
    names = {name for told, _, _ in await shop.recorded() for name in told}
    assert names == {
        name(number)
        for number in range(1_500)
        for name in ("product:{}".format, "part:7/{}".format, "part-{:04}".format)
    }


async def test_what_is_rolled_back_is_not_recorded(shop: Shop) -> None:
    sessions = shop.sessions({Product: "product:{id}"})
    async with sessions() as session:
        session.add(Product(id="a"))
        await session.flush()
        await session.rollback()
        session.add(Product(id="b"))
        await session.flush()
        savepoint = await session.begin_nested()
        session.add(Product(id="c"))
        await session.flush()
        await savepoint.rollback()
        await session.commit()
    assert await shop.recorded() == [keys("product:b")]


async def test_a_flush_that_fails_leaves_nothing_behind(shop: Shop) -> None:
    sessions = shop.sessions({Product: "product:{id}", Part: "part:{number}"})
    async with sessions() as session:
        session.add_all([Product(id="a"), Part(shop=1, number=1, product_id="nobody")])
        with pytest.raises(IntegrityError):
            await session.flush()
        await session.rollback()
        session.add(Product(id="b"))
        await session.commit()
    assert await shop.recorded() == [keys("product:b")]


async def test_a_changed_primary_key_is_recorded_as_it_was_and_as_it_is(shop: Shop) -> None:
    sessions = shop.sessions({Product: "product:{id}"})
    await shop.run("INSERT INTO products VALUES ('old', 'Kettle', NULL)")
    async with sessions.begin() as session:
        product = await session.get_one(Product, "old")
        product.id = "new"
    assert await shop.recorded() == [keys("product:old", "product:new")]


async def test_an_object_that_takes_the_place_of_another_records_what_both_were(shop: Shop) -> None:
    sessions = shop.sessions({Product: "product:{id}"}, tags={Product: "category:{category}"})
    await shop.run("INSERT INTO products VALUES ('a', 'Kettle', 'kitchen')")
    async with sessions.begin() as session:
        await session.delete(await session.get_one(Product, "a"))
        session.add(Product(id="a", category="garden"))
    assert await shop.recorded() == [keys("product:a", tags=("category:kitchen", "category:garden"))]


async def test_a_template_tells_the_row_and_not_what_the_session_had_loaded(shop: Shop) -> None:
    sessions = shop.sessions({Product: "product:{id}"}, tags={Product: ["category:{category}"]})
    await shop.run("INSERT INTO products VALUES ('a', 'Kettle', 'loaded')")
    async with sessions() as session:
        product = await session.get_one(Product, "a")
        await shop.run("UPDATE products SET category = 'meanwhile'")
        product.category = "now"
        await session.commit()  # which also expires what is known
        assert await shop.recorded() == [keys("product:a", tags=("category:meanwhile", "category:now"))]
        product.category = "later"
        await session.commit()
        assert await shop.recorded() == [keys("product:a", tags=("category:now", "category:later"))]
        product = await session.get_one(Product, "a")
        product.category = func.upper("expression")  # type: ignore[assignment]
        await session.commit()
        assert await shop.recorded() == [keys("product:a", tags=("category:later", "category:EXPRESSION"))]
        await session.refresh(product)
        await shop.run("UPDATE products SET category = 'last'")
        await session.delete(product)
        await session.commit()
        assert await shop.recorded() == [keys("product:a", tags=("category:last",))]


async def test_what_was_read_of_a_row_before_its_change_nobody_changes_meanwhile(
    shop: Shop, database_url: str
) -> None:
    sessions = shop.sessions({Product: "product:{id}"}, tags={Product: ["category:{category}"]})
    await shop.run("INSERT INTO products VALUES ('a', 'Kettle', 'kitchen')")
    refused = []

    def interfere(*about: Any) -> None:
        if about[2].startswith("UPDATE products"):
            with psycopg.connect(database_url) as other:
                other.execute("SET lock_timeout = '50ms'")
                with pytest.raises(psycopg.errors.LockNotAvailable) as raised:
                    other.execute("UPDATE products SET category = 'garden'")
                refused.append(raised)

    event.listen(shop.engine.sync_engine, "before_cursor_execute", interfere)
    async with sessions.begin() as session:
        (await session.get_one(Product, "a")).name = "Lamp"
    assert len(refused) == 1
    assert await shop.recorded() == [keys("product:a", tags=("category:kitchen",))]


async def test_the_version_is_the_one_that_the_row_has_then(shop: Shop) -> None:
    sessions = shop.sessions(
        {Counted: ["counted:{id}"], Product: "product:{id}"}, version={Counted: "version"}
    )
    await shop.run("""
        CREATE FUNCTION count_up() RETURNS trigger LANGUAGE plpgsql
            AS 'BEGIN NEW.version = OLD.version + 1; RETURN NEW; END';
    """)
    await shop.run("CREATE TRIGGER counts BEFORE UPDATE ON counted FOR EACH ROW EXECUTE FUNCTION count_up()")
    async with sessions() as session:
        counted = Counted(name="a")
        session.add(counted)
        await session.commit()
        assert await shop.recorded() == [({"counted:1": 1}, set(), False)]
        await session.refresh(counted)
        counted.name = "b"
        session.add(Product(id="p"))
        await session.commit()
        assert await shop.recorded() == [({"counted:1": 2, "product:p": None}, set(), False)]
        await session.delete(counted)
        await session.commit()
        assert await shop.recorded() == [keys("counted:1")]


async def test_of_two_versions_of_a_key_the_higher_is_told_and_none_if_one_is_unknown(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "ROWS_PER_SELECT", 2)
    sessions = shop.sessions({Counted: "name:{name}"}, version={Counted: "version"})
    async with sessions() as session:
        for name, version in (("a", 2), ("a", 9), ("a", 3), ("b", 1), ("c", 4)):
            session.add(Counted(name=name, version=version))
        await session.commit()
        assert await shop.recorded() == [({"name:a": 9, "name:b": 1, "name:c": 4}, set(), False)]
        of_b = (await session.scalars(select(Counted).where(Counted.name == "b"))).one()
        of_c = (await session.scalars(select(Counted).where(Counted.name == "c"))).one()
        of_b.name = of_c.name
        of_c.label = "changed too"
        await session.commit()
        assert await shop.recorded() == [({"name:c": 4, "name:b": None}, set(), False)]
        of_c.name, of_b.label = "b", "changed too"
        session.add(Counted(name="c", version=7))
        await session.commit()
        assert await shop.recorded() == [({"name:c": None, "name:b": 4}, set(), False)]


async def test_a_change_is_recorded_where_it_is_made(shop: Shop) -> None:
    other = create_async_engine(shop.engine.url)
    sessions = async_sessionmaker(binds={Product: shop.engine, Counted: other})
    record_changes(sessions, {Product: "product:{id}", Counted: "counted:{id}"})
    try:
        async with sessions() as session:
            session.add_all([Product(id="a"), Counted(name="a")])
            await session.commit()
    finally:
        await other.dispose()
    assert sorted(map(str, await shop.recorded())) == [str(keys("counted:1")), str(keys("product:a"))]


async def test_objects_of_subclasses_are_recorded_as_both(shop: Shop) -> None:
    sessions = shop.sessions({Item: "item:{id}", Book: "book:{id}"}, tags={Book: "shelf:{shelf}"})
    async with sessions.begin() as session:
        session.add_all([Book(shelf="A"), Item()])
    assert await shop.recorded() == [keys("item:1", "item:2", "book:1", tags=("shelf:A",))]
    async with sessions.begin() as session:
        (await session.get_one(Book, 1)).shelf = "B"
    assert await shop.recorded() == [keys("item:1", "book:1", tags=("shelf:A", "shelf:B"))]


async def test_an_orphan_and_a_parent_whose_collection_changes_are_recorded(shop: Shop) -> None:
    sessions = shop.sessions({Part: "part:{number}", Product: "product:{id}"})
    async with sessions.begin() as session:
        session.add(Product(id="a", parts=[Part(shop=1, number=1), Part(shop=1, number=2)]))
    await shop.recorded()
    async with sessions.begin() as session:
        product = await session.get_one(Product, "a")
        (await product_parts(session, product)).pop(0)
    assert await shop.recorded() == [keys("part:1", "product:a")]


async def product_parts(session: AsyncSession, product: Product) -> list[Part]:
    await session.refresh(product, ["parts"])
    return product.parts


BULK: dict[str, Callable[[], Any]] = {
    "update": lambda: update(Product).where(Product.id == "a").values(name="Lamp"),
    "delete": lambda: delete(Product).where(Product.id == "a"),
    "insert": lambda: insert(Product).values(id="b", name="Lamp"),
    "of the table": lambda: update(Product.__table__).values(name="Lamp"),  # type: ignore[arg-type]
    "returning": lambda: update(Product).values(name="Lamp").returning(Product),
    "selected": lambda: select(Product).from_statement(
        insert(Product).values(id="b", name="Lamp").returning(Product)
    ),
    "of a subclass": lambda: update(Book).values(shelf="A"),
    "of the class above": lambda: delete(Item),
}


@pytest.mark.parametrize("name", BULK)
async def test_a_statement_that_passes_the_unit_of_work_by_invalidates_everything(
    shop: Shop, name: str
) -> None:
    sessions = shop.sessions({Product: "product:{id}", Book: "book:{id}"})
    await shop.run("INSERT INTO products VALUES ('a', 'Kettle', NULL)")
    async with sessions() as session:
        await session.execute(BULK[name]())
        await session.rollback()
        assert await shop.recorded() == []
        await session.execute(BULK[name]())
        await session.commit()
    assert await shop.recorded() == [EVERYTHING]


async def test_one_that_the_caller_records_does_not(shop: Shop) -> None:
    sessions = shop.sessions({Product: "product:{id}"})
    async with sessions.begin() as session:
        await session.execute(
            update(Product).values(name="Lamp"), execution_options={"cacheinval_recorded": True}
        )
        await session.execute(select(func.cacheinval.invalidate(["product:a", "product:b"])))
        await session.execute(insert(Unrelated).values(id=1))
        await session.execute(select(Product))
    assert await shop.recorded() == [keys("product:a", "product:b")]


@pytest.mark.parametrize("category", [None, "", "x" * 600])
async def test_a_row_whose_names_cannot_be_told_invalidates_everything(
    shop: Shop, category: str | None
) -> None:
    sessions = shop.sessions({Product: ["product:{id}", "{category}"]})
    async with sessions() as session:
        session.add(Product(id="a", category=category))
        await session.commit()
        if category is None:  # a default stands in for it, unless it is set so
            await shop.recorded()
            (await session.get_one(Product, "a")).category = None
            await session.commit()
    assert await shop.recorded() == [EVERYTHING]


async def test_a_row_that_is_not_seen_again_invalidates_everything(shop: Shop) -> None:
    sessions = shop.sessions({Counted: "counted:{id}"}, version={Counted: "version"})
    await shop.run("""
        CREATE FUNCTION vanish() RETURNS trigger LANGUAGE plpgsql
            AS 'BEGIN DELETE FROM counted WHERE id = NEW.id; RETURN NULL; END';
    """)
    await shop.run("CREATE TRIGGER vanishes AFTER INSERT ON counted FOR EACH ROW EXECUTE FUNCTION vanish()")
    async with sessions.begin() as session:
        session.add(Counted(name="a"))
    assert await shop.recorded() == [EVERYTHING]


async def test_a_format_that_does_not_fit_does_not_fail_the_change(shop: Shop) -> None:
    sessions = shop.sessions({Product: "product:{id:d}"})
    async with sessions.begin() as session:
        session.add(Product(id="a"))
    assert await shop.recorded() == [EVERYTHING]


async def test_sessions_of_other_factories_are_left_alone(shop: Shop) -> None:
    shop.sessions({Product: "product:{id}"})
    async with async_sessionmaker(shop.engine).begin() as session:
        session.add(Product(id="a"))
        await session.execute(update(Product).values(name="Lamp"))
    assert await shop.recorded() == []


async def test_a_factory_keeps_the_sessions_that_it_had(shop: Shop) -> None:
    class Own(Session):
        pass

    for inner in (Own, sessionmaker(class_=Own)):
        sessions = async_sessionmaker(shop.engine, sync_session_class=inner)
        record_changes(sessions, {Product: "product:{id}"}, namespace="elsewhere")
        async with sessions.begin() as session:
            assert isinstance(session.sync_session, Own)
            await session.merge(Product(id="a", name=str(inner)))
        assert await shop.recorded() == [keys("product:a")]


def test_a_synchronous_session_records_too(database_url: str) -> None:
    from sqlalchemy import create_engine

    engine = create_engine(database_url.replace("postgresql://", "postgresql+psycopg://"))
    sessions = sessionmaker(engine)
    record_changes(
        sessions,
        {Counted: "counted:{id}"},
        version={Counted: "version"},
        tags={Counted: ["labels"]},
        namespace="shop",
    )
    try:
        with engine.begin() as connection:
            Base.metadata.create_all(connection)
            connection.connection.driver_connection.execute(schema_sql())  # type: ignore[union-attr]
        with sessions.begin() as session:
            session.add(Counted(name="a", version=5))
        with sessions() as session:
            row = session.execute(text("SELECT namespace, keys, versions, tags FROM cacheinval.outbox")).one()
        assert tuple(row) == ("shop", ["counted:1"], [5], ["labels"])
    finally:
        engine.dispose()


async def test_without_the_schema_a_flush_fails_and_says_why(empty: Shop) -> None:
    sessions = empty.sessions({Product: "product:{id}"})
    async with sessions() as session:
        session.add(Product(id="a"))
        with pytest.raises(SchemaMissingError, match="cacheinval schema apply"):
            await session.commit()
    async with empty.engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM products"))).scalar_one() == 0


@pytest.mark.parametrize(
    ("arguments", "options", "error", "says"),
    [
        (
            ({Product: "product:{nid}"},),
            {},
            InvalidKeyError,
            r"'product:\{nid\}' of Product names 'nid'.* id, name",
        ),
        (({Product: "product:{}"},), {}, InvalidKeyError, "names ''"),
        (({Product: "product:{id.real}"},), {}, InvalidKeyError, "names 'id.real'"),
        (({Product: "product:{id:{name}}"},), {}, InvalidKeyError, "names 'id'"),
        (({Product: "product:{parts}"},), {}, InvalidKeyError, "names 'parts'"),
        (({Product: "product:{id"},), {}, InvalidKeyError, "product:{id' of Product: "),
        (({Product: ""},), {}, InvalidKeyError, "key template of Product '' is empty"),
        (({Part: "part:{shop_number}"},), {}, InvalidKeyError, "accepted: .* shop, number"),
        (({},), {"tags": {Product: "{nid}"}}, InvalidKeyError, "names 'nid'"),
        (({int: "product:{id}"},), {}, ConfigurationError, "accepted: mapped classes"),
        (({Counted: "a:{id}"},), {"version": {Counted: "name"}}, ConfigurationError, r"\(id, version\)"),
        (({Counted: "a:{id}"},), {"version": {Product: "id"}}, ConfigurationError, "no key template"),
        (({Product: "a:{id}"},), {"namespace": "two words"}, ConfigurationError, "namespace 'two words'"),
    ],
)
def test_what_cannot_be_recorded_is_refused_at_once(
    arguments: Any, options: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        record_changes(sessionmaker(), *arguments, **options)


def test_what_cannot_be_listened_to_is_refused() -> None:
    for sessions in (object(), AsyncSession, Session()):
        with pytest.raises(ConfigurationError, match="accepted: a sessionmaker"):
            record_changes(sessions, {Product: "product:{id}"})  # type: ignore[arg-type]


def test_xmin_is_no_version() -> None:
    class Versioned(Base):
        __tablename__ = "versioned"
        id: Mapped[int] = mapped_column(primary_key=True)
        xmin: Mapped[int] = mapped_column(Integer, system=True)

    with pytest.raises(ConfigurationError, match="no version in 'xmin'"):
        record_changes(sessionmaker(), {Versioned: "a:{id}"}, version={Versioned: "xmin"})


def test_the_example_works_as_it_is_pasted() -> None:
    ran = doctest.testmod(cacheinval.sqlalchemy)
    assert (ran.attempted > 0, ran.failed) == (True, 0)
