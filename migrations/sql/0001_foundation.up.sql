-- cdc, revision 0001: the book, the trigger that writes it, the reader's one round trip, the two verbs.
--
-- Everything lives in schema cdc. Two group roles belong to it:
--   cdc_capture  owns the SECURITY DEFINER trigger function; may insert into the outbox and nothing else, because
--                to_json(row) runs casts that any user may have defined, as this role
--   cdc_reader   what the daemon's login role is made a member of

-- Roles belong to the whole cluster: another database of it may have made them already, perhaps at this moment.
do $roles$
declare
  wanted text;
begin
  foreach wanted in array array['cdc_capture', 'cdc_reader'] loop
    begin
      if not exists (select from pg_catalog.pg_roles where rolname = wanted) then
        execute pg_catalog.format('create role %I nologin noinherit', wanted);
      end if;
    exception when duplicate_object or unique_violation then
      null;
    end;
  end loop;
  -- Handing a function to cdc_capture takes membership of it; a superuser needs none.
  if not pg_catalog.pg_has_role(current_user, 'cdc_capture', 'usage') then
    execute pg_catalog.format('grant cdc_capture to %I', current_user);
  end if;
end
$roles$;

-- ---------------------------------------------------------------------------------------------------------------
-- What this installation is called. One row.
create table cdc.installation (
  singleton boolean primary key default true check (singleton),
  database_name text not null default '' -- as in the configuration; part of every event and event id
);
insert into cdc.installation default values;

-- How a table is or was captured. Rows are never changed or deleted: an event says under which row it was recorded,
-- so that it can be read after the options, the name or the key of its table have changed.
create table cdc.captured_table (
  id integer generated always as identity primary key,
  relation oid not null,
  schema_name text not null,
  table_name text not null,
  key_columns text[],
  image text not null,
  since timestamptz not null default clock_timestamp(),
  check (image in ('diff', 'full')),
  check (key_columns is null or cardinality(key_columns) > 0)
);
create index captured_table_relation on cdc.captured_table (relation);

-- ---------------------------------------------------------------------------------------------------------------
-- The book. cdc.event itself stays empty; its rows live in three children that take turns. The turn is told by the
-- high bits of seq (cdc.leaf_of), so that the trigger needs no look-up, a whole child can be truncated when everybody
-- is past it, and moving the sequence forward is all it takes to begin the next one.
create sequence cdc.event_seq as bigint cache 1; -- cache > 1 would hand out one row's numbers in the wrong order

create table cdc.event (
  seq bigint not null,
  txid xid8 not null,
  captured_at timestamptz not null,
  captured_table integer not null,
  op "char" not null, -- i u d t; I U D: the row was too large, new_row holds its key only
  old_row json,
  new_row json,
  context text
);
alter table cdc.event add constraint event_is_only_a_parent check (false) no inherit;

do $leaves$
declare
  leaf text;
begin
  foreach leaf in array array['event_0', 'event_1', 'event_2'] loop
    -- Rows are never updated and leave by truncate: there is nothing for autovacuum to clean.
    execute pg_catalog.format('create table cdc.%I () inherits (cdc.event) with (autovacuum_enabled = false)', leaf);
    execute pg_catalog.format('create index %I on cdc.%I (txid, seq)', leaf || '_txid_seq', leaf);
    execute pg_catalog.format('create index %I on cdc.%I (seq)', leaf || '_seq', leaf);
  end loop;
end
$leaves$;

-- Which child holds a given seq. 2^24 events, or one call of cdc.rotate, to a turn.
create function cdc.leaf_of(seq bigint) returns integer
language sql immutable parallel safe
return ((seq >> 24) % 3)::integer;

