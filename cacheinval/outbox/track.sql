-- Tables that record their own changes, whoever makes them. Comes after schema.sql; safe to run again.

-- The table itself and, at every depth, its partitions or the tables that inherit from it.
CREATE OR REPLACE FUNCTION cacheinval.with_children(target regclass) RETURNS SETOF regclass
    LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    WITH RECURSIVE family (member) AS (
        SELECT target::oid
        UNION
        SELECT inhrelid FROM pg_inherits JOIN family ON inhparent = member
    )
    SELECT member::regclass FROM family
$$;

-- 'order:{shop}:{id}' as {order:,shop,:,id,""}: text and column in turn, text first and last.
CREATE OR REPLACE FUNCTION cacheinval.template_parts(key_template text) RETURNS text[]
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    parts text[] := ARRAY[''];
    piece text;
BEGIN
    FOR piece IN
        SELECT match[1] FROM regexp_matches(key_template, '[{][{]|[}][}]|[{][^{}]+[}]|[^{}]+|.', 'g') AS match
    LOOP
        IF piece IN ('{', '}') THEN
            RAISE EXCEPTION 'key_template % has a lone "%"; accepted: {column}, {{ for "{", }} for "}"',
                quote_literal(key_template), piece USING ERRCODE = 'invalid_parameter_value';
        ELSIF piece LIKE '{_%}' THEN
            parts := parts || ARRAY[substr(piece, 2, length(piece) - 2), ''];
        ELSE
            piece := CASE piece WHEN '{{' THEN '{' WHEN '}}' THEN '}' ELSE piece END;
            parts[cardinality(parts)] := parts[cardinality(parts)] || piece;
        END IF;
    END LOOP;
    RETURN parts;
END
$$;

-- Checks what track() is given, and puts it together as the arguments of its triggers: namespace, version column or '',
-- tags, and the parts of the template. It runs as its owner to reach the checks that PUBLIC has no business with.
CREATE OR REPLACE FUNCTION cacheinval.trigger_arguments(
    target regclass, key_template text, version_column name, tags text[], namespace text
) RETURNS text[]
    LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    relation pg_class%ROWTYPE;
    parts text[];
    columns text[];
    known text[];
    name text;
BEGIN
    SELECT * INTO relation FROM pg_class WHERE oid = target;
    IF relation.relkind IS NULL OR relation.relkind NOT IN ('r', 'p') THEN
        RAISE EXCEPTION '% is not a table', coalesce(target::text, 'NULL') USING ERRCODE = 'wrong_object_type';
    ELSIF relation.relpersistence = 't' THEN
        RAISE EXCEPTION '% is a temporary table; accepted: tables that others can see', target
            USING ERRCODE = 'wrong_object_type';
    ELSIF relation.relnamespace = to_regnamespace('cacheinval') THEN
        RAISE EXCEPTION '% is a table of cacheinval itself', target USING ERRCODE = 'wrong_object_type';
    ELSIF EXISTS (SELECT FROM pg_inherits WHERE inhrelid = target) THEN
        RAISE EXCEPTION '% is a part of %, and a write to that would pass by unseen', target,
            (SELECT inhparent::regclass FROM pg_inherits WHERE inhrelid = target LIMIT 1)
            USING ERRCODE = 'wrong_object_type', HINT = 'Track the whole: its parts come with it.';
    ELSIF EXISTS (SELECT FROM pg_class WHERE oid IN (SELECT cacheinval.with_children(target)) AND relkind = 'f') THEN
        RAISE EXCEPTION '% has a part that is a foreign table, whose changes no trigger sees', target
            USING ERRCODE = 'wrong_object_type';
    END IF;

    PERFORM cacheinval.check_names('key_template', ARRAY[key_template]);
    tags := coalesce(tags[:], '{}');
    PERFORM cacheinval.check_names('tags', tags);
    PERFORM cacheinval.check_namespace(namespace);

    parts := cacheinval.template_parts(key_template);
    columns := ARRAY(SELECT part FROM unnest(parts) WITH ORDINALITY AS listed (part, place) WHERE place % 2 = 0);
    -- A virtual column has no value where a trigger looks.
    known := ARRAY(
        SELECT attname FROM pg_attribute
        WHERE attrelid = target AND attnum > 0 AND NOT attisdropped AND attgenerated IN ('', 's') ORDER BY attnum
    );
    FOREACH name IN ARRAY columns || version_column::text LOOP
        IF name <> ALL (known) THEN
            RAISE EXCEPTION '% has no column %; accepted: %', target, quote_ident(name), array_to_string(known, ', ')
                USING ERRCODE = 'undefined_column';
        END IF;
    END LOOP;
    FOR name IN SELECT attname FROM pg_attribute WHERE attrelid = target AND attname = ANY (columns) AND NOT attnotnull LOOP
        RAISE WARNING 'column % of % may be NULL: a row where it is will invalidate everything in namespace %',
            quote_ident(name), target, namespace;
    END LOOP;
    SELECT format_type(coalesce(nullif(typbasetype, 0), pg_type.oid), NULL) INTO name
        FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid WHERE attrelid = target AND attname = version_column;
    IF name NOT IN ('smallint', 'integer', 'bigint') THEN
        RAISE EXCEPTION 'version_column % of % is of type %; accepted: smallint, integer, bigint',
            quote_ident(version_column), target, name USING ERRCODE = 'datatype_mismatch';
    END IF;
    RETURN ARRAY[namespace, coalesce(version_column, ''), tags::text] || parts;
