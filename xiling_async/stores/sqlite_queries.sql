-- Every statement of a SQLite store but the listings (listing.py), each under its name. {columns} stands for the columns
-- of a job in the order of stores/rows.py, {columns_to_insert} for their bare names, {values} for a ? for each of them.
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
INSERT INTO metadata VALUES (?, ?, ?)

-- delete_metadata --
DELETE FROM metadata WHERE pair = ? AND created_at = ? AND job_id = ?

-- keep_secret --
INSERT OR IGNORE INTO kept VALUES ('webhook secret', ?)

-- kept_secret --
SELECT value FROM kept WHERE name = 'webhook secret'

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
SELECT {columns} FROM jobs INDEXED BY jobs_handover
WHERE handover_at IS NOT NULL AND state IN ('done', 'failed', 'expired', 'unknown') AND handover_at <= ?
ORDER BY changed_at, id LIMIT 1

-- lease_to_consumer --
UPDATE jobs SET handover_at = ?, version = version + 1 WHERE id = ?

-- next_handover --
SELECT MIN(handover_at) FROM jobs INDEXED BY jobs_handover
WHERE handover_at IS NOT NULL AND state IN ('done', 'failed', 'expired', 'unknown')

-- doubt_what_was_sent --
UPDATE jobs SET state = 'uncertain', refusal = ?, changed_at = ?, due_at = ?, version = version + 1
WHERE state = 'sending'

-- limit_doubt --
UPDATE jobs SET due_at = MIN(COALESCE(due_at, ?1), ?2), version = version + 1
WHERE state = 'uncertain' AND (due_at IS NULL OR due_at > ?2)

-- count_open_jobs --
SELECT COUNT(*) FROM jobs WHERE state IN ('sending', 'uncertain', 'accepted')

-- spread_due_times --
UPDATE jobs SET due_at = ? + ? * (RANDOM() & 1023) / 1024.0, version = version + 1
WHERE state = 'accepted'

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

-- delete_jobs --
DELETE FROM jobs WHERE id IN (SELECT value FROM json_each(?))
