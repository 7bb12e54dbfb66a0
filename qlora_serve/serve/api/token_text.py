"""What single tokens say, for log-probabilities."""

from functools import cache
from typing import Any


class TokenTexts:
    """Texts and bytes of single tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = {
            token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items()
        }
        self._is_byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)

    def text(self, token_id: int) -> str:
        """A token alone; bytes that make no character are U+FFFD."""
        return self.bytes(token_id).decode("utf-8", errors="replace")

    def bytes(self, token_id: int) -> bytes:
        """The token's own bytes; none for an id that the tokenizer does not know."""
        if token_id in self._special:
            return str(self._special[token_id]).encode()
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return b""
        if self._is_byte_level:
            table = _byte_of_character()
            return b"".join(
                bytes([table[character]]) if character in table else character.encode()
                for character in piece
            )
        # SentencePiece: bytes that are no character have names, and a space is a low line.
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return str(piece).replace("\u2581", " ").encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes (GPT-2's table).

    Printable bytes are written as themselves; the others, in order, as the characters from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table |= {chr(256 + number): byte for number, byte in enumerate(others)}
    return table
