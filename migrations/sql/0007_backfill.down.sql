-- cdc, revision 0007, undone. Backfills are forgotten; what the revision before had another body for is put back by the
-- revision's script. A sink that was delivering the events of some tables again delivers those of all.
drop function cdc.backfill_batch(text, bigint, bigint, integer, bigint, integer, bigint, integer);
drop function cdc.scans(oid, cdc.key_column[], text[], text[]);
drop function cdc.after_row(cdc.key_column[], text[]);
drop function cdc.check_condition(oid, text);
drop function cdc.backfill_obstacle(oid);
drop function cdc.capture_of(oid);
drop function cdc.paging(oid, integer);
drop type cdc.key_column;
drop function cdc.captured_image(anyelement, integer, text, text[]);
drop function cdc.passes(anyelement, text);
drop function cdc.rewind(text, pg_snapshot, text[]);
drop function cdc.note_moment();
drop table cdc.moment, cdc.backfill_progress, cdc.backfill;
alter table cdc.sink drop column backfill_due, drop column skip_shown, drop column skip_but;
