-- Every query the daemon and the commands run, each with what it is for. One test EXPLAINs them all.

-- name: revision
-- Which revision of the schema is installed. No row: none.
select version_num from cdc.alembic_version;

-- name: captured_tables
-- How the tables that events refer to were captured.
select id, relation, schema_name, table_name, key_columns, image from cdc.captured_table;

-- name: primary_key
-- The key columns a table has now; for events recorded after a key column was renamed.
select array_agg(a.attname::text order by k.n)
  from pg_catalog.pg_index i
  cross join unnest(i.indkey::int2[]) with ordinality as k (attnum, n)
  join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
 where i.indrelid = %(relation)s and i.indisprimary and k.n <= i.indnkeyatts;

-- name: register_sink
-- Give a new sink its first position: before everything kept (earliest), or here. One that is known keeps its own. With a
-- backfill to come its pipeline asks for that.
with new as (
  insert into cdc.sink (name, system_identifier, timeline, backfill_due)
  select %(sink)s, p.system_identifier, p.timeline, %(start)s = 'backfill' from cdc.place() p
      on conflict (name) do nothing
  returning name, epoch
)
insert into cdc.position (sink, epoch, snap_lo)
select new.name, new.epoch, case when %(start)s = 'earliest' then '3:3:'::pg_snapshot else pg_current_snapshot() end
  from new
returning sink;

-- name: join_process
-- Say which process this session belongs to, for as long as it lasts.
select pg_advisory_lock_shared(6513766, %(process)s);

-- name: beat
-- Be heard of: that a session of this process has just spoken can be seen by everybody. The answer is the server's clock.
select extract(epoch from clock_timestamp())::float8;

-- name: holder
-- Who serves a sink: the number of his claim, his session, when any session of his was last heard of; and the time now. No
-- row: nobody does.
select k.epoch, h.pid, extract(epoch from h.heard_at)::float8, extract(epoch from clock_timestamp())::float8
  from cdc.sink k cross join lateral cdc.holder(k.id, k.epoch) h
 where k.name = %(sink)s;

-- name: take
-- Become the one session that serves a sink. Epoch null: another daemon does, or the sink is not registered.
select epoch, happened from cdc.take(%(sink)s, %(owner)s, %(process)s, make_interval(secs => %(patience)s));

-- name: confirm
-- Whether a sink is still ours, and what people want of it. No row: another daemon has taken it over.
select paused, requests from cdc.sink where name = %(sink)s and epoch = %(epoch)s;

-- name: next_batch
-- Acknowledge, and read on. The rows may be used once this has committed.
select * from cdc.next_batch(%(sink)s, %(epoch)s, %(acked)s, %(events)s, %(bytes)s, %(stored)s);

-- name: next_batch_in_bytes
-- The same where an image holds bytes that are no characters: as bytes, which nobody converts. (A backslash is what a
-- cast to bytea would take for more than itself.)
select seq, txid, captured_at, captured_table, op,
       replace(old_row, E'\\', E'\\\\')::bytea, replace(new_row, E'\\', E'\\\\')::bytea,
       replace(context, E'\\', E'\\\\')::bytea
  from cdc.next_batch(%(sink)s, %(epoch)s, %(acked)s, %(events)s, %(bytes)s, %(stored)s);

-- name: tells_what_is_on_disk
-- What cdc.next_batch asks before it leaves a window unstored.
select pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn();

-- name: window
-- Which window is being read, by a name that no other window has, and up to where it is acknowledged: from where
-- cdc.next_batch has left the position, or else by its sink. No row: another daemon has taken the sink over.
with here as materialized (
  select p.* from cdc.position p
   where p.ctid = nullif(current_setting('cdc.position_at', true), '')::tid and p.sink = %(sink)s
), found as (
  select h.* from here h
  union all
  select p.* from cdc.position p where p.sink = %(sink)s and not exists (select from here)
)
select case when f.snap_hi is not null
            then concat_ws('/', k.system_identifier, k.timeline, f.snap_lo, f.snap_hi) end, f.last_seq
  from found f join cdc.sink k on k.name = f.sink
 where f.epoch = %(epoch)s;

-- name: acknowledge
-- Acknowledge without reading on: the last word of a pipeline that stops. The window that cdc.next_batch has read and not
-- stored is stored now. No row: another daemon serves the sink.
with read as materialized (
  select w[1] as epoch, w[2] as snap_lo, w[3]::pg_snapshot as snap_hi, w[4]::bigint as final_seq
    from string_to_array(current_setting('cdc.window', true), '/') as w
)
update cdc.position p
   set snap_hi = coalesce(p.snap_hi, r.snap_hi),
       final_seq = case when p.snap_hi is null then r.final_seq else p.final_seq end,
       last_seq = greatest(p.last_seq, %(acked)s), delivered_at = clock_timestamp()
  from read r
 where p.sink = %(sink)s and p.epoch = %(epoch)s
   and (p.snap_hi is not null or r.epoch = p.epoch::text and r.snap_lo = p.snap_lo::text)
returning p.sink;

-- name: backfill_batch
-- Acknowledge, read on, and read a chunk of a table under the same snapshot: to be run repeatable read. The rows may be used
-- once this has committed.
select * from cdc.backfill_batch(%(sink)s, %(epoch)s, %(acked)s, %(events)s, %(bytes)s, %(backfill)s, %(done)s, %(rows)s);

-- name: backfill_batch_in_bytes
-- The same where an image holds bytes that are no characters; see next_batch_in_bytes.
select seq, txid, captured_at, captured_table, op,
       replace(old_row, E'\\', E'\\\\')::bytea, replace(new_row, E'\\', E'\\\\')::bytea,
       replace(context, E'\\', E'\\\\')::bytea, event_id
  from cdc.backfill_batch(%(sink)s, %(epoch)s, %(acked)s, %(events)s, %(bytes)s, %(backfill)s, %(done)s, %(rows)s);

-- name: acknowledge_chunk
-- Acknowledge a chunk, and the page before it, without reading on. No row: another daemon serves the sink.
with ours as materialized (
  select k.name from cdc.sink k where k.name = %(sink)s and k.epoch = %(epoch)s for share
), page as (
  update cdc.position p set last_seq = greatest(p.last_seq, %(acked)s), delivered_at = clock_timestamp()
    from ours where p.sink = ours.name and p.epoch = %(epoch)s and p.snap_hi is not null
), chunk as (
  update cdc.backfill_progress g
     set cursor = g.next_cursor, rows_read = g.rows_read + g.next_read, rows_told = g.rows_told + g.next_told,
         ended = g.next_ended, next_read = null, moved_at = clock_timestamp()
    from ours where g.backfill = %(backfill)s and g.chunk = %(done)s and g.next_read is not null
)
select name from ours;

-- name: unfinished_backfills
-- What a sink's pipeline has to do, the oldest first: id, table, limits, whether it is paused; and once it has begun, whether
-- it pages along the key.
select b.id, b.relation::bigint, b.schema_name, b.table_name, b.chunk, b.rate, b.state = 'paused',
       g.backfill is not null, g.key_columns is not null
  from cdc.backfill b left join cdc.backfill_progress g on g.backfill = b.id
 where b.sink = %(sink)s and b.state in ('running', 'paused')
 order by b.id;

