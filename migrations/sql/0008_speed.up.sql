-- cdc, revision 0008: the trigger and the reader do the same in fewer steps.

-- ---------------------------------------------------------------------------------------------------------------
-- The trigger.

-- cdc.capture(): the trigger, the same for every table. Reads whole rows, so that a column added, renamed or dropped
-- breaks nothing and needs no new trigger. Must never abort or distort the user's write; only a failing insert into
-- the outbox does, which is the promise of durability.
-- Every expression of PL/pgSQL is set up anew in each transaction, for a microsecond and more, and so is every variable:
-- hence what is needed of most rows is written in as few as possible, and the rest has blocks of its own.
-- Arguments: 0 cdc.captured_table.id · 1 bell: adaptive, always, off, or ephemeral: the notification is the event and
--            nothing is stored · 2 channel · 3 payload: diff, wake · 4, if there: what has to be taken out of the image:
--            hidden (secrets, perhaps virtual columns too), virtual (those alone), or nothing · 5 see cdc.set_trigger
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
set quote_all_identifiers = off
as $$
declare
  op "char"; -- set only when it is not the first letter of tg_op: I U D, see below
  old_image json;
  new_image json;
  seq bigint;
  captured_at timestamptz;
begin
  begin -- a subtransaction that writes nothing takes no transaction id
    old_image := case when tg_op in ('UPDATE', 'DELETE') then cdc.image(old) end;
    new_image := case when tg_op in ('UPDATE', 'INSERT') then cdc.image(new) end;
  exception when others then -- over 1 GB as text, a cast that fails: say which row, and that it is not all
    op := left(tg_op, 1);
  end;

  -- Narrow rows that differ and of which nothing is hidden are ready. (In memory an image has a header of 4 bytes.)
  if op is not null or tg_argv[4] <> ''
     or coalesce(pg_column_size(old_image), 0) + coalesce(pg_column_size(new_image), 0) > 4096
     or (pg_column_size(old_image) = pg_column_size(new_image) and old_image::text = new_image::text)
  then
    declare
      -- Above this many bytes of both images equal columns of an update are not stored twice.
      wide constant integer := 4096;
      -- Above this many bytes only the key is stored: PostgreSQL refuses values of 1 GB, and so would every reader.
      too_wide constant bigint := 256 * 1024 * 1024;
      t cdc.captured_table;
      pruned record;
      size bigint := 0;
    begin
      begin
        if op is null and tg_argv[4] = 'hidden' then
          old_image := cdc.hide(tg_argv[0]::integer, old_image);
          new_image := cdc.hide(tg_argv[0]::integer, new_image);
        elsif op is null and tg_argv[4] = 'virtual' then
          begin
            select cdc.hide(tg_argv[0]::integer, old_image) as before, cdc.hide(tg_argv[0]::integer, new_image) as after
              into pruned;
            old_image := pruned.before;
            new_image := pruned.after;
          exception when others then
            null; -- strings json_each cannot unescape: better a null too many than no image
          end;
        end if;
        size := coalesce(octet_length(old_image::text), 0)::bigint + coalesce(octet_length(new_image::text), 0);
      exception when others then -- something hidden in what cannot be taken apart
        op := left(tg_op, 1);
      end;
      if op is null and size <= too_wide and old_image::text = new_image::text then
        return null; -- nothing visible has changed
      end if;
      if op is not null or size > wide then
        select * into t from cdc.captured_table c where c.id = tg_argv[0]::integer;
        if op is null and size <= too_wide and tg_op = 'UPDATE' and t.image = 'diff' then
          begin
            select * into pruned from cdc.diff(old_image, new_image, t.key_columns);
            old_image := pruned.before::json;
            new_image := pruned.after::json;
            size := octet_length(old_image::text) + octet_length(new_image::text);
          exception when others then
            null; -- strings json_each cannot unescape: both whole images then
          end;
        end if;
        if op is not null or size > too_wide then
          op := left(tg_op, 1);
          old_image := null;
          new_image := null;
          begin
            new_image := cdc.key_image(case when op = 'D' then old else new end, t.key_columns);
            if tg_argv[4] = 'hidden' then
              new_image := cdc.hide(t.id, new_image);
            end if;
          exception when others then
            new_image := null; -- the key itself cannot be had: the event still says that the table changed
          end;
        end if;
      end if;
    end;
  end if;

  -- Drawn here, with the row lock held: of two changes of one row the later has the higher number.
  seq := nextval('cdc.event_seq'::regclass);
  captured_at := clock_timestamp();
  if cdc.leaf_of(seq) = 0 and tg_argv[1] <> 'ephemeral' then
    insert into cdc.event_0 values (
      seq, pg_current_xact_id(), captured_at, tg_argv[0]::integer, coalesce(op, lower(left(tg_op, 1))::"char"),
      old_image, new_image, nullif(current_setting('cdc.context', true), ''));
  elsif cdc.leaf_of(seq) = 1 and tg_argv[1] <> 'ephemeral' then
    insert into cdc.event_1 values (
      seq, pg_current_xact_id(), captured_at, tg_argv[0]::integer, coalesce(op, lower(left(tg_op, 1))::"char"),
      old_image, new_image, nullif(current_setting('cdc.context', true), ''));
  elsif tg_argv[1] <> 'ephemeral' then
    insert into cdc.event_2 values (
      seq, pg_current_xact_id(), captured_at, tg_argv[0]::integer, coalesce(op, lower(left(tg_op, 1))::"char"),
      old_image, new_image, nullif(current_setting('cdc.context', true), ''));
  end if;

  -- The listener holds this lock exclusively while it sleeps. Granted: it is awake, or there is none; and as the lock
  -- is held until this transaction ends, it cannot fall asleep without seeing what was written here.
  if tg_argv[1] = 'adaptive' and pg_try_advisory_xact_lock_shared(6513763, 1) then
    return null;
  end if;
  if tg_argv[1] = 'off' then
    return null;
  end if;

  declare
    -- Notifications of one transaction, the last of which says only "there is more".
    most_rings constant integer := 32;
    txid xid8 := pg_current_xact_id();
    context text := nullif(current_setting('cdc.context', true), '');
    rung text;
    payload text := '';
  begin
    op := coalesce(op, lower(left(tg_op, 1))::"char");
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
  end;
