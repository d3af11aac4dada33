
-- The durable log of sse-relay. Needs PostgreSQL 13 or newer, a database in UTF8, and CREATE on it.
-- Safe to run again: it keeps events, settings and grants.
--
-- An application calls publish() inside its own transaction: a row in `pending`. When that has been
-- committed, a relay moves the row into `events` and gives it the next id. So ids are in commit order,
-- whoever reads past an id has seen all before it, and publishers never wait for each other.

DO $$
DECLARE
    owner name;
    installed int;
BEGIN
    IF current_setting('server_version_num')::int < 130000 THEN
        RAISE 'the log of sse-relay needs PostgreSQL 13 or newer, this is %',
            current_setting('server_version') USING ERRCODE = 'feature_not_supported';
    END IF;
    IF current_setting('server_encoding') <> 'UTF8' THEN
        RAISE 'the log of sse-relay needs a database in UTF8, this one is in %',
            current_setting('server_encoding') USING ERRCODE = 'feature_not_supported';
    END IF;

    -- Two that apply at once take turns.
    PERFORM pg_advisory_xact_lock(hashtext('sse_relay schema'));

    -- All objects have one owner, whoever applies the script: functions run with their owner's rights,
    -- so an owner of the tables must not be able to borrow somebody else's.
    SELECT pg_get_userbyid(nspowner) INTO owner FROM pg_namespace WHERE nspname = 'sse_relay';
    IF FOUND THEN
        IF NOT pg_has_role(owner, 'MEMBER') THEN
            RAISE 'schema sse_relay belongs to %, apply it as that role', owner
                USING ERRCODE = 'insufficient_privilege';
        END IF;
        PERFORM set_config('role', owner, true);
    ELSE
        CREATE SCHEMA sse_relay;
    END IF;

    IF to_regclass('sse_relay.settings') IS NOT NULL THEN
        SELECT version INTO installed FROM sse_relay.settings;
        IF installed > 1 THEN
            RAISE 'schema sse_relay has version %, this script is older (version 1)', installed
                USING HINT = 'Apply it with the newest sse_relay.py that is in use.';
        END IF;
    END IF;
END $$;

-- What an operator may set. For another retention:
--     UPDATE sse_relay.settings SET retention = '7 days';
CREATE TABLE IF NOT EXISTS sse_relay.settings (
    single    boolean PRIMARY KEY DEFAULT true CHECK (single),
    version   int NOT NULL,
    retention interval NOT NULL DEFAULT '24 hours' CHECK (retention > '0'),
    -- Events up to this id are gone.
    pruned    bigint NOT NULL DEFAULT 0
);

-- The name of the history that ids belong to, and what it is tied to. `xid` is the transaction that
-- wrote the row: a row that came back from a dump has another xmin, whatever database it is in.
CREATE TABLE IF NOT EXISTS sse_relay.epoch (
    single   boolean PRIMARY KEY DEFAULT true CHECK (single),
    epoch    text,
    system   bigint,
    timeline text,
    database oid,
    xid      xid8
);

-- Committed or not, published and not yet numbered. The identity is in order of insertion.
CREATE TABLE IF NOT EXISTS sse_relay.pending (
    xid     xid8 NOT NULL DEFAULT pg_current_xact_id(),
    seq     bigint GENERATED ALWAYS AS IDENTITY,
    pid     int NOT NULL DEFAULT pg_backend_pid(),
    channel text COLLATE "C" NOT NULL,
    event   text,
    data    text NOT NULL,
    PRIMARY KEY (xid, seq)
);