-- ---------------------------------------------------------------------------------------------------------------
-- Where each sink stands. A position is a snapshot: everything visible in it has been delivered. While a window is
-- open (snap_hi is not null) its events are handed out by ascending seq, and last_seq is the highest one acknowledged.
create table cdc.sink (
  id integer generated always as identity unique,
  name text primary key,
  epoch bigint not null default 0, -- grows with every take-over; an acknowledgement under an older one is refused
  system_identifier bigint not null,
  snap_lo pg_snapshot not null,
  snap_hi pg_snapshot,
  last_seq bigint not null default 0,
  range_seq bigint, -- large windows: from here on the window is found along seq
  final_seq bigint, -- last seq of the window, known once its last page has been handed out
  delivered_at timestamptz, -- when the last acknowledgement came
  owner text, -- who serves it, for people
  state text not null default 'new',
  state_since timestamptz not null default clock_timestamp(),
  last_error text,
  last_error_at timestamptz,
  check (snap_hi is not null or (range_seq is null and final_seq is null))
) with (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

-- Events a sink will never take, with the reason; kept until somebody replays or discards them.
create table cdc.dead_letter (
  id bigint generated always as identity primary key,
  sink text not null,
  event_id text not null,
  event json not null,
  reason text not null,
  attempts integer not null default 1,
  died_at timestamptz not null default clock_timestamp(),
  unique (sink, event_id)
);

-- ---------------------------------------------------------------------------------------------------------------
-- cdc.diff(old, new, keep): drop what is equal on both sides, except the columns named in keep.
-- Both images come from one row type, so their members stand in the same order and can be walked in step.
-- Raises 22P05 or 22P02 on strings json_each cannot unescape (\u0000, lone surrogates): callers fall back.
create function cdc.diff(old_row json, new_row json, keep text[], out before text, out after text, out changed text)
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
  select '{' || string_agg(to_json(o_name)::text || ':' || o_value::text, ',') || '}',
         '{' || string_agg(to_json(n_name)::text || ':' || n_value::text, ',') || '}',
         '[' || string_agg(to_json(n_name)::text, ',') filter (where o_value::text <> n_value::text) || ']'
    from rows from (json_each(old_row), json_each(new_row)) as both_rows (o_name, o_value, n_name, n_value)
   where o_value::text <> n_value::text or n_name = any (keep)
$$;

-- cdc.payload(…): the event as a notification carries it, in the contract's native format; the stub (no images,
-- "truncated") when it would reach the 8000 bytes at which pg_notify fails the user's statement; and if even the key
-- is that long, nothing: an empty payload means "look into the book".
-- Returns: the payload, at most 7999 bytes.  Reads: cdc.installation, cdc.captured_table.
create function cdc.payload(
  p_table integer, p_op "char", p_seq bigint, p_txid xid8, p_at timestamptz, p_old json, p_new json, p_context text
) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  t cdc.captured_table;
  database_name text;
  head text;
  key text;
  before text := p_old::text;
  after text := p_new::text;
  changed text;
  context json;
  whole text;
