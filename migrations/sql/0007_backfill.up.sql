-- cdc, revision 0007: existing rows beside the stream (backfill), and positions to go back to (rewind).

-- ---------------------------------------------------------------------------------------------------------------
-- Backfills: what people want, and, apart from it, how far the daemon has come. The daemon's row changes with every chunk,
-- in a repeatable read transaction, which must not meet with somebody who pauses.
create table cdc.backfill (
  id integer generated always as identity primary key,
  sink text not null references cdc.sink (name) on delete cascade,
  relation oid not null,
  schema_name text not null,
  table_name text not null,
  condition text, -- SQL over the table's columns; only whoever migrates can write it, and whose right it is evaluated with
  chunk integer not null default 1000 check (chunk between 1 and 100000), -- at most so many rows at a time
  rate integer check (rate > 0), -- at most so many rows a second
  state text not null default 'running' check (state in ('running', 'paused', 'done', 'cancelled', 'failed')),
  reason text, -- why it failed
  salt uuid not null default gen_random_uuid(), -- goes into the ids of events, which must not tell a row's values
  asked_at timestamptz not null default clock_timestamp(),
  ended_at timestamptz
);
create unique index backfill_of_a_table on cdc.backfill (sink, relation) where state in ('running', 'paused');

-- No index, and looked up by the session's memory of where the row stands, as cdc.position and for the same reason.
create table cdc.backfill_progress (
  backfill integer not null references cdc.backfill (id) on delete cascade,
  key_columns text[], -- paged along them; null: along ctid
  estimate bigint not null, -- of the table's rows, by the planner
  last_row text[], -- the highest key there was when it began: what has a higher one was put there since; null: along ctid
  cursor text[], -- of the last row that was delivered: the key, or partition, file, ctid and blocks
  rows_read bigint not null default 0, -- those looked at
  rows_told bigint not null default 0, -- those of them that became events
  ended boolean not null default false,
  chunk bigint not null default 0, -- the number of the chunk that was handed out last …
  next_cursor text[], -- … and where it leads
  next_read integer,
  next_told integer,
  next_ended boolean,
  told_at timestamptz not null, -- the moment of the last event: no two have the same
  low_seq bigint not null default 0, -- below whatever may still come; see cdc.backfill_batch
  drawn_seq bigint not null,
  drawn_txid xid8 not null,
  began_at timestamptz not null default clock_timestamp(),
  moved_at timestamptz not null default clock_timestamp()
) with (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

-- A new sink that begins with a backfill has yet to ask for it: which tables it wants is known to its pipeline.
alter table cdc.sink
  add column backfill_due boolean not null default false,
  -- After some tables were rewound: of what this position shows, only their events are delivered (again).
  add column skip_shown pg_snapshot,
  add column skip_but text[],
  add check ((skip_shown is null) = (skip_but is null));

-- ---------------------------------------------------------------------------------------------------------------
-- What a position was at a moment. A timestamp says nothing of transactions that were open then; this does.
create table cdc.moment (
  at timestamptz not null,
  snap pg_snapshot not null,
  seq bigint not null,
  system_identifier bigint not null
);
create index moment_at on cdc.moment (at);

-- cdc.note_moment(): remember now as a position, unless nothing was recorded since the last one.
-- Writes: cdc.moment.
create function cdc.note_moment() returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  drawn bigint;
begin
  select case when q.is_called then q.last_value else q.last_value - 1 end into drawn from cdc.event_seq q;
  -- The time is taken before the snapshot: what is committed in between counts as later, and is repeated.
  if drawn is distinct from (select m.seq from cdc.moment m order by m.at desc limit 1) then
    insert into cdc.moment
    select w.at, pg_current_snapshot(), drawn, c.system_identifier
      from (select statement_timestamp() as at) w, pg_control_system() c;
  end if;
end
$$;
insert into cdc.moment
select statement_timestamp(), pg_current_snapshot(), case when q.is_called then q.last_value else q.last_value - 1 end,
       c.system_identifier
  from cdc.event_seq q, pg_control_system() c;

-- cdc.diff(old, new, keep): drop what is equal on both sides, except the columns named in keep; nothing when one of those
-- has changed: a row that gets another key may move past a backfill that pages along it, and is then told of by this.
-- Both images come from one row type, so their members stand in the same order and can be walked in step.
-- Raises 22P05 or 22P02 on strings json_each cannot unescape (\u0000, lone surrogates): callers fall back.
create or replace function cdc.diff(
  old_row json, new_row json, keep text[], out before text, out after text, out changed text
)
language sql immutable
set search_path = pg_catalog, pg_temp
as $$
  select '{' || string_agg(to_json(o_name)::text || ':' || o_value::text, ',') || '}',
         '{' || string_agg(to_json(n_name)::text || ':' || n_value::text, ',') || '}',
         '[' || string_agg(to_json(n_name)::text, ',') filter (where differs) || ']'
    from (select o_name, o_value, n_name, n_value, o_value::text <> n_value::text as differs,
                 bool_or(o_value::text <> n_value::text and n_name = any (keep)) over () as moves
            from rows from (json_each(old_row), json_each(new_row)) as both_rows (o_name, o_value, n_name, n_value)) m
   where differs or n_name = any (keep) or moves
$$;

-- ---------------------------------------------------------------------------------------------------------------
-- Reading rows.

-- cdc.passes(row, condition): whether the condition of a trigger holds for a row, with no more rights than everybody has:
-- it may call functions that are not ours.
create function cdc.passes(one anyelement, condition text) returns boolean
language plpgsql stable security definer
as $$
declare
  answer boolean;
begin
  execute format('select (%s) from (select ($1).*) as new', condition) into answer using one;
  return coalesce(answer, false);
end
$$;

-- cdc.captured_image(row, captured table, hidden, key columns): the row as cdc.capture would store it (see there), or, if
-- it is too large or cannot be had, its key. Inherits the settings that cdc.backfill_batch pins.
create function cdc.captured_image(
  one anyelement, captured integer, hidden text, key_columns text[], out image json, out whole boolean
)
language plpgsql stable
as $$
declare
  too_wide constant bigint := 256 * 1024 * 1024;
begin
  whole := true;
  begin
    image := cdc.image(one);
    if hidden = 'hidden' then
      image := cdc.hide(captured, image);
    elsif hidden = 'virtual' then
      begin
        image := cdc.hide(captured, image);
      exception when others then
        null;
      end;
    end if;
    whole := octet_length(image::text) <= too_wide;
  exception when others then
    whole := false;
  end;
  if not whole then
    begin
      image := cdc.key_image(one, key_columns);
      if hidden = 'hidden' then
        image := cdc.hide(captured, image);
      end if;
    exception when others then
      image := null;
    end;
  end if;
end
$$;

-- cdc.paging(relation, captured table): along which columns a table can be paged, with what it takes to say "after this
-- row" in SQL; no row: it cannot. That takes a primary key by btree, for order and uniqueness, of types whose text form
-- leads back to the value without running code of a user: no domains inside of others, whose checks are anybody's.
-- Casts are not used at all, for anybody may define them for his types.
create type cdc.key_column as (
  name text,
  type text, -- that its text form leads back through
  equal text, -- operators
  greater text
);
create function cdc.paging(p_relation oid, p_captured integer) returns setof cdc.key_column
language plpgsql stable -- which plans it once in a session, and not once for each chunk
set search_path = pg_catalog, pg_temp
-- A table has a few columns and a database perhaps thousands of types: look those up that are wanted.
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
begin
  return query
  with recursive part as (
    select k.n, a.attname, a.atttypid as type, oc.opcfamily, oc.opcintype
      from pg_index i
      join pg_class c on c.oid = i.indexrelid
      join pg_am m on m.oid = c.relam and m.amname = 'btree'
      cross join unnest(i.indkey::int2[], i.indclass::oid[]) with ordinality as k (attnum, opclass, n)
      join pg_attribute a on a.attrelid = i.indrelid and a.attnum = k.attnum
      join pg_opclass oc on oc.oid = k.opclass
     where i.indrelid = p_relation and i.indisprimary and i.indisvalid and k.n <= i.indnkeyatts
  ), base as (
    select p.n, p.type as id from part p
    union all
    select b.n, t.typbasetype from base b join pg_type t on t.oid = b.id where t.typtype = 'd'
  ), inner_type as (
    select b.n, b.id, false as inside from base b join pg_type t on t.oid = b.id and t.typtype <> 'd'
    union
    select i.n, x.id, true
      from inner_type i
      join pg_type t on t.oid = i.id
      cross join lateral (
        select t.typelem as id where t.typelem <> 0
        union all
        select a.atttypid from pg_attribute a
         where t.typtype = 'c' and a.attrelid = t.typrelid and a.attnum > 0 and not a.attisdropped
        union all
        select r.rngsubtype from pg_range r where r.rngtypid = t.oid or r.rngmultitypid = t.oid) x
  )
  select p.attname::text, format_type(b.id, -1),
         (select format('operator(%I.%s)', n.nspname, o.oprname)
            from pg_amop x join pg_operator o on o.oid = x.amopopr join pg_namespace n on n.oid = o.oprnamespace
           where x.amopfamily = p.opcfamily and x.amoplefttype = p.opcintype and x.amoprighttype = p.opcintype
             and x.amopstrategy = 3 and x.amoppurpose = 's'),
         (select format('operator(%I.%s)', n.nspname, o.oprname)
            from pg_amop x join pg_operator o on o.oid = x.amopopr join pg_namespace n on n.oid = o.oprnamespace
           where x.amopfamily = p.opcfamily and x.amoplefttype = p.opcintype and x.amoprighttype = p.opcintype
             and x.amopstrategy = 5 and x.amoppurpose = 's')
    from part p
    join base b on b.n = p.n
    join pg_type t on t.oid = b.id and t.typtype <> 'd'
   where (select array_agg(q.attname::text order by q.n) from part q)
         = (select c.key_columns from cdc.captured_table c where c.id = p_captured)
     and not exists (select from inner_type i join pg_type d on d.oid = i.id where d.typtype in ('d', 'p'))
   order by p.n;
end
$$;

-- cdc.capture_of(relation): how the triggers of a table capture it now: the cdc.captured_table row, whether its changes are
-- ephemeral, what is hidden (as argument 4 of cdc.capture), and the condition an inserted row has to meet.
-- Returns: one row; captured is null when none of our triggers is there.
create function cdc.capture_of(
  p_relation oid, out captured integer, out ephemeral boolean, out hidden text, out condition text
)
language plpgsql stable -- as cdc.paging
set search_path = pg_catalog, pg_temp
as $$
begin
  select max(g.arguments[1]::integer), bool_or(g.arguments[2] = 'ephemeral'), max(g.arguments[5]),
         max(case when g.tgname = '00_cdc_insert' then cdc.condition_of(g.oid) end)
    into captured, ephemeral, hidden, condition
    from (select t.oid, t.tgname, string_to_array(encode(t.tgargs, 'escape'), '\000') as arguments
            from pg_trigger t
           where t.tgrelid = p_relation and t.tgfoid = 'cdc.capture()'::regprocedure and t.tgparentid = 0
             and starts_with(t.tgname::text, '00_cdc_')) g;
end
$$;

-- cdc.backfill_obstacle(relation): why the rows of a table cannot be told of exactly, with the cure; null: they can.
create function cdc.backfill_obstacle(p_relation oid) returns text
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  how record;
  t cdc.captured_table;
begin
  select * into how from cdc.capture_of(p_relation);
  if how.captured is null then
    return 'is not captured (name it under tables, then run cdc migrate)';
  elsif how.ephemeral then
    return 'is captured with delivery: ephemeral, and has no stream that rows could be in order with';
  end if;
  select * into t from cdc.captured_table c where c.id = how.captured;
  if not exists (select from cdc.paging(p_relation, how.captured)) then
    -- Along ctid: an update moves a row, perhaps to where we have been, and then only its event tells of it.
    if t.image <> 'full' then
      return 'has no primary key that can be paged along, and under image: diff the update of a row that moves does not '
             'tell all of it (set image: full, or give it a primary key)';
    elsif exists (select from pg_partition_tree(p_relation::regclass) p join pg_class c on c.oid = p.relid
                   where p.isleaf and c.relkind = 'f') then
      return 'has no primary key that can be paged along, and a partition that is a foreign table';
    end if;
  end if;
  return null;
end
$$;

-- cdc.check_condition(relation, condition): raise what PostgreSQL has against the condition of a backfill. With the rights
-- of who calls it; nothing is read.
create function cdc.check_condition(p_relation oid, p_condition text) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
  execute format(E'select (%s\n)::boolean from %s as new limit 0', p_condition, p_relation::regclass);
end
$$;

-- cdc.after_row(key, row): SQL that says "after this row", `new` being the one that is asked about, in pieces one of which
-- holds: equal up to a column, and greater there. The last column first, so that they come in the order of the key.
create function cdc.after_row(p_key cdc.key_column[], p_row text[]) returns setof text
language sql stable
set search_path = pg_catalog, pg_temp
as $$
  with k as (select * from unnest(p_key) with ordinality as w (name, type, equal, greater, n))
  select (select string_agg(format('new.%I %s %L::%s', o.name, case when o.n = k.n then o.greater else o.equal end,
                                   p_row[o.n], o.type), ' and ' order by o.n)
            from k o where o.n <= k.n)
    from k order by k.n desc
$$;

-- cdc.scans(relation, key, cursor, last row): the queries that lead from a row to all that come after it, in order: what
-- tells a row's place, whether it comes after the last one that counts, the table or partition, and the rest of the query,
-- where `new` is a row.
create function cdc.scans(
  p_relation oid, p_key cdc.key_column[], p_cursor text[], p_last text[],
  out place text, out beyond text, out source text, out rest text
) returns setof record
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  ordered text;
  leaf record;
  from_ text;
  blocks bigint;
begin
  source := case when (select c.relkind from pg_class c where c.oid = p_relation) = 'r' then 'only ' else '' end
            || p_relation::regclass;
  select 'array[' || string_agg(format('format(''%%s'', new.%I)', k.name), ', ') || ']',
         ' order by ' || string_agg(format('new.%I', k.name), ', ')
    into place, ordered from unnest(p_key) k;
  beyond := 'false';
  if place is not null then
    if p_last is not null then -- compared with the column, whose collation it is
      select string_agg('(' || a || ')', ' or ') into beyond from cdc.after_row(p_key, p_last) a;
    end if;
    if p_cursor is null then
      rest := ordered;
      return next;
      return;
    end if;
    for rest in select 'where ' || a || ordered from cdc.after_row(p_key, p_cursor) a
    loop
      return next;
    end loop;
    return;
  end if;

  for leaf in
    select p.relid::oid as id, pg_relation_filenode(p.relid)::text as file
      from pg_partition_tree(p_relation::regclass) p where p.isleaf and p.relid::oid >= coalesce(p_cursor[1]::oid, 0)
    union
    select p_relation, pg_relation_filenode(p_relation::regclass)::text
     where not exists (select from pg_partition_tree(p_relation::regclass)) and p_relation >= coalesce(p_cursor[1]::oid, 0)
    order by id
  loop
    -- A table that was rewritten has its rows elsewhere: it is begun anew.
    if leaf.id::text = p_cursor[1] and leaf.file = p_cursor[2] then
      from_ := p_cursor[3];
      blocks := p_cursor[4];
    else
      from_ := '(0,0)';
      blocks := pg_relation_size(leaf.id::regclass) / current_setting('block_size')::integer;
    end if;
    place := format('array[%L, %L, new.ctid::text, %L]', leaf.id, leaf.file, blocks);
    source := 'only ' || leaf.id::regclass;
    rest := format('where new.ctid > %L::tid and new.ctid < %L::tid', from_, format('(%s,0)', blocks));
    return next;
  end loop;
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
-- cdc.image, cdc.key_image and cdc.passes without any rights; `condition` is of who migrates. Rows that a policy would
-- hide are an error rather than missing (row_security).
--
-- Returns: the page as cdc.next_batch; the rows under op r (R: too large, new_row holds its key only) with an id of their
--          own; and, unless this page is not all, one row under op x: seq is the number of the chunk, null: there is none;
--          captured_table the number of rows looked at; old_row 'ended' when all of the table is acknowledged; new_row why
--          it cannot be read, and then what there is of the chunk is not to be used.
-- Raises:  as cdc.next_batch.    Writes: one row each of cdc.position and cdc.backfill_progress.
create function cdc.backfill_batch(
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
    exception when insufficient_privilege then
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

-- ---------------------------------------------------------------------------------------------------------------
-- Positions to go back to.

-- cdc.rewind(sink, position, tables): let a sink go on from another position; with tables, deliver only their events again,
-- up to where the sink stands now. Whoever serves it finds its epoch outdated and begins anew.
-- Returns: the new epoch.   Writes: one row each of cdc.sink and cdc.position.
-- Raises:  CDC04 when the sink has not come as far as the position, and tables are given.
create function cdc.rewind(p_sink text, p_position pg_snapshot, p_tables text[]) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set lock_timeout = '5s'
as $$
declare
  s cdc.sink;
  p cdc.position;
begin
  select * into strict s from cdc.sink k where k.name = p_sink for update;
  select * into strict p from cdc.position k where k.sink = p_sink for update;
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

-- cdc.rotate(retention): give the outbox's space back. Truncates each child but the current one when every sink is past
-- all of it, its newest event is older than `retention`, and nobody is writing there; then, if the current child has
-- held events for a third of `retention` and the next one is empty, begins that one by moving the sequence. Never waits
-- for a lock, and does nothing while another session is at it: two that moved the sequence could move it back.
-- Moments from which on the outbox does not have all any more are no positions to go back to, and are forgotten.
-- Returns: what was done: 'truncated', 'turned', both, or nothing.   Writes: cdc.event_seq, children of cdc.event, cdc.moment.
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
          execute format('delete from cdc.moment m where pg_snapshot_xmin(m.snap) <= (select e.txid from %s e order by e.txid desc limit 1)', leaf);
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
revoke all on cdc.backfill, cdc.backfill_progress, cdc.moment from public;
grant select on cdc.backfill, cdc.backfill_progress to cdc_reader;
grant insert (sink, relation, schema_name, table_name, chunk, rate) on cdc.backfill to cdc_reader;
grant update (state, reason, ended_at) on cdc.backfill to cdc_reader;
grant update (cursor, rows_read, rows_told, ended, next_read, moved_at) on cdc.backfill_progress to cdc_reader;
grant select, insert, delete on cdc.moment to cdc_reader;
revoke all on function
  cdc.note_moment(), cdc.passes(anyelement, text), cdc.captured_image(anyelement, integer, text, text[]),
  cdc.paging(oid, integer), cdc.capture_of(oid), cdc.backfill_obstacle(oid), cdc.check_condition(oid, text),
  cdc.after_row(cdc.key_column[], text[]), cdc.scans(oid, cdc.key_column[], text[], text[]),
  cdc.rewind(text, pg_snapshot, text[]),
  cdc.backfill_batch(text, bigint, bigint, integer, bigint, integer, bigint, integer)
  from public;
grant execute on function
  cdc.note_moment(), cdc.paging(oid, integer), cdc.capture_of(oid), cdc.backfill_obstacle(oid),
  cdc.rewind(text, pg_snapshot, text[]),
  cdc.backfill_batch(text, bigint, bigint, integer, bigint, integer, bigint, integer)
  to cdc_reader;

-- Handing a function over takes, for a moment, the right to create in the schema.
grant create on schema cdc to cdc_nobody;
alter function cdc.passes(anyelement, text) owner to cdc_nobody;
revoke create on schema cdc from cdc_nobody;
do $owner$
begin
  -- Handed over, it is no longer its maker's to call.
  execute pg_catalog.format('grant execute on function cdc.passes(anyelement, text) to %I', current_user);
end
$owner$;
