-- cdc, revision 0009: what was found wrong with what others' code may do, with hiding under an old snapshot, with
-- publications of all tables, with giving space back while many read, with going back, with moving to another cluster,
-- and with json.

-- ---------------------------------------------------------------------------------------------------------------
-- Code of others.

-- It runs as cdc_nobody, but in our session, and may set there whatever everybody may. A search_path it leaves behind
-- would let its functions be called in place of PostgreSQL's, by the caller and with the caller's rights. So each of the
-- three that run such code looks, in words that no path can bend, and raises. All callers catch that, in a block whose end
-- takes back every setting that was made in it.

-- cdc.image(row): the row as JSON. Inherits the settings that cdc.capture pins. In PL/pgSQL, because an SQL function costs
-- a microsecond more.
create or replace function cdc.image(one anyelement) returns json
language plpgsql stable security definer
as $$
declare
  image constant json := pg_catalog.to_json(one);
begin
  if pg_catalog.current_setting('search_path') operator(pg_catalog.<>) 'pg_catalog, pg_temp' then
    raise exception 'a cast to json has changed search_path';
  end if;
  return image;
end
$$;

-- cdc.key_image(row, columns): these columns of the row as JSON, for rows that are too large as a whole.
create or replace function cdc.key_image(one anyelement, columns text[]) returns json
language plpgsql stable security definer
as $$
declare
  image json;
begin
  execute (
    select 'select json_build_object(' || string_agg(format('%L, ($1).%I', c, c), ', ') || ')' from unnest(columns) as c
  ) into image using one;
  if pg_catalog.current_setting('search_path') operator(pg_catalog.<>) 'pg_catalog, pg_temp' then
    raise exception 'a cast to json has changed search_path';
  end if;
  return image;
end
$$;

-- cdc.passes(row, condition): whether the condition of a trigger holds for a row, with no more rights than everybody has:
-- it may call functions that are not ours.
create or replace function cdc.passes(one anyelement, condition text) returns boolean
language plpgsql stable security definer
as $$
declare
  answer boolean;
begin
  execute format('select (%s) from (select ($1).*) as new', condition) into answer using one;
  if pg_catalog.current_setting('search_path') operator(pg_catalog.<>) 'pg_catalog, pg_temp' then
    raise exception 'a condition has changed search_path';
  end if;
  return coalesce(answer, false);
end
$$;

-- cdc.hash(value): a value as it is shown under mask: hash, an HMAC (RFC 2104) by SHA-256 with the installation's secret.
-- In PL/pgSQL, as cdc.hide, which keeps its plan for the session: within the trigger's blocks a function in SQL is planned
-- anew for each row.
create or replace function cdc.hash(value json) returns text
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
begin
  return (select encode(sha256(s.outer_pad || sha256(s.inner_pad || convert_to(value::text, 'UTF8'))), 'hex') from cdc.secret s);
end
$$;

-- cdc.hide(captured table, image): the image without what is hidden, and without virtual generated columns, which no
-- trigger ever sees the value of. NULL stays NULL, whatever is done to the column.
-- Raises CDC06 under a snapshot older than the last cdc migrate, or than a new or renamed column: what has to be hidden
-- cannot be told then. A repeatable read transaction may have one, and does see what it writes itself as it is now.
-- Raises 22P05 or 22P02 on strings json_each cannot unescape (\u0000, lone surrogates): nothing is shown either.
create or replace function cdc.hide(p_table integer, image json) returns json
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  t cdc.captured_table;
  shown text;
  strange boolean;
begin
  if image is null then
    return null;
  end if;
  select * into t from cdc.captured_table c where c.id = p_table;
  select string_agg(to_json(m.key)::text || ':' || case
           when m.value::text = 'null' then 'null'
           when r.redact then '"***"'
           when r.hash then to_json(cdc.hash(m.value))::text
           else m.value::text end, ',' order by m.n) filter (where not r.exclude and a.attgenerated is distinct from 'v'),
         bool_or(a.attnum is null)
    into shown, strange
    from json_each(image) with ordinality as m (key, value, n)
    left join pg_attribute a on a.attrelid = t.relation and a.attname = m.key
    cross join lateral (
      select coalesce(bool_or(h.value ->> 'how' = 'exclude'), false) as exclude,
             bool_or(h.value ->> 'how' = 'redact') as redact, bool_or(h.value ->> 'how' = 'hash') as hash
        from jsonb_each(t.hidden) h
       where h.key = m.key or (h.value ->> 'number')::smallint = a.attnum) r;
  -- In a restored database another table may have the number, until cdc rebase: then names are all there is to go by.
  if t.id is null or strange and exists (select from pg_class c where c.oid = t.relation and c.relname = t.table_name) then
    raise exception 'what is hidden of table % is not known to this transaction', p_table using errcode = 'CDC06';
  end if;
  return ('{' || coalesce(shown, '') || '}')::json;