begin
  select * into strict t from cdc.captured_table where id = p_table;
  select i.database_name into strict database_name from cdc.installation i;
  if p_context <> '' then
    begin
      context := p_context::json;
    exception when others then -- not JSON: it travels as the text it is
      context := to_json(p_context);
    end;
  end if;
  select '{' || string_agg(to_json(c)::text || ':' || (coalesce(p_new, p_old) -> c)::text, ',') || '}'
    into key
    from unnest(t.key_columns) as c;
  if p_op = 'u' then
    select d.before, d.after, d.changed into before, after, changed from cdc.diff(p_old, p_new, '{}') d;
    if t.image = 'full' then
      before := p_old::text;
      after := p_new::text;
    end if;
  end if;
  head := '{"version":1,"id":'
    || to_json(database_name || '-' || p_seq || '-' || to_char(p_at at time zone 'UTC', 'YYYYMMDDHH24MISSUS'))::text
    || ',"op":"' || case lower(p_op::text) when 'i' then 'insert' when 'u' then 'update' when 'd' then 'delete'
                                           else 'truncate' end
    || '","source":{"database":' || to_json(database_name)::text
    || ',"schema":' || to_json(t.schema_name)::text || ',"table":' || to_json(t.table_name)::text
    || ',"seq":' || p_seq || ',"txid":' || p_txid::text
    || ',"ts":"' || to_char(p_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
    || '"},"key":' || coalesce(key, 'null');
  if p_op = lower(p_op::text)::"char" then
    whole := head || ',"before":' || coalesce(before, 'null') || ',"after":' || coalesce(after, 'null')
      || ',"changed":' || coalesce(changed, 'null') || ',"context":' || coalesce(context::text, 'null') || '}';
    if octet_length(whole) < 8000 then
      return whole;
    end if;
  end if;
  whole := head || ',"before":null,"after":null,"changed":null,"context":null,"truncated":true}';
  return case when octet_length(whole) < 8000 then whole else '' end;
end
$$;

-- cdc.capture(): the trigger, the same for every table. Reads whole rows, so that a column added, renamed or dropped
-- breaks nothing and needs no new trigger. Must never abort or distort the user's write; only a failing insert into
-- the outbox does, which is the promise of durability.
-- Arguments: 0 cdc.captured_table.id · 1 bell: adaptive, always, off · 2 channel · 3 payload: diff, wake
-- Writes: one row of cdc.event_N. Rings: pg_notify, when somebody sleeps (argument 1).
create function cdc.capture() returns trigger
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
  case cdc.leaf_of(seq)
    when 0 then
      insert into cdc.event_0 values (seq, txid, captured_at, tg_argv[0]::integer, op, old_image, new_image, context);
    when 1 then
      insert into cdc.event_1 values (seq, txid, captured_at, tg_argv[0]::integer, op, old_image, new_image, context);
    else
      insert into cdc.event_2 values (seq, txid, captured_at, tg_argv[0]::integer, op, old_image, new_image, context);
  end case;

  if tg_argv[1] = 'off' then
    return null;
  end if;
  -- The listener holds this lock exclusively while it sleeps. Granted: it is awake, or there is none; and as the lock
  -- is held until this transaction ends, it cannot fall asleep without seeing what was written here.
  if tg_argv[1] = 'adaptive' and pg_try_advisory_xact_lock_shared(6513763, 1) then
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
-- Returns: rows by ascending seq, at most `events`, ending with the one that passes `bytes` bytes of images.
-- Raises:  CDC01 when the epoch is not the current one.    Writes: one row of cdc.sink.
create function cdc.next_batch(p_sink text, p_epoch bigint, p_acked bigint, p_events integer, p_bytes bigint)
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
  s cdc.sink;
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
  select * into s from cdc.sink where name = p_sink;
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
    update cdc.sink k
       set snap_lo = s.snap_lo, snap_hi = s.snap_hi, last_seq = s.last_seq, range_seq = s.range_seq,
           final_seq = s.final_seq, delivered_at = s.delivered_at
     where k.name = p_sink and k.epoch = p_epoch;
    if not found then
      raise exception 'sink % is served by another daemon', p_sink using errcode = 'CDC01';
    end if;
  end if;
end
$$;

-- cdc.covers(position, target): whether everything visible in `target` is visible in `position`.
create function cdc.covers(p_position pg_snapshot, p_target pg_snapshot) returns boolean
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
  select pg_snapshot_xmax(p_position) >= pg_snapshot_xmax(p_target)
     and not exists (select from pg_snapshot_xip(p_position) as x where pg_visible_in_snapshot(x, p_target))
$$;

-- cdc.rotate(retention): give the outbox's space back. Truncates the child whose turn is next when every sink is past
-- all of it, its newest event is older than `retention`, and nobody is writing there; then, if the current child has
-- held events for a third of `retention`, begins that next child by moving the sequence. Never waits for a lock, and
-- does nothing while another session is at it: two that moved the sequence could move it back.
-- Returns: what was done: 'truncated', 'turned', both, or nothing.   Writes: cdc.event_seq, a child of cdc.event.
create function cdc.rotate(p_retention interval) returns text[]
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
  next_leaf regclass;
  current_leaf regclass;
  newest timestamptz;
  highest xid8;
  oldest timestamptz;
  done text[] := '{}';
  is_empty boolean;
begin
  if not pg_try_advisory_xact_lock(6513765, 2) then
    return done;
  end if;
  select q.last_value into drawn from cdc.event_seq q;
  turn := drawn >> 24;
  current_leaf := format('cdc.event_%s', turn % 3)::regclass;
  next_leaf := format('cdc.event_%s', (turn + 1) % 3)::regclass;

  begin
    -- A writer of that child, or pg_dump reading it, keeps it for this time. A row not yet committed keeps its writer's
    -- lock, so under our lock every row there is committed or dead.
    execute format('lock table %s in access exclusive mode nowait', next_leaf);
    execute format('select not exists (select from %s)', next_leaf) into is_empty;
    if not is_empty then
      execute format('select txid from %s order by txid desc limit 1', next_leaf) into highest;
      execute format('select captured_at from %s order by seq desc limit 1', next_leaf) into newest;
      if newest < clock_timestamp() - p_retention
         and not exists (select from cdc.sink k where pg_snapshot_xmin(k.snap_lo) <= highest)
      then
        execute format('truncate table %s', next_leaf);
        is_empty := true;
        done := done || 'truncated'::text;
      end if;
    end if;
  exception when lock_not_available then
    return done;
  end;

  if is_empty and (drawn + margin) >> 24 = turn then
    execute format('select captured_at from %s order by seq limit 1', current_leaf) into oldest;
    if oldest < clock_timestamp() - p_retention / 3 then
      perform setval('cdc.event_seq'::regclass, (turn + 1) << 24);
      done := done || 'turned'::text;
    end if;
  end if;
  return done;
end
$$;

-- ---------------------------------------------------------------------------------------------------------------
-- The two verbs. Idempotent; each answers what it changed: 'added', 'changed', 'unchanged', 'removed'.

-- cdc.capture_plan(relation, …): what enable_capture would make of one table, and whether it stands already. Reads only;
-- the definition of our triggers is kept as a hash in their comments, so that drift can be seen.
-- Returns: state ('installed', 'outdated', 'missing'), the key columns, the cdc.captured_table row (null: a new one is
--          needed), the comment the triggers should carry.
-- Raises:  42809 for what cannot be captured, 42703 for a key column that does not exist, 22023 for a needless key.
create function cdc.capture_plan(
  relation regclass, ops text[], image text, key text[], always boolean, notify text, notify_payload text, channel text,
  out state text, out key_columns text[], out captured integer, out definition text
)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  c record;
  missing text;
  present text;
begin
  select n.nspname, r.relname, r.relkind, r.relpersistence, r.relispartition into strict c
    from pg_class r join pg_namespace n on n.oid = r.relnamespace where r.oid = relation;
  if c.relkind not in ('r', 'p') or c.relispartition or c.relpersistence <> 'p' then
    raise exception '% cannot be captured: %', relation, case
        when c.relispartition then 'it is a partition (name the partitioned table itself)'
        when c.relpersistence = 'u' then 'it is unlogged, and a crash empties it without an event'
        when c.relpersistence = 't' then 'it is temporary'
        when c.relkind = 'v' then 'it is a view (name the tables below it)'
        when c.relkind = 'm' then 'it is a materialized view (name the tables below it)'
        when c.relkind = 'f' then 'it is a foreign table (capture it where it lives)'
        else 'it is not a table' end
      using errcode = 'wrong_object_type';
  end if;

  select array_agg(a.attname::text order by k.n) into key_columns
    from pg_index i
    cross join unnest(i.indkey::int2[]) with ordinality as k (attnum, n)
    join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
   where i.indrelid = relation and i.indisprimary and k.n <= i.indnkeyatts;
  if key_columns is null then
    select string_agg(quote_ident(k), ', ') into missing from unnest(key) as k
     where not exists (select from pg_attribute a
                        where a.attrelid = relation and a.attname = k and a.attnum > 0 and not a.attisdropped);
    if missing is not null then
      raise exception '% has no column %', relation, missing using errcode = 'undefined_column';
    end if;
    key_columns := key;
  elsif key is not null and key <> key_columns then
    raise exception '% has the primary key (%); key is for tables without one', relation,
      array_to_string(key_columns, ', ') using errcode = 'invalid_parameter_value';
  end if;

  select t.id into captured from cdc.captured_table t
   where t.relation = capture_plan.relation and t.schema_name = c.nspname and t.table_name = c.relname
     and t.key_columns is not distinct from capture_plan.key_columns and t.image = capture_plan.image
   order by t.id desc limit 1;
  definition := 'cdc ' || md5(concat_ws('|', 1, captured, array_to_string(array(select o from unnest(ops) as o order by o), ','),
                                        always, notify, notify_payload, channel));
  select string_agg(obj_description(g.oid, 'pg_trigger') || ' ' || g.tgenabled::text, ';' order by g.tgname) into present
    from pg_trigger g
   where g.tgrelid = relation and not g.tgisinternal and g.tgname in ('00_cdc_capture', '00_cdc_truncate');
  state := case
    when present is null then 'missing'
    when captured is not null and present = array_to_string(array_fill(
           definition || case when always then ' A' else ' O' end,
           array[(ops && '{insert,update,delete}')::integer + ('truncate' = any (ops))::integer]), ';') then 'installed'
    else 'outdated' end;
end
$$;

-- cdc.enable_capture(relation, …): make the triggers of one table exactly these.
-- Takes:  SHARE ROW EXCLUSIVE on the table when something changes (ACCESS EXCLUSIVE when a trigger has to go), no more
--         than a look at the catalogue otherwise.     Writes: cdc.captured_table, pg_trigger.
-- Raises: as cdc.capture_plan.
create function cdc.enable_capture(
  relation regclass,
  ops text[] default '{insert,update,delete,truncate}',
  image text default 'diff',
  key text[] default null,
  always boolean default false,
  notify text default 'adaptive',
  notify_payload text default 'diff',
  channel text default 'cdc'
) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  plan record;
  wanted record;
begin
  select * into plan from cdc.capture_plan(relation, ops, image, key, always, notify, notify_payload, channel);
  if plan.state = 'installed' then
    return 'unchanged';
  end if;
  if plan.captured is null then
    insert into cdc.captured_table (relation, schema_name, table_name, key_columns, image)
    select relation, n.nspname, r.relname, plan.key_columns, image
      from pg_class r join pg_namespace n on n.oid = r.relnamespace where r.oid = relation;
  end if;
  -- Once more, for the number and the hash that go into the triggers.
  select p.captured, p.definition into wanted
    from cdc.capture_plan(relation, ops, image, key, always, notify, notify_payload, channel) p;

  perform cdc.set_trigger(relation, '00_cdc_capture',
    (select string_agg(o, ' or ' order by o) from unnest(ops) as o where o <> 'truncate'),
    format('for each row execute function cdc.capture(%L, %L, %L, %L)', wanted.captured, notify, channel, notify_payload),
    always, wanted.definition);
  perform cdc.set_trigger(relation, '00_cdc_truncate',
    (select o from unnest(ops) as o where o = 'truncate'),
    format('for each statement execute function cdc.capture(%L, %L, %L, %L)', wanted.captured, notify, channel, notify_payload),
    always, wanted.definition);
  return case plan.state when 'missing' then 'added' else 'changed' end;
end
$$;

-- cdc.set_trigger(relation, name, events, body, always, definition): one trigger, made or (no events) removed.
create function cdc.set_trigger(
  relation regclass, name name, events text, body text, always boolean, definition text
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if events is null then
    if exists (select from pg_trigger g where g.tgrelid = relation and g.tgname = name) then
      execute format('drop trigger %I on %s', name, relation);
    end if;
    return;
  end if;
  execute format('create or replace trigger %I after %s on %s %s', name, events, relation, body);
  execute format('alter table %s %s trigger %I', relation, case when always then 'enable always' else 'enable' end, name);
  execute format('comment on trigger %I on %s is %L', name, relation, definition);
end
$$;

-- cdc.disable_capture(relation): remove our triggers from one table. What the outbox holds of it stays.
-- Takes: ACCESS EXCLUSIVE on the table when there is something to remove (DROP TRIGGER has no weaker form).
create function cdc.disable_capture(relation regclass) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  if not exists (select from pg_trigger g where g.tgrelid = relation and not g.tgisinternal
                                            and g.tgname in ('00_cdc_capture', '00_cdc_truncate')) then
    return 'unchanged';
  end if;
  execute format('drop trigger if exists "00_cdc_capture" on %s', relation);
  execute format('drop trigger if exists "00_cdc_truncate" on %s', relation);
  return 'removed';
end
$$;

-- cdc.captured: the tables that carry our triggers now.
create view cdc.captured as
  select g.tgrelid as relation, n.nspname as schema_name, r.relname as table_name,
         array_agg(g.tgname::text order by g.tgname) as triggers,
         bool_and(g.tgenabled in ('O', 'A')) as enabled
    from pg_catalog.pg_trigger g
    join pg_catalog.pg_class r on r.oid = g.tgrelid
    join pg_catalog.pg_namespace n on n.oid = r.relnamespace
   where g.tgname in ('00_cdc_capture', '00_cdc_truncate') and not g.tgisinternal and not r.relispartition
   group by g.tgrelid, n.nspname, r.relname;

-- ---------------------------------------------------------------------------------------------------------------
-- Who may do what. Nothing for PUBLIC; the trigger's owner may insert and ring; the daemon reads the book and keeps
-- its positions.
revoke all on schema cdc from public;
revoke all on all tables in schema cdc from public;
revoke all on all functions in schema cdc from public;

grant usage on schema cdc to cdc_capture, cdc_reader;
grant insert on cdc.event_0, cdc.event_1, cdc.event_2 to cdc_capture;
grant usage on sequence cdc.event_seq to cdc_capture;
grant select on cdc.captured_table, cdc.installation to cdc_capture;
grant execute on function cdc.diff(json, json, text[]) to cdc_capture;
grant execute on function cdc.leaf_of(bigint) to cdc_capture;
grant execute on function cdc.payload(integer, "char", bigint, xid8, timestamptz, json, json, text) to cdc_capture;

-- The daemon must hold the right to truncate the children itself: no function lends it the owner's.
grant select, truncate on cdc.event_0, cdc.event_1, cdc.event_2 to cdc_reader;
grant select on cdc.alembic_version to cdc_reader;
grant select on cdc.event, cdc.captured_table, cdc.captured, cdc.installation to cdc_reader;
grant select, update on sequence cdc.event_seq to cdc_reader;
grant select, insert, update on cdc.sink to cdc_reader;
grant select, insert, update, delete on cdc.dead_letter to cdc_reader;
grant execute on function cdc.next_batch(text, bigint, bigint, integer, bigint) to cdc_reader;
grant execute on function cdc.covers(pg_snapshot, pg_snapshot) to cdc_reader;
grant execute on function cdc.rotate(interval) to cdc_reader;
grant execute on function cdc.capture_plan(regclass, text[], text, text[], boolean, text, text, text) to cdc_reader;

-- Handing the trigger over takes, for a moment, the right to create in the schema.
grant create on schema cdc to cdc_capture;
alter function cdc.capture() owner to cdc_capture;
revoke create on schema cdc from cdc_capture;
do $trigger_right$
begin
  -- Whoever migrates attaches the trigger; nobody else may, or he could forge events from a table of his own.
  execute pg_catalog.format('grant execute on function cdc.capture() to %I', current_user);
end
$trigger_right$;
