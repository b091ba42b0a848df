"""HLO modules by hand: a computation that adds, a loop, and any ENTRY."""

ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""
LOOP = """
%test (state: (s32[], f32[8])) -> pred[] {
  %state = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %go = pred[] compare(SIDES), direction=WAY
}
%body (old: (s32[], f32[8])) -> (s32[], f32[8]) {
  %old = (s32[], f32[8]{0}) parameter(0)
  %j = s32[] get-tuple-element(%old), index=0
  %k = s32[] copy(%j)
  %step = s32[] constant(STEP)
  %next = s32[] add(%k, %step)
  %x = f32[8]{0} get-tuple-element(%old), index=1
  %y = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %new = (s32[], f32[8]{0}) tuple(%next, %y)
}
ENTRY %main (p: f32[8], n: s32[]) -> (s32[], f32[8]) {
  %p = f32[8]{0} parameter(0)
  %n = s32[] parameter(1)
  %c = s32[] constant(START)
  %start = s32[] copy(%c)
  %first = (s32[], f32[8]{0}) tuple(%start, %p)
  ROOT %loop = (s32[], f32[8]{0}) while(%first), condition=%test, body=%body
}
"""


def entry(lines, *, before=""):
    """Return a module whose ENTRY computation is `lines`, for eight devices."""
    lines = [f"  {line.strip()}" for line in lines.strip().splitlines()]
    return f"HloModule m, is_scheduled=true, num_partitions=8\n{before}\n" + "\n".join(
        ["ENTRY %main () -> f32[] {", *lines, "}"]
    )


def loop(start=0, limit=5, step=1, way="LT", sides="%i, %limit"):
    """Return a module of a counted loop around an all-reduce."""
    text = ADD + LOOP
    for name in ("start", "limit", "step", "way", "sides"):
        text = text.replace(name.upper(), str(locals()[name]))
    return text