-- name: backfill_due
-- Whether a sink is new and begins with a backfill it has not asked for yet.
select backfill_due from cdc.sink where name = %(sink)s and epoch = %(epoch)s;

-- name: backfill_candidates
-- The captured tables, and why the rows of each cannot be told of; null: they can.
select c.relation::bigint, c.schema_name, c.table_name, cdc.backfill_obstacle(c.relation)
  from cdc.captured c order by c.schema_name, c.table_name;

-- name: begin_with_backfill
-- Ask for the backfill a new sink begins with, once.
with new as (
  update cdc.sink set backfill_due = false where name = %(sink)s and backfill_due returning name
)
insert into cdc.backfill (sink, relation, schema_name, table_name)
select new.name, w.relation, w.schema_name, w.table_name
  from new, unnest(%(relations)s::bigint[], %(schemas)s::text[], %(tables)s::text[]) as w (relation, schema_name, table_name)
    on conflict do nothing;

-- name: start_backfill
-- Ask for the rows of a table. No row: they are being told of already.
insert into cdc.backfill (sink, relation, schema_name, table_name, chunk, rate)
values (%(sink)s, %(relation)s, %(schema)s, %(table)s, %(rows)s, %(rate)s)
    on conflict do nothing
returning id;

-- name: start_backfill_where
-- The same for some of its rows; for who migrates.
insert into cdc.backfill (sink, relation, schema_name, table_name, chunk, rate, condition)
values (%(sink)s, %(relation)s, %(schema)s, %(table)s, %(rows)s, %(rate)s, %(condition)s)
    on conflict do nothing
returning id;

-- name: check_condition
-- Raise what PostgreSQL has against a condition.
select cdc.check_condition(%(relation)s, %(condition)s);

-- name: end_backfill
-- A backfill is done, or has failed. No row: somebody was faster.
update cdc.backfill b set state = %(state)s, reason = %(reason)s, ended_at = clock_timestamp()
  from cdc.sink k
 where b.id = %(backfill)s and b.state in ('running', 'paused') and k.name = b.sink and k.epoch = %(epoch)s
returning b.id;

-- name: change_backfills
-- Pause, resume or cancel backfills of a sink that are in one of these states; all tables, or these. Their tables.
update cdc.backfill b
   set state = %(state)s, ended_at = case when %(state)s = 'cancelled' then clock_timestamp() end
 where b.sink = %(sink)s and b.state = any (%(states)s) and (%(relations)s::bigint[] is null or b.relation = any (%(relations)s))
returning b.schema_name, b.table_name;

-- name: backfills
-- Every sink's backfills, or one's, the oldest first; of each table of a sink the last one.
select b.id, b.sink, b.relation::bigint, b.schema_name, b.table_name, b.state, b.reason, b.condition, b.chunk, b.rate, b.asked_at, b.ended_at,
       g.estimate, coalesce(g.rows_read, 0), coalesce(g.rows_told, 0), g.began_at, g.moved_at
  from cdc.backfill b left join cdc.backfill_progress g on g.backfill = b.id
 where (%(sink)s::text is null or b.sink = %(sink)s)
   and not exists (select from cdc.backfill n where n.sink = b.sink and n.relation = b.relation and n.id > b.id)
 order by b.sink, b.id;

-- name: note_moment
-- Be heard of as by `beat`, and remember now as a position to go back to.
select extract(epoch from clock_timestamp())::float8, cdc.note_moment();

-- name: moments
-- The last position known from before a moment, and the first one known at all.
select (select m.snap::text from cdc.moment m, pg_control_system() c
         where m.at <= %(moment)s and m.system_identifier = c.system_identifier
           and pg_snapshot_xmax(m.snap) <= pg_snapshot_xmax(pg_current_snapshot())
         order by m.at desc limit 1),
       (select min(m.at) from cdc.moment m, pg_control_system() c where m.system_identifier = c.system_identifier);

-- name: events_since
-- How many events of each table and operation have been committed since a position.
select t.schema_name, t.table_name, lower(w.op::text), sum(w.n)::bigint
  from (select e.captured_table, e.op, count(*) as n
          from cdc.event e
         where (e.txid >= pg_snapshot_xmax(%(position)s::pg_snapshot)
                or e.txid = any (array(select pg_snapshot_xip(%(position)s::pg_snapshot))))
         group by e.captured_table, e.op) w
  join cdc.captured_table t on t.id = w.captured_table
 group by 1, 2, 3;

-- name: stands_at
-- Where a sink stands, as a position; whether that shows all that another does; whether it has delivered all that this one
-- shows, or nothing lies between; who serves it. No row: it has no position.
select w.stands::text, w.covers,
       w.covers or not exists (
         select from cdc.event e
          where (e.txid >= pg_snapshot_xmax(w.stands) or e.txid = any (array(select pg_snapshot_xip(w.stands))))
            and pg_visible_in_snapshot(e.txid, %(position)s::pg_snapshot)),
       case when exists (select from cdc.holder(w.id, w.epoch)) then coalesce(w.owner, '?') end, w.id, w.epoch
  from (select k.id, k.epoch, k.owner, s.stands, cdc.covers(s.stands, %(position)s::pg_snapshot) as covers
          from cdc.sink k
          join cdc.position p on p.sink = k.name
         cross join lateral (select case when p.last_seq >= p.final_seq then p.snap_hi else p.snap_lo end as stands) s
         where k.name = %(sink)s) w;

-- name: hold_rewound
-- Let nobody serve a sink under its next epoch before this session is over.
select pg_try_advisory_lock(6513764, cdc.slot(%(id)s, %(epoch)s + 1));

-- name: still_held
-- Whether a session that served a sink under an earlier epoch is still there.
select exists (select from cdc.holder(%(id)s, %(epoch)s));

-- name: rewind
-- Let a sink go on from another position.
select cdc.rewind(%(sink)s, %(position)s::pg_snapshot, %(tables)s::text[]);

-- name: skips
-- Of what position a sink is to deliver only some tables' events.
select skip_shown::text, skip_but from cdc.sink where name = %(sink)s and epoch = %(epoch)s;

-- name: set_state
-- What a sink is doing, for people; written on changes only. No row: another daemon serves it.
update cdc.sink
   set state = %(state)s, state_since = clock_timestamp(),
       last_error = coalesce(%(error)s, last_error),
       last_error_at = case when %(error)s::text is null then last_error_at else clock_timestamp() end
 where name = %(sink)s and epoch = %(epoch)s
returning name;

-- name: add_dropped
-- Count ephemeral changes that were not delivered.
update cdc.sink set dropped = dropped + %(dropped)s where name = %(sink)s and epoch = %(epoch)s;

-- name: note_stall
-- Say that a sink has not returned from one delivery for so many seconds. No row: it has a new owner.
update cdc.sink set state = 'stalled', state_since = clock_timestamp() - make_interval(secs => %(seconds)s)
 where name = %(sink)s and epoch = %(epoch)s
returning name;

