-- How orchestrators do, in numbers. Each metric is one macro over rows of `measurements`, and stands here alone: the
-- API's analytics, `fleet vp analytics` and whoever asks in SQL count by the same definitions.
--
--     FROM analytics('vp-a', now() - INTERVAL 7 DAY, now());
--     SELECT orchestrator, metric_success_rate(m), metric_lead_time_s(m) FROM measurements AS m GROUP BY orchestrator;
--     SELECT function_name, comment FROM duckdb_functions() WHERE function_name LIKE 'metric_%';
--
-- A window holds what ended in it, its beginning included and its end not: [since, until). A count of nothing is 0; a
-- rate, a percentile or a sum of nothing is NULL. When the live store was put back from an older copy and a task or a
-- try went another way there, it counts as it went the last time.

CREATE OR REPLACE VIEW measurements AS
SELECT
    ended.orchestrator,
    ended.happened_at,
    ended.task,
    ended.attempt,
    CASE
        WHEN ended.kind = 'task_done' THEN 'completed'
        WHEN ended.kind IN ('task_cancelled', 'task_rejected') THEN 'cancelled'
        WHEN ended.status = 'BLOCKED'
            AND ended.outcome IN ('failed', 'failed_for_good', 'timeout', 'crashed', 'lease_lost') THEN 'failed'
    END AS task_ended,
    CASE
        WHEN ended.kind = 'task_done'
            THEN epoch(ended.happened_at - TRY_CAST(ended.data ->> '$.task.created_at' AS TIMESTAMPTZ))
    END AS lead_time_s,
    CASE
        WHEN ended.kind = 'task_done' THEN ended.happened_at <= TRY_CAST(ended.data ->> '$.task.due_at' AS TIMESTAMPTZ)
    END AS on_time,
    CASE WHEN ended.outcome = 'done' THEN ended.run_s END AS run_time_s,
    ended.run_s IS NOT NULL AND ended.attempt > 1 AS is_retry,
    ended.input_tokens + ended.output_tokens AS tokens,
    ended.usd,
    ended.kind = 'escalation_pending' AND ended.data ->> '$.coordination.hop' = '1' AS is_escalation
FROM events AS ended
WHERE
    (
        ended.run_s IS NOT NULL
        OR ended.kind IN ('task_done', 'task_cancelled', 'task_rejected', 'escalation_pending')
    )
    AND NOT EXISTS (
        SELECT 1
        FROM events AS again
        WHERE
            again.store > 1 -- so that a history of one life, as nearly all are, reads nothing here
            AND again.store > ended.store
            AND again.task = ended.task
            AND (
                (
                    again.attempt IS NOT DISTINCT FROM ended.attempt
                    AND (again.kind = 'task_claimed' OR again.run_s IS NOT NULL)
                )
                OR (
                    again.kind IN ('task_done', 'task_cancelled', 'task_rejected')
                    AND ended.kind IN ('task_done', 'task_cancelled', 'task_rejected')
                )
            )
    );
COMMENT ON VIEW measurements IS 'One row for each moment that analytics count: a task or a try ended, or a task was escalated. The metric_ macros sum it up';
COMMENT ON COLUMN measurements.orchestrator IS 'Whose it was at that moment: a task that moved counts for who ended it';
COMMENT ON COLUMN measurements.happened_at IS 'When it ended';
COMMENT ON COLUMN measurements.task_ended IS 'completed, cancelled, or failed: its tries are spent, or one failed for good. NULL: the task went on';
COMMENT ON COLUMN measurements.lead_time_s IS 'Of a completed task: seconds from its creation to its end';
COMMENT ON COLUMN measurements.on_time IS 'Of a completed task with a due date: whether it was done by then';
COMMENT ON COLUMN measurements.run_time_s IS 'Of a try that ended as done: seconds from its claim to its end';
COMMENT ON COLUMN measurements.is_retry IS 'Whether a try ended that was not the first of its task';
COMMENT ON COLUMN measurements.tokens IS 'Input and output tokens that a try said it used; tokens of a cache are not among them';
COMMENT ON COLUMN measurements.usd IS 'US dollars that a try said it cost';
COMMENT ON COLUMN measurements.is_escalation IS 'Whether a task was escalated; the levels it then climbs are not counted';

CREATE OR REPLACE MACRO metric_completed(m) AS count(*) FILTER (m.task_ended = 'completed');
COMMENT ON MACRO metric_completed IS 'Tasks that became DONE. Unit: tasks. Source: task_done';

