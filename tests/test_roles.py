"""Rights on the durable log, tested by attack: with code and names that a role supplies."""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import sys
from collections.abc import Callable

import psycopg2
import psycopg2.errors
import psycopg2.extensions
import pytest

import pages
import sse_relay
from harness import PROGRAM, Database, Relay, SseReader
from log_session import ROLE_NUMBERS, Row, Session, new_login, new_role
from sse_relay import LOG_EXCESS_SQL, PIN_PATH_SQL, SCHEMA_SQL


@pytest.fixture
def database(each_database: Database) -> Database:
    return each_database


def name_of(login: Database) -> str:
    return f'"{psycopg2.extensions.parse_dsn(login.dsn)["user"]}"'


def give_create(database: Database, login: Database) -> None:
    dbname = psycopg2.extensions.parse_dsn(database.dsn)["dbname"]
    database.execute(f"GRANT CREATE ON DATABASE {dbname} TO {name_of(login)}")


# ---------------------------------------------------------------- names


SHADOWS = r"""
SET search_path = pg_catalog;
CREATE TABLE public.loot (who text, what text);
GRANT ALL ON public.loot TO PUBLIC;
CREATE FUNCTION public.take(what text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO public.loot VALUES (pg_catalog.concat(current_user, ' ', session_user), what);
    RAISE 'evil %', what;
END $$;
CREATE FUNCTION public.copy(what text, name text, arguments text, result text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    EXECUTE format('CREATE FUNCTION public.%I(%s) RETURNS %s LANGUAGE plpgsql AS %L', name, arguments, result,
        format('BEGIN PERFORM public.take(%L); END', what));
END $$;
-- Of every function whose name is called, in PostgreSQL's own form.
SELECT public.copy(p.oid::regprocedure::text, p.proname::text, pg_get_function_identity_arguments(p.oid),
        CASE WHEN p.proretset THEN 'SETOF ' ELSE '' END || format_type(p.prorettype, NULL))
    FROM pg_proc AS p WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind = 'f'
        AND p.proname = ANY (NAMES) AND p.proargmodes IS NULL AND NOT EXISTS (
            SELECT FROM unnest(p.prorettype || p.proargtypes::oid[]) AS t (o)
            WHERE format_type(o, NULL) ~ 'any|internal|cstring|trigger|language_handler');
-- In the place of polymorphic and variadic ones.
SELECT public.copy(name || '(' || arguments || ')', name, arguments, result) FROM (
    SELECT 'unnest' AS name, t || '[]' AS arguments, 'SETOF ' || t AS result
        FROM unnest(ARRAY['text', 'bigint', 'int', 'xid8', 'oid', 'name']) AS t
    UNION SELECT 'format', concat_ws(', ', 'text', a, nullif(b, '')), 'text'
        FROM unnest(ARRAY['text', 'name', 'regclass', 'oid', 'regprocedure']) AS a,
            unnest(ARRAY['text', 'name', '']) AS b
        WHERE (a, b) NOT IN (('text', ''))
    UNION VALUES ('set_config', 'text, name, boolean', 'text'), ('to_jsonb', 'text', 'jsonb'),
        ('jsonb_build_object', 'text, jsonb', 'jsonb'), ('to_json', 'text', 'json'),
        ('num_nulls', 'text', 'int'),
        ('concat_ws', 'text, text, text', 'text'), ('concat_ws', 'text, xid8, xid8, text', 'text')
) AS v;
DO $$
DECLARE
    o record;
BEGIN
    FOR o IN SELECT p.oid, p.oprname, p.oprleft::regtype AS l, p.oprright::regtype AS r,
            p.oprresult::regtype AS v
        FROM pg_operator AS p WHERE p.oprnamespace = 'pg_catalog'::regnamespace AND p.oprkind = 'b'
            AND p.oprname IN ('=', '<>', '<', '>', '<=', '>=', '||', '~', '->', '->>', '?', '-', '+', '*')
            AND format('%s %s', p.oprleft::regtype, p.oprright::regtype)
                !~ 'any|cstring|internal|box|point|circle|lseg|line|path|polygon' LOOP
        PERFORM public.copy(o.oid::regoperator::text, 'op_' || o.oid, format('%s, %s', o.l, o.r), o.v::text);
        EXECUTE format('CREATE OPERATOR public.%s (FUNCTION = public.op_%s, LEFTARG = %s, RIGHTARG = %s)',
            o.oprname, o.oid, o.l, o.r);
    END LOOP;
    FOR o IN SELECT * FROM unnest(ARRAY['text', 'jsonb', 'json', 'xid8', 'pg_snapshot', 'oid', 'name',
            'regclass', 'regprocedure', 'regnamespace', 'timestamptz', 'int8']) AS t (name) LOOP
        EXECUTE format('CREATE TYPE public.%I AS ENUM (''evil'')', o.name);
    END LOOP;
END $$;
"""


