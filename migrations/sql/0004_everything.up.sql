-- cdc, revision 0004: whatever a table can hold or go through. Virtual generated columns are left out, no setting of a
-- writer shows, bytes that are no characters stop nobody, and what somebody has changed of triggers, partitions and
-- functions is found and put right.

-- ---------------------------------------------------------------------------------------------------------------
-- Functions somebody has replaced. Every function of this schema as the revisions have made it, and what brings it back.

create table cdc.definition (
  name text primary key,
  hash text not null,
  statement text not null,
  owner name not null,
  grantees name[] not null -- beside the owner; for PUBLIC there is nothing
);

-- cdc.function: the functions of this schema as they are now. The hash leaves out what differs between versions of
-- PostgreSQL or with the settings of a session.
create view cdc.function as
  select 'cdc.' || p.proname || '(' || pg_catalog.oidvectortypes(p.proargtypes) || ')' as name, p.oid as function,
         pg_catalog.md5(pg_catalog.concat_ws('|',
           coalesce(nullif(p.prosrc, ''), pg_catalog.translate(pg_catalog.pg_get_function_sqlbody(p.oid), '"', '')),
           pg_catalog.array_to_string(array(select c from pg_catalog.unnest(p.proconfig) as c order by c), ','),
           p.prosecdef, p.provolatile)) as hash
    from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
   where n.nspname = 'cdc';

-- cdc.keep_definitions(): what the functions are now is what they should be. Called after every change of revision.
-- Writes: cdc.definition.
create function cdc.keep_definitions() returns void
language sql
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
set standard_conforming_strings = on
as $$
  delete from cdc.definition;
  insert into cdc.definition
  select f.name, f.hash, pg_get_functiondef(f.function), pg_get_userbyid(p.proowner),
         array(select pg_get_userbyid(a.grantee) from aclexplode(p.proacl) a where a.grantee not in (0, p.proowner))
    from cdc.function f join pg_proc p on p.oid = f.function;
$$;

-- cdc.restore_definitions(): put back every function that is not what it should be, or has gone.
-- Returns: their names.   Writes: pg_proc.
create function cdc.restore_definitions() returns setof text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  d record;
  grantee name;
begin
  for d in select w.* from cdc.definition w left join cdc.function f on f.name = w.name and f.hash = w.hash
            where f.name is null order by w.name loop
    execute d.statement;
    execute format('revoke all on function %s from public', d.name);
    if pg_get_userbyid((select p.proowner from cdc.function f join pg_proc p on p.oid = f.function where f.name = d.name))
       <> d.owner
    then
      execute format('grant create on schema cdc to %I', d.owner);
      execute format('alter function %s owner to %I', d.name, d.owner);
      execute format('revoke create on schema cdc from %I', d.owner);
    end if;
    foreach grantee in array d.grantees loop
      execute format('grant execute on function %s to %I', d.name, grantee);
    end loop;
    return next d.name;
  end loop;
end
$$;

-- ---------------------------------------------------------------------------------------------------------------
-- The trigger, anew.

-- cdc.capture(): the trigger, the same for every table. Reads whole rows, so that a column added, renamed or dropped
-- breaks nothing and needs no new trigger. Must never abort or distort the user's write; only a failing insert into
-- the outbox does, which is the promise of durability.
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
        old_image := cdc.image(old);
        size := octet_length(old_image::text);
      end if;
      if op <> 'd' then
        new_image := cdc.image(new);
        size := size + octet_length(new_image::text);
      end if;
      if tg_argv[4] = 'hidden' then
        old_image := cdc.hide(tg_argv[0]::integer, old_image);
        new_image := cdc.hide(tg_argv[0]::integer, new_image);
      elsif tg_argv[4] = 'virtual' then
        begin
          select cdc.hide(tg_argv[0]::integer, old_image) as before, cdc.hide(tg_argv[0]::integer, new_image) as after
            into pruned;
          old_image := pruned.before;
          new_image := pruned.after;
        exception when others then
          null; -- strings json_each cannot unescape: better a null too many than no image
        end;
      end if;
    exception when others then -- over 1 GB as text, a cast that fails, something hidden in what cannot be taken apart:
      size := too_wide + 1;    -- say which row, and that it is not all
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
          new_image := cdc.key_image(case when op = 'D' then old else new end, t.key_columns);
          if tg_argv[4] = 'hidden' then
            new_image := cdc.hide(t.id, new_image);
          end if;
        exception when others then
          new_image := null; -- the key itself cannot be had: the event still says that the table changed
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

