-- Every statement of a PostgreSQL store but the listings (listing.py), each under its name. {jobs}, {tasks}, {metadata},
-- {kept} and {owners} stand for the full names of the tables, {columns} for the columns of a job in the order of
-- stores/rows.py, {values} for $1, $2, … one for each of those columns and four more. They run with search_path = pg_catalog, so no other schema can give a name, a
-- type or an operator another meaning. "Open" states are spelled as in the partial indexes of schema.py.

-- job_by_id --
SELECT {columns} FROM {jobs} AS jobs WHERE id = $1

-- job_by_key --
SELECT {columns} FROM {jobs} AS jobs WHERE key_hash = $1

-- job_by_task --
SELECT {columns} FROM {jobs} AS jobs WHERE id = (SELECT job_id FROM {tasks} WHERE hash = $1)

-- jobs_by_ids --
SELECT {columns} FROM {jobs} AS jobs WHERE id = ANY($1)

-- job_for_update --
SELECT {columns}, jobs.mark FROM {jobs} AS jobs WHERE id = $1 FOR UPDATE

-- unsaved_jobs --
SELECT {columns} FROM {jobs} AS jobs
WHERE unsaved AND changed_at >= $4 AND (changed_at, id) > ($1, $2)
ORDER BY changed_at, id LIMIT $3

-- hand_over_job --
-- Leases are measured by the clock of the database, since those of the replicas differ. Consumers that wait are told
-- ($3), so that they know when this lease ends. From the first call on it is known that the store has consumers.
WITH noted AS (
    INSERT INTO {kept} VALUES ('consumer', '') ON CONFLICT DO NOTHING
), next AS (
    SELECT id, handover_at FROM {jobs}
    WHERE handover_at IS NOT NULL AND state IN ('done', 'failed', 'expired', 'unknown')
        AND handover_at <= extract(epoch FROM clock_timestamp())
    ORDER BY changed_at, id LIMIT 1 FOR UPDATE SKIP LOCKED
), leased AS (
    UPDATE {jobs} AS jobs
    SET handover_at = extract(epoch FROM clock_timestamp()) + $1::float8, version = version + 1
    FROM next WHERE jobs.id = next.id
    RETURNING {columns}, next.handover_at AS was_handed_over_at
)
SELECT leased.*, pg_notify($2, $3) FROM leased

-- next_handover --
SELECT MIN(handover_at) - extract(epoch FROM clock_timestamp())::float8 FROM {jobs}
WHERE handover_at IS NOT NULL AND state IN ('done', 'failed', 'expired', 'unknown')

-- next_due --
SELECT MIN(due_at) FROM {jobs}

-- count_open_jobs --
SELECT COUNT(*) FROM {jobs} WHERE state IN ('sending', 'uncertain', 'accepted')

-- keep_secret --
INSERT INTO {kept} VALUES ('webhook secret', $1) ON CONFLICT DO NOTHING

-- kept_secret --
SELECT value FROM {kept} WHERE name = 'webhook secret'

-- insert_job --
INSERT INTO {jobs} ({columns_to_insert}, key_hash, owner, mark, unsaved) VALUES ({values})
ON CONFLICT DO NOTHING RETURNING 1

-- insert_metadata --
INSERT INTO {metadata} SELECT unnest($1::bytea[]), $2, $3

-- job_with_mark --
SELECT 1 FROM {jobs} WHERE id = $1 AND mark = $2

-- insert_tasks --
INSERT INTO {tasks} SELECT unnest($1::bytea[]), $2 ON CONFLICT DO NOTHING RETURNING 1

-- owners_of_tasks --
SELECT {columns} FROM {jobs} AS jobs WHERE id IN (SELECT job_id FROM {tasks} WHERE hash = ANY($1))
ORDER BY id FOR UPDATE

-- update_job --
-- The new task ids ($13) that were free are counted; ids that are no longer the job's ($14) are given back; whoever
-- listens on the channel ($16) is told ($15, and $20 if consumers may want to know), all in the transaction of the
-- change.
WITH own AS (
    INSERT INTO {tasks} SELECT unnest($13::bytea[]), $1 ON CONFLICT DO NOTHING RETURNING 1
), disowned AS (
    DELETE FROM {tasks} WHERE hash = ANY($14::bytea[])
), written AS (
    UPDATE {jobs} SET asked = $2, changed_at = $3, state = $4, attempt = $5, tasks = $6, refusal = $7, due_at = $8,
        failed_asks = $9, version = $10, owner = $11, mark = $12, request = COALESCE($17, request),
        handover_at = $18, unsaved = $19
    WHERE id = $1
)
SELECT COUNT(*), CASE WHEN $15::text IS NOT NULL THEN pg_notify($16, $15) END,
    CASE WHEN $20::text IS NOT NULL THEN pg_notify($16, $20) END FROM own

