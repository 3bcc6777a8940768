"""The reader of compiled programs: kinds, bytes, loops, branches, synchronous and asynchronous exchanges."""

import pytest

from tests.collectives import Collective, collectives, times, total_bytes

PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%wrapped (p: bf16[8,16]) -> bf16[2,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %rs = bf16[2,16]{1,0} reduce-scatter(%p), dimensions={0}, to_apply=%add
}

%inner (p.1: (s32[], f64[3,4])) -> (s32[], f64[3,4]) {
  %p.1 = (s32[], f64[3,4]{1,0}) parameter(0)
  %x.1 = f64[3,4]{1,0} get-tuple-element(%p.1), index=1
  %shift.1 = f64[3,4]{1,0} collective-permute(%x.1), channel_id=1, source_target_pairs={{0,1},{1,2}}
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  ROOT %t.1 = (s32[], f64[3,4]{1,0}) tuple(%i.1, %shift.1)
}

%few (p.2: (s32[], f64[3,4])) -> pred[] {
  %p.2 = (s32[], f64[3,4]{1,0}) parameter(0)
  ROOT %less = pred[] custom-call(%p.2), custom_call_target="less"
}

%outer (p.3: (s32[], f64[3,4])) -> (s32[], f64[3,4]) {
  %p.3 = (s32[], f64[3,4]{1,0}) parameter(0)
  ROOT %w.1 = (s32[], f64[3,4]) while(%p.3), condition=%few, body=%inner, backend_config={"known_trip_count":{"n":"9"}}
}

%yes (p.4: f32[5]) -> f32[5] {
  %p.4 = f32[5]{0} parameter(0)
  %start = (f32[5]{0}, f32[20]{0}) all-gather-start(%p.4), channel_id=3, dimensions={0}
  ROOT %done = f32[20]{0} all-gather-done(%start)
}

%no (p.5: f32[5]) -> f32[5] {
  ROOT %p.5 = f32[5]{0} parameter(0)
}

ENTRY %main (x: f64[3,4], y: f32[5], z: bf16[8,16]) -> f32[5] {
  %x = f64[3,4]{1,0} parameter(0)
  %y = f32[5]{0} parameter(1)
  %z = bf16[8,16]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %t.2 = (s32[], f64[3,4]{1,0}) tuple(%zero, %x)
  %w.2 = (s32[], f64[3,4]{1,0}) while(%t.2), condition=%few, body=%outer, metadata={op_name="jit(f)/while"}
  %both = (f32[5]{0}, /*index=1*/pred[7]{0}) all-reduce(%y, %flags), replica_groups={{0,1,2,3}}, to_apply=%add
  %flags = pred[7]{0} constant({...})
  %c = f32[5]{0} conditional(%flag, %y, %y), branch_computations={%yes, %no}
  %s = ((bf16[8,16]{1,0}), bf16[2,16]{1,0}) async-start(%z), calls=%wrapped
  %d = bf16[2,16]{1,0} async-done(%s), calls=%wrapped
  %cp = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(f32[5]{0} %y), source_target_pairs={{0,1}}
  %cpd = f32[5]{0} collective-permute-done(%cp)
  ROOT %a2a = f32[5]{0} all-to-all(%cpd), dimensions={0}
}
"""


def test_every_kind_once_with_the_bytes_that_a_device_hands_over_and_the_loops_around_it():
    found = collectives(PROGRAM)
    assert found == [
        Collective("collective-permute", 96, (None, 9)),
        Collective("all-reduce", 27, ()),
        Collective("all-gather", 20, ()),
        Collective("reduce-scatter", 256, ()),
        Collective("collective-permute", 20, ()),
        Collective("all-to-all", 20, ()),
    ]
    assert times(found[0]) == 9
    assert total_bytes(found, "collective-permute") == 9 * 96 + 20


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="ENTRY computation, given 5 characters"):
        collectives("hello")