-- cdc.payload(…): the event as a notification carries it, in the contract's native format; the stub (no images,
-- "truncated") when it would reach the 8000 bytes at which pg_notify fails the user's statement; and if even the key
-- is that long, nothing: an empty payload means "look into the book".
-- Returns: the payload, at most 7999 bytes.  Reads: cdc.installation, cdc.captured_table.
-- Raises:  22021 or 22P05 when it holds bytes that are no characters: sending it would end the listener's session.
create or replace function cdc.payload(
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
  -- SQL_ASCII takes any bytes; everywhere else what stands in the database can be checked against its own rules.
  encoding constant name := case getdatabaseencoding() when 'SQL_ASCII' then 'SQL_ASCII' else 'UTF8' end;
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
      return convert_from(convert_to(whole, encoding), 'UTF8');
    end if;
  end if;
  whole := head || ',"before":null,"after":null,"changed":null,"context":null,"truncated":true}';
  return case when octet_length(whole) < 8000 then convert_from(convert_to(whole, encoding), 'UTF8') else '' end;
end
$$;

-- cdc.hide(captured table, image): the image without what is hidden, and without virtual generated columns, which no
-- trigger ever sees the value of. NULL stays NULL, whatever is done to the column.
-- Raises 22P05 or 22P02 on strings json_each cannot unescape (\u0000, lone surrogates): nothing is shown then.
create or replace function cdc.hide(p_table integer, image json) returns json
language sql stable
set search_path = pg_catalog, pg_temp
as $$
  with t as (select c.relation, c.hidden from cdc.captured_table c where c.id = p_table),
  named as (
    select h.key as name, h.value ->> 'how' as how from t, jsonb_each(t.hidden) h
    union all
    select a.attname::text, h.value ->> 'how'
      from t, jsonb_each(t.hidden) h
      join pg_attribute a on a.attnum = (h.value ->> 'number')::smallint
     where a.attrelid = t.relation
    union all
    select a.attname::text, 'exclude' from t join pg_attribute a on a.attrelid = t.relation where a.attgenerated = 'v'
  ),
  rule as (
    select name, case when bool_or(how = 'exclude') then 'exclude' when bool_or(how = 'redact') then 'redact' else 'hash' end as how
      from named group by name
  )
  select ('{' || coalesce(string_agg(
            to_json(m.key)::text || ':' || case
              when m.value::text = 'null' then 'null'
              when r.how = 'hash' then to_json(cdc.hash(m.value))::text
              when r.how = 'redact' then '"***"'
              else m.value::text end, ',' order by m.n), '') || '}')::json
    from json_each(image) with ordinality as m (key, value, n)
    left join rule r on r.name = m.key
   where r.how is distinct from 'exclude' and image is not null
  having image is not null
$$;

-- ---------------------------------------------------------------------------------------------------------------
-- The verbs, anew.

drop function cdc.enable_capture(regclass, text[], text, text[], boolean, text, text, text, text[], json, json, boolean);
drop function cdc.capture_plan(regclass, text[], text, text[], boolean, text, text, text, text[], json, json, boolean);
drop function cdc.set_trigger(regclass, name, text, text, boolean, text);

-- cdc.condition_of(trigger): its WHEN in PostgreSQL's words, or null.
create function cdc.condition_of(p_trigger oid) returns text
language sql stable
set search_path = pg_catalog, pg_temp
set quote_all_identifiers = off
set standard_conforming_strings = on
as $$
  select substring(pg_get_triggerdef(p_trigger) from ' WHEN [(](.*)[)] EXECUTE FUNCTION ')
$$;

-- cdc.all_arguments(arguments, condition, trigger): those that every trigger of the table has and, with a condition, a hash
-- of it as it was asked for and as PostgreSQL has it.
create function cdc.all_arguments(arguments text[], condition text, p_trigger oid) returns text[]
language sql stable
set search_path = pg_catalog, pg_temp
as $$
  select arguments || case when condition is null then '{}'::text[]
    else case when cardinality(arguments) < 5 then '{""}'::text[] else '{}' end
         || md5(condition || '|' || coalesce(cdc.condition_of(p_trigger), '')) end
$$;

-- cdc.capture_plan(relation, …): what enable_capture would make of one table, and whether it stands already. Reads only.
-- Whatever tells one trigger from another is compared with what the catalogue has, in the table and in each of its
-- partitions; only a condition is kept in PostgreSQL's words, so its trigger carries a hash of both wordings.
-- Conditions are kept by operation; `mask` says of a column hash or redact. A column that is not there is an error, unless
-- `lenient`: the options were meant for many tables.
-- Returns: state ('installed', 'outdated', 'missing'), the key columns, the cdc.captured_table row (null: a new one is
--          needed), what is hidden, the arguments of the triggers.
-- Raises:  42809 for what cannot be captured, 42703 for a column that does not exist, 22023 for a needless key or one that nobody would see.
create function cdc.capture_plan(
  relation regclass, ops text[], image text, key text[], always boolean, notify text, notify_payload text, channel text,
  exclude text[], mask json, conditions json, lenient boolean,
  out state text, out key_columns text[], out captured integer, out hidden jsonb, out arguments text[]
)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
  c record;
  missing text;
  virtual name[];
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
  virtual := array(select a.attname from pg_attribute a where a.attrelid = relation and a.attgenerated = 'v');
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

  select coalesce(jsonb_object_agg(h.name, jsonb_build_object('how', h.how, 'number', a.attnum)), '{}'),
         string_agg(quote_ident(h.name), ', ') filter (where a.attnum is null)
    into hidden, missing
    from (select e as name, 'exclude' as how from unnest(exclude) as e
          union all select m.key, m.value from json_each_text(mask) m) h
    left join pg_attribute a on a.attrelid = relation and a.attname = h.name and a.attnum > 0 and not a.attisdropped;
  if missing is not null and not lenient then
    raise exception '% has no column %', relation, missing using errcode = 'undefined_column';
  end if;
  select string_agg(quote_ident(k), ', ') into missing from unnest(key_columns) as k
   where hidden -> k ->> 'how' in ('exclude', 'redact');
  if missing is not null then
    raise exception '% is identified by %, which cannot be left out (mask: hash hides the value)', relation, missing
      using errcode = 'invalid_parameter_value';
  end if;
  if key_columns && virtual::text[] then
    raise exception '% is identified by a virtual generated column, which no trigger sees (make it stored, or name others)',
      relation using errcode = 'invalid_parameter_value';
  end if;

  select t.id into captured from cdc.captured_table t
   where t.relation = capture_plan.relation and t.schema_name = c.nspname and t.table_name = c.relname
     and t.key_columns is not distinct from capture_plan.key_columns and t.image = capture_plan.image
     and t.hidden = capture_plan.hidden
   order by t.id desc limit 1;
  arguments := array[captured::text, notify, channel, notify_payload]
    || case when hidden <> '{}' then '{hidden}'::text[] when virtual <> '{}' then '{virtual}' else '{}' end;

  with recursive wanted as (
    select '00_cdc_' || case when o = 'truncate' or conditions -> o is not null then o else 'capture' end as name,
           sum(case o when 'insert' then 4 when 'delete' then 8 when 'update' then 16 else 32 end)
             + (o <> 'truncate')::integer as type,
           conditions ->> min(o) as condition
      from (select distinct o from unnest(ops) as o) each (o)
     group by name, o <> 'truncate'
  ), family as (
    select relation::oid as member, false as is_partition
    union all
    select i.inhrelid, true
      from family f
      join pg_class p on p.oid = f.member and p.relkind = 'p'
      join pg_inherits i on i.inhparent = f.member
  ), present as (
    select * from pg_trigger g where g.tgrelid = relation and not g.tgisinternal and starts_with(g.tgname::text, '00_cdc_')
  )
  select case
      when not exists (select from present) then 'missing'
      when captured is not null and not exists (
        select from wanted w full join present g on g.tgname = w.name
         where w.name is null or g.oid is null
            or g.tgtype <> w.type or g.tgfoid is distinct from to_regprocedure('cdc.capture()') or g.tgconstraint <> 0
            or array_length(g.tgattr::int2[], 1) > 0 or (w.condition is null) <> (g.tgqual is null)
            or g.tgenabled <> (case when always then 'A' else 'O' end)::"char"
            or g.tgargs <> (select string_agg(convert_to(a, getdatabaseencoding()) || decode('00', 'hex'), '' order by n)
                              from unnest(cdc.all_arguments(arguments, w.condition, g.oid)) with ordinality as x (a, n))
            or (w.name <> '00_cdc_truncate' and exists (
                  select from family f where f.is_partition and not exists (
                    select from pg_trigger k
                     where k.tgrelid = f.member and k.tgname = g.tgname and k.tgparentid <> 0 and k.tgfoid = g.tgfoid
                       and k.tgargs = g.tgargs and k.tgenabled = g.tgenabled)))
      ) then 'installed'
      else 'outdated' end
    into state;
end
$$;

-- cdc.enable_capture(relation, …): make the triggers of one table exactly these.
-- Takes:  SHARE ROW EXCLUSIVE on the table when something changes (ACCESS EXCLUSIVE when a trigger has to go), no more
--         than a look at the catalogue otherwise.     Writes: cdc.captured_table, pg_trigger.
-- Needs:  TRIGGER on the table and its partitions; to be its owner when a trigger has to go, or with `always`.
-- Raises: as cdc.capture_plan; 22023 for a condition PostgreSQL does not understand.
create function cdc.enable_capture(
  relation regclass,
  ops text[] default '{insert,update,delete,truncate}',
  image text default 'diff',
  key text[] default null,
  always boolean default false,
  notify text default 'adaptive',
  notify_payload text default 'diff',
  channel text default 'cdc',
  exclude text[] default '{}',
  mask json default '{}',
  conditions json default '{}',
  lenient boolean default false
) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  plan record;
  wanted text[];
  op text;
  alien name;
begin
  select * into plan from cdc.capture_plan(relation, ops, image, key, always, notify, notify_payload, channel,
                                        exclude, mask, conditions, lenient);
  if plan.state = 'installed' then
    return 'unchanged';
  end if;
  if plan.captured is null then
    insert into cdc.captured_table (relation, schema_name, table_name, key_columns, image, hidden)
    select relation, n.nspname, r.relname, plan.key_columns, image, plan.hidden
      from pg_class r join pg_namespace n on n.oid = r.relnamespace where r.oid = relation;
  end if;
  -- Once more, for the number that goes into the triggers.
  select p.arguments into wanted
    from cdc.capture_plan(relation, ops, image, key, always, notify, notify_payload, channel,
                          exclude, mask, conditions, lenient) p;

  perform cdc.set_trigger(relation, '00_cdc_capture',
    (select string_agg(o, ' or ' order by o) from unnest(ops) as o where o <> 'truncate' and conditions -> o is null),
    null, always, wanted);
  foreach op in array array['insert', 'update', 'delete'] loop
    begin
      perform cdc.set_trigger(relation, '00_cdc_' || op, case when op = any (ops) and conditions -> op is not null then op end,
        conditions ->> op, always, wanted);
    exception
      when insufficient_privilege then
        raise;
      when syntax_error_or_access_rule_violation or invalid_object_definition or feature_not_supported then
        raise exception 'the condition of % for % is wrong: %', op, relation, sqlerrm using errcode = 'invalid_parameter_value';
    end;
  end loop;
  perform cdc.set_trigger(relation, '00_cdc_truncate',
    (select o from unnest(ops) as o where o = 'truncate'),
    null, always, wanted);
  for alien in select g.tgname from pg_trigger g
                where g.tgrelid = relation and not g.tgisinternal and starts_with(g.tgname::text, '00_cdc_')
                  and g.tgname not in ('00_cdc_capture', '00_cdc_insert', '00_cdc_update', '00_cdc_delete', '00_cdc_truncate')
  loop
    execute format('drop trigger %I on %s', alien, relation);
  end loop;
  return case plan.state when 'missing' then 'added' else 'changed' end;
end
$$;

-- cdc.set_trigger(relation, name, events, condition, always, arguments): one trigger, made or (no events) removed.
create function cdc.set_trigger(
  relation regclass, name name, events text, condition text, always boolean, arguments text[]
) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  wanted constant "char" := case when always then 'A' else 'O' end;
  member regclass;
begin
  if events is null then
    if exists (select from pg_trigger g where g.tgrelid = relation and g.tgname = name) then
      execute format('drop trigger %I on %s', name, relation);
    end if;
    return;
  end if;
  -- With a condition twice: what PostgreSQL makes of it is known only then.
  for attempt in 1..case when condition is null then 1 else 2 end loop
    execute format('create or replace trigger %I after %s on %s for each %s %s execute function cdc.capture(%s)',
      name, events, relation, case events when 'truncate' then 'statement' else 'row' end, 'when (' || condition || ')',
      (select string_agg(quote_literal(a), ', ' order by n)
         from unnest(cdc.all_arguments(arguments, condition,
                (select g.oid from pg_trigger g where g.tgrelid = relation and g.tgname = name)))
              with ordinality as x (a, n)));
  end loop;
  -- Somebody may have disabled it, in a partition only, too.
  for member in
    with recursive family as (
      select relation::oid as member
      union all
      select i.inhrelid
        from family f
        join pg_class p on p.oid = f.member and p.relkind = 'p'
        join pg_inherits i on i.inhparent = f.member
    )
    select g.tgrelid from family f join pg_trigger g on g.tgrelid = f.member
     where g.tgname = set_trigger.name and g.tgenabled <> wanted
  loop
    execute format('alter table only %s %s trigger %I', member, case when always then 'enable always' else 'enable' end, name);
  end loop;
end
$$;

-- cdc.captured: the tables that carry our triggers now; also one that was captured and has become a partition since.
create or replace view cdc.captured as
  select g.tgrelid as relation, n.nspname as schema_name, r.relname as table_name,
         array_agg(g.tgname::text order by g.tgname) as triggers,
         bool_and(g.tgenabled in ('O', 'A')) as enabled
    from pg_catalog.pg_trigger g
    join pg_catalog.pg_class r on r.oid = g.tgrelid
    join pg_catalog.pg_namespace n on n.oid = r.relnamespace
   where starts_with(g.tgname::text, '00_cdc_') and not g.tgisinternal and g.tgparentid = 0
   group by g.tgrelid, n.nspname, r.relname;

-- ---------------------------------------------------------------------------------------------------------------
revoke all on cdc.definition, cdc.function from public;
revoke all on function cdc.keep_definitions(), cdc.restore_definitions() from public;
revoke all on function cdc.condition_of(oid), cdc.all_arguments(text[], text, oid),
  cdc.set_trigger(regclass, name, text, text, boolean, text[]),
  cdc.capture_plan(regclass, text[], text, text[], boolean, text, text, text, text[], json, json, boolean),
  cdc.enable_capture(regclass, text[], text, text[], boolean, text, text, text, text[], json, json, boolean)
  from public;
grant select on cdc.definition, cdc.function to cdc_reader;
grant execute on function cdc.condition_of(oid), cdc.all_arguments(text[], text, oid),
  cdc.capture_plan(regclass, text[], text, text[], boolean, text, text, text, text[], json, json, boolean) to cdc_reader;