def shadow(login: Database) -> None:
    """Make, as this role, what could be called in the place of all that the program calls."""
    called = sorted(set(re.findall(r"\b([a-z_0-9]+)\(", PROGRAM.read_text())))
    login.execute(SHADOWS.replace("NAMES", "ARRAY['" + "','".join(called) + "']"))
    ((operators,),) = login.execute(
        "SELECT count(*) FROM pg_operator WHERE oprnamespace = 'public'::regnamespace"
    )
    assert operators > 300


@pytest.mark.slow
def test_no_name_of_a_stranger_is_found_by_script_session_relay_doctor_and_commands(
    database: Database, start_relay: Callable[..., Relay]
) -> None:
    # As up to PostgreSQL 14, and worse: the stranger's schema comes before PostgreSQL's own.
    dbname = psycopg2.extensions.parse_dsn(database.dsn)["dbname"]
    database.execute("GRANT ALL ON SCHEMA public TO PUBLIC")
    database.execute(f"ALTER DATABASE {dbname} SET search_path = public, pg_catalog")
    shadow(new_login(database, "stranger"))
    with contextlib.closing(database.connect()) as connection, connection.cursor() as cursor:
        with pytest.raises(psycopg2.Error, match="evil"):
            cursor.execute("SELECT 1 WHERE 'a'::pg_catalog.text = 'b'::pg_catalog.text")
        # As psql runs what `schema` prints, and as Django's migrations do: statement by statement.
        for _ in range(2):
            cursor.execute(f"BEGIN; {SCHEMA_SQL}; SHOW search_path")
            assert cursor.fetchall() == [("public, pg_catalog",)]
            cursor.execute("COMMIT")
        cursor.execute("DROP SCHEMA sse_relay CASCADE")
        for statement in re.findall(
            r"(?:[^;$]|\$\$.*?\$\$|\$(?!\$))+;", re.sub(r"--.*", "", SCHEMA_SQL), re.DOTALL
        ):
            cursor.execute(statement)
        cursor.execute("SHOW search_path")
        assert cursor.fetchall() == [("public, pg_catalog",)]
    sse_relay.apply_schema(database.dsn)
    with contextlib.closing(database.connect()) as connection, connection.cursor() as cursor:
        # The application's own session is as it is.
        cursor.execute("SELECT sse_relay.publish('orders', 'x'), sse_relay.position()")
        cursor.execute("SELECT sse_relay.revoke('user-7')")
        cursor.execute("CREATE TABLE public.things (id int4 PRIMARY KEY, tenant varchar)")
        cursor.execute(
            "CREATE TRIGGER t AFTER INSERT OR UPDATE OR DELETE ON public.things FOR EACH ROW"
            " EXECUTE FUNCTION sse_relay.publish_row('{tenant}', '*')"
        )
        cursor.execute("INSERT INTO public.things VALUES (1, 'a')")
        cursor.execute("UPDATE public.things SET id = 2, tenant = 'b'")
        cursor.execute("DELETE FROM public.things")
    with Session(database) as session:
        session.run(PIN_PATH_SQL)
        session.run(sse_relay.LOG_GRANTS_SQL)
        session.run(sse_relay.LOG_LIMITS_SQL)
        session.run(LOG_EXCESS_SQL)
        session.attach()
        session.sweep()
        assert len(session.read()) == 6
        session.prune()
    program = functools.partial(subprocess.run, capture_output=True, text=True, check=False)
    start = [sys.executable, str(PROGRAM)]
    dsn = ["--dsn", database.dsn]
    assert program([*start, "schema", "--apply", *dsn]).returncode == 0
    for options in (["--source", "log", "--memory", "0"], []):
        relay = start_relay(*options, dsn=database.dsn)
        with SseReader(relay.url("a")) as reader:
            position = reader.wait_for_id()
            for word in ("one", "two"):
                assert program([*start, "publish", *options[:2], *dsn, "a", word]).returncode == 0
                reader.wait_for_data(word)
            database.execute("SELECT pg_catalog.pg_notify('sse_relay', '08')")
        if options:
            with SseReader(relay.url("a"), last_event_id=position) as resuming:
                resuming.wait_for_data("two")
                assert resuming.data == ["one", "two"]
        examined = program([*start, "doctor", *options[:2], *dsn])
        assert "evil" not in examined.stdout + examined.stderr + relay.log
        assert "lost PostgreSQL" not in relay.log
    with Session(database) as session:
        session.run(PIN_PATH_SQL)
        assert session.run("SELECT * FROM public.loot") == []