-- name: set_aside
-- Make an event a dead letter, and perhaps let its key wait. Redelivered and refused again after a crash, it is still one
-- dead letter. No row: another daemon serves the sink; the row is locked, so that a former owner changes nothing.
with ours as materialized (
  select from cdc.sink k where k.name = %(sink)s and k.epoch = %(epoch)s for share
)
insert into cdc.dead_letter as d (sink, event_id, event, reason, seq, schema_name, table_name, keys, parked)
select %(sink)s, %(event_id)s, %(event)s, %(reason)s, %(seq)s, %(schema)s, %(table)s, %(keys)s::text[], %(parked)s
  from ours
    on conflict (sink, event_id)
    do update set reason = excluded.reason, attempts = d.attempts + 1, parked = d.parked or excluded.parked
returning id;

-- name: park
-- Set events aside that only wait behind a dead letter of their key. Each one's keys are a JSON list. No row: another daemon
-- serves the sink, or somebody has touched its dead letters since we looked at them.
with ours as materialized (
  select from cdc.sink k where k.name = %(sink)s and k.epoch = %(epoch)s and k.requests = %(requests)s for share
), stored as (
  insert into cdc.dead_letter (sink, event_id, event, reason, attempts, seq, schema_name, table_name, keys, parked, wanted)
  select %(sink)s, w.event_id, w.event::json, %(reason)s, 0, w.seq, w.schema_name, w.table_name,
         array(select json_array_elements_text(w.keys::json)), true, %(wanted)s
    from ours, unnest(%(event_ids)s::text[], %(texts)s::text[], %(seqs)s::bigint[], %(schemas)s::text[],
                      %(tables)s::text[], %(key_lists)s::text[])
               as w (event_id, event, seq, schema_name, table_name, keys)
      on conflict (sink, event_id) do nothing
)
select 1 from ours;

-- name: letters
-- How often somebody has touched a sink's dead letters, whether any is to be delivered, and the last one there is. No row:
-- another daemon serves the sink.
select k.requests,
       exists (select from cdc.dead_letter d where d.sink = k.name and (d.wanted or d.parked) and d.wanted),
       (select coalesce(max(d.id), 0) from cdc.dead_letter d)
  from cdc.sink k where k.name = %(sink)s and k.epoch = %(epoch)s;

-- name: parked_keys
-- The keys that wait behind a dead letter, each once; null: the whole table does.
select d.schema_name, d.table_name, k.key
  from cdc.dead_letter d left join lateral unnest(d.keys) as k (key) on true
 where d.sink = %(sink)s and (d.wanted or d.parked) and d.parked
 group by d.schema_name, d.table_name, k.key;

-- name: next_letters
-- The next dead letters in the order of their events: those asked for with their event, and parked ones between them.
select w.id, w.version, w.seq, w.schema_name, w.table_name, w.keys, w.parked, w.event
  from (select d.id, d.version, d.seq, d.schema_name, d.table_name, d.keys, d.parked,
               case when d.wanted then d.event::text end as event,
               sum(case when d.wanted then octet_length(d.event::text) else 0 end) over (order by d.seq, d.id) as size,
               row_number() over (order by d.seq, d.id) as number
          from (select l.*, l.xmin::text as version
                  from cdc.dead_letter l
                 where l.sink = %(sink)s and (l.wanted or l.parked) and (l.seq, l.id) > (%(after_seq)s, %(after_id)s)
                 order by l.seq, l.id
                 limit %(events)s) d) w
 where w.size <= %(bytes)s or w.number = 1
 order by w.seq, w.id;

-- name: remove_letters
-- Dead letters that were delivered after all, unless somebody has edited one meanwhile: then that is still to be delivered.
delete from cdc.dead_letter d using cdc.sink k, unnest(%(ids)s::bigint[], %(versions)s::text[]) as w (id, version)
 where d.id = w.id and d.xmin::text = w.version and d.sink = k.name and k.name = %(sink)s and k.epoch = %(epoch)s;

-- name: keep_letter
-- A dead letter that was refused again; the same holds.
update cdc.dead_letter d set wanted = false, reason = %(reason)s, attempts = d.attempts + 1
  from cdc.sink k
 where d.id = %(id)s and d.xmin::text = %(version)s and d.sink = k.name and k.name = %(sink)s and k.epoch = %(epoch)s;

-- name: put_letters_back
-- Dead letters that were to be delivered and cannot be, because an earlier one of their key stays.
update cdc.dead_letter d set wanted = false
  from cdc.sink k
 where d.id = any (%(ids)s) and d.sink = k.name and k.name = %(sink)s and k.epoch = %(epoch)s;

-- name: request
-- Let the pipeline that serves a sink look again at its dead letters. To come first in a transaction that changes them.
update cdc.sink set requests = requests + 1 where name = %(sink)s;

-- name: want_letters
-- Ask for dead letters to be delivered. One that was asked for already is not touched: it may be on its way.
with here as (select id, wanted from cdc.dead_letter where sink = %(sink)s and id = any (%(ids)s) for update),
     asked as (update cdc.dead_letter d set wanted = true from here h where d.id = h.id and not h.wanted)
select id from here;

-- name: rewrite_letter
-- Put another event in the place of a dead letter's, and ask for it to be delivered.
update cdc.dead_letter set event = %(event)s, wanted = true where sink = %(sink)s and id = %(id)s returning id;

-- name: discard_letters
-- Delete dead letters.
delete from cdc.dead_letter where sink = %(sink)s and id = any (%(ids)s) returning id;

-- name: dead_letters
-- Dead letters in the order of their events, for people; null in a condition: any. The op is read off the event's text, where
-- it stands near the beginning.
select d.id, d.sink, d.event_id, d.seq, substring(left(d.event::text, 1000) from '"op":"([a-z]+)"'),
       d.schema_name, d.table_name, d.keys, d.reason, d.attempts, d.died_at, d.parked, d.wanted,
       case when %(whole)s then d.event::text end
  from cdc.dead_letter d
 where (%(sink)s::text is null or d.sink = %(sink)s)
   and (%(event_ids)s::text[] is null or d.event_id = any (%(event_ids)s))
   and (%(schema)s::text is null or d.schema_name like %(schema)s and d.table_name like %(table)s)
   and (%(keys)s::text[] is null or d.keys && %(keys)s::text[])
   and (%(reason)s::text is null or position(lower(%(reason)s) in lower(d.reason)) > 0)
   and (%(since)s::timestamptz is null or d.died_at >= %(since)s)
   and (%(before)s::timestamptz is null or d.died_at < %(before)s)
   and (d.sink, d.seq, d.id) > (%(after_sink)s, %(after_seq)s, %(after_id)s)
 order by d.sink, d.seq, d.id
 limit %(limit)s;

-- name: letters_left
-- What has become of dead letters: those that are still there.
select id, event_id, wanted, reason from cdc.dead_letter where id = any (%(ids)s) order by seq, id;

-- name: set_paused
-- Let a sink deliver nothing, or let it go on. No row: it has no position.
update cdc.sink set paused = %(paused)s, requests = requests + 1 where name = %(sink)s returning name;

