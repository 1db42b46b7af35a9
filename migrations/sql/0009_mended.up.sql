-- cdc, revision 0009: what was found wrong with giving space back while many read, with going back, with moving to another
-- cluster, and with json.

-- cdc.rotate(retention): give the outbox's space back. Truncates a child that is not in turn when every sink is past all of
-- it, its newest event is older than `retention`, and nobody is writing there; then, if the current child has held events
-- for a third of `retention` and the next one is empty, begins that one by moving the sequence. Does nothing while another
-- session is at it: two that moved the sequence could move it back.
-- Only a child that can be emptied is locked, one in a call, and the lock is waited for briefly: readers hold one on all
-- children whenever they read, and among several that are busy a moment without any need not come. Whoever comes
-- meanwhile waits as long; a writer does not, because nobody writes into a child whose turn is that long over.
-- Moments from which on the outbox does not have all any more are no positions to go back to, and are forgotten.
-- Returns: what was done: 'truncated', 'turned', both, or nothing.   Writes: cdc.event_seq, children of cdc.event, cdc.moment.
create or replace function cdc.rotate(p_retention interval) returns text[]
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set jit = off
set lock_timeout = '50ms'
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
  done text[] := '{}';
begin
  if not pg_try_advisory_xact_lock(6513765, 2) then
    return done;
  end if;
  select q.last_value into drawn from cdc.event_seq q;
  turn := drawn >> 24;

  for ahead in 1..2 loop -- the older one first
    leaf := format('cdc.event_%s', (turn + ahead) % 3)::regclass;
    begin
      for look in 1..2 loop -- without the lock, and with it
        exit when pg_relation_size(leaf) = 0;
        execute format('select captured_at from %s order by seq desc limit 1', leaf) into newest;
        exit when newest >= clock_timestamp() - p_retention;
        -- Row by row what a position does not show: a transaction that is merely open somewhere keeps nothing.
        execute format(
          'select exists (select from cdc.position p
                           where exists (select from %1$s e where e.txid >= pg_snapshot_xmax(p.snap_lo))
                              or exists (select from %1$s e
                                          where e.txid = any (array(select pg_snapshot_xip(p.snap_lo)))))', leaf)
          into needed;
        exit when needed;
        if look = 1 then
          -- A row not yet committed keeps its writer's lock, so under ours every row there is committed or dead.
          execute format('lock table %s in access exclusive mode', leaf);
        else
          execute format('delete from cdc.moment m where pg_snapshot_xmin(m.snap) <= (select e.txid from %s e order by e.txid desc limit 1)', leaf);
          execute format('truncate table %s', leaf);
          done := '{truncated}';
        end if;
      end loop;
    exception when lock_not_available then
      null; -- a writer has it, or pg_dump
    end;
    exit when done <> '{}';
  end loop;

  leaf := format('cdc.event_%s', (turn + 1) % 3)::regclass;
  begin
    if pg_relation_size(leaf) = 0 and (drawn + margin) >> 24 = turn then
      execute format('select captured_at from cdc.event_%s order by seq limit 1', turn % 3) into oldest;
      if oldest < clock_timestamp() - p_retention / 3 then
        perform setval('cdc.event_seq'::regclass, (turn + 1) << 24);
        done := done || 'turned'::text;
      end if;
    end if;
  exception when lock_not_available then
    null;
  end;
  return done;
end
$$;

-- cdc.note_moment(): remember now as a position, unless nothing was recorded since the last one.
-- Writes: cdc.moment.
create or replace function cdc.note_moment() returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  drawn bigint;
begin
  select case when q.is_called then q.last_value else q.last_value - 1 end into drawn from cdc.event_seq q;
  -- The time is taken after the snapshot: what is committed in between counts as earlier, and is repeated.
  if drawn is distinct from (select m.seq from cdc.moment m order by m.at desc limit 1) then
    insert into cdc.moment
    select clock_timestamp(), pg_current_snapshot(), drawn, c.system_identifier from pg_control_system() c;
  end if;
end
$$;

-- cdc.diff(old, new, keep): drop what is equal on both sides, except the columns named in keep; nothing when one of those
-- has changed: a row that gets another key may move past a backfill that pages along it, and is then told of by this.
-- Nothing is left where nothing differs but the blanks around a value of type json.
-- Both images come from one row type, so their members stand in the same order and can be walked in step.
-- Raises 22P05 or 22P02 on strings json_each cannot unescape (\u0000, lone surrogates): callers fall back.
create or replace function cdc.diff(
  old_row json, new_row json, keep text[], out before text, out after text, out changed text
)
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
  select '{' || coalesce(string_agg(to_json(o_name)::text || ':' || o_value::text, ','), '') || '}',
         '{' || coalesce(string_agg(to_json(n_name)::text || ':' || n_value::text, ','), '') || '}',
         '[' || coalesce(string_agg(to_json(n_name)::text, ',') filter (where differs), '') || ']'
    from (select o_name, o_value, n_name, n_value, o_value::text <> n_value::text as differs,
                 bool_or(o_value::text <> n_value::text and n_name = any (keep)) over () as moves
            from rows from (json_each(old_row), json_each(new_row)) as both_rows (o_name, o_value, n_name, n_value)) m
   where differs or n_name = any (keep) or moves
