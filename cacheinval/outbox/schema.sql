-- The schema `cacheinval`, version {SCHEMA_VERSION}, for PostgreSQL 14 or newer. Safe to run again, and on a database that has it.
-- `cacheinval schema apply` runs this in one transaction, one process at a time.
--
-- Who needs what:
--   a role that calls cacheinval.invalidate()  nothing: PUBLIC may
--   a role that writes a tracked table         nothing either (track.sql)
--   an embedded client, a worker or a relay    GRANT SELECT, INSERT, DELETE ON cacheinval.outbox TO …;
--                                              GRANT SELECT, INSERT, UPDATE, DELETE
--                                                  ON cacheinval.origins, cacheinval.instances TO …;
--                                              GRANT SELECT ON cacheinval.schema_version TO …;
--                                              (`cacheinval schema grant ROLE` does so)
-- Clients write the outbox by a plain INSERT, not by a function: only an INSERT can be put in front of another
-- statement as a WITH that surely runs (a SELECT that nobody refers to is skipped), it is the cheaper of the two, and
-- who publishes rows needs a grant to DELETE them anyway.

DO $$
DECLARE
    newest integer;
BEGIN
    IF to_regclass('cacheinval.schema_version') IS NOT NULL THEN
        EXECUTE 'SELECT max(version) FROM cacheinval.schema_version' INTO newest;
        IF newest > {SCHEMA_VERSION} THEN
            RAISE EXCEPTION 'the schema cacheinval in this database has version %; this cacheinval knows versions up to {SCHEMA_VERSION}', newest
                USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'Upgrade cacheinval here.';
        END IF;
    END IF;
    IF to_regnamespace('cacheinval') IS NULL THEN
        CREATE SCHEMA cacheinval;
    -- What follows runs with the rights of whoever applies it, and must not trust tables that somebody else laid there.
    ELSIF pg_get_userbyid((SELECT nspowner FROM pg_namespace WHERE nspname = 'cacheinval')) <> current_user THEN
        RAISE EXCEPTION 'the schema cacheinval belongs to role %, not to %',
            pg_get_userbyid((SELECT nspowner FROM pg_namespace WHERE nspname = 'cacheinval')), current_user
            USING ERRCODE = 'insufficient_privilege', HINT = 'Apply it as the owner (SET ROLE).';
    END IF;
END
$$;

GRANT USAGE ON SCHEMA cacheinval TO PUBLIC;