-- name: attendance
-- Who serves a sink at this moment, and whether it is paused. No row: it has no position.
select case when exists (select from cdc.holder(k.id, k.epoch)) then coalesce(k.owner, '?') end, k.paused
  from cdc.sink k where k.name = %(sink)s;

-- name: current_snapshot
-- Now, as a position.
select pg_current_snapshot()::text;

-- name: sinks_behind
-- Which of these sinks have not delivered everything a snapshot shows, every dead letter that was asked for, and the rows of
-- every backfill that is not paused. Nothing to deliver counts as delivered.
select k.name
  from cdc.sink k join cdc.position p on p.sink = k.name
 where k.name = any (%(sinks)s)
   and (exists (select from cdc.dead_letter d where d.sink = k.name and (d.wanted or d.parked) and d.wanted)
        or k.backfill_due
        or exists (select from cdc.backfill b where b.sink = k.name and b.state = 'running')
        or not cdc.covers(p.snap_lo, %(target)s::pg_snapshot)
   and (p.snap_hi is not null
        or exists (select from cdc.event e
                    where e.txid >= pg_snapshot_xmax(p.snap_lo) and e.txid < pg_snapshot_xmax(%(target)s::pg_snapshot)
                      and pg_visible_in_snapshot(e.txid, %(target)s::pg_snapshot))
        or exists (select from cdc.event e
                    where e.txid = any (array(select x from pg_snapshot_xip(p.snap_lo) as x
                                               where pg_visible_in_snapshot(x, %(target)s::pg_snapshot))))));

-- name: ring_self
-- The self-test: a notification to ourselves, which must come back.
select pg_notify(%(channel)s, %(nonce)s);

-- name: arm
-- Ask to be rung. False: a writer that stayed silent has not ended yet.
select pg_try_advisory_lock(6513763, 1);

-- name: disarm
-- Stay awake, so that no writer needs to ring.
select pg_advisory_unlock(6513763, 1);

-- name: ringers_waiting
-- How many transactions of the cluster wait in their COMMIT for the lock that whoever rings holds through his.
select count(*) from pg_catalog.pg_locks l
 where l.locktype = 'object' and l.database = 0 and l.classid = 'pg_catalog.pg_database'::regclass and l.objid = 0
   and l.mode = 'AccessExclusiveLock' and not l.granted;

-- name: queue_usage
-- How full the cluster's notification queue is, 0 to 1. Asking also frees a queue that once filled up.
select pg_notification_queue_usage();

-- name: silence
-- Keep triggers whose ringing no lock can stop from ringing, for so many seconds; 0: let them ring again.
update cdc.installation set silent_until = clock_timestamp() + make_interval(secs => %(seconds)s);

-- name: armed_by_another
-- Whether another session asks the writers to ring.
select exists (select from pg_catalog.pg_locks l
                where l.locktype = 'advisory' and l.classid = 6513763 and l.objid = 1 and l.granted
                  and l.mode = 'ExclusiveLock' and l.pid <> pg_backend_pid()
                  and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database()));

-- name: forgettable
-- How many dead letters a sink has, and who serves or served it last.
select (select count(*) from cdc.dead_letter d where d.sink = k.name), k.owner from cdc.sink k where k.name = %(sink)s;

-- name: forget_sink
-- Remove a sink's position and dead letters, unless somebody serves it. No row: it is served, or there is none.
with gone as (
  delete from cdc.sink k where k.name = %(sink)s and not exists (select from cdc.holder(k.id, k.epoch)) returning name
), letters as (
  delete from cdc.dead_letter d using gone where d.sink = gone.name
)
select name from gone;

-- name: moved_sinks
-- Sinks whose position was taken in another cluster and says nothing here.
select k.name from cdc.sink k join cdc.position p on p.sink = k.name, cdc.place() here
 where k.system_identifier <> here.system_identifier
   and (here.is_copy or pg_snapshot_xmax(p.snap_lo) > pg_snapshot_xmax(pg_current_snapshot()))
 order by k.name;

-- name: rebase
-- Give every sink a position that means something here; how many events will be delivered.
select cdc.rebase();

-- name: rotate
-- Give space of the outbox back.
select cdc.rotate(make_interval(secs => %(retention)s));

-- name: walk_indexes
-- For a session that reads the outbox by itself, as cdc.next_batch does: its tables carry no statistics on purpose.
select set_config('enable_seqscan', 'off', false), set_config('enable_bitmapscan', 'off', false),
       set_config('max_parallel_workers_per_gather', '0', false);

-- name: tail_window
-- What has been committed since a position: the position now, and how many events lie between, at most 5001, with the
-- first of those. It changes nothing.
with here as (select pg_current_snapshot() as snap),
     fresh as (
  (select e.seq from cdc.event e, here h
    where e.txid >= pg_snapshot_xmax(%(position)s::pg_snapshot) and e.txid < pg_snapshot_xmax(h.snap)
      and pg_visible_in_snapshot(e.txid, h.snap)
    limit 5001)
  union all
  (select e.seq from cdc.event e
    where e.txid = any (array(select x from pg_snapshot_xip(%(position)s::pg_snapshot) as x, here h
                               where pg_visible_in_snapshot(x, h.snap)))
    limit 5001))
select h.snap::text, (select count(*) from fresh), (select min(f.seq) from fresh f) from here h;

-- name: tail_first
-- The first event of a window of more than 5000.
select min(e.seq) from cdc.event e
 where (e.txid >= pg_snapshot_xmax(%(position)s::pg_snapshot) and e.txid < pg_snapshot_xmax(%(until)s::pg_snapshot)
        and pg_visible_in_snapshot(e.txid, %(until)s::pg_snapshot))
    or e.txid = any (array(select x from pg_snapshot_xip(%(position)s::pg_snapshot) as x
                            where pg_visible_in_snapshot(x, %(until)s::pg_snapshot)));

-- name: tail_small
-- A page of a small window: found by transaction, then sorted.
select w.seq, w.txid, to_char(w.captured_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), w.captured_table,
       w.op, replace(w.old_row::text, E'\\', E'\\\\')::bytea, replace(w.new_row::text, E'\\', E'\\\\')::bytea,
       replace(w.context, E'\\', E'\\\\')::bytea
  from (select e.* from cdc.event e
         where e.txid >= pg_snapshot_xmax(%(position)s::pg_snapshot) and e.txid < pg_snapshot_xmax(%(until)s::pg_snapshot)
           and pg_visible_in_snapshot(e.txid, %(until)s::pg_snapshot) and e.seq > %(last_seq)s
        union all
        select e.* from cdc.event e
         where e.txid = any (array(select x from pg_snapshot_xip(%(position)s::pg_snapshot) as x
                                    where pg_visible_in_snapshot(x, %(until)s::pg_snapshot)))
           and e.seq > %(last_seq)s) w
 order by w.seq
 limit %(events)s;

-- name: tail_large
-- A page of a large one: along seq, so that each costs the same.
select e.seq, e.txid, to_char(e.captured_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), e.captured_table,
       e.op, replace(e.old_row::text, E'\\', E'\\\\')::bytea, replace(e.new_row::text, E'\\', E'\\\\')::bytea,
       replace(e.context, E'\\', E'\\\\')::bytea
  from cdc.event e
 where e.seq > %(last_seq)s and pg_visible_in_snapshot(e.txid, %(until)s::pg_snapshot)
   and not pg_visible_in_snapshot(e.txid, %(position)s::pg_snapshot)
 order by e.seq
 limit %(events)s;

