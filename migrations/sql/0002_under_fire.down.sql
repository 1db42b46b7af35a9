-- cdc, revision 0002, undone. The bodies of cdc.capture() and cdc.rotate() are put back by the revision's script.
-- Triggers of ephemeral tables would store what they were told not to: they go.
do $ephemeral$
declare
  t record;
begin
  for t in select g.tgrelid from pg_catalog.pg_trigger g
            where g.tgname in ('00_cdc_capture', '00_cdc_truncate') and not g.tgisinternal and g.tgparentid = 0
              and pg_catalog.pg_get_triggerdef(g.oid) ~ 'cdc\.capture\(''\d+'', ''ephemeral'','
  loop
    perform cdc.disable_capture(t.tgrelid);
  end loop;
end
$ephemeral$;

revoke delete on cdc.sink from cdc_reader;
revoke update (silent_until) on cdc.installation from cdc_reader;
drop function cdc.take(text, text, integer, interval);
drop function cdc.rebase();
drop function cdc.place();
drop function cdc.holder(integer, bigint);
drop function cdc.slot(integer, bigint);
drop table cdc.origin;
alter table cdc.installation drop column silent_until;
alter table cdc.sink drop column dropped, drop column timeline;
