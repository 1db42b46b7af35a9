-- cdc, revision 0008, undone. What the revision before had another body for is put back by the revision's script; nothing
-- but functions has changed.
drop function cdc.next_batch(text, bigint, bigint, integer, bigint, boolean);
