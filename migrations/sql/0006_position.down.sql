-- cdc, revision 0006, undone. What the revision before had another body for is put back by the revision's script.
alter table cdc.sink
  add column snap_lo pg_snapshot, add column snap_hi pg_snapshot, add column last_seq bigint not null default 0,
  add column range_seq bigint, add column final_seq bigint, add column delivered_at timestamptz;
update cdc.sink k
   set snap_lo = p.snap_lo, snap_hi = p.snap_hi, last_seq = p.last_seq, range_seq = p.range_seq, final_seq = p.final_seq,
       delivered_at = p.delivered_at
  from cdc.position p where p.sink = k.name;
alter table cdc.sink
  alter column snap_lo set not null,
  add check (snap_hi is not null or (range_seq is null and final_seq is null));
alter table cdc.sink
  set (fillfactor = 20, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);
drop table cdc.position;
