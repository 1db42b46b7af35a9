-- cdc, revision 0003: columns that are never captured or only as a hash, conditions per operation, and no cast of a user
-- runs with any right of ours.

-- ---------------------------------------------------------------------------------------------------------------
-- to_json(row) runs casts that any user may have defined for his types. cdc_capture may write the outbox, so it must not
-- be who runs them: cdc_nobody does, who may do nothing that everybody may not.

do $role$
begin
  if not exists (select from pg_catalog.pg_roles where rolname = 'cdc_nobody') then
    create role cdc_nobody nologin noinherit;
  end if;
exception when duplicate_object or unique_violation then -- another database of the cluster, at this moment
  null;
end
$role$;
do $member$
begin
  if not pg_catalog.pg_has_role(current_user, 'cdc_nobody', 'usage') then
    execute pg_catalog.format('grant cdc_nobody to %I', current_user);
  end if;
end
$member$;

-- cdc.image(row): the row as JSON. Inherits the settings that cdc.capture pins. In PL/pgSQL, because an SQL function costs
-- a microsecond more.
create function cdc.image(one anyelement) returns json
language plpgsql stable security definer
as $$
begin
  return to_json(one);
end
$$;

-- cdc.key_image(row, columns): these columns of the row as JSON, for rows that are too large as a whole.
create function cdc.key_image(one anyelement, columns text[]) returns json
language plpgsql stable security definer
as $$
declare
  image json;
begin
  execute (
    select 'select json_build_object(' || string_agg(format('%L, ($1).%I', c, c), ', ') || ')' from unnest(columns) as c
  ) into image using one;
  return image;
end
$$;

-- ---------------------------------------------------------------------------------------------------------------
-- What is hidden of a table: column → {"how": exclude, hash or redact, "number": of the column}. A column that is renamed
-- keeps its number, one of a restored dump its name: whatever either of the two says is hidden.
alter table cdc.captured_table add column hidden jsonb not null default '{}';

-- The key of the hashes, made for this installation: both paddings of HMAC (RFC 2104). For cdc.hash alone.
create table cdc.secret (inner_pad bytea not null, outer_pad bytea not null);
do $secret$
declare
  random_key bytea := sha256(convert_to(gen_random_uuid()::text || gen_random_uuid() || gen_random_uuid(), 'UTF8'));
  inner_pad bytea := decode(repeat('36', 64), 'hex');
  outer_pad bytea := decode(repeat('5c', 64), 'hex');
