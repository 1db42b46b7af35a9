-- cdc, revision 0004, undone. What the revision before had another body for is put back by the revision's script; its
-- triggers do the same under either, but for virtual generated columns, which are null again.

drop function cdc.enable_capture(regclass, text[], text, text[], boolean, text, text, text, text[], json, json, boolean);
drop function cdc.capture_plan(regclass, text[], text, text[], boolean, text, text, text, text[], json, json, boolean);
drop function cdc.set_trigger(regclass, name, text, text, boolean, text[]);
drop function cdc.all_arguments(text[], text, oid);
drop function cdc.condition_of(oid);
drop function cdc.restore_definitions();
drop function cdc.keep_definitions();
drop view cdc.function;
drop table cdc.definition;
