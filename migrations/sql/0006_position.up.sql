-- cdc, revision 0006: positions in a table of their own, so that a transaction that stays open makes no batch slower.

-- ---------------------------------------------------------------------------------------------------------------
-- Where a sink stands: the one row that changes with every batch. While some transaction of the database stays open none
-- of its dead versions can be cleared away, and whoever looks the row up by its name has to pass them all: 100 batches a
-- second for ten minutes are 60,000 of them, and more than 20 ms a batch. So the pipeline's session remembers where the
-- row stands (cdc.next_batch); and there is no index, for every version in one, and every uniqueness to check among
-- them, would cost the same. Whoever else looks reads the whole table, which is small.
create table cdc.position (
  sink text not null references cdc.sink (name) on delete cascade,
  epoch bigint not null, -- as in cdc.sink: of the claim that may move it
  snap_lo pg_snapshot not null,
  snap_hi pg_snapshot,
  last_seq bigint not null default 0,
  range_seq bigint, -- large windows: from here on the window is found along seq
  final_seq bigint, -- last seq of the window, known once its last page has been handed out
  delivered_at timestamptz, -- when the last acknowledgement came
  check (snap_hi is not null or (range_seq is null and final_seq is null))
) with (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

insert into cdc.position
select k.name, k.epoch, k.snap_lo, k.snap_hi, k.last_seq, k.range_seq, k.final_seq, k.delivered_at from cdc.sink k;

alter table cdc.sink
  drop column snap_lo, drop column snap_hi, drop column last_seq, drop column range_seq, drop column final_seq,
  drop column delivered_at;
alter table cdc.sink reset (fillfactor, autovacuum_vacuum_scale_factor, autovacuum_vacuum_threshold);

revoke all on cdc.position from public;
grant select, insert, update on cdc.position to cdc_reader;

-- cdc.next_batch(sink, epoch, acked, events, bytes): the reader's one round trip. Acknowledges what the last call
-- handed out up to seq `acked` (null: nothing new), opens a window when none is open, returns its next page.
--
-- The window between snapshots A and B is what B shows and A did not: the transactions from xmax(A) up to xmax(B)
-- that B shows, and those A saw in progress that have ended since. A row's later change is never in an earlier window
-- than its earlier one, because its writer had to wait for the row lock; within a window seq decides. (The rule is
-- PgQ's; so is the range-plus-list form of the query, which stays cheap when an old transaction pins xmin.)
--
-- The caller must not use the rows before this transaction has committed. The commit is made synchronous here: it
-- makes durable whatever B shows, so that no event outlives a change lost in a crash (synchronous_commit = off).
-- When there is nothing to say it writes nothing.
--
-- Where the position's row stands is kept in the setting cdc.position_at of the session, which a rollback sets back with
-- everything else. Should the row have moved, it is looked up by its sink.
--
-- Returns: rows by ascending seq, at most `events`, ending with the one that passes `bytes` bytes of images.
-- Raises:  CDC01 when the epoch is not the current one.    Writes: one row of cdc.position.
create or replace function cdc.next_batch(p_sink text, p_epoch bigint, p_acked bigint, p_events integer, p_bytes bigint)
returns table (seq bigint, txid xid8, captured_at text, captured_table integer, op "char",
               old_row text, new_row text, context text)
language plpgsql
set search_path = pg_catalog, pg_temp
-- The children carry no statistics on purpose; every read here is meant to walk an index in its order, and the planner's
-- idea of its cost must not talk it into compiling or parallel workers.
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set max_parallel_workers_per_gather = 0
as $$
#variable_conflict use_column
declare
  -- A window of more events than this is paged along seq; a smaller one is found by txid and sorted for each page.
  small constant integer := 5000;
  s record; -- the position, and under `at` where its row stands
  now_snap pg_snapshot;
  ended xid8[]; -- in progress in snap_lo, ended in snap_hi
  range_count bigint;
  list_count bigint;
  list_seq bigint;
  page refcursor;
  r record;
  handed integer := 0;
  size bigint := 0;
  moved boolean := false;
begin
  perform set_config('synchronous_commit', 'on', true);
  select p.ctid as at, p.* into s from cdc.position p
   where p.ctid = nullif(current_setting('cdc.position_at', true), '')::tid and p.sink = p_sink;
  if not found then
    select p.ctid as at, p.* into s from cdc.position p where p.sink = p_sink;
  end if;
  if s.epoch is distinct from p_epoch then
    raise exception 'sink % is served by another daemon', p_sink using errcode = 'CDC01';
  end if;
  if s.snap_hi is not null and p_acked > s.last_seq then
    s.last_seq := p_acked;
    s.delivered_at := clock_timestamp();
    moved := true;
  end if;

  loop
    if s.snap_hi is not null and s.last_seq >= s.final_seq then
      s.snap_lo := s.snap_hi;
      s.snap_hi := null;
      s.last_seq := 0;
      s.range_seq := null;
      s.final_seq := null;
      moved := true;
    end if;

    if s.snap_hi is null then
      now_snap := pg_current_snapshot();
      ended := array(select x from pg_snapshot_xip(s.snap_lo) as x where pg_visible_in_snapshot(x, now_snap));
      select count(*), min(w.seq) into range_count, s.range_seq
        from (select e.seq from cdc.event e
               where e.txid >= pg_snapshot_xmax(s.snap_lo) and e.txid < pg_snapshot_xmax(now_snap)
                 and pg_visible_in_snapshot(e.txid, now_snap)
               limit small + 1) w;
      select count(*), min(w.seq) into list_count, list_seq
        from (select e.seq from cdc.event e where e.txid = any (ended) limit small + 1) w;
      if range_count = 0 and list_count = 0 then
        s.range_seq := null;
        exit;
      end if;
      if range_count > small then
        select min(e.seq) into s.range_seq from cdc.event e
         where e.txid >= pg_snapshot_xmax(s.snap_lo) and e.txid < pg_snapshot_xmax(now_snap)
           and pg_visible_in_snapshot(e.txid, now_snap);
      end if;
      if list_count > small then
        select min(e.seq) into list_seq from cdc.event e where e.txid = any (ended);
      end if;
      s.snap_hi := now_snap;
      s.last_seq := least(s.range_seq, list_seq) - 1;
      s.range_seq := case when list_count > small then s.last_seq + 1
                          when range_count > small then s.range_seq end;
      moved := true;
    else
      ended := array(select x from pg_snapshot_xip(s.snap_lo) as x where pg_visible_in_snapshot(x, s.snap_hi));
    end if;

    if s.range_seq is null then
      open page for
        select e.* from cdc.event e
         where e.txid >= pg_snapshot_xmax(s.snap_lo) and e.txid < pg_snapshot_xmax(s.snap_hi)
           and pg_visible_in_snapshot(e.txid, s.snap_hi) and e.seq > s.last_seq
        union all
        select e.* from cdc.event e where e.txid = any (ended) and e.seq > s.last_seq
        order by seq
        limit p_events;
    else
      open page for
        (select e.* from cdc.event e
          where e.seq > s.last_seq and e.seq >= s.range_seq
            and pg_visible_in_snapshot(e.txid, s.snap_hi) and not pg_visible_in_snapshot(e.txid, s.snap_lo)
          order by e.seq limit p_events)
        union all
        (select e.* from cdc.event e
          where e.txid = any (ended) and e.seq > s.last_seq and e.seq < s.range_seq
          order by e.seq limit p_events)
        order by seq
        limit p_events;
    end if;
    loop
      fetch page into r;
      exit when not found;
      seq := r.seq; txid := r.txid; captured_table := r.captured_table; op := r.op; context := r.context;
      captured_at := to_char(r.captured_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"');
      old_row := r.old_row; new_row := r.new_row;
      return next;
      handed := handed + 1;
      size := size + coalesce(octet_length(old_row), 0) + coalesce(octet_length(new_row), 0);
      exit when size >= p_bytes;
    end loop;
    close page;

    if handed < p_events and size < p_bytes then
      -- The window ends with this page, or has ended before it.
      s.final_seq := case when handed > 0 then seq else s.last_seq end;
      moved := true;
    end if;
    exit when handed > 0;
  end loop;

  if moved then
    update cdc.position p
       set snap_lo = s.snap_lo, snap_hi = s.snap_hi, last_seq = s.last_seq, range_seq = s.range_seq,
           final_seq = s.final_seq, delivered_at = s.delivered_at
     where p.ctid = s.at and p.epoch = p_epoch
    returning p.ctid into s.at;
    if not found then
      raise exception 'sink % is served by another daemon', p_sink using errcode = 'CDC01';
    end if;
    perform set_config('cdc.position_at', s.at::text, false);
  end if;
end
$$;

-- cdc.take(sink, owner, process, patience): become the one who serves a sink. Possible when nobody does; when the one
-- who does belongs to a process that has said nothing for `patience` (stopped, cut off, or its host is gone), whose
-- sessions are then ended; and when it is an earlier session of our own process, which we have given up.
-- Returns: the new epoch, null when somebody else serves the sink; and what has happened to the database since the
--          position was stored: 'promoted' (another timeline of the same cluster), 'upgraded' (pg_upgrade), or null.
-- Raises:  CDC02 when the position belongs to another cluster and says nothing here.
-- Writes:  one row each of cdc.sink and cdc.position. Takes: session advisory locks, as cdc.holder explains.
create or replace function cdc.take(
  p_sink text, p_owner text, p_process integer, p_patience interval, out epoch bigint, out happened text
)
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '3s' -- a frozen session may hold the row; then only its end helps
as $$
declare
  s cdc.sink;
  here record;
  holder record;
  was_free boolean;
begin
  select * into s from cdc.sink k where k.name = p_sink;
  if not found then
    return;
  end if;
  select * into here from cdc.place();
  if s.system_identifier <> here.system_identifier then
    if here.is_copy or exists (
         select from cdc.position p
          where p.sink = p_sink and pg_snapshot_xmax(p.snap_lo) > pg_snapshot_xmax(pg_current_snapshot()))
    then
      raise exception 'the position of sink % was taken in another cluster (run cdc rebase)', p_sink
        using errcode = 'CDC02';
    end if;
    happened := 'upgraded';
  elsif s.timeline <> here.timeline then
    happened := 'promoted';
  end if;

  was_free := pg_try_advisory_lock(6513764, cdc.slot(s.id, s.epoch));
  if not was_free then
    select * into holder from cdc.holder(s.id, s.epoch) h;
    if not found or holder.process is distinct from p_process
       and coalesce(holder.heard_at >= clock_timestamp() - p_patience, true)
    then
      happened := null;
      return;
    end if;
    begin
      perform pg_terminate_backend(l.pid)
         from pg_locks l
        where l.locktype = 'advisory' and l.classid = 6513766 and l.objid = holder.process::bigint::oid
          and l.database = (select d.oid from pg_database d where d.datname = current_database())
          and (holder.process <> p_process or l.pid = holder.pid);
    exception when insufficient_privilege then
      null; -- the new epoch fences them off all the same
    end;
  end if;

  -- Ours before the epoch says so: whoever reads the new epoch finds its lock taken.
  if pg_try_advisory_lock(6513764, cdc.slot(s.id, s.epoch + 1)) then
    update cdc.sink k
       set epoch = s.epoch + 1, owner = p_owner, system_identifier = here.system_identifier, timeline = here.timeline
     where k.name = p_sink and k.epoch = s.epoch;
    if found then
      epoch := s.epoch + 1;
      update cdc.position p set epoch = s.epoch + 1 where p.sink = p_sink;
    else -- somebody was faster
      perform pg_advisory_unlock(6513764, cdc.slot(s.id, s.epoch + 1));
    end if;
  end if;
  if was_free then
    perform pg_advisory_unlock(6513764, cdc.slot(s.id, s.epoch));
  end if;
end
$$;

-- cdc.rebase(): give every sink a position that means something here, after a dump was restored into another cluster.
-- What a sink may not have delivered is delivered (again): all that was recorded here since, and what any position did
-- not show. It becomes the change of one transaction, this one, in the order of seq. Nothing is lost that the outbox
-- has; what the dump was too early for is not in it.
-- To be called alone in a transaction that has no id yet, by the owner of the schema.
-- Takes: SHARE ROW EXCLUSIVE on the outbox: writers of captured tables wait for us, and we for them.
-- Writes: all rows of cdc.event, cdc.sink and cdc.position, cdc.origin, the sequence.  Returns: events to be delivered.
create or replace function cdc.rebase() returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  position_ pg_snapshot;
  here record;
  pending bigint;
begin
  lock table cdc.sink, cdc.position in exclusive mode;
  lock table cdc.event_0, cdc.event_1, cdc.event_2 in share row exclusive mode;
  if pg_current_xact_id_if_assigned() is not null then
    raise exception 'cdc.rebase() needs a transaction of its own';
  end if;
  position_ := pg_current_snapshot(); -- before our id is drawn, so that it does not show us
  select * into here from cdc.place();

  -- A row that was written here carries the id of its transaction or, in a savepoint, a later one. So does by chance a
  -- row that was restored into a cluster further on than its own: then it is delivered again.
  update cdc.event e set txid = case
    when e.xmin::text::bigint >= e.txid::text::numeric % 4294967296 or exists (
           select from cdc.sink k join cdc.position p on p.sink = k.name
            where k.system_identifier <> here.system_identifier
              and not pg_visible_in_snapshot(e.txid, p.snap_lo)
              and not (p.snap_hi is not null and pg_visible_in_snapshot(e.txid, p.snap_hi) and e.seq <= p.last_seq))
    then pg_current_xact_id() else '3' end;
  select count(*) into pending from cdc.event e where e.txid = pg_current_xact_id();
  update cdc.sink k
     set epoch = k.epoch + 1, system_identifier = here.system_identifier, timeline = here.timeline;
  update cdc.position p
     set epoch = p.epoch + 1,
         snap_lo = position_, snap_hi = null, last_seq = 0, range_seq = null, final_seq = null;
  update cdc.captured_table t set relation = r.oid
    from pg_class r join pg_namespace n on n.oid = r.relnamespace
   where n.nspname = t.schema_name and r.relname = t.table_name;
  perform setval('cdc.event_seq'::regclass, greatest(q.last_value, (select max(e.seq) from cdc.event e)))
     from cdc.event_seq q;
  delete from cdc.origin;
  insert into cdc.origin values (pg_current_xact_id());
  return pending;
end
$$;

-- cdc.rotate(retention): give the outbox's space back. Truncates each child but the current one when every sink is past
-- all of it, its newest event is older than `retention`, and nobody is writing there; then, if the current child has
-- held events for a third of `retention` and the next one is empty, begins that one by moving the sequence. Never waits
-- for a lock, and does nothing while another session is at it: two that moved the sequence could move it back.
-- Returns: what was done: 'truncated', 'turned', both, or nothing.   Writes: cdc.event_seq, children of cdc.event.
create or replace function cdc.rotate(p_retention interval) returns text[]
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
as $$
declare
  -- A turn that is this close to its end is left to end by itself: the sequence must not cross it under our hands.
  margin constant bigint := 1 << 20;
  drawn bigint;
  turn bigint;
  leaf regclass;
  newest timestamptz;
  oldest timestamptz;
  needed boolean;
  next_is_empty boolean := false;
  done text[] := '{}';
begin
  if not pg_try_advisory_xact_lock(6513765, 2) then
    return done;
  end if;
  select q.last_value into drawn from cdc.event_seq q;
  turn := drawn >> 24;

  for ahead in 1..2 loop
    leaf := format('cdc.event_%s', (turn + ahead) % 3)::regclass;
    begin
      -- A writer of that child, or pg_dump reading it, keeps it for this time. A row not yet committed keeps its
      -- writer's lock, so under our lock every row there is committed or dead.
      execute format('lock table %s in access exclusive mode nowait', leaf);
      execute format('select captured_at from %s order by seq desc limit 1', leaf) into newest;
      if newest < clock_timestamp() - p_retention then
        -- Row by row what a position does not show: a transaction that is merely open somewhere keeps nothing.
        execute format(
          'select exists (select from cdc.position p
                           where exists (select from %1$s e where e.txid >= pg_snapshot_xmax(p.snap_lo))
                              or exists (select from %1$s e
                                          where e.txid = any (array(select pg_snapshot_xip(p.snap_lo)))))', leaf)
          into needed;
        if not needed then
          execute format('truncate table %s', leaf);
          newest := null;
          done := '{truncated}';
        end if;
      end if;
      next_is_empty := next_is_empty or ahead = 1 and newest is null;
    exception when lock_not_available then
      null;
    end;
  end loop;

  if next_is_empty and (drawn + margin) >> 24 = turn then
    execute format('select captured_at from cdc.event_%s order by seq limit 1', turn % 3) into oldest;
    if oldest < clock_timestamp() - p_retention / 3 then
      perform setval('cdc.event_seq'::regclass, (turn + 1) << 24);
      done := done || 'turned'::text;
    end if;
  end if;
  return done;
end
$$;
