-- The history of a fleet, in DuckDB.
--
-- One table holds everything that happened, as the live store's outbox told it; what a person asks for are views of it.
-- Times are TIMESTAMPTZ in UTC, spans are seconds, money is US dollars. The file is run in one transaction whenever it
-- has changed: tables are made when they are missing, views are always made anew.

-- Its key is what makes two ingesters of one process collide, on the very first batch as well.
CREATE TABLE IF NOT EXISTS stores (
    store           INTEGER PRIMARY KEY,
    began_at        TIMESTAMPTZ NOT NULL,
    since_seq       BIGINT NOT NULL,
    last_seq        BIGINT NOT NULL
);
COMMENT ON TABLE stores IS 'Lives of the live store, and how far each one is ingested';
COMMENT ON COLUMN stores.store IS '1, 2, ...: grows when the live store is replaced, or put back from an older copy';
COMMENT ON COLUMN stores.began_at IS 'When the history first saw it';
COMMENT ON COLUMN stores.since_seq IS 'Its events up to here were in the history already, from the store before';
COMMENT ON COLUMN stores.last_seq IS 'The cursor: its events up to here are in the history';

-- Without a key or an index on purpose: the cursor keeps events unique, and an index would only cost on the way in.
CREATE TABLE IF NOT EXISTS events (
    id                  BIGINT NOT NULL,
    store               INTEGER NOT NULL,
    seq                 BIGINT NOT NULL,
    happened_at         TIMESTAMPTZ NOT NULL,
    kind                VARCHAR NOT NULL,
    task                VARCHAR,
    attempt             INTEGER,
    orchestrator        VARCHAR,
    machine             VARCHAR,
    actor               VARCHAR NOT NULL,
    generation          VARCHAR,
    charter_version     VARCHAR,
    route               VARCHAR,
    status              VARCHAR,
    priority            VARCHAR,
    discipline          VARCHAR,
    outcome             VARCHAR,
    exit_code           INTEGER,
    run_s               DOUBLE,
    input_tokens        BIGINT,
    output_tokens       BIGINT,
    cache_read_tokens   BIGINT,
    cache_write_tokens  BIGINT,
    usd                 DOUBLE,
    data                JSON NOT NULL
);
COMMENT ON TABLE events IS 'Everything that happened, in order of id';
COMMENT ON COLUMN events.id IS 'Its place in the history: 1, 2, 3, ...';
COMMENT ON COLUMN events.store IS 'The life of the live store that told it: see stores';
COMMENT ON COLUMN events.seq IS 'Its number in the outbox of that store';
COMMENT ON COLUMN events.kind IS 'task_created, task_routed, task_claimed, task_done, task_failed, lease_expired, orchestrator_online, ...';
COMMENT ON COLUMN events.actor IS 'The id of a key, daemon:<orchestrator>@<machine>, or system';
COMMENT ON COLUMN events.route IS 'The routing rule that chose the orchestrator';
COMMENT ON COLUMN events.status IS 'The status of the task after it';
COMMENT ON COLUMN events.outcome IS 'How the attempt ended, where it ended one: done, failed, failed_for_good, timeout, crashed, cancelled, released, lease_lost';
COMMENT ON COLUMN events.run_s IS 'How long the attempt ran, in seconds, where it ended one';
COMMENT ON COLUMN events.usd IS 'What the attempt cost, in US dollars';
COMMENT ON COLUMN events.data IS 'The rest: `task` is the task after it, as the API shows it; reason, error, usage, ... as the kind needs';

-- The newest claim and the newest end of each try. A try that was told twice (the live store was put back from an older
-- copy and did it again) counts as it went the last time.
CREATE OR REPLACE VIEW attempts AS
WITH
    claims AS (
        SELECT id, task, attempt, orchestrator, machine, generation, charter_version, happened_at
        FROM events
        WHERE kind = 'task_claimed'
        QUALIFY row_number() OVER (PARTITION BY task, attempt ORDER BY id DESC) = 1
    ),
    newest_ends AS (
        SELECT task, attempt, max(id) AS id
        FROM events
        WHERE run_s IS NOT NULL
        GROUP BY task, attempt
    ),
    ends AS (
        SELECT
            events.*,
            coalesce(events.outcome, CASE kind WHEN 'task_cancelled' THEN 'cancelled' ELSE 'released' END) AS ended_as
        FROM newest_ends
        JOIN events USING (id)
    )
SELECT
    claims.task,
    claims.attempt,
    claims.orchestrator,
    claims.machine,
    claims.generation,
    claims.charter_version,
    claims.happened_at AS started_at,
    ends.happened_at AS ended_at,
    ends.ended_as AS outcome,
    ends.exit_code,
    ends.run_s,
    ends.input_tokens,
    ends.output_tokens,
    ends.cache_read_tokens,
    ends.cache_write_tokens,
    ends.input_tokens + ends.output_tokens AS tokens,
    ends.usd,
    CASE
        WHEN ends.ended_as <> 'done' THEN coalesce(ends.data ->> '$.error', ends.data ->> '$.reason')
    END AS error
FROM claims
LEFT JOIN ends ON ends.task = claims.task AND ends.attempt = claims.attempt AND ends.id > claims.id;
COMMENT ON VIEW attempts IS 'One row a try: who, where, under which charter, how it ended, what it cost; ended_at and outcome are NULL while it runs';