-- name: tail_last
-- The newest events that a position shows, the newest first.
select e.seq, e.txid, to_char(e.captured_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), e.captured_table,
       e.op, replace(e.old_row::text, E'\\', E'\\\\')::bytea, replace(e.new_row::text, E'\\', E'\\\\')::bytea,
       replace(e.context, E'\\', E'\\\\')::bytea
  from cdc.event e
 where pg_visible_in_snapshot(e.txid, %(until)s::pg_snapshot)
 order by e.seq desc
 limit %(events)s;

-- name: sink_status
-- Where every sink stands. Pending counts at most 100001 events and includes those the sink does not want.
select k.name, k.state, k.owner, k.last_error, k.last_error_at, p.delivered_at,
       h.pid is not null as served,
       extract(epoch from clock_timestamp() - h.heard_at)::float8 as silent_for,
       w.pending,
       extract(epoch from clock_timestamp() - w.oldest)::float8 as lag,
       l.dead_letters, k.dropped, l.parked, k.paused, k.state_since
  from cdc.sink k
  join cdc.position p on p.sink = k.name
  left join lateral cdc.holder(k.id, k.epoch) h on true
  cross join lateral (
    select count(*) as dead_letters, count(*) filter (where d.parked) as parked
      from cdc.dead_letter d where d.sink = k.name) l
  cross join lateral (
    select count(*) as pending, min(e.captured_at) as oldest
      from (select e.captured_at from cdc.event e
             where (e.txid >= pg_snapshot_xmax(p.snap_lo)
                    or e.txid = any (array(select pg_snapshot_xip(p.snap_lo))))
               and not (p.snap_hi is not null and pg_visible_in_snapshot(e.txid, p.snap_hi) and e.seq <= p.last_seq)
             limit 100001) e) w
 order by k.name;

-- name: outbox_bytes
-- The outbox on disk, indexes included.
select coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint
  from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 where n.nspname = 'cdc' and c.relname in ('event_0', 'event_1', 'event_2');

-- name: armed
-- Whether a listener of this database asks to be rung.
select exists (select from pg_catalog.pg_locks l
                where l.locktype = 'advisory' and l.classid = 6513763 and l.objid = 1 and l.granted
                  and l.mode = 'ExclusiveLock'
                  and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database()));

-- name: candidate_tables
-- Everything that could be named under `tables`, and whether a glob may mean it.
select c.oid::bigint, n.nspname, c.relname, c.relkind in ('r', 'p') and c.relpersistence = 'p' and not c.relispartition
  from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 where c.relkind in ('r', 'p', 'v', 'm', 'f')
   and n.nspname not in ('cdc', 'information_schema') and n.nspname not like 'pg\_%%';

-- name: enable_capture
-- Make one table's triggers exactly these.
select cdc.enable_capture(%(relation)s::oid::regclass, %(ops)s, %(image)s, %(key)s::text[], %(always)s, %(notify)s,
                          %(notify_payload)s, %(channel)s, %(exclude)s::text[], %(mask)s::json, %(conditions)s::json,
                          %(lenient)s);

-- name: capture_state
-- Whether one table's triggers are exactly these.
select state from cdc.capture_plan(%(relation)s::oid::regclass, %(ops)s, %(image)s, %(key)s::text[], %(always)s,
                                   %(notify)s, %(notify_payload)s, %(channel)s, %(exclude)s::text[], %(mask)s::json,
                                   %(conditions)s::json, %(lenient)s);

-- name: captured
-- The tables that carry our triggers.
select relation::bigint, schema_name, table_name from cdc.captured order by schema_name, table_name;

-- name: replaced_functions
-- Functions that are no longer what the revisions have made of them.
select d.name from cdc.definition d left join cdc.function f on f.name = d.name and f.hash = d.hash
 where f.name is null order by d.name;

-- name: in_the_way
-- Who holds locks on a table, or on a partition of it, that a trigger cannot be made beside; longest first.
select a.pid, coalesce(nullif(a.application_name, ''), a.usename, '?'), coalesce(a.state, '?'),
       extract(epoch from clock_timestamp() - a.xact_start)::float8
  from pg_catalog.pg_locks l
  join pg_catalog.pg_stat_activity a on a.pid = l.pid
 where l.granted and l.locktype = 'relation'
   and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
   and l.relation = any (array(select %(relation)s::bigint::oid
                               union select t.relid::oid from pg_partition_tree(%(relation)s::bigint::oid::regclass) t))
   and l.mode not in ('AccessShareLock', 'RowShareLock')
   and a.application_name not like 'cdc migrate%%'
 group by a.pid, a.application_name, a.usename, a.state, a.xact_start
 order by a.xact_start
 limit 5;

-- name: oldest_pending
-- How old a sink's backlog is, in seconds, when there is too much of it to look at everything: the age of the first
-- pending event of the oldest transaction.
select extract(epoch from clock_timestamp() - least(
         (select e.captured_at from cdc.event e
           where e.txid >= pg_snapshot_xmax(p.snap_lo)
             and not (p.snap_hi is not null and pg_visible_in_snapshot(e.txid, p.snap_hi) and e.seq <= p.last_seq)
           order by e.txid, e.seq limit 1),
         (select min(e.captured_at) from cdc.event e
           where e.txid = any (array(select pg_snapshot_xip(p.snap_lo)))
             and not (p.snap_hi is not null and pg_visible_in_snapshot(e.txid, p.snap_hi) and e.seq <= p.last_seq))
       ))::float8
  from cdc.position p where p.sink = %(sink)s;

-- name: pulse
-- How a database does beside its sinks: the outbox on disk, how full the notification queue is, whether a listener asks
-- to be rung, and what may hold delivery or retention back: the open transaction that has held a transaction id for
-- longest, in any database of the cluster (snapshots know them all), prepared ones included. Its age is null where our
-- role may not see it; all of it is null when there is none.
select p.outbox_bytes, p.queue_usage, p.armed, w.pid, w.prepared, w.application, w.state, w.database, w.age
  from (select (select coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint
                  from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
                 where n.nspname = 'cdc' and c.relname in ('event_0', 'event_1', 'event_2')) as outbox_bytes,
               pg_notification_queue_usage() as queue_usage,
               exists (select from pg_catalog.pg_locks l
                        where l.locktype = 'advisory' and l.classid = 6513763 and l.objid = 1 and l.granted
                          and l.mode = 'ExclusiveLock'
                          and l.database = (select d.oid from pg_catalog.pg_database d
                                             where d.datname = current_database())) as armed) p
  left join lateral (
    select o.*
      from (select a.pid, null::text as prepared, coalesce(a.application_name, '') as application,
                   coalesce(a.state, '') as state, a.datname::text as database,
                   extract(epoch from clock_timestamp() - a.xact_start)::float8 as age, age(a.backend_xid) as since
              from pg_catalog.pg_stat_activity a
             where a.backend_xid is not null and a.pid <> pg_backend_pid()
            union all
            select null, x.gid, '', 'prepared', x.database::text,
                   extract(epoch from clock_timestamp() - x.prepared)::float8, age(x.transaction)
              from pg_catalog.pg_prepared_xacts x) o
     order by o.since desc
     limit 1) w on true;

