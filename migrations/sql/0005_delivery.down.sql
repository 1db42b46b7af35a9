-- cdc, revision 0005, undone. Dead letters stay, but hold nothing back any more; a sink that is paused goes on.
alter table cdc.dead_letter
  drop column seq, drop column schema_name, drop column table_name, drop column keys, drop column parked,
  drop column wanted;
alter table cdc.sink drop column paused, drop column requests;
