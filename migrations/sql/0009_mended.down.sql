-- cdc, revision 0009, undone. What the revision before had another body for is put back by the revision's script.
alter table cdc.event replica identity default;
alter table cdc.event_0 replica identity default;
alter table cdc.event_1 replica identity default;
alter table cdc.event_2 replica identity default;
alter table cdc.position replica identity default;
alter table cdc.backfill_progress replica identity default;
alter table cdc.moment replica identity default;
alter table cdc.origin replica identity default;