END
$$;

-- What the triggers run, with the rights of whoever makes the change: all that it may do besides is invalidate, which
-- everybody may. None of its arguments is ever run as SQL. The change must neither fail because its keys cannot be told
-- nor pass unrecorded: then everything goes. The settings fix how values look as text.
CREATE OR REPLACE FUNCTION cacheinval.record_change() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path = pg_catalog, pg_temp
    SET datestyle = 'ISO, YMD'
    SET intervalstyle = 'postgres'
    SET timezone = 'UTC'
    SET bytea_output = 'hex'
    SET extra_float_digits = 1
    SET lc_monetary = 'C'
AS $$
DECLARE
    most CONSTANT integer := 100000; -- rows of one statement that are told apart
    namespace CONSTANT text := TG_ARGV[0];
    version CONSTANT text := CASE TG_ARGV[1] WHEN '' THEN 'NULL' ELSE quote_ident(TG_ARGV[1]) END;
    key text := quote_literal(TG_ARGV[3]);
    number integer := most + 1;
    old_keys text[];
    old_versions bigint[];
    new_keys text[];
    new_versions bigint[];
    keys text[];
    versions bigint[];
    usable boolean;
    problem text;
BEGIN
    IF TG_OP = 'DELETE' THEN
        SELECT count(*) INTO number FROM (SELECT FROM old_rows LIMIT most + 1) AS counted;
    ELSIF TG_OP <> 'TRUNCATE' THEN
        SELECT count(*) INTO number FROM (SELECT FROM new_rows LIMIT most + 1) AS counted;
    END IF;
    IF number = 0 THEN
        RETURN NULL;
    ELSIF number > most THEN
        PERFORM cacheinval.invalidate_all(namespace);
        RETURN NULL;
    END IF;

    FOR place IN 4 .. TG_NARGS - 2 BY 2 LOOP
        key := format('%s || %I::text || %L', key, TG_ARGV[place], TG_ARGV[place + 1]);
    END LOOP;
    BEGIN -- only reads, so that it does not cost a transaction id of its own
        IF TG_OP <> 'INSERT' THEN
            EXECUTE format('SELECT array_agg((%s)::text), array_agg(%s::bigint) FROM old_rows', key, version)
                INTO old_keys, old_versions;
        END IF;
        IF TG_OP <> 'DELETE' THEN
            EXECUTE format('SELECT array_agg((%s)::text), array_agg(%s::bigint) FROM new_rows', key, version)
                INTO new_keys, new_versions;
        END IF;
        -- Whatever the version says, nobody may take what was for what is: a key that is gone, that another row took, or
        -- whose version was forgotten, is told with one more than its last.
        SELECT array_agg(key_now), array_agg(version_now),
                bool_and(coalesce(octet_length(convert_to(key_now, 'UTF8')) BETWEEN 1 AND 512, false))
            INTO keys, versions, usable
            FROM (
                SELECT listed.key, CASE WHEN max(present) > max(gone) OR max(gone) IS NULL THEN max(present) ELSE max(gone) + 1 END
                FROM (
                    SELECT *, NULL FROM unnest(new_keys, new_versions)
                    UNION ALL SELECT gone.key, NULL, gone.version FROM unnest(old_keys, old_versions) AS gone (key, version)
                ) AS listed (key, present, gone)
                GROUP BY listed.key
            ) AS merged (key_now, version_now);
    EXCEPTION WHEN OTHERS THEN
        problem := SQLERRM;
    END;
    IF problem IS NULL AND NOT usable THEN
        problem := 'a key is NULL, empty, or longer than 512 bytes';
    END IF;
    IF problem IS NULL THEN
        versions := CASE WHEN TG_ARGV[1] <> '' THEN versions END;
        PERFORM cacheinval.invalidate(keys, versions, TG_ARGV[2]::text[], namespace);
    ELSE
        RAISE WARNING 'everything in namespace % is invalidated, since trigger % on % cannot tell the keys: %',
            namespace, quote_ident(TG_NAME), TG_RELID::regclass, problem;
        PERFORM cacheinval.invalidate_all(namespace);
    END IF;
    RETURN NULL;
