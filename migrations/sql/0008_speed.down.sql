-- cdc, revision 0008, undone. What the revision before had another body for is put back by the revision's script; nothing
-- else has changed.
select 'nothing but functions';
