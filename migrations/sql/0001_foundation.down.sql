-- cdc, revision 0001, undone: triggers first, then everything in the schema. The roles stay: they belong to the
-- cluster, and another database of it may use them (cdc uninstall removes them when it is the last).
do $triggers$
declare
  t record;
begin
  for t in select relation from cdc.captured loop
    perform cdc.disable_capture(t.relation);
  end loop;
end
$triggers$;

drop view cdc.captured;
drop function cdc.disable_capture(regclass);
drop function cdc.enable_capture(regclass, text[], text, text[], boolean, text, text, text);
drop function cdc.set_trigger(regclass, name, text, text, boolean, text);
drop function cdc.capture_plan(regclass, text[], text, text[], boolean, text, text, text);
drop function cdc.rotate(interval);
drop function cdc.covers(pg_snapshot, pg_snapshot);
drop function cdc.next_batch(text, bigint, bigint, integer, bigint);
drop function cdc.capture();
drop function cdc.payload(integer, "char", bigint, xid8, timestamptz, json, json, text);
drop function cdc.diff(json, json, text[]);
drop table cdc.dead_letter;
drop table cdc.sink;
drop function cdc.leaf_of(bigint);
drop table cdc.event_0, cdc.event_1, cdc.event_2, cdc.event;
drop sequence cdc.event_seq;
drop table cdc.captured_table;
drop table cdc.installation;
revoke select on cdc.alembic_version from cdc_reader;
revoke usage on schema cdc from cdc_capture, cdc_reader;