CREATE OR REPLACE MACRO metric_failed(m) AS count(*) FILTER (m.task_ended = 'failed');
COMMENT ON MACRO metric_failed IS 'Tasks that became BLOCKED/attempts_exhausted; one that is retried and fails again counts again. Unit: tasks. Source: task_failed, lease_expired';

CREATE OR REPLACE MACRO metric_cancelled(m) AS count(*) FILTER (m.task_ended = 'cancelled');
COMMENT ON MACRO metric_cancelled IS 'Tasks that became CANCELLED, rejected ones among them. Unit: tasks. Source: task_cancelled, task_rejected';

CREATE OR REPLACE MACRO metric_success_rate(m) AS
    metric_completed(m) / nullif(metric_completed(m) + metric_failed(m), 0);
COMMENT ON MACRO metric_success_rate IS 'completed / (completed + failed); what was cancelled is in neither. Unit: 0 to 1, NULL when nothing was completed or failed. Source: as those';

CREATE OR REPLACE MACRO metric_lead_time_s(m) AS
    {
        'p50': quantile_cont(m.lead_time_s, 0.5),
        'p90': quantile_cont(m.lead_time_s, 0.9),
        'p99': quantile_cont(m.lead_time_s, 0.99)
    };
COMMENT ON MACRO metric_lead_time_s IS 'How long completed tasks took from their creation to their end, percentiles, linear between neighbours. Unit: seconds. Source: task_done';

CREATE OR REPLACE MACRO metric_run_time_s(m) AS
    {
        'p50': quantile_cont(m.run_time_s, 0.5),
        'p90': quantile_cont(m.run_time_s, 0.9),
        'p99': quantile_cont(m.run_time_s, 0.99)
    };
COMMENT ON MACRO metric_run_time_s IS 'How long tries that ended as done ran, percentiles, linear between neighbours. Unit: seconds. Source: task_done';

CREATE OR REPLACE MACRO metric_retries(m) AS count(*) FILTER (m.is_retry);
COMMENT ON MACRO metric_retries IS 'Tries beyond the first of their task, however they ended. Unit: tries. Source: every event that ends one';

CREATE OR REPLACE MACRO metric_tokens(m) AS sum(m.tokens)::BIGINT;
COMMENT ON MACRO metric_tokens IS 'Input and output tokens of the tries that ended. Unit: tokens, NULL when no try said any. Source: usage in the events that end one';

CREATE OR REPLACE MACRO metric_usd(m) AS round(fsum(m.usd), 6);
COMMENT ON MACRO metric_usd IS 'What the tries that ended cost. Unit: US dollars to 6 digits, NULL when no try said any. Source: usage in the events that end one';

CREATE OR REPLACE MACRO metric_on_time_rate(m) AS count(*) FILTER (m.on_time) / nullif(count(m.on_time), 0);
COMMENT ON MACRO metric_on_time_rate IS 'Of the completed tasks that had a due date, the share done by then. Unit: 0 to 1, NULL when none had one. Source: task_done';

CREATE OR REPLACE MACRO metric_escalations(m) AS count(*) FILTER (m.is_escalation);
COMMENT ON MACRO metric_escalations IS 'Tasks that were escalated; each level of one escalation is not another. Unit: escalations. Source: escalation_pending';

CREATE OR REPLACE MACRO analytics_of_windows(who, since, until) AS TABLE
SELECT
    windows.number,
    metric_completed(m) AS completed,
    metric_failed(m) AS failed,
    metric_cancelled(m) AS cancelled,
    metric_success_rate(m) AS success_rate,
    metric_lead_time_s(m) AS lead_time_s,
    metric_run_time_s(m) AS run_time_s,
    metric_retries(m) AS retries,
    metric_tokens(m) AS tokens,
    metric_usd(m) AS usd,
    metric_on_time_rate(m) AS on_time_rate,
    metric_escalations(m) AS escalations
FROM (SELECT unnest(range(len(since))) AS number, unnest(since) AS since, unnest(until) AS until) AS windows
LEFT JOIN measurements AS m
    ON m.orchestrator = who AND m.happened_at >= windows.since AND m.happened_at < windows.until
GROUP BY windows.number
ORDER BY windows.number;
COMMENT ON MACRO TABLE analytics_of_windows IS 'Every metric of an orchestrator, a row for each of the windows [since[n], until[n]), numbered from 0; they may overlap';

CREATE OR REPLACE MACRO analytics(who, since, until) AS TABLE
SELECT * EXCLUDE (number)
FROM analytics_of_windows(who, [since::TIMESTAMPTZ], [until::TIMESTAMPTZ]);
COMMENT ON MACRO TABLE analytics IS 'Every metric of an orchestrator in the window [since, until), in one row';