# ---------------------------------------------------------------- types

# A type of the table's owner, a value of it, and what of it may be sent.
CUNNING_TYPES = {
    "enum": ("CREATE TYPE mood AS ENUM ('a b', 'c')", "mood", "'a b'", "a b"),
    "array of enum": (
        "CREATE TYPE mood AS ENUM ('a b', 'c')", "mood[]",
        "ARRAY['a b', NULL, 'c']::mood[]", ["a b", None, "c"],
    ),
    "domain over enum": (
        "CREATE TYPE mood AS ENUM ('a b', 'c'); CREATE DOMAIN dull AS mood CHECK (evil(VALUE::text) IS NULL)",
        "dull", "'a b'", "a b",
    ),
    "domain over int": ("CREATE DOMAIN mood AS int CHECK (evil(VALUE::text) IS NULL)", "mood", "7", 7),
    "array of domain": ("CREATE DOMAIN mood AS int", "mood[]", "ARRAY[7, 8]::mood[]", [7, 8]),
    "composite of enum": (
        "CREATE TYPE mood AS ENUM ('a b', 'c'); CREATE TYPE pair AS (a mood, b int)",
        "pair", "('c', 1)", "(c,1)",
    ),
    "composite": ("CREATE TYPE mood AS (a text, b int)", "mood", "('c', 1)", {"a": "c", "b": 1}),
    "array of composite of enum": (
        "CREATE TYPE mood AS ENUM ('a b', 'c'); CREATE TYPE pair AS (a mood, b int)",
        "pair[]", "ARRAY[('a b', 1), ('c', NULL)]::pair[]", ['("a b",1)', "(c,)"],
    ),
    "row of a table": (
        "CREATE TYPE mood AS ENUM ('a b', 'c'); CREATE TABLE pair (a mood)", "pair", "ROW('c')::pair", "(c)"
    ),
    "range": ("CREATE TYPE mood AS RANGE (subtype = int4)", "mood", "'[1,3)'", "[1,3)"),
    "domain over composite of enum": (
        "CREATE TYPE kind AS ENUM ('c'); CREATE TYPE pair AS (a kind, b int); CREATE DOMAIN mood AS pair",
        "mood", "ROW('c', 1)::pair", "(c,1)",
    ),
}  # fmt: skip
EVIL = """
CREATE FUNCTION evil(text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN INSERT INTO loot VALUES (current_user); RETURN NULL; END $$;
"""
CASTS = """
CREATE FUNCTION evil_{to}({of}) RETURNS {to} LANGUAGE plpgsql AS $$
BEGIN INSERT INTO loot VALUES (current_user); RETURN '"evil"'; END $$;
CREATE CAST ({of} AS {to}) WITH FUNCTION evil_{to}({of}) {how};
"""