end
$$;

-- cdc.backfill_batch(sink, epoch, acked, events, bytes, backfill, done, rows): cdc.next_batch and, if all that it knows of
-- is on this page, one chunk of a table under the same snapshot. The chunk is the state at exactly the point the stream
-- has reached with this page: its rows are to be delivered after it, and before whatever is read next.
--
-- To be called alone in a repeatable read transaction. It acknowledges with `acked` the events and with `done` the chunk
-- of that number, in the same transaction. What a chunk leads to is stored before it is used and counts when it is
-- acknowledged; a crash in between reads it anew, under another snapshot and after another window.
--
-- Paged along the key, one query for each of its columns: the same in all before and greater in this one, from the last
-- column to the first. (A row comparison would find its operators by name.) A row whose key changes may move past the
-- cursor: the pipeline makes a row of that event, see cdc.backfill in the package. Paged up to where the table ended at
-- first, by key as by ctid: what is put beyond was written since, and is told of by the stream.
--
-- An event's seq must be lower than that of any change the row may still come with, drawn or not, and there may be
-- transactions in progress that have drawn theirs long ago. All that are have drawn a higher one than cdc.event_seq had
-- before our id of then, if by now everything up to that id has ended.
--
-- Runs as the owner of the schema, who reads the table, and shows of it what the triggers would. Code of others is run by
-- cdc.image, cdc.key_image and cdc.passes without any rights, in a block that takes back whatever it sets; `condition` is
-- of who migrates. Rows that a policy would hide are an error rather than missing (row_security).
--
-- Returns: the page as cdc.next_batch; the rows under op r (R: too large, new_row holds its key only) with an id of their
--          own; and, unless this page is not all, one row under op x: seq is the number of the chunk, null: there is none;
--          captured_table the number of rows looked at; old_row 'ended' when all of the table is acknowledged; new_row why
--          it cannot be read, and then what there is of the chunk is not to be used.
-- Raises:  as cdc.next_batch.    Writes: one row each of cdc.position and cdc.backfill_progress.
create or replace function cdc.backfill_batch(
  p_sink text, p_epoch bigint, p_acked bigint, p_events integer, p_bytes bigint, p_backfill integer, p_done bigint,
  p_rows integer
)
returns table (seq bigint, txid xid8, captured_at text, captured_table integer, op "char",
               old_row text, new_row text, context text, event_id text)
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
set row_security = off
-- As cdc.capture:
set timezone = 'UTC'
set datestyle = 'ISO, MDY'
set intervalstyle = 'postgres'
set extra_float_digits = 1
set bytea_output = 'hex'
set lc_monetary = 'C'
set quote_all_identifiers = off
-- A chunk costs what a chunk costs, whatever the planner thinks of sorting all of a table.
set enable_seqscan = off
set enable_bitmapscan = off
set enable_sort = off
set jit = off
set max_parallel_workers_per_gather = 0
as $$
#variable_conflict use_column
declare
  drawn bigint;
  here pg_snapshot;
  stands record;
  b cdc.backfill;
  g record; -- the progress, and under `at` where its row stands
  how record;
  t cdc.captured_table;
  scan record;
  key cdc.key_column[];
  keys text[];
  plan json;
  page refcursor;
  r record;
  size bigint := 0;
  looked_at integer := 0;
  told integer := 0;
  reached text[];
  obstacle text;