-- notify --
SELECT pg_notify($1, $2)

-- claim_due_jobs --
WITH due AS (
    SELECT id, due_at FROM {jobs} WHERE due_at <= $1 ORDER BY due_at LIMIT $2 FOR UPDATE SKIP LOCKED
)
UPDATE {jobs} AS jobs SET due_at = $3, version = version + 1, owner = $4
FROM due WHERE jobs.id = due.id
RETURNING {columns}, due.due_at AS was_due

-- mark_dead_owners --
-- What a dead owner (or $4) was sending becomes uncertain; it is never sent again.
WITH dead AS (
    SELECT id FROM {jobs} AS jobs
    WHERE state = 'sending' AND (owner = $4 OR NOT EXISTS (
        SELECT 1 FROM {owners} AS o WHERE o.id = jobs.owner AND o.until > clock_timestamp()
    ))
    FOR UPDATE SKIP LOCKED
), marked AS (
    UPDATE {jobs} AS jobs SET state = 'uncertain', refusal = $1, changed_at = $2, due_at = $3, version = version + 1,
        owner = NULL
    FROM dead WHERE jobs.id = dead.id
    RETURNING jobs.id, version
)
SELECT pg_notify($5, id || ' ' || version) FROM marked

-- release_leases_of_dead_owners --
WITH leased AS (
    SELECT id FROM {jobs} AS jobs
    WHERE owner IS NOT NULL AND state <> 'sending' AND NOT EXISTS (
        SELECT 1 FROM {owners} AS o WHERE o.id = jobs.owner AND o.until > clock_timestamp()
    )
    FOR UPDATE SKIP LOCKED
)
UPDATE {jobs} AS jobs SET due_at = LEAST(due_at, $1), version = version + 1, owner = NULL
FROM leased WHERE jobs.id = leased.id

-- forget_dead_owners --
DELETE FROM {owners} WHERE until < clock_timestamp() - interval '1 day'

-- living_owner_besides --
SELECT 1 FROM {owners} WHERE id <> $1 AND until > clock_timestamp() LIMIT 1

-- beat --
INSERT INTO {owners} VALUES ($1, $2, clock_timestamp() + make_interval(secs => $3))
ON CONFLICT (id) DO UPDATE SET until = EXCLUDED.until

-- leave --
DELETE FROM {owners} WHERE id = $1

-- limit_doubt --
UPDATE {jobs} SET due_at = LEAST(COALESCE(due_at, $1), $2), version = version + 1
WHERE state = 'uncertain' AND (due_at IS NULL OR due_at > $2)

-- spread_due_times --
UPDATE {jobs} SET due_at = $1::float8 + $2::float8 * random(), version = version + 1 WHERE state = 'accepted'

-- jobs_sent_by_owner --
SELECT id FROM {jobs} WHERE owner = $1 AND state = 'sending'

-- doubt_jobs --
WITH doubted AS (
    UPDATE {jobs} SET state = 'uncertain', refusal = $1, changed_at = $2, due_at = $3, version = version + 1,
        owner = NULL
    WHERE id = ANY($4::text[]) AND owner = $5 AND state = 'sending'
    RETURNING id, version
)
SELECT pg_notify($6, id || ' ' || version) FROM doubted

-- take_back_intent --
UPDATE {jobs} SET state = 'not_sent', refusal = $3, changed_at = $4, version = version + 1, owner = NULL
WHERE id = $1 AND mark = $2 AND state = 'sending'
RETURNING version

-- purge_jobs --
-- An array, so that each is looked up; with IN the planner may read the table whole, since it does not know the limit.
DELETE FROM {jobs} WHERE id = ANY(ARRAY(
    SELECT id FROM {jobs}
    WHERE state NOT IN ('sending', 'uncertain', 'accepted') AND changed_at < $1 AND id <> ALL($3::text[])
        AND (handover_at IS NULL OR state NOT IN ('done', 'failed', 'expired', 'unknown')
            OR NOT EXISTS (SELECT 1 FROM {kept} WHERE name = 'consumer'))
    ORDER BY changed_at LIMIT $2 FOR UPDATE SKIP LOCKED
))