@pytest.mark.usefixtures("each_log_database")
@pytest.mark.parametrize("kind", CUNNING_TYPES)
def test_a_trigger_runs_no_code_of_the_tables_owner_with_the_logs_rights(
    database: Database, kind: str
) -> None:
    setup, column, value, sent = CUNNING_TYPES[kind]
    owner, writer = new_login(database, "migrations"), new_login(database, "writer")
    give_create(database, owner)
    database.execute(f"GRANT USAGE ON SCHEMA sse_relay TO {name_of(owner)}")
    database.execute(f"GRANT EXECUTE ON FUNCTION sse_relay.publish_row() TO {name_of(owner)}")
    owner.execute("CREATE SCHEMA mine; SET search_path = mine")
    owner.execute("CREATE TABLE loot (who name)")
    owner.execute(f"GRANT USAGE ON SCHEMA mine TO {name_of(writer)}")
    owner.execute(f"GRANT INSERT ON loot TO {name_of(writer)}")
    owner.execute(EVIL)
    owner.execute(setup)
    for (name,) in owner.execute(
        "SELECT typname FROM pg_type WHERE typnamespace = 'mine'::regnamespace AND typtype IN ('e', 'c', 'r')"
        " AND typname NOT IN ('loot', 'things')"
    ):
        for to, how in (("json", ""), ("jsonb", "AS IMPLICIT"), ("text", "AS IMPLICIT")):
            owner.execute(CASTS.format(of=name, to=to, how=how))
    owner.execute(f"CREATE TABLE things (id int PRIMARY KEY, it {column}, data json)")
    owner.execute(
        "CREATE TRIGGER publish AFTER INSERT OR UPDATE OR DELETE ON things FOR EACH ROW"
        " EXECUTE FUNCTION sse_relay.publish_row('c-{it}', '*')"
    )
    owner.execute(f"GRANT INSERT, UPDATE, DELETE, SELECT ON things TO {name_of(writer)}")
    # The writer has no grant on the log at all.
    writer.execute("SET search_path = mine")
    writer.execute(f"INSERT INTO things VALUES (1, {value})")
    writer.execute("UPDATE things SET id = 2")
    writer.execute("UPDATE things SET it = NULL")
    messages = database.execute("SELECT data::json -> 'row' -> 'it' FROM sse_relay.pending ORDER BY seq")
    assert [message for (message,) in messages] == [sent, sent, None]
    assert database.execute("SELECT DISTINCT who FROM mine.loot WHERE who NOT IN (%s, %s)", tuple(
        name_of(login).strip('"') for login in (owner, writer))) == []  # fmt: skip


@pytest.mark.usefixtures("each_log_database")
def test_a_cast_of_a_superusers_type_is_used(database: Database) -> None:
    """As an extension brings: hstore comes as an object."""
    database.execute(
        "CREATE TYPE mood AS ENUM ('a'); CREATE FUNCTION as_json(mood) RETURNS json LANGUAGE sql AS "
        """$$ SELECT '{"mood": "a"}'::json $$; CREATE CAST (mood AS json) WITH FUNCTION as_json(mood)"""
    )
    database.execute("CREATE TABLE things (it mood)")
    database.execute(
        "CREATE TRIGGER publish AFTER INSERT ON things FOR EACH ROW"
        " EXECUTE FUNCTION sse_relay.publish_row('c', 'it')"
    )
    database.execute("INSERT INTO things VALUES ('a')")
    assert database.execute("SELECT data::json -> 'row' -> 'it' FROM sse_relay.pending") == [({"mood": "a"},)]


