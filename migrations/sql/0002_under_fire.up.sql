-- cdc, revision 0002: how another daemon takes a sink over, where the database is, changes that are never stored, a
-- breaker for the bell, and space given back although some transaction stays open.

-- ---------------------------------------------------------------------------------------------------------------
-- Who serves a sink. Every session of a daemon shares the advisory lock (6513766, its process's number), so that the
-- sessions of one process can be told; one of them, the keeper, says something every second or two. The session that
-- serves a sink holds the advisory lock (6513764, cdc.slot(sink, epoch)): a lock of its own for every epoch, because a
-- frozen server process keeps the one it has for ever, and nothing that a client can do takes it away.

create function cdc.slot(sink_id integer, epoch bigint) returns integer
language sql immutable parallel safe
return (sink_id % 2097152) * 1024 + (epoch % 1024)::integer;

-- cdc.holder(sink id, epoch): the session that serves a sink, its process's number, and when that process has last said
-- anything. No row: nobody serves it. heard_at is null where our role may not see it.
create function cdc.holder(
  sink_id integer, epoch bigint, out pid integer, out process integer, out heard_at timestamptz
) returns setof record
language sql stable
set search_path = pg_catalog, pg_temp
as $$
  with locks as (
    select l.pid, l.classid::bigint as class, l.objid::bigint::integer as object
      from pg_locks l
     where l.locktype = 'advisory' and l.granted and l.objsubid = 2
       and l.database = (select d.oid from pg_database d where d.datname = current_database())
       and l.classid in (6513764, 6513766)
  )
  select o.pid, p.object,
         (select max(a.state_change) from locks s join pg_stat_activity a on a.pid = s.pid
           where s.class = 6513766 and s.object = p.object)
    from locks o
    left join locks p on p.pid = o.pid and p.class = 6513766
   where o.class = 6513764 and o.object = cdc.slot(sink_id, epoch)
$$;

-- cdc.take(sink, owner, process, patience): become the one who serves a sink. Possible when nobody does; when the one
-- who does belongs to a process that has said nothing for `patience` (stopped, cut off, or its host is gone), whose
-- sessions are then ended; and when it is an earlier session of our own process, which we have given up.
-- Returns: the new epoch, null when somebody else serves the sink; and what has happened to the database since the
--          position was stored: 'promoted' (another timeline of the same cluster), 'upgraded' (pg_upgrade), or null.
-- Raises:  CDC02 when the position belongs to another cluster and says nothing here.
-- Writes:  one row of cdc.sink. Takes: session advisory locks, as above.
create function cdc.take(
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
    if here.is_copy or pg_snapshot_xmax(s.snap_lo) > pg_snapshot_xmax(pg_current_snapshot()) then
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
    else -- somebody was faster
      perform pg_advisory_unlock(6513764, cdc.slot(s.id, s.epoch + 1));
    end if;
  end if;
  if was_free then
    perform pg_advisory_unlock(6513764, cdc.slot(s.id, s.epoch));
  end if;
end
$$;

-- ---------------------------------------------------------------------------------------------------------------
-- Where the database is. A position is made of transaction ids and means nothing in a cluster that counts its own.

-- One row, never changed: its own transaction id, as a value. A dump carries the value over and the restoring
-- transaction puts its own id on the row, so the two differ in a copy; pg_upgrade and a standby copy the row as it is.
create table cdc.origin (txid xid8 not null);
insert into cdc.origin values (pg_current_xact_id());

-- cdc.place(): the cluster and timeline this database is in now, and whether it is a copy made by dump and restore.
create function cdc.place(out system_identifier bigint, out timeline integer, out is_copy boolean)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
  select c.system_identifier, ('x' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8))::bit(32)::integer,
         not exists (select from cdc.origin o where o.txid::xid = o.xmin)
    from pg_control_system() c
$$;

alter table cdc.sink add column timeline integer;
update cdc.sink k set timeline = p.timeline from cdc.place() p;
alter table cdc.sink alter column timeline set not null;

-- cdc.rebase(): give every sink a position that means something here, after a dump was restored into another cluster.
-- What a sink may not have delivered is delivered (again): all that was recorded here since, and what any position did
-- not show. It becomes the change of one transaction, this one, in the order of seq. Nothing is lost that the outbox
-- has; what the dump was too early for is not in it.
-- To be called alone in a transaction that has no id yet, by the owner of the schema.
-- Takes: SHARE ROW EXCLUSIVE on the outbox: writers of captured tables wait for us, and we for them.
-- Writes: all rows of cdc.event and cdc.sink, cdc.origin, the sequence.     Returns: events to be delivered.
create function cdc.rebase() returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  position_ pg_snapshot;
  here record;
  pending bigint;
begin
  lock table cdc.sink in exclusive mode;
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
           select from cdc.sink k
            where k.system_identifier <> here.system_identifier
              and not pg_visible_in_snapshot(e.txid, k.snap_lo)
              and not (k.snap_hi is not null and pg_visible_in_snapshot(e.txid, k.snap_hi) and e.seq <= k.last_seq))
    then pg_current_xact_id() else '3' end;
  select count(*) into pending from cdc.event e where e.txid = pg_current_xact_id();
  update cdc.sink k
     set epoch = k.epoch + 1, system_identifier = here.system_identifier, timeline = here.timeline,
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