-- The newest event of a task tells all of it. A purged task is in events, and no longer here.
CREATE OR REPLACE VIEW tasks AS
WITH
    newest AS (
        SELECT task, max(id) AS id
        FROM events
        WHERE task IS NOT NULL
        GROUP BY task
    ),
    spent AS (
        SELECT task, sum(run_s) AS run_time_s, sum(tokens)::BIGINT AS tokens, sum(usd) AS usd
        FROM attempts
        GROUP BY task
    ),
    states AS (
        SELECT
            events.* EXCLUDE (usd),
            (data ->> '$.task.created_at')::TIMESTAMPTZ AS created_at,
            (data ->> '$.task.started_at')::TIMESTAMPTZ AS started_at,
            (data ->> '$.task.completed_at')::TIMESTAMPTZ AS completed_at
        FROM newest
        JOIN events USING (id)
        WHERE events.kind <> 'task_purged'
    )
SELECT
    states.task AS id,
    data ->> '$.task.title' AS title,
    status,
    data ->> '$.task.blocked_reason' AS blocked_reason,
    priority,
    orchestrator,
    discipline,
    nullif(machine, '') AS machine,
    route,
    (data -> '$.task.attempt')::INTEGER AS attempt,
    (data -> '$.task.max_attempts')::INTEGER AS max_attempts,
    (data -> '$.task.tags')::VARCHAR[] AS tags,
    data ->> '$.task.created_by' AS created_by,
    created_at,
    (data ->> '$.task.updated_at')::TIMESTAMPTZ AS updated_at,
    (data ->> '$.task.due_at')::TIMESTAMPTZ AS due_at,
    started_at,
    completed_at,
    epoch(started_at - created_at) AS wait_time_s,
    spent.run_time_s,
    epoch(completed_at - created_at) AS lead_time_s,
    spent.tokens,
    spent.usd,
    nullif(data -> '$.task.result', 'null'::JSON) AS result,
    data ->> '$.task.error.message' AS error,
    generation,
    charter_version,
    (data -> '$.task.depends_on')::VARCHAR[] AS depends_on,
    data ->> '$.task.parent' AS parent,
    data -> '$.task.metadata' AS metadata,
    data ->> '$.task.description' AS description,
    (data ->> '$.task.estimate_s')::DOUBLE AS estimate_s,
    (data -> '$.task.version')::INTEGER AS version
FROM states
LEFT JOIN spent ON spent.task = states.task;
COMMENT ON VIEW tasks IS 'One row a task, as it is now. wait_time_s: creation to the first claim; run_time_s: all tries together; lead_time_s: creation to the end';

CREATE OR REPLACE VIEW orchestrators AS
WITH
    seen AS (
        SELECT
            orchestrator AS name,
            arg_max(machine, id) FILTER (machine <> '') AS machine,
            arg_max(CASE kind WHEN 'orchestrator_online' THEN 'ONLINE' ELSE 'OFFLINE' END, id)
                FILTER (kind IN ('orchestrator_online', 'orchestrator_offline')) AS status,
            arg_max(happened_at, id)
                FILTER (kind IN ('orchestrator_online', 'orchestrator_offline')) AS status_since,
            arg_max(generation, id) FILTER (generation <> '') AS generation,
            arg_max(charter_version, id) FILTER (charter_version <> '') AS charter_version,
            max(happened_at) AS last_event_at
        FROM events
        WHERE orchestrator IS NOT NULL
        GROUP BY orchestrator
    ),
    work AS (
        SELECT
            orchestrator AS name,
            arg_max(discipline, id) FILTER (discipline IS NOT NULL) AS discipline,
            count(*) AS tasks,
            count(*) FILTER (status = 'DONE') AS done,
            count(*) FILTER (status IN ('TODO', 'IN_PROGRESS')) AS open,
            count(*) FILTER (status = 'BLOCKED') AS blocked,
            count(*) FILTER (status = 'CANCELLED') AS cancelled
        FROM tasks
        WHERE orchestrator IS NOT NULL
        GROUP BY orchestrator
    ),
    tries AS (
        SELECT
            orchestrator AS name,
            count(*) AS attempts,
            count(*) FILTER (outcome NOT IN ('done', 'released', 'cancelled')) AS failed_attempts,
            sum(run_s) AS run_s,
            sum(tokens)::BIGINT AS tokens,
            sum(usd) AS usd
        FROM attempts
        GROUP BY orchestrator
    )
SELECT
    name,
    work.discipline,
    seen.machine,
    seen.status,
    seen.status_since,
    coalesce(work.tasks, 0) AS tasks,
    coalesce(work.done, 0) AS done,
    coalesce(work.open, 0) AS open,
    coalesce(work.blocked, 0) AS blocked,
    coalesce(work.cancelled, 0) AS cancelled,
    coalesce(tries.attempts, 0) AS attempts,
    coalesce(tries.failed_attempts, 0) AS failed_attempts,
    tries.run_s,
    tries.tokens,
    tries.usd,
    seen.generation,
    seen.charter_version,
    seen.last_event_at
FROM seen
LEFT JOIN work USING (name)
LEFT JOIN tries USING (name);
COMMENT ON VIEW orchestrators IS 'One row an orchestrator that was ever heard of: its presence, and what it did. What is declared stands in git, not here';

CREATE OR REPLACE VIEW machines AS
SELECT
    machine AS name,
    list_sort(list(DISTINCT orchestrator)) AS orchestrators,
    count(*) AS attempts,
    count(*) FILTER (outcome = 'done') AS done,
    count(*) FILTER (outcome NOT IN ('done', 'released', 'cancelled')) AS failed_attempts,
    count(*) FILTER (outcome IS NULL) AS running,
    sum(run_s) AS run_s,
    max(coalesce(ended_at, started_at)) AS last_attempt_at
FROM attempts
WHERE machine <> ''
GROUP BY machine;
COMMENT ON VIEW machines IS 'One row a machine that ever ran an attempt';
