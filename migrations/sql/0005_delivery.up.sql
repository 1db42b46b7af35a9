-- cdc, revision 0005: dead letters that hold back their keys until they have come back in order, and sinks that are paused.

-- ---------------------------------------------------------------------------------------------------------------
-- What people want of a sink. Its pipeline looks at both every few seconds.
alter table cdc.sink
  add column paused boolean not null default false,
  -- Grows whenever somebody else touches the sink's dead letters, or pauses or resumes it. Whoever does takes this row first
  -- and the letters after it; the pipeline stores events that wait behind a letter only if the number is still the one it
  -- read their keys under. So no event is set to wait behind a letter that has just gone.
  add column requests bigint not null default 0;

-- ---------------------------------------------------------------------------------------------------------------
-- What must be known of a dead letter without reading its event.
alter table cdc.dead_letter
  add column seq bigint not null default 0,
  add column schema_name text,
  add column table_name text,
  add column keys text[] not null default '{}', -- the event's key, and where it was changed the one before; none: no key
  add column parked boolean not null default false, -- later events of its keys wait; without keys, those of its table
  add column wanted boolean not null default false; -- to be delivered: asked for by cdc dead-letters replay

-- Read off the text: json_each and its like refuse strings that PostgreSQL cannot hold, and a string cannot contain an
-- unescaped quote, so what is found between quotes is not part of one.
update cdc.dead_letter d
   set seq = coalesce((regexp_match(d.event_id, '-(\d{1,18})-\d+$'))[1]::bigint, 0),
       schema_name = found.schema_name #>> '{}',
       table_name = found.table_name #>> '{}',
       keys = case when found.key is null then '{}' else array[found.key] end
  from (select l.id,
               (regexp_match(l.event::text, '"schema":("(?:[^"\\]|\\.)*"),"table":"'))[1]::json as schema_name,
               (regexp_match(l.event::text, '"schema":"(?:[^"\\]|\\.)*","table":("(?:[^"\\]|\\.)*"),"seq":'))[1]::json
                 as table_name,
               (regexp_match(l.event::text, '\},"key":(\{.*?\}),"before":'))[1] as key
          from cdc.dead_letter l) as found
 where found.id = d.id;

create index dead_letter_in_order on cdc.dead_letter (sink, seq, id);
-- What a replay walks along: few, where many letters only lie there.
create index dead_letter_in_turn on cdc.dead_letter (sink, seq, id) where wanted or parked;
