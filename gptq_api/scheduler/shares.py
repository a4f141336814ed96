"""What an owner may hold of seats and blocks, and who gives way when one holds more while another waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from gptq_api.scheduler.blocks import BlockManager
from gptq_api.scheduler.sequence import Sequence
from gptq_api.scheduler.waiting import rank
from gptq_api.types import BACKGROUND


def in_background(seq: Sequence) -> bool:
    """Whether nobody waits for it."""
    return seq.rank[0] >= BACKGROUND


def _seats(seq: Sequence) -> int:
    return 1


def _blocks(seq: Sequence) -> int:
    """Shared ones count for each that shares them."""
    return len(seq.block_table)


def _held(running: Iterable[Sequence], num: Callable[[Sequence], int]) -> Counter[bytes]:
    """How much each owner holds."""
    held = Counter[bytes]()
    for seq in running:
        held[seq.owner] += num(seq)
    return held


def _youngest_of_the_richest(running: list[Sequence], num: Callable[[Sequence], int], share: int) -> Sequence | None:
    """The youngest sequence of the owner that holds most, where that is more than its share and not its only one.

    An owner's oldest sequence never gives way, nor does anybody at or below the share: so the oldest of all goes on
    whatever happens, and two that are each too large for both cannot drive each other out for ever.
    """
    held, numbers = _held(running, num), _held(running, _seats)
    rich = [owner for owner, amount in held.items() if amount > share and numbers[owner] > 1]
    if not rich:
        return None
    richest = max(rich, key=held.__getitem__)
    return max((seq for seq in running if seq.owner == richest), key=rank)


def who_leaves_a_seat(seq: Sequence, running: list[Sequence], num_owners: int, max_num_seqs: int) -> Sequence | None:
    """For `seq`, which waits and with which its owner would stay within its share; in the background, for any that is
    not, the youngest."""
    if not in_background(seq) and (idle := [other for other in running if in_background(other)]):
        return max(idle, key=rank)
    share = max(1, max_num_seqs // num_owners)
    if num_owners == 1 or _held(running, _seats)[seq.owner] >= share:
        return None
    return _unless_more_urgent(seq, _youngest_of_the_richest(running, _seats, share))


def who_leaves_blocks(
    seq: Sequence, running: list[Sequence], num_owners: int, blocks: BlockManager, missing: int
) -> Sequence | None:
    """For `seq`, which waits for `missing` blocks, and with all of which its owner would stay within its share. None
    where those that are over theirs do not hold as many. Who is in the background gives way to any that is not."""
    if not in_background(seq) and (idle := [other for other in running if in_background(other)]):
        return max(idle, key=rank)
    share = blocks.num_blocks // num_owners
    held = _held(running, _blocks)
    wanted = -(-len(seq.token_ids) // blocks.block_size)
    surplus = sum(amount - share for amount in held.values() if amount > share)
    if num_owners == 1 or held[seq.owner] + wanted > share or surplus < missing:
        return None
    return _unless_more_urgent(seq, _youngest_of_the_richest(running, _blocks, share))


def who_loses_its_blocks(running: list[Sequence], num_owners: int, blocks: BlockManager) -> Sequence:
    """Where no block is left and somebody has to: of the highest level the youngest sequence of an owner that holds
    more than its share, or else the youngest of all."""
    last = max(running, key=rank)
    least_urgent = [seq for seq in running if seq.rank[0] == last.rank[0]]
    return _youngest_of_the_richest(least_urgent, _blocks, blocks.num_blocks // num_owners) or last


def _unless_more_urgent(seq: Sequence, victim: Sequence | None) -> Sequence | None:
    return None if victim is None or victim.rank[0] < seq.rank[0] else victim