# ---------------------------------------------------------------- owners


def test_a_superuser_does_not_apply_the_schema_of_a_lesser_role(database: Database) -> None:
    """A trigger of the owner resets the role, and is whoever applies."""
    owner = new_role(database, "owner")
    deployer, creator = new_login(database, "deployer"), new_login(database, "creator", "CREATEROLE")
    database.execute(f'GRANT "{owner}" TO {name_of(deployer)}, {name_of(creator)}')
    database.execute(f'CREATE SCHEMA sse_relay AUTHORIZATION "{owner}"; CREATE SCHEMA loot')
    sse_relay.apply_schema(deployer.dsn)
    database.execute("CREATE TABLE loot.seen (who name, super boolean); GRANT ALL ON SCHEMA loot TO PUBLIC")
    database.execute("GRANT ALL ON loot.seen TO PUBLIC")
    deployer.execute(
        f"""SET ROLE "{owner}"; UPDATE sse_relay.settings SET version = 1;
        CREATE FUNCTION sse_relay.evil() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN RESET ROLE; INSERT INTO loot.seen SELECT rolname, rolsuper FROM pg_roles
            WHERE rolname IN (current_user, session_user); RETURN NULL; END $$;
        CREATE TRIGGER evil AFTER INSERT OR UPDATE ON sse_relay.settings FOR EACH STATEMENT
            EXECUTE FUNCTION sse_relay.evil(); RESET ROLE"""
    )
    indirect = new_login(database, "indirect")
    database.execute(f'GRANT "{owner}", pg_execute_server_program TO {name_of(indirect)}')
    for mighty in (database, creator, indirect):
        with pytest.raises(
            psycopg2.errors.InsufficientPrivilege, match=f"belongs to {owner}, which has fewer"
        ):
            sse_relay.apply_schema(mighty.dsn)
    assert database.execute("SELECT * FROM loot.seen") == []
    sse_relay.apply_schema(deployer.dsn)
    assert database.execute("SELECT DISTINCT who, super FROM loot.seen") == [
        (name_of(deployer).strip('"'), False)
    ]
    assert deployer.execute("SELECT current_user = session_user") == [(True,)]


# ---------------------------------------------------------------- privileges


def acl(database: Database) -> list[Row]:
    """All privileges on the log that others than its owner have."""
    return database.execute(
        """SELECT 'schema', nspname::text, a.grantee::regrole::text, a.privilege_type::text
            FROM pg_namespace, aclexplode(nspacl) AS a WHERE nspname = 'sse_relay' AND grantee <> nspowner
        UNION SELECT 'relation', relname::text, a.grantee::regrole::text, a.privilege_type
            FROM pg_class, aclexplode(relacl) AS a
            WHERE relnamespace = 'sse_relay'::regnamespace AND grantee <> relowner
        UNION SELECT 'function', p.oid::regprocedure::text, a.grantee::regrole::text, a.privilege_type
            FROM pg_proc AS p, aclexplode(coalesce(proacl, acldefault('f', proowner))) AS a
            WHERE pronamespace = 'sse_relay'::regnamespace AND grantee <> proowner ORDER BY 1, 2, 3, 4"""
    )