end
$$;

-- ---------------------------------------------------------------------------------------------------------------
-- The reader.

-- cdc.next_batch(sink, epoch, acked, events, bytes, stored): the reader's one round trip. Acknowledges what the last call
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
-- Unless `stored` asks for it, neither does it when all there is to say is that a window of one page begins, and all that
-- B shows is on disk already: a reader that was asleep need not wait for a commit. The window is then kept in the setting
-- cdc.window of the session, with the position it follows on. Stored or not, its rows come again if the session is lost
-- before they are acknowledged; not stored, they come with what has been committed meanwhile.
--
-- Where the position's row stands is kept in the setting cdc.position_at of the session, which a rollback sets back with
-- everything else. Should the row have moved, it is looked up by its sink.
--
-- Returns: rows by ascending seq, at most `events`, ending with the one that passes `bytes` bytes of images.
-- Raises:  CDC01 when the epoch is not the current one.    Writes: one row of cdc.position.
drop function cdc.next_batch(text, bigint, bigint, integer, bigint);
create function cdc.next_batch(p_sink text, p_epoch bigint, p_acked bigint, p_events integer, p_bytes bigint,
                               p_stored boolean default true)
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
  read text[]; -- the window that was read and not stored: epoch, snap_lo, snap_hi, final_seq
  now_snap pg_snapshot;
  ended xid8[]; -- in progress in snap_lo, ended in snap_hi
  range_count bigint;
  list_count bigint;
  list_seq bigint;
  handed integer := 0;
  size bigint := 0;
  opened boolean := false; -- the window in hand is not in the table yet
  on_disk boolean; -- and need not be: all that it shows survives a crash
  moved boolean := false; -- anything else is not
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
  if s.snap_hi is null then
    read := string_to_array(current_setting('cdc.window', true), '/');
    if read[1] = p_epoch::text and read[2] = s.snap_lo::text then
      s.snap_hi := read[3]::pg_snapshot;
      s.final_seq := read[4]::bigint;
      opened := true;
      on_disk := not p_stored;
    end if;
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
      opened := false;
      moved := true;
    end if;

    if s.snap_hi is null then
      now_snap := pg_current_snapshot();
      on_disk := false;
      if not p_stored then
        -- With a standby that commits wait for, on disk here is not enough.
        on_disk := current_setting('synchronous_standby_names') = ''
                   and pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn();
      end if;
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
      opened := true;
    else
      ended := array(select x from pg_snapshot_xip(s.snap_lo) as x where pg_visible_in_snapshot(x, s.snap_hi));
    end if;

    -- A loop over a query takes its rows in dozens, as they are stored: an image is read when its row has its turn.
    if s.range_seq is null then
      for seq, txid, captured_at, captured_table, op, old_row, new_row, context in
        select p.seq, p.txid, to_char(p.captured_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), p.captured_table,
               p.op, p.old_row, p.new_row, p.context
          from (
            select e.* from cdc.event e
             where e.txid >= pg_snapshot_xmax(s.snap_lo) and e.txid < pg_snapshot_xmax(s.snap_hi)
               and pg_visible_in_snapshot(e.txid, s.snap_hi) and e.seq > s.last_seq
            union all
            select e.* from cdc.event e where e.txid = any (ended) and e.seq > s.last_seq
            order by seq
            limit p_events
          ) p order by p.seq
      loop
        return next;
        handed := handed + 1;
        size := size + coalesce(octet_length(old_row), 0) + coalesce(octet_length(new_row), 0);
        exit when size >= p_bytes;
      end loop;
    else
      for seq, txid, captured_at, captured_table, op, old_row, new_row, context in
        select p.seq, p.txid, to_char(p.captured_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"'), p.captured_table,
               p.op, p.old_row, p.new_row, p.context
          from (
            (select e.* from cdc.event e
              where e.seq > s.last_seq and e.seq >= s.range_seq
                and pg_visible_in_snapshot(e.txid, s.snap_hi) and not pg_visible_in_snapshot(e.txid, s.snap_lo)
              order by e.seq limit p_events)
            union all
            (select e.* from cdc.event e
              where e.txid = any (ended) and e.seq > s.last_seq and e.seq < s.range_seq
              order by e.seq limit p_events)
            order by seq
            limit p_events
          ) p order by p.seq
      loop
        return next;
        handed := handed + 1;
        size := size + coalesce(octet_length(old_row), 0) + coalesce(octet_length(new_row), 0);
        exit when size >= p_bytes;
      end loop;
    end if;

    if handed < p_events and size < p_bytes then
      -- The window ends with this page, or has ended before it.
      s.final_seq := case when handed > 0 then seq else s.last_seq end;
      moved := moved or not opened;
    end if;
    exit when handed > 0;
  end loop;

  if opened and not moved and on_disk and s.final_seq is not null then
    perform set_config('cdc.window', concat_ws('/', p_epoch, s.snap_lo, s.snap_hi, s.final_seq), false);
  elsif opened or moved then
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
revoke all on function cdc.next_batch(text, bigint, bigint, integer, bigint, boolean) from public;
grant execute on function cdc.next_batch(text, bigint, bigint, integer, bigint, boolean) to cdc_reader;