$$;

-- cdc.rewind(sink, position, tables): let a sink go on from another position; with tables, deliver only their events again,
-- up to where the sink stands now. Whoever serves it finds its epoch outdated and begins anew.
-- Returns: the new epoch.   Writes: one row each of cdc.sink and cdc.position.
-- Raises:  CDC04 when the sink has not come as far as the position, and tables are given; when space was given back meanwhile
--          and the position is no more to be gone back to.
create or replace function cdc.rewind(p_sink text, p_position pg_snapshot, p_tables text[]) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
declare
  s cdc.sink;
  p cdc.position;
begin
  perform pg_advisory_xact_lock(6513765, 2); -- nobody rotates until this is over
  select * into strict s from cdc.sink k where k.name = p_sink for update;
  select * into strict p from cdc.position k where k.sink = p_sink for update;
  if p_position::text <> '3:3:' and not cdc.covers(p_position, p.snap_lo)
     and not exists (select from cdc.moment m where m.snap::text = p_position::text)
  then
    raise exception 'the outbox has not everything since then any more' using errcode = 'CDC04';
  end if;
  if p.last_seq >= p.final_seq then
    p.snap_lo := p.snap_hi; -- all of the window is acknowledged, and it is not closed yet
  end if;
  if p_tables is not null then
    if not cdc.covers(p.snap_lo, p_position) then
      raise exception 'the sink has not come that far' using errcode = 'CDC04';
    end if;
    if s.skip_shown is null or cdc.covers(p.snap_lo, s.skip_shown) then
      s.skip_shown := p.snap_lo;
      s.skip_but := p_tables;
    else -- it is on its way already
      s.skip_but := array(select distinct w from unnest(s.skip_but || p_tables) as w order by w);
    end if;
  else
    s.skip_shown := null;
    s.skip_but := null;
  end if;
  update cdc.sink k set epoch = s.epoch + 1, skip_shown = s.skip_shown, skip_but = s.skip_but where k.name = p_sink;
  update cdc.position k
     set epoch = s.epoch + 1, snap_lo = p_position, snap_hi = null, last_seq = 0, range_seq = null, final_seq = null
   where k.sink = p_sink;
  return s.epoch + 1;
end
$$;

-- cdc.rebase(): give every sink a position that means something here, after a dump was restored into another cluster.
-- What a sink may not have delivered is delivered (again): all that was recorded here since, and what any position did
-- not show. It becomes the change of one transaction, this one, in the order of seq. Nothing is lost that the outbox
-- has; what the dump was too early for is not in it. Tables are found by their names, and backfills under way begin anew.
-- To be called alone in a transaction that has no id yet, by the owner of the schema.
-- Takes: SHARE ROW EXCLUSIVE on the outbox: writers of captured tables wait for us, and we for them.
-- Writes: all rows of cdc.event, cdc.sink, cdc.position and cdc.backfill, cdc.backfill_progress, cdc.origin, the sequence.
-- Returns: events to be delivered.
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
     set epoch = k.epoch + 1, system_identifier = here.system_identifier, timeline = here.timeline,
         skip_shown = null, skip_but = null; -- ids of the other cluster, too
  update cdc.position p
     set epoch = p.epoch + 1,
         snap_lo = position_, snap_hi = null, last_seq = 0, range_seq = null, final_seq = null;
  update cdc.captured_table t set relation = r.oid
    from pg_class r join pg_namespace n on n.oid = r.relnamespace
   where n.nspname = t.schema_name and r.relname = t.table_name;

  -- Aside first: the oid a table has here may have been another's there.
  update cdc.backfill b set state = 'failed', reason = b.state where b.state in ('running', 'paused');
  delete from cdc.backfill_progress p using cdc.backfill b
   where b.id = p.backfill and b.state = 'failed' and b.reason in ('running', 'paused');
  update cdc.backfill b set relation = t.here
    from (select k.id, to_regclass(format('%I.%I', k.schema_name, k.table_name)) as here from cdc.backfill k) t
   where t.id = b.id and t.here is not null;
  update cdc.backfill b set reason = 'the table does not exist', ended_at = clock_timestamp()
   where b.state = 'failed' and b.reason in ('running', 'paused')
     and to_regclass(format('%I.%I', b.schema_name, b.table_name)) is null;
  update cdc.backfill b set state = b.reason, reason = null
   where b.state = 'failed' and b.reason in ('running', 'paused');

  perform setval('cdc.event_seq'::regclass, greatest(q.last_value, (select max(e.seq) from cdc.event e)))
     from cdc.event_seq q;
  delete from cdc.origin;
  insert into cdc.origin values (pg_current_xact_id());
  return pending;
end
$$;
