"""Which blocks of the KV cache belong to whom. It counts, and never touches a tensor.

Keys and values are kept in blocks of a few tokens (PagedAttention, arXiv:2309.06180). A block that
is full can be shared by every sequence with the same beginning, so full blocks are offered in a
tree: a path from its root spells the tokens of a prefix. The tree compares the tokens themselves,
never a hash of them, and has one root for each adapter and scale, so that a prefix computed with
one adapter can never answer for another.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

GONE = -1
"""In a table: the block of tokens that no query will see any more."""

# Of the blocks that begin like a prompt goes on, this many are compared, the newest first.
_COMPARED_CHILDREN = 32


@dataclass(frozen=True)
class BlockGroup:
    """Layers that keep the same tokens, so that one block number serves them all."""

    blocks: int
    """How many there are."""
    window: int | None = None
    """Tokens that a query sees, itself included (sliding-window attention); None for all."""


@dataclass(frozen=True)
class Copy:
    """A block to copy before the step runs, since its beginning is shared and its rest is not."""

    group: int
    source: int
    target: int


class _Node:
    """A full block of tokens in the tree of known prefixes; a root has none."""

    __slots__ = ("blocks", "children", "key", "parent", "tails", "tokens")

    def __init__(
        self, parent: "_Node | None", tokens: tuple[int, ...], groups: int, key: Hashable = None
    ) -> None:
        self.parent = parent
        self.tokens = tokens
        self.key = key
        """Of a root."""
        self.blocks: list[int | None] = [None] * groups
        """Where each group keeps it; None when the block was needed for something else."""
        self.children: dict[tuple[int, ...], _Node] = {}
        self.tails = 0
        """Sequences that will hang their next full block here."""


class _Pool:
    """The blocks of one group."""

    def __init__(self, group: BlockGroup) -> None:
        self.window = group.window
        self.users = [0] * group.blocks
        self.nodes: list[_Node | None] = [None] * group.blocks
        self.free = list(range(group.blocks - 1, -1, -1))
        self.idle: OrderedDict[int, None] = OrderedDict()
        """Known prefixes that nobody uses, the longest unused first."""

    @property
    def available(self) -> int:
        return len(self.free) + len(self.idle)

    def share(self, block: int) -> None:
        if self.users[block] == 0:
            del self.idle[block]
        self.users[block] += 1


@dataclass(eq=False)
class BlockTable:
    """The blocks of one sequence, by group and by the number of the block in the sequence."""

    blocks: list[list[int]]
    tail: _Node
    offered: int = 0
    """Full blocks that are in the tree."""


@dataclass(frozen=True)
class Beginning:
    """What a sequence starts with."""

    table: BlockTable
    cached: int
    """Tokens whose keys and values are there already."""
    copies: tuple[Copy, ...] = ()


@dataclass
class _Match:
    nodes: list[_Node] = field(default_factory=list)
    partial: _Node | None = None
    partial_tokens: int = 0


class BlockManager:
    """Gives out the blocks of every group, and remembers what the full ones hold."""

    def __init__(self, groups: Sequence[BlockGroup], block_tokens: int, reuse: bool = True) -> None:
        self.block_tokens = block_tokens
        self._reuse = reuse
        self._pools = [_Pool(group) for group in groups]
        self._roots: dict[Hashable, _Node] = {}

    @property
    def available(self) -> int:
        """Blocks that can be given out, in the group that has the fewest."""
        return min(pool.available for pool in self._pools)

    @property
    def used(self) -> int:
        """Blocks that sequences hold, over all groups; a shared one counts once."""
        return sum(len(pool.users) - pool.available for pool in self._pools)

    @property
    def total(self) -> int:
        """Blocks that there are, over all groups."""
        return sum(len(pool.users) for pool in self._pools)

    def begin(
        self,
        key: Hashable,
        tokens: Sequence[int],
        spare: Sequence[int],
        chunk: int,
        most_cached: int | None = None,
    ) -> Beginning | None:
        """Opens a table for `tokens`, with as much of their beginning as is known.

        At least the last token is left to compute, since its logits are wanted.

        Args:
            key: what the keys and values depend on besides the tokens: adapter and scale.
            tokens: all that are known of the sequence.
            spare: blocks of each group that must stay available.
            chunk: tokens that one step may compute, which is what a windowed group must hold
                besides its window.
            most_cached: tokens that may be taken over at most; all but the last when left out.

        Returns:
            None where there is no room now; nothing is taken then.
        """
        known = tokens if most_cached is None else tokens[: most_cached + 1]
        match = self._match(key, known) if self._reuse else _Match()
        count = len(match.nodes)
        cached = count * self.block_tokens + match.partial_tokens
        taken: list[list[int]] = []
        for number, pool in enumerate(self._pools):
            hidden = min(self._hidden_blocks(pool, count * self.block_tokens), count)
            blocks = [GONE] * hidden
            for node in match.nodes[hidden:]:
                block = node.blocks[number]
                assert block is not None
                pool.share(block)
                blocks.append(block)
            taken.append(blocks)
        if key not in self._roots:
            self._roots[key] = _Node(None, (), len(self._pools), key)
        tail = match.nodes[-1] if count else self._roots[key]
        table = BlockTable(taken, tail, count)
        tail.tails += 1
        missing = self.missing(table, cached, len(tokens), chunk)
        if any(
            more + kept > pool.available
            for more, kept, pool in zip(missing, spare, self._pools, strict=True)
        ):
            self.release(table)
            return None
        copies = []
        if match.partial is not None:
            for number, pool in enumerate(self._pools):
                source = match.partial.blocks[number]
                assert source is not None
                target = self._take(number, pool)
                table.blocks[number].append(target)
                copies.append(Copy(number, source, target))
        return Beginning(table, cached, tuple(copies))

    def extend(self, table: BlockTable, tokens: int) -> bool:
        """Makes room for the first `tokens` tokens of a sequence; all of it, or nothing."""
        wanted = -(-tokens // self.block_tokens)
        missing = [wanted - len(blocks) for blocks in table.blocks]
        if any(n > pool.available for n, pool in zip(missing, self._pools, strict=True)):
            return False
        for number, (pool, count) in enumerate(zip(self._pools, missing, strict=True)):
            table.blocks[number] += [self._take(number, pool) for _ in range(count)]
        return True

    def reach(self, table: BlockTable) -> int:
        """The most tokens for which `extend` would succeed."""
        ends = [
            len(blocks) + pool.available
            for blocks, pool in zip(table.blocks, self._pools, strict=True)
        ]
        return min(ends) * self.block_tokens

    def computed(
        self, table: BlockTable, count: int, read: Callable[[int, int], Sequence[int]]
    ) -> None:
        """Offers what became full, and lets go of what no query will see any more.

        Args:
            table: of the sequence.
            count: tokens of it whose keys and values are computed by now.
            read: gives `n` tokens of the sequence from a position: `read(start, n)`.
        """
        size = self.block_tokens
        while self._reuse and (table.offered + 1) * size <= count:
            self._offer(table, tuple(read(table.offered * size, size)))
        for number, pool in enumerate(self._pools):
            blocks = table.blocks[number]
            index = min(self._hidden_blocks(pool, count), len(blocks)) - 1
            while index >= 0 and blocks[index] != GONE:
                self._give_back(number, pool, blocks[index])
                blocks[index] = GONE
                index -= 1

    def release(self, table: BlockTable, keep: bool = True) -> None:
        """Gives a sequence's blocks back; with `keep`, what is full stays known."""
        for number, pool in enumerate(self._pools):
            # The last first: of one sequence, the end is forgotten before the beginning.
            for block in reversed(table.blocks[number]):
                if block != GONE:
                    self._give_back(number, pool, block, keep)
            table.blocks[number] = []
        table.tail.tails -= 1
        self._prune(table.tail)

    def _hidden_blocks(self, pool: _Pool, computed: int) -> int:
        """Blocks at the beginning that the query at position `computed` does not see."""
        if pool.window is None:
            return 0
        return max(0, computed - pool.window + 1) // self.block_tokens

    def missing(self, table: BlockTable, cached: int, tokens: int, chunk: int) -> list[int]:
        """Blocks of each group that a table needs before `tokens` tokens can be computed.

        Args:
            table: of a sequence.
            cached: tokens whose keys and values are there.
            tokens: all that are known of the sequence.
            chunk: tokens that one step may compute.
        """
        counts = []
        for pool, blocks in zip(self._pools, table.blocks, strict=True):
            end = tokens
            if pool.window is not None:  # what lies before the window is given back on the way
                end = min(tokens, max(cached, pool.window) + chunk)
            count = -(-end // self.block_tokens) - len(blocks)
            # Chunks adapt to what there is: more than everything is never needed.
            most = len(pool.users) - sum(block != GONE for block in blocks)
            counts.append(max(0, min(count, most)))
        return counts

    def _match(self, key: Hashable, tokens: Sequence[int]) -> _Match:
        """The longest known beginning of `tokens` that leaves at least one to compute."""
        node = self._roots.get(key)
        match = _Match()
        if node is None:
            return match
        size = self.block_tokens
        path: list[_Node] = []
        runs = [0] * len(self._pools)  # blocks in a row that each group still has
        best = 0
        while (len(path) + 1) * size < len(tokens):
            start = len(path) * size
            child = node.children.get(tuple(tokens[start : start + size]))
            if child is None:
                break
            node = child
            path.append(node)
            runs = [
                run + 1 if block is not None else 0
                for run, block in zip(runs, node.blocks, strict=True)
            ]
            if self._is_whole(len(path), runs):
                best = len(path)
        match.nodes = path[:best]
        last = path[best - 1] if best else self._roots[key]
        match.partial, match.partial_tokens = self._partial(last, tokens, best * size)
        return match

    def _is_whole(self, count: int, runs: Sequence[int]) -> bool:
        """Whether every group has what a query after `count` blocks sees of them."""
        return all(
            run >= count - self._hidden_blocks(pool, count * self.block_tokens)
            for run, pool in zip(runs, self._pools, strict=True)
        )

    def _partial(self, node: _Node, tokens: Sequence[int], start: int) -> tuple[_Node | None, int]:
        """The child that shares the most tokens from `start`, and how many."""
        rest = tokens[start : min(start + self.block_tokens, len(tokens) - 1)]
        best: tuple[_Node | None, int] = (None, 0)
        for compared, child in enumerate(reversed(node.children.values())):
            if compared == _COMPARED_CHILDREN:
                break
            same = 0
            for mine, theirs in zip(rest, child.tokens, strict=False):
                if mine != theirs:
                    break
                same += 1
            if same > best[1] and None not in child.blocks:
                best = (child, same)
        return best

    def _offer(self, table: BlockTable, tokens: tuple[int, ...]) -> None:
        """Puts the next full block of a sequence into the tree."""
        parent = table.tail
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = _Node(parent, tokens, len(self._pools))
        for number, pool in enumerate(self._pools):
            block = table.blocks[number][table.offered]
            # Another sequence may have computed the same meanwhile: then ours stays its own.
            if node.blocks[number] is None and block != GONE:
                node.blocks[number] = block
                pool.nodes[block] = node
        node.tails += 1
        parent.tails -= 1
        table.tail = node
        table.offered += 1

    def _take(self, number: int, pool: _Pool) -> int:
        if pool.free:
            block = pool.free.pop()
        else:
            block, _ = pool.idle.popitem(last=False)
            self._forget(number, pool, block)
        pool.users[block] = 1
        return block

    def _give_back(self, number: int, pool: _Pool, block: int, keep: bool = True) -> None:
        pool.users[block] -= 1
        assert pool.users[block] >= 0
        if pool.users[block]:
            return
        if keep and pool.nodes[block] is not None:
            pool.idle[block] = None
        else:
            self._forget(number, pool, block)
            pool.free.append(block)

    def _forget(self, number: int, pool: _Pool, block: int) -> None:
        node = pool.nodes[block]
        if node is not None:
            pool.nodes[block] = None
            node.blocks[number] = None
            self._prune(node)

    def _prune(self, node: _Node) -> None:
        """Takes out of the tree what holds nothing and leads nowhere."""
        while not node.children and not node.tails and all(b is None for b in node.blocks):
            if node.parent is None:
                if self._roots.get(node.key) is node:
                    del self._roots[node.key]
                return
            if node.parent.children.get(node.tokens) is node:
                del node.parent.children[node.tokens]
            node = node.parent