begin
  for i in 0..31 loop
    inner_pad := set_byte(inner_pad, i, get_byte(inner_pad, i) # get_byte(random_key, i));
    outer_pad := set_byte(outer_pad, i, get_byte(outer_pad, i) # get_byte(random_key, i));
  end loop;
  insert into cdc.secret values (inner_pad, outer_pad);
end
$secret$;

-- cdc.hash(value): HMAC-SHA256 of a value as JSON text, in hex.
create function cdc.hash(value json) returns text
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
  select encode(sha256(s.outer_pad || sha256(s.inner_pad || convert_to(value::text, 'UTF8'))), 'hex') from cdc.secret s
$$;

-- cdc.hide(captured table, image): the image without what is hidden. NULL stays NULL, whatever is done to the column.
-- Raises 22P05 or 22P02 on strings json_each cannot unescape (\u0000, lone surrogates): nothing is shown then.
create function cdc.hide(p_table integer, image json) returns json
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
-- The trigger and the verbs, anew.

-- cdc.capture(): the trigger, the same for every table. Reads whole rows, so that a column added, renamed or dropped
-- breaks nothing and needs no new trigger. Must never abort or distort the user's write; only a failing insert into
-- the outbox does, which is the promise of durability.
-- Arguments: 0 cdc.captured_table.id · 1 bell: adaptive, always, off, or ephemeral: the notification is the event and
--            nothing is stored · 2 channel · 3 payload: diff, wake · 4, if there: the table has hidden columns
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
        old_image := cdc.image(old);
        size := octet_length(old_image::text);
      end if;
      if op <> 'd' then
        new_image := cdc.image(new);
        size := size + octet_length(new_image::text);
      end if;
      if tg_nargs > 4 then
        old_image := cdc.hide(tg_argv[0]::integer, old_image);
        new_image := cdc.hide(tg_argv[0]::integer, new_image);
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
          if tg_nargs > 4 then
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

drop function cdc.enable_capture(regclass, text[], text, text[], boolean, text, text, text);
drop function cdc.capture_plan(regclass, text[], text, text[], boolean, text, text, text);

-- cdc.capture_plan(relation, …): what enable_capture would make of one table, and whether it stands already. Reads only;
-- the definition of our triggers is kept as a hash in their comments, so that drift can be seen.
-- Conditions are kept by operation; `mask` says of a column hash or redact. A column that is not there is an error, unless
-- `lenient`: the options were meant for many tables.
-- Returns: state ('installed', 'outdated', 'missing'), the key columns, the cdc.captured_table row (null: a new one is
--          needed), what is hidden, the comment the triggers should carry.
-- Raises:  42809 for what cannot be captured, 42703 for a column that does not exist, 22023 for a needless key or one that nobody would see.
create function cdc.capture_plan(
  relation regclass, ops text[], image text, key text[], always boolean, notify text, notify_payload text, channel text,
  exclude text[], mask json, conditions json, lenient boolean,
  out state text, out key_columns text[], out captured integer, out hidden jsonb, out definition text
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

  select t.id into captured from cdc.captured_table t
   where t.relation = capture_plan.relation and t.schema_name = c.nspname and t.table_name = c.relname
     and t.key_columns is not distinct from capture_plan.key_columns and t.image = capture_plan.image
     and t.hidden = capture_plan.hidden
   order by t.id desc limit 1;
  definition := 'cdc ' || md5(concat_ws('|', 2, captured, array_to_string(array(select o from unnest(ops) as o order by o), ','),
                                        always, notify, notify_payload, channel, conditions::jsonb));
  select string_agg(obj_description(g.oid, 'pg_trigger') || ' ' || g.tgenabled::text, ';' order by g.tgname) into present
    from pg_trigger g
   where g.tgrelid = relation and not g.tgisinternal and g.tgname like '00\_cdc\_%';
  state := case
    when present is null then 'missing'
    when captured is not null and present = array_to_string(array_fill(
           definition || case when always then ' A' else ' O' end,
           array[(select count(*) from json_object_keys(conditions))::integer
                 + (ops && array(select o from unnest('{insert,update,delete}'::text[]) as o where conditions -> o is null))::integer
                 + ('truncate' = any (ops))::integer]), ';') then 'installed'
    else 'outdated' end;
end
$$;

-- cdc.enable_capture(relation, …): make the triggers of one table exactly these.
-- Takes:  SHARE ROW EXCLUSIVE on the table when something changes (ACCESS EXCLUSIVE when a trigger has to go), no more
--         than a look at the catalogue otherwise.     Writes: cdc.captured_table, pg_trigger.
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
  wanted record;
  call_ text;
  op text;
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
  -- Once more, for the number and the hash that go into the triggers.
  select p.captured, p.definition into wanted
    from cdc.capture_plan(relation, ops, image, key, always, notify, notify_payload, channel,
                          exclude, mask, conditions, lenient) p;
  call_ := format('execute function cdc.capture(%L, %L, %L, %L%s)', wanted.captured, notify, channel, notify_payload,
                  case when plan.hidden <> '{}' then ', ''hidden''' end);

  perform cdc.set_trigger(relation, '00_cdc_capture',
    (select string_agg(o, ' or ' order by o) from unnest(ops) as o where o <> 'truncate' and conditions -> o is null),
    'for each row ' || call_, always, wanted.definition);
  foreach op in array array['insert', 'update', 'delete'] loop
    begin
      perform cdc.set_trigger(relation, '00_cdc_' || op, case when op = any (ops) and conditions -> op is not null then op end,
        format('for each row when (%s) %s', conditions ->> op, call_), always, wanted.definition);
    exception when syntax_error_or_access_rule_violation or invalid_object_definition or feature_not_supported then
      raise exception 'the condition of % for % is wrong: %', op, relation, sqlerrm using errcode = 'invalid_parameter_value';
    end;
  end loop;
  perform cdc.set_trigger(relation, '00_cdc_truncate',
    (select o from unnest(ops) as o where o = 'truncate'),
    'for each statement ' || call_, always, wanted.definition);
  return case plan.state when 'missing' then 'added' else 'changed' end;
end
$$;

-- cdc.disable_capture(relation): remove our triggers from one table. What the outbox holds of it stays.
-- Takes: ACCESS EXCLUSIVE on the table when there is something to remove (DROP TRIGGER has no weaker form).
create or replace function cdc.disable_capture(relation regclass) returns text
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
  ours name;
  answer text := 'unchanged';
begin
  for ours in select g.tgname from pg_trigger g
               where g.tgrelid = relation and not g.tgisinternal and g.tgname like '00\_cdc\_%' loop
    execute format('drop trigger %I on %s', ours, relation);
    answer := 'removed';
  end loop;
  return answer;
end
$$;

-- cdc.captured: the tables that carry our triggers now.
create or replace view cdc.captured as
  select g.tgrelid as relation, n.nspname as schema_name, r.relname as table_name,
         array_agg(g.tgname::text order by g.tgname) as triggers,
         bool_and(g.tgenabled in ('O', 'A')) as enabled
    from pg_catalog.pg_trigger g
    join pg_catalog.pg_class r on r.oid = g.tgrelid
    join pg_catalog.pg_namespace n on n.oid = r.relnamespace
   where g.tgname like '00\_cdc\_%' and not g.tgisinternal and not r.relispartition
   group by g.tgrelid, n.nspname, r.relname;

-- ---------------------------------------------------------------------------------------------------------------
revoke all on table cdc.secret from public;
revoke all on function cdc.image(anyelement), cdc.key_image(anyelement, text[]), cdc.hash(json), cdc.hide(integer, json)
  from public;
revoke all on function
  cdc.capture_plan(regclass, text[], text, text[], boolean, text, text, text, text[], json, json, boolean),
  cdc.enable_capture(regclass, text[], text, text[], boolean, text, text, text, text[], json, json, boolean)
  from public;
grant execute on function cdc.image(anyelement), cdc.key_image(anyelement, text[]), cdc.hash(json), cdc.hide(integer, json)
  to cdc_capture;
grant execute on function
  cdc.capture_plan(regclass, text[], text, text[], boolean, text, text, text, text[], json, json, boolean) to cdc_reader;

-- Handing a function over takes, for a moment, the right to create in the schema.
grant create on schema cdc to cdc_nobody;
alter function cdc.image(anyelement) owner to cdc_nobody;
alter function cdc.key_image(anyelement, text[]) owner to cdc_nobody;
revoke create on schema cdc from cdc_nobody;
