"""What fits which card, and what to change where it does not."""

from dataclasses import replace

from qlora_serve.train.plan.estimate import Planner, Variant
from qlora_serve.train.plan.memory import Frozen, Plan
from qlora_serve.train.plan.weights import Scheme

CARDS_GIB = (8, 16, 24, 40, 80)
GIB = 2**30

# Not measured here (no GPU): what a CUDA context takes, and what an allocator loses to gaps.
_CONTEXT_BYTES = 3 * GIB // 4
_USABLE_SHARE = 0.95
_SHORTEST = 256
_TO_LORA = "--method lora"


class CardFit(Frozen):
    """Whether training and serving fit a card."""

    card_gib: int
    usable: int
    """Bytes: the card's, less a CUDA context and 5 % for gaps."""
    fits: bool
    """Training, as the recipe says."""
    advice: list[str]
    """What to change, in this order, until it fits; empty where it fits as it is."""
    advised_total: int | None
    """Bytes of training with these changes; None where none of them is enough."""
    smallest: int
    """Bytes of training with all changes that were tried."""
    serving_fits: bool
    kv_tokens: int
    """Tokens of KV cache that serving has room for."""


def usable(card_gib: int) -> int:
    """Bytes of a card that tensors can have."""
    return int(card_gib * GIB * _USABLE_SHARE) - _CONTEXT_BYTES


def card_fits(planner: Planner, plan: Plan) -> list[CardFit]:
    """Each card with the fewest changes that make training fit it."""
    wanted = usable(CARDS_GIB[0])
    tried: list[tuple[list[str], int]] = [([], plan.training.total)]
    used = planner
    for changes, variant in _changes(planner.given, planner.is_full):
        if tried[-1][1] <= wanted:
            break
        if used.is_full and _TO_LORA in changes:
            used = planner.with_lora()
        total = used.training(variant).total
        if total < tried[-1][1]:
            tried.append((changes, total))
    return [_fit(card, tried, plan) for card in CARDS_GIB]


def _fit(card: int, tried: list[tuple[list[str], int]], plan: Plan) -> CardFit:
    room = usable(card)
    found = next(((changes, total) for changes, total in tried if total <= room), None)
    serving = plan.serving
    fixed = serving.weights + serving.adapters + serving.step
    return CardFit(
        card_gib=card,
        usable=room,
        fits=found is not None and not found[0],
        advice=found[0] if found else [],
        advised_total=found[1] if found else None,
        smallest=min(total for _, total in tried),
        serving_fits=serving.total <= room,
        kv_tokens=max(0, room - fixed) // serving.kv_bytes_per_token,
    )


def _changes(given: Variant, is_full: bool) -> list[tuple[list[str], Variant]]:
    """Ever more changes to a recipe: first those that cost time, then those that cost precision."""
    said: list[str] = []
    variant = given
    found = []

    def add(line: str, changed: Variant) -> None:
        nonlocal variant
        said.append(line)
        variant = changed
        found.append((list(said), variant))

    if not variant.checkpointing:
        add("--gradient-checkpointing", replace(variant, checkpointing=True))
    if variant.micro_batch > 1:
        line = f"--micro-batch 1 with {variant.micro_batch} times the accumulation"
        add(line, replace(variant, micro_batch=1))
    if is_full:
        add(_TO_LORA, variant)
    if variant.how.kind == "none":
        add("--quantization nf4", replace(variant, how=Scheme("nf4")))
    length = variant.length // 2
    while length >= _SHORTEST:
        # A shorter length stands in the place of a less short one.
        if said and said[-1].startswith("--max-length"):
            said.pop()
        add(f"--max-length {length}", replace(variant, length=length))
        length //= 2
    return found
