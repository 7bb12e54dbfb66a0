"""Which tokens a base has never learnt, seen from its embeddings.

A base model that was not trained on chats often has the chat tokens in its vocabulary all the
same, as rows that no text ever moved. An adapter on the linear layers cannot teach it such a
token; the embedding and the output head have to be trained too. A model's name says little about
this, while its rows say it plainly: rows that training never reached stay empty, stay at their
first size, or drift together (Land and Bartolo, arXiv:2405.05417).
"""

from collections.abc import Iterable
from typing import Any

from qlora_serve.base.identity import read_header, weight_files
from qlora_serve.base.skeleton import build_skeleton
from qlora_serve.base.source import BaseSource
from qlora_serve.base.tokenizer import encode_text, render_chat
from qlora_serve.errors import BaseModelError

# Rows that only weight decay and a common gradient have moved are equal to a fraction of this;
# in SmolLM2 the unused rows differ by 0.0005 of their length, a fine-tuned one from them by 0.1.
_TWIN_DISTANCE = 0.01
_TWINS = 2
# Of the median length: SmolLM2's shortest trained row has 0.57 of it.
_SHORT = 0.2
_FEWEST_UNUSED = 8
_RARE = 0.01


def untrained_rows(weight: Any, tokens: Iterable[int], used: int | None = None) -> list[int]:
    """Those of `tokens` whose rows look as if training never reached them.

    A row is untrained when it is empty, when it equals several others, when it is far shorter than
    ordinary rows, or when it is as long as the rows that no tokenizer can produce while
    ordinary rows are not.

    Args:
        weight: an embedding or output head, [vocabulary, hidden], in any float dtype.
        tokens: the token ids to look at.
        used: how many tokens the tokenizer knows; rows from there on are padding.
    """
    import torch

    matrix = torch.as_tensor(weight).detach()
    wanted = [token for token in dict.fromkeys(tokens) if 0 <= token < len(matrix)]
    if not wanted:
        return []
    lengths = torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32)  # [vocabulary]
    count = min(used or len(matrix), len(matrix))
    ordinary = lengths[:count]
    shortest = _SHORT * float(ordinary.median())
    unused = lengths[count:]
    found = []
    for token in wanted:
        length = float(lengths[token])
        if (
            length == 0
            or length < shortest
            or _is_like_unused(length, ordinary, unused)
            or _twins(matrix, lengths, token) >= _TWINS
        ):
            found.append(token)
    return found


def _twins(matrix: Any, lengths: Any, token: int) -> int:
    """How many other rows equal a token's."""
    import torch

    row, length = matrix[token].float(), lengths[token]
    # Rows of about the same length are few; only those are compared in full.
    near = torch.nonzero((lengths - length).abs() <= _TWIN_DISTANCE * length).flatten()
    distances = torch.linalg.vector_norm(matrix[near].float() - row, dim=1)
    return int((distances <= _TWIN_DISTANCE * length).sum()) - 1


def _is_like_unused(length: float, ordinary: Any, unused: Any) -> bool:
    if len(unused) < _FEWEST_UNUSED:
        return False
    low = (1 - _TWIN_DISTANCE) * float(unused.min())
    high = (1 + _TWIN_DISTANCE) * float(unused.max())
    if not low <= length <= high:
        return False
    share = float(((ordinary >= low) & (ordinary <= high)).float().mean())
    return share < _RARE


def template_tokens(tokenizer: Any) -> list[int]:
    """The special tokens that the chat template writes around a user's and an assistant's turn."""
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids = encode_text(tokenizer, render_chat(tokenizer, chat))
    return list(dict.fromkeys(token for token in ids if token in special))


def untrained_template_tokens(tokenizer: Any, weights: Iterable[Any]) -> list[str]:
    """The template's special tokens that a base has never learnt, as text.

    Args:
        tokenizer: the base's, with its chat template.
        weights: the embedding and, where it is not tied to it, the output head.
    """
    wanted = template_tokens(tokenizer)
    found: set[int] = set()
    for weight in weights:
        found.update(untrained_rows(weight, wanted, len(tokenizer)))
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in wanted if token in found]


def vocabulary_weights(model: Any) -> list[Any]:
    """A loaded model's embedding and its output head, the latter only where it is not tied."""
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    modules = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    return [module.weight for module in modules if module.weight.is_floating_point()]


def read_vocabulary_weights(source: BaseSource) -> list[Any]:
    """The same from a base's files, without loading the rest of it.

    Raises:
        BaseModelError: the files hold no embedding under the name that transformers gives it.
    """
    from safetensors import safe_open

    skeleton = build_skeleton(source)
    modules = {skeleton.get_input_embeddings(), skeleton.get_output_embeddings()} - {None}
    names = {f"{name}.weight" for name, module in skeleton.named_modules() if module in modules}
    found = []
    for file in weight_files(source):
        header, _ = read_header(file)
        with safe_open(file, framework="pt") as stream:
            found += [stream.get_tensor(name) for name in sorted(names & header.keys())]
    if not found:
        raise BaseModelError(f"{source.path} holds none of: {', '.join(sorted(names))}")
    return [tensor for tensor in found if tensor.is_floating_point()]
