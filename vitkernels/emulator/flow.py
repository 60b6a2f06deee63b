"""The order in which the engine runs the lanes of a diverged warp, so that they reconverge.

On a GPU, lanes that took different branches reconverge where their paths join. The engine therefore always runs the
lanes that are furthest behind. "Behind" must follow the control flow, not the text: in the text a loop's end may stand
before its middle.
"""

from __future__ import annotations

from collections.abc import Iterable


def components(nodes: list[int], successors: dict[int, list[int]]) -> list[list[int]]:
    """Return the strongly connected components in topological order (Tarjan's algorithm without recursion)."""
    number: dict[int, int] = {}
    lowest: dict[int, int] = {}
    stack, on_stack, found = [], set(), []
    for root in nodes:
        if root in number:
            continue
        work = [(root, iter(successors[root]))]
        number[root] = lowest[root] = len(number)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for after in rest:
                if after not in number:
                    number[after] = lowest[after] = len(number)
                    stack.append(after)
                    on_stack.add(after)
                    work.append((after, iter(successors[after])))
                    break
                if after in on_stack:
                    lowest[node] = min(lowest[node], number[after])
            else:
                work.pop()
                if work:
                    lowest[work[-1][0]] = min(lowest[work[-1][0]], lowest[node])
                if lowest[node] == number[node]:
                    component = []
                    while not component or component[-1] != node:
                        component.append(stack.pop())
                        on_stack.remove(component[-1])
                    found.append(component)
    return found[::-1]


def arranged(nodes: Iterable[int], successors: dict[int, list[int]], entry: int) -> list[int]:
    """Order blocks: each after those that lead to it; a loop's blocks together, its entry first."""
    nodes = [entry, *sorted(set(nodes) - {entry})]
    inside = set(nodes)
    # Without the edges back to the entry, the region is no loop.
    forward = {n: [s for s in successors[n] if s in inside and s != entry] for n in nodes}
    order = []
    for component in components(nodes, forward):
        if len(component) == 1:
            order += component
            continue
        members = set(component)
        entered = [s for n in nodes if n not in members for s in forward[n] if s in members]
        order += arranged(component, successors, min(entered, default=min(component)))
    return order


def order_of(length: int, targets: dict[int, list[int]], ends: set[int]) -> list[int]:
    """Return each instruction's place in the order.

    Args:
        length: Number of instructions.
        targets: For each jump, the instructions that may run next; the following one too, if the jump may not be taken.
        ends: Instructions after which the program ends.
    """
    starts = {0, *(t for to in targets.values() for t in to), *(p + 1 for p in (*targets, *ends) if p + 1 < length)}
    blocks = sorted(starts)
    successors = {}
    for first, end in zip(blocks, [*blocks[1:], length], strict=True):
        last = end - 1
        successors[first] = targets.get(last, [] if last in ends or end == length else [end])
    sizes = dict(zip(blocks, (b - a for a, b in zip(blocks, [*blocks[1:], length], strict=True)), strict=True))
    place, order = 0, [0] * length
    for block in arranged(blocks, successors, 0):
        for i in range(sizes[block]):
            order[block + i] = place + i
        place += sizes[block]
    return order