-- ---------------------------------------------------------------------------------------------------------------
-- Changes that are never stored (delivery: ephemeral), and the breaker.

-- How many ephemeral changes a sink was not given: it was down, or slower than they came.
alter table cdc.sink add column dropped bigint not null default 0;
-- Until when triggers whose ringing no lock can stop (always, ephemeral) stay silent, because the notification queue is
-- filling up. A moment rather than a switch: should the daemon die, it ends by itself.
alter table cdc.installation add column silent_until timestamptz;

-- cdc.capture(): the trigger, the same for every table. Reads whole rows, so that a column added, renamed or dropped
-- breaks nothing and needs no new trigger. Must never abort or distort the user's write; only a failing insert into
-- the outbox does, which is the promise of durability.
-- Arguments: 0 cdc.captured_table.id · 1 bell: adaptive, always, off, or ephemeral: the notification is the event and
--            nothing is stored · 2 channel · 3 payload: diff, wake
-- Writes: one row of cdc.event_N. Rings: pg_notify, when somebody sleeps (argument 1).
create or replace function cdc.capture() returns trigger
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
-- Session settings that would leak into the JSON:
set timezone = 'UTC'
set datestyle = 'ISO, MDY'
set intervalstyle = 'postgres'
set extra_float_digits = 1
set bytea_output = 'hex'
set lc_monetary = 'C'
as $$
declare
  -- Above this many bytes of both images equal columns of an update are not stored twice.
  wide constant integer := 4096;
  -- Above this many bytes only the key is stored: PostgreSQL refuses values of 1 GB, and so would every reader.
  too_wide constant bigint := 256 * 1024 * 1024;
  -- Notifications of one transaction, the last of which says only "there is more".
  most_rings constant integer := 32;
  op "char" := lower(left(tg_op, 1));
  old_image json;
  new_image json;
  size bigint := 0;
  t cdc.captured_table;
  pruned record;
  seq bigint;
  txid xid8;
  captured_at timestamptz;
  context text := nullif(current_setting('cdc.context', true), '');
  rung text;
  payload text := '';