-- name: server_facts
-- What `cdc check` wants to know of a server: all of it readable by anybody.
select current_setting('server_version'), current_setting('server_encoding'), current_user::text,
       current_setting('max_prepared_transactions')::integer, pg_notification_queue_usage(),
       pg_has_role(current_user, 'pg_read_all_stats', 'usage');

-- name: same_place
-- Which database of which cluster this is.
select c.system_identifier, d.oid::bigint
  from pg_catalog.pg_control_system() c, pg_catalog.pg_database d
 where d.datname = current_database();

-- name: replica_defaults
-- Where session_replication_role is set to replica for more than one session: ordinary triggers do not fire there.
select coalesce('role ' || r.rolname, 'every role') || case when d.datname is null then '' else ' in this database' end
  from pg_catalog.pg_db_role_setting s
  left join pg_catalog.pg_roles r on r.oid = s.setrole
  left join pg_catalog.pg_database d on d.oid = s.setdatabase
 where (s.setdatabase = 0 or d.datname = current_database())
   and exists (select from unnest(s.setconfig) as c where lower(c) = 'session_replication_role=replica')
union all
select 'the whole server' from pg_catalog.pg_settings s
 where s.name = 'session_replication_role' and s.setting = 'replica'
   and s.source not in ('default', 'database', 'user', 'database user', 'client', 'session');

-- name: missing_privileges
-- What the daemon's role may not do of what it does; asked of the catalogue, so that lacking everything is no error.
-- An object that is not there is no matter of privileges and left out. No row when schema cdc does not exist.
select w.privilege, w.kind || ' cdc' || coalesce('.' || w.object, '')
  from pg_catalog.pg_namespace n
  cross join (values
    ('usage', 'schema', null),
    ('select', 'table', 'alembic_version'), ('select', 'table', 'installation'),
    ('select', 'table', 'captured_table'), ('select', 'table', 'captured'),
    ('select', 'table', 'definition'), ('select', 'table', 'function'),
    ('select', 'table', 'event'),
    ('select', 'table', 'event_0'), ('select', 'table', 'event_1'), ('select', 'table', 'event_2'),
    ('truncate', 'table', 'event_0'), ('truncate', 'table', 'event_1'), ('truncate', 'table', 'event_2'),
    ('select', 'sequence', 'event_seq'), ('update', 'sequence', 'event_seq'),
    ('select', 'table', 'sink'), ('insert', 'table', 'sink'), ('update', 'table', 'sink'), ('delete', 'table', 'sink'),
    ('select', 'table', 'position'), ('insert', 'table', 'position'), ('update', 'table', 'position'),
    ('select', 'table', 'origin'), ('select', 'table', 'backfill'), ('select', 'table', 'backfill_progress'),
    ('select', 'table', 'moment'), ('insert', 'table', 'moment'), ('delete', 'table', 'moment'),
    ('execute', 'function', 'backfill_batch'), ('execute', 'function', 'backfill_obstacle'),
    ('execute', 'function', 'capture_of'), ('execute', 'function', 'paging'), ('execute', 'function', 'rewind'),
    ('execute', 'function', 'note_moment'),
    ('select', 'table', 'dead_letter'), ('insert', 'table', 'dead_letter'),
    ('update', 'table', 'dead_letter'), ('delete', 'table', 'dead_letter'),
    ('execute', 'function', 'next_batch'), ('execute', 'function', 'covers'), ('execute', 'function', 'rotate'),
    ('execute', 'function', 'slot'), ('execute', 'function', 'holder'), ('execute', 'function', 'place'),
    ('execute', 'function', 'take'), ('execute', 'function', 'capture_plan'),
    ('execute', 'function', 'all_arguments'), ('execute', 'function', 'condition_of')) as w (privilege, kind, object)
  left join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = w.object and w.kind in ('table', 'sequence')
  left join pg_catalog.pg_proc p on p.pronamespace = n.oid and p.proname = w.object and w.kind = 'function'
 where n.nspname = 'cdc'
   and not case w.kind when 'schema' then has_schema_privilege(n.oid, w.privilege)
                       when 'table' then has_table_privilege(c.oid, w.privilege)
                       when 'sequence' then has_sequence_privilege(c.oid, w.privilege)
                       else has_function_privilege(p.oid, w.privilege) end
 order by w.object nulls first, w.privilege;

-- name: candidate_keys
-- Everything that could be named under `tables`, whether a glob may mean it, and whether it has a primary key.
select n.nspname, c.relname, c.relkind in ('r', 'p') and c.relpersistence = 'p' and not c.relispartition,
       exists (select from pg_catalog.pg_index i where i.indrelid = c.oid and i.indisprimary)
  from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 where c.relkind in ('r', 'p', 'v', 'm', 'f')
   and n.nspname not in ('cdc', 'information_schema') and n.nspname not like 'pg\_%%'
 order by n.nspname, c.relname;

-- name: inheriting_tables
-- Tables that inherit from another, which is no partitioned table: the parent, and the child.
select n.nspname, p.relname, m.nspname, c.relname
  from pg_catalog.pg_inherits i
  join pg_catalog.pg_class p on p.oid = i.inhparent and p.relkind = 'r'
  join pg_catalog.pg_namespace n on n.oid = p.relnamespace
  join pg_catalog.pg_class c on c.oid = i.inhrelid and c.relkind in ('r', 'f')
  join pg_catalog.pg_namespace m on m.oid = c.relnamespace
 where n.nspname <> 'cdc'
 order by 1, 2, 3, 4;

-- name: deferrable_keys
-- Tables whose primary key is deferrable.
select n.nspname, r.relname
  from pg_catalog.pg_index i
  join pg_catalog.pg_class r on r.oid = i.indrelid
  join pg_catalog.pg_namespace n on n.oid = r.relnamespace
 where i.indisprimary and not i.indimmediate
 order by 1, 2;

-- name: disabled_captures
-- Captured tables one of whose triggers does not fire for ordinary writes, in the table or in one of its partitions.
with recursive family as (
  select c.relation as root, c.relation as member from cdc.captured c
  union all
  select f.root, i.inhrelid
    from family f
    join pg_catalog.pg_class p on p.oid = f.member and p.relkind = 'p'
    join pg_catalog.pg_inherits i on i.inhparent = f.member
)
select c.schema_name || '.' || c.table_name
  from cdc.captured c
 where exists (select from family f join pg_catalog.pg_trigger g on g.tgrelid = f.member
                where f.root = c.relation and g.tgname = any (c.triggers) and g.tgenabled not in ('O', 'A'));

-- name: name_installation
-- Let a database be called what the configuration calls it.
update cdc.installation set database_name = %(name)s where database_name <> %(name)s;

-- name: installation_name
-- What a database is called in its events.
select database_name from cdc.installation;

-- name: known_sinks
-- The sinks that have a position.
select name from cdc.sink;