END
$$;

-- What is tracked, by table and the end of its triggers' names, so that one can tell when triggers are gone (version 2).
CREATE TABLE IF NOT EXISTS cacheinval.tracked (
    target regclass NOT NULL,
    digest text NOT NULL,
    PRIMARY KEY (target, digest)
);
INSERT INTO cacheinval.tracked -- by an older version
    SELECT DISTINCT tgrelid, right(tgname, 16) FROM pg_trigger WHERE tgfoid = 'cacheinval.record_change()'::regprocedure
    ON CONFLICT DO NOTHING;

-- Notes which triggers there are, and so nothing that is not so, whoever calls it.
CREATE OR REPLACE FUNCTION cacheinval.note_tracked(target regclass) RETURNS void
    LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    INSERT INTO cacheinval.tracked
        SELECT DISTINCT tgrelid, right(tgname, 16) FROM pg_trigger
        WHERE tgrelid IN (SELECT cacheinval.with_children(target)) AND tgfoid = 'cacheinval.record_change()'::regprocedure
        ON CONFLICT DO NOTHING
$$;

-- What has no trigger any more, as its table's owner sees it: that its triggers are gone may be an accident, which nobody else
-- may hide. In a view whoever asks is the current user, also one whose rights a function lends, whatever the session is.
CREATE OR REPLACE VIEW cacheinval.forgettable AS
    SELECT noted.target FROM cacheinval.tracked AS noted
    WHERE NOT EXISTS (
            SELECT FROM pg_catalog.pg_trigger
            WHERE tgrelid = noted.target AND tgfoid = 'cacheinval.record_change()'::regprocedure
        ) AND NOT EXISTS (
            SELECT FROM pg_catalog.pg_class
            WHERE pg_class.oid = noted.target AND NOT pg_catalog.pg_has_role(current_user, relowner, 'USAGE')
        );

-- Every table that is tracked, or was and has not been untracked, with its parts; `triggers` are those of its four that work.
CREATE OR REPLACE FUNCTION cacheinval.tracking() RETURNS TABLE (relation regclass, attached_later boolean, triggers bigint)
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT member, NOT EXISTS (
            SELECT FROM cacheinval.tracked AS own WHERE own.target = member AND own.digest = noted.digest
        ), count(tgname) FILTER (WHERE tgenabled = 'A')
    FROM cacheinval.tracked AS noted
    JOIN pg_class ON pg_class.oid = noted.target -- else the table is gone
    CROSS JOIN cacheinval.with_children(noted.target) AS member
    LEFT JOIN pg_trigger ON tgrelid = member AND right(tgname, 16) = noted.digest
        AND tgfoid = 'cacheinval.record_change()'::regprocedure
    GROUP BY member, noted.target, noted.digest
$$;

-- From now on every INSERT, UPDATE, DELETE and TRUNCATE on the table, whoever makes it, records its own invalidations;
-- changes from before are covered by invalidating everything once. The same again does nothing. Another template or
-- namespace is tracked besides; other tags or another version column replace those given before.
CREATE OR REPLACE FUNCTION cacheinval.track(
    target regclass,
    key_template text,
    version_column name DEFAULT NULL,
    tags text[] DEFAULT '{}',
    namespace text DEFAULT 'default'
) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '3s' -- whoever writes meanwhile queues behind us
AS $$
DECLARE
    arguments CONSTANT text[] := cacheinval.trigger_arguments(target, key_template, version_column, tags, namespace);
    digest CONSTANT text := left(encode(sha256(convert_to(namespace || ' ' || key_template, 'UTF8')), 'hex'), 16);
    member regclass;
    event text;
    tables text;
    name text;