-- The log. `created` is the time of the numbering: retention counts from there.
CREATE TABLE IF NOT EXISTS sse_relay.events (
    id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    xid     xid8 NOT NULL,
    channel text COLLATE "C" NOT NULL,
    event   text,
    data    text NOT NULL,
    created timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX IF NOT EXISTS events_channel_id ON sse_relay.events (channel, id);

INSERT INTO sse_relay.settings (version) VALUES (1) ON CONFLICT (single) DO UPDATE SET version = 1;
INSERT INTO sse_relay.epoch DEFAULT VALUES ON CONFLICT (single) DO NOTHING;


-- ---------------------------------------------------------------- for applications

-- Publishes an event with this transaction: SELECT sse_relay.publish('orders', 'shipped');
-- Refuses what no stream could ask for or carry (22023), NULL (22004) and data over 1 MiB (22001).
CREATE OR REPLACE FUNCTION sse_relay.publish(channel text, data text, event text DEFAULT NULL)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF channel IS NULL OR data IS NULL THEN
        RAISE 'sse_relay.publish: % is NULL', CASE WHEN channel IS NULL THEN 'channel' ELSE 'data' END
            USING ERRCODE = 'null_value_not_allowed';
    END IF;
    IF octet_length(channel) NOT BETWEEN 1 AND 63 THEN
        RAISE 'sse_relay.publish: a channel has 1 to 63 bytes, not %', octet_length(channel)
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF starts_with(channel, 'sse_relay') OR channel COLLATE "C" ~ '[\u0001-\u001f\u007f-\u009f]' THEN
        RAISE 'sse_relay.publish: channel % is not allowed', to_json(channel) USING
            ERRCODE = 'invalid_parameter_value',
            HINT = 'It may not begin with sse_relay nor contain control characters.';
    END IF;
    IF event IS NOT NULL AND (event IN ('error', 'open') OR starts_with(event, 'relay.')
                              OR octet_length(event) > 256 OR event COLLATE "C" ~ '[\r\n]') THEN
        RAISE 'sse_relay.publish: event name % is not allowed', to_json(left(event, 256)) USING
            ERRCODE = 'invalid_parameter_value',
            HINT = 'error, open and relay.* are reserved; no line end, at most 256 bytes.';
    END IF;
    IF octet_length(data) > 1048576 THEN
        RAISE 'sse_relay.publish: data has % bytes, more than 1048576', octet_length(data)
            USING ERRCODE = 'string_data_right_truncation';
    END IF;
    INSERT INTO sse_relay.pending (channel, event, data) VALUES (channel, nullif(event, ''), data);
    -- Equal notifications of one transaction are sent once.
    PERFORM pg_notify('sse_relay', pg_current_xact_id()::text);
END $$;

-- The same for JSON, which is sent as its text. A plain string literal is taken as text.
CREATE OR REPLACE FUNCTION sse_relay.publish(channel text, data jsonb, event text DEFAULT NULL)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM sse_relay.publish(channel, data::text, event);
END $$;

-- Where the log stands in the caller's snapshot: <epoch>-<newest id>@<snapshot>. A stream that is
-- opened with ?lastEventId= this gets what the caller cannot see yet. Never NULL.
CREATE OR REPLACE FUNCTION sse_relay.position()
RETURNS text LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    seen pg_snapshot := pg_current_snapshot();
    own xid8 := pg_current_xact_id_if_assigned();
    shown text := seen;
BEGIN
    IF own IS NOT NULL AND pg_visible_in_snapshot(own, seen) THEN
        -- A snapshot leaves its own transaction out of the list of those in progress. But what
        -- this one publishes later is not on the page, so it must not count as seen.
        SELECT concat_ws(':', pg_snapshot_xmin(seen), pg_snapshot_xmax(seen),
                string_agg(x::text, ',' ORDER BY x))
        INTO shown
        FROM (SELECT pg_snapshot_xip(seen) UNION SELECT own) AS running (x);
    END IF;
    -- A standby's snapshot does not list the transactions in progress. Without a snapshot nothing is
    -- missed and some is repeated; so also where it would be too long for an address.
    IF pg_is_in_recovery() OR octet_length(shown) > 4000 THEN
        shown := NULL;
    END IF;
    -- Between a promotion and the first relay that connects, the history has no name yet.
    RETURN concat_ws('@', coalesce(sse_relay.current_epoch(), 'unknown') || '-'
        || coalesce((SELECT max(id) FROM sse_relay.events), 0), shown);
END $$;

-- Publishes the rows of a table as they change. The arguments are the channel, which may take columns,
-- and the columns to send, or '*' for all:
--     CREATE TRIGGER publish AFTER INSERT OR UPDATE OR DELETE ON orders
--         FOR EACH ROW EXECUTE FUNCTION sse_relay.publish_row('tenant-{tenant_id}', 'id', 'status');
-- Sends {"op": "update", "table": "public.orders", "key": {"id": 7}, "row": {"id": 7, "status": "paid"}}.
-- A channel with a NULL in it is no channel. When an update changes the channel, the old one is told
-- too, without the row. What publish() refuses makes the change fail.
CREATE OR REPLACE FUNCTION sse_relay.publish_row()
RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    names text[] := TG_ARGV[1:];
    old_row jsonb;
    new_row jsonb;
    old_channel text;
    new_channel text;
    unknown text;
    message jsonb;
    key_names text[];
BEGIN
    IF TG_WHEN <> 'AFTER' OR TG_LEVEL <> 'ROW' OR TG_NARGS = 0 THEN
        RAISE 'sse_relay.publish_row: trigger % must be AFTER ... FOR EACH ROW and name a channel', TG_NAME
            USING ERRCODE = 'trigger_protocol_violated';
    END IF;
    IF TG_OP <> 'INSERT' THEN
        old_row := to_jsonb(OLD);
    END IF;
    IF TG_OP <> 'DELETE' THEN
        new_row := to_jsonb(NEW);
    END IF;
    SELECT name INTO unknown FROM unnest(names) AS name
        WHERE name <> '*' AND NOT coalesce(new_row, old_row) ? name;
    IF FOUND THEN
        RAISE 'sse_relay.publish_row: trigger % names column "%", which % does not have',
            TG_NAME, unknown, TG_RELID::regclass USING ERRCODE = 'undefined_column';
    END IF;
    SELECT array_agg(a.attname) INTO key_names
        FROM pg_index AS i JOIN pg_attribute AS a ON a.attrelid = i.indrelid
            AND a.attnum = ANY ((i.indkey::int2[])[0:i.indnkeyatts - 1])
        WHERE i.indrelid = TG_RELID AND i.indisprimary;
    message := jsonb_build_object(
        'op', lower(TG_OP), 'table', coalesce(pg_partition_root(TG_RELID), TG_RELID)::regclass);

    old_channel := sse_relay.row_channel(TG_ARGV[0], old_row);
    new_channel := sse_relay.row_channel(TG_ARGV[0], new_row);
    IF TG_OP = 'UPDATE' AND old_channel <> coalesce(new_channel, '') THEN
        PERFORM sse_relay.publish(old_channel, message || jsonb_build_object(
            'key', sse_relay.row_part(old_row, key_names), 'row', NULL));
    END IF;
    IF coalesce(new_channel, CASE TG_OP WHEN 'DELETE' THEN old_channel END) IS NOT NULL THEN
        PERFORM sse_relay.publish(coalesce(new_channel, old_channel), message || jsonb_build_object(
            'key', sse_relay.row_part(coalesce(new_row, old_row), key_names),
            'row', sse_relay.row_part(coalesce(new_row, old_row), names)));
    END IF;
    RETURN NULL;
END $$;

-- The channel of a row: 'tenant-{tenant_id}' with the row's values. NULL if one of them is.
CREATE OR REPLACE FUNCTION sse_relay.row_channel(template text, whole jsonb)
RETURNS text LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    channel text := '';
    part text[];
BEGIN
    IF whole IS NULL OR position('{' IN template) = 0 THEN
        RETURN CASE WHEN whole IS NOT NULL THEN template END;
    END IF;
    FOR part IN SELECT regexp_matches(template, '([^{]+)|\{([^{}]*)\}?', 'g') LOOP
        IF part[1] IS NULL AND NOT whole ? part[2] THEN
            RAISE 'sse_relay.publish_row: channel "%" names column "%", which the table does not have',
                template, part[2] USING ERRCODE = 'undefined_column';
        END IF;
        channel := channel || coalesce(part[1], whole ->> part[2]);
    END LOOP;
    RETURN channel;
END $$;

-- The named columns of a row; all for '*'; NULL for no list.
CREATE OR REPLACE FUNCTION sse_relay.row_part(whole jsonb, names text[])
RETURNS jsonb LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN names IS NULL THEN NULL WHEN '*' = ANY (names) THEN whole
        ELSE (SELECT coalesce(jsonb_object_agg(name, whole -> name), '{}') FROM unnest(names) AS name) END
$$;


-- ---------------------------------------------------------------- for the relay

-- The epoch, or NULL if the database is not the one it was given to: restored, promoted, copied.
-- A standby cannot tell its timeline; it knows the epoch of the server that it follows.
CREATE OR REPLACE FUNCTION sse_relay.current_epoch()
RETURNS text LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT e.epoch FROM sse_relay.epoch AS e
    WHERE e.xmin = e.xid::xid
        AND e.system = (SELECT system_identifier FROM pg_control_system())
        AND e.database = (SELECT oid FROM pg_database WHERE datname = current_database())
        AND CASE WHEN pg_is_in_recovery() THEN true
            ELSE e.timeline = left(pg_walfile_name(pg_current_wal_lsn()), 8) END
$$;

-- Begins a new epoch: every position given before leads to a gap.
CREATE OR REPLACE FUNCTION sse_relay.renew_epoch()
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE sse_relay.epoch SET
        epoch = left(replace(gen_random_uuid()::text, '-', ''), 12),
        system = (SELECT system_identifier FROM pg_control_system()),
        timeline = left(pg_walfile_name(pg_current_wal_lsn()), 8),
        database = (SELECT oid FROM pg_database WHERE datname = current_database()),
        xid = pg_current_xact_id();
    UPDATE sse_relay.settings SET pruned = least(pruned, (SELECT coalesce(max(id), 0) FROM sse_relay.events));
    PERFORM pg_notify('sse_relay', '');
END $$;

-- Called on each new connection, with the epoch and the id that the relay has come to, or NULL.
-- Renews the epoch if it is not this database's, or if ids went back: below what this relay has read,
-- or below what is in the log.
CREATE OR REPLACE FUNCTION sse_relay.attach(known_epoch text, known_id bigint,
    OUT epoch text, OUT newest bigint, OUT pruned bigint, OUT retention interval)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    LOCK TABLE sse_relay.epoch IN EXCLUSIVE MODE;
    epoch := sse_relay.current_epoch();
    SELECT coalesce(max(e.id), 0) INTO newest FROM sse_relay.events AS e;
    IF epoch IS NULL OR (known_epoch = epoch AND known_id > newest)
            OR newest > (SELECT last_value FROM sse_relay.events_id_seq) THEN
        PERFORM setval('sse_relay.events_id_seq', greatest(newest, last_value), newest > 0 OR is_called)
            FROM sse_relay.events_id_seq;
        PERFORM sse_relay.renew_epoch();
        epoch := sse_relay.current_epoch();
    END IF;
    SELECT s.pruned, s.retention INTO pruned, retention FROM sse_relay.settings AS s;
END $$;

-- What is committed and not yet numbered: transactions with their senders, at most 50,000, in an order
-- in which none comes before one that it could see: that of each one's last insertion. `since` is the
-- snapshot that an earlier call returned whose transactions have all been numbered: then only those are
-- looked for that were running or not begun at that time, and rows long dead are not looked at.
CREATE OR REPLACE FUNCTION sse_relay.waiting(since pg_snapshot DEFAULT NULL,
    OUT snapshot pg_snapshot, OUT xids xid8[], OUT pids int[])
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off AS $$
    SELECT pg_current_snapshot(),
        coalesce(array_agg(xid ORDER BY last), '{}'), coalesce(array_agg(pid ORDER BY last), '{}')
    FROM (
        SELECT xid, pid, max(seq) AS last FROM (
            SELECT xid, pid, seq FROM sse_relay.pending
                WHERE xid >= coalesce(pg_snapshot_xmax(since), '0')
            UNION ALL
            SELECT p.xid, p.pid, p.seq FROM pg_snapshot_xip(since) AS running,
                LATERAL (SELECT * FROM sse_relay.pending WHERE xid = running OFFSET 0) AS p
        ) AS rows GROUP BY xid, pid ORDER BY last LIMIT 50000
    ) AS found
$$;

-- Numbers the events of these transactions, as far as their senders match, in the order of the list:
-- at most 1,000 events and about 4 MiB. `more`: call it again with the same list. It returns no rows:
-- a relay that stops reading must not keep the lock. With `sweep` it wakes the other relays.
CREATE OR REPLACE FUNCTION sse_relay.advance(xids xid8[], pids int[], sweep boolean DEFAULT false,
    OUT moved int, OUT more boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        -- The snapshot must be younger than the lock.
        RAISE 'sse_relay.advance runs in READ COMMITTED only' USING ERRCODE = 'invalid_transaction_state';
    END IF;
    -- One at a time, until its commit is visible. A lock on a table needs rights on it; an advisory
    -- lock could be taken, and kept, by anyone.
    LOCK TABLE sse_relay.epoch IN EXCLUSIVE MODE;
    WITH wanted AS (
        SELECT w.xid, w.pid, min(w.place) AS place
        FROM unnest(xids, pids) WITH ORDINALITY AS w (xid, pid, place) GROUP BY w.xid, w.pid
        -- In order already here, the search below can stop at 1,000 events.
        ORDER BY place
    ), found AS MATERIALIZED (
        SELECT f.*, sum(octet_length(f.data)) OVER (ORDER BY f.place, f.seq) - octet_length(f.data) AS before
        FROM (
            SELECT w.place, p.* FROM wanted AS w, LATERAL (
                SELECT q.ctid AS row, q.* FROM sse_relay.pending AS q
                WHERE q.xid = w.xid AND q.pid = w.pid ORDER BY q.xid, q.seq LIMIT 1000
            ) AS p ORDER BY w.place, p.seq LIMIT 1000
        ) AS f
    ), taken AS (
        -- By address: a join could be planned the wrong way round, and read the whole table.
        DELETE FROM sse_relay.pending WHERE ctid = ANY (ARRAY(SELECT row FROM found WHERE before < 4194304))
    ), logged AS (
        INSERT INTO sse_relay.events (xid, channel, event, data)
        SELECT xid, channel, event, data FROM found WHERE before < 4194304 ORDER BY place, seq
        RETURNING octet_length(data) AS size
    )
    SELECT count(*), count(*) = 1000 OR coalesce(sum(size), 0) >= 4194304 INTO moved, more FROM logged;
    IF sweep AND moved > 0 THEN
        PERFORM pg_notify('sse_relay', '');
    END IF;
END $$;

-- Takes up to 1,000 of the oldest events that are past the retention out of the log, and says how many.
-- The newest stays. One at a time: who comes second is told 0.
-- Without a relay:  SELECT sse_relay.prune() \watch 0.1
CREATE OR REPLACE FUNCTION sse_relay.prune()
RETURNS int LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET jit = off AS $$
DECLARE
    gone bigint;
    kept interval;
    upto bigint;
    removed int;
BEGIN
    SELECT pruned, retention INTO gone, kept FROM sse_relay.settings FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
        RETURN 0;
    END IF;
    SELECT max(id) INTO upto FROM (
        SELECT id, bool_and(created < clock_timestamp() - kept) OVER (ORDER BY id) AS old FROM (
            SELECT id, created FROM sse_relay.events WHERE id > gone ORDER BY id LIMIT 1000
        ) AS oldest
    ) AS prefix WHERE old AND id < (SELECT max(id) FROM sse_relay.events);
    IF upto IS NULL THEN
        RETURN 0;
    END IF;
    DELETE FROM sse_relay.events WHERE id > gone AND id <= upto;
    GET DIAGNOSTICS removed = ROW_COUNT;
    UPDATE sse_relay.settings SET pruned = upto;
    RETURN removed;
END $$;

-- To throw the log away, in a transaction: LOCK TABLE sse_relay.epoch IN EXCLUSIVE MODE, and
-- TRUNCATE sse_relay.pending, sse_relay.events. All clients get a gap.
-- So they do when its newest events are deleted: their ids could be given out again.
CREATE OR REPLACE FUNCTION sse_relay.rewritten()
RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        IF NOT EXISTS (SELECT FROM deleted
                WHERE id > (SELECT coalesce(max(id), 0) FROM sse_relay.events)) THEN
            RETURN NULL;
        END IF;
    END IF;
    PERFORM sse_relay.renew_epoch();
    RETURN NULL;
END $$;

DO $$
DECLARE
    emptied regclass;
BEGIN
    FOREACH emptied IN ARRAY ARRAY['sse_relay.pending', 'sse_relay.events']::regclass[] LOOP
        IF NOT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = emptied AND tgname = 'truncated') THEN
            EXECUTE format('CREATE TRIGGER truncated AFTER TRUNCATE ON %s'
                ' FOR EACH STATEMENT EXECUTE FUNCTION sse_relay.rewritten()', emptied);
        END IF;
    END LOOP;
    IF NOT EXISTS (SELECT FROM pg_trigger
            WHERE tgrelid = 'sse_relay.events'::regclass AND tgname = 'deleted') THEN
        CREATE TRIGGER deleted AFTER DELETE ON sse_relay.events REFERENCING OLD TABLE AS deleted
            FOR EACH STATEMENT EXECUTE FUNCTION sse_relay.rewritten();
    END IF;
    PERFORM sse_relay.attach(NULL, NULL);
END $$;

-- Functions are everybody's unless taken away. Grants to roles stay.
REVOKE ALL ON SCHEMA sse_relay FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA sse_relay FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA sse_relay FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA sse_relay FROM PUBLIC;