-- name: lacks_reader
-- Whether a role is to be made a member of cdc_reader: it is not the one that migrates, and no member yet.
select not coalesce(pg_has_role(r.oid, g.oid, 'member'), false)
  from pg_catalog.pg_roles r left join pg_catalog.pg_roles g on g.rolname = 'cdc_reader'
 where r.rolname = %(role)s and r.rolname <> current_user;

-- name: table_facts
-- What a plan tells of tables, without a lock on any: the quoted name; the size, null where it cannot be had without
-- waiting; the rows as the planner estimates them; how many partitions; our triggers; the primary key; all columns.
with recursive family as (
  select r::oid as root, r::oid as member from unnest(%(relations)s::bigint[]) as r
  union all
  select f.root, i.inhrelid
    from family f
    join pg_catalog.pg_class p on p.oid = f.member and p.relkind = 'p'
    join pg_catalog.pg_inherits i on i.inhparent = f.member
), busy as materialized (
  select l.relation from pg_catalog.pg_locks l
   where l.locktype = 'relation' and l.mode = 'AccessExclusiveLock'
     and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
), sizes as (
  select f.root, count(*) - 1 as partitions,
         case when bool_or(f.member in (select b.relation from busy b)) then null
              else sum(case when f.member not in (select b.relation from busy b) then pg_total_relation_size(f.member) end)
         end::bigint as bytes,
         sum(nullif(c.reltuples, -1)) filter (where c.relkind <> 'p')::bigint as estimated_rows
    from family f join pg_catalog.pg_class c on c.oid = f.member
   group by f.root
)
select s.root::bigint, format('%%I.%%I', n.nspname, c.relname), s.bytes, s.estimated_rows, s.partitions,
       array(select g.tgname::text from pg_catalog.pg_trigger g
              where g.tgrelid = s.root and not g.tgisinternal and g.tgname like '00\_cdc\_%%'),
       (select array_agg(a.attname::text order by k.n)
          from pg_catalog.pg_index i
          cross join unnest(i.indkey::int2[]) with ordinality as k (attnum, n)
          join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
         where i.indrelid = s.root and i.indisprimary and k.n <= i.indnkeyatts),
       array(select a.attname::text from pg_catalog.pg_attribute a
              where a.attrelid = s.root and a.attnum > 0 and not a.attisdropped)
  from sizes s
  join pg_catalog.pg_class c on c.oid = s.root
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace;

-- name: holders
-- Whose locks on a table, or on a partition of it, making a trigger has to wait for, or (exclusive) dropping one; longest
-- first. Takes no lock itself.
with recursive family as (
  select %(relation)s::bigint::oid as member
  union all
  select i.inhrelid
    from family f
    join pg_catalog.pg_class p on p.oid = f.member and p.relkind = 'p'
    join pg_catalog.pg_inherits i on i.inhparent = f.member
)
select l.pid, p.gid, coalesce(nullif(a.application_name, ''), a.usename, a.backend_type, p.owner, '?'),
       coalesce(a.state, ''),
       extract(epoch from clock_timestamp() - coalesce(a.xact_start, p.prepared))::float8 as age
  from pg_catalog.pg_locks l
  left join pg_catalog.pg_stat_activity a on a.pid = l.pid
  -- A prepared transaction has no process; what its locks have in common is the virtual transaction it once was.
  left join pg_catalog.pg_locks x
    on l.pid is null and x.pid is null and x.locktype = 'transactionid' and x.virtualtransaction = l.virtualtransaction
  left join pg_catalog.pg_prepared_xacts p on p.transaction = x.transactionid
 where l.granted and l.locktype = 'relation'
   and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = current_database())
   and l.relation in (select f.member from family f)
   and (%(exclusive)s or l.mode not in ('AccessShareLock', 'RowShareLock'))
   and l.pid is distinct from pg_backend_pid()
 group by l.pid, p.gid, a.application_name, a.usename, a.backend_type, p.owner, a.state, a.xact_start, p.prepared
 order by age desc nulls last
 limit 5;

-- name: served_sinks
-- The sinks that a daemon serves at this moment, and which.
select k.name, coalesce(k.owner, '?') from cdc.sink k
 where exists (select from cdc.holder(k.id, k.epoch))
 order by k.name;

-- name: schema_cdc
-- Whose schema cdc is, whose our version table in it (null: there is none), who we are, and whether we may make schemas here.
-- Of the catalogue: what stands in a schema that may be anybody's is neither read nor called. No row: there is none.
select pg_catalog.pg_get_userbyid(n.nspowner)::text, pg_catalog.pg_get_userbyid(v.relowner)::text, current_user::text,
       pg_catalog.has_database_privilege(pg_catalog.current_database(), 'create')
  from pg_catalog.pg_namespace n
  left join pg_catalog.pg_class v on v.relnamespace = n.oid and v.relname = 'alembic_version' and v.relkind = 'r'
 where n.nspname = 'cdc';

-- name: contents_of_cdc
-- What stands in schema cdc, whoever has made it: kind, name, and both for people. Not what is part of a table there, or
-- inherits from one.
select case d.classid when 'pg_catalog.pg_class'::regclass then 'relation'
                      when 'pg_catalog.pg_proc'::regclass then 'function'
                      when 'pg_catalog.pg_type'::regclass then 'type' end,
       coalesce(c.relname, p.proname, t.typname), i.type || ' ' || i.identity
  from pg_catalog.pg_depend d
  cross join lateral pg_catalog.pg_identify_object(d.classid, d.objid, 0) i
  left join pg_catalog.pg_class c on d.classid = 'pg_catalog.pg_class'::regclass and c.oid = d.objid
  left join pg_catalog.pg_proc p on d.classid = 'pg_catalog.pg_proc'::regclass and p.oid = d.objid
  left join pg_catalog.pg_type t on d.classid = 'pg_catalog.pg_type'::regclass and t.oid = d.objid
 where d.refclassid = 'pg_catalog.pg_namespace'::regclass and d.refobjid = pg_catalog.to_regnamespace('cdc')
   and i.schema = 'cdc'
   and not exists (select from pg_catalog.pg_depend o
                     join pg_catalog.pg_class r on r.oid = o.refobjid and r.relnamespace = d.refobjid
                    where o.classid = d.classid and o.objid = d.objid
                      and o.refclassid = 'pg_catalog.pg_class'::regclass and o.deptype in ('a', 'i'))
   and not exists (select from pg_catalog.pg_inherits h
                     join pg_catalog.pg_class r on r.oid = h.inhparent and r.relnamespace = d.refobjid
                    where h.inhrelid = c.oid)
 order by 3;

-- name: tables_of_cdc
-- The tables of schema cdc, whichever revision made them; children before their parents.
select c.oid::bigint, c.relname
  from pg_catalog.pg_class c
 where c.relnamespace = to_regnamespace('cdc') and c.relkind in ('r', 'p')
 order by c.oid desc;

