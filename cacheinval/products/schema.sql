-- The reference application's own table, and what keeps its versions honest whoever writes to it: the version of an id
-- only grows, one at a time, also over a DELETE.

CREATE TABLE IF NOT EXISTS products (
    id text PRIMARY KEY,
    name text NOT NULL,
    price numeric NOT NULL,
    version bigint NOT NULL
);

-- The last version of each id that was deleted.
CREATE TABLE IF NOT EXISTS product_tombstones (
    id text PRIMARY KEY,
    version bigint NOT NULL
);

CREATE OR REPLACE FUNCTION product_version_next() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
AS $$
DECLARE
    last bigint;
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.id = OLD.id THEN
        last := OLD.version;
    ELSE
        -- Waits for a DELETE of this id that is under way, so that the next statement sees what it leaves behind.
        PERFORM FROM products WHERE id = NEW.id FOR UPDATE;
        last := coalesce((SELECT version FROM product_tombstones WHERE id = NEW.id), 0);
    END IF;
    NEW.version := greatest(NEW.version, last + 1);
    RETURN NEW;
END
$$;

CREATE OR REPLACE FUNCTION product_version_kept() RETURNS trigger
    LANGUAGE plpgsql
    SET search_path FROM CURRENT
AS $$
BEGIN
    IF TG_OP = 'TRUNCATE' THEN
        INSERT INTO product_tombstones AS kept (id, version)
            SELECT id, version FROM products
            ON CONFLICT (id) DO UPDATE SET version = greatest(kept.version, excluded.version);
        RETURN NULL;
    END IF;
    IF TG_OP <> 'INSERT' THEN
        INSERT INTO product_tombstones AS kept (id, version)
            VALUES (OLD.id, OLD.version)
            ON CONFLICT (id) DO UPDATE SET version = greatest(kept.version, excluded.version);
    END IF;
    -- Between the choice of the version and this row's place in the index, another transaction may have made and
    -- deleted the same id. From here on none can.
    IF TG_OP <> 'DELETE' AND EXISTS (SELECT FROM product_tombstones WHERE id = NEW.id AND version >= NEW.version) THEN
        RAISE EXCEPTION 'product % was made and deleted by others meanwhile: try again', NEW.id
            USING ERRCODE = 'serialization_failure';
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE TRIGGER product_version_next
    BEFORE INSERT OR UPDATE ON products
    FOR EACH ROW EXECUTE FUNCTION product_version_next();

CREATE OR REPLACE TRIGGER product_version_truncated
    BEFORE TRUNCATE ON products
    FOR EACH STATEMENT EXECUTE FUNCTION product_version_kept();

CREATE OR REPLACE TRIGGER product_version_kept
    AFTER INSERT OR DELETE OR UPDATE OF id ON products
    FOR EACH ROW EXECUTE FUNCTION product_version_kept();