begin
  select case when q.is_called then q.last_value else q.last_value - 1 end into drawn
    from cdc.event_seq q; -- before our id
  perform set_config('synchronous_commit', 'on', true);
  begin
    return query
      select n.seq, n.txid, n.captured_at, n.captured_table, n.op, n.old_row, n.new_row, n.context, null::text
        from cdc.next_batch(p_sink, p_epoch, p_acked, p_events, p_bytes) n;
  exception when serialization_failure then -- somebody else has moved the position at this moment
    raise exception 'sink % is served by another daemon', p_sink using errcode = 'CDC01';
  end;
  here := pg_current_snapshot();
  select p.snap_hi, p.final_seq into stands from cdc.position p
   where p.ctid = nullif(current_setting('cdc.position_at', true), '')::tid and p.sink = p_sink;
  if not found then
    select p.snap_hi, p.final_seq into stands from cdc.position p where p.sink = p_sink;
  end if;

  select p.ctid as at, p.* into g from cdc.backfill_progress p
   where p.ctid = nullif(current_setting('cdc.backfill_at', true), '')::tid and p.backfill = p_backfill;
  if not found then
    select p.ctid as at, p.* into g from cdc.backfill_progress p where p.backfill = p_backfill;
  end if;
  if g.next_read is not null and p_done = g.chunk then
    g.cursor := g.next_cursor;
    g.rows_read := g.rows_read + g.next_read;
    g.rows_told := g.rows_told + g.next_told;
    g.ended := g.next_ended;
    g.next_read := null;
    g.moved_at := clock_timestamp();
  else
    p_done := null;
  end if;

  op := 'x';
  captured_table := 0;
  select * into b from cdc.backfill k where k.id = p_backfill and k.sink = p_sink and k.state = 'running';
  if not found or not (stands.snap_hi is null or stands.snap_hi::text = here::text and stands.final_seq is not null) then
    -- Somebody has paused it, or the page is not all.
    if p_done is null then
      return;
    end if;
  elsif g.ended then
    old_row := 'ended';
    return next;
    if p_done is null then
      return;
    end if;
  else
    begin
      select * into how from cdc.capture_of(b.relation);
      select * into t from cdc.captured_table c where c.id = how.captured;
      key := (select array_agg(k) from cdc.paging(b.relation, how.captured) k);
      keys := (select array_agg(k.name order by k.n) from unnest(key) with ordinality as k (name, type, equal, greater, n));
      if how.captured is not null and g.backfill is not null and g.key_columns is distinct from keys then
        raise exception 'table %.% has another primary key than when the backfill began (start it again)',
          b.schema_name, b.table_name using errcode = 'CDC03';
      end if;
      if key is null or how.ephemeral then
        obstacle := cdc.backfill_obstacle(b.relation);
      end if;
      if obstacle is not null then
        raise exception 'table %.% %', b.schema_name, b.table_name, obstacle using errcode = 'CDC03';
      end if;
      if g.backfill is null then
        execute format('explain (format json) select from %s', b.relation::regclass) into plan;
        select null::tid as at, p_backfill as backfill, keys as key_columns,
               (plan #>> '{0,Plan,Plan Rows}')::numeric::bigint as estimate, null::text[] as last_row,
               null::text[] as cursor, 0::bigint as rows_read, 0::bigint as rows_told, false as ended, 0::bigint as chunk,
               null::text[] as next_cursor, null::integer as next_read, null::integer as next_told,
               null::boolean as next_ended, clock_timestamp() as told_at, 0::bigint as low_seq, drawn as drawn_seq,
               pg_current_xact_id() as drawn_txid, clock_timestamp() as began_at, clock_timestamp() as moved_at
          into g;
        if keys is not null then
          execute (
            select format('select array[%s] from %s%s as new order by %s limit 1',
                          string_agg(format('format(''%%s'', new.%I)', k), ', ' order by n),
                          case when (select c.relkind from pg_class c where c.oid = b.relation) = 'r' then 'only ' end,
                          b.relation::regclass, string_agg(format('new.%I desc', k), ', ' order by n))
              from unnest(keys) with ordinality as o (k, n)) into g.last_row;
        end if;
      elsif g.drawn_txid < pg_snapshot_xmin(here) then
        g.low_seq := g.drawn_seq;
        g.drawn_seq := drawn;
        g.drawn_txid := pg_current_xact_id();
      end if;
      g.told_at := greatest(clock_timestamp(), g.told_at + interval '1 microsecond');
      seq := g.low_seq;
      txid := pg_current_xact_id();
      captured_table := how.captured;

      g.next_ended := true; -- unless a limit is met first
      reached := g.cursor;
      <<scans>>
      for scan in select s.* from cdc.scans(b.relation, key, g.cursor, g.last_row) s loop
        open page for execute format(
          'select new.ctid as at, %s as place, %s as beyond, w.wanted, i.image, i.whole
             from %s as new
             cross join lateral (select %s as wanted offset 0) w
             left join lateral (select x.image, x.whole
                                  from cdc.captured_image(new.*, %s, %L, %L) x where w.wanted) i on true
             %s limit %s',
          scan.place, scan.beyond, scan.source,
          concat_ws(' and ', coalesce('coalesce((' || b.condition || E'\n)::boolean, false)', 'true'),
                    'cdc.passes(new.*, ' || quote_literal(how.condition) || ')'),
          how.captured, coalesce(how.hidden, ''), t.key_columns, scan.rest, p_rows - looked_at);
        loop
          fetch page into r;
          exit when not found;
          if r.beyond then
            close page;
            exit scans;
          end if;
          looked_at := looked_at + 1;
          reached := r.place;
          if r.wanted then
            told := told + 1;
            g.told_at := g.told_at + interval '1 microsecond';
            captured_at := to_char(g.told_at at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"');
            op := case when r.whole then 'r' else 'R' end;
            new_row := r.image;
            event_id := 'b' || b.id || '-' || md5(concat_ws('|', b.salt, case when keys is null then r.at end, op, r.image));
            return next;
            size := size + coalesce(octet_length(new_row), 0);
          end if;
          if looked_at >= p_rows or size >= p_bytes then
            g.next_ended := false;
            close page;
            exit scans;
          end if;
        end loop;
        close page;
      end loop;
      g.chunk := g.chunk + 1;
      g.next_cursor := reached;
      g.next_read := looked_at;
      g.next_told := told;
      raise exception using errcode = 'CDC05'; -- what code of others has set in this session does not outlive its block
    exception when sqlstate 'CDC05' then
      null; -- variables and rows that were returned stay
    when insufficient_privilege then
      obstacle := sqlerrm || ' (let the role that migrates select from it)';
    when others then
      -- What else PostgreSQL says may quote a value.
      obstacle := case when sqlstate = 'CDC03' or sqlstate like '42%' or sqlstate like '0A%' then sqlerrm
                       else 'reading the table failed with SQLSTATE ' || sqlstate end;
    end;
    op := 'x';
    seq := case when obstacle is null then g.chunk end;
    captured_table := looked_at;
    old_row := null;
    new_row := obstacle;
    event_id := null;
    return next;
    if obstacle is not null and p_done is null then
      return;
    end if;
  end if;

  if g.at is not null then
    update cdc.backfill_progress p
       set cursor = g.cursor, rows_read = g.rows_read, rows_told = g.rows_told, ended = g.ended, chunk = g.chunk,
           next_cursor = g.next_cursor, next_read = g.next_read, next_told = g.next_told, next_ended = g.next_ended,
           told_at = g.told_at, low_seq = g.low_seq, drawn_seq = g.drawn_seq, drawn_txid = g.drawn_txid,
           moved_at = g.moved_at
     where p.ctid = g.at
    returning p.ctid into g.at;
  else
    insert into cdc.backfill_progress as p
      (backfill, key_columns, estimate, last_row, chunk, next_cursor, next_read, next_told, next_ended, told_at, drawn_seq, drawn_txid)
    values (g.backfill, g.key_columns, g.estimate, g.last_row, g.chunk, g.next_cursor, g.next_read, g.next_told, g.next_ended,
            g.told_at, g.drawn_seq, g.drawn_txid)
    returning p.ctid into g.at;
  end if;
  perform set_config('cdc.backfill_at', g.at::text, false);
end
$$;

-- A publication of all tables, somebody else's, would otherwise let PostgreSQL refuse every update and delete in tables
-- without a primary key. Costs nothing but under wal_level = logical, and there a few bytes more of WAL.
alter table cdc.event replica identity full;
alter table cdc.event_0 replica identity full;
alter table cdc.event_1 replica identity full;
alter table cdc.event_2 replica identity full;
alter table cdc.position replica identity full;
alter table cdc.backfill_progress replica identity full;
alter table cdc.moment replica identity full;
alter table cdc.origin replica identity full;

-- ---------------------------------------------------------------------------------------------------------------
-- The book.

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
-- In PL/pgSQL for the reason cdc.hash is.
create or replace function cdc.diff(
  old_row json, new_row json, keep text[], out before text, out after text, out changed text
)
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
  select '{' || coalesce(string_agg(to_json(o_name)::text || ':' || o_value::text, ','), '') || '}',
         '{' || coalesce(string_agg(to_json(n_name)::text || ':' || n_value::text, ','), '') || '}',
         '[' || coalesce(string_agg(to_json(n_name)::text, ',') filter (where differs), '') || ']'
    into before, after, changed
    from (select o_name, o_value, n_name, n_value, o_value::text <> n_value::text as differs,
                 bool_or(o_value::text <> n_value::text and n_name = any (keep)) over () as moves
            from rows from (json_each(old_row), json_each(new_row)) as both_rows (o_name, o_value, n_name, n_value)) m
   where differs or n_name = any (keep) or moves;
end
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