-- name: triggers_of_cdc
-- Every trigger that calls a function of schema cdc, whatever it is called; those of partitions go with their parent's.
select g.tgrelid::bigint, n.nspname, c.relname, g.tgname
  from pg_catalog.pg_trigger g
  join pg_catalog.pg_proc p on p.oid = g.tgfoid
  join pg_catalog.pg_class c on c.oid = g.tgrelid
  join pg_catalog.pg_namespace n on n.oid = c.relnamespace
 where p.pronamespace = to_regnamespace('cdc') and not g.tgisinternal and g.tgparentid = 0
 order by n.nspname, c.relname, g.tgname;

-- name: dependents_of_cdc
-- What is outside of schema cdc and would be dropped with something inside.
with inside as (
  select 'pg_class'::regclass::oid as class, c.oid as object from pg_catalog.pg_class c
   where c.relnamespace = to_regnamespace('cdc')
  union all
  select 'pg_proc'::regclass, p.oid from pg_catalog.pg_proc p where p.pronamespace = to_regnamespace('cdc')
  union all
  select 'pg_type'::regclass, t.oid from pg_catalog.pg_type t where t.typnamespace = to_regnamespace('cdc')
)
select distinct pg_describe_object(d.classid, d.objid, 0)
  from pg_catalog.pg_depend d
  join inside i on i.class = d.refclassid and i.object = d.refobjid
  cross join lateral pg_identify_object_as_address(d.classid, d.objid, 0) a
 where not exists (select from inside o where o.class = d.classid and o.object = d.objid)
   and a.object_names[1] not in ('cdc', 'pg_toast')
 order by 1;

-- name: databases_of_role
-- The databases where a role owns something or has been granted something.
select distinct d.datname
  from pg_catalog.pg_shdepend s join pg_catalog.pg_database d on d.oid = s.dbid
 where s.refclassid = 'pg_authid'::regclass
   and s.refobjid = (select r.oid from pg_catalog.pg_roles r where r.rolname = %(role)s)
 order by d.datname;

-- name: captured_as
-- The tables that carry our triggers, and how these capture them: for `cdc models`. A key column that was renamed since
-- is known to the primary key only.
select c.oid::bigint, t.id, t.schema_name, t.table_name, t.image,
       case when t.key_columns <@ array(select a.attname::text from pg_catalog.pg_attribute a
                                         where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped)
            then t.key_columns
            else (select array_agg(a.attname::text order by k.n)
                    from pg_catalog.pg_index i
                    cross join unnest(i.indkey::int2[]) with ordinality as k (attnum, n)
                    join pg_catalog.pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
                   where i.indrelid = c.oid and i.indisprimary and k.n <= i.indnkeyatts) end,
       obj_description(c.oid, 'pg_class')
  from (select g.tgrelid, max(substring(encode(g.tgargs, 'escape') from '^[0-9]+')::integer) as captured
          from pg_catalog.pg_trigger g
         where starts_with(g.tgname::text, '00_cdc_') and not g.tgisinternal and g.tgparentid = 0
           and g.tgfoid = to_regproc('cdc.capture')
         group by g.tgrelid) g
  join pg_catalog.pg_class c on c.oid = g.tgrelid
  join cdc.captured_table t on t.id = g.captured
 order by t.schema_name, t.table_name;

-- name: captured_columns
-- The columns of captured tables that reach an event, in the table's order: type, whether a value may be missing, and how
-- it is hidden; as `cdc.hide` sees it. What a virtual generated column holds is nowhere when a trigger runs.
select a.attrelid::bigint, a.attname::text, a.atttypid::bigint, format_type(a.atttypid, a.atttypmod),
       not a.attnotnull or exists (select from pg_catalog.pg_constraint o -- PostgreSQL 18: NOT NULL NOT VALID
                                    where o.conrelid = a.attrelid and o.contype = 'n' and not o.convalidated
                                      and a.attnum = any (o.conkey)),
       h.how, col_description(a.attrelid, a.attnum)
  from unnest(%(relations)s::bigint[], %(captures)s::integer[]) as w (relation, captured)
  join cdc.captured_table t on t.id = w.captured
  join pg_catalog.pg_attribute a on a.attrelid = w.relation and a.attnum > 0 and not a.attisdropped
  cross join lateral (
    select case when bool_or(x.value ->> 'how' = 'exclude') then 'exclude'
                when bool_or(x.value ->> 'how' = 'redact') then 'redact' else min(x.value ->> 'how') end as how
      from jsonb_each(t.hidden) x
     where x.key = a.attname
        or (t.relation = a.attrelid and (x.value ->> 'number')::smallint = a.attnum)) h
 where a.attgenerated <> 'v' and h.how is distinct from 'exclude'
 order by a.attrelid, a.attnum;

-- name: types_within
-- Types, and those they are made of, as to_json tells them apart: domains, arrays, composites, then types with a cast to
-- json, enums and all others. Of what, a domain's base or an array's element; labels of an enum; attributes of a composite.
with recursive reached as (
  select w.id::oid as id from unnest(%(types)s::bigint[]) as w (id)
  union
  select n.id
    from reached r
    join pg_catalog.pg_type t on t.oid = r.id
    cross join lateral (
      select t.typbasetype where t.typtype = 'd'
      union all
      select t.typelem where t.typelem <> 0 and t.typsubscript = 'pg_catalog.array_subscript_handler'::regproc
      union all
      select a.atttypid from pg_catalog.pg_attribute a
       where a.attrelid = t.typrelid and t.typtype = 'c' and a.attnum > 0 and not a.attisdropped) as n (id)
)
select t.oid::bigint, n.nspname::text, t.typname::text,
       case when t.typtype = 'd' then 'domain'
            when t.typelem <> 0 and t.typsubscript = 'pg_catalog.array_subscript_handler'::regproc then 'array'
            when t.typtype = 'c' then 'composite'
            when t.oid >= 16384 and exists (select from pg_catalog.pg_cast c
                                             where c.castsource = t.oid and c.casttarget = 'pg_catalog.json'::regtype
                                               and c.castmethod = 'f')
              then case when t.typname = 'hstore' and exists (
                               select from pg_catalog.pg_depend d
                                 join pg_catalog.pg_extension e on d.refclassid = 'pg_extension'::regclass and e.oid = d.refobjid
                                where d.classid = 'pg_type'::regclass and d.objid = t.oid and d.deptype = 'e'
                                  and e.extname = 'hstore')
                        then 'hstore' else 'cast' end
            when t.typtype = 'e' then 'enum'
            else 'other' end,
       case t.typtype when 'd' then t.typbasetype else t.typelem end::bigint,
       array(select l.enumlabel::text from pg_catalog.pg_enum l where l.enumtypid = t.oid order by l.enumsortorder),
       (select coalesce(json_agg(json_build_array(a.attname, a.atttypid::bigint, format_type(a.atttypid, a.atttypmod))
                                 order by a.attnum), '[]')
          from pg_catalog.pg_attribute a
         where a.attrelid = t.typrelid and t.typtype = 'c' and a.attnum > 0 and not a.attisdropped),
       coalesce(obj_description(t.oid, 'pg_type'), obj_description(t.typrelid, 'pg_class'))
  from reached r
  join pg_catalog.pg_type t on t.oid = r.id
  join pg_catalog.pg_namespace n on n.oid = t.typnamespace;