begin
  if op <> 't' then
    begin -- a subtransaction that writes nothing takes no transaction id
      if op <> 'i' then
        old_image := to_json(old);
        size := octet_length(old_image::text);
      end if;
      if op <> 'd' then
        new_image := to_json(new);
        size := size + octet_length(new_image::text);
      end if;
    exception when others then -- over 1 GB as text, or a cast that fails: say which row, and that it is not all
      size := too_wide + 1;
    end;
    if op = 'u' and size <= too_wide and old_image::text = new_image::text then
      return null; -- nothing visible has changed
    end if;
    if size > wide then
      select * into t from cdc.captured_table c where c.id = tg_argv[0]::integer;
      if op = 'u' and size <= too_wide and t.image = 'diff' then
        begin
          select * into pruned from cdc.diff(old_image, new_image, t.key_columns);
          old_image := pruned.before::json;
          new_image := pruned.after::json;
          size := octet_length(old_image::text) + octet_length(new_image::text);
        exception when others then
          null; -- strings json_each cannot unescape: both whole images then
        end;
      end if;
      if size > too_wide then
        op := upper(op::text);
        old_image := null;
        new_image := null;
        begin
          execute (
            select 'select json_build_object(' || string_agg(format('%L, ($1).%I', c, c), ', ') || ')'
              from unnest(t.key_columns) as c
          ) into new_image using case when op = 'D' then old else new end;
        exception when others then
          null; -- the key itself cannot be had: the event still says that the table changed
        end;
      end if;
    end if;
  end if;

  -- Drawn here, with the row lock held: of two changes of one row the later has the higher number.
  seq := nextval('cdc.event_seq'::regclass);
  txid := pg_current_xact_id();
  captured_at := clock_timestamp();
  if tg_argv[1] <> 'ephemeral' then
    case cdc.leaf_of(seq)
      when 0 then
        insert into cdc.event_0 values (seq, txid, captured_at, tg_argv[0]::integer, op, old_image, new_image, context);
      when 1 then
        insert into cdc.event_1 values (seq, txid, captured_at, tg_argv[0]::integer, op, old_image, new_image, context);
      else
        insert into cdc.event_2 values (seq, txid, captured_at, tg_argv[0]::integer, op, old_image, new_image, context);
    end case;
  end if;

  if tg_argv[1] = 'off' then
    return null;
  end if;
  -- The listener holds this lock exclusively while it sleeps. Granted: it is awake, or there is none; and as the lock
  -- is held until this transaction ends, it cannot fall asleep without seeing what was written here.
  if tg_argv[1] = 'adaptive' and pg_try_advisory_xact_lock_shared(6513763, 1) then
    return null;
  end if;
  -- The breaker: a full queue would fail the commits of the whole cluster.
  if tg_argv[1] <> 'adaptive' and (select i.silent_until > clock_timestamp() from cdc.installation i) then
    return null;
  end if;
  if tg_argv[1] = 'ephemeral' then
    for attempt in 1..3 loop -- all of it; the key alone; not even the key
      begin
        payload := cdc.payload(
          tg_argv[0]::integer, case attempt when 1 then op else upper(op::text)::"char" end, seq, txid, captured_at,
          case when attempt < 3 then old_image end, case when attempt < 3 then new_image end, context);
      exception when others then
        payload := '';
      end;
      exit when payload <> '';
    end loop;
    perform pg_notify(tg_argv[2], payload);
    return null;
  end if;
  rung := coalesce(current_setting('cdc.rung', true), '');
  if length(rung) >= most_rings then
    return null;
  end if;
  perform set_config('cdc.rung', rung || '.', true);
  if tg_argv[3] = 'diff' and length(rung) < most_rings - 1 then
    begin
      payload := cdc.payload(tg_argv[0]::integer, op, seq, txid, captured_at, old_image, new_image, context);
    exception when others then
      payload := ''; -- the book has it
    end;
  end if;
  perform pg_notify(tg_argv[2], payload);
  return null;
end
$$;

-- ---------------------------------------------------------------------------------------------------------------
-- Retention.

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
          'select exists (select from cdc.sink k
                           where exists (select from %1$s e where e.txid >= pg_snapshot_xmax(k.snap_lo))
                              or exists (select from %1$s e
                                          where e.txid = any (array(select pg_snapshot_xip(k.snap_lo)))))', leaf)
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

-- ---------------------------------------------------------------------------------------------------------------
revoke all on table cdc.origin from public;
revoke all on function cdc.slot(integer, bigint), cdc.holder(integer, bigint), cdc.place(), cdc.rebase(),
                       cdc.take(text, text, integer, interval) from public;
grant select on cdc.origin to cdc_reader;
grant delete on cdc.sink to cdc_reader;
grant update (silent_until) on cdc.installation to cdc_reader;
grant execute on function cdc.slot(integer, bigint), cdc.holder(integer, bigint), cdc.place(),
                          cdc.take(text, text, integer, interval) to cdc_reader;