CREATE TABLE IF NOT EXISTS cacheinval.schema_version (
    version integer PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- {MIGRATIONS}

-- Invalidations that are committed and not yet confirmed by the broker. Rows are inserted and deleted, never updated,
-- and live for milliseconds, so the table is nearly always empty:
-- * no index but the one that DELETE needs: a scan of the few pages is cheaper than keeping an index on publish_at up
--   to date in every writing transaction;
-- * fillfactor stays 100: free space in a page serves only UPDATEs;
-- * dead rows are all that a poll has to step over, so autovacuum comes after a fixed number of them (the usual share
--   of the table's size says nothing here) and does not pause; it still may give empty pages back, since what a
--   backlog leaves behind would be read by every poll;
-- * rows are not frozen or analyzed for their inserts: they are gone before it pays.
CREATE TABLE IF NOT EXISTS cacheinval.outbox (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    namespace text NOT NULL,
    keys text[] NOT NULL DEFAULT '{}',
    versions bigint[], -- null, or one for each key (null where unknown)
    tags text[] NOT NULL DEFAULT '{}',
    everything boolean NOT NULL DEFAULT false,
    context text, -- of the trace that the write is part of, if it is traced
    recorded_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    publish_at timestamptz NOT NULL DEFAULT clock_timestamp() -- the relay leaves the row to its client until then
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 2000,
    autovacuum_vacuum_cost_delay = 0,
    autovacuum_vacuum_insert_threshold = -1,
    toast.autovacuum_vacuum_scale_factor = 0,
    toast.autovacuum_vacuum_threshold = 2000,
    toast.autovacuum_vacuum_cost_delay = 0,
    toast.autovacuum_vacuum_insert_threshold = -1
);

-- The last confirmed number of each publishing channel, noted together with the deletion of what it confirmed. Ticks tell
-- these numbers, so that an instance which missed a message learns of it although nothing further is published. A row
-- for each channel that was open lately; the relay's leader removes old ones.
CREATE TABLE IF NOT EXISTS cacheinval.origins (
    namespace text NOT NULL,
    origin text NOT NULL,
    seq bigint NOT NULL,
    confirmed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (namespace, origin)
) WITH (
    fillfactor = 50, -- updated all the time: new versions find room in the same page
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 500,
    autovacuum_vacuum_cost_delay = 0
);

-- The live instances, for writers that wait for the others. Each renews its row, and serves from its cache only while the
-- row stands, if it promises freshness; a row that has expired is nobody's. Times are this database's.
CREATE TABLE IF NOT EXISTS cacheinval.instances (
    namespace text NOT NULL,
    id text NOT NULL,
    session text NOT NULL, -- random for each process whose cache ends with it; '' for a cache that outlives its process
    max_staleness float8, -- seconds after which it is safe without an answer; null: never
    since timestamptz NOT NULL, -- from then on everybody has seen this row; 'infinity' until that is known
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (namespace, id, session)
) WITH (
    fillfactor = 50, -- as above
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 500,
    autovacuum_vacuum_cost_delay = 0
);

-- Which database this is: the cluster that it was made in, and the database within it.
CREATE OR REPLACE FUNCTION cacheinval.source() RETURNS text
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT (SELECT system_identifier FROM pg_control_system()) || '.' || oid FROM pg_database WHERE datname = current_database()
$$;

-- Refuses what could not be published as a message; `what` is the argument that the error names.
CREATE OR REPLACE FUNCTION cacheinval.check_names(what text, names text[]) RETURNS void
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    position integer := 0;
    name text;
BEGIN
    IF array_ndims(names) > 1 THEN
        RAISE EXCEPTION '% has % dimensions; accepted: 1', what, array_ndims(names) USING ERRCODE = 'array_subscript_error';
    END IF;
    FOREACH name IN ARRAY names LOOP
        position := position + 1;
        IF name IS NULL THEN
            RAISE EXCEPTION '% has a NULL at position %', what, position USING ERRCODE = 'null_value_not_allowed';
        ELSIF name = '' THEN
            RAISE EXCEPTION '% has an empty string at position %', what, position USING ERRCODE = 'invalid_parameter_value';
        ELSIF octet_length(name) > 128 AND octet_length(convert_to(name, 'UTF8')) > 512 THEN
            RAISE EXCEPTION '% has a string of % bytes at position %; accepted: at most 512 bytes of UTF-8',
                what, octet_length(convert_to(name, 'UTF8')), position USING ERRCODE = 'string_data_right_truncation';
        END IF;
    END LOOP;
END
$$;

CREATE OR REPLACE FUNCTION cacheinval.check_namespace(namespace text) RETURNS void
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF namespace IS NULL OR namespace !~ '^[A-Za-z0-9_-]{1,64}$' THEN
        RAISE EXCEPTION 'namespace % is not accepted: 1 to 64 letters, digits, "_" and "-"',
            coalesce(quote_literal(left(namespace, 80)), 'NULL') USING ERRCODE = 'invalid_parameter_value';
    END IF;
END
$$;

-- Records an invalidation in the current transaction. It runs with its owner's rights, and so needs a search_path that
-- no caller can change.
CREATE OR REPLACE FUNCTION cacheinval.invalidate(
    keys text[],
    versions bigint[] DEFAULT NULL,
    tags text[] DEFAULT '{}',
    namespace text DEFAULT 'default'
) RETURNS void
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    most CONSTANT integer := 1000; -- names of each kind in one row
BEGIN
    -- A slice counts from 1, whatever the bounds of its array are.
    keys := coalesce(keys[:], '{}');
    tags := coalesce(tags[:], '{}');
    PERFORM cacheinval.check_names('keys', keys);
    PERFORM cacheinval.check_names('tags', tags);
    IF cardinality(keys) = 0 AND cardinality(tags) = 0 THEN
        RAISE EXCEPTION 'neither keys nor tags to invalidate' USING ERRCODE = 'invalid_parameter_value';
    END IF;
    IF array_ndims(versions) > 1 THEN
        RAISE EXCEPTION 'versions has % dimensions; accepted: 1', array_ndims(versions) USING ERRCODE = 'array_subscript_error';
    ELSIF cardinality(versions) <> cardinality(keys) THEN
        RAISE EXCEPTION 'versions has % elements for % keys; accepted: NULL, or one for each key',
            cardinality(versions), cardinality(keys) USING ERRCODE = 'array_subscript_error';
    END IF;
    versions := versions[:];
    PERFORM cacheinval.check_namespace(namespace);
    FOR start IN 1 .. greatest(cardinality(keys), cardinality(tags)) BY most LOOP
        INSERT INTO cacheinval.outbox (namespace, keys, versions, tags)
            VALUES (
                invalidate.namespace,
                invalidate.keys[start : start + most - 1],
                invalidate.versions[start : start + most - 1],
                invalidate.tags[start : start + most - 1]
            );
    END LOOP;
END
$$;

-- Records, in the current transaction, that every entry of the namespace must go.
CREATE OR REPLACE FUNCTION cacheinval.invalidate_all(namespace text DEFAULT 'default') RETURNS void
    LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM cacheinval.check_namespace(namespace);
    INSERT INTO cacheinval.outbox (namespace, everything) VALUES (invalidate_all.namespace, true);
END
$$;

REVOKE ALL ON FUNCTION cacheinval.check_names(text, text[]) FROM PUBLIC;
REVOKE ALL ON FUNCTION cacheinval.check_namespace(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cacheinval.invalidate(text[], bigint[], text[], text) TO PUBLIC;
GRANT EXECUTE ON FUNCTION cacheinval.invalidate_all(text) TO PUBLIC;

COMMENT ON FUNCTION cacheinval.invalidate(text[], bigint[], text[], text) IS
    'Records, in the current transaction, that these cached keys and everything with these tags must be evicted.';
COMMENT ON FUNCTION cacheinval.invalidate_all(text) IS
    'Records, in the current transaction, that every cached entry of the namespace must be evicted.';

INSERT INTO cacheinval.schema_version (version) VALUES ({SCHEMA_VERSION}) ON CONFLICT DO NOTHING;
