-- Every statement of a SQLite store, each under its name. {columns} stands for the columns of a job in the order of
-- stores/rows.py, {columns_to_insert} for their bare names, {values} for a ? for each of them.
-- The conditions on `state` are spelled as in the partial indexes of sqlite_schema.py, so that SQLite takes these.

-- job_by_id --
SELECT {columns} FROM jobs WHERE id = ?

-- job_by_key --
SELECT {columns} FROM jobs WHERE key = ?

-- job_by_task --
SELECT {columns} FROM jobs WHERE id = (SELECT job_id FROM tasks WHERE task_id = ?)

-- insert_job --
INSERT INTO jobs ({columns_to_insert}, unsaved) VALUES ({values}, ?)

-- update_job --
UPDATE jobs SET asked = ?, changed_at = ?, state = ?, attempt = ?, tasks = ?, refusal = ?, due_at = ?, failed_asks = ?,
    version = ?, handover_at = ?, unsaved = ?, request = COALESCE(?, request)
WHERE id = ?

-- insert_task --
INSERT INTO tasks VALUES (?, ?)

-- delete_task --
DELETE FROM tasks WHERE task_id = ?

-- insert_metadata --
INSERT INTO metadata VALUES (?, ?, ?, ?)

-- delete_metadata --
DELETE FROM metadata WHERE name = ? AND value = ? AND created_at = ? AND job_id = ?

-- keep_secret --
INSERT OR IGNORE INTO kept VALUES ('webhook secret', ?)

-- kept_secret --
SELECT value FROM kept WHERE name = 'webhook secret'

-- oldest_open_jobs --
SELECT {columns} FROM jobs
WHERE state IN ('sending', 'uncertain', 'accepted') AND (created_at, id) > (?, ?)
ORDER BY created_at, id LIMIT ?

-- oldest_jobs --
SELECT {columns} FROM jobs
WHERE (created_at, id) > (:created_at, :id)
    AND (:states IS NULL OR state IN (SELECT value FROM json_each(:states)))
    AND (:kind IS NULL OR kind = :kind) AND (:since IS NULL OR created_at >= :since)
ORDER BY created_at, id LIMIT :limit

-- newest_jobs --
SELECT {columns} FROM jobs
WHERE (created_at, id) < (:created_at, :id)
    AND (:states IS NULL OR state IN (SELECT value FROM json_each(:states)))
    AND (:kind IS NULL OR kind = :kind) AND (:since IS NULL OR created_at >= :since)
ORDER BY created_at DESC, id DESC LIMIT :limit

-- oldest_jobs_with_metadata --
-- One pair of the metadata (:name, :value) gives the candidates in order; :metadata has all pairs.
SELECT {columns} FROM metadata AS pair JOIN jobs ON jobs.id = pair.job_id
WHERE pair.name = :name AND pair.value = :value AND (pair.created_at, pair.job_id) > (:created_at, :id)
    AND (:states IS NULL OR state IN (SELECT value FROM json_each(:states)))
    AND (:kind IS NULL OR kind = :kind) AND (:since IS NULL OR pair.created_at >= :since)
    AND NOT EXISTS (
        SELECT 1 FROM json_each(:metadata) AS wanted WHERE NOT EXISTS (
            SELECT 1 FROM metadata AS other
            WHERE other.name = wanted.key AND other.value = wanted.value AND other.created_at = pair.created_at
                AND other.job_id = pair.job_id
        )
    )
ORDER BY pair.created_at, pair.job_id LIMIT :limit

-- newest_jobs_with_metadata --
-- As above, the other way round.
SELECT {columns} FROM metadata AS pair JOIN jobs ON jobs.id = pair.job_id
WHERE pair.name = :name AND pair.value = :value AND (pair.created_at, pair.job_id) < (:created_at, :id)
    AND (:states IS NULL OR state IN (SELECT value FROM json_each(:states)))
    AND (:kind IS NULL OR kind = :kind) AND (:since IS NULL OR pair.created_at >= :since)
    AND NOT EXISTS (
        SELECT 1 FROM json_each(:metadata) AS wanted WHERE NOT EXISTS (
            SELECT 1 FROM metadata AS other
            WHERE other.name = wanted.key AND other.value = wanted.value AND other.created_at = pair.created_at
                AND other.job_id = pair.job_id
        )
    )
ORDER BY pair.created_at DESC, pair.job_id DESC LIMIT :limit

-- unsaved_jobs --
SELECT {columns} FROM jobs
WHERE unsaved = 1 AND changed_at >= ? AND (changed_at, id) > (?, ?)
ORDER BY changed_at, id LIMIT ?

-- due_jobs --
SELECT {columns} FROM jobs WHERE due_at <= ? ORDER BY due_at LIMIT ?

-- lease_due_job --
UPDATE jobs SET due_at = ?, version = version + 1 WHERE id = ?

-- next_due --
SELECT MIN(due_at) FROM jobs WHERE due_at IS NOT NULL

-- note_consumer --
INSERT OR IGNORE INTO kept VALUES ('consumer', x'')

-- first_to_hand_over --
SELECT {columns} FROM jobs
WHERE handover_at IS NOT NULL AND state IN ('done', 'failed', 'expired', 'unknown') AND handover_at <= ?
ORDER BY changed_at, id LIMIT 1

-- lease_to_consumer --
UPDATE jobs SET handover_at = ?, version = version + 1 WHERE id = ?

-- next_handover --
SELECT MIN(handover_at) FROM jobs
WHERE handover_at IS NOT NULL AND state IN ('done', 'failed', 'expired', 'unknown')

-- doubt_what_was_sent --
UPDATE jobs SET state = 'uncertain', refusal = ?, changed_at = ?, due_at = ?, version = version + 1
WHERE state IN ('sending', 'uncertain', 'accepted') AND state = 'sending'

-- limit_doubt --
UPDATE jobs SET due_at = MIN(COALESCE(due_at, ?1), ?2), version = version + 1
WHERE state IN ('sending', 'uncertain', 'accepted') AND state = 'uncertain' AND (due_at IS NULL OR due_at > ?2)

-- count_open_jobs --
SELECT COUNT(*) FROM jobs WHERE state IN ('sending', 'uncertain', 'accepted')

-- spread_due_times --
UPDATE jobs SET due_at = ? + ? * (RANDOM() & 1023) / 1024.0, version = version + 1
WHERE state IN ('sending', 'uncertain', 'accepted') AND state = 'accepted'

-- ended_jobs --
-- What may be forgotten: not what a submit has in hand (:in_hand); and where there are consumers, of the jobs that are
-- handed over only those that were acknowledged.
SELECT {columns} FROM jobs
WHERE state NOT IN ('sending', 'uncertain', 'accepted') AND changed_at < :before
    AND (changed_at, id) > (:changed_at, :id)
    AND id NOT IN (SELECT value FROM json_each(:in_hand))
    AND (handover_at IS NULL OR state NOT IN ('done', 'failed', 'expired', 'unknown')
        OR NOT EXISTS (SELECT 1 FROM kept WHERE name = 'consumer'))
ORDER BY changed_at, id LIMIT :limit

-- delete_job --
DELETE FROM jobs WHERE id = ?
