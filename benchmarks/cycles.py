"""Cycles of one warp through machine code: a model, ESTIMATED and never measured.

A warp issues in order: an instruction when the one before has been issued and its operands are
there, its result after the latency below. All that it meets is ready when it starts. Control and
barriers hold back whatever follows by their latency. A wait (DEPBAR, MEMBAR, s_waitcnt) holds back
until all memory accesses before it have arrived, on AMD but for as many as it names.

The path is straight: both sides of a branch, but no call (the slow path of a division).

Latencies are round numbers from published microbenchmarks of A100, H100 and MI300X, taken for
their successors too. A global load takes that of the memory level which the caller names.

    NVIDIA  arithmetic 4, MUFU and conversions 20, shared memory and constants 25, HMMA 24,
            HGMMA 16, tcgen05 64, jumps 8, barrier 20; L1 35, L2 260
    AMD     vector arithmetic 4 (which is also the time to issue it), v_rcp 16, LDS 64, scalar loads
            and L1 120, mfma 32 or 64, jumps 8, barrier 20, L2 300; s_waitcnt counts stores too
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

# for sm_80 some jumps are written as calls of a label
JUMP = re.compile(r"^(?:@!?U?P\d+ )?(?:(?:BRA|CALL)\b.*?`\(|s_c?branch\w* )(\.L\w+)")
CALL = re.compile(r"^(?:@!?U?P\d+ )?CALL\b.*?`\(\$")
LEAVES = re.compile(r"^(?:BRA `|EXIT|RET|s_branch|s_endpgm)")  # whatever the predicates hold
END = re.compile(r"^(?:@!?U?P\d+ )?EXIT|^s_endpgm")
BARRIER = re.compile(r"^(?:@!?U?P\d+ )?(?:BAR\.|s_barrier)")
DIVISION = re.compile(r"\b(?:MUFU\.RCP|v_rcp_f32)")

# The first pattern that an operation matches: kind, cycles until its result is there
LATENCIES = [
    (r"LDGDEPBAR", "", 4),
    (r"LDGSTS|LDG|LD\b|global_load|buffer_load|flat_load", "memory", 0),
    (r"STG|ST\b|RED|ATOM", "", 4),
    (r"global_store|buffer_store|global_atomic", "memory", 0),
    (r"LDS|LDSM|LDC|ULDC", "", 25),
    (r"ds_|s_load", "local", 64),
    (r"MUFU|FCHK|F2I|I2F|S2R|R2UR|v_readfirstlane", "", 20),
    (r"HMMA|DMMA|IMMA", "", 24),
    (r"HGMMA", "", 16),
    (r"UTC|LDTM|STTM", "", 64),
    (r"v_mfma_f32_32x32", "", 64),
    (r"v_mfma", "", 32),
    (r"v_rcp|v_sqrt|v_rsq", "", 16),
    (r"DEPBAR|MEMBAR|s_waitcnt", "wait", 0),
    (r"BAR|SYNCS|s_barrier", "hold", 20),
    (r"BRA|CALL|BSYNC|s_c?branch", "hold", 8),
]
REGISTER = re.compile(
    r"\b([vsa])\[(\d+):(\d+)\]|\b(U?R|U?P|[vsa])(\d+)\b(\.64)?|\b(vcc|exec|scc)\b"
)
NOTHING = re.compile(r"ST|RED|LDGSTS|s_cmp|ds_write|\w*_store")  # has no result in a register


@dataclass(frozen=True)
class Code:
    """Instructions and labels (ending in a colon), in order, those of the padding left out."""

    lines: tuple[str, ...]

    @classmethod
    def nvidia(cls, listing: str) -> "Code":
        """From `nvdisasm -c`."""
        pattern = r"^(?:(\.L\w+:)|\s+/\*[0-9a-f]+\*/\s+([^;\n]+?)\s*;.*)$"
        found = re.findall(pattern, listing, re.MULTILINE)
        return cls(tuple(label or code for label, code in found if label or code[:3] != "NOP"))

    @classmethod
    def amd(cls, listing: str) -> "Code":
        """From the assembly that Triton keeps."""
        body = listing[: listing.index(".Lfunc_end0:")]
        found = re.findall(r"^(?:(\.LBB\w+:)|\t([a-z][^;\n]*))", body, re.MULTILINE)
        return cls(tuple(label or code.strip() for label, code in found))

    def count(self, indices: Iterable[int] | None = None) -> int:
        """Instructions."""
        chosen = range(len(self.lines)) if indices is None else indices
        return sum(not self.lines[index].endswith(":") for index in chosen)

    def barriers(self, indices: Iterable[int]) -> int:
        return sum(bool(BARRIER.match(self.lines[index])) for index in indices)

    def loops(self) -> list[set[int]]:
        """Lines of each loop, whatever its layout, outer before inner: cycles of the flow graph,
        then those that remain where their entries are taken out."""
        labels = {line[:-1]: index for index, line in enumerate(self.lines) if line.endswith(":")}
        after: dict[int, list[int]] = {}
        for index, line in enumerate(self.lines):
            jump = JUMP.match(line)
            after[index] = [labels[jump[1]]] if jump and jump[1] in labels else []
            if not LEAVES.match(line) and index + 1 < len(self.lines):
                after[index].append(index + 1)

        def within(nodes: set[int]) -> Iterator[set[int]]:
            for loop in circles(nodes, after):
                yield loop
                entries = {n for m, found in after.items() if m not in loop for n in found}
                yield from within(loop - (entries & loop or {min(loop)}))

        return list(within(set(after)))

    def columns(self, sub: int) -> "Columns":
        """The loops of solve_columns around its `sub` divisions, one for each column step."""
        end = max(index for index, line in enumerate(self.lines) if END.match(line))
        divisions = {i for i, line in enumerate(self.lines[:end]) if DIVISION.search(line)}
        if len(divisions) != sub:
            raise RuntimeError(f"expected {sub} divisions, one per column, found {len(divisions)}")
        loops = self.loops()  # outer before inner: the first of two is never the smaller
        around = [loop for loop in loops if divisions <= loop]
        others = [loop for loop in loops if not divisions <= loop]
        others = [x for x in others if not any(x < y for y in others)]
        step = around[-1].difference(*others)
        near = [sorted(loop) for loop in others if loop < around[-1]]
        far = [sorted(loop) for loop in others if loop < around[0] - around[-1]]
        return Columns(sorted(step), near, far)

    def cycles(self, indices: Sequence[int], memory: int) -> int:
        """Of one warp through these lines; memory: latency of a global load."""
        lines = [self.lines[index] for index in indices]
        return chain(without_calls(lines), memory)


@dataclass(frozen=True)
class Columns:
    """step: lines of the loop over SUB columns but for `near`, its loops over earlier columns of
    the tile. far: the loops over the tiles before."""

    step: list[int]
    near: list[list[int]]
    far: list[list[int]]


def circles(nodes: set[int], after: dict[int, list[int]]) -> Iterator[set[int]]:
    """Nodes that reach each other: strongly connected components with an edge (Tarjan)."""
    number: dict[int, int] = {}
    lowest: dict[int, int] = {}
    open_: list[int] = []
    for root in sorted(nodes):
        work = [] if root in number else [(root, iter(after[root]))]
        while work:
            node, rest = work[-1]
            if node not in number:
                number[node] = lowest[node] = len(number)
                open_.append(node)
            for other in rest:
                if other in nodes and other not in number:
                    work.append((other, iter(after[other])))
                    break
                if other in open_:
                    lowest[node] = min(lowest[node], number[other])
            else:
                work.pop()
                if work:
                    above = work[-1][0]
                    lowest[above] = min(lowest[above], lowest[node])
                if lowest[node] == number[node]:
                    start = open_.index(node)
                    found, open_ = set(open_[start:]), open_[:start]
                    if len(found) > 1 or node in after[node]:
                        yield found


def without_calls(lines: Sequence[str]) -> list[str]:
    """Jumps over a call are taken."""
    kept: list[str] = []
    until = None
    for index, line in enumerate(lines):
        if until:
            until = None if line == until else until
            continue
        kept.append(line)
        jump = JUMP.match(line)
        label = f"{jump[1]}:" if jump else None
        if label in lines[index:]:
            skipped = lines[index : lines.index(label, index)]
            until = label if any(map(CALL.match, skipped)) else None
    return kept


def registers(operands: str) -> list[str]:
    found = []
    for kind, low, high, name, number, wide, flag in REGISTER.findall(operands):
        if flag:
            found.append(flag)
        elif kind:
            found += [f"{kind}{n}" for n in range(int(low), int(high) + 1)]
        else:
            found += [f"{name}{int(number) + n}" for n in range(2 if wide else 1)]
    return found


def chain(lines: Sequence[str], memory: int) -> int:
    """Cycles until the last of these instructions is issued and all registers are written."""
    ready: dict[str, int] = {}
    pending: dict[str, list[int]] = {"vmcnt": [], "lgkmcnt": []}  # arrivals of memory accesses
    now = 0
    for line in lines:
        if line.endswith(":"):
            continue
        parsed = re.match(r"^(@!?U?P\d+ )?(\S+)\s*(.*)$", line)
        assert parsed is not None, line
        guard, operation, operands = parsed.groups()
        kind, latency = "", 4
        for pattern, of_kind, cycles in LATENCIES:
            if re.match(pattern, operation):
                kind, latency = of_kind, cycles
                break
        first, _, rest = operands.partition(",")
        reads = registers((guard or "") + (operands if NOTHING.match(operation) else rest))
        now = max([now, *(ready.get(name, 0) for name in reads)])
        if kind == "wait":
            counts = re.findall(r"(vmcnt|lgkmcnt)\((\d+)\)", operands)
            for counter, left in counts or [(counter, 0) for counter in pending]:
                arrivals = pending[counter]
                now = max([now, *arrivals[: len(arrivals) - int(left)]])
        elif kind == "memory":
            latency = memory
            pending["vmcnt"].append(now + memory)
        elif kind == "local":
            pending["lgkmcnt"].append(now + latency)
        if kind == "hold":
            now += latency
        elif not NOTHING.match(operation):
            written = registers(first)
            width = 4 if re.search(r"\.128|MMA", operation) else 1
            width = 2 if re.search(r"\.64\b|WIDE", operation) else width
            if width > 1 and len(written) == 1 and (own := re.match(r"(\D+)(\d+)", written[0])):
                written = [f"{own[1]}{int(own[2]) + n}" for n in range(width)]
            ready |= dict.fromkeys(written, now + latency)
        now += 4 if operation.startswith("v_") else 1
    return max([now, *ready.values()])