def test_what_default_privileges_add_goes_and_what_was_given_by_hand_stays(database: Database) -> None:
    anon = f'"{new_role(database, "anon")}"'
    for what in ("SCHEMAS", "TABLES", "SEQUENCES", "FUNCTIONS"):
        database.execute(f"ALTER DEFAULT PRIVILEGES GRANT ALL ON {what} TO {anon}")
    (warning,) = sse_relay.apply_schema(database.dsn)
    assert "belongs to the superuser" in warning
    assert acl(database) == []
    database.execute(f"GRANT SELECT, INSERT ON sse_relay.events TO {anon}")
    database.execute(
        f"GRANT EXECUTE ON FUNCTION sse_relay.rewritten(), sse_relay.publish(text, text, text) TO {anon}"
    )
    database.execute("GRANT EXECUTE ON FUNCTION sse_relay.position() TO PUBLIC")
    database.execute(f"GRANT USAGE, CREATE ON SCHEMA sse_relay TO {anon}")
    database.execute(f"GRANT UPDATE (pruned, retention) ON sse_relay.settings TO {anon}")
    given = acl(database)
    with contextlib.closing(database.connect()) as anonymous, anonymous.cursor() as cursor:
        cursor.execute(f"SET SESSION AUTHORIZATION {anon}")
        cursor.execute("CREATE FUNCTION sse_relay.prune(text) RETURNS int LANGUAGE sql AS 'SELECT 1'")
    _, *warnings = sse_relay.apply_schema(database.dsn)
    assert set(acl(database)) == {*given, ("function", "sse_relay.prune(text)", "-", "EXECUTE")}
    remedies = [warning.partition(": ")[2] for warning in warnings]
    assert sorted(remedies) == sorted(
        [
            f"REVOKE INSERT ON sse_relay.events FROM {anon}",
            f"REVOKE EXECUTE ON FUNCTION sse_relay.rewritten() FROM {anon}",
            'REVOKE EXECUTE ON FUNCTION sse_relay."position"() FROM PUBLIC',
            f"REVOKE CREATE ON SCHEMA sse_relay FROM {anon}",
            f"REVOKE UPDATE (pruned) ON sse_relay.settings FROM {anon}",
            "REVOKE EXECUTE ON FUNCTION sse_relay.prune(text) FROM PUBLIC",
            "if it is not wanted, DROP FUNCTION sse_relay.prune(text)",
        ]
    )
    for remedy in sorted(remedies):
        database.execute(remedy.removeprefix("if it is not wanted, "))
    assert len(sse_relay.apply_schema(database.dsn)) == 1
    assert len(acl(database)) == 3


# ---------------------------------------------------------------- as the docs say


def statements_of_the_docs(follows: str) -> str:
    """The block that makes the owner, with roles of this test's own; they belong to the server."""
    owner = "CREATE ROLE sse_relay_owner NOLOGIN;"
    (found,) = [
        text for _, _, text in pages.blocks("sql", "docs/log.md") if owner in text and follows in text
    ]
    number = str(next(ROLE_NUMBERS))
    return re.sub(
        r"\b(sse_relay_owner|sse_relay_deploy|(?<=ROLE )app|(?<=ROLE )relay)\b", rf"\1_{number}", found
    )


@pytest.mark.parametrize("before", ["CREATE SCHEMA", "DO $$"], ids=["set up", "move over"])
def test_the_owner_of_the_docs_can_be_deployed_to(database: Database, before: str) -> None:
    script = statements_of_the_docs(before)
    if before == "DO $$":
        sse_relay.apply_schema(database.dsn)
        database.execute("SELECT sse_relay.publish('a', 'kept')")
    database.execute(script)
    (deploy,) = set(re.findall(r"sse_relay_deploy_\d+", script))
    dsn = psycopg2.extensions.make_dsn(database.dsn, user=deploy, password="deploy-password")
    assert sse_relay.apply_schema(dsn) == []
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        sse_relay.apply_schema(database.dsn)
    owners = database.execute(
        """SELECT relowner::regrole::text FROM pg_class WHERE relnamespace = 'sse_relay'::regnamespace
        UNION SELECT proowner::regrole::text FROM pg_proc WHERE pronamespace = 'sse_relay'::regnamespace"""
    )
    assert owners == [(deploy.replace("deploy", "owner"),)]
    database.execute("SELECT sse_relay.publish('a', 'new')")
    with Session(database) as session:
        session.sweep()
        assert session.read()[-1][6] == "new"
    database.execute(f"DROP OWNED BY {owners[0][0]} CASCADE")