BEGIN
    IF NOT EXISTS (
        SELECT FROM cacheinval.with_children(target) AS relation, unnest(ARRAY['insert', 'update', 'delete', 'truncate']) AS kind
        WHERE NOT EXISTS (
            SELECT FROM pg_trigger
            WHERE tgrelid = relation AND tgname = format('cacheinval_%s_%s', kind, digest) AND tgenabled = 'A'
                AND tgfoid = 'cacheinval.record_change()'::regprocedure
                AND tgargs = (
                    SELECT string_agg(convert_to(argument, getdatabaseencoding()) || decode('00', 'hex'), '')
                    FROM unnest(arguments) AS argument
                )
        )
    ) THEN
        PERFORM cacheinval.note_tracked(target);
        RETURN;
    END IF;
    BEGIN
        EXECUTE format('LOCK TABLE %s IN SHARE ROW EXCLUSIVE MODE', target); -- its children with it
    EXCEPTION WHEN lock_not_available THEN
        RAISE EXCEPTION '% is in use by a transaction that did not end within 3 s', target
            USING ERRCODE = 'lock_not_available', HINT = 'Nothing was changed: try again.';
    END;
    FOR member IN SELECT cacheinval.with_children(target) LOOP
        FOR event, tables IN VALUES
            ('insert', 'REFERENCING NEW TABLE AS new_rows'),
            ('update', 'REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows'),
            ('delete', 'REFERENCING OLD TABLE AS old_rows'),
            ('truncate', '')
        LOOP
            name := format('cacheinval_%s_%s', event, digest);
            EXECUTE format(
                'CREATE OR REPLACE TRIGGER %I AFTER %s ON %s %s FOR EACH STATEMENT EXECUTE FUNCTION cacheinval.record_change(%s)',
                name, event, member, tables,
                (SELECT string_agg(quote_literal(argument), ', ') FROM unnest(arguments) AS argument)
            );
            -- Also for sessions that have set session_replication_role.
            EXECUTE format('ALTER TABLE ONLY %s ENABLE ALWAYS TRIGGER %I', member, name);
        END LOOP;
    END LOOP;
    PERFORM cacheinval.note_tracked(target);
    PERFORM cacheinval.invalidate_all(namespace);
END
$$;

-- Ends all that track() has begun on the table and its children.
CREATE OR REPLACE FUNCTION cacheinval.untrack(target regclass) RETURNS void
    LANGUAGE plpgsql VOLATILE
    SET search_path = pg_catalog, pg_temp
    SET lock_timeout = '3s'
AS $$
DECLARE
    member regclass;
    name text;
BEGIN
    IF NOT pg_has_role(current_user, (SELECT relowner FROM pg_class WHERE oid = target), 'USAGE') THEN
        RAISE EXCEPTION 'must be owner of table %', target USING ERRCODE = 'insufficient_privilege';
    END IF;
    FOR member, name IN
        SELECT tgrelid, tgname FROM pg_trigger
        WHERE tgrelid IN (SELECT cacheinval.with_children(target)) AND tgfoid = 'cacheinval.record_change()'::regprocedure
    LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', name, member);
    END LOOP;
    DELETE FROM cacheinval.forgettable AS noted
        WHERE noted.target IN (SELECT cacheinval.with_children(untrack.target));
EXCEPTION WHEN lock_not_available THEN
    RAISE EXCEPTION '% is in use by a transaction that did not end within 3 s', target
        USING ERRCODE = 'lock_not_available', HINT = 'Nothing was changed: try again.';
END
$$;

REVOKE ALL ON FUNCTION cacheinval.template_parts(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION cacheinval.with_children(regclass) TO PUBLIC;
GRANT EXECUTE ON FUNCTION cacheinval.trigger_arguments(regclass, text, name, text[], text) TO PUBLIC;
GRANT EXECUTE ON FUNCTION cacheinval.record_change() TO PUBLIC;
GRANT EXECUTE ON FUNCTION cacheinval.track(regclass, text, name, text[], text) TO PUBLIC;
GRANT EXECUTE ON FUNCTION cacheinval.untrack(regclass) TO PUBLIC;
GRANT EXECUTE ON FUNCTION cacheinval.note_tracked(regclass) TO PUBLIC;
GRANT SELECT, DELETE ON cacheinval.forgettable TO PUBLIC;
GRANT EXECUTE ON FUNCTION cacheinval.tracking() TO PUBLIC;

COMMENT ON FUNCTION cacheinval.track(regclass, text, name, text[], text) IS
    'Makes every change of the table, whoever makes it, record what it invalidates.';
COMMENT ON FUNCTION cacheinval.untrack(regclass) IS
    'Ends all that cacheinval.track() has begun on the table.';
